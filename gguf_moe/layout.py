"""Where everything stands: the tensors of a plan in one file or in shards, with offsets and headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf_moe.gguf_file import encode_header, padded
from gguf_moe.gguf_reader import TENSOR_TYPES, TensorInfo
from gguf_moe.mapping import MappedTensor
from gguf_moe.recipe import Choice
from gguf_moe.sharding import Splitting, cut, shard_suffix, split_keys


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: where its rows come from, what it becomes, where its bytes go.

    info.offset: from the start of the tensor data of its file.
    """

    mapped: MappedTensor = field(repr=False)
    choice: Choice
    info: TensorInfo

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the file."""
        return TENSOR_TYPES[self.info.type].row_bytes(self.mapped.shape[-1])

    @cached_property
    def searched(self) -> bool:
        """Whether its type takes a search to encode; the others are written faster than they are compared."""
        copied = all(slab.source.type == self.info.type for slab in self.mapped.slabs)
        return not copied and TENSOR_TYPES[self.info.type].block_length > 1


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output: all of it, or a shard."""

    header: bytes = field(repr=False)
    tensors: tuple[TensorPlan, ...] = field(repr=False)
    suffix: str = ""  # of a shard, "-00001-of-00003"

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(padded(tensor.info.nbytes) for tensor in self.tensors)

    def path(self, target: Path) -> Path:
        """The file's own path where the whole output is called `target`."""
        return target.with_name(f"{target.name.removesuffix('.gguf')}{self.suffix}.gguf") if self.suffix else target


def lay_out(
    tensors: Sequence[TensorPlan], keys: dict[str, Any], splitting: Splitting | None, *, by_converter: bool
) -> tuple[PlannedFile, ...]:
    """Offsets and headers of the files that hold `tensors` in their order, whose offsets are still to be found.

    What fits into one shard becomes an ordinary file.
    """
    sizes = [tensor.info.nbytes for tensor in tensors]
    ranges = cut(sizes, splitting, by_converter=by_converter) if splitting else [range(len(sizes))]
    files = []
    for number, numbers in enumerate(ranges):
        own, suffix = dict(keys), ""
        if len(ranges) > 1:
            labels = split_keys(number, len(ranges), len(sizes), by_converter=by_converter)
            own, suffix = {**(keys if number == 0 else {}), **labels}, shard_suffix(number, len(ranges))
        files.append(place(tensors[numbers.start : numbers.stop], own, suffix))
    return tuple(files)


def place(tensors: Sequence[TensorPlan], keys: dict[str, Any], suffix: str = "") -> PlannedFile:
    """The file with these tensors and keys: offsets and header."""
    placed, offset = [], 0
    for tensor in tensors:
        placed.append(replace(tensor, info=replace(tensor.info, offset=offset)))
        offset += padded(tensor.info.nbytes)
    return PlannedFile(encode_header(keys, [t.info for t in placed]), tuple(placed), suffix)
