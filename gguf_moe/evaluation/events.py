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


@dataclass(frozen=True)
class MemoryPlan:
    """What evaluation holds at once, in bytes, and how the chunks are shared out. Upper bounds."""

    held: int  # by the process already: Python, torch and what the caller has; 0 on a device with memory of its own
    matrices: int  # of the largest group that is in memory together
    between: int  # activations of the tokens that pass them at once, and the libraries' buffers
    per_chunk: int  # hidden states of all models, one layer's input and its routing
    logits: int  # of `group` chunks, base and one model, with what scoring makes of them
    group: int  # chunks whose logits exist together
    sweep: int  # chunks of a sweep

    @property
    def total(self) -> int:
        """The peak."""
        return self.held + max(self.matrices + self.between, self.logits) + self.sweep * self.per_chunk


@dataclass(frozen=True)
class Started:
    """All is checked and the work begins."""

    chunks: int
    context: int  # tokens of a chunk
    done: int  # chunks that an earlier run has finished
    sweep: int  # chunks of a sweep
    memory: MemoryPlan | None  # None where the engine does not tell


@dataclass(frozen=True)
class Notice:
    """A warning: one line."""

    text: str
