"""Qwen3-MoE: experts in every layer, none shared. After Qwen3MoeModel of llama.cpp's converter."""

from __future__ import annotations

from dataclasses import replace

import gguf

from gguf_moe.arch.base import Architecture, ModelFacts
from gguf_moe.arch.qwen2 import DEFAULTS
from gguf_moe.arch.qwen2moe import refuse_dense_layers
from gguf_moe.arch.reading import add_keys, read_experts, read_facts, read_flag, routing_note
from gguf_moe.arch.tables import BIASES, ENDS, EXPERTS, FUSED, HEAD_NORMS, NORMS, PROJECTIONS, ROUTER, optional
from gguf_moe.checkpoint import Config

_DEFAULTS = replace(DEFAULTS, hidden=2048, feed_forward=6144, layers=24, kv_heads=4, free_head_size=True)


def _read(config: Config, experts_used: int | None) -> ModelFacts:
    refuse_dense_layers(config)
    experts = read_experts(config, ("num_experts", "num_local_experts"), experts_used, experts=128, used=8)
    renormalized = read_flag(config, "norm_topk_prob")
    return read_facts(
        config,
        _DEFAULTS,
        **experts,
        expert_feed_forward=config.integer("moe_intermediate_size", 768),
        notes=routing_note(config, experts, renormalized=renormalized, by_llama_cpp=True),
    )


def _add_last_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    writer.add_expert_feed_forward_length(facts.expert_feed_forward)


ARCHITECTURE = Architecture(
    name="qwen3moe",
    hf_names=("Qwen3MoeForCausalLM",),
    facts=_read,
    templates=(*ENDS, *NORMS, *HEAD_NORMS, *PROJECTIONS, *optional(BIASES), *ROUTER, *EXPERTS),
    add_keys=add_keys,
    add_last_keys=_add_last_keys,
    fused=FUSED,
)
