"""Qwen3, dense: norms on the heads of query and key. After Qwen3Model of llama.cpp's converter."""

from __future__ import annotations

from gguf_moe.arch.base import Architecture, ModelFacts
from gguf_moe.arch.qwen2 import ROPE_KINDS, add_last_keys
from gguf_moe.arch.reading import Defaults, add_keys, read_facts, refuse_experts_used
from gguf_moe.arch.tables import BIASES, DENSE, ENDS, HEAD_NORMS, NORMS, PROJECTIONS, optional
from gguf_moe.checkpoint import Config

_DEFAULTS = Defaults(
    vocabulary=151936,
    hidden=4096,
    feed_forward=22016,
    layers=32,
    heads=32,
    kv_heads=32,
    head_size=128,
    context=32768,
    norm_epsilon=1e-6,
    rope_kinds=ROPE_KINDS,
    windowed=False,
    window=4096,
    writes_head_size=True,
)


def _read(config: Config, experts_used: int | None) -> ModelFacts:
    refuse_experts_used(config, experts_used)
    return read_facts(config, _DEFAULTS)


ARCHITECTURE = Architecture(
    name="qwen3",
    hf_names=("Qwen3ForCausalLM",),
    facts=_read,
    templates=(*ENDS, *NORMS, *HEAD_NORMS, *PROJECTIONS, *optional(BIASES), *DENSE),
    add_keys=add_keys,
    add_last_keys=add_last_keys,
)
