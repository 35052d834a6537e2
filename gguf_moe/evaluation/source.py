"""Any model that `convert` takes, as keys and tensors under their GGUF names. Needs no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import gguf

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.gguf_reader import TENSOR_TYPES
from gguf_moe.gguf_source import open_gguf
from gguf_moe.mapping import MappedTensor
from gguf_moe.plan import Plan, make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint or a GGUF file, opened and checked as for its conversion; reads no weight before it is asked to."""

    path: Path  # of the directory, or of the file or its first shard
    quant: str  # the file type; of a checkpoint the commonest dtype
    size_bytes: int  # of all its files of weights
    keys: dict[str, gguf.GGUFValue] = field(repr=False)
    tensors: dict[str, MappedTensor] = field(repr=False)
    warnings: tuple[str, ...] = ()  # what llama.cpp computes otherwise than the checkpoint's config asks

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.path.absolute().name

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all tensors over all weights."""
        slabs = [slab for tensor in self.tensors.values() for slab in tensor.slabs]
        bits = sum(8 * slab.rows * TENSOR_TYPES[slab.source.type].row_bytes(slab.source.columns) for slab in slabs)
        return bits / sum(tensor.elements for tensor in self.tensors.values())


def open_model(path: Path) -> ModelSource:
    """Open a checkpoint directory or a GGUF file, shards and early layouts of experts included.

    Raises GgufMoeError for whatever could not be converted to F32.
    """
    model = open_checkpoint(path) if path.is_dir() else open_gguf(path)
    plan = make_plan(model, find_file_type("F32"), Request(allow_requantize=True))
    if path.is_dir():
        kinds = Counter(tensor.type for tensors in model.files.values() for tensor in tensors)
        kind, size = kinds.most_common(1)[0][0], model.nbytes
    else:
        kind, size = model.kept_file_type.name, sum(file.size for file in model.files)
    return planned_model(path, kind, size, plan)


def planned_model(path: Path, quant: str, size: int, plan: Plan) -> ModelSource:
    """What a plan makes, as the model that it will be, with the weights of its source."""
    return ModelSource(path, quant, size, plan.keys, {t.info.name: t.mapped for t in plan.tensors}, plan.warnings)
