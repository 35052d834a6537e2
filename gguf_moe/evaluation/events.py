"""What an engine tells while it runs: our forward pass or llama.cpp's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a sweep is, over all models, in steps of the engine's own."""

    done: int
    total: int


@dataclass(frozen=True)
class Scored:
    """The logits of a chunk's scored positions, float32 [positions, vocabulary], beside the base's. Arrays of NumPy, or
    tensors that become such."""

    model: int  # 0: the base itself
    chunk: int  # its number in the sweep
    base: Any
    logits: Any
    targets: Any  # the ids that the positions should predict: [positions]


@dataclass(frozen=True)
class Routing:
    """Where a layer sent its tokens: [..., used experts], the likeliest first, among equals the lower number."""

    experts: Any  # int64
    weights: Any  # float32, by which the experts' outputs are summed


@dataclass(frozen=True)
class Routed:
    """A layer's routing of all chunks of the sweep, [chunks, context, used experts], beside the base's."""

    model: int  # 0: the base itself
    layer: int
    base: Routing
    routing: Routing
