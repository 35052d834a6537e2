"""Second moments of a matrix's inputs, and the factor by which an error in one column is made good in later ones.

All work goes by panels of columns, so that a matrix of moments may lie in a mapped file: what is read of it at once is
a panel's height or width, and can be given back.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PANEL = 1024  # columns
PRECISE = 4096  # columns up to which the factor is float64
GROWTH, MOST = 10.0, 1e3  # of the damping, where moments are not positive definite; and where that ends


class Square:
    """A matrix [columns, columns], in the device's memory or, with `path`, in a file that is mapped into the host's."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device, path: Path | None = None) -> None:
        self.file: np.memmap | None = None
        if path is None:
            self.values = torch.zeros(columns, columns, dtype=dtype, device=device)
        else:
            kind = np.dtype(str(dtype).removeprefix("torch."))
            self.file = np.memmap(path, kind, "w+", shape=(columns, columns))
            self.values = torch.from_numpy(self.file)

    def panels(self) -> Iterator[slice]:
        """Panels of columns, from the first; behind each, what was mapped is given back."""
        for start in range(0, len(self.values), PANEL):
            yield slice(start, min(start + PANEL, len(self.values)))
            self.give_back()

    def give_back(self) -> None:
        """Have the system take mapped pages out of the process; their file keeps them."""
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file._mmap.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Factor:
    """M, upper triangular, with M Mᵀ = H + damping · mean(diag H) · I; below its diagonal stands what is of no meaning.

    diagonal: of H, float32 [columns].
    """

    square: Square
    diagonal: torch.Tensor
    damping: float

    def inverse_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of U = M⁻¹ from column `start` on, before which they are 0: [stop - start, rest].

        U is the upper Cholesky factor of H⁻¹ = Uᵀ U by which GPTQ goes (Frantar et al. 2022, arXiv 2210.17323). Solved
        from X M = I a panel of columns after the other.
        """
        m = self.square.values
        x = torch.zeros(stop - start, len(m), dtype=m.dtype, device=m.device)
        x[:, start:stop] = torch.eye(stop - start, dtype=m.dtype, device=m.device)
        for panel in self.square.panels():
            if panel.stop <= start:
                continue
            at = slice(max(panel.start, start), panel.stop)
            x[:, at] -= x[:, start : at.start] @ m[start : at.start, at]
            x[:, at] = torch.linalg.solve_triangular(m[at, at], x[:, at], upper=True, left=False)
        return x[:, start:]

    def errors(self, difference: torch.Tensor) -> np.ndarray:
        """The diagonal of D H Dᵀ, damping included, of differences D [rows, columns]: by how much each output changes,
        squared and summed over tokens. float64 [rows]."""
        m, total = self.square.values, np.zeros(len(difference))
        for panel in self.square.panels():
            block = m[: panel.stop, panel].triu(-panel.start)  # [columns so far, panel]
            product = difference[:, : panel.stop] @ block.to(difference)
            total += torch.linalg.vector_norm(product, dim=1, dtype=torch.float64).square().cpu().numpy()
        return total

    def importances(self) -> list[np.ndarray]:
        """How much each column matters where scales are found, in two ways, float32 [columns]: diag H, what an error
        costs that nobody makes good; diag(M)², what it costs when later columns do."""
        kept = self.square.values.diagonal().float().square()
        return [values.cpu().numpy() for values in (self.diagonal.float(), kept)]


class Moments:
    """The sum of x xᵀ over tokens, float32 [columns, columns], up to the diagonal; in a file where a path is given."""

    def __init__(self, columns: int, device: torch.device, path: Path | None = None) -> None:
        self.square, self.path = Square(columns, torch.float32, device, path), path

    def add(self, x: torch.Tensor, weight: float = 1.0) -> None:
        """Take tokens [tokens, columns], which count as `weight` each."""
        x = x.to(self.square.values)
        for panel in self.square.panels():
            self.square.values[panel, : panel.stop].addmm_(x[:, panel].T, x[:, : panel.stop], alpha=weight)

    def factor(self, damping: float) -> Factor:
        """Their factor, which takes their place. Where they are not positive definite as they are rounded, the damping
        grows tenfold until they are; without any token they are the unit matrix."""
        square = self.square
        if len(square.values) <= PRECISE:
            square = Square(0, torch.float64, square.values.device)
            square.values = self.square.values.double()
        diagonal = self.square.values.diagonal().clone()
        if not diagonal.any():
            diagonal += 1
        exact = diagonal.double()  # float32 would round a small damping off
        while not _factor(square, exact + damping * exact.mean()):
            if damping > MOST:
                raise AssertionError("moments of finite inputs are positive definite when damped so much")
            damping *= GROWTH
        return Factor(square, diagonal, damping)


def _factor(square: Square, diagonal: torch.Tensor) -> bool:
    """Put the upper factor of a symmetric matrix with that diagonal into its upper triangle, from the last panel to the
    first. The lower triangle keeps the matrix, to begin anew from; False where it is not positive definite."""
    m = square.values
    for panel in square.panels():
        m[: panel.start, panel] = m[panel, : panel.start].T
        lower = m[panel, panel].tril(-1)
        m[panel, panel] = lower + lower.T
    m.diagonal().copy_(diagonal)
    for panel in reversed(list(square.panels())):
        upper = m[panel, panel].triu()
        whole = upper + upper.triu(1).T
        reverse, failed = torch.linalg.cholesky_ex(whole.flip(0, 1))  # from the last column to the first
        if failed:
            return False
        corner = reverse.flip(0, 1)
        m[panel, panel] = m[panel, panel].tril(-1) + corner
        m[: panel.start, panel] = torch.linalg.solve_triangular(corner, m[: panel.start, panel].T, upper=True).T
        for other in square.panels():
            if other.start >= panel.start:
                break
            m[: other.stop, other] -= (m[: other.stop, panel] @ m[other, panel].T).triu(-other.start)
    return True
