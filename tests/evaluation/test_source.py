"""Models opened for evaluation: the same tensors from a checkpoint and any GGUF file of it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import MERGE, as_dtype, bundled
from gguf_files import Parts, changed, sharded
from running import model

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.source import open_model
from gguf_moe.evaluation.weights import Weights

U32, F32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32


def weights(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return Weights(open_model(path), torch.device("cpu"), dtype)


@pytest.mark.parametrize("quant", ["BF16", "Q4_K_M"])
def test_rows_are_the_gguf_packages(quant: str, made) -> None:
    have = weights(made("json", quant))
    for tensor in gguf.GGUFReader(made("json", quant)).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if want.ndim == 3:
            for expert, matrix in enumerate(want):
                assert np.array_equal(have.matrix(tensor.name, expert), matrix)
        else:
            assert np.array_equal(have.matrix(tensor.name), np.atleast_2d(want))


def test_a_checkpoint_has_the_tensors_and_keys_of_its_gguf_file(made) -> None:
    checkpoint, file = weights(MERGE), weights(made("json", "BF16"))
    assert {n: t.shape for n, t in checkpoint.source.tensors.items()} == {
        n: t.shape for n, t in file.source.tensors.items()
    }
    for name in ("blk.2.attn_k.weight", "blk.1.ffn_down_exps.weight", "output_norm.weight"):
        assert checkpoint.matrix(name).equal(file.matrix(name))
    assert checkpoint.source.keys.keys() == file.source.keys.keys()
    tokens = gguf.Keys.Tokenizer.LIST
    assert list(checkpoint.source.keys[tokens].value) == list(file.source.keys[tokens].value)


def test_parts_of_a_tensor(made) -> None:
    have = weights(made("json", "Q6_K"))
    whole = have.matrix("token_embd.weight")
    assert have.matrix("token_embd.weight", rows=range(1000, 4096)).equal(whole[1000:])
    ids = np.array([7, 4095, 0, 7])
    assert have.gather("token_embd.weight", ids).equal(whole[ids])
    assert have.matrix("blk.0.ffn_up_exps.weight", 3, dtype=torch.float16).dtype == torch.float16


def test_sizes(made, tmp_path: Path) -> None:
    path = made("json", "Q4_K_M")
    file, checkpoint = open_model(path), open_model(MERGE)
    data = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert (file.name, file.quant, file.size_bytes) == (path.name, "Q4_K_M", path.stat().st_size)
    assert file.bits_per_weight == pytest.approx(8 * data / sum(t.elements for t in file.tensors.values()))
    assert (checkpoint.name, checkpoint.quant, checkpoint.bits_per_weight) == (MERGE.name, "BF16", 16)
    assert checkpoint.size_bytes == sum(p.stat().st_size for p in MERGE.glob("*.safetensors"))
    wide = open_model(as_dtype(bundled(), "F32").save(tmp_path / "wide"))
    assert (wide.quant, wide.bits_per_weight) == ("F32", 32)


def test_shards_are_one_model(made, tmp_path: Path) -> None:
    paths = sharded(made("json", "Q8_0"), tmp_path / "shards", 3)
    shards, whole = weights(paths[0]), weights(made("json", "Q8_0"))
    assert shards.source.size_bytes == sum(path.stat().st_size for path in paths)
    assert shards.source.tensors.keys() == whole.source.tensors.keys()
    for name in whole.source.tensors:
        assert shards.matrix(name).equal(whole.matrix(name))


def put(key: str, value: object, kind: gguf.GGUFValueType = U32) -> Callable[[Parts], None]:
    return lambda parts: parts.set(key, value, kind)


def reshape(name: str, shape: tuple[int, ...]) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        kind, _, data = parts.tensors[name]
        parts.tensors[name] = (kind, shape, data)

    return change


def rename_family(parts: Parts) -> None:
    """gemma, in everything but its tensors."""
    for key in [key for key in parts.keys if key.startswith("llama.")]:
        parts.keys["gemma." + key.removeprefix("llama.")] = parts.keys.pop(key)
    parts.keys["general.architecture"].value = "gemma"


REFUSED: dict[str, tuple[Callable[[Parts], object], str]] = {
    "another family": (rename_family, "general.architecture is 'gemma', expected one of deepseek, llama, qwen2"),
    "a tensor too many": (
        lambda p: p.tensors.update({"blk.0.attn_sinks.weight": ("F32", (4,), bytes(16))}),
        "tensor blk.0.attn_sinks.weight is unknown to the evaluation of architecture llama",
    ),
    "a tensor too few": (
        lambda p: p.tensors.pop("blk.3.attn_norm.weight"),
        "1 tensors are absent: blk.3.attn_norm.weight",
    ),
    "another shape": (
        reshape("blk.1.attn_k.weight", (256, 128)),
        "tensor blk.1.attn_k.weight has shape [256, 128], expected [128, 256] by its keys",
    ),
    "partly rotated heads": (
        put("llama.rope.dimension_count", 32),
        "llama.rope.dimension_count is 32, expected an integer from 64 to 64",
    ),
    "sigmoid routers": (
        put("llama.expert_gating_func", 2),
        "llama.expert_gating_func is 2, expected an integer from 1",
    ),
    "scaled experts": (
        put("llama.expert_weights_scale", 2.5, F32),
        "llama.expert_weights_scale is 2.5, expected 1.0",
    ),
    "no epsilon": (
        lambda p: p.keys.pop("llama.attention.layer_norm_rms_epsilon"),
        "llama.attention.layer_norm_rms_epsilon is missing, expected a positive number",
    ),
    "an endless rotary base": (
        put("llama.rope.freq_base", float("inf"), F32),
        "llama.rope.freq_base is inf, expected a positive number",
    ),
    "unknown scaling": (
        put("llama.rope.scaling.type", "spiral", gguf.GGUFValueType.STRING),
        "llama.rope.scaling.type is 'spiral', expected one of none, linear, yarn, longrope",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, made, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    path = changed(made("json", "BF16"), tmp_path / "bad.gguf", change)
    with pytest.raises(GgufMoeError) as error:
        model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
