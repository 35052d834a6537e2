"""Whether codes that cannot be derived anew stand for a model's weights all the same: of rows, and of whole experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import quant
from gguf_moe.encoding import encode
from gguf_moe.gguf_reader import TENSOR_TYPES
from gguf_moe.mapping import Slab

LEAST, MOST = 1 / 3, 3.0  # of the model's row that a row has to hold
ROUNDING = 1e-6  # of a row's length: sums in float32, where the plain encoder is exact
COMPARED = 1 << 17  # weights by which experts are told apart
HALF_WAY, DEVIATIONS = 0.5, 8.0  # to another's weights: how far is too far, and how sure of it
SUSPECT = 2.0  # times the plain encoder's distance, from which on a row is compared with the others
BAND = 128  # suspects that are compared at once
PARALLEL = 1e-8  # of its square: what is left of another's weights that are no others


@dataclass(frozen=True)
class FarRow:
    """A row that is not near the model's. distance, usual: of it and of the plain encoder's row from the model's, by
    its length. other: the model's row that it is instead, if seen."""

    row: int
    distance: float
    usual: float
    other: int | None


def reach(damping: float) -> float:
    """How many times the plain encoder's distance error feedback may take a row from the model's.

    A row has codes by feedback only if it loses less by them: with damping λ in units of the mean m of diag H,
    d H dᵀ + λ m |d|² ≤ p H pᵀ + λ m |p|², d its difference and p that of the plain codes. The left is λ m |d|² at
    least, where inputs are rank-deficient or dead; the right is about (1 + λ) m |p|², as p does not follow H.
    """
    return math.sqrt(1 + 1 / damping) if damping else math.inf


def far_row(data: np.ndarray, slab: Slab, start: int, stop: int, kind: str, reach: float) -> FarRow | None:
    """The first of rows [start, stop) of a slab, counted from `start`, that a file's bytes in the type `kind` are not
    near: farther than the plain encoder's and beyond its reach, or without a fair share of it, or another of the rows.

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
        suspects = np.flatnonzero(distance > SUSPECT * usual)
        others = _other_rows(found, own, suspects)
    near[suspects] &= others < 0
    if near.all():
        return None
    row = int(np.argmin(near))
    other = next((int(o) for s, o in zip(suspects, others) if s == row and o >= 0), None)
    return FarRow(row, *(float(x[row] / (length[row] or 1)) for x in (distance, usual)), other)


def _other_rows(found: np.ndarray, own: np.ndarray, suspects: np.ndarray) -> np.ndarray:
    """For each of the rows `suspects` of `found` the row of `own` that it stands for instead, or -1."""
    others = np.full(len(suspects), -1)
    for start in range(0, len(suspects), BAND):
        rows = suspects[start : start + BAND]
        # A row has few columns: what tells it from others has to be as large as what tells it from its codes.
        parts = _parts(found[rows], own[rows], own, least=0.5)
        others[start : start + BAND] = np.where(parts.any(1), parts.argmax(1), -1)
    return others


def nearer_expert(data: np.ndarray, slabs: Sequence[Slab], number: int, kind: str) -> int | None:
    """The expert whose weights a file's bytes, the first rows of expert `number` in the type `kind`, stand for instead
    of their own; None if there is none, or no telling.

    Experts of a merge may differ by less than codes of few bits lose. But that loss, over many rows, does not point to
    another expert. Raises GgufMoeError for rows of the model that cannot be read.
    """
    columns = slabs[number].source.columns
    rows = min(data.size // TENSOR_TYPES[kind].row_bytes(columns), max(1, COMPARED // columns))
    found = quant.dequantize(data.reshape(-1, TENSOR_TYPES[kind].row_bytes(columns))[:rows], kind).reshape(1, -1)
    own = _weights(slabs[number], 0, rows).reshape(1, -1)
    with np.errstate(all="ignore"):
        parts = [float(_parts(found, own, _weights(slab, 0, rows).reshape(1, -1))[0, 0]) for slab in slabs]
    return int(np.argmax(parts)) if any(parts) else None


def _parts(found: np.ndarray, own: np.ndarray, others: np.ndarray, least: float = 0.0) -> np.ndarray:
    """How far each row of `found` has gone from its own weights to others: near 1 if it stands for those, and 0 where
    it is not past the middle for sure, or where the way there is no longer than `least` of its whole error, squared.

    found, own: float32 [rows, columns]; others: float32 [others, columns]. Returns float64 [rows, others]. Neither way
    nor error counts what is along `own`, which coarse codes shorten.
    """
    found, own, others = (x.astype(np.float64) for x in (found, own, others))
    size = _dots(own, own)[:, None]
    share = _dots(found, own)[:, None] / size
    error = _dots(found, found)[:, None] - share**2 * size
    along, whole = own @ others.T, _dots(others, others)
    way = whole - along**2 / size
    gone = found @ others.T - share * along
    sure = (gone > HALF_WAY * way) & (gone**2 > DEVIATIONS**2 * error * way / own.shape[1])
    return np.where(sure & (way > PARALLEL * whole) & (way > least * error), gone / way, 0)


def _weights(slab: Slab, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the model, float32."""
    return encode(slab, start, stop, ("F32",))["F32"].view(np.float32)


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row, float64 [rows]."""
    return np.einsum("ij,ij->i", a, b, dtype=np.float64)
