"""Qwen3, dense: norms on the heads of query and key. After Qwen3Model of llama.cpp's converter."""

from __future__ import annotations

from dataclasses import replace

from gguf_moe.arch.base import Architecture
from gguf_moe.arch.qwen2 import DEFAULTS, add_last_keys
from gguf_moe.arch.reading import add_keys, dense
from gguf_moe.arch.tables import BIASES, DENSE, ENDS, HEAD_NORMS, NORMS, PROJECTIONS, optional

_DEFAULTS = replace(DEFAULTS, head_size=128, free_head_size=True, writes_head_size=True)


ARCHITECTURE = Architecture(
    name="qwen3",
    hf_names=("Qwen3ForCausalLM",),
    facts=dense(_DEFAULTS),
    templates=(*ENDS, *NORMS, *HEAD_NORMS, *PROJECTIONS, *optional(BIASES), *DENSE),
    add_keys=add_keys,
    add_last_keys=add_last_keys,
)
