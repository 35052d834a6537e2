"""Base and quantized models through the same chunks in lock step, layer by layer: no logits file, no model in memory.

A sweep holds the hidden states of all its chunks for every model; each layer's matrices are read once a model. After
the last layer logits exist for a few chunks at a time, of the base and of one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.events import Progress, Routed, Routing, Scored
from gguf_moe.evaluation.forward import Model
from gguf_moe.evaluation.memory import give_back_memory


@torch.inference_mode()
def sweep(
    models: Sequence[Model],
    windows: np.ndarray,
    group: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[Routed | Scored]:
    """Run the base, which is the first, and other models of its shape through windows of token ids [chunks, context].

    Positions from the middle of a window on are scored, as llama.cpp does. group: chunks whose logits exist together.
    The events' tensors are in main memory. Raises GgufMoeError naming layer and file where activations are not finite.
    """
    chunks, context = windows.shape
    layers, starts, done = models[0].hyper.facts.layers, range(0, chunks, group), 0
    total = len(models) * (layers + len(starts))
    give_back_memory()
    hidden = [model.embed(windows) for model in models]
    rotations = [model.rotation(context) for model in models]
    for layer in range(layers):
        base = None
        for number, model in enumerate(models):
            routing = model.run_layer(layer, hidden[number], rotations[number])
            _check_finite(hidden[number], model, f"layer {layer}")
            if routing:
                routing = Routing(routing.experts.cpu(), routing.weights.cpu())
                base = base or routing
                yield Routed(number, layer, base, routing)
            give_back_memory()
            on_progress(Progress(done := done + 1, total))
    first = context // 2
    for start in starts:
        targets = torch.from_numpy(windows[start : start + group, first + 1 :].astype(np.int64))
        base_logits = None
        for number, model in enumerate(models):
            states = hidden[number][start : start + group, first:-1]  # [chunks, positions, hidden]
            logits = model.logits(states.flatten(0, 1)).unflatten(0, states.shape[:2])
            _check_finite(logits, model, "output.weight")
            base_logits = logits if base_logits is None else base_logits
            for i, ids in enumerate(targets):
                yield Scored(number, start + i, base_logits[i].cpu(), logits[i].cpu(), ids)
            give_back_memory()
            on_progress(Progress(done := done + 1, total))


def _check_finite(values: torch.Tensor, model: Model, where: str) -> None:
    """Refuse infinity and NaN in values [chunks, ...], which spread to the sum of a chunk."""
    bad = (~values.flatten(1).sum(1, dtype=torch.float32).isfinite()).nonzero()
    if len(bad):
        raise GgufMoeError(
            f"{model.weights.source.path}: {where} gives activations that are not finite, first in chunk "
            f"{int(bad[0])} of the sweep; the file is damaged, or --dtype too narrow"
        )
