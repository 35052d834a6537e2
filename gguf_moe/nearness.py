"""Whether codes that cannot be derived anew stand for a model's weights all the same: of rows, and of whole experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

import quant
from gguf_moe.encoding import encode
from gguf_moe.gguf_reader import TENSOR_TYPES
from gguf_moe.mapping import Slab

LEAST, MOST = 1 / 3, 3.0  # of the model's row that a row has to hold; a row of another place holds none
ROUNDING = 1e-6  # of a row's length: sums in float32, where the plain encoder is exact
COMPARED = 1 << 17  # weights by which experts are told apart
HALF_WAY, DEVIATIONS = 0.5, 8.0  # to another expert: how far is too far, and how sure of it


@dataclass(frozen=True)
class FarRow:
    """A row that is not near the model's. distance, usual: of it and of the plain encoder's row from the model's, by
    its length."""

    row: int
    distance: float
    usual: float


def reach(damping: float) -> float:
    """How many times the plain encoder's distance error feedback may take a row from the model's.

    A row has codes by feedback only if it loses less by them: with damping λ in units of the mean m of diag H,
    d H dᵀ + λ m |d|² ≤ p H pᵀ + λ m |p|², d its difference and p that of the plain codes. The left is λ m |d|² at
    least, where inputs are rank-deficient or dead; the right is about (1 + λ) m |p|², as p does not follow H.
    """
    return math.sqrt(1 + 1 / damping) if damping else math.inf


def far_row(data: np.ndarray, slab: Slab, start: int, stop: int, kind: str, reach: float) -> FarRow | None:
    """The first of rows [start, stop) of a slab, counted from `start`, that a file's bytes in the type `kind` are not
    near: farther than the plain encoder's and beyond its reach, or without a fair share of it.

    Raises GgufMoeError for rows of the model that cannot be read.
    """
    own = _weights(slab, start, stop)
    found = quant.dequantize(data.reshape(stop - start, -1), kind)
    plain = quant.dequantize(quant.quantize(own, kind, slab.importance), kind)
    with np.errstate(all="ignore"):  # what is not finite is not near
        distance, usual, length = (np.sqrt(_dots(x, x)) for x in (found - own, plain - own, own))
        share = _dots(found, own)
        fair = (share > LEAST * length**2) & (share < MOST * length**2)
        near = (distance <= usual) | (fair & (distance <= reach * usual + ROUNDING * length))
    if near.all():
        return None
    row = int(np.argmin(near))
    return FarRow(row, *(float(x[row] / (length[row] or 1)) for x in (distance, usual)))


def nearer_expert(data: np.ndarray, slabs: Sequence[Slab], number: int, kind: str) -> int | None:
    """The expert that a file's bytes, the first rows of expert `number` in the type `kind`, are nearer to than to their
    own; None if there is none, or no telling.

    Raises GgufMoeError for rows of the model that cannot be read.
    """
    rows = min(slabs[number].rows, max(1, COMPARED // slabs[number].source.columns))
    found = quant.dequantize(data.reshape(-1, TENSOR_TYPES[kind].row_bytes(slabs[number].source.columns))[:rows], kind)
    return nearer_other(found, _weights(slabs[number], 0, rows), (_weights(slab, 0, rows) for slab in slabs))


def nearer_other(found: np.ndarray, own: np.ndarray, others: Iterable[np.ndarray]) -> int | None:
    """The number of the other matrix that `found` has gone over to from its `own`; None if it has not.

    The experts of a merge may differ by less than what codes of few bits lose. But that loss does not point to another
    expert: its part along the way there is near 0, and near 1 if the codes are the other's. Neither counts what is
    along `own`, which coarse codes shorten. All are float32 of one shape.
    """
    size = float(_dot(own, own)) or 1.0
    rest = found - np.float32(_dot(found, own) / size) * own
    most, nearest = HALF_WAY, None
    for number, other in enumerate(others):
        way = other - np.float32(_dot(other, own) / size) * own
        length = _dot(way, way)
        if not length:
            continue
        part, noise = _dot(rest, way) / length, math.sqrt(_dot(rest, rest) / length / own.size)
        if part > most and part > DEVIATIONS * noise:
            most, nearest = part, number
    return nearest


def _weights(slab: Slab, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the model, float32."""
    return encode(slab, start, stop, ("F32",))["F32"].view(np.float32)


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row, float64 [rows]."""
    return np.einsum("ij,ij->i", a, b, dtype=np.float64)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(_dots(a, b).sum())
