"""Exports of the bundled merge for tests: run, interrupted, begun."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from checkpoints import MERGE

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.export import Event, Found, export
from gguf_moe.filling import Progress
from gguf_moe.plan import Plan, make_plans
from gguf_moe.recipe import find_file_type


def plans_of(directory: Path, quants: Sequence[str]) -> list[Plan]:
    return make_plans(open_checkpoint(directory), [find_file_type(quant) for quant in quants])


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of what has a final name, by file type."""
    return {
        path.stem.rpartition("-")[2]: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.gguf")
    }


def interrupt(plans: Sequence[Plan], directory: Path, share: float) -> None:
    """Run an export up to a share of the work."""

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= share * event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(plans, directory, recipe={}, on_event=stop)


def found(plans: Sequence[Plan], directory: Path, **options: bool) -> dict[str, Found]:
    """Run an export to its end; what it found, by file type."""
    seen: list[Event] = []
    export(plans, directory, recipe={}, on_event=seen.append, **options)
    return {event.file[:-5].rpartition("-")[2]: event for event in seen if isinstance(event, Found)}


def slow_export(out: Path, *quants: str, wait: bool = True) -> subprocess.Popen:
    """The command in the slower backend on one thread, begun; it has written something when this returns."""
    arguments = [str(MERGE), "-o", str(out), "--threads", "1", *(x for name in quants for x in ("--quant", name))]
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_moe", "export", *arguments],
        env={**os.environ, "QUANT_BACKEND": "numpy"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while wait and not any(path.stat().st_size > 500 for path in out.glob("*.journal")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MERGE, tmp_path / MERGE.name))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; its exit status as `waitpid` gives it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
