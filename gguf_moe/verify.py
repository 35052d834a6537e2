"""Is a GGUF file whole, sound and what it is said to be? Reads every byte once, in pieces, on all threads."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import quant
from gguf_moe.checkpoint import map_file
from gguf_moe.checksums import LIST, read_sums
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.filling import PIECE_WEIGHTS, Progress
from gguf_moe.gguf_reader import TENSOR_TYPES, GgufFile, TensorInfo, read_gguf
from gguf_moe.gguf_source import open_gguf, shard_place
from gguf_moe.layout import TensorPlan
from gguf_moe.mapping import Slab
from gguf_moe.nearness import far_row, nearer_expert, reach
from gguf_moe.origin import Expected, Origin, data_difference
from gguf_moe.pool import in_order

_INTEGERS = ("I8", "I16", "I32", "I64")  # which have nothing that could be infinite
_NOT_ZERO = re.compile(rb"[^\0]")


@dataclass
class Verdict:
    """What was found of one file, in sentences without its name."""

    path: Path
    proven: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)  # what could not be looked at
    problems: list[str] = field(default_factory=list)
    sha256: str | None = None  # where there is something to compare it with

    @property
    def good(self) -> bool:
        """Whether nothing was found that is wrong."""
        return not self.problems

    def conclude(self, problems: list[str], proven: str = "") -> None:
        """Add what a check found; if that is nothing, what it proves."""
        for problem in problems:
            text = problem.removeprefix(f"{self.path}: ")
            if text not in self.problems:
                self.problems.append(text)
        if proven and not problems:
            self.proven.append(proven)


def verify(
    path: Path,
    *,
    origin: Origin | None = None,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Verdict:
    """Check one GGUF file, or one shard; with the first shard that the others are there and belong to it.

    Structure and padding; that no scale and no weight is infinite or NaN; the SHA-256, where SHA256SUMS in its
    directory names the file; and, given `origin`, that it derives from that model bit for bit, or, where a method chose
    codes that cannot be derived, that these lie near its weights. Whatever is wrong with the file is in the verdict.
    on_progress: with bytes of the file. Raises UsageError for wishes that the origin cannot fulfil.
    """
    verdict = Verdict(path)
    try:
        file = read_gguf(path)
        unfinished = ["is a partial file of an unfinished run"] if path.suffix == ".partial" else []
        verdict.conclude([*unfinished, *_structure(file), *_shards(file)], "structure")
        _contents(file, origin, verdict, threads or os.cpu_count() or 1, on_progress)
    except UsageError:
        raise
    except GgufMoeError as error:
        verdict.conclude([str(error)])
    return verdict


def _structure(file: GgufFile) -> list[str]:
    """What a reader forgives and no writer leaves: padding that is not zero, a wrong end."""
    data = memoryview(map_file(file.path, np.dtype(np.uint8), 0, (file.size,)))
    problems = []
    gaps = [("the header", file.header_end, file.data_start)]
    for tensor in file.tensors:
        end = file.data_start + tensor.offset + tensor.nbytes
        gaps.append((f"tensor {tensor.name}", end, -(-end // file.alignment) * file.alignment))
    for what, start, stop in gaps:
        if match := _NOT_ZERO.search(data[start:stop]):
            problems.append(f"byte {start + match.start()}, padding after {what}, is {match[0].hex()}, expected 00")
    surplus = file.size - gaps[-1][2]
    if surplus:
        found = "too many" if surplus > 0 else "missing"
        problems.append(f"the file has {file.size} bytes, expected {gaps[-1][2]}; bytes {found}: {abs(surplus)}")
    return problems


def _shards(file: GgufFile) -> list[str]:
    try:
        number, count = shard_place(file)
        if number == 0 and count > 1:
            open_gguf(file.path)
    except GgufMoeError as error:
        return [str(error)]
    return []


def _contents(
    file: GgufFile,
    origin: Origin | None,
    verdict: Verdict,
    threads: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Everything that takes reading the tensors."""
    listed = read_sums(file.path.parent).get(file.path.name)
    expected, differences = _expectation(file, origin)
    scan = _Scan(file, expected, hashed=listed is not None)
    scan.run(threads, on_progress)
    _conclude_finite(scan, verdict)
    _conclude_sums(scan, listed, verdict)
    if origin is not None:
        whole = expected is not None and not differences and "structure" in verdict.proven  # padding is part of it
        verdict.conclude(differences)
        _conclude_origin(scan, origin.name, whole, verdict)
    elif listed is None:
        verdict.unproven.append("content")


