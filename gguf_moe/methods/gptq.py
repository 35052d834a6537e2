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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import quant
from gguf_moe import __version__
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.engines import Settings as EngineSettings
from gguf_moe.evaluation.events import MemoryPlan, Notice, Started
from gguf_moe.evaluation.forward import Model
from gguf_moe.evaluation.guards import CALIBRATION
from gguf_moe.evaluation.layer import PIECE_TOKENS, Rows
from gguf_moe.evaluation.memory import give_back_memory, plan_memory
from gguf_moe.evaluation.source import ModelSource, planned_model
from gguf_moe.evaluation.state import source_identity
from gguf_moe.evaluation.validate import read_windows
from gguf_moe.methods import KEY, Chosen, Event, Settings, Summary
from gguf_moe.methods.feedback import best_rows, feed_back, plain
from gguf_moe.methods.moments import PANEL, PRECISE, Factor, Moments
from gguf_moe.methods.said import BASES, CALIBRATED_ON, CHUNKS, DAMPING
from gguf_moe.methods.store import LayerFile, Store
from gguf_moe.plan import Plan

CONTEXT = 512  # tokens of a window
SHOWN = 2048  # tokens of the layer that every expert is shown beside its own
PRIOR = 0.125  # of its columns: as many tokens do the shown ones count for together
COPIES = 7  # of a matrix in float32: itself, three with feedback, what plain codes decode to, its difference, a product
BAND_WEIGHTS = 1 << 26  # of a matrix that are quantized at once: rows are independent


class Method:
    """See `methods.Method`."""

    def __init__(self, settings: Settings) -> None:
        if settings.text is None:
            raise UsageError("--method gptq needs --calib, a text")
        self.settings, self.text = settings, settings.text

    def keys(self) -> dict[str, gguf.GGUFValue]:
        kinds, settings = gguf.GGUFValueType, self.settings
        try:
            digest = hashlib.sha256(self.text.read_bytes()).hexdigest()
        except OSError as error:
            raise GgufMoeError(f"{self.text}: not readable: {error.strerror or error}") from None
        return {
            KEY: gguf.GGUFValue("gptq", kinds.STRING),
            CALIBRATION: gguf.GGUFValue([digest], kinds.ARRAY, kinds.STRING),
            CHUNKS: gguf.GGUFValue(settings.chunks or 0, kinds.UINT32),
            DAMPING: gguf.GGUFValue(settings.damping, kinds.FLOAT32),
            CALIBRATED_ON: gguf.GGUFValue(BASES[settings.original], kinds.STRING),
        }

    @contextmanager
    def prepared(
        self, plans: Sequence[Plan], targets: Sequence[Path], on_event: Callable[[Event], None]
    ) -> Iterator[list[Plan]]:
        with ExitStack() as locks:
            stores = [self._store(plan, target, locks, on_event) for plan, target in zip(plans, targets)]
            _check_space(stores)
            total, done = sum(len(t.mapped.slabs) for store in stores for t in store.tensors.values()), 0

            def count(tensor: str) -> None:
                nonlocal done
                on_event(Chosen(tensor, done := done + 1, total))

            for group in [stores] if self.settings.original else [[store] for store in stores]:
                self._run(group, count, on_event)
            for store in stores:
                on_event(Summary(_summary(store, self.settings.damping)))
            yield [store.planned(_layers(store)) for store in stores]
            for store in stores:
                store.remove()

    def _store(self, plan: Plan, target: Path, locks: ExitStack, on_event: Callable[[Event], None]) -> Store:
        settings = self.settings
        headers = hashlib.sha256(b"".join(file.header for file in plan.files)).hexdigest()
        identity = {
            "gguf-moe": __version__,
            "source": source_identity(_base(plan)),
            "recipe": headers,  # with the text and the method's settings, which stand among the keys
            "device": settings.device,
        }
        store = Store(target.with_name(f"{target.name}.gptq"), plan, identity)
        if different := store.open(locks):
            on_event(Notice(f"{store.directory}: begun anew, the earlier run had another {different}"))
        return store

    def _run(self, stores: Sequence[Store], count: Callable[[str], None], on_event: Callable[[Event], None]) -> None:
        """Choose the codes of files that are calibrated on the same hidden states."""
        for store in stores:
            for layer in filter(store.is_done, _layers(store)):
                for note in store.report(layer):
                    count(note["tensor"])
        if all(store.is_done(layer) for store in stores for layer in _layers(store)):
            return
        base, settings = _base(stores[0].plan), self.settings
        asked = EngineSettings(CONTEXT, settings.chunks, device=settings.device, memory=settings.memory)
        engine, read = read_windows(base, self.text, asked)
        model = engine.model(base)
        now = model if settings.original else engine.model(replace(base, tensors=dict(base.tensors)))
        memory, spilled = self._memory(model, stores, len(read.windows))
        on_event(Started(*read.windows.shape, 0, memory.sweep, memory))
        chooser = _Chooser(model, stores, settings.damping, spilled, count)
        _walk(model, now, read.windows, chooser)

    def _memory(self, model: Model, stores: Sequence[Store], chunks: int) -> tuple[MemoryPlan, bool]:
        """What it takes, and whether large moments have to lie in files. Raises UsageError where that is too much."""
        needed = None
        for spilled in (False, True):
            kept = max(_bytes_of(store, spilled) for store in stores)
            models = [model] * (1 if self.settings.original else 2)
            needed = plan_memory(models, chunks, CONTEXT, self.settings.memory, scored=False, kept=kept)
            if needed.sweep == chunks:
                return needed, spilled
        raise UsageError(
            f"--memory: hidden states of {needed.sweep} of {chunks} windows fit, and error feedback needs all; "
            "allow more, or give --calib-chunks"
        )


