"""Importance matrices: which inputs of each weight matter, as llama.cpp's tools write them, GGUF or the legacy form.

For every matrix, and every expert of a stack, a file has the sum of the squares of each input over all tokens that
passed, and how many those were. Their quotient weighs the columns when the matrix is quantized.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from gguf_moe.checkpoint import map_file
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_reader import GgufFile, StoredArray, read_gguf
from gguf_moe.mapping import MappedTensor

DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
TEXT_HASH = "gguf_moe.imatrix.text_sha256"  # of each calibration text; in the imatrix and in what is made with it
NOTES = "gguf_moe.imatrix.notes"  # in the imatrix
DATASET = "quantize.imatrix.dataset"  # llama.cpp's key in a model: the text's name
KIND = "imatrix"  # general.type
MAX_TEXT_BYTES = 127  # of a key's text, as llama.cpp's buffers have it
MAX_NAME_BYTES = 1 << 10
_KINDS = {int: "a number", StoredArray: "an array"}
_PARTS = (".in_sum2", ".counts", ".in_sum")


@dataclass(frozen=True)
class Entry:
    """The statistic of one matrix or stack of experts.

    squares: sums of squares, float32 [experts, columns]; counts: tokens, int64 [experts]; sums: of the inputs
    themselves, like squares, where a file has them. A legacy file counts all experts together: squares then has one
    row for all of them.
    """

    squares: np.ndarray
    counts: np.ndarray
    sums: np.ndarray | None = None

    def importance(self) -> np.ndarray:
        """Mean squares, float32 [experts * columns]; 1 for an expert without tokens, as llama.cpp takes it."""
        counts = self.counts.astype(np.float32)[:, None]
        means = np.divide(self.squares, counts, out=np.ones_like(self.squares), where=counts > 0)
        return means.reshape(-1)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: entries by name of the weight. path: as the user gave it."""

    path: Path
    entries: dict[str, Entry] = field(repr=False)
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int | None = None  # a legacy file does not say
    texts: tuple[str, ...] = ()  # SHA-256 of the files
    notes: tuple[str, ...] = ()  # in what the data are not llama.cpp's statistic

    def keys(self) -> dict[str, gguf.GGUFValue]:
        """What llama.cpp's quantizer writes of it into a model; and the text's hash, where the file has it."""
        text, number = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
        keys = {"quantize.imatrix.file": gguf.GGUFValue(_cut(str(self.path)), text)}
        if self.datasets:
            keys[DATASET] = gguf.GGUFValue(_cut(self.datasets[0]), text)
        keys["quantize.imatrix.entries_count"] = gguf.GGUFValue(len(self.entries), number)
        if self.chunks > 0:
            keys["quantize.imatrix.chunks_count"] = gguf.GGUFValue(self.chunks, number)
        if self.texts:
            keys[TEXT_HASH] = gguf.GGUFValue(list(self.texts), gguf.GGUFValueType.ARRAY, text)
        return keys

    def weigh(self, tensor: MappedTensor) -> MappedTensor:
        """The tensor with the importance of its columns in each slab; as it is where there is no entry.

        Raises GgufMoeError for an entry of another size: it is another model's. Of the embedding such an entry is
        passed over, as llama.cpp does.
        """
        if (entry := self.entries.get(tensor.name)) is None:
            return tensor
        experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
        importance, columns = entry.importance(), tensor.shape[-1]
        if importance.size != experts * columns:
            if tensor.name == "token_embd.weight":
                return tensor
            raise GgufMoeError(
                f"{self.path}: {tensor.name} has {importance.size} values, expected {experts} x {columns}; "
                "it was made for another model"
            )
        rows = importance.reshape(experts, columns)
        slabs = [replace(slab, importance=rows[n % experts]) for n, slab in enumerate(tensor.slabs)]
        return replace(tensor, slabs=tuple(slabs))


def _cut(text: str) -> str:
    return text.encode(errors="surrogateescape")[:MAX_TEXT_BYTES].decode(errors="ignore")


