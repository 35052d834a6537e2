"""SHA256SUMS: the hashes of the files in a directory, as `sha256sum` of coreutils writes and checks them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import write_whole

LIST = "SHA256SUMS"
MAX_BYTES = 1 << 24  # a hundred thousand files
# A backslash in front says that the name is escaped; a star before the name, that the file was read as binary.
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


def read_sums(directory: Path) -> dict[str, str]:
    """SHA-256 in lower case hex by file name, relative to the directory; {} where there is no list.

    Raises GgufMoeError for a line that is no checksum, and for two that contradict each other.
    """
    path = directory / LIST
    if not os.path.lexists(path):
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(_content(path).split("\n"), 1):
        line = line.removesuffix("\r")  # of a list that Windows has made; in names it is escaped
        if not line or line.startswith("#"):
            continue
        name, digest = _parsed(line, f"{path}: line {number}")
        if sums.setdefault(name, digest) != digest:
            raise GgufMoeError(f"{path}: line {number} gives {name} another hash than a line before it; remove one")
    return sums


def write_sums(directory: Path, sums: Mapping[str, str], gone: Iterable[str] = ()) -> None:
    """Put hashes into the list, in place of what it has of the same files, and take out the files that are gone; other
    files' lines stay. Sorted by name.

    The list is replaced as a whole, or not at all. Raises GgufMoeError as `read_sums` does, and for a failing disk.
    """
    merged = {**read_sums(directory), **sums}
    for name in gone:
        merged.pop(name, None)
    text = "".join(_line(name, merged[name]) for name in sorted(merged))
    write_whole(directory / LIST, os.fsencode(text))


def _content(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise GgufMoeError(f"{path}: expected a regular file of at most {MAX_BYTES} bytes")
        return os.fsdecode(path.read_bytes())  # names are the system's, whatever their encoding
    except OSError as error:
        raise GgufMoeError(f"{path}: not readable: {error}") from None


def _parsed(line: str, where: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise GgufMoeError(f"{where} is {line!r:.80}, expected 64 hexadecimal digits, two spaces and a file's name")
    escaped, digest, name = match.groups()
    if escaped:
        parts = re.split(r"(\\.?)", name)  # texts and escapes in turn
        if unknown := [part for part in parts[1::2] if part not in _UNESCAPES]:
            raise GgufMoeError(f"{where} has the escape {unknown[0]!r} in a name, expected {', '.join(_UNESCAPES)}")
        name = "".join(_UNESCAPES.get(part, part) for part in parts)
    return str(PurePosixPath(name)), digest.lower()  # ./name is name


def _line(name: str, digest: str) -> str:
    escaped = "".join(_ESCAPES.get(character, character) for character in name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"
