"""A ladder of files from one read of the source, taken up where an earlier run stopped."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from gguf_moe import __version__
from gguf_moe.checksums import read_sums, write_sums
from gguf_moe.convert import check_file
from gguf_moe.duplicates import Place
from gguf_moe.errors import GgufMoeError
from gguf_moe.filling import Progress, fill
from gguf_moe.layout import PlannedFile
from gguf_moe.manifest import ExportedFile, Level, Manifest, read_manifest, write_manifest
from gguf_moe.partial import OUTDATED, PartialFile, hash_file
from gguf_moe.plan import Plan

LADDER = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
LOCK = ".gguf-moe.lock"


@dataclass(frozen=True)
class Found:
    """What a run makes of what is there of a file.

    state: "complete" (stays as it is), "resumed" (`done` of `size` bytes are whole), "anew" (thrown away; why).
    """

    file: str
    state: str
    done: int
    size: int
    why: str = ""


@dataclass(frozen=True)
class Finished:
    """All files of a level have their names."""

    level: Level


Event = Found | Progress | Finished


def export(
    plans: Sequence[Plan],
    directory: Path,
    *,
    recipe: Mapping[str, Any],
    threads: int | None = None,
    force: bool = False,
    twins: Mapping[Place, Place] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Manifest:
    """Write every plan's files into `directory`, in one read of the source; what is complete there is kept.

    recipe: what the user asked, for the manifest. threads, twins: see `fill`. Files grow under names that end in
    .partial, with a journal each; when the run is interrupted, the next one goes on from there. A finished file that
    the manifest names is replaced when it is outdated; any other only with `force`. Raises GgufMoeError for a target
    that cannot be written or that another run writes to, for a source that changes meanwhile, and as `fill` does.
    """
    with _written(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            return _Run(plans, directory, dict(recipe), force, on_event).run(threads, twins)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = filelock.FileLock(directory / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise GgufMoeError(f"{directory}: another export is writing there; wait for it or name another one") from None
    try:
        yield
    finally:
        (directory / LOCK).unlink(missing_ok=True)  # first, so that nobody waits for a file without a name
        lock.release()


@contextmanager
def _written(directory: Path) -> Iterator[None]:
    """Tell what the disk refuses."""
    if directory.exists() and not directory.is_dir():
        raise GgufMoeError(f"{directory}: is a file, expected a directory for the levels; name another with --output")
    try:
        yield
    except BrokenPipeError:  # who listened to the events has gone: nothing is wrong with the directory
        raise
    except OSError as error:
        raise GgufMoeError(f"{directory}: not written: {error}; what is whole stays, run again to go on") from None


def unfinished(plans: Sequence[Plan], directory: Path, *, force: bool) -> list[Plan]:
    """The plans that `export` would still have to make there.

    Raises GgufMoeError for a file that is not to be replaced.
    """
    with _written(directory):
        if not directory.exists():
            return list(plans)
        run = _Run(plans, directory, {}, force, lambda event: None)
        return [plan for plan in plans if any(True for _ in run._partials(plan))]


class _Run:
    """One export under its lock."""

    def __init__(
        self,
        plans: Sequence[Plan],
        directory: Path,
        recipe: dict[str, Any],
        force: bool,
        on_event: Callable[[Event], None],
    ) -> None:
        self.plans, self.directory, self.recipe, self.force, self.on_event = plans, directory, recipe, force, on_event
        self.started = time.monotonic()
        self.source = source_state(plans[0])
        read_sums(directory)  # what cannot be read cannot be added to: better now than when a level is finished
        try:
            before = read_manifest(directory)
        except GgufMoeError as error:
            raise GgufMoeError(f"{error}; mend it or move it away") from None
        levels = before.levels if before else ()
        self.known = {file.name: file for level in levels for file in level.files}
        self.levels = {level.files[0].name: level for level in levels if all(map(self._is_there, level.files))}
        self.kept: dict[str, ExportedFile] = {}  # of this run's plans, by name
        self.partials: dict[str, list[PartialFile]] = {}  # still to be made, by default name of the plan

    def run(self, threads: int | None, twins: Mapping[Place, Place] | None) -> Manifest:
        for plan in self.plans:
            self.partials[plan.default_name] = list(self._partials(plan))
        partials = [partial for group in self.partials.values() for partial in group]
        self._check_space(partials)
        with ExitStack() as stack:
            for partial in partials:
                stack.callback(partial.close)
                partial.prepare()
                self._tell(partial)
                partial.mark()
            fill(
                [partial for partial in partials if not partial.sha256],
                quantizer_ordered=any(plan.by_quantizer for plan in self.plans),
                threads=threads,
                twins=twins,
                on_progress=self.on_event,
            )
        return self._save()

    def _partials(self, plan: Plan) -> Iterator[PartialFile]:
        """The files of a plan that are still to be made. Refuses a path that must not be written."""
        for planned in plan.files:
            path = planned.path(self.directory / plan.default_name)
            partial = PartialFile(
                planned, path, fingerprint(plan, planned, self.source), lambda: self._publish_if_whole(plan)
            )
            entry = self.known.get(path.name)
            partial.replace = self.force or entry is not None or partial.is_renamed()
            check_file(plan, path, force=partial.replace)
            if entry and entry.fingerprint == partial.fingerprint and is_unchanged(path, entry):
                self.kept[path.name] = entry
                if not partial.partial.exists():  # which would be of another recipe, and may be asked for again
                    partial.journal.unlink(missing_ok=True)  # of a run that was stopped just then
                self.on_event(Found(path.name, "complete", planned.size, planned.size))
            else:
                yield partial

    def _check_space(self, partials: Sequence[PartialFile]) -> None:
        needed = sum(max(0, partial.planned.size - partial.allocated()) for partial in partials)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise GgufMoeError(f"{self.directory}: needs {needed} bytes more, but only {free} are free on that disk")

    def _tell(self, partial: PartialFile) -> None:
        entry, size, name = self.known.get(partial.path.name), partial.planned.size, partial.path.name
        if partial.anew:
            self.on_event(Found(name, "anew", 0, size, partial.anew))
        elif partial.done > len(partial.planned.header):
            self.on_event(Found(name, "resumed", partial.done, size))
        elif entry and partial.path.exists():
            why = "the finished file was changed" if entry.fingerprint == partial.fingerprint else OUTDATED
            self.on_event(Found(name, "anew", 0, size, why))

    def _check_source(self) -> None:
        if source_state(self.plans[0]) != self.source:
            raise GgufMoeError(f"{self.plans[0].directory}: changed while it was being read; run again to begin anew")

    def _publish_if_whole(self, plan: Plan) -> None:
        """Give the files of a level their names when the last of them is whole, so that shards of two recipes do not
        stand side by side; take note of the level."""
        partials = self.partials[plan.default_name]
        if not all(partial.sha256 for partial in reversed(partials)):
            return
        self._check_source()
        for partial in reversed(partials):  # the first shard, by which the others are found, last
            partial.publish()
        seconds = time.monotonic() - self.started
        made = {partial.path.name: _exported(partial) for partial in partials}
        names = [planned.path(Path(plan.default_name)).name for planned in plan.files]
        files = tuple(made[name] if name in made else self.kept[name] for name in names)
        source = plan.directory.resolve().name
        level = Level(plan.file_type.name, files, plan.bits_per_weight, plan.types, source, self.recipe, seconds)
        self.levels[files[0].name] = level
        self._save()
        for partial in partials:
            partial.journal.unlink(missing_ok=True)
        self.on_event(Finished(level))

    def _save(self) -> Manifest:
        """Write manifest and checksums of all levels that are here, this run's in their order first."""
        ours = [plan.files[0].path(self.directory / plan.default_name).name for plan in self.plans]
        names = [name for name in dict.fromkeys([*ours, *self.levels]) if name in self.levels]
        manifest = Manifest(tuple(self.levels[name] for name in names))
        write_manifest(self.directory, manifest)
        gone = [name for name in self.known if not (self.directory / name).exists()]
        write_sums(self.directory, {file.name: file.sha256 for level in manifest.levels for file in level.files}, gone)
        return manifest

    def _is_there(self, file: ExportedFile) -> bool:
        path = self.directory / file.name
        return path.is_file() and path.stat().st_size == file.size


def _exported(partial: PartialFile) -> ExportedFile:
    path, size = partial.path, partial.planned.size
    return ExportedFile(path.name, size, partial.sha256, partial.fingerprint, path.stat().st_mtime_ns)


def is_unchanged(path: Path, entry: ExportedFile) -> bool:
    """Whether a finished file is still what the manifest says; its bytes are hashed only where its date differs."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    return path.stat().st_mtime_ns == entry.mtime_ns or hash_file(path, entry.size).hexdigest() == entry.sha256


def source_state(plan: Plan) -> str:
    """What tells a source from itself after a change: name, size and date of its files."""
    files = sorted(plan.source_files | set(plan.inputs))
    try:
        return "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    except OSError as error:
        raise GgufMoeError(f"{plan.directory}: changed since it was opened: {error}") from None


def fingerprint(plan: Plan, planned: PlannedFile, source: str) -> str:
    """Of all that a file's bytes follow from: the program, the source, and the headers, which hold the recipe; that of
    the first shard names the model."""
    headers = (hashlib.sha256(file.header).hexdigest() for file in (plan.files[0], planned))
    return hashlib.sha256("\n".join((__version__, source, *headers, str(planned.size))).encode()).hexdigest()
