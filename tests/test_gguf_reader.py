"""Hostile GGUF headers: each class that broke other readers ends in one line, at once, in little memory."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, array, container, info, key, text

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_reader import MAX_ELEMENTS, MAX_KEYS, MAX_TENSORS, TENSOR_TYPES, read_gguf

MEMORY = 100 << 20
HANG = 20  # seconds: a guard against endless reading, no measure
ARCHITECTURE = key("general.architecture", STRING, text("llama"))
PREFIX = "not a readable GGUF file: "


def head(version: int = 3, tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def tensor(*dimensions: int, kind: int = 0, offset: int = 0, name: str | bytes = "x", data: int = 16) -> bytes:
    return container([ARCHITECTURE], [info(name, dimensions, kind, offset)], bytes(data))


def alignment(kind: int, value: bytes) -> bytes:
    return container([key("general.alignment", kind, value)], [info("x")], bytes(64))


REJECTED: dict[str, tuple[bytes, str]] = {
    # (1) what is no GGUF file at all
    "empty": (b"", "the file is empty"),
    "three bytes": (b"GGU", "it starts with b'GGU', expected b'GGUF'"),
    "GGML": (head(magic=b"GGML"), "it starts with b'GGML'"),
    "GGJT": (head(magic=b"tjgg"), "it starts with b'tjgg'"),
    "magic alone": (b"GGUF", "the file ends inside the version"),
    "version 0": (head(0), "version 0, expected 2 or 3"),
    "version 1": (head(1), "version 1, expected 2 or 3"),
    "version 99": (head(99), "version 99, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648, expected 2 or 3; it is big-endian"),
    # (2) counts
    "2^63 keys": (head(keys=1 << 63), f"{1 << 63} keys, expected {MAX_KEYS} at most"),
    "5e8 keys": (head(keys=500_000_000), "500000000 keys, expected"),
    "keys that the file cannot hold": (head(keys=2), "2 keys take 28 bytes or more, but 0 are left"),
    "2^63 tensors": (head(tensors=1 << 63), f"{1 << 63} tensors, expected {MAX_TENSORS} at most"),
    "2^32 tensors": (head(tensors=1 << 32), f"{1 << 32} tensors, expected {MAX_TENSORS} at most"),
    "tensors that the file cannot hold": (head(tensors=7), "7 tensors take 175 bytes or more, but 0 are left"),
    "one key too few": (head(keys=2) + ARCHITECTURE, "the file ends inside the length of the name of key 1"),
    # (3) keys
    "empty key": (container([key("", U32, u32(1))]), "the name of key 0 is '', expected UTF-8 text without NUL"),
    "key of 2^48": (head(keys=1) + u64(1 << 48) + bytes(90), f"the name of key 0 has {1 << 48} bytes, expected 65535"),
    "key past the end": (head(keys=1) + u64(60) + bytes(20), "the name of key 0 has 60 bytes, but 20 are left"),
    "key of 65536": (container([key("k" * 65536, U32, u32(1))]), "has 65536 bytes, expected 65535 at most"),
    "key that is no UTF-8": (container([key(b"\xff\xfe", U32, u32(1))]), r"the name of key 0 is b'\xff\xfe', expected"),
    "key with NUL": (container([key("a\0b", U32, u32(1))]), r"the name of key 0 is 'a\x00b', expected UTF-8"),
    # (4) texts
    "text of 2^63": (container([key("k", STRING, u64(1 << 63))]), f"the text of key 'k' has {1 << 63} bytes"),
    "text of 1 GiB": (container([key("k", STRING, u64(1 << 30))]), f"has {1 << 30} bytes, expected"),
    "text past the end": (container([key("k", STRING, u64(100))]), "the text of key 'k' has 100 bytes, but"),
    # (5) arrays
    "array of 2^63": (container([key("k", ARRAY, array(U8, 1 << 63))]), f"key 'k' has {1 << 63} elements of 1 bytes"),
    "array that wraps": (container([key("k", ARRAY, array(U64, 1 << 61))]), f"has {1 << 61} elements of 8 bytes"),
    "texts of 2^62": (container([key("k", ARRAY, array(STRING, 1 << 62))]), f"has {1 << 62} elements of 8 bytes"),
    "array of arrays": (
        container([key("k", ARRAY, array(ARRAY, 1 << 62, array(U8, 1 << 62)))]),
        "key 'k' is an array of arrays, which GGUF does not have",
    ),
    "arrays 10,000 deep": (container([key("k", ARRAY, array(ARRAY, 1) * 10_000)]), "key 'k' is an array of arrays"),
    "elements of type 99": (container([key("k", ARRAY, array(99, 1, bytes(8)))]), "key 'k' has the unknown type 99"),
    "element past the end": (
        container([key("k", ARRAY, array(STRING, 2, text("a") + u64(999)))]),
        "element 1 of key 'k' has 999 bytes, expected 1048576 at most, and what is left of the file",
    ),
    "element of 2^64-1": (
        container([key("k", ARRAY, array(STRING, 1, u64((1 << 64) - 1)))]),
        f"element 0 of key 'k' has {(1 << 64) - 1} bytes",
    ),
    "token of 10 MB": (
        container([key("k", ARRAY, array(STRING, 1, text(bytes(10_000_000))))]),
        "element 0 of key 'k' has 10000000 bytes, expected 1048576 at most",
    ),
    "more texts than any vocabulary": (
        container([key("k", ARRAY, array(STRING, MAX_ELEMENTS + 1, bytes(8 * MAX_ELEMENTS + 8)))]),
        f"key 'k' has {MAX_ELEMENTS + 1} texts, expected {MAX_ELEMENTS} in a file at most",
    ),
    # (6) types of values
    "type 13": (container([key("k", 13, bytes(8))]), "key 'k' has the unknown type 13"),
    "type 255": (container([key("k", 255, bytes(8))]), "key 'k' has the unknown type 255"),
    "value past the end": (head(keys=1) + text("kkkk") + u32(U64) + bytes(3), "ends inside the value of key 'kkkk'"),
    # (7) names
    "duplicate key": (container([ARCHITECTURE, ARCHITECTURE]), "key 'general.architecture' is there twice"),
    "duplicate tensor": (container([], [info("x"), info("x", offset=32)], bytes(64)), "tensor 'x' is there twice"),
    "name of 64 bytes": (tensor(4, name="n" * 64), "the name of tensor 0 has 64 bytes, expected 63 at most"),
    "empty name": (tensor(4, name="") + bytes(9), "the name of tensor 0 is '', expected UTF-8 text without NUL"),
    "name with NUL": (tensor(4, name="a\0b"), r"the name of tensor 0 is 'a\x00b', expected UTF-8 text without NUL"),
    "name that is no UTF-8": (tensor(4, name=b"\x9b2J"), r"the name of tensor 0 is b'\x9b2J', expected UTF-8"),
    # (8) dimensions
    "5 dimensions": (tensor(1, 1, 1, 1, 1), "tensor 'x' has 5 dimensions, expected 4 at most"),
    "1e6 dimensions": (head(tensors=1) + text("x") + u32(10**6) + bytes(99), "has 1000000 dimensions, expected 4"),
    "2^32-1 dimensions": (head(tensors=1) + text("x") + u32((1 << 32) - 1) + bytes(99), "has 4294967295 dimensions"),
    "dimension of 2^42+1": (tensor(4, (1 << 42) + 1), f"tensor 'x' of shape [{(1 << 42) + 1}, 4] takes"),
    "dimension of 2^64-1": (tensor((1 << 64) - 1, 2, 1, 1), f"of shape [1, 1, 2, {(1 << 64) - 1}] takes"),
    "dimensions whose product wraps": (
        tensor(4194305, 4194305, 211106198978564),
        "of shape [211106198978564, 4194305, 4194305] takes",
    ),
    "a dimension of 0 beside a huge one": (tensor(1 << 63, 0), f"tensor 'x' of shape [0, {1 << 63}] takes 0 bytes"),
    "row that a block does not divide": (
        tensor(48, kind=2, data=64),
        "tensor 'x' has rows of 48, no multiple of the 32",
    ),
    # (9) types of tensors
    **{
        f"tensor type {kind}": (tensor(4, kind=kind % (1 << 32)), f"tensor 'x' has the unknown type {kind % (1 << 32)}")
        for kind in (-1, 4, 5, 31, 32, 33, 36, 37, 38, 43, 1 << 31)
    },
    # (10) offsets and data
    "offset not aligned": (tensor(4, offset=16), "tensor 'x' has offset 16, expected 0, the end of those before it"),
    "gap": (tensor(4, offset=32, data=64), "tensor 'x' has offset 32, expected 0"),
    "overlap": (container([], [info("x"), info("y")], bytes(64)), "tensor 'y' has offset 0, expected 32"),
    "offset past the end": (tensor(4, offset=1 << 40), f"tensor 'x' has offset {1 << 40}, expected 0"),
    "offset that wraps": (tensor(4, offset=(1 << 64) - 16), f"tensor 'x' has offset {(1 << 64) - 16}, expected 0"),
    "last byte missing": (tensor(4)[:-1], "the data of tensor 'x' ends at byte 144; the file is truncated"),
    "no data": (tensor(4, data=0), "the data of tensor 'x' ends at byte 144; the file is truncated"),
    # (11) alignment
    "alignment 0": (alignment(U32, u32(0)), "general.alignment is 0, expected a power of two as uint32"),
    "alignment 7": (alignment(U32, u32(7)), "general.alignment is 7, expected a power of two as uint32"),
    "alignment 2^30": (alignment(U32, u32(1 << 30)), f"the data of tensor 'x' ends at byte {(1 << 30) + 16}"),
    "alignment 2^32-1": (alignment(U32, u32((1 << 32) - 1)), "general.alignment is 4294967295, expected a power"),
    "alignment as int32": (alignment(I32, u32(32)), "general.alignment is 32, expected a power of two as uint32"),
    "alignment as text": (alignment(STRING, text("32")), "general.alignment is a string, expected a power of two"),
}


def assert_rejects(data: bytes, message: str, path: Path) -> None:
    """One line that names the file and holds `message`; in less than MEMORY."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(GgufMoeError) as caught:
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{path}: {PREFIX}")
    assert message in line
    assert "\n" not in line
    assert peak < MEMORY


