"""Codes chosen one column at a time, with the error of each made good in the columns after it.

The scales of a block are those that the normal encoder finds for its weights as they are by then. So the blocks are
ordinary ones, for any decoder. Rows are independent of each other: all are done together, and each keeps the best of
several ways to find scales, a group of columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

import quant
from gguf_moe.methods.moments import Factor

GROUP = 256  # columns whose errors reach all later ones together
STEP = 32  # ... whose errors reach the rest of their group together; the shortest block
PART_ROWS = 1024  # that a thread has at once: enough that a column costs more to do than to begin
COPIES = 8  # of a group in float32, for each way: itself, its errors, steps and offsets twice, what these come from

Encoded = tuple[np.ndarray, np.ndarray]  # blocks, uint8 [rows, row bytes]; float64 [rows], their share of tr(D H Dᵀ)


def feed_back(weights: torch.Tensor, factor: Factor, kind: str, importances: Sequence[np.ndarray | None]) -> Encoded:
    """Encode weights, float32 [rows, columns], in a format of `quant.CODED`.

    The procedure is GPTQ's inside blocks: after column j, e = (w - v) / U[j, j] is taken from every later column k as
    e U[j, k]. The squares of e add up to the loss, damping included. importances: of columns, float32 [columns], by
    which scales are found; each row keeps in each group the blocks of the one by which it loses least there.
    """
    columns = weights.shape[1]
    rows = PART_ROWS if weights.device.type == "cpu" else len(weights)
    parts = [_Part(part, kind, importances) for part in weights.split(rows)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, columns, GROUP):
            stop = min(start + GROUP, columns)
            u = factor.inverse_rows(start, stop).to(weights)
            with _one_thread_each():
                list(pool.map(partial(_Part.encode, start=start, stop=stop, u=u), parts))
    blocks = np.concatenate([np.concatenate(part.blocks, axis=1) for part in parts])
    return blocks, np.concatenate([part.losses for part in parts])


def group_bytes(rows: int, ways: int, device: torch.device) -> int:
    """Bytes that groups take beside copies of the whole matrix."""
    at_once = min(rows, PART_ROWS * torch.get_num_threads()) if device.type == "cpu" else rows
    return COPIES * 4 * GROUP * ways * at_once


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch without threads of its own: to hand on a column takes them longer than to do it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Part:
    """Some rows, as they are by the group at hand."""

    def __init__(self, weights: torch.Tensor, kind: str, importances: Sequence[np.ndarray | None]) -> None:
        self.w, self.kind, self.importances = weights.clone(), kind, importances
        self.blocks: list[np.ndarray] = []
        self.losses = np.zeros(len(weights))

    @torch.inference_mode()
    def encode(self, start: int, stop: int, u: torch.Tensor) -> None:
        """Encode a group of columns and take its errors from the later ones."""
        of_group = [None if each is None else each[start:stop] for each in self.importances]
        w = self.w[:, start:stop].T.repeat(1, len(of_group))  # [columns, importances x rows]
        blocks, errors = _group(w, u[:, : stop - start], self.kind, of_group)
        losses = torch.linalg.vector_norm(errors, dim=0, dtype=torch.float64).square().cpu().numpy()
        losses = np.where(np.isnan(losses), np.inf, losses).reshape(len(of_group), -1)
        rows = np.arange(losses.shape[1])
        best = losses.argmin(0)
        chosen = best * len(rows) + rows
        self.w[:, stop:].addmm_(errors[:, torch.from_numpy(chosen)].T, u[:, stop - start :], alpha=-1)
        self.losses += losses[best, rows]
        self.blocks.append(blocks[chosen])


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
    w: torch.Tensor, u: torch.Tensor, kind: str, importances: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, torch.Tensor]:
    """A group of columns, w [columns, importances x rows], by u [columns, columns]: blocks, and errors of w's shape."""
    length, columns = quant.FORMATS[kind].block_length, len(w)
    levels = torch.from_numpy(quant.levels(kind)).to(w.device)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    errors, blocks = torch.empty_like(w), []
    for start in range(0, columns, STEP):
        if start % length == 0:
            now = slice(start, start + length)
            blocks.append(_encode(w[now], kind, [None if each is None else each[now] for each in importances]))
            step, offset = (torch.from_numpy(a).to(w.device).T.contiguous() for a in quant.grid(blocks[-1], kind))
        stop = start + STEP
        for j in range(start, stop):
            codes[j], values = _nearest(w[j], step[j - now.start], offset[j - now.start], levels)
            errors[j] = (w[j] - values) / u[j, j]
            w[j + 1 : stop].addr_(u[j, j + 1 : stop], errors[j], alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return quant.with_codes(np.concatenate(blocks, axis=1), kind, codes.T.contiguous().cpu().numpy()), errors


def _encode(w: torch.Tensor, kind: str, importances: Sequence[np.ndarray | None]) -> np.ndarray:
    """A block of each row of w [columns, importances x rows] by the normal encoder: uint8 [rows of w, bytes]."""
    rows = w.T.contiguous().cpu().numpy()
    parts = np.split(rows, len(importances))
    return np.concatenate([quant.quantize(part, kind, importance) for part, importance in zip(parts, importances)])


def _nearest(
    w: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes whose values are nearest to w, and those values: [rows] each. A step of 0 has code 0."""
    wanted = torch.where(step == 0, levels[0], (w - offset) / step)
    if levels[-1] == len(levels) - 1:  # each is its code
        codes = wanted.round_().clamp_(0, len(levels) - 1)
        return codes.to(torch.uint8), offset + step * codes
    codes = torch.bucketize(wanted, (levels[1:] + levels[:-1]) / 2)
    return codes.to(torch.uint8), offset + step * levels[codes]
