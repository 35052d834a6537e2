"""Experts that are there twice, and an output matrix that is the embedding: found cheaply, to be encoded once.

The file needs all of them. What is found here rests on samples of rows, which costs a few pages of the mapped files;
`same_rows` is for the converter, which compares every row before it reuses bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np

from gguf_moe.mapping import Slab
from gguf_moe.plan import Plan, TensorPlan
from quant import FORMATS

SAMPLES = 3  # rows of each matrix of an expert
SAMPLES_OF_VOCABULARY = 64  # many rows of unused tokens are alike


@dataclass(frozen=True)
class Twin:
    """An earlier slab with, as far as sampled, the same rows, and where its bytes begin in the file's tensor data."""

    slab: Slab
    offset: int


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once, as far as sampled.

    experts: number of an expert -> the first that is the same in all layers. tied: output.weight is the embedding.
    twins: (tensor, slab) whose bytes need not be encoded again; one slab may be in two tensors.
    """

    experts: dict[int, int] = field(default_factory=dict)
    tied: bool = False
    twins: dict[tuple[str, Slab], Twin] = field(default_factory=dict, repr=False)

    def notes(self) -> list[str]:
        """A line for each finding, for a person."""
        lines = []
        for first in dict.fromkeys(self.experts.values()):
            same = [first, *(expert for expert, of in self.experts.items() if of == first)]
            listed = f"{', '.join(map(str, same[:-1]))} and {same[-1]}"
            once = "; they are encoded once" if self.twins else ""
            lines.append(f"experts {listed} are identical in all layers by their sampled rows{once}")
        if self.tied:
            lines.append("output.weight is identical to token_embd.weight by its sampled rows; both are written")
        return lines


def find_duplicates(plan: Plan) -> Duplicates:
    """Sample the weights for repeated experts and a repeated embedding."""
    stacks = [tensor for tensor in plan.tensors if len(tensor.mapped.slabs) > 1]
    experts = _repeated_experts(stacks)
    twins = {}
    for tensor in filter(_searched, stacks):
        slabs, nbytes = tensor.mapped.slabs, tensor.info.nbytes // len(tensor.mapped.slabs)
        for expert, first in experts.items():
            twins[tensor.info.name, slabs[expert]] = Twin(slabs[first], tensor.info.offset + first * nbytes)
    ends = [tensor for tensor in plan.tensors if tensor.mapped.role in ("output", "token_embd")]
    tied = len(ends) == 2 and len({_fingerprint(t.mapped.slabs[0], SAMPLES_OF_VOCABULARY) for t in ends}) == 1
    if tied and ends[0].info.type == ends[1].info.type and _searched(ends[0]):
        twins[ends[1].info.name, ends[1].mapped.slabs[0]] = Twin(ends[0].mapped.slabs[0], ends[0].info.offset)
    return Duplicates(experts, tied, twins)


def _searched(tensor: TensorPlan) -> bool:
    """Whether its type takes a search to encode: the others are written faster than they are compared."""
    copied = all(slab.source.type == tensor.info.type for slab in tensor.mapped.slabs)
    return not copied and FORMATS[tensor.info.type].block_length > 1


def same_rows(slab: Slab, other: Slab, start: int, stop: int) -> bool:
    """Whether rows [start, stop) of two slabs are the same in their files, bit by bit."""
    ours, theirs = (s.read(s.source.raw(), start, stop) for s in (slab, other))
    bits = np.dtype(f"u{ours.dtype.itemsize}")  # as numbers, -0 would equal 0 and NaN nothing
    return slab.source.type == other.source.type and np.array_equal(ours.view(bits), theirs.view(bits))


def _repeated_experts(stacks: list[TensorPlan]) -> dict[int, int]:
    """Experts whose samples agree in every stack. A model without repeats is read no further than its first stack."""
    if len({len(tensor.mapped.slabs) for tensor in stacks}) != 1:
        return {}
    groups: Iterable[list[int]] = [list(range(len(stacks[0].mapped.slabs)))]
    for tensor in stacks:
        groups = [part for group in groups for part in _split(group, tensor) if len(part) > 1]
    return {expert: group[0] for group in groups for expert in group[1:]}


def _split(group: list[int], tensor: TensorPlan) -> Iterable[list[int]]:
    """The experts of a group by what their samples in one stack are."""
    parts: dict[Hashable, list[int]] = {}
    for expert in group:
        parts.setdefault(_fingerprint(tensor.mapped.slabs[expert], SAMPLES), []).append(expert)
    return parts.values()


def _fingerprint(slab: Slab, count: int) -> Hashable:
    """Shape, type and `count` rows from first to last."""
    matrix = slab.source.raw()
    rows = sorted({int(row) for row in np.linspace(0, slab.rows - 1, count)})
    return slab.source.type, slab.rows, b"".join(slab.read(matrix, row, row + 1).tobytes() for row in rows)
