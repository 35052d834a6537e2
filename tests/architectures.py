"""Small random models of every family and odd shape, made alike here and in tests/tools/make_architectures_golden.py.

A case is what its config.json says besides `SHAPE`; weights follow from the names of the tensors, so that golden data
hold names, shapes and results only.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import DATA, MERGE, Parts

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_QWEN2MOE = {**_MOE, "shared_expert_intermediate_size": 96, "norm_topk_prob": False}
_QWEN3MOE = {**_MOE, "norm_topk_prob": True, "head_dim": 32}
_DEEPSEEK = {**_MOE, "n_shared_experts": 2, "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1}
_EIGHTY = {"num_hidden_layers": 80, "hidden_size": 64, "intermediate_size": 64}  # for llama.cpp, a 70B model
_NARROW = {"hidden_size": 96, "intermediate_size": 160}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


# Name -> (model class of transformers, what its config says otherwise)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_hidden_layers": 11}),
    "llama-tied-biases": (
        "LlamaForCausalLM",
        {**_NARROW, "num_hidden_layers": 8, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": ("LlamaForCausalLM", _rope("linear", factor=4.0)),
    "llama-yarn": ("LlamaForCausalLM", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-rope3": (
        "LlamaForCausalLM",
        _rope(
            "llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-80": ("LlamaForCausalLM", _EIGHTY),
    "mistral-head-dim": (
        "MistralForCausalLM",
        {"head_dim": 96, "num_key_value_heads": 1, "num_hidden_layers": 9, "sliding_window": None},
    ),
    "mixtral-head-dim-3": ("MixtralForCausalLM", {"head_dim": 32, "num_local_experts": 3, "num_hidden_layers": 8}),
    "mixtral-1": (
        "MixtralForCausalLM",
        {"num_local_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 8, "intermediate_size": 160},
    ),
    "mixtral-rope3-8": (
        "MixtralForCausalLM",
        {"num_local_experts": 8, "num_hidden_layers": 16, "intermediate_size": 64}
        | _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=64),
    ),
    "mixtral-tied-7": (
        "MixtralForCausalLM",
        {"num_local_experts": 7, "num_experts_per_tok": 7, "tie_word_embeddings": True, **_NARROW},
    ),
    "mixtral-128": ("MixtralForCausalLM", {"num_local_experts": 128, "intermediate_size": 32, "num_hidden_layers": 2}),
    "qwen2": ("Qwen2ForCausalLM", {"num_hidden_layers": 8, "tie_word_embeddings": True}),
    "qwen2-80": ("Qwen2ForCausalLM", {**_EIGHTY, "num_key_value_heads": 4}),
    "qwen2-yarn": ("Qwen2ForCausalLM", _rope("yarn", factor=2.0, original_max_position_embeddings=32)),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 96, "num_hidden_layers": 8}),
    "qwen2moe-6": ("Qwen2MoeForCausalLM", {**_QWEN2MOE, "num_experts": 6, "num_hidden_layers": 8}),
    "qwen2moe-narrow-8": ("Qwen2MoeForCausalLM", {**_QWEN2MOE, **_NARROW, "num_experts": 8}),
    "qwen2moe-1": (
        "Qwen2MoeForCausalLM",
        {**_QWEN2MOE, "num_experts": 1, "num_experts_per_tok": 1, "num_hidden_layers": 8},
    ),
    "qwen3moe-5": ("Qwen3MoeForCausalLM", {**_QWEN3MOE, "num_experts": 5, "num_hidden_layers": 11}),
    "qwen3moe-tied-8": ("Qwen3MoeForCausalLM", {**_QWEN3MOE, "num_experts": 8, "tie_word_embeddings": True}),
    "deepseek-5": (
        "DeepseekForCausalLM",
        {**_DEEPSEEK, "n_routed_experts": 5, "first_k_dense_replace": 2, "num_hidden_layers": 11},
    ),
    "deepseek-8": (
        "DeepseekForCausalLM",
        {**_DEEPSEEK, **_NARROW, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 0},
    ),
    "deepseek-1": (
        "DeepseekForCausalLM",
        {**_DEEPSEEK, "n_routed_experts": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 1}
        | {"num_hidden_layers": 9},
    ),
}

Saved = Callable[[str], Path]  # the fixture `saved`: a case's name to its checkpoint
PROMPT_TOKENS = 48
KEPT_POSITIONS = (5, 23, 47)
KEPT_LOGITS = slice(None, None, 8)
TOKENIZER_FILES = (
    *((MERGE / name, name) for name in ("tokenizer.json", "tokenizer_config.json")),
    (DATA / "tokenizers" / "tidepool.tokenizer.model", "tokenizer.model"),
)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name, float32: uniform numbers that keep activations near 1 and routers decided."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) * 2 - 1
    if "norm" in name:
        return 1 + drawn / 4
    if name.endswith("bias"):
        return drawn / 4
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return drawn / 8
    scale = 3 if name.endswith("gate.weight") else 1.7  # of a router
    return drawn * np.float32(scale / math.sqrt(shape[-1]))


def prompt() -> list[int]:
    """The tokens that all models read."""
    return [1, *(3 + 83 * i * i % 4000 for i in range(1, PROMPT_TOKENS))]


def parts(config: dict[str, Any], shapes: dict[str, list[int]]) -> Parts:
    """The checkpoint of a case, from its config and the names and shapes that transformers saved."""
    return Parts({name: ("F32", weight(name, tuple(shape))) for name, shape in shapes.items()}, config)


def save(case: Parts, directory: Path) -> Path:
    """Write it with both tokenizer files and no model card, so that all of the output is llama.cpp's."""
    case.save(directory)
    (directory / "README.md").unlink()
    for source, name in TOKENIZER_FILES:
        shutil.copy(source, directory / name)
    (directory / "config.json").write_text(json.dumps(case.config, indent=2))
    return directory


@cache
def golden() -> dict[str, Any]:
    """What was recorded of each case: config, names and shapes, hashes of llama.cpp's files."""
    return json.loads((Path(__file__).parent / "golden" / "architectures.json").read_text())


def recorded(name: str) -> Parts:
    """The checkpoint of a case as transformers saved it."""
    case = golden()[name]
    return parts(dict(case["config"]), case["tensors"])
