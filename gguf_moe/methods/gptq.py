"""Error feedback: codes chosen so that what a layer puts out changes least, on a text, inside ordinary blocks.

Layer by layer, on the forward pass of the evaluation. A layer runs as it was, on hidden states that came through the
layers before it as they have been quantized; each matrix is quantized by the second moments of its inputs as soon as
its tokens have passed, an expert at a time; then the layer runs as it is now.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gguf_moe import __version__
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.engines import Engine
from gguf_moe.evaluation.engines import Settings as EngineSettings
from gguf_moe.evaluation.events import MemoryPlan, Notice, Started
from gguf_moe.evaluation.forward import Model
from gguf_moe.evaluation.guards import CALIBRATION, context_warnings
from gguf_moe.evaluation.memory import free_memory, plan_memory
from gguf_moe.evaluation.source import ModelSource, planned_model
from gguf_moe.evaluation.state import source_identity
from gguf_moe.evaluation.validate import read_windows
from gguf_moe.methods import KEY, Chosen, Event, Settings, Summary
from gguf_moe.methods.said import BASES, CALIBRATED_ON, CHUNKS, DAMPING
from gguf_moe.methods.store import Store, chosen_tensors, discard
from gguf_moe.methods.walk import Chooser, squares, walk, working_bytes
from gguf_moe.plan import Plan
from gguf_moe.report import size_text

CONTEXT = 512  # tokens of a window
LISTED = 5  # matrices that a summary names
_UNBOUNDED = 1 << 62  # bytes


class Method:
    """See `methods.Method`."""

    def __init__(self, settings: Settings) -> None:
        if settings.text is None:
            raise UsageError("--method gptq needs --calib, a text")
        if not 0 < np.float32(settings.damping) <= 1:  # as a file has it; not so of what is no number
            raise UsageError(f"--damping {settings.damping:g}: expected a number above 0, of 1 at most")
        if settings.device.partition(":")[0] == "mps":
            raise UsageError(f"--device {settings.device}: has no 64-bit numbers, which gptq needs; take cpu or cuda")
        self.settings, self.text = settings, settings.text
        # Hidden states of layers as they were serve all levels of a ladder.
        self.original = settings.ladder if settings.original is None else settings.original

    @cached_property
    def digest(self) -> str:
        """The text's SHA-256."""
        try:
            return hashlib.sha256(self.text.read_bytes()).hexdigest()
        except OSError as error:
            raise GgufMoeError(f"{self.text}: not readable: {error.strerror or error}") from None

    def keys(self) -> dict[str, gguf.GGUFValue]:
        kinds, settings = gguf.GGUFValueType, self.settings
        return {
            KEY: gguf.GGUFValue("gptq", kinds.STRING),
            CALIBRATION: gguf.GGUFValue([self.digest], kinds.ARRAY, kinds.STRING),
            CHUNKS: gguf.GGUFValue(settings.chunks or 0, kinds.UINT32),
            DAMPING: gguf.GGUFValue(settings.damping, kinds.FLOAT32),
            CALIBRATED_ON: gguf.GGUFValue(BASES[self.original], kinds.STRING),
        }

    def check(self, plans: Sequence[Plan]) -> None:
        for plan in plans:
            if not chosen_tensors(plan):
                raise UsageError(
                    f"--method gptq: {plan.default_name} has no matrix whose codes could be chosen; leave the method "
                    "out for this file type"
                )

    @contextmanager
    def prepared(
        self, plans: Sequence[Plan], targets: Sequence[Path], on_event: Callable[[Event], None]
    ) -> Iterator[list[Plan]]:
        with ExitStack() as stack:
            stores = [self._store(plan, target) for plan, target in zip(plans, targets)]
            if not all(store.is_whole() for store in stores):
                self._loaded(stores)  # what cannot be is refused before an earlier run's layers are given up
            for text in (text for store in stores for text in store.open(stack)):
                on_event(Notice(text))
            try:
                _check_space(stores)
                self._choose(stores, on_event)
                yield [store.planned() for store in stores]
            except (KeyboardInterrupt, SystemExit):
                on_event(Summary(_kept(stores)))
                raise
            for store in stores:
                store.remove()

    def forget(self, targets: Sequence[Path]) -> None:
        for target in targets:
            discard(_directory(target))

    def _choose(self, stores: Sequence[Store], on_event: Callable[[Event], None]) -> None:
        total, done = sum(len(t.mapped.slabs) for store in stores for t in store.tensors.values()), 0

        def count(matrix: str) -> None:
            nonlocal done
            on_event(Chosen(matrix, done := done + 1, total))

        for group in [stores] if self.original else [[store] for store in stores]:
            self._run(group, count, on_event)
        for store in stores:
            on_event(Summary(_summary(store, self.settings.damping)))

    def _store(self, plan: Plan, target: Path) -> Store:
        settings = {key.rpartition(".")[2]: item.value for key, item in self.keys().items() if key != CALIBRATION}
        identity = {
            "gguf-moe": __version__,
            "text": self.digest,
            **settings,
            "device": self.settings.device,
            "source": source_identity(_base(plan)),
            "inputs": {path.name: _state(path) for path in plan.inputs},
            "recipe": hashlib.sha256(b"".join(file.header for file in plan.files)).hexdigest(),
        }
        return Store(_directory(target), plan, identity)

    def _run(self, stores: Sequence[Store], count: Callable[[str], None], on_event: Callable[[Event], None]) -> None:
        """Choose the codes of files that are calibrated on the same hidden states."""
        for store in stores:
            for note in (note for layer in store.layers for note in store.done.get(layer, [])):
                count(note["tensor"])
        if all(store.is_done(layer) for store in stores for layer in store.layers):
            return
        base = _base(stores[0].plan)
        for warning in context_warnings(base, CONTEXT):
            on_event(Notice(warning))
        engine, model, windows, memory, spilled = self._loaded(stores)
        now = model if self.original else engine.model(replace(base, tensors=dict(base.tensors)))
        if spilled:
            _check_space(stores, max(squares(stores, in_files=True)))
        on_event(Started(*windows.shape, 0, memory.sweep, memory))
        walk(model, now, windows, Chooser(model, stores, self.settings.damping, spilled, count))
        if source_identity(base) != stores[0].identity["source"]:
            raise GgufMoeError(f"{base.path}: changed while codes were chosen; run again when it is whole")

    def _loaded(self, stores: Sequence[Store]) -> tuple[Engine, Model, np.ndarray, MemoryPlan, bool]:
        """Engine, model, the text's windows; and what `_memory` says. Raises UsageError and GgufMoeError where the
        model cannot be run so, or on this text."""
        base, settings = _base(stores[0].plan), self.settings
        asked = EngineSettings(CONTEXT, settings.chunks, device=settings.device, memory=settings.memory)
        engine, read = read_windows(base, self.text, asked)
        if read.sha256 != self.digest:
            raise GgufMoeError(f"{self.text}: changed while it was read; run again")
        model = engine.model(base)
        return engine, model, read.windows, *self._memory(model, stores, len(read.windows))

    def _memory(self, model: Model, stores: Sequence[Store], chunks: int) -> tuple[MemoryPlan, bool]:
        """What it takes, and whether large moments have to lie in files. Raises UsageError where that is too much."""
        device = model.weights.device
        allowed = free_memory(device) if self.settings.memory is None else self.settings.memory
        models = [model] * (1 if self.original else 2)
        running = plan_memory(models, chunks, CONTEXT, _UNBOUNDED, scored=False)
        for spilled in (False, True) if device.type == "cpu" else (False,):
            needed = replace(running, matrices=running.matrices + working_bytes(stores, spilled, device))
            if needed.total <= allowed:
                return needed, spilled
        fitting = (allowed - needed.total) // needed.per_chunk + chunks
        fewer = f", or give --calib-chunks {fitting}" if fitting > 0 else ""
        raise UsageError(
            f"--memory: {size_text(allowed)} are allowed, but error feedback on {chunks} windows takes "
            f"{size_text(needed.total)}, of which the program itself has {size_text(needed.held)}; allow more{fewer}"
        )


