"""Experts that are there twice are told, written as often as the file needs, and encoded once; and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import Parts, bundled, unfused
from variants import tied

import quant
from gguf_moe import filling
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.convert import convert
from gguf_moe.duplicates import Duplicates, find_duplicates, same_rows
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type


def with_donors(donors: list[int]) -> Parts:
    """The real merge with these of its experts, in this order; routers keep the rows of four."""
    parts = bundled()
    for name, (dtype, array) in parts.tensors.items():
        if ".mlp.experts." in name:
            parts.tensors[name] = (dtype, np.ascontiguousarray(array[donors]))
    return parts


def duplicates(parts: Parts, directory: Path, quant: str = "Q4_K_M") -> Duplicates:
    return find_duplicates([make_plan(open_checkpoint(parts.save(directory)), find_file_type(quant))])


@pytest.mark.parametrize("layout", [lambda parts: parts, unfused], ids=["fused", "one tensor an expert"])
@pytest.mark.parametrize(
    ("donors", "experts"),
    [([0, 1, 0, 2], {2: 0}), ([3, 3, 1, 1], {1: 0, 3: 2}), ([2, 2, 2, 2], {1: 0, 2: 0, 3: 0}), ([0, 1, 2, 3], {})],
)
def test_repeated_experts_are_found(donors: list[int], experts: dict, layout, tmp_path: Path) -> None:
    found = duplicates(layout(with_donors(donors)), tmp_path)
    assert found.experts == experts
    assert len(found.twins) == len(experts) * 3 * 4
    assert not found.tied


def test_what_is_told(run, tmp_path: Path) -> None:
    path = with_donors([1, 0, 1, 1]).save(tmp_path / "in")
    line = "experts 0, 2 and 3 are identical in all layers by their sampled rows; they are encoded once"
    assert line in run("convert", path, "--bits", 4, "--dry-run").stdout.splitlines()
    assert line in run("convert", path, "--bits", 4, "-o", tmp_path / "out.gguf").stdout.splitlines()


def test_what_is_only_copied_is_not_compared(run, tmp_path: Path) -> None:
    path = with_donors([1, 0, 1, 1]).save(tmp_path / "in")
    found = find_duplicates([make_plan(open_checkpoint(path), find_file_type("BF16"))])
    assert (found.experts, found.twins) == ({2: 0, 3: 0}, {})
    line = "experts 0, 2 and 3 are identical in all layers by their sampled rows"
    assert line in run("convert", path, "--bits", 16, "--dry-run").stdout.splitlines()


@pytest.mark.parametrize("tensor", ["down_proj", "gate_up_proj"])
def test_experts_that_differ_in_one_layer_are_not_the_same(tensor: str, tmp_path: Path) -> None:
    parts = with_donors([0, 1, 0, 2])
    parts.tensors[f"model.layers.3.mlp.experts.{tensor}"][1][2, -1, 7] ^= 1
    assert duplicates(parts, tmp_path).experts == {}


def test_an_output_matrix_that_is_the_embedding(run, tmp_path: Path) -> None:
    parts = bundled()
    parts.tensors["lm_head.weight"] = parts.tensors["model.embed_tokens.weight"]
    found = duplicates(parts, tmp_path / "in", "Q8_0")
    assert found.tied
    assert len(found.twins) == 1
    line = "output.weight is identical to token_embd.weight by its sampled rows; both are written"
    assert line in run("convert", tmp_path / "in", "--bits", 4, "--dry-run").stdout.splitlines()
    assert not duplicates(tied(bundled()), tmp_path / "tied").tied


def test_rows_are_compared_bit_by_bit(tmp_path: Path) -> None:
    parts = with_donors([0, 0, 1, 2])
    array = parts.tensors["model.layers.0.mlp.experts.down_proj"][1]
    array[0, 100, 5], array[1, 100, 5] = 0x0000, 0x8000  # 0 and -0
    array[:2, 7, 7] = 0x7FC0  # NaN in both
    plan = make_plan(open_checkpoint(parts.save(tmp_path)), find_file_type("Q8_0"))
    first, second, third, _ = next(t for t in plan.tensors if t.info.name == "blk.0.ffn_down_exps.weight").mapped.slabs
    assert same_rows(first, second, 0, 100)
    assert not same_rows(first, second, 100, 101)
    assert same_rows(first, second, 101, 256)
    assert not same_rows(first, third, 0, 1)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
@pytest.mark.parametrize("weights", [1 << 20, 12_345])
def test_twins_are_encoded_once_and_the_bytes_stay(
    kind: str, weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = with_donors([0, 1, 0, 0])
    parts.tensors["lm_head.weight"] = parts.tensors["model.embed_tokens.weight"]
    array = parts.tensors["model.layers.1.mlp.experts.down_proj"][1]
    array[2, 100:103, 5] ^= 1  # rows that no sample sees
    plan = make_plan(open_checkpoint(parts.save(tmp_path / "in")), find_file_type(kind))
    twins = find_duplicates([plan]).twins
    monkeypatch.setattr(filling, "PIECE_WEIGHTS", weights)
    encoded = []
    quantize = quant.quantize
    monkeypatch.setattr(
        quant, "quantize", lambda rows, *a, **k: (encoded.append(rows.size), quantize(rows, *a, **k))[1]
    )
    convert(plan, tmp_path / "plain.gguf")
    assert sum(encoded) == plan.elements
    encoded.clear()
    seen = []
    convert(plan, tmp_path / "once.gguf", twins=twins, on_progress=seen.append)
    assert (tmp_path / "once.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert seen[-1].done == seen[-1].total == sum(tensor.mapped.nbytes for tensor in plan.tensors)
    tensors = {tensor.info.name: tensor for tensor in plan.tensors}
    repeated = sum(
        tensors[name].mapped.slabs[number].rows * tensors[name].mapped.shape[-1]
        for (name, number), (other, _) in twins.items()
        if tensors[name].info.type == tensors[other].info.type  # output and embedding: in Q8_0 only
    )
    differing = sum(encoded) - (plan.elements - repeated)
    assert 0 < differing <= (131_072 if weights == 1 << 20 else 2 * 512 * 24)
