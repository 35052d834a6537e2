"""Time of whole conversions of a generated bf16 Mixtral of 1.1 billion parameters: python tests/bench/bench_convert.py

Hidden 2048, 8 experts of 4096, 5 layers, the bundled merge's tokenizer. Q4_K_M beside BF16 (reading and writing without
encoding), the model read from disk and from the page cache, three rounds in turn, the best of each. Files lie in a
temporary directory (some 5 GB). No limit is checked.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from checkpoints import Parts, bundled  # noqa: E402

from gguf_moe.checkpoint import open_checkpoint  # noqa: E402
from gguf_moe.convert import convert  # noqa: E402
from gguf_moe.plan import make_plan  # noqa: E402
from gguf_moe.recipe import find_file_type  # noqa: E402

HIDDEN, FEED_FORWARD, EXPERTS, LAYERS, ROUNDS = 2048, 4096, 8, 5, 3


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


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        checkpoint = open_checkpoint(generate(Path(name) / "billion"))
        target = Path(name) / "out.gguf"
        seconds: dict[tuple[bool, str], float] = {}
        for _ in range(ROUNDS):
            for cold in (True, False) if hasattr(os, "posix_fadvise") else (False,):
                for quant in ("BF16", "Q4_K_M"):
                    plan = make_plan(checkpoint, find_file_type(quant))
                    if cold:
                        forget(checkpoint.directory)
                    started = time.monotonic()
                    convert(plan, target, force=True)
                    elapsed = time.monotonic() - started
                    seconds[cold, quant] = min(seconds.get((cold, quant), float("inf")), elapsed)
        sys.stdout.write(f"{plan.elements / 1e9:.2f} billion weights, {checkpoint.nbytes / 1e9:.2f} GB\n")
        for cold in dict.fromkeys(cold for cold, _ in seconds):
            plain, encoded = seconds[cold, "BF16"], seconds[cold, "Q4_K_M"]
            where = "on disk" if cold else "in the page cache"
            sys.stdout.write(
                f"model {where}: BF16 {plain:.2f} s, Q4_K_M {encoded:.2f} s, ratio {encoded / plain:.2f}\n"
            )


if __name__ == "__main__":
    main()
