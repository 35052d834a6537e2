"""What the families have in common: fields of config.json with their defaults, keys, and the checks on both.

Defaults are those that transformers fills in, since llama.cpp's converter reads config.json through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf

from gguf_moe.arch.base import ModelFacts
from gguf_moe.arch.rope import KINDS, read_rope
from gguf_moe.checkpoint import Config
from gguf_moe.errors import GgufMoeError, UsageError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS


@dataclass(frozen=True)
class Defaults:
    """Values of absent fields, and what else tells the families apart. None for a size: the field must be there."""

    vocabulary: int | None = None
    hidden: int | None = None
    feed_forward: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None  # None: as many as heads
    head_size: int | None = None  # None: hidden over heads
    context: int | None = None
    norm_epsilon: float | None = None
    rope_theta: float = 1e4
    rope_kinds: tuple[str, ...] = KINDS
    window: int | None = None
    windowed: bool | None = None  # whether sliding_window counts without use_sliding_window; None: it never does
    writes_head_size: bool = False  # even where config.json has no head_dim
    free_head_size: bool = True  # llama.cpp takes other head sizes than hidden over heads


def read_facts(config: Config, defaults: Defaults, **more: Any) -> ModelFacts:
    """The facts of a model; more: what the family adds. GgufMoeError for what would make a file no program can run."""
    heads = config.integer("num_attention_heads", defaults.heads)
    absent = heads if "num_key_value_heads" in config.values or defaults.kv_heads is None else defaults.kv_heads
    kv_heads = config.integer("num_key_value_heads", absent)
    hidden = config.integer("hidden_size", defaults.hidden)
    named = config.values.get("head_dim") is not None
    if not named and defaults.head_size is None and hidden % heads:
        raise GgufMoeError(f"{config.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_size = config.integer("head_dim", defaults.head_size or hidden // heads)
    context = config.integer("max_position_embeddings", defaults.context)
    rope = read_rope(config, defaults.rope_theta, context, defaults.rope_kinds)
    notes = [*rope.notes(config, context), *_window_note(config, defaults, context), *more.pop("notes", ())]
    facts = ModelFacts(
        layers=config.integer("num_hidden_layers", defaults.layers),
        hidden=hidden,
        feed_forward=config.integer("intermediate_size", defaults.feed_forward),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        explicit_head_size=named or defaults.writes_head_size,
        vocabulary=config.integer("vocab_size", defaults.vocabulary),
        context=context,
        norm_epsilon=config.number("rms_norm_eps", defaults.norm_epsilon),
        rope=rope,
        named_scoring=config.values.get("scoring_func") is not None,
        notes=tuple(notes),
        **more,
    )
    _check(config, facts, defaults)
    return facts


def _check(config: Config, facts: ModelFacts, defaults: Defaults) -> None:
    if (activation := config.values.get("hidden_act") or "silu") != "silu":
        raise GgufMoeError(f"{config.path}: hidden_act is {activation!r}, but llama.cpp computes 'silu'")
    if (scoring := config.values.get("scoring_func") or "softmax") != "softmax":
        raise GgufMoeError(f"{config.path}: scoring_func is {scoring!r}, but llama.cpp computes 'softmax'")
    if facts.head_size % 2:
        raise GgufMoeError(f"{config.path}: a head size of {facts.head_size} is odd; rotary embedding needs pairs")
    if facts.heads % facts.kv_heads:
        raise GgufMoeError(
            f"{config.path}: num_attention_heads {facts.heads} is no multiple of num_key_value_heads {facts.kv_heads}"
        )
    if not defaults.free_head_size and facts.size("query") != facts.hidden:
        raise GgufMoeError(
            f"{config.path}: head_dim is {facts.head_size}, but in this architecture llama.cpp takes only hidden_size "
            f"over num_attention_heads, {facts.hidden} / {facts.heads}"
        )
    if facts.layers > MAX_LAYERS:
        raise GgufMoeError(f"{config.path}: num_hidden_layers is {facts.layers}, llama.cpp takes {MAX_LAYERS} at most")


def read_experts(
    config: Config, keys: tuple[str, ...], asked: int | None, experts: int | None = None, used: int | None = None
) -> dict[str, Any]:
    """Facts on the experts: their number, the first field of `keys` that is there, and how many of them are used for a
    token, which `asked` overrides; with defaults."""
    key = next((key for key in keys if config.values.get(key) is not None), keys[0])
    experts = config.integer(key, experts)
    used = config.integer("num_experts_per_tok", used) if asked is None else asked
    if experts > MAX_EXPERTS:
        raise GgufMoeError(f"{config.path}: {key} is {experts}, llama.cpp takes {MAX_EXPERTS} at most")
    if used > experts:
        if asked is not None:
            raise UsageError(f"--experts-used {asked}: {config.path} has {experts} experts ({key})")
        raise GgufMoeError(
            f"{config.path}: num_experts_per_tok is {used}, but there are {experts} experts ({key}); llama.cpp aborts "
            f"on such a file: use --experts-used {experts}{' or less' if experts > 1 else ''}"
        )
    return {"experts": experts, "experts_used": used, "experts_key": key}


def dense(defaults: Defaults) -> Callable[[Config, int | None], ModelFacts]:
    """The reader of a dense family; UsageError where experts a token are asked for."""

    def read(config: Config, asked: int | None) -> ModelFacts:
        if asked is not None:
            raise UsageError(f"--experts-used {asked}: {config.path} is of a dense model, without experts")
        return read_facts(config, defaults)

    return read


def routing_note(config: Config, experts: dict[str, Any], *, renormalized: bool, by_llama_cpp: bool) -> list[str]:
    """The difference it makes that llama.cpp scales the used experts to a sum of 1, or does not, whatever the config
    says; none where all are used. experts: what `read_experts` returned."""
    if renormalized == by_llama_cpp or experts["experts_used"] == experts["experts"]:
        return []
    does = "scales the used experts' weights to a sum of 1" if by_llama_cpp else "leaves the used experts' weights as"
    return [
        f"{config.path}: norm_topk_prob is {str(renormalized).lower()}, but in this architecture llama.cpp {does}"
        + ("" if by_llama_cpp else " the router gives them")
        + f"; its answers differ from transformers' unless all experts are used (--experts-used {experts['experts']})"
    ]


def read_flag(config: Config, name: str, default: bool = False) -> bool:
    """A field that is true or false; null counts as absent."""
    value = config.values.get(name)
    if not isinstance(value, bool) and value is not None:
        raise GgufMoeError(f"{config.path}: {name} is {value!r}, expected true or false")
    return default if value is None else value


def _window_note(config: Config, defaults: Defaults, context: int) -> list[str]:
    if defaults.windowed is None or not read_flag(config, "use_sliding_window", defaults.windowed):
        return []
    window = config.values.get("sliding_window", defaults.window)
    if window is None or (window := config.integer("sliding_window", window, minimum=0)) >= context:
        return []
    return [
        f"{config.path}: sliding_window is {window}, but in this architecture llama.cpp attends to the whole text; "
        f"beyond {window} tokens its answers differ from transformers'"
    ]


def add_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    """Add the keys that all families have to `writer`, in the converter's order."""
    writer.add_block_count(facts.layers)
    writer.add_context_length(facts.context)
    writer.add_embedding_length(facts.hidden)
    writer.add_feed_forward_length(facts.feed_forward)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    facts.rope.add_keys(writer)
    writer.add_layer_norm_rms_eps(facts.norm_epsilon)
    if facts.experts:
        writer.add_expert_count(facts.experts)
        writer.add_expert_used_count(facts.experts_used)
    if facts.named_scoring:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    if facts.explicit_head_size:
        writer.add_key_length(facts.head_size)
        writer.add_value_length(facts.head_size)
