"""A planned file that grows beside its final name, with a journal, so that an interrupted run can be taken up again.

The journal's first line is the fingerprint of what the file is made from; each further line says that so many bytes
from the start are whole, and their SHA-256. So a partial file proves itself when it is taken up: its bytes are hashed
again, which also restores the running hash. Whatever does not prove itself is begun anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import rename, sync_directory
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.layout import PlannedFile

READ_BYTES = 1 << 20  # at once, for hashing
FLUSH_BYTES = 1 << 26  # after which the disk is set to work, so that it need not do all of it at the end
OUTDATED = "source, recipe or version of gguf-moe are others now"
_RECORD = re.compile(rb"(\d{1,20}) ([0-9a-f]{64})")


class PartialFile:
    """A sink for `fill` that survives its process, to be published as `path` when the last byte is there.

    done: bytes from the start that an earlier run left whole. anew: why an earlier run's file was thrown away, or "".
    sha256: of the whole file, once it is that. replace: what has the name already. on_whole: called when the disk has
    the last byte, and what is there is what was planned.
    """

    def __init__(self, planned: PlannedFile, path: Path, fingerprint: str, on_whole: Callable[[], None]) -> None:
        self.planned, self.path, self.fingerprint = planned, path, fingerprint
        self.partial, self.journal = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.journal")
        self.done, self.anew, self.sha256, self.replace = 0, "", "", False
        self._on_whole = on_whole
        self._hash = hashlib.sha256()
        self._hashed = self._recorded = 0  # bytes from the start
        self._waiting: dict[int, int] = {}  # written, but not yet hashed since something before is missing: start, end
        self._file: BinaryIO | None = None
        self._flusher: ThreadPoolExecutor | None = None
        self._flushing: Future[None] | None = None
        self._flushed = 0  # bytes from the start that the disk was given
        self._renamed = False

    def is_renamed(self) -> bool:
        """Whether an earlier run gave the file its name and was stopped before it could say so elsewhere."""
        left = read_journal(self.journal)
        if left is None or not self.path.is_file() or left.done != self.path.stat().st_size:
            return False
        return not self.partial.exists() or self.partial.samefile(self.path)  # a hard link is how it gets its name

    def allocated(self) -> int:
        """Bytes on disk that an earlier run left, which this one needs no more."""
        return getattr(self.partial.stat(), "st_blocks", 0) * 512 if self.partial.exists() else 0

    def prepare(self) -> None:
        """Take up what an earlier run left, or begin anew; then it wants a `mark`."""
        left = read_journal(self.journal)
        if left and left.fingerprint == self.fingerprint:
            if self._take_up(left):
                return
            self.anew = "what is there is damaged"
        elif left or os.path.lexists(self.partial):
            self.anew = OUTDATED if left else "its journal is missing"
        self._begin()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at an offset; they are hashed as soon as all before them are there."""
        whole = max(0, self._hashed - offset)  # of these, by an earlier run that was stopped between other bytes
        data, offset = memoryview(data).cast("B")[whole:], offset + whole
        end = offset + data.nbytes
        file = self._opened()
        file.seek(offset)
        left = data
        while left:  # a raw file may take less than all
            left = left[file.write(left) :]
        if offset != self._hashed:
            self._waiting[offset] = end
            return
        self._hash.update(data)
        self._hashed = end
        while (end := self._waiting.pop(self._hashed, 0)) > 0:
            self._hash_from_file(end)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes that were written."""
        file = self._opened()
        file.seek(offset)
        return file.read(nbytes)

    def mark(self) -> None:
        """Note in the journal how much is whole, and check the file when that is all of it."""
        if self._hashed > self._recorded:
            self._record()
        if self._hashed - self._flushed >= FLUSH_BYTES:
            self._flush_behind()
        self._close_file()
        self._check_if_whole()

    def publish(self) -> None:
        """Give the file, which is whole, its name, if an earlier run did not."""
        if not self._renamed:
            rename(self.partial, self.path, self.replace)
            sync_directory(self.path.parent)

    def close(self) -> None:
        """Let go of the file; it and its journal stay for the next run."""
        if self._flusher:
            self._flusher.shutdown()
        self._close_file()

    def _opened(self) -> BinaryIO:
        """The file, open until the next mark: a ladder in shards has more than a process may hold open."""
        if self._file is None:
            self._file = self.partial.open("r+b", buffering=0)  # what the journal says must have left this process
        return self._file

    def _close_file(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self.journal.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)  # what else its bytes belong to, by a link, is not ours to overwrite
        with self.partial.open("xb") as file:
            file.truncate(self.planned.size)
        self.journal.write_text(self.fingerprint + "\n")
        self.write(0, self.planned.header)
        self.done = len(self.planned.header)

    def _take_up(self, left: Journal) -> bool:
        """Whether the bytes that the journal calls whole are; then go on from there."""
        renamed = self.is_renamed()
        file = self.path if renamed else self.partial
        if not len(self.planned.header) <= left.done <= self.planned.size or not file.exists():
            return False
        if file.stat().st_size != self.planned.size or self.partial.is_symlink():
            return False
        hashed = hash_file(file, left.done)
        if hashed.hexdigest() != left.sha256:
            return False
        self._hash = hashed
        self.done = self._hashed = self._recorded = left.done
        self._renamed = renamed
        if renamed:
            self.partial.unlink(missing_ok=True)
        os.truncate(self.journal, left.length)
        return True

    def _flush_behind(self) -> None:
        """Have a thread flush what is written, one call at a time; what that says is not lost."""
        if self._flushing and not self._flushing.done():
            return
        self._await_flush()
        self._flusher = self._flusher or ThreadPoolExecutor(1)
        self._flushing = self._flusher.submit(_sync, self.partial)
        self._flushed = self._hashed

    def _await_flush(self) -> None:
        if self._flushing:
            self._flushing.result()

    def _hash_from_file(self, end: int) -> None:
        """Hash what was written before its turn came."""
        while self._hashed < end:
            data = self.read(self._hashed, min(READ_BYTES, end - self._hashed))
            if not data:
                raise GgufMoeError(f"{self.partial}: was cut short at byte {self._hashed} while it was being written")
            self._hash.update(data)
            self._hashed += len(data)

    def _record(self) -> None:
        with self.journal.open("ab", buffering=0) as file:
            file.write(f"{self._hashed} {self._hash.hexdigest()}\n".encode())
        self._recorded = self._hashed

    def _check_if_whole(self) -> None:
        """Say so when the last byte is there, flushed, reopened and compared with the plan."""
        if self.sha256 or self._hashed < self.planned.size:
            return
        if not self._renamed:
            self._check_against_plan()
        self.sha256 = self._hash.hexdigest()
        self._on_whole()

    def _check_against_plan(self) -> None:
        self._await_flush()
        _sync(self.partial)
        self.close()
        file = read_gguf(self.partial)
        if file.size != self.planned.size or file.tensors != tuple(tensor.info for tensor in self.planned.tensors):
            raise GgufMoeError(
                f"{self.partial}: is not what was written, {self.planned.size} bytes; is the disk sound?"
            )


@dataclass(frozen=True)
class Journal:
    """What a journal says: of the file that it goes with, `done` bytes have this hash. length: its own, without a torn
    last line."""

    fingerprint: str
    done: int
    sha256: str
    length: int


def _sync(path: Path) -> None:
    """Wait until the disk has what was written to a file."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def read_journal(path: Path) -> Journal | None:
    """The last whole record of a journal; None when it has none."""
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    records = [_RECORD.fullmatch(line) for line in lines[1:]]
    if not records or records[-1] is None:
        return None
    length = sum(len(line) + 1 for line in lines)
    return Journal(lines[0].decode(errors="replace"), int(records[-1][1]), records[-1][2].decode(), length)


def hash_file(path: Path, nbytes: int) -> hashlib._Hash:
    """SHA-256 of the first `nbytes` bytes of a file."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while nbytes and (data := file.read(min(READ_BYTES, nbytes))):
            hashed.update(data)
            nbytes -= len(data)
    return hashed