def _expectation(file: GgufFile, origin: Origin | None) -> tuple[Expected | None, list[str]]:
    if origin is None:
        return None, []
    try:
        expected = origin.expected(file)
    except UsageError:
        raise
    except GgufMoeError as error:
        return None, [str(error)]
    return expected, expected.header_differences(file)


def _conclude_finite(scan: _Scan, verdict: Verdict) -> None:
    tensors = scan.file.tensors
    unknown = sorted({t.type for t in tensors if not _is_known(t.type)})
    count = sum(_is_known(t.type) for t in tensors)
    verdict.conclude(_with_others(scan.infinite), f"{count} tensors finite")
    if unknown:
        verdict.unproven.append(f"whether {len(tensors) - count} tensors of {', '.join(unknown)} are finite")


def _conclude_sums(scan: _Scan, listed: str | None, verdict: Verdict) -> None:
    verdict.sha256 = scan.digest
    if listed is None:
        why = f"not named in {LIST}" if (scan.file.path.parent / LIST).exists() else f"no {LIST} beside it"
        verdict.unproven.append(f"SHA-256 ({why})")
    else:
        wrong = [f"SHA-256 is {scan.digest}, expected {listed} of {LIST}"] if scan.digest != listed else []
        verdict.conclude(wrong, f"SHA-256 as in {LIST}")


def _conclude_origin(scan: _Scan, model: str, whole: bool, verdict: Verdict) -> None:
    """Of data: what derives from the model, and what can only lie near it. whole: the header derives from it too."""
    derived, chosen = (f"{len(names)} tensors" for names in (scan.planned.keys() - scan.chosen, scan.chosen))
    if not whole:
        proven = f"data of {derived} as {model} gives them" if scan.planned else ""
    elif scan.chosen:
        proven = f"header and {derived} derive from {model} bit for bit"
    else:
        proven = f"derives from {model} bit for bit"
    verdict.conclude(_with_others(scan.differing), proven)
    if scan.chosen:
        verdict.conclude(_with_others(scan.far), f"{chosen} whose codes error feedback chose lie near its weights")
        verdict.unproven.append(f"the very codes of {chosen}, which cannot be derived (method gptq)")


def _with_others(by_tensor: Mapping[str, str]) -> list[str]:
    """The first of several problems, and how many tensors have such a one."""
    texts = list(by_tensor.values())
    return [texts[0] + (f" (and {len(texts) - 1} more of the tensors)" if texts[1:] else "")] if texts else []


def _is_known(kind: str) -> bool:
    return kind in quant.FORMATS or kind in _INTEGERS


@dataclass(frozen=True)
class _Piece:
    """Bytes [start, stop) of a tensor; rows of one of its slabs, from `row`, where they are compared."""

    tensor: TensorInfo
    start: int
    stop: int
    slabs: tuple[Slab, ...] = ()
    number: int = 0  # of the slab
    row: int = 0

    @property
    def slab(self) -> Slab:
        """The one that the rows are of."""
        return self.slabs[self.number]


