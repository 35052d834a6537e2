"""Figures are what the formulas say, computed anew in plain Python, and keep what must hold of any two models."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation import figures as module
from gguf_moe.evaluation.figures import INTERVALS, QUANTILES, Scores, figures, intervals
from gguf_moe.evaluation.pareto import pareto, smallest

Chunk = tuple[np.ndarray, np.ndarray, np.ndarray]  # logits of base and model, targets


def chunk(seed: int, positions: int = 25, vocabulary: int = 37, scale: float = 3.0, noise: float = 0.5) -> Chunk:
    random = np.random.default_rng(seed)
    base = random.normal(scale=scale, size=(positions, vocabulary)).astype(np.float32)
    logits = (base + random.normal(scale=noise, size=base.shape)).astype(np.float32)
    return base, logits, random.integers(vocabulary, size=positions)


def scored(*chunks: Chunk) -> Scores:
    scores = Scores("a.gguf")
    for one in chunks:
        scores.add(*one)
    return scores


def plain_position(base: list[float], logits: list[float], target: int) -> tuple[float, float, float, float, bool]:
    """nll of base and model, KL divergence, difference of probabilities, same top token: of one position."""

    def log_probabilities(row: list[float]) -> list[float]:
        top = max(row)
        total = math.log(math.fsum(math.exp(x - top) for x in row))
        return [x - top - total for x in row]

    p, q = log_probabilities(base), log_probabilities(logits)
    kld = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q))
    same = base.index(max(base)) == logits.index(max(logits))
    return -p[target], -q[target], kld, math.exp(q[target]) - math.exp(p[target]), same


def plain_figures(chunks: list[Chunk]) -> dict[str, float]:
    """The specification's table, sum by sum."""
    rows = [plain_position(b.tolist(), q.tolist(), t) for one in chunks for b, q, t in zip(*one)]
    nll_base, nll, kld, dp, same = (list(column) for column in zip(*rows))
    count = len(rows)

    def mean(values: list[float]) -> float:
        return math.fsum(values) / count

    def error(values: list[float]) -> float:
        return math.sqrt((mean([x * x for x in values]) - mean(values) ** 2) / (count - 1))

    def quantile(values: list[float], share: float) -> float:
        ordered, place = sorted(values), share * (count - 1)
        i = math.floor(place)
        return ordered[i] + (place - i) * (ordered[min(i + 1, count - 1)] - ordered[i])

    covariance = (mean([a * b for a, b in zip(nll, nll_base)]) - mean(nll) * mean(nll_base)) / (count - 1)
    ratio_error = math.sqrt(error(nll) ** 2 + error(nll_base) ** 2 - 2 * covariance)
    ppl, ppl_base, ratio = math.exp(mean(nll)), math.exp(mean(nll_base)), math.exp(mean(nll) - mean(nll_base))
    a, b = ppl * error(nll), ppl_base * error(nll_base)
    rms = math.sqrt(mean([x * x for x in dp]))
    return {
        "ppl": ppl, "ppl_error": a, "ppl_base": ppl_base, "ppl_base_error": b,
        "correlation": 100 * covariance / (error(nll) * error(nll_base)),
        "ln_ratio": math.log(ratio), "ln_ratio_error": ratio_error,
        "ppl_ratio": ratio, "ppl_ratio_error": ratio * ratio_error,
        "ppl_difference": ppl - ppl_base,
        "ppl_difference_error": math.sqrt(a * a + b * b - 2 * ppl * ppl_base * covariance),
        "kld_mean": mean(kld), "kld_error": error(kld),
        "dp_mean": 100 * mean(dp), "dp_error": 100 * error(dp),
        "dp_rms": 100 * rms, "dp_rms_error": 100 * error([x * x for x in dp]) / (2 * rms),
        "same_top": 100 * mean(same), "same_top_error": 100 * math.sqrt(mean(same) * (1 - mean(same)) / (count - 1)),
        **{f"kld_{name}": quantile(kld, share) for name, share in QUANTILES.items()},
        **{f"dp_{name}": 100 * quantile(dp, share) for name, share in QUANTILES.items()},
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [(25, 25, 25), (6, 5), (300,)])
def test_figures_are_the_specifications(sizes: tuple[int, ...]) -> None:
    chunks = [chunk(seed, size) for seed, size in enumerate(sizes)]
    have, want = figures(scored(*chunks)), plain_figures(chunks)
    assert have == pytest.approx(want, rel=2e-5, abs=1e-6)
    assert have.keys() == want.keys()
    assert all(type(value) is float for value in have.values())


