"""What describes a model family: data first, so that a new one is a file of tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf

from gguf_moe.checkpoint import Config


@dataclass(frozen=True)
class ModelFacts:
    """What recipe, metadata and shape checks need to know of a model; all sizes are counts of elements."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    explicit_head_size: bool  # config.json names head_dim
    vocabulary: int
    context: int
    experts: int
    experts_used: int
    norm_epsilon: float
    rope_theta: float

    def size(self, name: str) -> int:
        """A dimension by the name that templates use."""
        if name == "query":
            return self.heads * self.head_size
        if name == "key":
            return self.kv_heads * self.head_size
        return getattr(self, name)


@dataclass(frozen=True)
class Template:
    """One kind of tensor: its name in the checkpoint and in the GGUF file, its part in the model, its shape.

    Names hold {layer} and, for stacked experts, {expert} in the source. `shape` is the source's, in names of
    `ModelFacts.size`. `rotary` names the head count whose rows are reordered from halves to neighbouring pairs.
    """

    source: str
    target: str
    role: str
    shape: tuple[str, ...]
    rotary: str | None = None
    required: bool = True

    @property
    def stacked(self) -> bool:
        """Whether the target stacks one source an expert."""
        return "{expert}" in self.source


@dataclass(frozen=True)
class Fused:
    """A source tensor [experts, sum of rows, columns] that holds the matrices of all experts, `parts` one below
    the other in each: the sources of the templates it stands for, in order."""

    source: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A model family: which checkpoints it reads and how they map to GGUF."""

    name: str  # general.architecture
    hf_names: tuple[str, ...]  # config.json architectures
    facts: Callable[[Config], ModelFacts]
    templates: tuple[Template, ...]
    fused: tuple[Fused, ...]
    aliases: tuple[tuple[str, str], ...]  # other names of a source, old -> as in the templates
    ignored: tuple[str, ...]  # endings of names that carry no weight
    add_keys: Callable[[gguf.GGUFWriter, ModelFacts], None]
