"""GGUF containers: the header of a planned file, reading back, publishing whole files only."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from gguf_moe.errors import GgufMoeError

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of tensor data."""
    return gguf.GGUFWriter.ggml_pad(nbytes, ALIGNMENT)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a GGUF file. `shape` is row-major, `offset` in bytes from the start of the tensor data."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def encode_header(keys: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the tensor data, padding included, as the gguf package writes it.

    keys: `gguf.GGUFValue` by key, in order.
    """
    writer = gguf.GGUFWriter(None, arch="")
    writer.kv_data = [dict(keys)]
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    # Hand the writer an open "file", so that the plan knows the header's bytes without touching the disk.
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(buffer, buffer.tell())
    return buffer.getvalue()


@contextmanager
def publish(path: Path, size: int, *, replace: bool) -> Iterator[BinaryIO]:
    """A file to fill with `size` bytes at any offsets, that takes the name `path` when the block ends well.

    Until then it grows beside under a temporary name; on any exception it is removed. A file that took the name in the
    meantime stays, unless `replace`. A crash of the machine leaves
    either no `path` or the whole file: data and directory entry are flushed to disk around the rename.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    file = temporary.open("x+b")  # before `try`: what another run made is not ours to remove
    try:
        with file:
            file.truncate(size)
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path, replace)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def _rename(temporary: Path, path: Path, replace: bool) -> None:
    if not replace:
        try:
            os.link(temporary, path)  # unlike a rename, fails where the name is taken
        except FileExistsError:
            raise GgufMoeError(f"{path}: appeared while it was being written; use --force to replace it") from None
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        else:
            temporary.unlink()
        return
    os.replace(temporary, path)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened, and a rename is durable by itself or not at all
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself: keys and tensors, no data."""

    path: Path
    size: int
    keys: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


def read_gguf(path: Path) -> GgufFile:
    """Header of a GGUF file, by the gguf package; GgufMoeError when it is none, or its tensors end after the file."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise ValueError("the file is empty")
        reader = gguf.GGUFReader(path)
        keys = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = tuple(
            TensorInfo(
                name=t.name,
                type=t.tensor_type.name,
                shape=tuple(int(n) for n in reversed(t.shape)),
                nbytes=int(t.n_bytes),
                offset=int(t.data_offset) - int(reader.data_offset),
            )
            for t in reader.tensors
        )
    except (OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError, RecursionError) as error:
        raise GgufMoeError(f"{path}: not a readable GGUF file: {error}") from None
    return GgufFile(path, size, keys, tensors)
