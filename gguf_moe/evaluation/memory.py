"""How much memory a sweep takes, before it starts, and so how many chunks it can take at once."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence

import psutil
import torch

from gguf_moe.arch import ModelFacts
from gguf_moe.errors import UsageError
from gguf_moe.evaluation.events import MemoryPlan
from gguf_moe.evaluation.figures import PIECE_LOGITS
from gguf_moe.evaluation.forward import Model, panel_rows
from gguf_moe.evaluation.layer import PIECE_TOKENS, PROJECTIONS, mlp_kinds
from gguf_moe.evaluation.weights import PIECE_WEIGHTS
from gguf_moe.report import size_text

MAX_GROUP = 8  # chunks whose logits exist together: the output matrix is decoded once for all of them
SCORING = 8 * 8 * PIECE_LOGITS  # bytes: eight arrays of float64, of a piece of a chunk's logits
LARGE_BLOCK = 4 << 20  # bytes; blocks of that size come from the system and go back to it
LIBRARIES = 64 << 20  # what torch takes for itself when it starts to compute, and the allocator does not give back
LOGIT_COPIES = 3  # of a group: the base's, a model's, and those of the model before, which a caller may still have
NORM_COPIES = 4  # of a group's hidden states, on their way through the last norm
FLOAT = 4
_M_MMAP_THRESHOLD = -3  # of malloc.h
_WIDTHS = ("feed_forward", "expert_feed_forward", "shared_feed_forward")
USED_SHARE = 0.8  # of the free memory, where no bound is given


def free_memory(device: torch.device) -> int:
    """Bytes that evaluation may take on a device, with what the process holds already, where nobody sets a bound."""
    if device.type == "cuda":
        return int(USED_SHARE * torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(USED_SHARE * torch.mps.recommended_max_memory())
    return psutil.Process().memory_info().rss + int(USED_SHARE * psutil.virtual_memory().available)


def plan_memory(
    models: Sequence[Model],
    chunks: int,
    context: int,
    memory: int | None = None,
    most: int | None = None,
    *,
    scored: bool = True,
    kept: int = 0,
) -> MemoryPlan:
    """Share `chunks` of `context` tokens out to as few sweeps of all models as `memory` bytes allow, by default most of
    what is free. The models are alike. most: chunks of a sweep; scored: whether logits are computed at its end; kept:
    bytes of results that grow in main memory.

    Raises UsageError when the bytes do not allow one chunk at a time.
    """
    memory = free_memory(models[0].weights.device) if memory is None else memory
    facts, weights = models[0].hyper.facts, models[0].weights
    held = kept + psutil.Process().memory_info().rss if weights.device.type == "cpu" else 0
    itemsize = weights.dtype.itemsize
    matrices = _most_weights(models[0]) * itemsize
    between = _between(facts, context) + LIBRARIES
    per_chunk = context * ((len(models) + 1) * facts.hidden * itemsize + 25 * facts.experts_used + 32)
    panel = panel_rows(models[0].hyper)
    a_position = LOGIT_COPIES * facts.vocabulary + panel + NORM_COPIES * facts.hidden
    a_chunk = (context - context // 2) * a_position * FLOAT
    fixed = SCORING + panel * facts.hidden * itemsize + LIBRARIES
    least = held + max(matrices + between, scored * (fixed + a_chunk))
    at_once = (memory - least) // per_chunk
    if at_once < 1:
        raise UsageError(
            f"--memory: {size_text(memory)} are allowed, but to evaluate {weights.source.path} takes "
            f"{size_text(least + per_chunk)}, of which the program itself has {size_text(held)}; allow more, or "
            "shorten the windows with --ctx"
        )
    sweep = min(math.ceil(chunks / math.ceil(chunks / at_once)), most or chunks)
    group = min(MAX_GROUP, sweep, (memory - held - sweep * per_chunk - fixed) // a_chunk)
    logits = scored * (fixed + group * a_chunk)
    return MemoryPlan(held, matrices, between, per_chunk, logits, group, sweep)


def give_back_memory() -> None:
    """Have glibc give what is freed back to the system: large blocks at once, others now. By itself it would keep them
    in holes that aligned blocks of the same size do not fit in again, and a sweep would grow to twice its size."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.malloc_trim(0)


def _most_weights(model: Model) -> int:
    """Of the matrices that are in memory together at any time."""

    def size(layer: int, kinds: tuple[str, ...]) -> int:
        slabs = [t.slabs[0] for k in kinds if (t := model.weights.source.tensors.get(f"blk.{layer}.{k}.weight"))]
        return sum(slab.rows * slab.source.columns for slab in slabs)

    together = (PROJECTIONS, *(mlp_kinds(suffix) for suffix in ("", "_exps", "_shexp")))
    return max(size(layer, kinds) for layer in range(model.hyper.facts.layers) for kinds in together)


def _between(facts: ModelFacts, context: int) -> int:
    """Bytes of what the pieces of tokens need while they pass attention, router or network, in float32."""
    query, key, width = facts.size("query"), facts.size("key"), max(getattr(facts, name) for name in _WIDTHS)
    attention = max(PIECE_TOKENS, context) * (2 * facts.hidden + 4 * query + 3 * key)
    network = PIECE_TOKENS * max(2 * facts.hidden + 2 * width, facts.hidden + 5 * facts.experts)
    return FLOAT * (max(attention, network) + 2 * PIECE_WEIGHTS)
