"""A model on disk as an index: config, tensor names, shapes and places now; rows later.

Opening a checkpoint reads headers only. Every size that a header claims is checked against the file before it is
used, so that whatever comes later may trust offsets and shapes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors

from gguf_moe.errors import GgufMoeError

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors reference implementation
MAX_DIMENSIONS = 4  # of GGUF
MIN_FLOAT32, MAX_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# safetensors dtype -> (NumPy dtype of the bytes in the file, the dtype argument that `quant.quantize` takes)
SOURCE_DTYPES: dict[str, tuple[np.dtype, str | None]] = {
    "BF16": (np.dtype("<u2"), "bf16"),
    "F16": (np.dtype("<f2"), None),
    "F32": (np.dtype("<f4"), None),
}


def map_file(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only mapped part of a file, of which the size was checked when it was opened.

    Raises GgufMoeError when the file has become shorter since: reading beyond its end would kill the process.
    """
    try:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
    except (OSError, ValueError) as error:
        raise GgufMoeError(f"{path}: changed since it was opened: {error}") from None


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a safetensors or GGUF file: its place, not its data."""

    name: str
    dtype: str  # of the rows that `matrix` gives
    shape: tuple[int, ...]
    file: Path
    offset: int  # in bytes, from the start of the file
    stored: str | None = None  # a GGUF file's type of blocks, where rows have to be decoded

    @property
    def type(self) -> str:
        """The type that the file has it in."""
        return self.stored or self.dtype

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension."""
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return self.columns * SOURCE_DTYPES[self.dtype][0].itemsize

    def matrix(self) -> np.ndarray:
        """The tensor as a read-only mapped matrix [rows, columns] of its file's dtype (bfloat16 as uint16 bits)."""
        dtype, _ = SOURCE_DTYPES[self.dtype]
        rows = math.prod(self.shape[:-1])
        return map_file(self.file, dtype, self.offset, (rows, self.columns))

    def raw(self) -> np.ndarray:
        """The rows as they stand in the file, not decoded: [rows, elements or bytes of a row]."""
        return self.matrix()


@dataclass(frozen=True)
class ComputedTensor(SourceTensor):
    """A float32 tensor that no file holds: its values follow from `file`, the config."""

    values: np.ndarray = field(kw_only=True, compare=False, repr=False)

    def matrix(self) -> np.ndarray:
        """The values as a matrix [rows, columns]."""
        return self.values.reshape(-1, self.columns)


@dataclass(frozen=True)
class Config:
    """`config.json` with checked access; null counts as absent."""

    path: Path
    values: dict[str, Any]

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """An integer of at least `minimum` and of 32 bits, as GGUF has it; GgufMoeError for anything else."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 1 << 32:
            raise GgufMoeError(f"{self.path}: {name} is {value!r}, expected an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number that is a normal float32."""
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not MIN_FLOAT32 <= value <= MAX_FLOAT32:
            raise GgufMoeError(f"{self.path}: {name} is {value!r}, expected a positive 32-bit number")
        return float(value)

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise GgufMoeError(f"{self.path}: {name} is missing")
        return value


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model directory, its safetensors headers read and checked.

    `files` keeps the converter's order: files by name. Tensor names are unique over all files.
    """

    directory: Path
    config: Config
    files: dict[Path, list[SourceTensor]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Index the model in `directory` without reading a weight.

    Raises GgufMoeError for a missing, truncated or contradictory file, naming it.
    """
    if not directory.is_dir():
        raise GgufMoeError(f"{directory}: no such directory; expected a model with config.json and safetensors files")
    config = Config(directory / "config.json", read_json(directory / "config.json"))
    index = directory / INDEX_NAME
    if index.exists():
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
    else:
        weight_map = None
        names = sorted(p.name for p in directory.glob("model*.safetensors") if p.is_file())
        if not names:
            raise GgufMoeError(f"{directory}: no model*.safetensors and no {INDEX_NAME}")
    files = {directory / name: read_safetensors_header(directory / name) for name in names}
    _check_places(files, weight_map, index)
    return Checkpoint(directory, config, files)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; GgufMoeError when it is missing, not JSON or not an object."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device never end
        raise GgufMoeError(f"{path}: is no regular file, expected one with a JSON object")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GgufMoeError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GgufMoeError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise GgufMoeError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} when nothing has that name; a link to nowhere is a lost file, and refused."""
    return read_json(path) if os.path.lexists(path) else {}


def read_safetensors_header(path: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file, by name, after checking header and extents against the file's size.

    The common accidents (missing, truncated, not a safetensors file, unknown dtype) are told apart here; whatever
    else the format forbids (holes, overlaps, wrong byte counts) is found by the safetensors package.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise GgufMoeError(
                    f"{path}: header of {length} bytes in a file of {size} bytes; not a safetensors file, or truncated"
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise GgufMoeError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GgufMoeError(f"{path}: unreadable safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise GgufMoeError(f"{path}: safetensors header is a JSON {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    tensors = [_source_tensor(path, size, 8 + length, name, entry) for name, entry in sorted(header.items())]
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise GgufMoeError(f"{path}: invalid safetensors file: {error}") from None
    return tensors


def _source_tensor(path: Path, size: int, data_start: int, name: str, entry: Any) -> SourceTensor:
    where = f"{path}: tensor {name}"
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [start, end, *shape]
    except (KeyError, TypeError, ValueError):
        raise GgufMoeError(f"{where}: header entry lacks dtype, shape or data_offsets") from None
    if len(shape) > MAX_DIMENSIONS or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in whole):
        found = f"shape {str(shape)[:80]} or offsets {str([start, end])[:80]}"
        raise GgufMoeError(f"{where}: {found}, expected whole numbers and at most {MAX_DIMENSIONS} dimensions")
    if data_start + end > size:
        raise GgufMoeError(
            f"{where}: data ends at byte {data_start + end}, but the file has {size} bytes; it is truncated"
        )
    if not isinstance(dtype, str) or dtype not in SOURCE_DTYPES:
        raise GgufMoeError(f"{where}: dtype {dtype}, expected one of {', '.join(SOURCE_DTYPES)}")
    expected = math.prod(shape) * SOURCE_DTYPES[dtype][0].itemsize
    if end - start != expected:
        raise GgufMoeError(f"{where}: {end - start} bytes of data, but {dtype} {shape} takes {expected}")
    return SourceTensor(name, dtype, tuple(shape), path, data_start + start)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GgufMoeError(f"{index}: weight_map is missing or empty")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise GgufMoeError(f"{index}: tensor {tensor} is placed in {name!r}, expected a file in this directory")
        if not (index.parent / name).is_file():
            raise GgufMoeError(f"{index}: names {name}, which does not exist; the download may be incomplete")
    return weight_map


def _check_places(files: dict[Path, list[SourceTensor]], weight_map: dict[str, str] | None, index: Path) -> None:
    """Each tensor once, and where the index says."""
    places: dict[str, Path] = {}
    for path, tensors in files.items():
        for tensor in tensors:
            if tensor.name in places:
                raise GgufMoeError(f"{path}: tensor {tensor.name} stands in {places[tensor.name].name} too")
            places[tensor.name] = path
    if weight_map is None:
        return
    for name, file in weight_map.items():
        if name not in places:
            raise GgufMoeError(f"{index}: tensor {name} is not in {file}")
        if places[name].name != file:
            raise GgufMoeError(f"{index}: tensor {name} is said to be in {file}, but is in {places[name].name}")
    surplus = sorted(places.keys() - weight_map.keys())
    if surplus:
        raise GgufMoeError(f"{places[surplus[0]]}: tensor {surplus[0]} is not in {index.name}")
