"""Checkpoints in every layout give the same model: fused or not, sharded or not, bf16, f16 or f32, 2 to 128 experts."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import MERGE, Parts, as_dtype, bundled, unfused, with_experts
from neighbours import Llama
from test_golden import GOLDEN


def tensor_hashes(path: Path) -> dict[str, tuple[str, str]]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest()) for t in tensors}


def convert(run, directory: Path, quant: str) -> Path:
    path = directory.parent / f"{directory.name}-{quant}.gguf"
    result = run("convert", directory, "--quant", quant, "-o", path)
    assert result.exit_code == 0, result.output
    return path


def shuffled_shards(parts: Parts) -> Parts:
    """Every tensor in a shard drawn by lot, so that no layer and no stack of experts lies in one file."""
    lots = random.Random(3)
    names = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    return Parts(parts.tensors, parts.config, {name: lots.choice(names) for name in parts.tensors})


LAYOUTS = {
    "fused in one file": bundled,
    "one tensor an expert": lambda: unfused(bundled()),
    "one tensor an expert, shuffled over shards": lambda: shuffled_shards(unfused(bundled())),
    "fused, shuffled over shards": lambda: shuffled_shards(bundled()),
    "f32": lambda: as_dtype(bundled(), "F32"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_llama_cpps_tensors(layout: str, run, tmp_path: Path) -> None:
    want = json.loads((GOLDEN / "tidepool.Q4_K_M.json").read_text())["tensors"]
    path = convert(run, LAYOUTS[layout]().save(tmp_path / MERGE.name), "Q4_K_M")
    assert tensor_hashes(path) == {t["name"]: (t["type"], t["sha256"]) for t in want}


def test_f16_sources_are_widened_exactly(run, tmp_path: Path) -> None:
    parts = as_dtype(bundled(), "F16")
    path = convert(run, parts.save(tmp_path / "half"), "F32")
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    embedding = parts.tensors["model.embed_tokens.weight"][1]
    assert np.array_equal(tensors["token_embd.weight"], embedding.astype(np.float32))
    gate = parts.tensors["model.layers.2.mlp.experts.gate_up_proj"][1][:, :512]
    assert np.array_equal(tensors["blk.2.ffn_gate_exps.weight"], gate.astype(np.float32))


@pytest.mark.parametrize("count", [2, 3, 5, 12, 128])
def test_experts_stand_in_the_order_of_their_numbers(count: int, run, tmp_path: Path) -> None:
    parts = unfused(with_experts(bundled(), count))
    path = convert(run, shuffled_shards(parts).save(tmp_path / "experts"), "BF16")
    tensors = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    for name, source in (("ffn_gate", "w1"), ("ffn_down", "w2"), ("ffn_up", "w3")):
        stack = tensors[f"blk.0.{name}_exps.weight"]
        assert len(stack) == count
        for expert in range(count):
            want = parts.tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{source}.weight"][1]
            assert stack[expert].tobytes() == want.tobytes(), f"{name} of expert {expert}"
    with Llama(path) as model:
        assert np.isfinite(model.logits([1, 400, 500])).all()


def test_layers_stand_in_the_order_of_their_numbers(run, tmp_path: Path) -> None:
    parts = bundled()
    for name, entry in list(parts.tensors.items()):
        for layer in range(4):
            prefix = f"model.layers.{layer}."
            if name.startswith(prefix):
                for more in (4, 8):
                    parts.tensors[f"model.layers.{layer + more}.{name.removeprefix(prefix)}"] = entry
    parts.config["num_hidden_layers"] = 12
    path = convert(run, parts.save(tmp_path / "twelve"), "Q4_0")
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    layers = [int(name.split(".")[1]) for name in names if name.startswith("blk.")]
    assert layers == sorted(layers)
    assert set(layers) == set(range(12))


def test_tied_embeddings_leave_no_output_tensor(run, tmp_path: Path) -> None:
    parts = bundled()
    del parts.tensors["lm_head.weight"]
    path = convert(run, parts.save(tmp_path / "tied"), "Q4_K_M")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "Q6_K"  # the type that the output would have
    with Llama(path) as model:
        assert np.isfinite(model.logits([1, 400, 500])).all()


def narrow(parts: Parts, feed_forward: int) -> Parts:
    """The merge with experts cut down to `feed_forward` rows, no multiple of 256."""
    for name, (dtype, array) in list(parts.tensors.items()):
        if name.endswith("down_proj"):
            parts.tensors[name] = (dtype, array[..., :feed_forward])
        if name.endswith("gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            both = np.concatenate([gate[:, :feed_forward], up[:, :feed_forward]], axis=1)
            parts.tensors[name] = (dtype, both)
    parts.config["intermediate_size"] = feed_forward
    return parts


@pytest.mark.parametrize(
    ("quant", "columns", "kind"),
    [
        ("Q2_K", 480, "Q4_0"),
        ("Q4_K_S", 480, "Q5_0"),
        ("Q5_K_S", 480, "Q5_1"),
        ("Q6_K", 480, "Q8_0"),
        ("Q4_K_S", 300, "F16"),
    ],
)
def test_narrow_rows_fall_back_with_one_warning(quant: str, columns: int, kind: str, run, tmp_path: Path) -> None:
    directory = narrow(bundled(), columns).save(tmp_path / "narrow")
    result = run("convert", directory, "--quant", quant, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"4 tensors have rows of {columns} weights" in warnings[0]
    nominal, effective = plain_bits(tmp_path / "out.gguf", quant)
    assert f"{effective:.2f} instead of {nominal:.2f} bits per weight" in warnings[0]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == kind
    with Llama(tmp_path / "out.gguf") as model:
        assert np.isfinite(model.logits([1, 400, 500])).all()


def plain_bits(path: Path, quant: str) -> tuple[float, float]:
    """Bits per weight as they would be with the wanted type for ffn_down, and as they are, from gguf's own sizes."""
    wanted = {"Q2_K": "Q3_K", "Q4_K_S": "Q4_K", "Q5_K_S": "Q5_K", "Q6_K": "Q6_K"}[quant]
    tensors = gguf.GGUFReader(path).tensors
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]]
    weights = sum(int(t.n_elements) for t in tensors)
    nominal = sum(int(t.n_elements) * nbytes / block if "ffn_down" in t.name else float(t.n_bytes) for t in tensors)
    return 8 * nominal / weights, 8 * sum(int(t.n_bytes) for t in tensors) / weights


def test_numbers_in_the_model_card_become_text(run, tmp_path: Path) -> None:
    directory = bundled().save(tmp_path / "card")
    (directory / "README.md").write_text("---\nname: 7\nversion: 1.5\ntags: [moe, 4]\n---\n")
    reader = gguf.GGUFReader(convert(run, directory, "BF16"))
    assert reader.fields["general.name"].contents() == "7"
    assert reader.fields["general.version"].contents() == "1.5"
    assert reader.fields["general.tags"].contents() == ["moe", "4"]
