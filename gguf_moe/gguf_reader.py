"""The header of a GGUF file: keys and tensors. Every number in it is checked before it is used.

A header is hostile until it is read: each count, length, offset, type and dimension is compared with the limits below
and with what is left of the file, before anything is allocated for it. What llama.cpp's reader refuses is refused here
too, and a few things that it takes and no model needs. Arrays stay in the file, which is mapped, until they are asked
for. So a bad file costs neither time nor memory, whatever it claims.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from gguf_moe.errors import GgufMoeError

VERSIONS = (2, 3)
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1  # of the GGUF specification
MAX_NAME_BYTES = 63  # GGML_MAX_NAME without its NUL
MAX_DIMENSIONS = 4
MAX_TEXT_BYTES = 1 << 25  # of all texts outside arrays together; a whole tokenizer.json may be among them
MAX_ELEMENT_BYTES = 1 << 20  # of a text in an array
MAX_ELEMENTS = 1 << 21  # of all arrays of texts together; the largest vocabularies with their merges have 800,000

_Type = gguf.GGUFValueType
_SCALARS = {
    _Type.UINT8: struct.Struct("<B"),
    _Type.INT8: struct.Struct("<b"),
    _Type.UINT16: struct.Struct("<H"),
    _Type.INT16: struct.Struct("<h"),
    _Type.UINT32: struct.Struct("<I"),
    _Type.INT32: struct.Struct("<i"),
    _Type.FLOAT32: struct.Struct("<f"),
    _Type.BOOL: struct.Struct("<?"),
    _Type.UINT64: struct.Struct("<Q"),
    _Type.INT64: struct.Struct("<q"),
    _Type.FLOAT64: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[_Type.UINT32], _SCALARS[_Type.UINT64]
_MIN_KEY = 8 + 1 + 4 + 1  # bytes of the smallest key: length, one character, type, value
_MIN_TENSOR = 8 + 1 + 4 + 4 + 8  # ... of a tensor without dimensions: length, one character, count, type, offset


@dataclass(frozen=True)
class TensorType:
    """How ggml stores a tensor: blocks of `block_length` weights in `block_bytes` bytes."""

    name: str
    id: int
    block_length: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one weight."""
        return 8 * self.block_bytes / self.block_length

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights, a multiple of the block."""
        return columns // self.block_length * self.block_bytes


TENSOR_TYPES: dict[str, TensorType] = {
    kind.name: TensorType(kind.name, int(kind), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()
}
TENSOR_TYPES.setdefault("Q2_0", TensorType("Q2_0", 42, 64, 18))  # not in the gguf package yet
_TYPE_OF_ID = {kind.id: kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a GGUF file. `shape` is row-major, `offset` in bytes from the start of the tensor data."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


@dataclass(frozen=True)
class StoredArray(Sequence):
    """An array as it stands in a GGUF file, decoded when asked for. Text that is no UTF-8 comes as bytes."""

    element: gguf.GGUFValueType
    length: int
    data: memoryview = field(repr=False)  # the elements' bytes, checked

    @property
    def packed(self) -> bytes:
        """The bytes of the whole array in a GGUF file: type of the elements, count, elements."""
        return struct.pack("<IQ", self.element, self.length) + self.data

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        if self.element is not _Type.STRING:
            yield from self._numbers().tolist()
            return
        at = 0
        for _ in range(self.length):
            (length,) = _U64.unpack_from(self.data, at)
            at += 8 + length
            yield _text(bytes(self.data[at - length : at]))

    def __getitem__(self, index: Any) -> Any:
        if self.element is not _Type.STRING:
            return self._numbers()[index].tolist()
        if isinstance(index, slice):
            return list(islice(self, *index.indices(self.length)))
        return next(islice(self, range(self.length)[index], None))

    def _numbers(self) -> np.ndarray:
        kind = np.dtype(_SCALARS[self.element].format)
        if self.element is _Type.BOOL:  # any byte but 0 is true
            return np.frombuffer(self.data, np.uint8) != 0
        return np.frombuffer(self.data, kind)


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself: keys with their types, tensors and where their data starts; no data."""

    path: Path
    size: int
    values: dict[str, gguf.GGUFValue] = field(repr=False)  # arrays as StoredArray
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    header_end: int  # where the padding before the data begins
    data_start: int
    spans: dict[str, range] = field(repr=False)  # bytes of the file that are each key's type and value

    @property
    def keys(self) -> dict[str, Any]:
        """The keys' values alone."""
        return {key: value.value for key, value in self.values.items()}

    @property
    def alignment(self) -> int:
        """Tensor data begin at multiples of it."""
        value = self.values.get(gguf.Keys.General.ALIGNMENT)
        return gguf.GGUF_DEFAULT_ALIGNMENT if value is None else value.value


