"""Routing figures are what plain counting says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_moe.evaluation.routing import MEASURES, ExpertLoad, RoutingScores, routing_figures

LAYERS = (1, 2, 5)  # the others are dense


def routed(seed: int, chunks: int, tokens: int, experts: int, used: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights [chunks, tokens, used], the likeliest first."""
    p = np.random.default_rng(seed).dirichlet(np.full(experts, 0.5), size=(chunks, tokens))
    order = np.argsort(-p, -1)[..., :used]
    weights = np.take_along_axis(p, order, -1)
    return order, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def compared(experts: int, used: int, seed: int = 0) -> tuple[RoutingScores, dict]:
    """The scores of random routings in two sweeps, and those by layer as plain lists of tokens."""
    scores, told = RoutingScores(ExpertLoad(experts)), {layer: [] for layer in LAYERS}
    for sweep, chunks in enumerate((3, 2)):
        for layer in LAYERS:
            base, model = (routed(seed + 100 * sweep + 10 * layer + i, chunks, 7, experts, used) for i in (0, 1))
            scores.add(layer, *base, *model)
            flat = [part.reshape(-1, used).tolist() for part in (*base, *model)]
            told[layer] += list(zip(*flat))
    return scores, told


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 1 << 20))
def test_figures_are_those_of_plain_counting(sizes: tuple[int, int], seed: int) -> None:
    experts, used = sizes
    scores, told = compared(experts, used, seed)
    kld = np.random.default_rng(seed).exponential(size=35).astype(np.float32)
    found = routing_figures(scores, kld)
    flips = []
    for at, layer in enumerate(LAYERS):
        sums, flipped = dict.fromkeys(MEASURES, 0.0), []
        for base_experts, base_weights, ids, weights in told[layer]:
            ours, theirs = dict(zip(base_experts, base_weights)), dict(zip(ids, weights))
            sums["same_set"] += ours.keys() == theirs.keys()
            sums["same_first"] += base_experts[0] == ids[0]
            sums["jaccard"] += len(ours.keys() & theirs.keys()) / len(ours.keys() | theirs.keys())
            sums["weight_l1"] += sum(abs(ours.get(e, 0) - theirs.get(e, 0)) for e in range(experts))
            flipped.append(ours.keys() != theirs.keys())
        flips.append(flipped)
        for name in MEASURES:
            assert found[f"{name}_per_layer"][at] == pytest.approx(sums[name] / 35)
        on_flipped = sum(k for k, flip in zip(kld.tolist(), flipped) if flip) / kld.sum()
        assert found["kld_on_flipped_per_layer"][at] == pytest.approx(on_flipped, abs=1e-6)
    for name in MEASURES:
        assert found[name] == pytest.approx(sum(found[f"{name}_per_layer"]) / 3)
    any_flip = [any(token) for token in zip(*flips)]
    assert found["flipped"] == pytest.approx(sum(any_flip) / 35)
    assert found["kld_on_flipped"] == pytest.approx(kld[any_flip].sum() / kld.sum(), abs=1e-6)


@pytest.mark.parametrize(("experts", "used"), [(4, 2), (1, 1), (8, 8)])
def test_load_is_that_of_plain_counting(experts: int, used: int) -> None:
    scores, told = compared(experts, used)
    load = routing_figures(scores, np.ones(35, np.float32))["load"]
    assert load["layers"] == list(LAYERS)
    for at, layer in enumerate(LAYERS):
        seen, weight = [0] * experts, [0.0] * experts
        for _, _, ids, weights in told[layer]:
            for e, w in zip(ids, weights):
                seen[e], weight[e] = seen[e] + 1, weight[e] + w
        assert load["tokens"][at] == pytest.approx([n / 35 for n in seen])
        assert sum(load["tokens"][at]) == pytest.approx(used)
        assert load["weights"][at] == pytest.approx([w / 35 for w in weight])
        parts = np.array(seen) / sum(seen)
        assert load["variation"][at] == pytest.approx(np.std(parts) * experts)
        if experts > 1:
            assert load["entropy"][at] == pytest.approx(-sum(p * np.log(p) for p in parts if p) / np.log(experts))


def test_the_same_routing_agrees_in_everything() -> None:
    scores, routing = RoutingScores(ExpertLoad(4)), routed(0, 2, 9, 4, 2)
    scores.add(0, *routing, *routing)
    found = routing_figures(scores, np.zeros(18, np.float32))
    assert [found[name] for name in MEASURES] == [1, 1, 1, 0]
    assert (found["flipped"], found["kld_on_flipped"], found["kld_on_flipped_per_layer"]) == (0, 0, [0])


def test_even_and_uneven_load() -> None:
    load = ExpertLoad(4)
    load.add(0, [[0, 1], [2, 3]], [[0.5, 0.5], [0.75, 0.25]])
    load.add(3, [[2], [2]], [[1.0], [1.0]])
    found = load.figures()
    assert (found["entropy"], found["variation"]) == ([1, 0], [0, pytest.approx(3**0.5)])
    assert found["tokens"] == [[0.5] * 4, [0, 0, 1, 0]]
    assert found["weights"] == [[0.25, 0.25, 0.375, 0.125], [0, 0, 1, 0]]
    assert found["starving"] == [[3, 0], [3, 1], [3, 3]]


def test_a_model_that_uses_more_experts_than_its_base() -> None:
    scores = RoutingScores(ExpertLoad(4))
    scores.add(0, [[0, 1]], [[0.5, 0.5]], [[0, 1, 2]], [[0.5, 0.25, 0.25]])
    found = routing_figures(scores, np.ones(1, np.float32))
    assert (found["same_set"], found["same_first"], found["jaccard"], found["weight_l1"]) == (0, 1, 2 / 3, 0.5)