def read_imatrix(path: Path) -> Imatrix:
    """An importance matrix of either form.

    Raises GgufMoeError for a file that is none, is cut short, or holds what cannot weigh a column.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise GgufMoeError(f"{path}: not readable: {error.strerror or error}") from None
    imatrix = _from_gguf(read_gguf(path)) if magic == b"GGUF" else _from_legacy(path)
    for name, entry in imatrix.entries.items():
        _check(path, name, entry)
    return imatrix


def _check(path: Path, name: str, entry: Entry) -> None:
    bad = ~(np.isfinite(entry.squares) & (entry.squares >= 0))
    if bad.any():
        expert, column = (int(n) for n in np.argwhere(bad)[0])
        found = f"{entry.squares[expert, column]}"
        raise GgufMoeError(f"{path}: {name} is {found} at expert {expert}, column {column}, expected 0 or more")


def _from_gguf(file: GgufFile) -> Imatrix:
    missing = [key for key in (DATASETS, CHUNKS, CHUNK_SIZE) if key not in file.keys]
    if missing:
        raise GgufMoeError(f"{file.path}: {missing[0]} is missing, expected an importance matrix (imatrix)")
    arrays = {}
    for tensor in file.tensors:
        if tensor.type == "F32":
            shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
            arrays[tensor.name] = map_file(file.path, np.dtype("<f4"), file.data_start + tensor.offset, shape)
    names = sorted({t.name.removesuffix(part) for t in file.tensors for part in _PARTS if t.name.endswith(part)})
    chunks, size = (_typed(file, key, int) for key in (CHUNKS, CHUNK_SIZE))
    datasets, texts, notes = (
        tuple(map(str, _typed(file, key, StoredArray, ()))) for key in (DATASETS, TEXT_HASH, NOTES)
    )
    entries = {name: _entry(file.path, name, arrays) for name in names}
    return Imatrix(file.path, entries, datasets, chunks, size, texts, notes)


def _typed(file: GgufFile, key: str, kind: type, default: Any = None) -> Any:
    value = file.keys.get(key, default)
    if not isinstance(value, kind) and value is not default:
        raise GgufMoeError(f"{file.path}: {key} is {value!r:.80}, expected {_KINDS[kind]}")
    return value


def _entry(path: Path, name: str, arrays: dict[str, np.ndarray]) -> Entry:
    squares, counts, sums = (arrays.get(name + part) for part in _PARTS)
    if squares is None or counts is None:
        absent = ".in_sum2" if squares is None else ".counts"
        raise GgufMoeError(f"{path}: {name}{absent} is missing or not F32; the file is damaged")
    if squares.size % counts.size or (sums is not None and sums.shape != squares.shape):
        raise GgufMoeError(f"{path}: {name} has {squares.size} values for {counts.size} counts; the file is damaged")
    tokens = np.rint(counts.reshape(-1).astype(np.float64))
    if not (np.isfinite(tokens) & (tokens >= 0)).all():
        raise GgufMoeError(f"{path}: {name}.counts are not all numbers of tokens; the file is damaged")
    shape = counts.size, squares.size // counts.size
    return Entry(squares.reshape(shape), tokens.astype(np.int64), None if sums is None else sums.reshape(shape))


def _from_legacy(path: Path) -> Imatrix:
    return _Legacy(path, path.read_bytes()).read()


class _Legacy:
    """A cursor over a legacy file: it has no magic, so that every number is a chance to see that it is none."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def read(self) -> Imatrix:
        entries = {}
        for _ in range(self.number("number of entries", 1 << 20)):
            name = self.text()
            calls = self.number("number of calls", 1 << 31)
            count = self.number("number of values", (len(self.data) - self.at) // 4)
            values = np.frombuffer(self.take(4 * count, name), "<f4").reshape(1, count)
            entries[name] = Entry(values, np.array([calls or 1]))
        if not entries:
            self.fail("it has no entries")
        chunks = self.number("number of chunks", 1 << 31) if self.at < len(self.data) else 0
        datasets = (self.text(),) if self.at < len(self.data) else ()
        return Imatrix(self.path, dict(sorted(entries.items())), datasets, chunks)

    def number(self, what: str, most: int) -> int:
        (value,) = struct.unpack("<i", self.take(4, what))
        if not 0 <= value <= most:
            self.fail(f"{what} is {value}, expected 0 to {most}")
        return value

    def text(self) -> str:
        return self.take(self.number("length of a name", MAX_NAME_BYTES), "name").decode(errors="replace")

    def take(self, nbytes: int, what: str) -> bytes:
        data = self.data[self.at : self.at + nbytes]
        if len(data) < nbytes:
            self.fail(f"{what} is cut short")
        self.at += nbytes
        return data

    def fail(self, reason: str) -> NoReturn:
        raise GgufMoeError(f"{self.path}: not an importance matrix: {reason} (at byte {self.at} of {len(self.data)})")
