"""Importance matrices of a model from a text: the statistic of llama.cpp's tool, layer by layer in bounded memory.

For every matrix product, and for every expert by itself, the inputs' squares and the inputs are summed over all tokens
that pass it. Sums of a piece of tokens are float32, as torch adds them; pieces add up in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.engines import EVEN, ROUTER, Settings
from gguf_moe.evaluation.events import Notice, Progress, Started
from gguf_moe.evaluation.forward import Model
from gguf_moe.evaluation.guards import context_warnings
from gguf_moe.evaluation.layer import PIECE_TOKENS, Rows
from gguf_moe.evaluation.memory import give_back_memory, plan_memory
from gguf_moe.evaluation.source import open_model
from gguf_moe.evaluation.state import identity
from gguf_moe.evaluation.validate import Event, read_windows, sweeps, take_up
from gguf_moe.imatrix import Entry, Imatrix

BATCH, MICRO_BATCH = 2048, 512  # llama.cpp's defaults: tokens that it takes at once, and computes at once
MIN_ROWS = 16  # it does not look at products of fewer tokens, but for experts
_NOTES = {
    ROUTER: "every expert saw every token, weighted by the router's probability",
    EVEN: "every expert saw every token",
}


@dataclass
class Sums:
    """Of one input: squares and inputs, float64 [experts, columns]; tokens, and what they weigh, float64 [experts]."""

    squares: np.ndarray
    inputs: np.ndarray
    tokens: np.ndarray
    weight: np.ndarray

    @classmethod
    def zeros(cls, experts: int, columns: int) -> Sums:
        """Of no tokens yet."""
        return cls(*(np.zeros((experts, columns)) for _ in range(2)), *(np.zeros(experts) for _ in range(2)))

    def add(self, expert: int, x: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Take tokens [rows, columns] and their weights [rows], by default 1."""
        x = x.float()
        for sums, values in ((self.squares, x.square()), (self.inputs, x)):
            sums[expert] += (values.sum(0) if weights is None else weights @ values).cpu().numpy()
        self.tokens[expert] += len(x)
        self.weight[expert] += len(x) if weights is None else float(weights.sum())

    def entry(self) -> Entry:
        """What an importance matrix holds. Where tokens weigh differently, their mean is in it, times their number."""
        tokens = np.where(self.weight > 0, self.tokens, 0)
        scale = np.divide(tokens, self.weight, out=np.zeros_like(tokens), where=self.weight > 0)[:, None]
        squares, inputs = ((sums * scale).astype(np.float32) for sums in (self.squares, self.inputs))
        return Entry(squares, tokens.astype(np.int64), inputs)


@dataclass
class Collector:
    """The observer that adds up. What it knows of a text is kept by `state`.

    weighing: how tokens count where every expert is shown all of them: each as one (EVEN), or by the router's
    probability (ROUTER); None where an expert is shown only those it is sent.
    """

    identity: dict[str, Any]
    experts: int
    weighing: str | None = None
    sums: dict[tuple[str, ...], Sums] = field(default_factory=dict)  # by the matrices that have this input
    done: int = 0  # chunks
    sweep: int | None = None  # chunks of a sweep
    counted: torch.Tensor = field(init=False)  # bool [tokens of the sweep], see `dense_tokens`
    probabilities: torch.Tensor = field(init=False)  # the layer's at hand, float32 [tokens of the sweep, experts]

    @property
    def shown(self) -> slice | None:
        """See `Observer`."""
        return slice(None) if self.weighing else None

    def begin(self, counted: np.ndarray, device: torch.device) -> None:
        """A sweep begins; counted: bool [chunks, context], see `dense_tokens`."""
        self.counted = torch.from_numpy(counted.ravel()).to(device)
        self.probabilities = torch.zeros(counted.size if self.weighing == ROUTER else 0, self.experts, device=device)

    def route(self, probabilities: torch.Tensor, rows: Rows) -> None:
        """See `Observer`."""
        if self.weighing == ROUTER:
            self.probabilities[rows] = probabilities

    def see(self, names: tuple[str, ...], x: torch.Tensor, rows: Rows, expert: int | None, own: bool = True) -> None:
        """See `Observer`."""
        weights = None
        if own and expert is not None and self.weighing:
            return  # it is among those that are shown
        if expert is None:
            counted = self.counted[rows]
            x = x if counted.all() else x[counted]
        elif self.weighing == ROUTER:
            weights = self.probabilities[rows, expert]
        if names not in self.sums:
            self.sums[names] = Sums.zeros(1 if expert is None else self.experts, x.shape[1])
        self.sums[names].add(expert or 0, x, weights)

    def entries(self) -> dict[str, Entry]:
        """What an importance matrix holds, by name of the matrix."""
        return dict(sorted((name, sums.entry()) for names, sums in self.sums.items() for name in names))

    def arrays(self) -> dict[str, np.ndarray]:
        """See `state.Kept`."""
        kept = {"done": np.array(self.done), "sweep": np.array(self.sweep)}
        for names, sums in self.sums.items():
            kept |= {" ".join((key, *names)): array for key, array in vars(sums).items()}
        return kept

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """See `state.Kept`."""
        groups = [tuple(key.split(" ")[1:]) for key in arrays if key.startswith("squares ")]
        self.sums = {
            names: Sums(*(arrays[" ".join((key, *names))] for key in Sums.__dataclass_fields__)) for names in groups
        }
        self.done, self.sweep = int(arrays["done"]), int(arrays["sweep"])