@pytest.fixture(autouse=True)
def no_hanging():
    """An endless loop ends in an error, not in a stuck test run."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still reading after {HANG} seconds"))
    signal.alarm(HANG)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: str, tmp_path: Path) -> None:
    assert_rejects(*REJECTED[case], tmp_path / "x.gguf")


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="limits of POSIX")
def test_rejected_by_the_commands_within_the_memory(tmp_path: Path) -> None:
    """All of them through `inspect` and `convert`, in a process that may allocate no more than MEMORY on top."""
    for number, (data, _) in enumerate(REJECTED.values()):
        (tmp_path / f"{number}.gguf").write_bytes(data)
    code = f"""
import json, resource, sys
from pathlib import Path
from click.testing import CliRunner
from gguf_moe.cli import cli
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + {MEMORY}, used + {MEMORY}))
found = []
for number in range({len(REJECTED)}):
    for command in (["inspect"], ["convert", "--bits", "4"]):
        result = CliRunner().invoke(cli, [*command, f"{{number}}.gguf"])
        found.append([result.exit_code, len(result.stderr.splitlines()), result.stdout])
json.dump(found, sys.stdout)
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert json.loads(done.stdout) == [[1, 1, ""]] * (2 * len(REJECTED))
    assert len(list(tmp_path.iterdir())) == len(REJECTED)


