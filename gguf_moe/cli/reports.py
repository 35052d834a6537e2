"""Reports as files: JSON for programs, pages and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_file import write_whole


def check_targets(files: Iterable[Path | None], plots: Path | None) -> None:
    """Refuse before the work what cannot be written after it: files, and a directory of plots."""
    for path in (*files, plots):
        if path and not path.absolute().parent.is_dir():
            raise GgufMoeError(f"{path}: no such directory")
        if path and path.exists() and path.is_dir() != (path == plots):
            raise GgufMoeError(f"{path}: is {'no' if path == plots else 'a'} directory")


def write_json(path: Path, found: dict[str, Any]) -> None:
    """A report as a file."""
    write_whole(path, f"{json.dumps(found, indent=1, allow_nan=False)}\n".encode())


def pictures(module: str) -> ModuleType:
    """A module of the evaluation that draws; UsageError where what it needs is not installed."""
    try:
        return import_module(f"gguf_moe.evaluation.{module}")
    except ModuleNotFoundError as error:
        raise UsageError(f"pictures need {error.name}: pip install 'gguf-moe[eval]'") from None
