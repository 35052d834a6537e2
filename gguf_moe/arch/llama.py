"""The llama architecture of llama.cpp: Llama, Mistral and Mixtral, as mergekit writes them.

Names, shapes, defaults and key order follow llama.cpp's converter (LlamaModel).
"""

from __future__ import annotations

from dataclasses import replace

import gguf

from gguf_moe.arch.base import Architecture, Fused, ModelFacts, Template
from gguf_moe.arch.reading import Defaults, add_keys, dense, read_experts, read_facts
from gguf_moe.arch.tables import ATTENTION, BIASES, BLOCK, DENSE, ENDS, LAYER, MLP, NORMS, PROJECTIONS, optional, rotary
from gguf_moe.checkpoint import Config

_MOE = LAYER + "block_sparse_moe."
_EXPERT = _MOE + "experts.{expert}."

_COMMON = (
    *ENDS,
    *NORMS,
    *rotary(PROJECTIONS),
    *optional(rotary(BIASES)),
    Template(ATTENTION + "o_proj.bias", BLOCK + "attn_output.bias", ("hidden",), required=False),
)

_DENSE = (
    *_COMMON,
    *DENSE,
    Template(MLP + "gate_proj.bias", BLOCK + "ffn_gate.bias", ("feed_forward",), required=False),
    Template(MLP + "up_proj.bias", BLOCK + "ffn_up.bias", ("feed_forward",), required=False),
    Template(MLP + "down_proj.bias", BLOCK + "ffn_down.bias", ("hidden",), required=False),
)

# Experts in the order in which llama.cpp's converter writes the three stacks.
_MIXTRAL = (
    *_COMMON,
    Template(_MOE + "gate.weight", BLOCK + "ffn_gate_inp.weight", ("experts", "hidden")),
    Template(_EXPERT + "w1.weight", BLOCK + "ffn_gate_exps.weight", ("feed_forward", "hidden")),
    Template(_EXPERT + "w2.weight", BLOCK + "ffn_down_exps.weight", ("hidden", "feed_forward")),
    Template(_EXPERT + "w3.weight", BLOCK + "ffn_up_exps.weight", ("feed_forward", "hidden")),
)

_LLAMA_DEFAULTS = Defaults(
    vocabulary=32000,
    hidden=4096,
    feed_forward=11008,
    layers=32,
    heads=32,
    context=2048,
    norm_epsilon=1e-6,
    writes_head_size=True,
)
_MISTRAL_DEFAULTS = replace(_LLAMA_DEFAULTS, feed_forward=14336, kv_heads=8, context=131072, window=4096, windowed=True)
_MIXTRAL_DEFAULTS = replace(_MISTRAL_DEFAULTS, norm_epsilon=1e-5, rope_theta=1e6, window=None, writes_head_size=False)


def _read_mixtral(config: Config, experts_used: int | None) -> ModelFacts:
    experts = read_experts(config, ("num_local_experts",), experts_used, experts=8, used=2)
    return read_facts(config, _MIXTRAL_DEFAULTS, **experts)


def _add_last_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    writer.add_vocab_size(facts.vocabulary)
    writer.add_rope_dimension_count(facts.head_size)


LLAMA = Architecture(
    name="llama",
    hf_names=("LlamaForCausalLM", "LLaMAForCausalLM"),
    facts=dense(_LLAMA_DEFAULTS),
    templates=_DENSE,
    add_keys=add_keys,
    add_last_keys=_add_last_keys,
)
MISTRAL = replace(LLAMA, hf_names=("MistralForCausalLM",), facts=dense(_MISTRAL_DEFAULTS))
MIXTRAL = replace(
    LLAMA,
    hf_names=("MixtralForCausalLM",),
    facts=_read_mixtral,
    templates=_MIXTRAL,
    fused=(  # what transformers 5, and so today's mergekit, writes
        Fused(MLP + "experts.gate_up_proj", (_EXPERT + "w1.weight", _EXPERT + "w3.weight")),
        Fused(MLP + "experts.down_proj", (_EXPERT + "w2.weight",)),
    ),
    aliases=((MLP + "gate.weight", _MOE + "gate.weight"),),
)
