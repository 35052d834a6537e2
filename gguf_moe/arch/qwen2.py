"""Qwen2, dense: biases on query, key and value. After Qwen2Model of llama.cpp's converter."""

from __future__ import annotations

import gguf

from gguf_moe.arch.base import Architecture, ModelFacts
from gguf_moe.arch.reading import Defaults, add_keys, dense
from gguf_moe.arch.tables import BIASES, DENSE, ENDS, NORMS, PROJECTIONS

DEFAULTS = Defaults(
    vocabulary=151936,
    hidden=4096,
    feed_forward=22016,
    layers=32,
    heads=32,
    kv_heads=32,
    context=32768,
    norm_epsilon=1e-6,
    rope_kinds=("default", "linear", "yarn", "dynamic"),  # no frequency factors in llama.cpp's code for Qwen
    windowed=False,
    window=4096,
    free_head_size=False,
)


def add_last_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    """Dense models of Qwen have no key after general.file_type."""


ARCHITECTURE = Architecture(
    name="qwen2",
    hf_names=("Qwen2ForCausalLM",),
    facts=dense(DEFAULTS),
    templates=(*ENDS, *NORMS, *PROJECTIONS, *BIASES, *DENSE),
    add_keys=add_keys,
    add_last_keys=add_last_keys,
)
