"""The llama family of llama.cpp: Mixtral, as mergekit-moe writes it.

Names, shapes, defaults and key order follow llama.cpp's converter (conversion of MixtralForCausalLM).
"""

from __future__ import annotations

import gguf

from gguf_moe.arch.base import Architecture, Fused, ModelFacts, Template
from gguf_moe.checkpoint import Config
from gguf_moe.errors import GgufMoeError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_EXPERT = _LAYER + "block_sparse_moe.experts.{expert}."

# Experts in the order in which llama.cpp's converter writes the three stacks.
TEMPLATES = (
    Template("model.embed_tokens.weight", "token_embd.weight", "token_embd", ("vocabulary", "hidden")),
    Template("model.norm.weight", "output_norm.weight", "norm", ("hidden",)),
    Template("lm_head.weight", "output.weight", "output", ("vocabulary", "hidden"), required=False),
    Template(_LAYER + "input_layernorm.weight", "blk.{layer}.attn_norm.weight", "norm", ("hidden",)),
    Template(_LAYER + "post_attention_layernorm.weight", "blk.{layer}.ffn_norm.weight", "norm", ("hidden",)),
    Template(_ATTENTION + "q_proj.weight", "blk.{layer}.attn_q.weight", "attn_q", ("query", "hidden"), rotary="heads"),
    Template(_ATTENTION + "k_proj.weight", "blk.{layer}.attn_k.weight", "attn_k", ("key", "hidden"), rotary="kv_heads"),
    Template(_ATTENTION + "v_proj.weight", "blk.{layer}.attn_v.weight", "attn_v", ("key", "hidden")),
    Template(_ATTENTION + "o_proj.weight", "blk.{layer}.attn_output.weight", "attn_output", ("hidden", "query")),
    Template(
        _LAYER + "block_sparse_moe.gate.weight", "blk.{layer}.ffn_gate_inp.weight", "router", ("experts", "hidden")
    ),
    Template(_EXPERT + "w1.weight", "blk.{layer}.ffn_gate_exps.weight", "ffn_gate", ("feed_forward", "hidden")),
    Template(_EXPERT + "w2.weight", "blk.{layer}.ffn_down_exps.weight", "ffn_down", ("hidden", "feed_forward")),
    Template(_EXPERT + "w3.weight", "blk.{layer}.ffn_up_exps.weight", "ffn_up", ("feed_forward", "hidden")),
)

# What transformers 5, and so today's mergekit, writes.
FUSED = (
    Fused(_LAYER + "mlp.experts.gate_up_proj", (_EXPERT + "w1.weight", _EXPERT + "w3.weight")),
    Fused(_LAYER + "mlp.experts.down_proj", (_EXPERT + "w2.weight",)),
)


def read_facts(config: Config) -> ModelFacts:
    """Sizes from config.json with the defaults that transformers fills in for Mixtral.

    Raises GgufMoeError for contradictions that would make a file no program can run.
    """
    heads = config.integer("num_attention_heads", 32)
    kv_heads = config.integer("num_key_value_heads", heads if "num_key_value_heads" in config.values else 8)
    hidden = config.integer("hidden_size", 4096)
    explicit_head_size = config.values.get("head_dim") is not None
    if not explicit_head_size and hidden % heads:
        raise GgufMoeError(f"{config.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    facts = ModelFacts(
        layers=config.integer("num_hidden_layers", 32),
        hidden=hidden,
        feed_forward=config.integer("intermediate_size", 14336),
        heads=heads,
        kv_heads=kv_heads,
        head_size=config.integer("head_dim", hidden // heads),
        explicit_head_size=explicit_head_size,
        vocabulary=config.integer("vocab_size", 32000),
        context=config.integer("max_position_embeddings", 131072),
        experts=config.integer("num_local_experts", 8),
        experts_used=config.integer("num_experts_per_tok", 2),
        norm_epsilon=config.number("rms_norm_eps", 1e-5),
        rope_theta=_rope_theta(config),
    )
    if (activation := config.values.get("hidden_act") or "silu") != "silu":
        raise GgufMoeError(f"{config.path}: hidden_act is {activation!r}, but llama.cpp computes 'silu'")
    if facts.head_size % 2:
        raise GgufMoeError(f"{config.path}: a head size of {facts.head_size} is odd; rotary embedding needs pairs")
    if heads % kv_heads:
        raise GgufMoeError(
            f"{config.path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if facts.layers > MAX_LAYERS:
        raise GgufMoeError(f"{config.path}: num_hidden_layers is {facts.layers}, llama.cpp takes {MAX_LAYERS} at most")
    if not 2 <= facts.experts <= 128:
        raise GgufMoeError(f"{config.path}: num_local_experts is {facts.experts}, expected 2 to 128")
    if facts.experts_used > facts.experts:
        raise GgufMoeError(
            f"{config.path}: num_experts_per_tok is {facts.experts_used}, but there are {facts.experts} experts "
            f"(num_local_experts); llama.cpp aborts on such a file: set it to {facts.experts} or less"
        )
    return facts


def _rope_theta(config: Config) -> float:
    """The rotary base: newer configs nest it in rope_parameters, older ones have it at the top."""
    rope = config.values.get("rope_scaling") or config.values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise GgufMoeError(f"{config.path}: rope parameters are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise GgufMoeError(f"{config.path}: rope_type {kind!r} is not supported yet, expected 'default'")
    nested = Config(config.path, rope)
    return nested.number("rope_theta", config.number("rope_theta", 1e6))


def add_keys(writer: gguf.GGUFWriter, facts: ModelFacts) -> None:
    """Add the model's keys to `writer`, in the converter's order, up to the last before general.file_type."""
    writer.add_block_count(facts.layers)
    writer.add_context_length(facts.context)
    writer.add_embedding_length(facts.hidden)
    writer.add_feed_forward_length(facts.feed_forward)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_rope_freq_base(facts.rope_theta)
    writer.add_layer_norm_rms_eps(facts.norm_epsilon)
    writer.add_expert_count(facts.experts)
    writer.add_expert_used_count(facts.experts_used)
    if facts.explicit_head_size:
        writer.add_key_length(facts.head_size)
        writer.add_value_length(facts.head_size)


ARCHITECTURE = Architecture(
    name="llama",
    hf_names=("MixtralForCausalLM",),
    facts=read_facts,
    templates=TEMPLATES,
    fused=FUSED,
    aliases=((_LAYER + "mlp.gate.weight", _LAYER + "block_sparse_moe.gate.weight"),),
    ignored=(".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"),
    add_keys=add_keys,
)
