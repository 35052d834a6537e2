"""Models run as their users run them, for the tests of this directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gguf_moe.evaluation.events import Routing
from gguf_moe.evaluation.forward import Model, load_model
from gguf_moe.evaluation.layer import Observer
from gguf_moe.evaluation.source import open_model


def model(path: Path, **options: object) -> Model:
    return load_model(open_model(path), **options)


@torch.inference_mode()
def run(model: Model, ids: Sequence[int], observe: Observer | None = None) -> tuple[np.ndarray, list[Routing | None]]:
    """Logits [tokens, vocabulary] of one sequence, and the routing of each layer."""
    hidden, rotation = model.embed(np.array([ids])), model.rotation(len(ids))
    routings = [model.run_layer(n, hidden, rotation, observe) for n in range(model.hyper.facts.layers)]
    return model.logits(hidden[0]).numpy(), routings


def windows(chunks: int, context: int) -> np.ndarray:
    """Token ids [chunks, context] of the bundled merge's vocabulary, always the same."""
    return np.random.default_rng(6).integers(3, 4096, (chunks, context))
