"""Run a plan: read rows, encode, write at their offsets, publish the whole file."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

import quant
from gguf_moe.checkpoint import SOURCE_DTYPES, SourceTensor
from gguf_moe.duplicates import Twin, same_rows
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import publish
from gguf_moe.mapping import Slab
from gguf_moe.plan import Plan, TensorPlan

# Weights encoded at once: large enough to make the Python around a piece cheap, small enough to bound memory.
PIECE_WEIGHTS = 1 << 20
AHEAD = 2  # pieces that each thread may have encoded before they are written


@dataclass(frozen=True)
class Progress:
    """How far a conversion is, in bytes of the output's tensor data."""

    tensor: str
    done: int
    total: int


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a slab: what is encoded at once, or copied from its twin where that has the same rows."""

    tensor: TensorPlan
    slab: Slab
    start: int
    stop: int
    twin: Twin | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of these rows in the file."""
        return (self.stop - self.start) * self.tensor.row_bytes


def convert(
    plan: Plan,
    path: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    twins: Mapping[tuple[str, Slab], Twin] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write the planned file to `path`: whole, or not at all.

    threads: how many encode at once, all cores by default; the bytes do not depend on it. twins: (tensor, slab) that
    is likely the same as an earlier one, whose bytes are taken over where they are. Raises GgufMoeError before writing
    when `path` exists (without `force`) or the disk lacks space, and while writing for a weight that is not
    finite, or that its type cannot hold.
    """
    check_target(plan, path, force=force)
    threads = threads or os.cpu_count() or 1
    done = 0
    try:
        with publish(path, plan.size, replace=force) as file, closing(_encoded(plan, threads, twins or {})) as encoded:
            file.write(plan.header)
            for piece, data in encoded:
                if piece.start == 0 and piece.slab is piece.tensor.mapped.slabs[0]:
                    file.seek(len(plan.header) + piece.tensor.info.offset)
                file.write(_reread(file, len(plan.header), piece) if data is None else data.data)
                done += piece.nbytes
                if on_progress:
                    on_progress(Progress(piece.tensor.info.name, done, plan.data_bytes))
    except OSError as error:
        raise GgufMoeError(f"{path}: not written: {error}") from None


def _reread(file: BinaryIO, data_start: int, piece: _Piece) -> bytes:
    """The bytes of the twin of a piece: it stands earlier in the file, so they are written."""
    assert piece.twin is not None
    here = file.tell()
    file.seek(data_start + piece.twin.offset + piece.start * piece.tensor.row_bytes)
    data = file.read(piece.nbytes)
    file.seek(here)
    return data


def _encoded(
    plan: Plan, threads: int, twins: Mapping[tuple[str, Slab], Twin]
) -> Generator[tuple[_Piece, np.ndarray | None], None, None]:
    """The pieces in the file's order with their bytes, a few encoded ahead by each thread; None: the twin's bytes."""
    waiting: deque[tuple[_Piece, Future[np.ndarray | None]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece in _pieces(plan, twins):
                waiting.append((piece, pool.submit(_encode, piece)))
                if len(waiting) > AHEAD * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for last, future in waiting:
                yield last, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pieces(plan: Plan, twins: Mapping[tuple[str, Slab], Twin]) -> Iterator[_Piece]:
    for tensor in plan.tensors:
        rows_at_once = max(1, PIECE_WEIGHTS // tensor.mapped.shape[-1])
        for slab in tensor.mapped.slabs:
            twin = twins.get((tensor.info.name, slab))
            for start in range(0, slab.rows, rows_at_once):
                yield _Piece(tensor, slab, start, min(start + rows_at_once, slab.rows), twin)


def check_target(plan: Plan, path: Path, *, force: bool) -> None:
    """Refuse a target that must not or cannot be written."""
    if not path.parent.is_dir():
        raise GgufMoeError(f"{path}: directory {path.parent} does not exist")
    if path.exists() and any(path.samefile(source) for source in plan.inputs):
        raise GgufMoeError(f"{path}: is the input itself; name another file with --output")
    if path.exists() and not path.is_file():
        raise GgufMoeError(f"{path}: is no regular file, expected a file name")
    if os.path.lexists(path) and not force:  # a link to nowhere too
        raise GgufMoeError(f"{path}: exists; use --force to replace it")
    if path.exists() and path.suffix != ".gguf" and path.resolve().parent == plan.directory.resolve():
        raise GgufMoeError(f"{path}: is a file of the checkpoint itself")
    free = shutil.disk_usage(path.parent).free
    if free < plan.size:
        raise GgufMoeError(f"{path}: needs {plan.size} bytes, but only {free} are free on that disk")


def _encode(piece: _Piece) -> np.ndarray | None:
    """Read, check and encode the rows of a piece: uint8 [rows, row bytes], or None where its twin's bytes are right."""
    if piece.twin and same_rows(piece.slab, piece.twin.slab, piece.start, piece.stop):
        return None
    slab, kind = piece.slab, piece.tensor.info.type
    if slab.source.stored == kind:
        return _copy(piece)
    rows = slab.read(slab.source.matrix(), piece.start, piece.stop)
    _check_finite(rows, slab, piece.start)
    encoded = quant.quantize(rows, kind, dtype=SOURCE_DTYPES[slab.source.dtype][1])
    _check_scales(encoded, piece.tensor, slab, piece.start)
    return encoded


def _copy(piece: _Piece) -> np.ndarray:
    """The rows of a piece as its GGUF file has them: uint8 [rows, row bytes]. Refuses damaged scales."""
    slab, kind = piece.slab, piece.tensor.info.type
    rows = slab.read(slab.source.raw(), piece.start, piece.stop)
    block = quant.first_nonfinite_scale(rows, kind) if kind in quant.FORMATS else None
    if block is not None:
        index = _block_index(block, piece.tensor, slab, piece.start)
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


def _check_scales(encoded: np.ndarray, tensor: TensorPlan, slab: Slab, start: int) -> None:
    """Refuse what llama.cpp refuses: weights so large that the type's F16 numbers overflow."""
    block = quant.first_nonfinite_scale(encoded, tensor.info.type)
    if block is None:
        return
    index = _block_index(block, tensor, slab, start)
    raise GgufMoeError(
        f"{_where(slab.source)}: weights from {index} on are too large for {tensor.info.type}; choose BF16 or F32"
    )


def _block_index(block: int, tensor: TensorPlan, slab: Slab, start: int) -> str:
    """The source's index of the first weight of a block, counted from row `start` of the slab on."""
    length = quant.FORMATS[tensor.info.type].block_length
    row, column = divmod(block * length, tensor.mapped.shape[-1])
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