class _Scan:
    """One pass over a file. Problems are kept by tensor, the first of each."""

    def __init__(self, file: GgufFile, expected: Expected | None, *, hashed: bool) -> None:
        self.file = file
        self.planned = expected.comparable(file) if expected else {}
        self.chosen = expected.chosen & self.planned.keys() if expected else frozenset()  # of these, not to be derived
        self.infinite: dict[str, str] = {}
        self.differing: dict[str, str] = {}
        self.far: dict[str, str] = {}
        self.digest: str | None = None
        self._hashed = hashed
        self._reach = reach(expected.said.damping) if expected and expected.said else 0.0
        self._data = map_file(file.path, np.dtype(np.uint8), 0, (file.size,))

    def run(self, threads: int, on_progress: Callable[[Progress], None] | None) -> None:
        """Check and compare on all threads, and hash behind them what they have read."""
        digest, done = hashlib.sha256(), 0
        with closing(in_order(self._check, self._pieces(), threads)) as checked:
            for piece, (infinite, different) in checked:
                name, end = piece.tensor.name, self._at(piece) + piece.stop - piece.start
                if infinite:
                    self.infinite.setdefault(name, infinite)
                if different:
                    (self.far if name in self.chosen else self.differing).setdefault(name, different)
                if self._hashed:
                    digest.update(self._data[done:end])
                done = end
                if on_progress:
                    on_progress(Progress(name, done, self.file.size))
        if self._hashed:
            digest.update(self._data[done:])
            self.digest = digest.hexdigest()

    def _pieces(self) -> Iterator[_Piece]:
        for tensor in self.file.tensors:
            if planned := self.planned.get(tensor.name):
                yield from _pieces_of_rows(tensor, planned)
                continue
            kind = TENSOR_TYPES[tensor.type]
            step = PIECE_WEIGHTS // kind.block_length * kind.block_bytes
            for start in range(0, tensor.nbytes, step):
                yield _Piece(tensor, start, min(start + step, tensor.nbytes))

    def _at(self, piece: _Piece) -> int:
        """Where the piece begins in the file."""
        return self.file.data_start + piece.tensor.offset + piece.start

    def _check(self, piece: _Piece) -> tuple[str, str]:
        """What is not finite, and what differs; nothing if all is well."""
        kind, at = piece.tensor.type, self._at(piece)
        data = self._data[at : at + piece.stop - piece.start]
        block = quant.first_nonfinite_scale(data, kind) if kind in quant.FORMATS else None
        infinite = ""
        if block is not None:
            what = "is" if TENSOR_TYPES[kind].block_length == 1 else "has a scale that is"
            infinite = f"{_where(piece, block * TENSOR_TYPES[kind].block_bytes)} {what} infinite or NaN"
        if not piece.slabs:
            return infinite, ""
        try:
            if piece.tensor.name not in self.chosen:
                return infinite, self._difference(piece, data)
            return infinite, infinite or self._distance(piece, data)
        except GgufMoeError as error:
            return infinite, str(error)

    def _distance(self, piece: _Piece, data: np.ndarray) -> str:
        kind, name = piece.tensor.type, piece.tensor.name
        if far := far_row(data, piece.slab, piece.row, piece.row + _rows(piece), kind, self._reach):
            first = piece.start // (data.size // _rows(piece))
            instead = f"the model's row {first + far.other}" if far.other is not None else "damaged or another model's"
            return (
                f"tensor {name}: row {first + far.row} is {100 * far.distance:.3g} % of its length away from the "
                f"model's, the plain encoder's {100 * far.usual:.3g} %: it is {instead}"
            )
        if piece.row == 0 and (other := nearer_expert(data, piece.slabs, piece.number, kind)) is not None:
            return f"tensor {name}: expert {piece.number} is the model's expert {other}, expected expert {piece.number}"
        return ""

    def _difference(self, piece: _Piece, data: np.ndarray) -> str:
        found = data_difference(data, piece.slab, piece.row, piece.row + _rows(piece), piece.tensor.type)
        if found is None:
            return ""
        at, expected = found
        place = f"{_where(piece, at)}: byte {self._at(piece) + at} of the file"
        return f"{place} is {data[at]:02x}, expected {expected:02x}"


def _pieces_of_rows(tensor: TensorInfo, planned: TensorPlan) -> Iterator[_Piece]:
    """Pieces that each come from rows of one slab."""
    start = 0
    for number, slab in enumerate(planned.mapped.slabs):
        rows_at_once = max(1, PIECE_WEIGHTS // slab.source.columns)
        for row in range(0, slab.rows, rows_at_once):
            stop = start + min(rows_at_once, slab.rows - row) * planned.row_bytes
            yield _Piece(tensor, start, stop, planned.mapped.slabs, number, row)
            start = stop


def _rows(piece: _Piece) -> int:
    return (piece.stop - piece.start) // TENSOR_TYPES[piece.tensor.type].row_bytes(piece.slab.source.columns)


def _where(piece: _Piece, byte: int) -> str:
    """The block that a byte of a piece is in."""
    kind = TENSOR_TYPES[piece.tensor.type]
    row_bytes = kind.row_bytes(piece.tensor.shape[-1] if piece.tensor.shape else 1)
    row, byte = divmod(piece.start + byte, row_bytes)
    what = "weight" if kind.block_length == 1 else "block"
    return f"tensor {piece.tensor.name}: {what} {byte // kind.block_bytes} of row {row}"
