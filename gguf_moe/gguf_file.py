"""GGUF containers: the header of a planned file, publishing whole files only. Reading is in `gguf_reader`."""

from __future__ import annotations

import io
import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_reader import TENSOR_TYPES, StoredArray, TensorInfo

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment of tensor data."""
    return gguf.GGUFWriter.ggml_pad(nbytes, ALIGNMENT)


class _Writer(gguf.GGUFWriter):
    """The gguf package's writer, which puts back as they stood arrays that were read from a file, and whole values that
    come as bytes with their type in front."""

    def _pack_val(self, val: Any, vtype: gguf.GGUFValueType, add_vtype: bool, sub_type: Any = None) -> bytes:
        if isinstance(val, memoryview):
            return bytes(val)
        if isinstance(val, StoredArray):
            return self._pack("I", vtype) + val.packed
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def stored(value: gguf.GGUFValue) -> gguf.GGUFValue:
    """A key's value with its array, if it is one, as the bytes that files hold; they are made here and not again."""
    if value.type is not gguf.GGUFValueType.ARRAY or not value.value:
        return value
    packed = memoryview(_Writer(None, arch="")._pack_val(value.value, value.type, False, value.sub_type))
    element, length = struct.unpack_from("<IQ", packed)
    kind = gguf.GGUFValueType(element)
    return gguf.GGUFValue(StoredArray(kind, length, packed[12:]), value.type, kind)


def encode_header(keys: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the tensor data, padding included, as the gguf package writes it.

    keys: `gguf.GGUFValue` by key, in order; a memoryview as value: type and value as they stood in a file.
    """
    writer = _Writer(None, arch="")
    writer.kv_data = [dict(keys)]
    for tensor in tensors:
        kind: Any = TENSOR_TYPES[tensor.type].id
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
    meantime stays, unless `replace`. A crash of the machine leaves either no `path` or the whole file: data and
    directory entry are flushed to disk around the rename.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    file = temporary.open("x+b")  # before `try`: what another run made is not ours to remove
    try:
        with file:
            file.truncate(size)
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path, replace)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Give a small file its new content: `path` then holds all of `data`, or, if that fails, what it held before."""
    try:
        with publish(path, len(data), replace=True) as file:
            file.write(data)
    except OSError as error:
        raise GgufMoeError(f"{path}: not written: {error}") from None


def rename(temporary: Path, path: Path, replace: bool) -> None:
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


def sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere directories cannot be opened, and a rename is durable by itself or not at all
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
