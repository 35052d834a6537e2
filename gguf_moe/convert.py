"""Run one plan: fill its files and publish them whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from gguf_moe.duplicates import Place
from gguf_moe.errors import GgufMoeError
from gguf_moe.filling import Progress, fill
from gguf_moe.gguf_file import publish
from gguf_moe.layout import PlannedFile
from gguf_moe.plan import Plan


class _FileSink:
    """A file that is written in one go: nothing is done before."""

    def __init__(self, planned: PlannedFile, file: BinaryIO) -> None:
        self.planned, self.done, self._file = planned, len(planned.header), file
        file.write(planned.header)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._file.seek(offset)
        self._file.write(data)

    def read(self, offset: int, nbytes: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(nbytes)

    def mark(self) -> None:
        pass


def convert(
    plan: Plan,
    path: Path,
    *,
    threads: int | None = None,
    force: bool = False,
    twins: Mapping[Place, Place] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Write the planned file to `path`, or its shards to the paths that follow from it: whole, or not at all.

    threads, twins, on_progress: see `fill`. Raises GgufMoeError before writing when a file exists (without `force`) or
    the disk lacks space, and while writing as `fill` does.
    """
    with published(plan, path, force=force) as sinks:
        fill(sinks, quantizer_ordered=plan.by_quantizer, threads=threads, twins=twins, on_progress=on_progress)


@contextmanager
def published(plan: Plan, path: Path, *, force: bool) -> Iterator[list[_FileSink]]:
    """The planned files to fill, headers written: they take their names when the block ends well, the first shard last.

    Raises GgufMoeError before writing as `check_target` does, and for what the disk refuses.
    """
    check_target(plan, path, force=force)
    try:
        with ExitStack() as stack:
            yield [stack.enter_context(_published(file, file.path(path), force)) for file in plan.files]
    except OSError as error:
        raise GgufMoeError(f"{path}: not written: {error}") from None


@contextmanager
def _published(planned: PlannedFile, path: Path, replace: bool) -> Iterator[_FileSink]:
    with publish(path, planned.size, replace=replace) as file:
        yield _FileSink(planned, file)


def check_target(plan: Plan, path: Path, *, force: bool) -> None:
    """Refuse a target that must not or cannot be written."""
    if not path.parent.is_dir():
        raise GgufMoeError(f"{path}: directory {path.parent} does not exist")
    for file in plan.files:
        check_file(plan, file.path(path), force=force)
    free = shutil.disk_usage(path.parent).free
    if free < plan.size:
        raise GgufMoeError(f"{path}: needs {plan.size} bytes, but only {free} are free on that disk")


def check_output(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse a path that holds something else, or anything without `force`."""
    if path.exists() and any(path.samefile(source) for source in inputs):
        raise GgufMoeError(f"{path}: is the input itself; name another file with --output")
    if path.exists() and not path.is_file():
        raise GgufMoeError(f"{path}: is no regular file, expected a file name")
    if os.path.lexists(path) and not force:  # a link to nowhere too
        raise GgufMoeError(f"{path}: exists; use --force to replace it")


def check_file(plan: Plan, path: Path, *, force: bool) -> None:
    """Refuse a path that is not ours to write to."""
    check_output(path, plan.inputs, force=force)
    if path.exists() and path.suffix != ".gguf" and path.resolve().parent == plan.directory.resolve():
        raise GgufMoeError(f"{path}: is a file of the checkpoint itself")