def test_wide_logits_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scored(chunk(1)).positions
    monkeypatch.setattr(module, "PIECE_LOGITS", 4 * 37 + 1)
    assert np.array_equal(scored(chunk(1)).positions, whole)


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0.01, 30), st.floats(0, 30), st.integers(2, 300))
def test_no_divergence_is_negative_and_errors_are_real(seed: int, scale: float, noise: float, vocabulary: int) -> None:
    scores = scored(chunk(seed, 20, vocabulary, scale, noise))
    found = figures(scores)
    assert found["kld_min"] >= -1e-6
    assert all(math.isfinite(value) for value in found.values())
    assert all(value >= 0 for name, value in found.items() if name.endswith("_error"))
    ordered = [found[f"kld_{name}"] for name in QUANTILES]
    assert all(high >= low or high == pytest.approx(low) for high, low in pairwise(ordered))


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.floats(0.01, 30), st.floats(-100, 100))
def test_the_same_model_loses_nothing(seed: int, scale: float, shift: float) -> None:
    base, _, targets = chunk(seed, 20, scale=scale)
    found = figures(scored((base, base, targets)))
    assert (found["ppl_ratio"], found["same_top"], found["correlation"]) == (1, 100, pytest.approx(100))
    zero = {"ln_ratio", "ln_ratio_error", "ppl_ratio_error", "ppl_difference", "ppl_difference_error", "same_top_error"}
    zero |= {name for name in found if name.startswith(("kld_", "dp_"))}
    assert {found[name] for name in zero} == {0}
    shifted = figures(scored((base, base + np.float32(shift), targets)))
    assert shifted["kld_mean"] == pytest.approx(0, abs=1e-9), "logits mean the same with anything added"


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.permutations(range(37)))
def test_the_order_of_the_vocabulary_is_of_no_matter(seed: int, order: list[int]) -> None:
    base, logits, targets = chunk(seed)
    places = np.argsort(order)
    permuted = (base[:, order], logits[:, order], places[targets])
    assert figures(scored(permuted)) == pytest.approx(figures(scored((base, logits, targets))), rel=1e-4, abs=1e-6)


def test_equal_logits_have_the_first_token_on_top() -> None:
    flat = np.zeros((20, 4), np.float32)
    later = flat.copy()
    later[:, 2] = 1
    targets = np.zeros(20, int)
    assert figures(scored((flat, flat, targets)))["same_top"] == 100
    assert figures(scored((flat, later, targets)))["same_top"] == 0


def test_few_positions_have_no_errors() -> None:
    for size in (1, 10):
        found = figures(scored(chunk(3, size)))
        names = [n for n in found if n.endswith("_error") and n != "same_top_error"]
        assert [found[name] for name in names] == [0] * len(names)
        assert found["correlation"] == 0
    assert figures(scored(chunk(3, 11)))["kld_error"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, q, t: (b, q[:, :-1], t), "a.gguf: 36 logits a token, the base has 37"),
        (lambda b, q, t: (b, np.where(q == q.max(), np.nan, q), t), "a.gguf: chunk 0 gives logits that are not finite"),
        (lambda b, q, t: (b, np.where(q == q.max(), np.inf, q), t), "a.gguf: chunk 0 gives logits that are not finite"),
        (lambda b, q, t: (b, np.where(b == b.max(), -np.inf, q), t), "a.gguf: chunk 0 gives logits that are not"),
        (lambda b, q, t: (b, 1000 * q, t), "nats, expected 300 at most; it is damaged"),
    ],
)
def test_logits_without_figures_are_refused(change: Callable, message: str) -> None:
    with pytest.raises(GgufMoeError) as caught:
        scored(change(*chunk(5)))
    assert message in str(caught.value)


def test_intervals_are_those_of_windows_drawn_anew() -> None:
    scores = scored(*(chunk(seed, noise=0.1 * (1 + seed)) for seed in range(12)))
    found = intervals(scores, 200, seed=3)
    random = np.random.default_rng(3)
    drawn = [[scores.chunks[i]["kld"] for i in random.integers(12, size=12)] for _ in range(200)]
    for name in INTERVALS:
        values = [np.quantile(np.concatenate(chunks), QUANTILES[name], method="lower") for chunks in drawn]
        assert found[f"kld_{name}"] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
        assert found[f"kld_{name}"][0] < figures(scores)[f"kld_{name}"] < found[f"kld_{name}"][1] * 1.05


def test_windows_that_differ_widen_the_intervals() -> None:
    scores = scored(*(chunk(seed, noise=0.1 * (1 + seed)) for seed in range(12)))
    mixed = Scores("b.gguf", np.split(np.random.default_rng(0).permutation(scores.positions), 12))
    assert figures(mixed) == pytest.approx(figures(scores))
    width, mixed_width = (high - low for low, high in (intervals(s, 200)["kld_median"] for s in (scores, mixed)))
    assert width > 2 * mixed_width


FILES = [
    {"name": name, "size_bytes": size, "kld_mean": kld, "ppl_ratio": ratio}
    for name, size, kld, ratio in (
        ("Q2_K", 30, 0.08, 1.09), ("Q3_K_S", 35, 0.03, 1.03), ("Q4_0", 40, 0.02, 1.001), ("Q4_K_S", 40, 0.01, 1.005),
        ("Q4_K_M", 41, 0.01, 1.004), ("Q5_0", 50, 0.02, 1.002), ("Q8_0", 80, 0.001, 1.01), ("copy", 80, 0.001, 1.01),
    )
]  # fmt: skip


def test_levels_worth_their_size() -> None:
    assert [file["name"] for file in pareto(FILES)] == ["Q2_K", "Q3_K_S", "Q4_K_S", "Q8_0", "copy"]
    assert pareto([]) == []


@pytest.mark.parametrize(
    ("limits", "name"),
    [({}, "Q2_K"), ({"max_kld": 0.02}, "Q4_K_S"), ({"max_kld": 0.03, "max_ppl_ratio": 1.004}, "Q4_0"),
     ({"max_kld": 0.01, "max_ppl_ratio": 1.004}, "Q4_K_M"), ({"max_ppl_ratio": 1.0}, None), ({"max_kld": 0}, None)],
)  # fmt: skip
def test_the_smallest_level_that_holds_the_limits(limits: dict, name: str | None) -> None:
    found = smallest(FILES, **limits)
    assert (found and found["name"]) == name
