"""How much memory a sweep takes, before it starts, and so how many chunks it can take at once."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import psutil

from gguf_moe.arch import ModelFacts
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.forward import Model, panel_rows
from gguf_moe.evaluation.layer import PIECE_TOKENS, PROJECTIONS, mlp_kinds
from gguf_moe.evaluation.source import PIECE_WEIGHTS

MAX_GROUP = 8  # chunks whose logits exist together: the output matrix is decoded once for all of them
SCORING_COPIES = 6  # arrays of one chunk's logits that scoring may make
LARGE_BLOCK = 4 << 20  # bytes; blocks of that size come from the system and go back to it
LIBRARIES = 64 << 20  # what torch takes for itself when it starts to compute, and the allocator does not give back
LOGIT_COPIES = 3  # of a group: the base's, a model's, and those of the model before, which a caller may still have
FLOAT = 4
_M_MMAP_THRESHOLD = -3  # of malloc.h
_WIDTHS = ("heads", "kv_heads", "head_size", "feed_forward", "expert_feed_forward", "shared_feed_forward")


@dataclass(frozen=True)
class MemoryPlan:
    """What evaluation holds at once, in bytes, and how the chunks are shared out. Upper bounds."""

    held: int  # by the process already: Python, torch and what the caller has; 0 on a device with memory of its own
    matrices: int  # of the largest group that is in memory together
    between: int  # activations of the tokens that pass them at once, and the libraries' buffers
    per_chunk: int  # hidden states of all models, one layer's input and its routing
    logits: int  # of `group` chunks, base and one model, with what scoring makes of them
    group: int  # chunks whose logits exist together
    sweeps: tuple[range, ...]  # the chunks of each sweep

    @property
    def total(self) -> int:
        """The peak."""
        return self.held + max(self.matrices + self.between, self.logits) + max(map(len, self.sweeps)) * self.per_chunk


def plan_memory(models: Sequence[Model], chunks: int, context: int, memory: int) -> MemoryPlan:
    """Share `chunks` of `context` tokens out to as few sweeps of all models as `memory` bytes allow.

    Raises GgufMoeError when the models are not alike, UsageError when the bytes do not allow one chunk at a time.
    """
    check_alike(models)
    facts, weights = models[0].hyper.facts, models[0].weights
    held = psutil.Process().memory_info().rss if weights.device.type == "cpu" else 0
    itemsize = weights.dtype.itemsize
    matrices = _most_weights(models[0]) * itemsize
    between = _between(facts, context) + LIBRARIES
    per_chunk = context * ((len(models) + 1) * facts.hidden * itemsize + 25 * facts.experts_used + 32)
    one_logits = (context - context // 2) * facts.vocabulary * FLOAT
    fixed = SCORING_COPIES * one_logits + panel_rows(models[0].hyper) * facts.hidden * itemsize + LIBRARIES
    least = held + max(matrices + between, fixed + LOGIT_COPIES * one_logits)
    at_once = (memory - least) // per_chunk
    if at_once < 1:
        raise UsageError(
            f"--memory is {memory} bytes, but to evaluate {weights.source.path} takes {least + per_chunk}, of which "
            f"the program itself has {held}"
        )
    count = math.ceil(chunks / at_once)
    edges = [chunks * i // count for i in range(count + 1)]
    sweeps = tuple(range(start, stop) for start, stop in pairwise(edges))
    longest = math.ceil(chunks / count)
    group = min(MAX_GROUP, longest, (memory - held - longest * per_chunk - fixed) // (LOGIT_COPIES * one_logits))
    logits = fixed + group * LOGIT_COPIES * one_logits
    return MemoryPlan(held, matrices, between, per_chunk, logits, group, sweeps)


def give_back_memory() -> None:
    """Have glibc give what is freed back to the system: large blocks at once, others now. By itself it would keep them
    in holes that aligned blocks of the same size do not fit in again, and a sweep would grow to twice its size."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.malloc_trim(0)


def check_alike(models: Sequence[Model]) -> None:
    """Refuse models that are not the first one's, quantized, by their shapes."""
    base = models[0]
    for model in models[1:]:
        for name in ("vocabulary", "layers", "hidden", "experts", "experts_used", *_WIDTHS):
            found, expected = (getattr(m.hyper.facts, name) for m in (model, base))
            if found != expected:
                raise GgufMoeError(
                    f"{model.weights.source.path}: {name} is {found}, expected {expected} as in the base, "
                    f"{base.weights.source.path}"
                )


def _most_weights(model: Model) -> int:
    """Of the matrices that are in memory together at any time."""

    def size(layer: int, kinds: tuple[str, ...]) -> int:
        slabs = [t.slabs[0] for k in kinds if (t := model.weights.source.tensors.get(f"blk.{layer}.{k}.weight"))]
        return sum(slab.rows * slab.source.columns for slab in slabs)

    together = (PROJECTIONS, *(mlp_kinds(suffix) for suffix in ("", "_exps", "_shexp")))
    return max(size(layer, kinds) for layer in range(model.hyper.facts.layers) for kinds in together)


def _between(facts: ModelFacts, context: int) -> int:
    """Bytes of what the pieces of tokens need while they pass attention, router or network, in float32."""
    query, key, width = facts.size("query"), facts.size("key"), max(getattr(facts, name) for name in _WIDTHS[-3:])
    attention = max(PIECE_TOKENS, context) * (2 * facts.hidden + 4 * query + 3 * key)
    network = PIECE_TOKENS * max(2 * facts.hidden + 2 * width, facts.hidden + 5 * facts.experts)
    return FLOAT * (max(attention, network) + 2 * PIECE_WEIGHTS)
