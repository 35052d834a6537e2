"""Templates that several families share, under the names that transformers gives the tensors."""

from __future__ import annotations

from dataclasses import replace

from gguf_moe.arch.base import Fused, Template

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."
EXPERT = MLP + "experts.{expert}."
BLOCK = "blk.{layer}."

ENDS = (
    Template("model.embed_tokens.weight", "token_embd.weight", "token_embd", ("vocabulary", "hidden")),
    Template("model.norm.weight", "output_norm.weight", "norm", ("hidden",)),
    Template("lm_head.weight", "output.weight", "output", ("vocabulary", "hidden"), required=False),
)

NORMS = (
    Template(LAYER + "input_layernorm.weight", BLOCK + "attn_norm.weight", "norm", ("hidden",)),
    Template(LAYER + "post_attention_layernorm.weight", BLOCK + "ffn_norm.weight", "norm", ("hidden",)),
)

HEAD_NORMS = (
    Template(ATTENTION + "q_norm.weight", BLOCK + "attn_q_norm.weight", "norm", ("head_size",)),
    Template(ATTENTION + "k_norm.weight", BLOCK + "attn_k_norm.weight", "norm", ("head_size",)),
)

PROJECTIONS = (
    Template(ATTENTION + "q_proj.weight", BLOCK + "attn_q.weight", "attn_q", ("query", "hidden")),
    Template(ATTENTION + "k_proj.weight", BLOCK + "attn_k.weight", "attn_k", ("key", "hidden")),
    Template(ATTENTION + "v_proj.weight", BLOCK + "attn_v.weight", "attn_v", ("key", "hidden")),
    Template(ATTENTION + "o_proj.weight", BLOCK + "attn_output.weight", "attn_output", ("hidden", "query")),
)

BIASES = (
    Template(ATTENTION + "q_proj.bias", BLOCK + "attn_q.bias", "bias", ("query",)),
    Template(ATTENTION + "k_proj.bias", BLOCK + "attn_k.bias", "bias", ("key",)),
    Template(ATTENTION + "v_proj.bias", BLOCK + "attn_v.bias", "bias", ("key",)),
)

DENSE = (
    Template(MLP + "gate_proj.weight", BLOCK + "ffn_gate.weight", "ffn_gate", ("feed_forward", "hidden")),
    Template(MLP + "up_proj.weight", BLOCK + "ffn_up.weight", "ffn_up", ("feed_forward", "hidden")),
    Template(MLP + "down_proj.weight", BLOCK + "ffn_down.weight", "ffn_down", ("hidden", "feed_forward")),
)

ROUTER = (Template(MLP + "gate.weight", BLOCK + "ffn_gate_inp.weight", "router", ("experts", "hidden")),)

# In the order in which llama.cpp's converter writes the three stacks.
EXPERTS = (
    Template(
        EXPERT + "down_proj.weight", BLOCK + "ffn_down_exps.weight", "ffn_down", ("hidden", "expert_feed_forward")
    ),
    Template(
        EXPERT + "gate_proj.weight", BLOCK + "ffn_gate_exps.weight", "ffn_gate", ("expert_feed_forward", "hidden")
    ),
    Template(EXPERT + "up_proj.weight", BLOCK + "ffn_up_exps.weight", "ffn_up", ("expert_feed_forward", "hidden")),
)

# What transformers 5 has in memory, and saves on request.
FUSED = (
    Fused(MLP + "experts.gate_up_proj", (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight")),
    Fused(MLP + "experts.down_proj", (EXPERT + "down_proj.weight",)),
)


def shared(name: str) -> tuple[Template, ...]:
    """The experts that every token passes, stored as one: a dense network under `name`."""
    prefix = f"{MLP}{name}."
    rows, columns = ("shared_feed_forward", "hidden"), ("hidden", "shared_feed_forward")
    return (
        Template(prefix + "gate_proj.weight", BLOCK + "ffn_gate_shexp.weight", "ffn_gate", rows),
        Template(prefix + "up_proj.weight", BLOCK + "ffn_up_shexp.weight", "ffn_up", rows),
        Template(prefix + "down_proj.weight", BLOCK + "ffn_down_shexp.weight", "ffn_down", columns),
    )


def rotary(templates: tuple[Template, ...]) -> tuple[Template, ...]:
    """The templates with query and key rows reordered, for families whose rotary pairs llama.cpp wants adjacent."""
    heads = {"query": "heads", "key": "kv_heads"}
    roles = (BLOCK + "attn_q.", BLOCK + "attn_k.")
    return tuple(replace(t, rotary=heads[t.shape[0]]) if t.target.startswith(roles) else t for t in templates)


def optional(templates: tuple[Template, ...]) -> tuple[Template, ...]:
    """The templates, not required."""
    return tuple(replace(t, required=False) for t in templates)


def only(part: str, templates: tuple[Template, ...]) -> tuple[Template, ...]:
    """The templates, in the layers of that part only."""
    return tuple(replace(t, part=part) for t in templates)
