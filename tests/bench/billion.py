"""A generated bf16 Mixtral of 1.1 billion parameters for the benchmarks: hidden 2048, 8 experts of 4096, 5 layers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from checkpoints import Parts, bundled

HIDDEN, FEED_FORWARD, EXPERTS, LAYERS = 2048, 4096, 8, 5


def generate(directory: Path) -> Path:
    """Write the model, one shard a layer."""
    rng = np.random.default_rng(1)

    def matrix(*shape: int) -> tuple[str, np.ndarray]:
        x = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        return "BF16", (x.view(np.uint32) >> 16).astype(np.uint16)

    config = bundled().config
    config.update(hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_local_experts=EXPERTS)
    config.update(num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=4, head_dim=128)
    tensors = {"model.embed_tokens.weight": matrix(4096, HIDDEN), "model.norm.weight": matrix(HIDDEN)}
    tensors["lm_head.weight"] = matrix(4096, HIDDEN)
    shards = dict.fromkeys(tensors, "model-00000.safetensors")
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        made = {f"{layer}{name}.weight": matrix(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", HIDDEN), ("k", 512), ("v", 512), ("o", HIDDEN)):
            made[f"{layer}self_attn.{name}_proj.weight"] = matrix(rows, HIDDEN)
        made[layer + "mlp.gate.weight"] = matrix(EXPERTS, HIDDEN)
        made[layer + "mlp.experts.gate_up_proj"] = matrix(EXPERTS, 2 * FEED_FORWARD, HIDDEN)
        made[layer + "mlp.experts.down_proj"] = matrix(EXPERTS, HIDDEN, FEED_FORWARD)
        tensors |= made
        shards |= dict.fromkeys(made, f"model-{i + 1:05}.safetensors")
    return Parts(tensors, config, shards).save(directory)


def forget(directory: Path) -> None:
    """Ask the system to drop the model's files from its page cache."""
    for path in directory.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # what is not on disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
