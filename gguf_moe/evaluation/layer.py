"""One layer, on all chunks of a sweep at once, an expert at a time.

Each matrix is made once, used for all its tokens in pieces, and dropped: what is in memory beside the hidden states
is the attention's matrices, or those of one expert, and what a piece of tokens needs in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it

from gguf_moe.evaluation.events import Routing
from gguf_moe.evaluation.hyper import Hyper
from gguf_moe.evaluation.weights import Weights

PIECE_TOKENS = 1024  # pass a matrix at once: enough to keep a processor busy, few enough to bound what is in between
MIN_WEIGHT_SUM = 2.0**-14  # llama.cpp's, where it scales the used experts' weights to a sum of 1
PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output")

Rows = slice | torch.Tensor  # which of a sweep's tokens, counted over all of its chunks


class Observer(Protocol):
    """Who sees the inputs of matrix products."""

    shown: slice | None  # tokens that every expert is shown beside those that it is sent; the model computes the same

    def route(self, probabilities: torch.Tensor, rows: Rows) -> None:
        """Take a router's probabilities of tokens, float32 [rows, experts], before the layer's experts run."""

    def see(self, names: tuple[str, ...], x: torch.Tensor, rows: Rows, expert: int | None, own: bool) -> None:
        """Take the input x [rows, columns] of matrices, or of one expert's in stacks. own: not one of `shown`."""


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding: float32 [context, 1, head size / 2] of the angles of each pair."""

    cosine: torch.Tensor
    sine: torch.Tensor
    neighbours: bool  # pairs are neighbours in a head, instead of one from each half

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """[chunks, context, heads, size], each pair turned by its angle. The pairs come out as halves either way:
        queries and keys are only multiplied with each other, so their common order is of no matter."""
        a, b = heads.unflatten(-1, (-1, 2)).unbind(-1) if self.neighbours else heads.chunk(2, -1)
        turned = (a * self.cosine - b * self.sine, a * self.sine + b * self.cosine)
        return torch.cat(turned, -1).to(heads.dtype)


def mlp_kinds(suffix: str) -> tuple[str, str, str]:
    """The tensors of a gated network: dense (""), routed experts ("_exps") or shared ones ("_shexp")."""
    return f"ffn_gate{suffix}", f"ffn_up{suffix}", f"ffn_down{suffix}"


def normalized(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm over the last dimension, computed in float32."""
    return F.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)


class _Matrices:
    """Matrices of a layer, or of one of its experts, that are in memory together."""

    def __init__(self, layer: Layer, kinds: tuple[str, ...], expert: int | None = None) -> None:
        self.layer, self.expert, weights = layer, expert, layer.weights
        self.matrices = {kind: weights.matrix(layer.name(kind), expert) for kind in kinds}
        biases = {kind: layer.name(kind, "bias") for kind in kinds}
        self.biases = {k: weights.vector(name).to(weights.dtype) for k, name in biases.items() if name in weights}

    def product(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., columns] times the matrix of that kind: [..., rows]."""
        return F.linear(x, self.matrices[kind], self.biases.get(kind))

    def inner(self, suffix: str, x: torch.Tensor, rows: Rows, *, own: bool = True) -> torch.Tensor:
        """What comes to the last matrix of these gated networks."""
        gate, up, down = mlp_kinds(suffix)
        inner = F.silu(self.product(gate, x), inplace=True).mul_(self.product(up, x))
        self.layer.show((gate, up), x, rows, self.expert, own=own)
        self.layer.show((down,), inner, rows, self.expert, own=own)
        return inner

    def mlp(self, suffix: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The output of the gated network of these matrices."""
        return self.product(mlp_kinds(suffix)[2], self.inner(suffix, x, rows))


