"""GPTQ (Frantar et al. 2022) on ggml's blocks, densely, a column at a time: no groups of columns, nothing put off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import oracle

import quant

CODE_FIELDS = ("qs", "qh", "ql", "hmask")
TIE = 1e-4  # of a step: what float32 may be off by
DIGITS, NEIGHBOURS = 1e-6, 400  # of the largest weight, likewise; and how many such are tried


@dataclass
class Textbook:
    """Follows what another has encoded. It takes the other's side in ties and where float32 gave a block other scales,
    and counts both."""

    kind: str
    loss: np.ndarray | float = 0.0
    other_codes: int = 0
    other_scales: list[int] = field(default_factory=list)  # rows, for each block of a row

    def follow(self, weights: np.ndarray, h: np.ndarray, importance: np.ndarray | None, data: np.ndarray) -> None:
        ggml, form = oracle.load("libggml-python"), quant.FORMATS[self.kind]
        u = np.linalg.cholesky(np.linalg.inv(h)).T
        w, decoded = weights.astype(np.float64), ggml.dequantize(data, self.kind)
        for start in range(0, w.shape[1], form.block_length):
            stop = start + form.block_length
            now = np.ascontiguousarray(w[:, start:stop], np.float32)
            weight = None if importance is None else importance[start:stop].copy()
            theirs = np.ascontiguousarray(data.view(form.dtype)[:, start // form.block_length]).view(np.uint8)
            block = self._with_scales(now, weight, theirs.reshape(len(now), -1))
            values = self.values(block)
            for j in range(start, stop):
                e = (w[:, j] - self._take(decoded[:, j], w[:, j], values[:, :, j - start])) / u[j, j]
                w[:, j + 1 :] -= np.outer(e, u[j, j + 1 :])
                self.loss += e**2

    def _with_scales(self, w: np.ndarray, importance: np.ndarray | None, theirs: np.ndarray) -> np.ndarray:
        """ggml's blocks of weights, or the other's where ggml has those scales for almost the same weights."""
        ggml = oracle.load("libggml-python")
        block = ggml.quantize(w, self.kind, importance)
        other = np.flatnonzero((self._scales(block) != self._scales(theirs)).any(1))
        for row in other:
            noise = np.random.default_rng(row).normal(size=(NEIGHBOURS, w.shape[1])) * np.abs(w[row]).max()
            noise *= np.linspace(0, DIGITS, NEIGHBOURS)[:, None]
            near = ggml.quantize((w[row] + noise).astype(np.float32), self.kind, importance)
            assert (self._scales(near) == self._scales(theirs[row : row + 1])).all(1).any()
        self.other_scales.append(len(other))
        block[other] = theirs[other]
        return block

    def _scales(self, block: np.ndarray) -> np.ndarray:
        """All of blocks but their codes: uint8 [rows, bytes]."""
        dtype = quant.FORMATS[self.kind].dtype
        fields = [np.ascontiguousarray(block.view(dtype)[n]) for n in dtype.names if n not in CODE_FIELDS]
        return np.concatenate([part.view(np.uint8).reshape(len(block), -1) for part in fields], axis=1)

    def values(self, block: np.ndarray) -> np.ndarray:
        """What each code would stand for, [codes, rows, block length]."""
        codes, ggml = range(len(quant.levels(self.kind))), oracle.load("libggml-python")
        return np.stack([ggml.dequantize(quant.with_codes(block, self.kind, q), self.kind) for q in codes])

    def _take(self, theirs: np.ndarray, w: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The other's values [rows] for weights w [rows], asserting that they are nearest of values [codes, rows]."""
        step = np.abs(np.diff(values, axis=0)).min(0)
        excess = np.abs(theirs - w) - np.abs(values - w).min(0)
        assert (excess <= TIE * step + 1e-9 * np.abs(values).max()).all()
        self.other_codes += int((excess > 0).sum())
        return theirs


def best_of_each_group(weights: np.ndarray, h: np.ndarray, kind: str, ways: Sequence[np.ndarray | None]) -> np.ndarray:
    """The loss of each row that goes on from each group of 256 columns with what the textbook loses least there."""
    u, w, loss = np.linalg.cholesky(np.linalg.inv(h)).T, weights.astype(np.float64), 0.0
    length, rows = quant.FORMATS[kind].block_length, np.arange(len(weights))
    for group in range(0, w.shape[1], 256):
        outcomes = []
        for way in ways:
            v, lost = w.copy(), 0.0
            for j in range(group, min(group + 256, w.shape[1])):
                if j % length == 0:
                    now, of_block = np.ascontiguousarray(v[:, j : j + length], np.float32), slice(j, j + length)
                    block = oracle.load("libggml-python").quantize(now, kind, None if way is None else way[of_block])
                    values = Textbook(kind).values(block)
                choices = values[:, :, j % length]
                e = (v[:, j] - choices[np.abs(choices - v[:, j]).argmin(0), rows]) / u[j, j]
                v[:, j + 1 :] -= np.outer(e, u[j, j + 1 :])
                lost += e**2
            outcomes.append((lost, v))
        best = np.stack([lost for lost, _ in outcomes]).argmin(0)
        w = np.stack([v for _, v in outcomes])[best, rows]
        loss += np.stack([lost for lost, _ in outcomes])[best, rows]
    return loss
