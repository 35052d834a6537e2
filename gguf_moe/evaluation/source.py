"""Any model that `convert` takes, as tensors under their GGUF names whose rows become float as they are asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch

import quant
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_reader import TENSOR_TYPES
from gguf_moe.gguf_source import open_gguf
from gguf_moe.mapping import MappedTensor, Slab
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request

PIECE_WEIGHTS = 1 << 20  # decoded at once on their way into a tensor; the file is mapped for as long only


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
    tensors = {t.info.name: t.mapped for t in plan.tensors}
    if path.is_dir():
        kinds = Counter(tensor.type for tensors in model.files.values() for tensor in tensors)
        kind, size = kinds.most_common(1)[0][0], model.nbytes
    else:
        kind, size = model.kept_file_type.name, sum(file.size for file in model.files)
    return ModelSource(path, kind, size, plan.keys, tensors, plan.warnings)


@dataclass(frozen=True)
class Weights:
    """The tensors of a model in torch's terms, made anew each time they are asked for and kept by nobody."""

    source: ModelSource
    device: torch.device
    dtype: torch.dtype

    def __contains__(self, name: str) -> bool:
        return name in self.source.tensors

    def matrix(
        self,
        name: str,
        expert: int | None = None,
        *,
        rows: range | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A tensor, or one expert's matrix of a stack, as [rows, columns], or some rows of it; a vector is one row, or
        one column where a checkpoint's elements are reordered."""
        slab = self._slab(name, expert)
        rows, columns = range(slab.rows) if rows is None else rows, slab.source.columns
        matrix = torch.empty(len(rows), columns, dtype=dtype or self.dtype, device=self.device)
        height = max(1, PIECE_WEIGHTS // columns)
        for piece, target in zip((rows[i : i + height] for i in range(0, len(rows), height)), matrix.split(height)):
            target[:] = _floats(slab.read(slab.source.raw(), piece.start, piece.stop), slab)
        return matrix

    def vector(self, name: str) -> torch.Tensor:
        """A tensor of one dimension, float32."""
        return self.matrix(name, dtype=torch.float32).flatten()

    def gather(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Those rows of a tensor alone: [rows, columns]."""
        slab = self._slab(name)
        return _floats(slab.source.raw()[slab.first_row + rows], slab).to(self.device, self.dtype)

    def _slab(self, name: str, expert: int | None = None) -> Slab:
        if name not in self:
            raise GgufMoeError(f"{self.source.path}: tensor {name} is absent")
        return self.source.tensors[name].slabs[expert or 0]


def _floats(rows: np.ndarray, slab: Slab) -> torch.Tensor:
    """Rows as they stand in the file to float32."""
    return torch.from_numpy(quant.dequantize(rows.view(np.uint8), slab.source.type))
