"""Which experts a model's tokens go to, and how many go elsewhere than the base's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MEASURES = ("same_set", "same_first", "jaccard", "weight_l1")
STARVING = 0.1  # an expert starves with less than this part of an even share of tokens


class ExpertLoad:
    """How many tokens, and how much of their weight, each expert gets."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.tokens: dict[int, int] = defaultdict(int)  # by layer
        self.sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros((2, experts)))  # assignments, weights

    def add(self, layer: int, experts: Any, weights: Any) -> None:
        """Count tokens: experts and weights, each [..., used experts], arrays or tensors in main memory."""
        experts, weights = np.asarray(experts), np.asarray(weights)
        self.tokens[layer] += experts[..., 0].size
        for total, values in zip(self.sums[layer], (None, weights.ravel())):
            total += np.bincount(experts.ravel(), values, self.experts)

    def figures(self) -> dict[str, Any]:
        """By layer, and by expert where it says so:

        tokens, shares of tokens that the expert sees (a token counts for each of its experts); weights, its shares of
        all weight; variation, the coefficient of variation of the former; entropy of the former over that of an even
        load, so 1 at best; starving, pairs of layer and expert.
        """
        layers = sorted(self.sums)
        assigned = np.stack([self.sums[layer][0] for layer in layers])
        weights = np.stack([self.sums[layer][1] for layer in layers])
        parts = assigned / assigned.sum(1, keepdims=True)
        logs = np.log(parts, where=parts > 0, out=np.zeros_like(parts))
        even = np.log(self.experts) if self.experts > 1 else 1.0
        starving = np.argwhere(parts < STARVING / self.experts)
        return {
            "layers": layers,
            "tokens": (assigned / [[self.tokens[layer]] for layer in layers]).tolist(),
            "weights": (weights / weights.sum(1, keepdims=True)).tolist(),
            "variation": (parts.std(1) / parts.mean(1)).tolist(),
            "entropy": (-(parts * logs).sum(1) / even).tolist(),
            "starving": [[layers[i], int(expert)] for i, expert in starving],
        }


@dataclass
class RoutingScores:
    """A model's routing against the base's."""

    load: ExpertLoad
    sums: dict[int, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(len(MEASURES))))
    flipped: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))  # bool [positions] each

    def add(self, layer: int, base_experts: Any, base_weights: Any, experts: Any, weights: Any) -> None:
        """Compare a layer's routing of scored positions, each [..., used experts] with the likeliest expert first, in
        the order of `Scores`; arrays or tensors in main memory."""
        self.load.add(layer, experts, weights)
        base, model = (_dense(e, w, self.load.experts) for e, w in ((base_experts, base_weights), (experts, weights)))
        chosen_base, chosen = base >= 0, model >= 0
        common, all_ = (chosen_base & chosen).sum(1), (chosen_base | chosen).sum(1)
        same_set = common == all_
        same_first = np.asarray(base_experts)[..., 0] == np.asarray(experts)[..., 0]
        distance = np.abs(base.clip(0) - model.clip(0)).sum(1)
        self.sums[layer] += [same_set.sum(), same_first.sum(), (common / all_).sum(), distance.sum()]
        self.flipped[layer].append(~same_set)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is known, to be kept; `from_arrays` takes it up again."""
        layers = sorted(self.sums)
        return {
            "layers": np.array(layers),
            "tokens": np.array([self.load.tokens[layer] for layer in layers]),
            "load": np.stack([self.load.sums[layer] for layer in layers]),
            "sums": np.stack([self.sums[layer] for layer in layers]),
            "flipped": np.stack([np.concatenate(self.flipped[layer]) for layer in layers]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> RoutingScores:
        """What `arrays` has given."""
        scores = cls(ExpertLoad(arrays["load"].shape[2]))
        for i, layer in enumerate(arrays["layers"].tolist()):
            scores.load.tokens[layer], scores.load.sums[layer] = int(arrays["tokens"][i]), arrays["load"][i]
            scores.sums[layer], scores.flipped[layer] = arrays["sums"][i], [arrays["flipped"][i]]
        return scores


def _dense(experts: Any, weights: Any, count: int) -> np.ndarray:
    """The weight of every expert, -1 where a token does not go: float64 [positions, experts]."""
    experts, weights = (np.asarray(a).reshape(-1, np.shape(a)[-1]) for a in (experts, weights))
    dense = np.full((len(experts), count), -1.0)
    np.put_along_axis(dense, experts, weights.astype(np.float64), 1)
    return dense


def routing_figures(routing: RoutingScores, kld: np.ndarray) -> dict[str, Any]:
    """Figures of a model's routing by their names in reports; `kld` is the KL divergence of each position, in order.

    same_set, same_first: shares of tokens with the same experts, the same likeliest expert; jaccard: common experts
    over all; weight_l1: distance of the weights; means over layers, and `..._per_layer`. flipped: share of tokens that
    any layer sent elsewhere, and kld_on_flipped: their share of the KL divergence; per layer, those that it sent.
    """
    layers = sorted(routing.sums)
    means = np.stack([routing.sums[layer] / routing.load.tokens[layer] for layer in layers])
    flips = np.stack([np.concatenate(routing.flipped[layer]) for layer in layers])
    total = kld.sum(dtype=np.float64)
    on_flipped = (flips @ kld.astype(np.float64)) / total if total else np.zeros(len(layers))
    any_flip = flips.any(0)
    return {
        **dict(zip(MEASURES, means.mean(0).tolist())),
        **{f"{name}_per_layer": values for name, values in zip(MEASURES, means.T.tolist())},
        "flipped": float(any_flip.mean()),
        "kld_on_flipped": float(kld[any_flip].sum(dtype=np.float64) / total) if total else 0.0,
        "kld_on_flipped_per_layer": on_flipped.tolist(),
        "load": routing.load.figures(),
    }
