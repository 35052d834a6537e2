"""A model's forward pass in parts: embedding, one layer, logits. For every architecture that `convert` knows.

By GGUF names, so that one pass serves checkpoints and GGUF files. Norms, router and logits are float32 whatever the
dtype of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from gguf_moe.arch.rope import Rope
from gguf_moe.evaluation.events import Routing
from gguf_moe.evaluation.hyper import Hyper, read_hyper
from gguf_moe.evaluation.layer import Layer, Observer, Rotation, normalized
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.weights import Weights

PANEL_WEIGHTS = 1 << 24  # of the output matrix that are in memory at once
BETA_FAST, BETA_SLOW = 32, 1  # YaRN's: turns within the original context, above and below which waves are short, long


@dataclass(frozen=True)
class Model:
    """A model that can be run layer by layer. Holds no weights."""

    hyper: Hyper
    weights: Weights

    def embed(self, windows: np.ndarray) -> torch.Tensor:
        """The hidden states [chunks, context, hidden] before the first layer, of token ids [chunks, context]."""
        shape = (*windows.shape, self.hyper.facts.hidden)
        hidden = torch.empty(shape, dtype=self.weights.dtype, device=self.weights.device)
        for states, window in zip(hidden, windows):
            states[:] = self.weights.gather("token_embd.weight", window)
        return hidden

    def rotation(self, context: int) -> Rotation:
        """The rotary embedding of the first `context` positions."""
        facts, name = self.hyper.facts, "rope_freqs.weight"
        divisors = self.weights.vector(name).cpu().double() if name in self.weights else 1.0
        frequencies, magnitude = _scaled(facts.rope, facts.head_size, divisors)
        angles = torch.arange(context, dtype=torch.float64)[:, None, None] * frequencies
        cosine, sine = ((f(angles) * magnitude).float().to(self.weights.device) for f in (torch.cos, torch.sin))
        return Rotation(cosine, sine, self.hyper.rotates_neighbours)

    def run_layer(
        self, layer: int, hidden: torch.Tensor, rotation: Rotation, observe: Observer | None = None
    ) -> Routing | None:
        """Run the hidden states [chunks, context, hidden] through a layer, in place. Returns the routing [chunks,
        context, used experts] of a layer that has experts."""
        return Layer(self.hyper, self.weights, layer, observe).run(hidden, rotation)

    def last_input(self, hidden: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The matrix that gives the logits, and its input, of the last layer's hidden states [positions, hidden]."""
        name = "output.weight" if "output.weight" in self.weights else "token_embd.weight"
        return name, normalized(hidden, self.weights.vector("output_norm.weight"), self.hyper.facts.norm_epsilon)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [positions, vocabulary], of the last layer's hidden states [positions, hidden]."""
        name, x = self.last_input(hidden)
        vocabulary = self.hyper.facts.vocabulary
        logits = torch.empty(len(x), vocabulary, device=x.device)
        height = panel_rows(self.hyper)
        for start in range(0, vocabulary, height):
            stop = min(start + height, vocabulary)
            logits[:, start:stop] = F.linear(x, self.weights.matrix(name, rows=range(start, stop)))
        return logits


def load_model(source: ModelSource, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """A model to be run. Raises GgufMoeError where it is none that the forward pass knows."""
    return Model(read_hyper(source), Weights(source, torch.device(device), dtype))


def panel_rows(hyper: Hyper) -> int:
    """Rows of the output matrix that are in memory at once."""
    return min(hyper.facts.vocabulary, max(1, PANEL_WEIGHTS // hyper.facts.hidden))


def _scaled(rope: Rope, size: int, divisors: torch.Tensor | float) -> tuple[torch.Tensor, float]:
    """Rotary frequencies, float64 [head size / 2], and the factor of sine and cosine."""
    pair = torch.arange(0, size // 2, dtype=torch.float64)
    frequencies = rope.theta ** (-2 * pair / size) / divisors
    factor = rope.values["factor"]
    if rope.kind == "linear":
        return frequencies / factor, 1.0
    if rope.kind != "yarn":
        return frequencies, 1.0

    def pair_with(turns: int) -> float:
        """The pair that turns so often in the original context."""
        positions = rope.values["original_max_position_embeddings"]
        return size * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = max(math.floor(pair_with(BETA_FAST)), 0), min(math.ceil(pair_with(BETA_SLOW)), size - 1)
    long = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - long + long / factor), 0.1 * math.log(max(factor, 1.0)) + 1
