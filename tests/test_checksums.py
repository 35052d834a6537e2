"""SHA256SUMS as coreutils writes and reads it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from gguf_moe.checksums import LIST, read_sums, write_sums
from gguf_moe.errors import GgufMoeError

A, B, C = (hashlib.sha256(text).hexdigest() for text in (b"a", b"b", b"c"))
AWKWARD = ["plain.gguf", "with space.gguf", "back\\slash", "new\nline", "return\r", " lead", "*star", "grüße", "\udcff"]
needs_coreutils = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum of coreutils")


@pytest.mark.parametrize(
    ("content", "sums"),
    [
        ("", {}),
        (f"{A}  a\n{B} *b\n", {"a": A, "b": B}),
        (f"{A.upper()}  a", {"a": A}),
        (f"{A}  ./a\r\n\r\n{B}  sub/b\r\n", {"a": A, "sub/b": B}),
        (f"# ours\n{A}  a\n{A} *a\n", {"a": A}),
        (f"\\{A}  a\\nb\\\\n\\rc\n{B}  d\\ne\n", {"a\nb\\n\rc": A, "d\\ne": B}),
    ],
)
def test_lines(content: str, sums: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / LIST).write_bytes(content.encode())
    assert read_sums(tmp_path) == sums


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{A}  a\n{B[:-1]}  b\n", "line 2 is .*, expected 64 hexadecimal digits, two spaces and a file's name"),
        (f"{A[:-1]}g  a\n", "line 1 is "),
        (f"{A} a\n", "line 1 is "),
        (f"{A}  \n", "line 1 is "),
        (f"\\{A}  a\\tb\n", r"line 1 has the escape '\\\\t' in a name"),
        (f"\\{A}  a\\\n", r"line 1 has the escape '\\\\' in a name"),
        (f"{A}  a\n{B}  ./a\n", "line 2 gives a another hash than a line before it"),
    ],
)
def test_damaged_lists_are_refused_and_left(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / LIST
    path.write_text(content)
    with pytest.raises(GgufMoeError, match=f"{path}: {message}"):
        read_sums(tmp_path)
    with pytest.raises(GgufMoeError, match=message):
        write_sums(tmp_path, {"c": C})
    assert path.read_text() == content


def test_no_list_and_what_is_no_list(tmp_path: Path) -> None:
    assert read_sums(tmp_path) == {}
    (tmp_path / LIST).mkdir()
    with pytest.raises(GgufMoeError, match="expected a regular file"):
        read_sums(tmp_path)
    (tmp_path / LIST).rmdir()
    (tmp_path / LIST).symlink_to(tmp_path / "nowhere")
    with pytest.raises(GgufMoeError, match="expected a regular file"):
        read_sums(tmp_path)


def test_written_lines_join_those_of_other_files(tmp_path: Path) -> None:
    (tmp_path / LIST).write_text(f"{A} *mine\n{A}  b.gguf\n")
    write_sums(tmp_path, {"c.gguf": C, "b.gguf": B})
    assert (tmp_path / LIST).read_text() == f"{B}  b.gguf\n{C}  c.gguf\n{A}  mine\n"
    assert [path.name for path in tmp_path.iterdir()] == [LIST]


@needs_coreutils
def test_coreutils_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    for name in AWKWARD:
        (tmp_path / name).write_bytes(name.encode(errors="surrogateescape"))
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in AWKWARD}
    write_sums(tmp_path, sums)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", LIST], cwd=tmp_path, check=True)
    for mark in ("--text", "--binary"):
        done = subprocess.run(["sha256sum", mark, "--", *AWKWARD], cwd=tmp_path, check=True, capture_output=True)
        (tmp_path / LIST).write_bytes(done.stdout)
        assert read_sums(tmp_path) == sums