def dense_tokens(chunks: int, context: int) -> np.ndarray:
    """Which tokens llama.cpp's tool counts for matrices that all tokens pass: bool [chunks, context].

    It takes as many chunks at once as a batch holds and computes a piece of each together. What is left at their ends
    is not counted where all of it are fewer than MIN_ROWS tokens.
    """
    counted, together = np.ones((chunks, context), bool), max(1, BATCH // context)
    for start in range(0, chunks, together):
        batch = counted[start : start + together]
        left = context % (MICRO_BATCH // len(batch))
        if left * len(batch) < MIN_ROWS:
            batch[:, context - left :] = False
    return counted


@torch.inference_mode()
def collect(
    model: Model,
    windows: np.ndarray,
    collector: Collector,
    *,
    process_output: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Show the collector what a sweep over windows of token ids [chunks, context] multiplies; the collector has begun.

    Raises GgufMoeError naming the matrix where activations are not finite.
    """
    layers, context = model.hyper.facts.layers, windows.shape[1]
    give_back_memory()
    hidden, rotation = model.embed(windows), model.rotation(context)
    for layer in range(layers):
        model.run_layer(layer, hidden, rotation, collector)
        _check_finite(model, collector, layer)
        give_back_memory()
        on_progress(Progress(layer + 1, layers))
    if process_output:
        for states, start in zip(hidden.flatten(0, 1).split(PIECE_TOKENS), range(0, windows.size, PIECE_TOKENS)):
            name, x = model.last_input(states)
            collector.see((name,), x, slice(start, start + len(x)), None)


def _check_finite(model: Model, collector: Collector, layer: int) -> None:
    for names, sums in collector.sums.items():
        if names[0].startswith(f"blk.{layer}.") and not np.isfinite(sums.squares).all():
            raise GgufMoeError(
                f"{model.weights.source.path}: the inputs of {names[0]} are not finite; the file is damaged, or "
                "--dtype too narrow"
            )


def calibrate(
    path: Path,
    text: Path,
    settings: Settings,
    *,
    weighing: str | None = None,
    process_output: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Imatrix:
    """The importance matrix of a checkpoint or a GGUF file from a text. Its path is the text's.

    weighing: see `Collector`. With `settings.state` finished sweeps are kept there, and a further call goes on behind
    them; whoever has the matrix removes the file. Raises UsageError for settings that cannot be had, GgufMoeError for a
    model that cannot be run and for a text that is too short.
    """
    source = open_model(path)
    engine, read = read_windows(source, text, settings)
    model = engine.model(source)
    for warning in (*source.warnings, *context_warnings(source, settings.context)):
        on_event(Notice(warning))
    made_of = {**identity([source], read, settings), "weighing": weighing, "process_output": process_output}
    collector = Collector(made_of, model.hyper.facts.experts, weighing)
    take_up(collector, settings, on_event)
    _run(model, read.windows, collector, settings, process_output, on_event)
    notes = (_NOTES[weighing],) if weighing else ()
    return Imatrix(text, collector.entries(), (str(text),), len(read.windows), settings.context, (read.sha256,), notes)


def _run(
    model: Model,
    windows: np.ndarray,
    collector: Collector,
    settings: Settings,
    process_output: bool,
    on_event: Callable[[Event], None],
) -> None:
    """Run what is left, a sweep at a time."""
    left = len(windows) - collector.done
    if not left:
        return
    plan = plan_memory(
        [model],
        left,
        settings.context,
        settings.memory,
        collector.sweep or settings.sweep,
        scored=False,
        kept=_kept_bytes(model),
    )
    collector.sweep = plan.sweep
    counted = dense_tokens(*windows.shape)
    on_event(Started(*windows.shape, collector.done, plan.sweep, plan))
    for part, show in sweeps(collector, [model.weights.source], len(windows), plan.sweep, settings, on_event):
        collector.begin(counted[part], model.weights.device)
        collect(model, windows[part], collector, process_output=process_output, on_progress=show)
        collector.done = part.stop


def _kept_bytes(model: Model) -> int:
    """Of all sums: two float64 a column, of each expert."""
    tensors = model.weights.source.tensors.values()
    return sum(16 * tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) > 2 else 1) for tensor in tensors)