@dataclass(frozen=True)
class Layer:
    """One layer of a model, and who watches it."""

    hyper: Hyper
    weights: Weights
    number: int
    observe: Observer | None = None

    def name(self, kind: str, ending: str = "weight") -> str:
        """The name of one of its tensors."""
        return f"blk.{self.number}.{kind}.{ending}"

    def run(self, hidden: torch.Tensor, rotation: Rotation) -> Routing | None:
        """Run hidden states [chunks, context, hidden] through it, in place."""
        self._attend(hidden, rotation)
        tokens = hidden.view(-1, hidden.shape[-1])
        normed = self._norm("ffn_norm", tokens)
        if not self._has("ffn_gate_inp"):
            self._run_mlp("", tokens, normed)
            return None
        routing = self._route(normed)
        self._run_experts(tokens, normed, routing)
        if self._has("ffn_gate_shexp"):
            self._run_mlp("_shexp", tokens, normed)
        shape = (*hidden.shape[:2], -1)
        return Routing(routing.experts.view(shape), routing.weights.view(shape))

    def show(
        self, kinds: tuple[str, ...], x: torch.Tensor, rows: Rows, expert: int | None = None, *, own: bool = True
    ) -> None:
        """Let the observer, if there is one, see the input x [..., columns] of matrices of these kinds."""
        if self.observe:
            self.observe.see(tuple(map(self.name, kinds)), x.flatten(0, -2), rows, expert, own)

    def _has(self, kind: str) -> bool:
        return self.name(kind) in self.weights

    def _norm(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        weight, out = self.weights.vector(self.name(kind)), torch.empty_like(x)
        for part, target in zip(x.split(PIECE_TOKENS), out.split(PIECE_TOKENS)):
            target[:] = normalized(part, weight, self.hyper.facts.norm_epsilon)
        return out

    def _attend(self, hidden: torch.Tensor, rotation: Rotation) -> None:
        """Add what each token takes from those before it."""
        matrices, size = _Matrices(self, PROJECTIONS), self.hyper.facts.head_size
        context, chunks = hidden.shape[1], max(1, PIECE_TOKENS // hidden.shape[1])
        for part, rows in zip(hidden.split(chunks), _pieces(range(hidden.shape[0] * context), chunks * context)):
            x = self._norm("attn_norm", part)
            self.show(PROJECTIONS[:3], x, rows)
            q, k, v = (matrices.product(kind, x).unflatten(-1, (-1, size)) for kind in PROJECTIONS[:3])
            if self._has("attn_q_norm"):
                q, k = self._norm("attn_q_norm", q), self._norm("attn_k_norm", k)
            q, k, v = (heads.transpose(1, 2) for heads in (rotation.rotate(q), rotation.rotate(k), v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            mixed = mixed.transpose(1, 2).flatten(2)
            self.show(PROJECTIONS[3:], mixed, rows)
            part += matrices.product("attn_output", mixed)

    def _route(self, normed: torch.Tensor) -> Routing:
        """Choose the experts of tokens [tokens, hidden], in float32."""
        router = self.weights.matrix(self.name("ffn_gate_inp"), dtype=torch.float32)
        experts, weights = [], []
        for rows in _pieces(range(len(normed)), PIECE_TOKENS):
            self.show(("ffn_gate_inp",), normed[rows], rows)
            probabilities = F.linear(normed[rows].float(), router).softmax(-1)
            if self.observe:
                self.observe.route(probabilities, rows)
            p, order = probabilities.sort(descending=True, stable=True)
            p = p[:, : self.hyper.facts.experts_used]
            total = p.sum(-1, keepdim=True).clamp(min=MIN_WEIGHT_SUM) if self.hyper.architecture.renormalized else 1
            weights.append(p / total)
            experts.append(order[:, : self.hyper.facts.experts_used].clone())  # not a view, which would keep all
        return Routing(torch.cat(experts), torch.cat(weights))

    def _run_experts(self, tokens: torch.Tensor, normed: torch.Tensor, routing: Routing) -> None:
        """Add the outputs of the routed experts; what nobody was sent to is not read, unless it is to be seen."""
        shown = self.observe.shown if self.observe else None
        others = range(len(normed))[shown] if shown else range(0)
        for expert in range(self.hyper.facts.experts):
            token, place = (routing.experts == expert).nonzero(as_tuple=True)
            if not len(token) and not others:
                continue
            matrices, weights = _Matrices(self, mlp_kinds("_exps"), expert), routing.weights[token, place, None]
            for index, weight in zip(token.split(PIECE_TOKENS), weights.split(PIECE_TOKENS)):
                tokens.index_add_(0, index, matrices.mlp("_exps", normed[index], index).mul_(weight))
            for rows in _pieces(others, PIECE_TOKENS):
                matrices.inner("_exps", normed[rows], rows, own=False)
            del matrices  # before the next expert's are made

    def _run_mlp(self, suffix: str, tokens: torch.Tensor, normed: torch.Tensor) -> None:
        """Add the output of a network that all tokens pass, behind a gate of its own where it has one."""
        gate = ("ffn_gate_inp_shexp",) if suffix and self._has("ffn_gate_inp_shexp") else ()
        matrices = _Matrices(self, (*mlp_kinds(suffix), *gate))
        for rows in _pieces(range(len(tokens)), PIECE_TOKENS):
            x = normed[rows]
            y = matrices.mlp(suffix, x, rows)
            for kind in gate:
                self.show(gate, x, rows)
                y *= matrices.product(kind, x).sigmoid()
            tokens[rows] += y


def _pieces(rows: range, size: int) -> Iterator[slice]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield slice(part.start, part.stop, part.step)
