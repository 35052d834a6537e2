"""The hyperparameters of a model, read back from its GGUF keys, and its tensors checked against them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf

from gguf_moe.arch import FAMILIES, Architecture, ModelFacts, Template
from gguf_moe.arch.rope import Rope
from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.gguf_keys import ModelKeys, expert_count
from gguf_moe.mapping import absent_text, without_outer_ones

_LLM, _Attention, _Rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Hyper:
    """What the forward pass needs to know beside the weights."""

    facts: ModelFacts
    architecture: Architecture

    @property
    def rotates_neighbours(self) -> bool:
        """Whether rotary pairs are neighbours in a head, instead of one from each half."""
        return any(template.rotary for template in self.architecture.templates)


def read_hyper(source: ModelSource) -> Hyper:
    """The hyperparameters of a model.

    Raises GgufMoeError for an architecture or a tensor that the forward pass does not know, for a tensor that is
    absent or of another shape than the keys say, and for keys that ask for what it does not compute.
    """
    keys = ModelKeys(source.path, source.keys)
    experts = expert_count(keys)
    families = [f for f in FAMILIES if f.name == keys.architecture]
    family = next((f for f in families if any(t.stacked for t in f.templates) == bool(experts)), None)
    if family is None:
        known = ", ".join(sorted({f.name for f in FAMILIES}))
        keys.fail(gguf.Keys.General.ARCHITECTURE, f"one of {known}, dense or with experts as llama.cpp has it")
    hyper = Hyper(_facts(source, keys, experts), family)
    _check_tensors(source, hyper)
    return hyper


def _facts(source: ModelSource, keys: ModelKeys, experts: int) -> ModelFacts:
    def integer(key: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        return keys.integer(keys.model(key), least, most, default)

    layers, context = integer(_LLM.BLOCK_COUNT), integer(_LLM.CONTEXT_LENGTH)
    hidden, width = integer(_LLM.EMBEDDING_LENGTH), integer(_LLM.FEED_FORWARD_LENGTH)
    heads = integer(_Attention.HEAD_COUNT)
    head_size = integer(_Attention.KEY_LENGTH, hidden // heads)
    for key in (_Attention.VALUE_LENGTH, _Rope.DIMENSION_COUNT):
        integer(key, head_size, head_size, head_size)
    if experts:
        softmax = int(gguf.ExpertGatingFuncType.SOFTMAX)
        integer(_LLM.EXPERT_GATING_FUNC, softmax, softmax, softmax)
        if _number(keys, _LLM.EXPERT_WEIGHTS_SCALE, 1.0) != 1:
            keys.fail(keys.model(_LLM.EXPERT_WEIGHTS_SCALE), "1.0")
    used = integer(_LLM.EXPERT_USED_COUNT, most=experts) if experts else 0
    expert_width = integer(_LLM.EXPERT_FEED_FORWARD_LENGTH, width // used if used else 0, 0)
    shared = integer(_LLM.EXPERT_SHARED_COUNT, 1, 0)
    embedding = source.tensors.get("token_embd.weight")
    return ModelFacts(
        layers=layers,
        hidden=hidden,
        feed_forward=width,
        heads=heads,
        kv_heads=integer(_Attention.HEAD_COUNT_KV, heads),
        head_size=head_size,
        explicit_head_size=True,
        vocabulary=embedding.shape[0] if embedding else 0,
        context=context,
        norm_epsilon=_number(keys, _Attention.LAYERNORM_RMS_EPS),
        rope=_rope(keys, context),
        experts=experts,
        experts_used=used,
        expert_feed_forward=expert_width,
        shared_feed_forward=integer(_LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, shared * expert_width, 0),
        dense_layers=integer(_LLM.LEADING_DENSE_BLOCK_COUNT, 0, 0, layers),
    )


def _rope(keys: ModelKeys, context: int) -> Rope:
    """As llama.cpp reads it: of YaRN only the factor and the original context, longrope as no scaling."""
    key = keys.model(_Rope.SCALING_TYPE)
    kind = keys.value(key) or "linear"
    if kind not in (kinds := [k.value for k in gguf.RopeScalingType]):
        keys.fail(key, f"one of {', '.join(kinds)}")
    factor = _number(keys, _Rope.SCALING_FACTOR, 1.0)
    original = keys.integer(keys.model(_Rope.SCALING_ORIG_CTX_LEN), 1, _MOST, context)
    values = {"factor": factor, "original_max_position_embeddings": original}
    return Rope(_number(keys, _Rope.FREQ_BASE, 1e4), kind, values)


def _number(keys: ModelKeys, template: str, default: float | None = None) -> float:
    """A positive number; like llama.cpp, 0 stands for the default where there is one."""
    key = keys.model(template)
    value = keys.value(key) or default
    if not isinstance(value, float) or not 0 < value < math.inf:
        keys.fail(key, "a positive number")
    return value


def _check_tensors(source: ModelSource, hyper: Hyper) -> None:
    """All that the family must have, nothing that it has not, each of the shape that the keys say."""
    expected = {name: (shape, template.required) for name, shape, template in _expected(hyper)}
    expected["rope_freqs.weight"] = (hyper.facts.head_size // 2,), False
    for name, tensor in source.tensors.items():
        if name not in expected:
            raise GgufMoeError(
                f"{source.path}: tensor {name} is unknown to the evaluation of architecture {hyper.architecture.name}"
            )
        shape, _ = expected[name]
        if without_outer_ones(tensor.shape) != without_outer_ones(shape):
            raise GgufMoeError(
                f"{source.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)} by its keys"
            )
    absent = [name for name, (_, required) in expected.items() if required and name not in source.tensors]
    if absent:
        raise GgufMoeError(f"{source.path}: {absent_text(absent)}")


def _expected(hyper: Hyper) -> Iterator[tuple[str, tuple[int, ...], Template]]:
    facts = hyper.facts
    for template in hyper.architecture.templates:
        shape = tuple(facts.size(name) for name in template.shape)
        shape = (facts.experts, *shape) if template.stacked else shape
        for layer in template.layers(facts) if "{layer}" in template.target else (None,):
            yield template.target.format(layer=layer), shape, template
