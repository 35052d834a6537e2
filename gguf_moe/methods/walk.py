"""A walk through the layers of a model, on which each matrix gets its codes as soon as its tokens have passed.

A layer runs as it was, on hidden states that came through the layers before it as they have been quantized; then it
runs as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import quant
from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.forward import Model
from gguf_moe.evaluation.layer import PIECE_TOKENS, Rows
from gguf_moe.evaluation.memory import give_back_memory
from gguf_moe.methods.feedback import best_rows, feed_back, group_bytes, plain
from gguf_moe.methods.moments import PANEL, PRECISE, Factor, Moments
from gguf_moe.methods.store import LayerFile, Store

SHOWN = 2048  # tokens of the layer that every expert is shown beside its own
PRIOR = 0.125  # of its columns: as many tokens do the shown ones count for together
COPIES = (
    7  # of a matrix in float32: itself, with feedback, what plain codes decode to, its difference, those in float64
)
WAYS = 6  # to weigh columns
BAND_WEIGHTS = 1 << 26  # of a matrix that are quantized at once: rows are independent


def shown(tokens: int) -> slice:
    """Those of a text's tokens that every expert is shown: in an odd stride, or they would stand at few places of the
    windows, and of many windows all at the first."""
    return slice(0, None, max(1, tokens // SHOWN) | 1)


def walk(model: Model, now: Model, windows: np.ndarray, chooser: Chooser) -> None:
    """Run the layers as they were, choosing codes, and as they are `now`, whose tensors follow."""
    with torch.inference_mode():
        give_back_memory()
        hidden, rotation = now.embed(windows), now.rotation(windows.shape[1])
        chooser.shown = shown(windows.size)
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
class Chooser:
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
            path = self.stores[0].directory / f"{len(self.pending)}.moments"
            in_file = self.spilled and columns > PRECISE
            self.pending[wanted, expert] = Moments(columns, x.device, path if in_file else None)
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
        ways = _weighings(slab.importance, factor)
        losses, fed_back = np.zeros(2), 0
        band = max(1, BAND_WEIGHTS // slab.source.columns)
        for start in range(0, slab.rows, band):
            rows = range(start, min(start + band, slab.rows))
            weights = self.model.weights.matrix(name, expert, rows=rows, dtype=torch.float32)
            where = f"{slab.source.file}: tensor {slab.source.name}"
            if not weights.isfinite().all():
                raise GgufMoeError(f"{where} holds weights that are not finite; mend the checkpoint")
            usual = plain(weights, factor, kind, slab.importance)
            if quant.first_nonfinite_scale(usual[0], kind) is not None:
                raise GgufMoeError(f"{where} has weights too large for {kind}; choose BF16 or F32 for it")
            candidates = [feed_back(weights, factor, kind, ways), usual]
            data, chosen = best_rows(candidates, kind)
            file.write(name, expert, start, data)
            losses += np.stack([loss for _, loss in candidates])[chosen, np.arange(len(chosen))].sum(), usual[1].sum()
            fed_back += int((chosen == 0).sum())
        note = {"loss": losses[0], "plain_loss": losses[1], "rows": slab.rows, "fed_back": fed_back}
        file.note(name, expert, {**note, "damping": factor.damping})
        self.count(name if expert is None else f"{name} expert {expert}")


def _weighings(importance: np.ndarray | None, factor: Factor) -> list[np.ndarray | None]:
    """The ways to weigh columns where scales are found: by an importance matrix's row, if there is one, and by what the
    factor knows; by their square roots; all alike; and as without importance."""
    known = [way for way in (importance, *factor.importances()) if way is not None][:2]
    return [*known, *map(np.sqrt, known), np.ones_like(known[0]), None]


def _owner(name: str) -> str:
    """What holds a matrix: matrices of one owner see their tokens in turn."""
    return next((part for part in ("attn_", "_shexp", "_exps", "gate_inp") if part in name), "")


def _inputs(stores: Sequence[Store]) -> list[set[tuple[int, str]]]:
    """Columns of the inputs that are pending together, by owner; those of equal width told apart."""
    owners: dict[Any, set[tuple[int, str]]] = {}
    for store in stores:
        for name, tensor in store.tensors.items():
            own = next((part for part in ("attn_output", "ffn_down", "gate_inp") if part in name), "")
            owners.setdefault((tensor.mapped.layer, _owner(name)), set()).add((tensor.mapped.shape[-1], own))
    return list(owners.values())


def squares(stores: Sequence[Store], *, in_files: bool) -> list[int]:
    """Bytes of the moments that exist together, by owner: of those that lie in files where any do, or of the others."""
    return [sum(4 * n * n for n, _ in inputs if (n > PRECISE) == in_files) for inputs in _inputs(stores)]


def working_bytes(stores: Sequence[Store], spilled: bool, device: torch.device) -> int:
    """Bytes that moments, a factor and the matrix at hand take at once, of the largest owner."""
    tensors = [tensor.mapped for store in stores for tensor in store.tensors.values()]
    sizes = [(min(t.slabs[0].rows, BAND_WEIGHTS // t.shape[-1]), t.shape[-1]) for t in tensors]
    weights = max(COPIES * 4 * rows * columns + group_bytes(rows, WAYS, device) for rows, columns in sizes)
    small, large = (squares(stores, in_files=in_files) for in_files in (False, True))
    return max(
        part + (0 if spilled else rest) + max(_choosing_bytes(n, spilled and n > PRECISE, weights) for n, _ in inputs)
        for part, rest, inputs in zip(small, large, _inputs(stores))
    )


def _choosing_bytes(n: int, in_file: bool, weights: int) -> int:
    """Bytes beside moments of n columns: their factor, if it is a matrix of its own, with what is larger, the panels
    while it is made or those while it is used and copies of weights. What is mapped of a file counts as it is read."""
    precise = n <= PRECISE
    panel = (8 if precise else 4) * n * min(n, PANEL)
    own = 8 * n * n if precise else 0
    return own + max((10 if in_file else 6) * panel, 2 * panel + weights)
