"""GGUF files for tests: byte by byte for hostile ones, or changed copies of good ones by the gguf package."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def info(name: str | bytes, dimensions: Iterable[int] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    dimensions = list(dimensions)
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def container(keys: Iterable[bytes] = (), infos: Iterable[bytes] = (), data: bytes = b"", align: int = 32) -> bytes:
    """A version 3 file; counts as many keys and tensors as it is given."""
    keys, infos = list(keys), list(infos)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % align) + data


@dataclass
class Parts:
    """A GGUF file in memory, to be changed: keys as the gguf package's values, tensors as (type, shape, bytes)."""

    keys: dict[str, gguf.GGUFValue]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]

    def set(self, name: str, value: Any, kind: gguf.GGUFValueType, element: gguf.GGUFValueType | None = None) -> None:
        self.keys[name] = gguf.GGUFValue(value, kind, element)

    def save(self, path: Path, align: int = 32) -> Path:
        """Written by the gguf package."""
        writer = gguf.GGUFWriter(path, "")
        writer.kv_data = [dict(self.keys)]
        if align != 32:
            writer.add_custom_alignment(align)
        for name, (kind, shape, data) in self.tensors.items():
            member = gguf.GGMLQuantizationType[kind]
            block, nbytes = gguf.GGML_QUANT_SIZES[member]
            raw = np.frombuffer(data, np.uint8).reshape(*shape[:-1], shape[-1] // block * nbytes)
            writer.add_tensor(name, raw, raw_dtype=member)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def load(path: Path) -> Parts:
    """By the gguf package."""
    return copy.deepcopy(_load(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _load(path: Path, changed_at: int) -> Parts:
    reader = gguf.GGUFReader(path)
    keys = {}
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF."):
            keys[name] = gguf.GGUFValue(entry.contents(), entry.types[0], entry.types[-1] if entry.types[1:] else None)
    tensors = {
        t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data.tobytes()) for t in reader.tensors
    }
    return Parts(keys, tensors)


def changed(source: Path, target: Path, change: Callable[[Parts], object]) -> Path:
    """A copy of a good file with `change` applied."""
    parts = load(source)
    change(parts)
    return parts.save(target)


def sharded(source: Path, directory: Path, count: int) -> list[Path]:
    """Shards as llama.cpp's converter leaves them: all keys in the first, an even number of tensors in each."""
    parts = load(source)
    names = list(parts.tensors)
    directory.mkdir()
    paths = []
    for i in range(count):
        held = names[len(names) * i // count : len(names) * (i + 1) // count]
        shard = Parts(dict(parts.keys) if i == 0 else {}, {name: parts.tensors[name] for name in held})
        shard.set("split.no", i, gguf.GGUFValueType.UINT16)
        shard.set("split.count", count, gguf.GGUFValueType.UINT16)
        shard.set("split.tensors.count", len(names), gguf.GGUFValueType.INT32)
        paths.append(shard.save(directory / f"model-{i + 1:05d}-of-{count:05d}.gguf"))
    return paths
