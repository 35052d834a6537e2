"""Changed headers: ours takes none that llama.cpp's reader refuses, and refuses few that it takes."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path

from gguf_files import ARRAY, BOOL, F32, STRING, U32, U64, array, container, info, key, text
from neighbours import libllama

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_reader import read_gguf

ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def llama_cpp_reads(path: Path) -> bool:
    """Whether llama.cpp's own reader takes the header."""
    library = libllama()
    library.gguf_init_from_file.restype = ctypes.c_void_p
    found = library.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if found:
        library.gguf_free(ctypes.c_void_p(found))
    return bool(found)


def mutated(whole: bytes, head: int, lots: random.Random) -> bytes:
    """A copy with bytes of the header set to telling values, inserted, removed, or all from some place on."""
    data = bytearray(whole)
    for _ in range(lots.choice([1, 1, 2])):
        at = lots.randrange(4, min(head, len(data) - 9))
        kind = lots.random()
        if kind < 0.5:
            data[at] = lots.choice([0, 1, 2, 3, 4, 8, 9, 10, 32, 64, 127, 128, 255, lots.randrange(256)])
        elif kind < 0.7:
            data[at : at + 8] = u64(lots.choice([0, 1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1]))
        elif kind < 0.8:
            del data[at : at + lots.choice([1, 4, 8])]
        elif kind < 0.9:
            data[at:at] = bytes(lots.choice([1, 4, 8]))
        elif len(data) > 60:
            del data[max(at, 30) :]
    return bytes(data)


# What llama.cpp's reader takes and ours does not; data beyond the file only its model loader notices.
STRICTER = ("expected UTF-8 text without NUL", "the file may be truncated", "the file is truncated")


def test_mutated_headers_are_judged_as_by_llama_cpp(tmp_path: Path) -> None:
    keys = [
        *(ARCHITECTURE, key("a", ARRAY, array(STRING, 2, text("b") + text("cd"))), key("f", F32, u32(1))),
        *(key("e", ARRAY, array(U32, 2, u32(7) * 2)), key("general.alignment", U32, u32(32)), key("q", U64, u64(0))),
        *(key("z", BOOL, b"\1"), key("i", ARRAY, array(BOOL, 3, b"\0\1\2"))),
    ]
    infos = [info("xy", (4, 2)), info("y", (32,), 8, 32), info("w", (256, 2), 12, 96), info("v", (1, 1, 1, 2), 1, 384)]
    whole = container(keys, infos, bytes(388))
    path, lots = tmp_path / "x.gguf", random.Random(5)
    verdicts = Counter()
    for _ in range(5000):
        data = mutated(whole, len(whole) - 388, lots)
        path.write_bytes(data)
        try:
            read_gguf(path)
            refusal = None
        except GgufMoeError as error:
            refusal = str(error)
        taken = llama_cpp_reads(path)
        verdicts[taken, refusal is None] += 1
        stricter = refusal is not None and any(reason in refusal for reason in STRICTER)
        assert taken == (refusal is None) or (taken and stricter), (refusal, data.hex())
    assert min(verdicts[True, True], verdicts[False, False]) > 500


def test_no_changed_byte_ends_in_another_error(tmp_path: Path) -> None:
    """Every byte of a header that holds a bit of everything, changed in four ways."""
    whole = container(
        [
            ARCHITECTURE,
            key("a", ARRAY, array(STRING, 2, text("b") + text("cd"))),
            key("e", ARRAY, array(U32, 1, u32(7))),
        ],
        [info("x", (4, 2)), info("y", (32,), 8, 32)],
        bytes(66),
    )
    path = tmp_path / "x.gguf"
    for at in range(len(whole) - 66):
        for value in (0, 1, 0x7F, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with suppress(GgufMoeError):
                read_gguf(path)
