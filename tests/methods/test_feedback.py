"""Codes with error feedback are the textbook's, which works densely, a column at a time, on ggml's own blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import families
import numpy as np
import oracle
import pytest
import torch
from checkpoints import MERGE, read_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import Textbook, best_of_each_group

import quant
from gguf_moe.methods import feedback, moments
from gguf_moe.methods.feedback import Encoded, _nearest, best_rows, feed_back, plain
from gguf_moe.methods.moments import Factor, Moments

KQUANTS = tuple(kind for kind in quant.CODED if quant.FORMATS[kind].block_length == 256)
SHORT = tuple(kind for kind in quant.CODED if quant.FORMATS[kind].block_length == 32)
CASES = [*((kind, 512) for kind in KQUANTS), *((kind, 96) for kind in SHORT), *((kind, 352) for kind in SHORT)]
IMPORTANCES = ("none", "alone", "given later")


@pytest.fixture(params=sorted({"numpy", quant.BACKENDS[-1]}))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of the codecs during the test: NumPy, or the best."""
    quant.use_backend(request.param)
    yield request.param
    quant.use_backend(None)


@cache
def real_weights(rows: int, columns: int) -> np.ndarray:
    """Of a down projection of the bundled merge: float32 [rows, columns]."""
    for file in sorted(MERGE.glob("*.safetensors")):
        for name, (_, bits) in read_safetensors(file).items():
            if name.endswith("layers.1.mlp.experts.down_proj"):
                return (bits[0, :rows, :columns].astype(np.uint32) << 16).view(np.float32)
    raise AssertionError("no down projection")


@cache
def inputs(columns: int, tokens: int = 1500) -> np.ndarray:
    """Inputs that lie mostly in a few directions, with some large columns, as real ones: float32 [tokens, columns]."""
    rng = np.random.default_rng(columns)
    rank = columns // 8
    x = rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, columns)) / np.sqrt(rank)
    x += 0.3 * rng.normal(size=x.shape)
    return (x * rng.lognormal(0, 0.7, columns)).astype(np.float32)


def made(x: np.ndarray, damping: float = 0.01) -> tuple[Factor, np.ndarray]:
    """The factor of inputs, and their moments with the damping, float64."""
    held = Moments(x.shape[1], torch.device("cpu"))
    held.add(torch.from_numpy(x))
    lower = np.tril(held.square.values.double().numpy())
    h = lower + np.tril(lower, -1).T
    factor = held.factor(damping)
    return factor, h + factor.damping * np.diag(h).mean() * np.eye(len(h))


def true_loss(data: np.ndarray, kind: str, weights: np.ndarray, h: np.ndarray) -> np.ndarray:
    """tr(D H Dᵀ) of each row of what ggml reads in the bytes."""
    d = oracle.load("libggml-python").dequantize(data, kind) - weights.astype(np.float64)
    return ((d @ h) * d).sum(1)


def fed_back(weights: np.ndarray, factor: Factor, kind: str, *importances: np.ndarray | None) -> Encoded:
    return feed_back(torch.from_numpy(weights), factor, kind, importances)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize(("kind", "columns"), CASES)
def test_blocks_are_the_textbooks(kind: str, columns: int, importance: str) -> None:
    """Every code is the nearest to what the textbook has by then, every block's scales are ggml's for it. float32 may
    change a code in a tie; and of later blocks scales that a search finds, which in Q5_K the last digit of weights
    often does: one block in eight has others."""
    weights = real_weights(24, columns)
    factor, h = made(inputs(columns))
    chosen = dict(zip(IMPORTANCES, (None, *factor.importances())))[importance]
    data, loss = fed_back(weights, factor, kind, chosen)
    assert data.shape == (24, quant.FORMATS[kind].row_bytes(columns))
    book = Textbook(kind)
    book.follow(weights, h, chosen, data)
    blocks = weights.size // quant.FORMATS[kind].block_length
    assert book.other_scales[0] == 0
    assert sum(book.other_scales) <= blocks * (0.25 if kind in KQUANTS else 0.02)
    assert book.other_codes <= 0.0005 * weights.size
    assert np.allclose(loss, book.loss, rtol=3e-4, atol=0)
    assert np.allclose(loss, true_loss(data, kind, weights, h), rtol=3e-4, atol=0)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("precise", [moments.PRECISE, 0])
