"""Rows and experts are told from others where codes let them be told, and never where these only lose much."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import quant
from gguf_moe.checkpoint import ComputedTensor
from gguf_moe.mapping import Slab
from gguf_moe.nearness import far_row, nearer_expert, reach

COLUMNS = 512


def slab(values: np.ndarray) -> Slab:
    return Slab(ComputedTensor("x", "F32", values.shape, Path("x"), 0, values=values), 0, len(values))


def weights(seed: int, count: int = 64) -> np.ndarray:
    """Heavy-tailed, and alike from row to row."""
    generator = np.random.default_rng(seed)
    return (generator.standard_t(4, (count, COLUMNS)) + generator.normal(size=COLUMNS)).astype(np.float32)


def far(kind: str, found: np.ndarray, own: np.ndarray, damping: float = 0.01):
    return far_row(quant.quantize(found, kind), slab(own), 0, len(own), kind, reach(damping))


def test_reach() -> None:
    assert (reach(1.0), reach(0.01), reach(0.0)) == (math.sqrt(2), math.sqrt(101), math.inf)


@pytest.mark.parametrize("kind", quant.CODED)
def test_a_single_row_of_any_kind(kind: str) -> None:
    """What the plain encoder gives is near, whatever it loses: of zeros, of weights below its scales, of its own."""
    own = weights(1)
    own[1], own[2], own[3] = 0, own[2] * np.float32(1e-9), np.float32(0.25)
    own[4], own[5] = quant.dequantize(quant.quantize(own[4:6], kind), kind)
    own[7] = own[6]
    assert far(kind, own, own) is None
    for row, value, percent in ((10, 0, 100), (11, -own[11], 200), (1, own[12], None)):
        found = own.copy()
        found[row] = value
        bad = far(kind, found, own)
        assert (bad.row, bad.other) == (row, None)
        assert percent is None or 100 * bad.distance == pytest.approx(percent, rel=0.02)
    found = own.copy()
    found[[20, 33]] = found[[33, 20]]
    bad = far(kind, found, own)
    assert (bad.row, bad.other) == (20, 33)
    assert 100 * bad.distance > 50 > 100 * bad.usual


@pytest.mark.parametrize("kind", quant.CODED)
def test_experts(kind: str) -> None:
    """Told apart at a thirtieth of their length, not at a millionth; nor where they are the same but for a factor."""
    base = weights(1, 256)
    experts = [base, base + weights(2, 256) / 30, base.copy(), base * np.float32(0.9), base + weights(3, 256) / 1e6]
    slabs = [slab(expert) for expert in experts]
    codes = [quant.quantize(expert, kind) for expert in experts]
    assert [nearer_expert(data, slabs, number, kind) for number, data in enumerate(codes)] == [None] * 5
    assert nearer_expert(codes[0], slabs, 1, kind) in (0, 2, 3, 4)
    assert [nearer_expert(codes[1], slabs, number, kind) for number in (0, 2, 3, 4)] == [1] * 4
    assert nearer_expert(codes[4], slabs, 0, kind) is None
