"""Writing importance matrices as llama.cpp's own tool does, in both forms, and adding them up."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import encode_header, padded, write_whole
from gguf_moe.gguf_reader import TensorInfo
from gguf_moe.imatrix import CHUNK_SIZE, CHUNKS, DATASETS, KIND, NOTES, TEXT_HASH, Entry, Imatrix

DEFAULT_CHUNK = 512  # tokens, where a legacy file does not say
SCHEMA = "imatrix.stats_schema"
# Of a tensor's inputs, over all experts that saw a token; five of them beside the same tensor of an earlier layer.
STATS = (
    *("sum_sq", "mean", "elements", "std_deviation", "skewness", "kurtosis", "gain", "h_norm"),
    *("l2_dist", "cossim", "pearson", "covariance"),
)
_LEAST = 1e-10  # below it llama.cpp takes a spread, or a share, for none
_LAYER = re.compile(r"blk\.(\d+)\.(.*)", re.ASCII)
_Type = gguf.GGUFValueType


def chunk_count(imatrix: Imatrix) -> int:
    """How many chunks of text the busiest tensor saw, rounded half up."""
    size = imatrix.chunk_size or DEFAULT_CHUNK
    most = max((int(entry.counts.max()) for entry in imatrix.entries.values()), default=0)
    return (most + size // 2) // size


def write_gguf(path: Path, imatrix: Imatrix) -> None:
    """The GGUF form, whole or not at all: sums, counts and statistics by tensor, names in the order of their bytes."""
    keys = {
        gguf.Keys.General.TYPE: gguf.GGUFValue(KIND, _Type.STRING),
        DATASETS: gguf.GGUFValue(list(imatrix.datasets), _Type.ARRAY, _Type.STRING),
        CHUNKS: gguf.GGUFValue(chunk_count(imatrix), _Type.UINT32),
        CHUNK_SIZE: gguf.GGUFValue(imatrix.chunk_size or DEFAULT_CHUNK, _Type.UINT32),
        SCHEMA: gguf.GGUFValue(list(STATS), _Type.ARRAY, _Type.STRING),
    }
    for key, texts in ((TEXT_HASH, imatrix.texts), (NOTES, imatrix.notes)):
        if texts:
            keys[key] = gguf.GGUFValue(list(texts), _Type.ARRAY, _Type.STRING)
    infos, chunks, offset = [], [], 0
    for name in sorted(imatrix.entries, key=str.encode):
        for part, array in _parts(imatrix, name).items():
            array = np.ascontiguousarray(array, "<f4")
            shape = array.shape[1:] if len(array) == 1 and array.ndim > 1 else array.shape
            infos.append(TensorInfo(f"{name}.{part}", "F32", shape, array.nbytes, offset))
            chunks.append(array.tobytes().ljust(padded(array.nbytes), b"\0"))
            offset += padded(array.nbytes)
    write_whole(path, encode_header(keys, infos) + b"".join(chunks))


def _parts(imatrix: Imatrix, name: str) -> dict[str, np.ndarray]:
    entry = imatrix.entries[name]
    parts = {"in_sum2": entry.squares, "counts": entry.counts.reshape(-1, 1)}
    if entry.sums is not None:
        parts["in_sum"] = entry.sums
    return {**parts, "stats": statistics(imatrix, name)}


def write_legacy(path: Path, imatrix: Imatrix) -> None:
    """The legacy form, whole or not at all. Counts of single experts and the sums themselves do not fit into it."""
    size = imatrix.chunk_size or DEFAULT_CHUNK
    records = []
    for name in sorted(imatrix.entries, key=str.encode):
        entry = imatrix.entries[name]
        if not entry.counts.any():
            continue
        calls = math.ceil(entry.counts.max() / size)
        values = (entry.importance() * np.float32(calls)).astype("<f4")
        records.append(_text(name) + struct.pack("<2i", calls, values.size) + values.tobytes())
    tail = struct.pack("<i", chunk_count(imatrix)) + _text(imatrix.datasets[-1] if imatrix.datasets else "")
    write_whole(path, struct.pack("<i", len(records)) + b"".join(records) + tail)


def _text(text: str) -> bytes:
    data = text.encode(errors="surrogateescape")
    return struct.pack("<i", len(data)) + data


def merge(matrices: Sequence[Imatrix]) -> Imatrix:
    """The sum of several matrices of one model, datasets in their order, chunks of the first's size.

    A legacy file counts for its calls times the chunk size, and its tensors lose what it does not have. Raises
    GgufMoeError for entries of different sizes.
    """
    size = next((matrix.chunk_size for matrix in matrices if matrix.chunk_size), DEFAULT_CHUNK)
    entries: dict[str, Entry] = {}
    for matrix in matrices:
        for name, entry in matrix.entries.items():
            if matrix.chunk_size is None:  # legacy: mean squares times calls
                entry = Entry(entry.squares * np.float32(size), entry.counts * size)
            entries[name] = _sum(matrix.path, name, entries[name], entry) if name in entries else entry
    merged = replace(matrices[0], entries=dict(sorted(entries.items())), chunk_size=size)
    datasets, texts, notes = (
        [item for matrix in matrices for item in getattr(matrix, name)] for name in ("datasets", "texts", "notes")
    )
    return replace(
        merged,
        datasets=tuple(datasets),
        chunks=chunk_count(merged),
        texts=tuple(dict.fromkeys(texts)),
        notes=tuple(dict.fromkeys(notes)),
    )


def _sum(path: Path, name: str, first: Entry, second: Entry) -> Entry:
    if first.squares.size != second.squares.size:
        found = f"{second.squares.size} values, expected {first.squares.size} as before"
        raise GgufMoeError(f"{path}: {name} has {found}; it was made for another model")
    experts = max(len(first.counts), len(second.counts))
    counts = np.broadcast_to(first.counts, experts) + np.broadcast_to(second.counts, experts)
    shape = experts, first.squares.size // experts
    squares = first.squares.reshape(shape) + second.squares.reshape(shape)
    if first.sums is None or second.sums is None:
        return Entry(squares, counts)
    return Entry(squares, counts, first.sums.reshape(shape) + second.sums.reshape(shape))


def statistics(imatrix: Imatrix, name: str) -> np.ndarray:
    """The numbers of `STATS`, float32: what llama.cpp's tool shows of a tensor; its quantizer does not look at them."""
    mean, square, _ = _means(imatrix.entries[name])
    total, middle, spread = square.sum(), mean.mean() if mean.size else 0.0, mean.std() if mean.size else 0.0
    centred = mean - middle
    shape = (0.0, 0.0)
    if spread > _LEAST:
        shape = (centred**3).mean() / spread**3, (centred**4).mean() / spread**4 - 3
    share = square / total if total > 0 else square
    share = share[share > _LEAST]
    entropy = -(share * np.log2(share)).sum()
    h_norm = 100 * entropy / math.log2(mean.size) if mean.size > 1 else 0.0
    gain, *beside = _beside_earlier(imatrix, name, total / mean.size if mean.size else 0.0)
    values = (total, middle, mean.size, spread, *shape, gain, h_norm, *beside)
    return np.array(values, np.float32)


