"""The tensors of a model, whose rows become float as they are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import quant
from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.mapping import Slab

PIECE_WEIGHTS = 1 << 20  # decoded at once on their way into a tensor; the file is mapped for as long only


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