def _directory(target: Path) -> Path:
    """Where a target's matrices are until it is written."""
    return target.with_name(f"{target.name}.gptq")


def _state(path: Path) -> list[int]:
    """What tells a file from itself after a change."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _kept(stores: Sequence[Store]) -> str:
    """What an interrupted run leaves to the next."""
    done, layers = sum(store.kept() for store in stores), sum(len(store.layers) for store in stores)
    if not done:
        return "interrupted before a layer was finished"
    return f"interrupted: {done} of {layers} layers have their codes; the same command goes on behind them"


def _check_space(stores: Sequence[Store], moments: int = 0) -> None:
    """Refuse before the work what would fill the disk: the matrices stand there twice until a file is whole, beside
    bytes of moments that are in files."""
    for directory in {store.directory.parent for store in stores}:
        here = [store for store in stores if store.directory.parent == directory]
        missing = [(store.missing_bytes(), store.plan.size) for store in here]
        needed = moments + sum(codes + size for codes, size in missing if codes)  # else the file may be there in part
        if needed > (free := shutil.disk_usage(directory).free):
            raise GgufMoeError(f"{directory}: needs {needed} bytes while codes are chosen, but only {free} are free")


def _base(plan: Plan) -> ModelSource:
    """The model as its source has it."""
    return planned_model(plan.directory, plan.file_type.name, plan.size, plan)


def _summary(store: Store, damping: float) -> str:
    notes = [note for layer in store.layers for note in store.done[layer]]
    loss, plain_loss, rows, fed_back = (
        sum(note[key] for note in notes) for key in ("loss", "plain_loss", "rows", "fed_back")
    )
    text = f"{store.plan.default_name}: error feedback in {100 * fed_back / rows:.1f} % of the rows of {len(notes)} "
    text += f"matrices, {100 * loss / (plain_loss or 1):.1f} % of the plain encoder's error"
    damped = [_matrix(note) for note in notes if note["damping"] > damping]
    more = f" and {len(damped) - LISTED} more" if len(damped) > LISTED else ""
    return text + (f"; more damping than {damping:g} in {', '.join(damped[:LISTED])}{more}" if damped else "")


def _matrix(note: dict[str, Any]) -> str:
    return note["tensor"] if note["expert"] is None else f"{note['tensor']} expert {note['expert']}"