def _means(entry: Entry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean input and mean square of it, float64, of all columns of experts that saw a token, and which those are."""
    seen = np.broadcast_to((entry.counts > 0)[:, None], entry.squares.shape)
    counts = np.broadcast_to(entry.counts[:, None], entry.squares.shape)[seen]
    square = entry.squares[seen].astype(np.float64) / counts
    mean = square if entry.sums is None else entry.sums[seen].astype(np.float64) / counts
    return mean, square, seen


def _beside_earlier(imatrix: Imatrix, name: str, mean_square: float) -> tuple[float, ...]:
    """gain, l2_dist, cossim, pearson and covariance against the nearest earlier layer that has the tensor; else NaN."""
    match = _LAYER.fullmatch(name)
    earlier = (f"blk.{layer}.{match[2]}" for layer in range(int(match[1]) - 1, -1, -1)) if match else ()
    other = next((entry for entry in map(imatrix.entries.get, earlier) if entry is not None), None)
    entry = imatrix.entries[name]
    if other is None or other.squares.shape != entry.squares.shape:
        return (math.nan,) * 5
    (mean, _, seen), (before, before_square, before_seen) = _means(entry), _means(other)
    both = seen & before_seen
    if not both.any():
        return (math.nan,) * 5
    a, b = mean[both[seen]], before[both[before_seen]]
    before_mean_square = before_square.mean() if before_square.size else 0.0
    gain = math.sqrt(mean_square / before_mean_square) if before_mean_square > 0 else math.nan
    norm = math.sqrt((a**2).sum() * (b**2).sum())
    covariance = ((a - a.mean()) * (b - b.mean())).mean()
    spread = a.std() * b.std()
    return (
        gain,
        math.sqrt(((a - b) ** 2).sum()),
        float((a * b).sum()) / norm if norm else 0.0,
        covariance / spread if spread else 0.0,
        covariance,
    )
