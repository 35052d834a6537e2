"""DeepSeek-MoE, the first: shared experts beside the routed, after dense first layers. Not DeepSeek V2 or V3.

After DeepseekModel of llama.cpp's converter. transformers does not know this family, so no field has a default there.
"""

from __future__ import annotations

import gguf

from gguf_moe.arch.base import Architecture, ModelFacts
from gguf_moe.arch.reading import Defaults, add_keys, read_experts, read_facts, read_flag, routing_note
from gguf_moe.arch.tables import (
    BIASES,
    DENSE,
    ENDS,
    EXPERTS,
    FUSED,
    NORMS,
    PROJECTIONS,
    ROUTER,
    only,
    optional,
    rotary,
    shared,
)
from gguf_moe.checkpoint import Config
from gguf_moe.errors import GgufMoeError

# llama.cpp's converter tells its code to scale nothing, whatever the config says.
_DEFAULTS = Defaults(rope_kinds=("default",), free_head_size=False)


def _read(config: Config, experts_used: int | None) -> ModelFacts:
    if config.values.get("n_shared_experts") is None:
        raise GgufMoeError(
            f"{config.path}: n_shared_experts is missing, but llama.cpp wants shared experts in this architecture; "
            "merge again with `architecture: mixtral`"
        )
    if (step := config.integer("moe_layer_freq", 1)) != 1:
        raise GgufMoeError(
            f"{config.path}: moe_layer_freq is {step}, expected 1: llama.cpp wants experts in every layer but the first"
        )
    experts = read_experts(config, ("n_routed_experts",), experts_used)
    # Its own code leaves the weight of a single expert alone.
    renormalized = read_flag(config, "norm_topk_prob") and experts["experts_used"] > 1
    shared_experts, width = config.integer("n_shared_experts"), config.integer("moe_intermediate_size")
    facts = read_facts(
        config,
        _DEFAULTS,
        **experts,
        expert_feed_forward=width,
        shared_experts=shared_experts,
        shared_feed_forward=shared_experts * width,
        dense_layers=config.integer("first_k_dense_replace", minimum=0),
        notes=routing_note(config, experts, renormalized=renormalized, by_llama_cpp=False),
    )
    if facts.dense_layers >= facts.layers:
        raise GgufMoeError(
            f"{config.path}: first_k_dense_replace is {facts.dense_layers} of {facts.layers} layers, so no experts"
        )
    return facts


def _add_last_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    writer.add_rope_dimension_count(facts.head_size)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_leading_dense_block_count(facts.dense_layers)
    writer.add_vocab_size(facts.vocabulary)
    writer.add_expert_feed_forward_length(facts.expert_feed_forward)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_shared_count(facts.shared_experts)


ARCHITECTURE = Architecture(
    name="deepseek",
    hf_names=("DeepseekForCausalLM",),
    facts=_read,
    templates=(
        *ENDS,
        *NORMS,
        *rotary(PROJECTIONS),
        *optional(rotary(BIASES)),
        *only("dense", DENSE),
        *only("experts", (*ROUTER, *EXPERTS, *shared("shared_experts"))),
    ),
    add_keys=add_keys,
    add_last_keys=_add_last_keys,
    fused=FUSED,
    renormalized=False,
)
