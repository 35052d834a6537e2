"""Moments and their factor are what plain linear algebra in float64 makes of the tokens, however they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_moe.methods import moments
from gguf_moe.methods.moments import Factor, Moments

CPU = torch.device("cpu")
PANEL = 64
WAYS = ("float64", "float64 in panels", "float32 in panels", "mapped")
Make = Callable[[int], Moments]


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Moments of so many columns, without tokens, kept in each of the ways."""
    if request.param != "float64":
        monkeypatch.setattr(moments, "PANEL", PANEL)
    if request.param == "float32 in panels":
        monkeypatch.setattr(moments, "PRECISE", 0)
    return lambda columns: Moments(columns, CPU, tmp_path / "moments" if request.param == "mapped" else None)


def correlated(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    """Tokens that lie mostly in a few directions, in columns of different sizes: float32 [tokens, columns]."""
    rng = np.random.default_rng([seed, tokens, columns])
    rank = 1 + columns // 8
    x = rng.normal(size=(tokens, rank)) @ rng.normal(size=(rank, columns)) / np.sqrt(rank)
    x += 0.3 * rng.normal(size=x.shape)
    return (x * rng.lognormal(0, 0.5, columns)).astype(np.float32)


def filled(make: Make, x: np.ndarray) -> tuple[Moments, np.ndarray]:
    """Moments of tokens, and the same as float64; of two halves that rounding made differ, the lower."""
    held = make(x.shape[1])
    held.add(torch.from_numpy(x))
    lower = np.tril(held.square.values.double().numpy())
    return held, lower + np.tril(lower, -1).T


def damped(h: np.ndarray, damping: float) -> np.ndarray:
    return h + damping * np.diag(h).mean() * np.eye(len(h))


def tolerance(factor: Factor) -> float:
    return 1e-10 if factor.square.values.dtype == torch.float64 else 3e-5


def check(factor: Factor, h: np.ndarray) -> None:
    """Assert that it is the factor of h with the damping it tells."""
    m = np.triu(factor.square.values.double().numpy())
    want = damped(h, factor.damping)
    scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
    assert (np.abs(m @ m.T - want) <= tolerance(factor) * scale).all()
    assert (np.diag(m) > 0).all()
    assert np.array_equal(factor.diagonal.numpy(), np.diag(h).astype(np.float32))


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_moments_are_the_weighed_sum_of_outer_products(make: Make, columns: int) -> None:
    held, want, sizes = make(columns), np.zeros((columns, columns)), np.zeros((columns, columns))
    for seed, (tokens, weight) in enumerate([(40, 1.0), (0, 1.0), (7, 0.125), (1, 3.0)]):
        x = correlated(tokens, columns, seed)
        held.add(torch.from_numpy(x), weight)
        want += weight * x.T.astype(np.float64) @ x
        sizes += weight * np.abs(x.T).astype(np.float64) @ np.abs(x)
    assert (np.abs(np.tril(held.square.values.numpy() - want)) <= 3e-6 * sizes).all()


def test_a_token_weighs_one_where_nothing_is_said_and_may_be_of_half_precision(make: Make) -> None:
    x = torch.from_numpy(correlated(9, 70)).bfloat16()
    once = make(70)
    once.add(x)
    result = once.square.values.clone()
    again = make(70)
    again.add(x.float(), 1.0)
    assert torch.equal(again.square.values, result)


@pytest.mark.parametrize("columns", [1, 64, 65, 200])
def test_the_factor_and_its_inverse_are_those_of_dense_algebra(make: Make, columns: int) -> None:
    held, h = filled(make, correlated(3 * columns, columns))
    factor = held.factor(0.01)
    assert factor.damping == 0.01
    check(factor, h)
    u = np.linalg.cholesky(np.linalg.inv(damped(h, 0.01))).T  # H^-1 = Uᵀ U
    for start, stop in [(0, columns), (0, 1), (63, 65), (64, 128), (100, 150), (columns - 1, columns)]:
        if 0 <= start < stop <= columns:
            rows = factor.inverse_rows(start, stop)
            assert rows.shape == (stop - start, columns - start)
            bound = 1e-9 if rows.dtype == torch.float64 else 2e-3
            assert np.abs(rows.numpy() - u[start:stop, start:]).max() <= bound * np.abs(u).max()


def test_what_is_mapped_lies_in_its_file_and_equals_what_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(moments, "PANEL", PANEL)
    monkeypatch.setattr(moments, "PRECISE", 0)
    columns, x = 150, torch.from_numpy(correlated(300, 150))
    kept = {path: Moments(columns, CPU, path) for path in (None, tmp_path / "moments")}
    for held in kept.values():
        held.add(x)
    inside, mapped = (held.factor(0.01) for held in kept.values())
    in_file = np.fromfile(tmp_path / "moments", np.float32).reshape(columns, columns)
    assert np.array_equal(np.triu(in_file), mapped.square.values.triu().numpy())
    assert np.allclose(in_file, inside.square.values.numpy(), rtol=1e-5, atol=1e-5)
    difference = torch.from_numpy(correlated(5, columns, seed=1))
    assert np.allclose(inside.errors(difference), mapped.errors(difference), rtol=1e-5)
    assert np.allclose(inside.inverse_rows(70, 90).numpy(), mapped.inverse_rows(70, 90).numpy(), rtol=1e-4, atol=1e-5)


def test_without_tokens_they_are_the_unit_matrix(make: Make) -> None:
    held = make(100)
    held.add(torch.empty(0, 100))
    factor = held.factor(0.01)
    check(factor, np.eye(100))
    d = torch.from_numpy(correlated(3, 100))
    assert np.allclose(factor.errors(d), 1.01 * d.double().square().sum(1).numpy())
    assert np.allclose(factor.inverse_rows(30, 70).numpy(), np.eye(100)[30:70, 30:] / np.sqrt(1.01))
    assert np.allclose(factor.importances(), [[1.0] * 100, [1.01] * 100])


def awkward(name: str) -> np.ndarray:
    """Tokens whose moments are singular, or almost: float32 [tokens, 150]."""
    x = correlated(300, 150)
    if name == "fewer tokens than columns":
        return x[:20]
    if name == "one token":
        return x[:1]
    if name == "constant columns":
        x[:, [3, 70, 149]] = 2.5
    if name == "equal columns":
        x[:, 1::2] = x[:, 0::2]
    if name == "dead columns":
        x[:, 60:140] = 0
    if name == "columns of very different sizes":
        x *= np.logspace(-9, 6, 150, dtype=np.float32)
    if name == "tiny":
        x *= np.float32(1e-16)
    if name == "huge":
        x *= np.float32(1e16)
    return x


AWKWARD = (
    "fewer tokens than columns",
    "one token",
    "constant columns",
    "equal columns",
    "dead columns",
    "columns of very different sizes",
    "tiny",
    "huge",
)


@pytest.mark.parametrize("name", AWKWARD)
def test_singular_moments_have_a_factor_by_their_damping(make: Make, name: str) -> None:
    held, h = filled(make, awkward(name))
    factor = held.factor(0.01)
    assert factor.damping == 0.01
    check(factor, h)
    assert factor.inverse_rows(0, 150).isfinite().all()


@pytest.mark.parametrize("name", ["fewer tokens than columns", "one token", "equal columns"])
def test_too_little_damping_grows_tenfold_as_far_as_needed(make: Make, name: str) -> None:
    held, h = filled(make, awkward(name))
    factor = held.factor(1e-30)
    times = np.log10(factor.damping / 1e-30)
    assert abs(times - round(times)) < 1e-9
    assert times > 9.5
    check(factor, h)
    lowest, *_, highest = np.linalg.eigvalsh(damped(h, factor.damping / 10))
    eps = torch.finfo(factor.square.values.dtype).eps
    assert lowest < 10 * len(h) * eps * highest


def test_small_damping_is_not_lost_beside_the_moments(make: Make) -> None:
    """What is added to float64 moments is not rounded to float32, which has no digits for it."""
    held, h = filled(make, correlated(600, 150))
    factor = held.factor(1e-9)
    check(factor, h)
    assert factor.damping == 1e-9


def test_growing_begins_from_the_moments_as_they_were(make: Make) -> None:
    """Not positive definite before a damping of 0.5, as only the first columns tell, which are factored last."""
    held, h = filled(make, correlated(600, 150))
    h[:2] = h[:, :2] = 0
    h[0, 0] = h[1, 1] = np.diag(h)[2:].mean()
    h[0, 1] = h[1, 0] = 1.5 * h[0, 0]
    h = h.astype(np.float32).astype(np.float64)
    held.square.values.copy_(torch.from_numpy(h))
    factor = held.factor(0.01)
    assert factor.damping == 1.0
    check(factor, h)


@pytest.mark.parametrize(("lowest", "damping"), [(-0.5, 1.0), (-50, 100.0), (-5e5, None)])
def test_damping_grows_to_a_limit(make: Make, lowest: float, damping: float | None) -> None:
    held = make(70)
    h = np.eye(70)
    h[0, 69] = h[69, 0] = 1 - lowest
    held.square.values.copy_(torch.from_numpy(h))
    if damping is None:
        with pytest.raises(AssertionError, match=r"^moments of finite inputs are positive definite when damped so "):
            held.factor(0.01)
    else:
        factor = held.factor(0.01)
        assert factor.damping == pytest.approx(damping)
        check(factor, h)


def test_a_factor_is_float64_up_to_a_width_and_else_takes_the_place_of_its_moments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(moments, "PRECISE", 70)
    for columns, path, precise in [(70, None, True), (71, None, False), (71, tmp_path / "moments", False)]:
        held = Moments(columns, CPU, path)
        held.add(torch.from_numpy(correlated(9, columns)))
        factor = held.factor(0.01)
        assert (factor.square.values.dtype == torch.float64) == precise
        assert (factor.square is held.square) != precise
        assert (factor.square.file is None) == (path is None)


def test_moments_that_are_not_finite_are_refused(make: Make) -> None:
    held, _ = filled(make, np.full((2, 70), np.nan, np.float32))
    with pytest.raises(AssertionError, match=r"^moments of finite inputs are positive definite when damped so much$"):
        held.factor(0.01)


@pytest.mark.parametrize("name", ["", *AWKWARD])
def test_errors_are_what_outputs_change_by(make: Make, name: str) -> None:
    x = awkward(name)
    held, h = filled(make, x)
    factor = held.factor(0.01)
    d = np.random.default_rng(4).normal(size=(6, 150)).astype(np.float32)
    d[5] = 0
    d[4, :149] = 0
    outputs = ((d.astype(np.float64) @ x.T.astype(np.float64)) ** 2).sum(1)
    damping = 0.01 * np.diag(h).mean() * (d.astype(np.float64) ** 2).sum(1)
    found = factor.errors(torch.from_numpy(d))
    assert found.dtype == np.float64
    assert np.allclose(found, outputs + damping, rtol=1e-4, atol=0)
    assert np.allclose(found, np.einsum("rc,cd,rd->r", d, damped(h, 0.01), d, dtype=np.float64), rtol=1e-4, atol=0)


def test_importances_are_the_variances_of_columns_alone_and_given_later_ones(make: Make) -> None:
    held, h = filled(make, correlated(600, 150))
    factor = held.factor(0.01)
    alone, given_later = factor.importances()
    assert alone.dtype == given_later.dtype == np.float32
    assert np.array_equal(alone, np.diag(h).astype(np.float32))
    wanted = damped(h, 0.01)
    for j in range(150):  # the residual of the regression of column j on those after it
        later = wanted[j + 1 :, j + 1 :]
        explained = wanted[j, j + 1 :] @ np.linalg.solve(later, wanted[j + 1 :, j]) if len(later) else 0.0
        assert given_later[j] == pytest.approx(wanted[j, j] - explained, rel=1e-3)
    assert given_later[70] == pytest.approx(float(factor.inverse_rows(70, 71)[0, 0]) ** -2, rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 60), st.floats(1e-6, 10), st.integers(0, 1 << 20))
def test_every_size_of_panel_gives_the_same(columns: int, panel: int, tokens: int, damping: float, seed: int) -> None:
    x = correlated(tokens, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "PANEL", panel)
        held, h = filled(lambda n: Moments(n, CPU), x)
        factor = held.factor(damping)
        check(factor, h if tokens else np.eye(columns))
        m = factor.square.values.triu()
        start, stop = sorted(np.random.default_rng(seed).integers(0, columns + 1, 2).tolist())
        product = factor.inverse_rows(start, stop) @ m[start:, start:]
        assert torch.allclose(product, torch.eye(columns, dtype=m.dtype)[start:stop, start:], atol=1e-7)
        d = torch.from_numpy(correlated(3, columns, seed + 1))
        assert np.allclose(factor.errors(d), (d.double() @ m).square().sum(1).numpy())