def _check_space(stores: Sequence[Store]) -> None:
    """Refuse before the work what would fill the disk: the matrices stand there twice until a file is whole."""
    for directory in {store.directory.parent for store in stores}:
        here = [store for store in stores if store.directory.parent == directory]
        needed = sum(store.missing_bytes() + store.plan.size for store in here)
        if needed > (free := shutil.disk_usage(directory).free):
            raise GgufMoeError(f"{directory}: needs {needed} bytes while codes are chosen, but only {free} are free")


def _base(plan: Plan) -> ModelSource:
    """The model as its source has it."""
    return planned_model(plan.directory, plan.file_type.name, plan.size, plan)


def _layers(store: Store) -> list[int | None]:
    """All layers with matrices to choose codes for, and what is outside of them."""
    layers = {tensor.mapped.layer for tensor in store.tensors.values()}
    return sorted(layers, key=lambda layer: (layer is None, layer or 0))


def _walk(model: Model, now: Model, windows: np.ndarray, chooser: _Chooser) -> None:
    """Run the layers as they were, choosing codes, and as they are `now`, whose tensors follow."""
    with torch.inference_mode():
        give_back_memory()
        hidden, rotation = now.embed(windows), now.rotation(windows.shape[1])
        chooser.shown = slice(0, None, max(1, windows.size // SHOWN))
        for layer in range(model.hyper.facts.layers):
            done = chooser.is_done(layer)
            if not done:
                states = hidden if now is model else hidden.clone()
                chooser.begin(layer, windows.size)
                model.run_layer(layer, states, rotation, chooser)
                chooser.finish()
                del states
            if now is not model:
                now.weights.source.tensors.update({t.name: t for t in chooser.stores[0].mapped(layer)})
            if done or now is not model:
                now.run_layer(layer, hidden, rotation)
            if not hidden.isfinite().all():
                raise GgufMoeError(f"{model.weights.source.path}: layer {layer} gives activations that are not finite")
            give_back_memory()
        if not chooser.is_done(None):
            chooser.begin(None, windows.size)
            for states in hidden.flatten(0, 1).split(PIECE_TOKENS):
                name, x = model.last_input(states)
                chooser.see((name,), x, slice(None), None, True)
            chooser.finish()


@dataclass
class _Chooser:
    """The observer that quantizes: what an owner of matrices has seen is used when another's turn comes."""

    model: Model
    stores: Sequence[Store]
    damping: float
    spilled: bool
    count: Callable[[str], None]
    shown: slice | None = None
    owner: Any = None
    pending: dict[tuple[tuple[str, ...], int | None], Moments] = field(default_factory=dict)

    def is_done(self, layer: int | None) -> bool:
        """Whether all files have a layer."""
        return all(store.is_done(layer) for store in self.stores)

    def begin(self, layer: int | None, tokens: int) -> None:
        """A layer begins that not all files have."""
        self.files = {id(store): store.begin(layer) for store in self.stores if not store.is_done(layer)}
        self.shown_tokens = len(range(tokens)[self.shown])

    def finish(self) -> None:
        """The layer has run."""
        self._choose_pending()
        for file in self.files.values():
            file.finish()

    def route(self, probabilities: torch.Tensor, rows: Rows) -> None:
        """See `Observer`."""

    def see(self, names: tuple[str, ...], x: torch.Tensor, rows: Rows, expert: int | None, own: bool) -> None:
        """See `Observer`."""
        wanted = tuple(name for name in names if any(name in store.tensors for store in self.stores))
        if not wanted:
            return
        if (owner := (_owner(names[0]), expert)) != self.owner:
            self._choose_pending()
            self.owner = owner
        if (wanted, expert) not in self.pending:
            columns = x.shape[1]
            path = (
                self.stores[0].directory / f"{len(self.pending)}.moments" if self.spilled and columns > PANEL else None
            )
            self.pending[wanted, expert] = Moments(columns, x.device, path)
        weight = 1.0 if own else PRIOR * x.shape[1] / self.shown_tokens
        self.pending[wanted, expert].add(x, weight)

    def _choose_pending(self) -> None:
        for (names, expert), moments in list(self.pending.items()):
            if not moments.square.values.diagonal().isfinite().all():
                raise GgufMoeError(f"{self.model.weights.source.path}: the inputs of {names[0]} are not finite")
            factor = moments.factor(self.damping)
            for name in names:
                for store in self.stores:
                    if id(store) in self.files and name in store.tensors:
                        self._choose(store, self.files[id(store)], name, expert, factor)
            del self.pending[names, expert]
            give_back_memory()

    def _choose(self, store: Store, file: LayerFile, name: str, expert: int | None, factor: Factor) -> None:
        """Quantize a matrix: of each row what loses least, with feedback or by the plain encoder."""
        tensor = store.tensors[name]
        slab, kind = tensor.mapped.slabs[expert or 0], tensor.info.type
        ways: list[np.ndarray | None] = [way for way in (slab.importance, *factor.importances()) if way is not None]
        ways = [way for way in ways if way.any()][:2]  # all zero where no token came
        blocks, losses, fed_back = [], np.zeros(2), 0
        band = max(1, BAND_WEIGHTS // slab.source.columns)
        for start in range(0, slab.rows, band):
            rows = range(start, min(start + band, slab.rows))
            weights = self.model.weights.matrix(name, expert, rows=rows, dtype=torch.float32)
            if not weights.isfinite().all():
                raise GgufMoeError(f"{slab.source.file}: tensor {slab.source.name} holds weights that are not finite")
            usual = plain(weights, factor, kind, (ways or [None])[0])
            if quant.first_nonfinite_scale(usual[0], kind) is not None:
                raise GgufMoeError(f"{slab.source.file}: tensor {slab.source.name} has weights too large for {kind}")
            candidates = [feed_back(weights, factor, kind, [*ways, None]), usual]
            data, chosen = best_rows(candidates, kind)
            blocks.append(data)
            losses += np.stack([loss for _, loss in candidates])[chosen, np.arange(len(chosen))].sum(), usual[1].sum()
            fed_back += int((chosen < len(candidates) - 1).sum())
        note = {"loss": losses[0], "plain_loss": losses[1], "rows": slab.rows, "fed_back": fed_back}
        file.write(name, expert, np.concatenate(blocks), {**note, "damping": factor.damping})
        self.count(name)


def _owner(name: str) -> str:
    """What holds a matrix: matrices of one owner see their tokens in turn."""
    return next((part for part in ("attn_", "_shexp", "_exps", "gate_inp") if part in name), "")


def _bytes_of(store: Store, spilled: bool) -> int:
    """Bytes that moments, factor and a matrix take at once, of the largest owner."""
    most = 0
    owners: dict[Any, set[int]] = {}
    for name, tensor in store.tensors.items():
        owners.setdefault((tensor.mapped.layer, _owner(name)), set()).add(tensor.mapped.shape[-1])
    for columns in owners.values():
        squares = sum(4 * n * n for n in columns if not (spilled and n > PANEL))
        factors = max(8 * n * n if n <= PRECISE and not (spilled and n > PANEL) else 24 * n * PANEL for n in columns)
        most = max(most, squares + factors)
    weights = max(min(t.mapped.slabs[0].rows * t.mapped.shape[-1], BAND_WEIGHTS) for t in store.tensors.values())
    return most + COPIES * 4 * weights


def _summary(store: Store, damping: float) -> str:
    notes = [note for layer in _layers(store) for note in store.report(layer)]
    loss, plain_loss, rows, fed_back = (
        sum(note[key] for note in notes) for key in ("loss", "plain_loss", "rows", "fed_back")
    )
    text = f"{store.plan.default_name}: error feedback in {100 * fed_back / rows:.1f} % of the rows of {len(notes)} "
    text += f"matrices, {100 * loss / (plain_loss or 1):.1f} % of the plain encoder's error"
    damped = [f"{note['tensor']} {note['expert'] or 0}" for note in notes if note["damping"] > damping]
    return text + (f"; more damping than {damping:g} in {', '.join(damped)}" if damped else "")