@pytest.mark.parametrize("cut", range(128))
def test_no_truncation_is_taken_for_a_file(cut: int, tmp_path: Path) -> None:
    whole = tensor(4)
    assert len(whole) == 144
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[:cut])
    with pytest.raises(GgufMoeError, match=PREFIX):
        read_gguf(path)


TOLERATED: dict[str, bytes] = {
    "version 2": head(2, keys=1) + ARCHITECTURE,
    "no tensors and no padding": head(keys=1) + ARCHITECTURE,
    "a scalar": tensor(kind=0, data=4),
    "a dimension of 0": tensor(0, data=0),
    "no padding after the last tensor": tensor(3, data=12),
    "trailing garbage": tensor(4, data=4000),
    "a text that is no UTF-8": container([key("k", STRING, text(b"a\xff\x1b[2J"))]),
    "an unknown key": container([key("strange.key", U32, u32(9))]),
    "a flag of 2": container([key("k", BOOL, b"\x02")]),
    "an empty array": container([key("k", ARRAY, array(F32, 0))]),
    "an empty array of texts": container([key("k", ARRAY, array(STRING, 0))]),
    "an empty text": container([key("k", STRING, text(""))]),
    "alignment 1": container(
        [key("general.alignment", U32, u32(1))], [info("x", (3,)), info("y", (1,), 0, 12)], bytes(16), 1
    ),
    "alignment 256": container([key("general.alignment", U32, u32(256))], [info("x")], bytes(16), 256),
}


