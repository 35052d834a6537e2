"""Qwen2-MoE: experts beside a shared one with a gate of its own. After Qwen2MoeModel of llama.cpp's converter."""

from __future__ import annotations

from dataclasses import replace

import gguf

from gguf_moe.arch.base import Architecture, ModelFacts, Template
from gguf_moe.arch.qwen2 import DEFAULTS
from gguf_moe.arch.reading import add_keys, read_experts, read_facts, read_flag, routing_note
from gguf_moe.arch.tables import BIASES, BLOCK, ENDS, EXPERTS, FUSED, MLP, NORMS, PROJECTIONS, ROUTER, optional, shared
from gguf_moe.checkpoint import Config
from gguf_moe.errors import GgufMoeError

_DEFAULTS = replace(DEFAULTS, hidden=2048, feed_forward=5632, layers=24, heads=16, kv_heads=16)

_SHARED_GATE = Template(MLP + "shared_expert_gate.weight", BLOCK + "ffn_gate_inp_shexp.weight", ("one", "hidden"))


def refuse_dense_layers(config: Config) -> None:
    """GgufMoeError for a Qwen mixture some of whose layers have no experts, which llama.cpp has no place for."""
    if only := config.values.get("mlp_only_layers"):
        raise GgufMoeError(f"{config.path}: mlp_only_layers is {only!r}, but llama.cpp wants experts in every layer")
    if (step := config.integer("decoder_sparse_step", 1)) != 1:
        raise GgufMoeError(
            f"{config.path}: decoder_sparse_step is {step}, expected 1: llama.cpp wants experts in every layer"
        )


def _read(config: Config, experts_used: int | None) -> ModelFacts:
    refuse_dense_layers(config)
    experts = read_experts(config, ("num_experts", "num_local_experts"), experts_used, experts=60, used=4)
    renormalized = read_flag(config, "norm_topk_prob")
    return read_facts(
        config,
        _DEFAULTS,
        **experts,
        expert_feed_forward=config.integer("moe_intermediate_size", 1408),
        shared_experts=1,
        shared_feed_forward=config.integer("shared_expert_intermediate_size", 5632),
        notes=routing_note(config, experts, renormalized=renormalized, by_llama_cpp=False),
    )


def _add_last_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    writer.add_expert_feed_forward_length(facts.expert_feed_forward)
    writer.add_expert_shared_feed_forward_length(facts.shared_feed_forward)


ARCHITECTURE = Architecture(
    name="qwen2moe",
    hf_names=("Qwen2MoeForCausalLM",),
    facts=_read,
    templates=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *optional(BIASES),
        *ROUTER,
        *EXPERTS,
        *shared("shared_expert"),
        _SHARED_GATE,
    ),
    add_keys=add_keys,
    add_last_keys=_add_last_keys,
    fused=FUSED,
    renormalized=False,
    needs_output=True,
)
