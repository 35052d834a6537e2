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
    Template("model.embed_tokens.weight", "token_embd.weight", ("vocabulary", "hidden")),
    Template("model.norm.weight", "output_norm.weight", ("hidden",)),
    Template("lm_head.weight", "output.weight", ("vocabulary", "hidden"), required=False),
)

NORMS = (
    Template(LAYER + "input_layernorm.weight", BLOCK + "attn_norm.weight", ("hidden",)),
    Template(LAYER + "post_attention_layernorm.weight", BLOCK + "ffn_norm.weight", ("hidden",)),
)

HEAD_NORMS = (
    Template(ATTENTION + "q_norm.weight", BLOCK + "attn_q_norm.weight", ("head_size",)),
    Template(ATTENTION + "k_norm.weight", BLOCK + "attn_k_norm.weight", ("head_size",)),
)

PROJECTIONS = (
    Template(ATTENTION + "q_proj.weight", BLOCK + "attn_q.weight", ("query", "hidden")),
    Template(ATTENTION + "k_proj.weight", BLOCK + "attn_k.weight", ("key", "hidden")),
    Template(ATTENTION + "v_proj.weight", BLOCK + "attn_v.weight", ("key", "hidden")),
    Template(ATTENTION + "o_proj.weight", BLOCK + "attn_output.weight", ("hidden", "query")),
)

BIASES = (
    Template(ATTENTION + "q_proj.bias", BLOCK + "attn_q.bias", ("query",)),
    Template(ATTENTION + "k_proj.bias", BLOCK + "attn_k.bias", ("key",)),
    Template(ATTENTION + "v_proj.bias", BLOCK + "attn_v.bias", ("key",)),
)

DENSE = (
    Template(MLP + "gate_proj.weight", BLOCK + "ffn_gate.weight", ("feed_forward", "hidden")),
    Template(MLP + "up_proj.weight", BLOCK + "ffn_up.weight", ("feed_forward", "hidden")),
    Template(MLP + "down_proj.weight", BLOCK + "ffn_down.weight", ("hidden", "feed_forward")),
)

ROUTER = (Template(MLP + "gate.weight", BLOCK + "ffn_gate_inp.weight", ("experts", "hidden")),)

# In the order in which llama.cpp's converter writes the three stacks.
EXPERTS = (
    Template(EXPERT + "down_proj.weight", BLOCK + "ffn_down_exps.weight", ("hidden", "expert_feed_forward")),
    Template(EXPERT + "gate_proj.weight", BLOCK + "ffn_gate_exps.weight", ("expert_feed_forward", "hidden")),
    Template(EXPERT + "up_proj.weight", BLOCK + "ffn_up_exps.weight", ("expert_feed_forward", "hidden")),
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
        Template(prefix + "gate_proj.weight", BLOCK + "ffn_gate_shexp.weight", rows),
        Template(prefix + "up_proj.weight", BLOCK + "ffn_up_shexp.weight", rows),
        Template(prefix + "down_proj.weight", BLOCK + "ffn_down_shexp.weight", columns),
    )


def rotary(templates: tuple[Template, ...]) -> tuple[Template, ...]:
    """The templates with query and key rows reordered, for families whose rotary pairs llama.cpp wants adjacent."""
    heads = {"query": "heads", "key": "kv_heads"}
    turned = (BLOCK + "attn_q.", BLOCK + "attn_k.")
    return tuple(replace(t, rotary=heads[t.shape[0]]) if t.target.startswith(turned) else t for t in templates)


def optional(templates: tuple[Template, ...]) -> tuple[Template, ...]:
    """The templates, not required."""
    return tuple(replace(t, required=False) for t in templates)


def only(part: str, templates: tuple[Template, ...]) -> tuple[Template, ...]:
    """The templates, in the layers of that part only."""
    return tuple(replace(t, part=part) for t in templates)