@pytest.mark.parametrize("case", TOLERATED)
def test_tolerated(case: str, run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TOLERATED[case])
    read_gguf(path)
    result = run("inspect", path, "--tensors")
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert run("inspect", path, "--json").exit_code == 0


def test_values_are_the_gguf_packages(made) -> None:
    path = made("spm", "Q4_K_M")
    reader = gguf.GGUFReader(path)
    file = read_gguf(path)
    fields = {name: entry for name, entry in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.keys) == list(fields)
    for name, entry in fields.items():
        value = file.values[name]
        assert [value.type, *([value.sub_type] if value.sub_type is not None else [])] == entry.types[:2]
        have = list(value.value) if value.sub_type is not None else value.value
        assert have == entry.contents()
    for ours, theirs in zip(file.tensors, reader.tensors):
        assert (ours.name, ours.type, ours.nbytes) == (theirs.name, theirs.tensor_type.name, theirs.n_bytes)
        assert file.data_start + ours.offset == theirs.data_offset
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))


def test_types_are_the_specified_ones() -> None:
    """Of those that the gguf package does not list yet."""
    kind = TENSOR_TYPES["Q2_0"]
    assert (kind.id, kind.block_length, kind.block_bytes) == (42, 64, 18)
    assert len({kind.id for kind in TENSOR_TYPES.values()}) == len(TENSOR_TYPES) == 35


def test_arrays_are_decoded_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    texts = [text("one"), text(b"\xff"), text("three")]
    path.write_bytes(
        container(
            [
                key("t", ARRAY, array(STRING, 3, b"".join(texts))),
                key("f", ARRAY, array(F32, 2, np.array([1.5, -2], "<f4").tobytes())),
                key("b", ARRAY, array(BOOL, 3, b"\x00\x01\x02")),
            ]
        )
    )
    keys = read_gguf(path).keys
    assert list(keys["t"]) == ["one", b"\xff", "three"]
    assert (keys["t"][2], keys["t"][-1], keys["t"][:2]) == ("three", "three", ["one", b"\xff"])
    assert list(keys["f"]) == keys["f"][:] == [1.5, -2.0]
    assert list(keys["b"]) == [False, True, True]
    with pytest.raises(IndexError):
        keys["t"][3]


@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_only_regular_files_are_read(kind: str, run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    result = run("inspect", path)
    assert (result.exit_code, result.stderr) == (
        1,
        f"gguf-moe: {path}: is no regular file, expected a GGUF file\n",
    )


def test_a_template_is_shown_escaped_and_never_rendered(run, tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}\n\x1b]0;owned\x07{{ 7 * 7 }}"
    path = tmp_path / "x.gguf"
    path.write_bytes(container([ARCHITECTURE, key("tokenizer.chat_template", STRING, text(template))]))
    output = run("inspect", path).stdout
    assert r"{{ ''.__class__.__mro__[1].__subclasses__() }}\n\x1b]0;owned\x07{{ 7 * 7 }}" in output
    assert "49" not in output
    assert json.loads(run("inspect", path, "--json").stdout)["keys"]["tokenizer.chat_template"] == template


def test_names_are_shown_escaped(run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(container([key("a\x1b[31mred\nline", U32, u32(1))], [info("blk\x1b[2J\n")], bytes(16)))
    output = run("inspect", path, "--tensors").stdout
    assert r"a\x1b[31mred\nline" in output
    assert r"blk\x1b[2J\n" in output
    assert "\x1b" not in output
