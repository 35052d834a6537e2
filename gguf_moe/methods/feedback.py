"""Codes chosen one column at a time, with the error of each made good in the columns after it.

The scales of a block are those that the normal encoder finds for its weights as they are by then. So the blocks are
ordinary ones, for any decoder. Rows are independent of each other: all are done together, and each may keep the best of
several ways to find scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import quant
from gguf_moe.methods.moments import Factor

GROUP = 256  # columns whose errors reach all later ones together
STEP = 32  # ... whose errors reach the rest of their group together; the shortest block

Encoded = tuple[np.ndarray, np.ndarray]  # blocks, uint8 [rows, row bytes]; float64 [rows], their share of tr(D H Dᵀ)


def feed_back(
    weights: torch.Tensor, factor: Factor, kind: str, importances: Sequence[np.ndarray | None]
) -> list[Encoded]:
    """Encode weights, float32 [rows, columns], in a format of `quant.CODED`, once for each importance of columns by
    which scales are found, float32 [columns].

    The procedure is GPTQ's inside blocks: after column j, e = (w - v) / U[j, j] is taken from every later column k as
    e U[j, k]. The squares of e add up to the loss, damping included.
    """
    columns = weights.shape[1]
    copies = [weights.clone() for _ in importances]
    parts: list[list[np.ndarray]] = [[] for _ in importances]
    losses = [np.zeros(len(weights)) for _ in importances]
    for start in range(0, columns, GROUP):
        stop = min(start + GROUP, columns)
        u = factor.inverse_rows(start, stop).to(weights)
        for number, (w, importance) in enumerate(zip(copies, importances)):
            of_group = None if importance is None else importance[start:stop]
            data, errors = _group(w[:, start:stop].T.contiguous(), u[:, : stop - start], kind, of_group)
            w[:, stop:] -= errors.T @ u[:, stop - start :]
            losses[number] += torch.linalg.vector_norm(errors, dim=0, dtype=torch.float64).square().cpu().numpy()
            parts[number].append(data)
    return [(np.concatenate(data, axis=1), loss) for data, loss in zip(parts, losses)]


def plain(weights: torch.Tensor, factor: Factor, kind: str, importance: np.ndarray | None) -> Encoded:
    """The same by the normal encoder alone."""
    data = quant.quantize(weights.cpu().numpy(), kind, importance)
    return data, factor.errors(torch.from_numpy(quant.dequantize(data, kind)).to(weights.device) - weights)


def best_rows(candidates: Sequence[Encoded], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Each row of the candidate that loses least there, among equals of the first: blocks, and the numbers of the
    candidates [rows]. One whose loss is no number, or whose scales are not finite, loses more than any."""
    losses = np.stack([loss for _, loss in candidates])
    for loss, (data, _) in zip(losses, candidates):
        if quant.first_nonfinite_scale(data, kind) is not None:
            loss[[quant.first_nonfinite_scale(row, kind) is not None for row in data]] = np.inf
    chosen = np.where(np.isnan(losses), np.inf, losses).argmin(0)
    return np.stack([data for data, _ in candidates])[chosen, np.arange(len(chosen))], chosen


def _group(
    w: torch.Tensor, u: torch.Tensor, kind: str, importance: np.ndarray | None
) -> tuple[np.ndarray, torch.Tensor]:
    """A group of columns, w [columns, rows], by u [columns, columns]: its blocks, and the errors [columns, rows]."""
    length, columns = quant.FORMATS[kind].block_length, len(w)
    levels = torch.from_numpy(quant.levels(kind)).to(w.device)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    errors, blocks = torch.empty_like(w), []
    for start in range(0, columns, STEP):
        if start % length == 0:
            now = slice(start, start + length)
            weight = None if importance is None else np.ascontiguousarray(importance[now])
            blocks.append(quant.quantize(w[now].T.contiguous().cpu().numpy(), kind, weight))
            step, offset = (torch.from_numpy(a).to(w.device).T.contiguous() for a in quant.grid(blocks[-1], kind))
        stop = start + STEP
        for j in range(start, stop):
            codes[j], values = _nearest(w[j], step[j - now.start], offset[j - now.start], levels)
            errors[j] = (w[j] - values) / u[j, j]
            w[j + 1 : stop] -= u[j, j + 1 : stop, None] * errors[j]
        w[stop:] -= u[start:stop, stop:].T @ errors[start:stop]
    return quant.with_codes(np.concatenate(blocks, axis=1), kind, codes.T.contiguous().cpu().numpy()), errors


def _nearest(
    w: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes whose values are nearest to w, and those values: [rows] each. A step of 0 has code 0."""
    wanted = torch.where(step == 0, levels[0], (w - offset) / step)
    codes = torch.bucketize(wanted, (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), offset + step * levels[codes]
