"""Fill planned files: all rows are read once, and encoded once for each type that any of the files wants of them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gguf_moe.duplicates import Place, same_rows
from gguf_moe.encoding import encode
from gguf_moe.gguf_file import padded
from gguf_moe.layout import PlannedFile, TensorPlan
from gguf_moe.mapping import Slab
from gguf_moe.pool import in_order
from gguf_moe.recipe import quantizer_order

# Weights encoded at once: large enough to make the Python around a piece cheap, small enough to bound memory.
PIECE_WEIGHTS = 1 << 19


class Sink(Protocol):
    """A planned file that is being written. Its header is written already."""

    planned: PlannedFile
    done: int  # bytes from the start that are whole, at least the header: never written again

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at an offset from the start of the file."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes that were written, or done."""

    def mark(self) -> None:
        """All tensors and slabs that were begun are whole."""


@dataclass(frozen=True)
class Progress:
    """How far the work is, in bytes of the source."""

    tensor: str
    done: int
    total: int


@dataclass(frozen=True)
class _Output:
    """A slab in one file. start, twin: offsets in the file, of the slab and of one that likely has the same bytes."""

    sink: Sink
    tensor: TensorPlan
    start: int
    twin: int | None


@dataclass(frozen=True)
class _Job:
    """A slab and the files that still want it."""

    tensor: str
    slab: Slab
    twin: Slab | None
    last: bool  # of its tensor
    outputs: tuple[_Output, ...]


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a job's slab: what is read at once."""

    job: _Job
    start: int
    stop: int


@dataclass(frozen=True)
class _Encoded:
    """The rows of a piece by type. as_twin: they are those of its twin, so their bytes are in some files already."""

    data: dict[str, np.ndarray]
    as_twin: bool


def fill(
    sinks: Sequence[Sink],
    *,
    quantizer_ordered: bool,
    threads: int | None = None,
    twins: Mapping[Place, Place] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write all tensor data, padding included, of files that are planned of one source.

    quantizer_ordered: go through the tensors in the quantizer's order, else in that of the files. threads: how many
    encode at once, all cores by default; the bytes do not depend on it. twins: slabs that are likely the same as an
    earlier one, whose bytes are taken over where they are. Raises GgufMoeError for a weight that is not finite, or
    that its type cannot hold.
    """
    threads = threads or os.cpu_count() or 1
    jobs, total = _jobs(sinks, twins or {}, quantizer_ordered)
    done = total - sum(job.slab.nbytes for job in jobs)
    with closing(in_order(_encode, _pieces(jobs), threads)) as encoded:
        for piece, rows in encoded:
            _write(piece, rows)
            done += (piece.stop - piece.start) * piece.job.slab.source.row_bytes
            if piece.stop == piece.job.slab.rows:
                for output in piece.job.outputs:
                    output.sink.mark()
            if on_progress:
                on_progress(Progress(piece.job.tensor, done, total))


def _jobs(sinks: Sequence[Sink], twins: Mapping[Place, Place], quantizer_ordered: bool) -> tuple[list[_Job], int]:
    """What is left to do, in order; and the bytes of all the source."""
    by_name: dict[str, dict[tuple[Slab, ...], list[tuple[Sink, TensorPlan]]]] = defaultdict(lambda: defaultdict(list))
    mapped = {}
    for sink in sinks:
        for tensor in sink.planned.tensors:
            by_name[tensor.info.name][tensor.mapped.slabs].append((sink, tensor))  # rows may be a file's own
            mapped[id(sink), tensor.info.name] = tensor.mapped
    jobs, total = [], 0
    firsts = set(twins.values())
    starts: dict[tuple[int, Place | None, str], int] = {}  # by sink, place and type: a twin counts in the same type
    names = sorted(by_name, key=quantizer_order) if quantizer_ordered else by_name
    for slabs, wanted in (group for name in names for group in by_name[name].items()):
        name = wanted[0][1].info.name
        before = 0  # rows
        for number, slab in enumerate(slabs):
            total += slab.nbytes
            twin = twins.get((name, number))
            outputs = []
            for sink, tensor in wanted:
                row_bytes = tensor.row_bytes
                start = len(sink.planned.header) + tensor.info.offset + before * row_bytes
                if (name, number) in firsts:
                    starts[id(sink), (name, number), tensor.info.type] = start
                same = starts.get((id(sink), twin, tensor.info.type)) if twin and tensor.searched else None
                if sink.done < start + slab.rows * row_bytes:
                    outputs.append(_Output(sink, tensor, start, same))
            if outputs:
                twin_slab = mapped[id(wanted[0][0]), twin[0]].slabs[twin[1]] if twin else None
                jobs.append(_Job(name, slab, twin_slab, slab is slabs[-1], tuple(outputs)))
            before += slab.rows
    return jobs, total


def _pieces(jobs: list[_Job]) -> Iterator[_Piece]:
    for job in jobs:
        rows_at_once = max(1, PIECE_WEIGHTS // job.slab.source.columns)
        for start in range(0, job.slab.rows, rows_at_once):
            yield _Piece(job, start, min(start + rows_at_once, job.slab.rows))


def _encode(piece: _Piece) -> _Encoded:
    job, start, stop = piece.job, piece.start, piece.stop
    as_twin = job.twin is not None and same_rows(job.slab, job.twin, start, stop)
    wanted = dict.fromkeys(o.tensor.info.type for o in job.outputs if not (as_twin and o.twin is not None))
    return _Encoded(encode(job.slab, start, stop, wanted), as_twin)


def _write(piece: _Piece, rows: _Encoded) -> None:
    """Put a piece into each of its files; behind the last of a tensor its padding."""
    for output in piece.job.outputs:
        first, nbytes = piece.start * output.tensor.row_bytes, (piece.stop - piece.start) * output.tensor.row_bytes
        if rows.as_twin and output.twin is not None:
            output.sink.write(output.start + first, output.sink.read(output.twin + first, nbytes))
        else:
            output.sink.write(output.start + first, rows.data[output.tensor.info.type].data)
        padding = padded(output.tensor.info.nbytes) - output.tensor.info.nbytes
        if padding and piece.job.last and piece.stop == piece.job.slab.rows:
            output.sink.write(output.start + first + nbytes, bytes(padding))
