"""What a model lost against its base, by llama.cpp's formulas: perplexity, KL divergence, probabilities, top tokens.

Two things are better than llama.cpp's: the base's probabilities are its own, not 16-bit codes from a file, and no term
of the KL divergence is left out. What llama.cpp prints in percent (correlation, dp_*, same_top) is in percent here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gguf_moe.errors import GgufMoeError

PIECE_LOGITS = 1 << 20  # widened to float64 at once
QUANTILES = {
    "max": 1.0, "p999": 0.999, "p99": 0.99, "p95": 0.95, "p90": 0.9, "p75": 0.75, "median": 0.5, "p25": 0.25,
    "p10": 0.1, "p05": 0.05, "p01": 0.01, "p001": 0.001, "min": 0.0,
}  # fmt: skip
INTERVALS = ("median", "p90", "p95", "p99", "p999")  # of the KL divergence that get one by resampling
KLD_EDGES = 10.0 ** (np.arange(-64, 17) / 8)  # of the histogram's bins: 1e-8 to 100, the same for every file
MAX_LOSS = 300  # mean nats of a chunk: the square of a perplexity is still a finite number
FEW = 10  # positions that are too few for an error
POSITION = np.dtype([(name, "<f4") for name in ("nll_base", "nll", "kld", "delta_p")] + [("same_top", "?")])


@dataclass
class Scores:
    """What is known of each scored position of a model; `name` is the file's, for errors."""

    name: str
    chunks: list[np.ndarray] = field(default_factory=list)  # POSITION [positions] each

    @property
    def positions(self) -> np.ndarray:
        """All positions: POSITION [positions]."""
        return np.concatenate(self.chunks)

    def add(self, base: Any, logits: Any, targets: Any) -> None:
        """Add a chunk: logits of base and model, [positions, vocabulary], and the ids to predict, [positions]; arrays
        or tensors in main memory.

        Raises GgufMoeError for another vocabulary than the base's, or logits that give no finite figures.
        """
        base, logits, targets = np.asarray(base), np.asarray(logits), np.asarray(targets)
        if base.shape != logits.shape:
            raise GgufMoeError(f"{self.name}: {logits.shape[-1]} logits a token, the base has {base.shape[-1]}")
        chunk = np.empty(len(targets), POSITION)
        rows = max(1, PIECE_LOGITS // base.shape[1])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            chunk[part] = _compare(base[part], logits[part], targets[part])
        where = f"{self.name}: chunk {len(self.chunks)} gives"
        if not all(np.isfinite(chunk[name]).all() for name in ("nll_base", "nll", "kld")):
            raise GgufMoeError(f"{where} logits that are not finite; it is damaged")
        if (loss := chunk["nll"].mean()) > MAX_LOSS:
            raise GgufMoeError(f"{where} a mean loss of {loss:.0f} nats, expected {MAX_LOSS} at most; it is damaged")
        self.chunks.append(chunk)


def _compare(base: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """POSITION [positions] of logits [positions, vocabulary]."""
    result = np.empty(len(targets), POSITION)
    rows = np.arange(len(targets))
    result["same_top"] = base.argmax(1) == logits.argmax(1)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told of later
        log_base, log_model = _log_softmax(base), _log_softmax(logits)
        nll_base, nll = -log_base[rows, targets], -log_model[rows, targets]
        result["nll_base"], result["nll"] = nll_base, nll
        result["delta_p"] = np.exp(-nll) - np.exp(-nll_base)
        result["kld"] = (np.exp(log_base) * (log_base - log_model)).sum(1)
    return result


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def figures(scores: Scores) -> dict[str, float]:
    """Every figure by its name in reports. `..._error` is a standard error, paired where base and model are compared;
    it is 0 where there are too few positions to tell."""
    positions = scores.positions
    nll, nll_base, kld, delta_p = (positions[name].astype(np.float64) for name in ("nll", "nll_base", "kld", "delta_p"))
    rms, same_top = np.sqrt(np.mean(delta_p**2)), positions["same_top"].mean()
    found = _perplexities(nll, nll_base) | {
        "kld_mean": kld.mean(),
        "kld_error": _error(kld),
        "dp_mean": 100 * delta_p.mean(),
        "dp_error": 100 * _error(delta_p),
        "dp_rms": 100 * rms,
        "dp_rms_error": 100 * _error(delta_p**2) / (2 * rms) if rms else 0.0,
        "same_top": 100 * same_top,
        "same_top_error": 100 * np.sqrt(same_top * (1 - same_top) / max(1, len(positions) - 1)),
    }
    found |= {f"kld_{name}": value for name, value in _quantiles(positions["kld"]).items()}
    found |= {f"dp_{name}": 100 * value for name, value in _quantiles(positions["delta_p"]).items()}
    return {name: float(value) for name, value in found.items()}


def _perplexities(nll: np.ndarray, nll_base: np.ndarray) -> dict[str, float]:
    """Perplexities and how they differ, with llama.cpp's errors, which take both models' positions as pairs."""
    error, error_base, both = _error(nll), _error(nll_base), _covariance(nll, nll_base)
    ppl, ppl_base = np.exp(nll.mean()), np.exp(nll_base.mean())
    ln_ratio, ln_ratio_error = nll.mean() - nll_base.mean(), _error(nll - nll_base)
    return {
        "ppl": ppl,
        "ppl_error": ppl * error,
        "ppl_base": ppl_base,
        "ppl_base_error": ppl_base * error_base,
        "correlation": 100 * both / (error * error_base) if error and error_base else 0.0,
        "ln_ratio": ln_ratio,
        "ln_ratio_error": ln_ratio_error,
        "ppl_ratio": np.exp(ln_ratio),
        "ppl_ratio_error": np.exp(ln_ratio) * ln_ratio_error,
        "ppl_difference": ppl - ppl_base,
        "ppl_difference_error": _error(ppl * nll - ppl_base * nll_base),
    }


def _covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Covariance of the means of paired values."""
    return np.mean((a - a.mean()) * (b - b.mean())) / (len(a) - 1) if len(a) > FEW else 0.0


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return np.sqrt(_covariance(values, values))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """QUANTILES of float32 values, between two as llama.cpp has it, with the place between them in float32."""
    ordered, last = np.sort(values), len(values) - 1
    found = {}
    for name, share in QUANTILES.items():
        below, rest = divmod(np.float32(share) * np.float32(last), np.float32(1))
        i = min(int(below), last)
        found[name] = (1 - rest) * ordered[i] + rest * ordered[min(i + 1, last)]
    return found | {"median": np.median(values)}


def kld_histogram(scores: Scores) -> dict[str, list[float] | list[int]]:
    """How many positions have a KL divergence from each edge to the next, all of them counted: what lies outside of
    the edges is in the first bin or the last. One edge more than counts."""
    inside = scores.positions["kld"].astype(np.float64).clip(KLD_EDGES[0], KLD_EDGES[-1])
    return {"edges": KLD_EDGES.tolist(), "counts": np.histogram(inside, KLD_EDGES)[0].tolist()}


def intervals(scores: Scores, resamples: int, level: float = 0.95, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Intervals that hold the KL divergence's quantiles with probability `level`, by their names in reports.

    Positions of a window depend on each other, so whole windows are drawn anew: a block bootstrap.
    """
    kld, sizes = scores.positions["kld"], [len(chunk) for chunk in scores.chunks]
    order = np.argsort(kld)
    ordered, chunk_of = kld[order], np.repeat(np.arange(len(sizes)), sizes)[order]
    random = np.random.default_rng(seed)
    shares = np.array([QUANTILES[name] for name in INTERVALS])
    drawn = np.empty((resamples, len(shares)))
    for i in range(resamples):
        times = np.bincount(random.integers(len(sizes), size=len(sizes)), minlength=len(sizes))
        up_to = np.cumsum(times[chunk_of])
        drawn[i] = ordered[np.searchsorted(up_to, shares * (up_to[-1] - 1), side="right")]
    ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {f"kld_{name}": (float(low), float(high)) for name, low, high in zip(INTERVALS, *ends)}