def test_losses_are_true_of_singular_moments(monkeypatch: pytest.MonkeyPatch, precise: int, tokens: int) -> None:
    monkeypatch.setattr(moments, "PRECISE", precise)
    factor, h = made(inputs(512)[:tokens])
    for kind in quant.CODED:
        data, loss = fed_back(real_weights(12, 512), factor, kind, None)
        assert np.allclose(loss, true_loss(data, kind, real_weights(12, 512), h), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K"])
def test_feedback_loses_much_less_than_the_plain_encoder(kind: str) -> None:
    weights = real_weights(64, 512)
    factor, _ = made(inputs(512))
    importance = factor.importances()[0]
    _, loss = fed_back(weights, factor, kind, importance)
    assert loss.sum() <= 0.7 * plain(torch.from_numpy(weights), factor, kind, importance)[1].sum()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows_of_a_part", [feedback.PART_ROWS, 4])
@pytest.mark.parametrize("kind", quant.CODED)
def test_each_group_has_the_best_of_several_ways(
    kind: str, rows_of_a_part: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows in one part, or in two that run beside each other."""
    monkeypatch.setattr(feedback, "PART_ROWS", rows_of_a_part)
    weights = real_weights(9, 512)
    factor, h = made(inputs(512))
    ways = [*factor.importances(), None]
    data, loss = fed_back(weights, factor, kind, *ways)
    assert np.allclose(loss, true_loss(data, kind, weights, h), rtol=3e-4, atol=0)
    assert np.allclose(loss, best_of_each_group(weights, h, kind, ways), rtol=2e-3, atol=0)
    assert all(loss.sum() <= fed_back(weights, factor, kind, way)[1].sum() * (1 + 1e-4) for way in ways)


@pytest.mark.parametrize("kind", quant.CODED)
def test_rows_are_independent(kind: str) -> None:
    """What other rows hold, NaN even, changes no bit of a row. Fewer rows, or one, give what the textbook gives: not
    always the same bits, since products of matrices of another size may be rounded otherwise."""
    weights = real_weights(40, 512)
    factor, h = made(inputs(512))
    data, loss = fed_back(weights, factor, kind, None)
    changed = weights * np.float32(-300)
    changed[30] = np.nan
    kept = [0, 5, 6, 21, 39]
    changed[kept] = weights[kept]
    among_others, loss_among_others = fed_back(changed, factor, kind, None)
    assert np.array_equal(among_others[kept], data[kept])
    assert np.array_equal(loss_among_others[kept], loss[kept])
    for rows in ([7], kept):
        alone, loss_alone = fed_back(weights[rows], factor, kind, None)
        book = Textbook(kind)
        book.follow(weights[rows], h, None, alone)
        assert np.allclose(loss_alone, book.loss, rtol=3e-4, atol=0)


@pytest.mark.parametrize("kind", quant.CODED)
def test_backends_give_the_same(kind: str, backend: str) -> None:
    weights = real_weights(6, 512)
    factor, h = made(inputs(512))
    data, loss = fed_back(weights, factor, kind, factor.importances()[0])
    quant.use_backend(None)
    best, _ = fed_back(weights, factor, kind, factor.importances()[0])
    assert np.array_equal(data, best)
    assert np.allclose(loss, true_loss(data, kind, weights, h), rtol=3e-4, atol=0)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", quant.CODED)
def test_plain_is_ggmls_encoder(kind: str, importance: str, backend: str) -> None:
    weights = real_weights(9, 512)
    factor, h = made(inputs(512))
    chosen = dict(zip(IMPORTANCES, (None, *factor.importances())))[importance]
    data, loss = plain(torch.from_numpy(weights), factor, kind, chosen)
    assert np.array_equal(data, oracle.load("libggml-python").quantize(weights, kind, chosen))
    assert np.allclose(loss, true_loss(data, kind, weights, h), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", quant.CODED)
def test_rows_of_zeros_have_codes_of_zero(kind: str) -> None:
    """... and those so small that float16 has no scale for them; others beside them have their own."""
    weights = real_weights(6, 512).copy()
    factor, h = made(inputs(512))
    usual, _ = fed_back(weights, factor, kind, None)
    weights[2], weights[4] = 0, 1e-12
    for way in (None, *factor.importances()):
        data, loss = fed_back(weights, factor, kind, way)
        assert np.array_equal(data[[2, 4]], quant.with_codes(data[[2, 4]], kind, 0))
        assert not oracle.load("libggml-python").dequantize(data[[2, 4]], kind).any()
        assert loss[2] == 0
        assert np.allclose(loss, true_loss(data, kind, weights, h), rtol=3e-4, atol=0)
        if way is None:
            assert np.array_equal(data[[0, 1, 3, 5]], usual[[0, 1, 3, 5]])


@pytest.mark.parametrize("kind", quant.CODED)
def test_dead_inputs_do_no_harm(kind: str) -> None:
    """Columns whose input is always zero: some alone, and a whole group, whose importance is zero throughout."""
    weights, x = real_weights(6, 512), inputs(512).copy()
    x[:, :256] = x[:, [300, 301, 511]] = 0
    factor, h = made(x)
    usual = plain(torch.from_numpy(weights), factor, kind, None)
    ways = [*factor.importances(), None]
    for some in ([ways[0]], [ways[1]], [None], ways):
        data, loss = fed_back(weights, factor, kind, *some)
        assert np.isfinite(quant.dequantize(data, kind)).all()
        assert np.allclose(loss, true_loss(data, kind, weights, h), rtol=3e-4, atol=0)
    assert (loss < usual[1]).all()


@pytest.mark.parametrize("kind", quant.CODED)
def test_scales_of_either_sign_occur_and_the_nearest_code_is_found_by_each(kind: str) -> None:
    """Q4_0, Q5_0, Q3_K, Q6_K and the IQ4 have negative steps, by which values fall as codes rise."""
    weights = real_weights(24, 512)
    step, offset = quant.grid(quant.quantize(weights, kind), kind)
    assert (step > 0).any()
    assert (step < 0).any() == (kind in ("Q4_0", "Q5_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"))
    check_nearest(weights.ravel(), step.ravel(), offset.ravel(), kind)


def check_nearest(w: np.ndarray, step: np.ndarray, offset: np.ndarray, kind: str) -> None:
    """Assert that codes are nearest, by brute force in float64, but for what float32 has no digits for."""
    levels = quant.levels(kind)
    codes, values = _nearest(*map(torch.from_numpy, (w, step, offset, levels)))
    all_values = offset.astype(np.float64) + step.astype(np.float64) * levels.astype(np.float64)[:, None]
    miss = np.abs(all_values - w)  # [codes, weights]
    digits = 1e-6 * (np.abs(offset) + np.abs(w) + np.abs(step) * np.abs(levels).max())
    assert (miss[codes.numpy(), np.arange(len(w))] <= miss.min(0) + digits).all()
    assert (np.abs(values.numpy() - all_values[codes.numpy(), np.arange(len(w))]) <= digits).all()
    assert not codes.numpy()[step == 0].any()


FLOATS = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(quant.CODED), st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=8))
def test_the_nearest_code_is_found_by_any_step(kind: str, cases: list[tuple[float, float, float]]) -> None:
    check_nearest(*np.array(cases, np.float32).T.copy(), kind)


def test_rows_are_those_of_the_least_loss() -> None:
    """The first among equals; what is no finite number never wins."""
    data = [quant.quantize(real_weights(7, 256) * factor, "Q4_K") for factor in (1, 2, 3)]
    nan, inf = np.nan, np.inf
    losses = [[1, 2, 3, nan, inf, nan, 0], [1, 1, 2, 5, 1e300, inf, 0], [1, 1, 1, 4, nan, 7, 0]]
    given_losses = [np.array(loss, np.float64) for loss in losses]
    best, chosen = best_rows(list(zip(data, given_losses)), "Q4_K")
    assert chosen.tolist() == [0, 1, 2, 2, 1, 2, 0]
    for row, number in enumerate(chosen):
        assert np.array_equal(best[row], data[number][row])
    assert np.array_equal(given_losses, losses, equal_nan=True)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", quant.CODED)
def test_a_scale_that_is_not_finite_spoils_its_row_alone(kind: str, bad: float) -> None:
    form = quant.FORMATS[kind]
    weights = real_weights(3, 512)
    first, second = (quant.quantize(weights, kind), quant.quantize(weights * 2, kind))
    for name in form.scale_fields:
        spoiled = first.copy()
        spoiled.view(form.dtype)[name][1, -1] = bad
        best, chosen = best_rows([(spoiled, np.zeros(3)), (second, np.ones(3))], kind)
        assert chosen.tolist() == [0, 1, 0]
        assert np.array_equal(best, np.stack([first[0], second[1], first[2]]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", quant.CODED)
def test_no_row_is_worse_than_plain(kind: str) -> None:
    """Whatever the weights are, those known to break encoders too."""
    columns = families.COLUMNS
    weights = np.concatenate([families.draw(name, 3, 4) for name in families.FAMILIES])
    factor, h = made(inputs(columns))
    usual = plain(torch.from_numpy(weights), factor, kind, None)
    candidates = [fed_back(weights, factor, kind, None, *factor.importances()), usual]
    data, chosen = best_rows(candidates, kind)
    with np.errstate(all="ignore"):
        found = true_loss(data, kind, weights, h)
    fine = np.isfinite(usual[1])
    told = np.stack([loss for _, loss in candidates])[chosen, np.arange(len(chosen))]
    digits = np.finfo(np.float32).eps * np.abs(weights).max(1) * np.sqrt(np.trace(h))  # what a row is held with
    assert fine.sum() >= 0.8 * len(fine)
    assert (np.sqrt(found) <= np.sqrt(usual[1]) * (1 + 5e-4) + digits)[fine].all()
    assert (np.abs(np.sqrt(found) - np.sqrt(told)) <= np.sqrt(found) * 5e-4 + digits)[fine].all()
    assert len(set(chosen[fine])) > 1
