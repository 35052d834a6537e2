"""Reports as files: JSON for programs, pages and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_file import write_whole

# A report has one of these in its first bytes.
_MARKS, _START = (b' },\n "engine": "', b"<title>What quantizing ", b'{\n "texts": ['), 1 << 10


def check_targets(reports: Sequence[Path | None], plots: Path | None, *others: Path | None) -> None:
    """Refuse before the work what cannot be written after it, and to replace by a report what is none. plots: a
    directory; others: further files that will be written."""
    targets = [path for path in (*reports, plots, *others) if path]
    if len({path.resolve() for path in targets}) < len(targets):
        raise UsageError("one path is given for two files to write")
    for path in targets:
        if path.exists() and path.is_dir() != (path == plots):
            raise GgufMoeError(f"{path}: is {'no' if path == plots else 'a'} directory")
        try:
            TemporaryFile(dir=path if path.is_dir() else path.absolute().parent).close()
        except OSError as error:
            raise GgufMoeError(f"{path}: cannot be written: {error.strerror}") from None
    for path in reports:
        if path and path.exists():
            check_ours(path)


def check_ours(path: Path) -> None:
    """Refuse to replace a file that is no report: an option without its value takes the next word, a model's name."""
    if not path.is_file():
        raise GgufMoeError(f"{path}: is no regular file")
    with path.open("rb") as file:
        start = file.read(_START)
    if start and not any(mark in start for mark in _MARKS):
        raise GgufMoeError(f"{path}: exists and is no report of gguf-moe; remove it, or give another name")


def write_json(path: Path, found: dict[str, Any]) -> None:
    """A report as a file."""
    write_whole(path, f"{json.dumps(found, indent=1, allow_nan=False)}\n".encode())
