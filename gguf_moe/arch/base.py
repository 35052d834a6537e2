"""What describes a model family: data first, so that a new one is a file of tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import gguf

from gguf_moe.arch.rope import Rope
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
    explicit_head_size: bool  # the head size has keys of its own
    vocabulary: int
    context: int
    norm_epsilon: float
    rope: Rope = field(repr=False)
    experts: int = 0  # 0: a dense model
    experts_key: str = ""  # the field of config.json that counts them
    experts_used: int = 0
    named_scoring: bool = False  # config.json says that the router's scores are a softmax
    expert_feed_forward: int = 0  # rows of one expert's gate and up projections
    shared_experts: int = 0
    shared_feed_forward: int = 0  # rows of the shared experts' gate and up projections, together
    dense_layers: int = 0  # how many layers have no experts; they are the first
    notes: tuple[str, ...] = ()  # what llama.cpp will compute otherwise than the config asks

    def size(self, name: str) -> int:
        """A dimension by the name that templates use."""
        if name == "one":
            return 1
        if name == "query":
            return self.heads * self.head_size
        if name == "key":
            return self.kv_heads * self.head_size
        return getattr(self, name)


@dataclass(frozen=True)
class Template:
    """One kind of tensor: its name in the checkpoint and in the GGUF file, its shape.

    Names hold {layer} and, for stacked experts, {expert} in the source. `shape` is the source's, in names of
    `ModelFacts.size`. `rotary` names the head count whose rows are reordered from halves to neighbouring pairs.
    `part` says which layers have the tensor where the first ones are dense: every one, the "dense" or those of
    "experts". A tensor that is not `required` is in all its layers or in none.
    """

    source: str
    target: str
    shape: tuple[str, ...]
    rotary: str | None = None
    required: bool = True
    part: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether the target stacks one source an expert."""
        return "{expert}" in self.source

    def layers(self, facts: ModelFacts) -> range:
        """The layers that have such a tensor."""
        if self.part == "dense":
            return range(facts.dense_layers)
        return range(facts.dense_layers if self.part == "experts" else 0, facts.layers)


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
    facts: Callable[[Config, int | None], ModelFacts]  # of config.json and the asked number of experts a token
    templates: tuple[Template, ...]
    add_keys: Callable[[gguf.GGUFWriter, ModelFacts], None]  # those before general.file_type
    add_last_keys: Callable[[gguf.GGUFWriter, ModelFacts], None]  # those after it
    fused: tuple[Fused, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()  # other names of a source, old -> as in the templates
    ignored: tuple[str, ...] = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")  # no weights
    renormalized: bool = True  # llama.cpp scales the used experts' weights to a sum of 1
    needs_output: bool = False  # llama.cpp does not take the embedding for an absent output.weight