def read_gguf(path: Path) -> GgufFile:
    """Header of a GGUF file of version 2 or 3.

    Raises GgufMoeError for anything else, and for a header that contradicts itself or the file's size.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise GgufMoeError(f"{path}: is no regular file, expected a GGUF file")
        with path.open("rb") as file:
            size = path.stat().st_size
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path again
        raise GgufMoeError(f"{path}: not readable: {reason}") from None
    return _Header(path, memoryview(data)).read()


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


class _Header:
    """A cursor over the bytes of a file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.text_left, self.elements_left = MAX_TEXT_BYTES, MAX_ELEMENTS

    def read(self) -> GgufFile:
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            self.fail(f"it starts with {magic!r}, expected b'GGUF'" if magic else "the file is empty")
        self.at = 4
        version = self.number(_U32, "version")
        if version not in VERSIONS:
            hint = "; it is big-endian" if version and not version & 0xFFFF else ""
            self.fail(f"version {version}, expected {' or '.join(map(str, VERSIONS))}{hint}")
        tensors, keys = self.number(_U64, "number of tensors"), self.number(_U64, "number of keys")
        self.check_count("keys", keys, MAX_KEYS, _MIN_KEY)
        self.check_count("tensors", tensors, MAX_TENSORS, _MIN_TENSOR)
        values: dict[str, gguf.GGUFValue] = {}
        spans: dict[str, range] = {}
        for number in range(keys):
            key = self.name(f"key {number}", MAX_KEY_BYTES)
            if key in values:
                self.fail(f"key {key!r} is there twice")
            start = self.at
            values[key] = self.value(key)
            spans[key] = range(start, self.at)
        alignment = self.alignment(values)
        infos = self.tensors(tensors, alignment)
        data_start = _padded(self.at, alignment)
        if infos:
            self.check_end(infos[-1], data_start)
        return GgufFile(self.path, self.size, values, tuple(infos), self.at, data_start, spans)

    def fail(self, reason: str) -> NoReturn:
        raise GgufMoeError(f"{self.path}: not a readable GGUF file: {reason} (at byte {self.at} of {self.size})")

    def check_count(self, what: str, count: int, most: int, smallest: int) -> None:
        if count > most:
            self.fail(f"{count} {what}, expected {most} at most")
        if count * smallest > self.size - self.at:
            self.fail(f"{count} {what} take {count * smallest} bytes or more, but {self.size - self.at} are left")

    def number(self, kind: struct.Struct, what: str) -> Any:
        if self.at + kind.size > self.size:
            self.fail(f"the file ends inside the {what}")
        (value,) = kind.unpack_from(self.data, self.at)
        self.at += kind.size
        return value

    def bytes(self, what: str, most: int) -> bytes:
        length = self.number(_U64, f"length of {what}")
        if length > most:
            self.fail(f"{what} has {length} bytes, expected {most} at most")
        if length > self.size - self.at:
            self.fail(f"{what} has {length} bytes, but {self.size - self.at} are left")
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def name(self, what: str, most: int) -> str:
        """The name of a key or tensor: some UTF-8 without NUL, where llama.cpp would cut it."""
        name = _text(self.bytes(f"the name of {what}", most))
        if not name or isinstance(name, bytes) or "\0" in name:
            self.fail(f"the name of {what} is {name!r}, expected UTF-8 text without NUL")
        return name

    def value(self, key: str) -> gguf.GGUFValue:
        kind = self.value_type(key, self.number(_U32, f"type of key {key!r}"))
        if kind is _Type.ARRAY:
            array = self.array(key)
            return gguf.GGUFValue(array, kind, array.element)
        if kind is _Type.STRING:
            text = self.bytes(f"the text of key {key!r}", self.text_left)
            self.text_left -= len(text)
            return gguf.GGUFValue(_text(text), kind)
        return gguf.GGUFValue(self.number(_SCALARS[kind], f"value of key {key!r}"), kind)

    def value_type(self, key: str, number: int) -> gguf.GGUFValueType:
        try:
            return _Type(number)
        except ValueError:
            self.fail(f"key {key!r} has the unknown type {number}")

    def array(self, key: str) -> StoredArray:
        element = self.value_type(key, self.number(_U32, f"element type of key {key!r}"))
        if element is _Type.ARRAY:
            self.fail(f"key {key!r} is an array of arrays, which GGUF does not have")
        count = self.number(_U64, f"length of key {key!r}")
        smallest = 8 if element is _Type.STRING else _SCALARS[element].size
        if count * smallest > self.size - self.at:
            left = self.size - self.at
            self.fail(f"key {key!r} has {count} elements of {smallest} bytes or more, but {left} bytes are left")
        start = self.at
        if element is _Type.STRING:
            self.skip_texts(key, count)
        else:
            self.at += count * smallest
        return StoredArray(element, count, self.data[start : self.at])

    def skip_texts(self, key: str, count: int) -> None:
        if count > self.elements_left:
            self.fail(f"key {key!r} has {count} texts, expected {MAX_ELEMENTS} in a file at most")
        self.elements_left -= count
        data, size, at, unpack = self.data, self.size, self.at, _U64.unpack_from
        for number in range(count):
            length = unpack(data, at)[0] if at + 8 <= size else 0
            at += 8 + length
            if at > size or length > MAX_ELEMENT_BYTES:
                what = f"element {number} of key {key!r} has {length} bytes"
                self.fail(f"{what}, expected {MAX_ELEMENT_BYTES} at most, and what is left of the file")
        self.at = at

    def alignment(self, values: dict[str, gguf.GGUFValue]) -> int:
        value = values.get(gguf.Keys.General.ALIGNMENT)
        if value is None:
            return gguf.GGUF_DEFAULT_ALIGNMENT
        if value.type is not _Type.UINT32 or value.value < 1 or value.value & (value.value - 1):
            found = value.value if isinstance(value.value, (int, float)) else f"a {value.type.name.lower()}"
            self.fail(f"general.alignment is {found}, expected a power of two as uint32")
        return value.value

    def tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        infos: list[TensorInfo] = []
        names: set[str] = set()
        end = 0
        for number in range(count):
            name = self.name(f"tensor {number}", MAX_NAME_BYTES)
            if name in names:
                self.fail(f"tensor {name!r} is there twice")
            names.add(name)
            info = self.tensor(name)
            if info.offset != end:
                self.fail(f"tensor {name!r} has offset {info.offset}, expected {end}, the end of those before it")
            end = _padded(info.offset + info.nbytes, alignment)
            infos.append(info)
        return infos

    def tensor(self, name: str) -> TensorInfo:
        where = f"tensor {name!r}"
        dimensions = self.number(_U32, f"number of dimensions of {where}")
        if dimensions > MAX_DIMENSIONS:
            self.fail(f"{where} has {dimensions} dimensions, expected {MAX_DIMENSIONS} at most")
        shape = tuple(self.number(_U64, f"dimensions of {where}") for _ in range(dimensions))[::-1]
        number = self.number(_U32, f"type of {where}")
        offset = self.number(_U64, f"offset of {where}")
        kind = _TYPE_OF_ID.get(number)
        if kind is None:
            self.fail(f"{where} has the unknown type {number}")
        columns, elements = shape[-1] if shape else 1, 1
        for length in shape:  # Python's integers do not wrap
            elements *= length
        if columns % kind.block_length:
            self.fail(f"{where} has rows of {columns}, no multiple of the {kind.block_length} that {kind.name} packs")
        nbytes = elements // kind.block_length * kind.block_bytes
        if max(nbytes, *(length // 8 for length in shape), 0) > self.size:  # every type takes a bit a weight or more
            self.fail(f"{where} of shape {list(shape)} takes {nbytes} bytes of {kind.name}; the file may be truncated")
        return TensorInfo(name, kind.name, shape, nbytes, offset)

    def check_end(self, last: TensorInfo, data_start: int) -> None:
        end = data_start + last.offset + last.nbytes
        if end > self.size:
            where = f"the data of tensor {last.name!r} ends at byte {end}"
            self.fail(f"{where}; the file is truncated, bytes missing: {end - self.size}")


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
