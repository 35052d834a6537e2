"""What a family allows but llama.cpp cannot run is refused: one line, no file, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import architectures as cases
import numpy as np
import pytest
from checkpoints import Parts
from test_architectures import variant
from test_bad_input import refusal

NTK = {"rope_type": "ntk", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
CONFIGS = {
    "dense layers among the experts": (
        "qwen2moe-6",
        {"mlp_only_layers": [0]},
        "mlp_only_layers is [0], but llama.cpp wants experts in every layer",
    ),
    "every second layer dense": (
        "qwen3moe-5",
        {"decoder_sparse_step": 2},
        "decoder_sparse_step is 2, expected 1: llama.cpp wants experts in every layer",
    ),
    "every second layer of deepseek": (
        "deepseek-5",
        {"moe_layer_freq": 2},
        "moe_layer_freq is 2, expected 1: llama.cpp wants experts in every layer but the first",
    ),
    "no shared experts": (
        "deepseek-5",
        {"n_shared_experts": None},
        "n_shared_experts is missing, but llama.cpp wants shared experts in this architecture; merge again with "
        "`architecture: mixtral`",
    ),
    "sigmoid": (
        "deepseek-5",
        {"scoring_func": "sigmoid"},
        "scoring_func is 'sigmoid', but llama.cpp computes 'softmax'",
    ),
    "dense layers only": (
        "deepseek-5",
        {"first_k_dense_replace": 11},
        "first_k_dense_replace is 11 of 11 layers, so no experts",
    ),
    "experts where the config has none": (
        "deepseek-5",
        {"first_k_dense_replace": 3},
        "does not belong in layer 2: config.json says that the first 3 layers are dense and the others have experts",
    ),
    "no default in deepseek": ("deepseek-5", {"first_k_dense_replace": "absent"}, "first_k_dense_replace is missing"),
    "scaling in deepseek": (
        "deepseek-5",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type 'linear' is not known to llama.cpp in this architecture, expected one of default",
    ),
    "llama3 scaling in qwen": (
        "qwen2",
        {"rope_parameters": LLAMA3},
        "rope_type 'llama3' is not known to llama.cpp in this architecture, expected one of default, linear, yarn",
    ),
    "unknown scaling": ("llama", {"rope_parameters": NTK}, "rope_type 'ntk' is not known to llama.cpp"),
    "rope type no text": ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not known"),
    "linear without a factor": ("llama", {"rope_scaling": {"type": "linear"}}, "config.json: factor is missing"),
    "yarn factor zero": ("llama", {"rope_scaling": {"type": "yarn", "factor": 0}}, "factor is 0, expected a positive"),
    "low above high": (
        "llama",
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor 1 is not above low_freq_factor 4",
    ),
    "half heads": (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is not 1, but llama.cpp rotates whole",
    ),
    "head size of its own": (
        "qwen2",
        {"head_dim": 32},
        "head_dim is 32, but in this architecture llama.cpp takes only hidden_size over num_attention_heads, 256 / 4",
    ),
    "flag no flag": ("qwen3moe-5", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', expected true or false"),
    "window no number": ("mistral-head-dim", {"sliding_window": "4k"}, "sliding_window is '4k', expected an integer"),
    "endless experts": (
        "qwen3moe-5",
        {"num_local_experts": 1025},
        "num_local_experts is 1025, llama.cpp takes 1024 at",
    ),
    "fewer experts": (
        "qwen2moe-6",
        {"num_experts": 5},
        "experts.5.down_proj.weight is of expert 5, but config.json says num_experts = 5",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case: str, run, saved: cases.Saved, tmp_path: Path) -> None:
    name, changes, message = CONFIGS[case]
    assert message in refusal(run, variant(saved(name), tmp_path / "in" / "merge", **changes))


def test_more_experts_than_there_are(run, saved: cases.Saved) -> None:
    result = run("convert", saved("mixtral-head-dim-3"), "--bits", 4, "--dry-run", "--experts-used", 4)
    assert result.exit_code == 2
    assert result.stderr.startswith("gguf-moe: --experts-used 4: ")
    assert result.stderr.endswith("config.json has 3 experts (num_local_experts)\n")


@pytest.mark.parametrize("name", ["llama", "mistral-head-dim", "qwen2", "qwen3"])
def test_experts_of_a_dense_model(name: str, run, saved: cases.Saved) -> None:
    result = run("convert", saved(name), "--bits", 4, "--dry-run", "--experts-used", 1)
    assert result.exit_code == 2
    assert result.stderr.endswith("config.json is of a dense model, without experts\n")


def drop(parts: Parts, name: str) -> None:
    del parts.tensors[name]


def add(parts: Parts, name: str, *shape: int, dtype: str = "F32") -> None:
    parts.tensors[name] = (dtype, np.zeros(shape, {"F32": np.float32, "F64": np.float64}[dtype]))


LAYER = "model.layers.1."
TENSORS: dict[str, tuple[str, Callable[[Parts], None], str]] = {
    "a bias in some layers": (
        "llama-tied-biases",
        lambda p: drop(p, LAYER + "self_attn.k_proj.bias"),
        f"1 tensors are absent: {LAYER}self_attn.k_proj.bias (config.json says 8 layers)",
    ),
    "no bias where qwen2 has one": (
        "qwen2-yarn",
        lambda p: [drop(p, f"model.layers.{i}.self_attn.q_proj.bias") for i in range(3)],
        "3 tensors are absent: model.layers.0.self_attn.q_proj.bias, ",
    ),
    "a bias that llama.cpp has no place for": (
        "qwen2-yarn",
        lambda p: add(p, LAYER + "self_attn.o_proj.bias", 256),
        f"tensor {LAYER}self_attn.o_proj.bias is unknown to architecture qwen2",
    ),
    "a dense network of experts": (
        "deepseek-8",
        lambda p: add(p, LAYER + "mlp.up_proj.weight", 160, 96),
        f"{LAYER}mlp.up_proj.weight does not belong in layer 1: config.json says that the first 0 layers are dense",
    ),
    "no shared expert": (
        "qwen2moe-narrow-8",
        lambda p: drop(p, LAYER + "mlp.shared_expert.up_proj.weight"),
        f"absent: {LAYER}mlp.shared_expert.up_proj.weight (config.json says 3 layers of 8 experts)",
    ),
    "a bias of another length": (
        "llama-tied-biases",
        lambda p: add(p, LAYER + "self_attn.q_proj.bias", 95),
        f"{LAYER}self_attn.q_proj.bias has shape [95], expected [96] by config.json",
    ),
    "double precision": (
        "qwen2-yarn",
        lambda p: add(p, LAYER + "self_attn.q_proj.bias", 256, dtype="F64"),
        f"tensor {LAYER}self_attn.q_proj.bias: dtype F64, expected one of BF16, F16, F32",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, run, tmp_path: Path) -> None:
    name, change, message = TENSORS[case]
    parts = cases.recorded(name)
    change(parts)
    assert message in refusal(run, cases.save(parts, tmp_path / "in" / "merge"))


def test_a_bias_that_is_not_finite_is_told_by_its_place(run, tmp_path: Path) -> None:
    parts = cases.recorded("llama-tied-biases")
    bias = parts.tensors[LAYER + "self_attn.q_proj.bias"][1]
    bias[37] = np.nan
    result = run("convert", cases.save(parts, tmp_path / "merge"), "--quant", "F32", "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1
    assert f"tensor {LAYER}self_attn.q_proj.bias holds NaN at [37" in result.stderr.splitlines()[-1]
