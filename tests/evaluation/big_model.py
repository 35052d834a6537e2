"""A child of test_memory.py: a model through sweeps; one several times the allowed memory, in files without blocks,
where the directory is none.

usage: big_model.py DIRECTORY MODELS CHUNKS CONTEXT BYTES    (allowed beside what the process has at its start)
MODELS is how many are evaluated in lock step; 0: one is calibrated.
Prints a JSON object: bytes of memory allowed, planned, used at most, of the model; sweeps, chunks of a group.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import psutil
from checkpoints import DATA, MERGE
from running import model, windows

from gguf_moe.evaluation.calibrate import calibrate
from gguf_moe.evaluation.engines import Settings
from gguf_moe.evaluation.events import MemoryPlan, Started
from gguf_moe.evaluation.forward import Model
from gguf_moe.evaluation.memory import plan_memory
from gguf_moe.evaluation.sweep import sweep

HIDDEN, WIDTH, EXPERTS, KEYS, VOCABULARY = 2048, 4096, 8, 1024, 4096


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    return {
        **{f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")},
        **{f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"},
        **{f"{prefix}self_attn.{name}_proj.weight": (KEYS, HIDDEN) for name in "kv"},
        f"{prefix}mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{prefix}mlp.experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
        f"{prefix}mlp.experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
    }


def write(directory: Path, at_least: int) -> None:
    """A checkpoint of at least so many bytes, all zero, which take no place on the disk."""
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MERGE / name, directory / name)
    layer_bytes = sum(2 * math.prod(shape) for shape in layer_shapes(0).values())
    config = json.loads((MERGE / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_local_experts": EXPERTS, "head_dim": 128}
    config |= {"num_attention_heads": HIDDEN // 128, "num_key_value_heads": KEYS // 128}
    config["num_hidden_layers"] = math.ceil(at_least / layer_bytes)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {f"{name}.weight": (VOCABULARY, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(config["num_hidden_layers"]):
        shapes |= layer_shapes(layer)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)


def evaluated(models: list[Model], chunks: int, context: int, memory: int) -> MemoryPlan:
    plan = plan_memory(models, chunks, context, memory)
    for start in range(0, chunks, plan.sweep):
        for _ in sweep(models, windows(min(plan.sweep, chunks - start), context), plan.group):
            pass
    return plan


def calibrated(directory: Path, chunks: int, context: int, memory: int) -> MemoryPlan:
    told: list[object] = []
    settings = Settings(context=context, chunks=chunks, memory=memory)
    calibrate(directory, DATA / "text" / "calib.txt", settings, on_event=told.append)
    return next(event.memory for event in told if isinstance(event, Started))


def main() -> None:
    directory, (count, chunks, context, more) = Path(sys.argv[1]), map(int, sys.argv[2:])
    memory = psutil.Process().memory_info().rss + more
    if not directory.exists():
        write(directory, 4 * memory)
    sizes, models = (chunks, context, memory), [model(directory)] * count
    plan = evaluated(models, *sizes) if models else calibrated(directory, *sizes)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmHWM"].split()[0]) << 10
    size = model(directory).weights.source.size_bytes
    found = {"memory": memory, "planned": plan.total, "used": used, "size": size}
    print(json.dumps({**found, "sweeps": math.ceil(chunks / plan.sweep), "group": plan.group}))


if __name__ == "__main__":
    main()
