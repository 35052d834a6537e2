"""How much an importance matrix knows of each expert, and what stands in for what it does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gguf_moe.errors import GgufMoeError
from gguf_moe.imatrix import Entry, Imatrix

MIN_TOKENS = 200  # of which a mean square is known to about a tenth: its relative error is sqrt(2 / tokens)
REMEDIES = ("ones", "mean", "base")
_STACK = re.compile(r"blk\.(\d+)\.(ffn_(?:gate|up|down|gate_up)_exps)\.weight", re.ASCII)
_OUTWARD = "ffn_down_exps"  # whose input is within the expert; the others' is the layer's


@dataclass(frozen=True)
class ExpertCoverage:
    """What a matrix knows of an expert of a layer."""

    layer: int
    expert: int
    tokens: int
    share: float  # of the layer's tokens, each counted for every expert that saw it
    channels: float  # effective channels of its input: 2 to the entropy of the mean squares
    inner_channels: float  # ... of its last matrix


def coverage(imatrix: Imatrix) -> list[ExpertCoverage]:
    """By layer and expert; empty for a dense model, and for a legacy file, which does not tell experts apart."""
    found: dict[int, dict[str, Entry]] = {}
    for layer, kind, name in _stacks(imatrix):
        if len(imatrix.entries[name].counts) > 1:
            found.setdefault(layer, {})[kind] = imatrix.entries[name]
    return [row for layer in sorted(found) for row in _rows(layer, found[layer])]


def _stacks(imatrix: Imatrix) -> Iterator[tuple[int, str, str]]:
    """Layer, kind and name of every stack of experts."""
    for name in imatrix.entries:
        if match := _STACK.fullmatch(name):
            yield int(match[1]), match[2], name


def _rows(layer: int, entries: dict[str, Entry]) -> Iterator[ExpertCoverage]:
    first = next((entry for kind, entry in entries.items() if kind != _OUTWARD), entries.get(_OUTWARD))
    last = entries.get(_OUTWARD, first)
    total = max(int(first.counts.sum()), 1)
    for expert, tokens in enumerate(first.counts.tolist()):
        channels = (effective_channels(entry.squares[expert]) for entry in (first, last))
        yield ExpertCoverage(layer, expert, tokens, tokens / total, *channels)


def effective_channels(squares: np.ndarray) -> float:
    """Over how many channels the squares [columns] are spread: 2 to their entropy; 0 where all are 0."""
    total = squares.sum(dtype=np.float64)
    if not total:
        return 0.0
    parts = squares[squares > 0] / total
    return float(2 ** -(parts * np.log2(parts)).sum())


def cold_experts(rows: list[ExpertCoverage], min_tokens: int) -> list[ExpertCoverage]:
    """Those that saw fewer tokens."""
    return [row for row in rows if row.tokens < min_tokens]


def coverage_report(imatrix: Imatrix, rows: list[ExpertCoverage], min_tokens: int) -> dict[str, Any]:
    """A matrix's coverage as JSON values under fixed names."""
    return {
        "texts": list(imatrix.datasets),
        "text_sha256": list(imatrix.texts),
        "chunks": imatrix.chunks,
        "ctx": imatrix.chunk_size,
        "notes": list(imatrix.notes),
        "min_tokens": min_tokens,
        "cold": [[row.layer, row.expert] for row in cold_experts(rows, min_tokens)],
        "experts": [vars(row) for row in rows],
    }


def replace_cold(imatrix: Imatrix, min_tokens: int, remedy: str, base: Imatrix | None = None) -> Imatrix:
    """The matrix with other data for the experts that saw fewer tokens, and notes of that.

    ones: none, for which llama.cpp weighs all columns alike; mean: the mean squares that the layer's other experts have
    on average; base: the data of another matrix. Raises GgufMoeError where a layer has no other experts, or the base
    has no data of an expert.
    """
    cold: dict[int, list[ExpertCoverage]] = {}
    for row in cold_experts(coverage(imatrix), min_tokens):
        cold.setdefault(row.layer, []).append(row)
    entries = dict(imatrix.entries)
    for layer, _, name in _stacks(imatrix):
        if layer in cold:
            entries[name] = _remedied(imatrix, name, [row.expert for row in cold[layer]], remedy, base)
    notes = [
        f"layer {row.layer} expert {row.expert}, {row.tokens} tokens: {_SAID[remedy]}"
        for rows in cold.values()
        for row in rows
    ]
    return replace(imatrix, entries=entries, notes=(*imatrix.notes, *notes))


_SAID = {
    "ones": "no data, all columns weigh alike",
    "mean": "the mean of the layer's other experts",
    "base": "the data of the base matrix",
}


def _remedied(imatrix: Imatrix, name: str, cold: list[int], remedy: str, base: Imatrix | None) -> Entry:
    entry = imatrix.entries[name]
    squares, counts = entry.squares.copy(), entry.counts.copy()
    sums = None if entry.sums is None else entry.sums.copy()
    arrays = [array for array in (squares, sums) if array is not None]
    if remedy == "base":
        other = base.entries.get(name) if base else None
        if other is None or other.squares.shape != squares.shape or not other.counts[cold].all():
            path = base.path if base else imatrix.path
            raise GgufMoeError(f"{path}: {name} has no data of expert {cold[0]}; expected it of a base matrix")
        squares[cold], counts[cold] = other.squares[cold], other.counts[cold]
        if sums is not None and other.sums is not None:
            sums[cold] = other.sums[cold]
        return Entry(squares, counts, sums if other.sums is not None else None)
    if remedy == "ones":
        counts[cold] = 0
        for array in arrays:
            array[cold] = 0
        return Entry(squares, counts, sums)
    warm = np.setdiff1d(np.flatnonzero(counts), cold)
    if not len(warm):
        raise GgufMoeError(f"{imatrix.path}: {name} has no expert with enough tokens to take the mean of")
    counts[cold] = counts[cold].clip(min=1)
    for array in arrays:
        array[cold] = (array[warm] / counts[warm, None]).mean(0) * counts[cold, None]
    return Entry(squares, counts, sums)
