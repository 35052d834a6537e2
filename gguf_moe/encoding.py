"""Rows of a source, checked and encoded: what is not finite or does not fit is refused by its place in the source."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

import quant
from gguf_moe.checkpoint import SOURCE_DTYPES, SourceTensor
from gguf_moe.errors import GgufMoeError
from gguf_moe.mapping import Slab


def encode(slab: Slab, start: int, stop: int, kinds: Iterable[str]) -> dict[str, np.ndarray]:
    """Rows [start, stop) of a slab, read once, in each of the types `kinds`: uint8 [rows, row bytes] by type. Columns
    weigh what the slab says they matter.

    Raises GgufMoeError for a weight that is not finite, or that a type cannot hold, and for a damaged block of a GGUF
    file.
    """
    encoded = {}
    rows = None
    for kind in kinds:
        if slab.source.stored == kind:
            encoded[kind] = _copy(slab, start, stop)
            continue
        if rows is None:
            rows = slab.read(slab.source.matrix(), start, stop)
            _check_finite(rows, slab, start)
        encoded[kind] = quant.quantize(rows, kind, slab.importance, dtype=SOURCE_DTYPES[slab.source.dtype][1])
        _check_scales(encoded[kind], kind, slab, start)
    return encoded


def _copy(slab: Slab, start: int, stop: int) -> np.ndarray:
    """Rows as their GGUF file has them: uint8 [rows, row bytes]. Refuses damaged scales."""
    kind = slab.source.type
    rows = slab.read(slab.source.raw(), start, stop)
    block = quant.first_nonfinite_scale(rows, kind) if kind in quant.FORMATS else None
    if block is not None:
        index = _block_index(block, kind, slab, start)
        raise GgufMoeError(f"{_where(slab.source)}: the scales of the block at {index} are not finite; it is damaged")
    return rows


def _check_finite(rows: np.ndarray, slab: Slab, start: int) -> None:
    """Refuse NaN and infinity, which no block can hold, by the place in the source."""
    found = quant.first_nonfinite(rows, dtype=SOURCE_DTYPES[slab.source.dtype][1])
    if found is None:
        return
    row, column = divmod(found, rows.shape[1])
    value = "NaN" if np.isnan(_float(rows[row, column], slab.source)) else "infinity"
    index = _index(slab.source, slab.source_row(start + row), column)
    raise GgufMoeError(f"{_where(slab.source)} holds {value} at {index}; mend the checkpoint")


def _check_scales(encoded: np.ndarray, kind: str, slab: Slab, start: int) -> None:
    """Refuse what llama.cpp refuses: weights so large that the type's F16 numbers overflow."""
    block = quant.first_nonfinite_scale(encoded, kind)
    if block is None:
        return
    index = _block_index(block, kind, slab, start)
    raise GgufMoeError(f"{_where(slab.source)}: weights from {index} on are too large for {kind}; choose BF16 or F32")


def _block_index(block: int, kind: str, slab: Slab, start: int) -> str:
    """The source's index of the first weight of a block, counted from row `start` of the slab on."""
    row, column = divmod(block * quant.FORMATS[kind].block_length, slab.source.columns)
    return _index(slab.source, slab.source_row(start + row), column)


def _float(bits: np.generic, source: SourceTensor) -> np.floating:
    if source.dtype == "BF16":
        return (np.uint32(bits) << np.uint32(16)).view(np.float32)
    return bits


def _where(source: SourceTensor) -> str:
    return f"{source.file}: tensor {source.name}"


def _index(source: SourceTensor, row: int, column: int) -> str:
    """Row of the source matrix and column as an index of the source's own shape."""
    leading = np.unravel_index(row, source.shape[:-1]) if len(source.shape) > 1 else ()
    return str([*map(int, leading), column])
