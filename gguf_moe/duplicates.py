"""Experts that are there twice, and an output matrix that is the embedding: found cheaply, to be encoded once.

The file needs all of them. What is found here rests on samples of rows, which costs a few pages of the mapped files;
`same_rows` is for the converter, which compares every row before it reuses bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gguf_moe.mapping import MappedTensor, Slab
from gguf_moe.plan import Plan

SAMPLES = 3  # rows of each matrix of an expert
SAMPLES_OF_VOCABULARY = 64  # many rows of unused tokens are alike


Place = tuple[str, int]  # name of a tensor, number of a slab in it


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once, as far as sampled.

    experts: number of an expert -> the first that is the same in all layers. tied: output.weight is the embedding.
    twins: place of a slab -> the first of the same rows, where encoding them takes a search.
    """

    experts: dict[int, int] = field(default_factory=dict)
    tied: bool = False
    twins: dict[Place, Place] = field(default_factory=dict, repr=False)

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


def find_duplicates(plans: Sequence[Plan]) -> Duplicates:
    """Sample the weights that these plans of one source share for repeated experts and a repeated embedding."""
    searched = {tensor.info.name for plan in plans for tensor in plan.tensors if tensor.searched}
    tensors = {tensor.info.name: tensor.mapped for tensor in plans[0].tensors}
    stacks = [tensor for tensor in tensors.values() if len(tensor.slabs) > 1]
    experts = _repeated_experts(stacks)
    twins = {
        (tensor.name, expert): (tensor.name, first)
        for tensor in stacks
        if tensor.name in searched
        for expert, first in experts.items()
        if _matter_alike(tensor.slabs[expert], tensor.slabs[first])
    }
    ends = [tensor for tensor in tensors.values() if tensor.role in ("output", "token_embd")]
    tied = len(ends) == 2 and len({_fingerprint(end.slabs[0], SAMPLES_OF_VOCABULARY) for end in ends}) == 1
    if tied and ends[1].name in searched and _matter_alike(ends[0].slabs[0], ends[1].slabs[0]):
        twins[ends[1].name, 0] = ends[0].name, 0
    return Duplicates(experts, tied, twins)


def _matter_alike(slab: Slab, other: Slab) -> bool:
    """Whether the same rows give the same bytes, which depend on the importance of their columns too."""
    return np.array_equal(slab.importance, other.importance)


def same_rows(slab: Slab, other: Slab, start: int, stop: int) -> bool:
    """Whether rows [start, stop) of two slabs are the same in their files, bit by bit."""
    ours, theirs = (s.read(s.source.raw(), start, stop) for s in (slab, other))
    bits = np.dtype(f"u{ours.dtype.itemsize}")  # as numbers, -0 would equal 0 and NaN nothing
    return slab.source.type == other.source.type and np.array_equal(ours.view(bits), theirs.view(bits))


def _repeated_experts(stacks: list[MappedTensor]) -> dict[int, int]:
    """Experts whose samples agree in every stack. A model without repeats is read no further than its first stack."""
    if len({len(tensor.slabs) for tensor in stacks}) != 1:
        return {}
    groups: Iterable[list[int]] = [list(range(len(stacks[0].slabs)))]
    for tensor in stacks:
        groups = [part for group in groups for part in _split(group, tensor) if len(part) > 1]
    return {expert: group[0] for group in groups for expert in group[1:]}


def _split(group: list[int], tensor: MappedTensor) -> Iterable[list[int]]:
    """The experts of a group by what their samples in one stack are."""
    parts: dict[Hashable, list[int]] = {}
    for expert in group:
        parts.setdefault(_fingerprint(tensor.slabs[expert], SAMPLES), []).append(expert)
    return parts.values()


def _fingerprint(slab: Slab, count: int) -> Hashable:
    """Shape, type and `count` rows from first to last."""
    matrix = slab.source.raw()
    rows = sorted({int(row) for row in np.linspace(0, slab.rows - 1, count)})
    return slab.source.type, slab.rows, b"".join(slab.read(matrix, row, row + 1).tobytes() for row in rows)
