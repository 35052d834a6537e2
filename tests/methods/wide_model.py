"""A child of test_gptq_memory.py: codes of a model whose experts have wide down-projections.

usage: wide_model.py DIRECTORY WIDTH BYTES    (allowed beside what the process has at its start)
Prints a JSON object: bytes of memory allowed, planned and used at most; whether moments lay in files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import psutil
from checkpoints import DATA, MERGE, Parts

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.evaluation.events import Started
from gguf_moe.methods import Settings, moments, walk
from gguf_moe.methods.gptq import Method
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request
from gguf_moe.rules import parse_rules

HIDDEN, EXPERTS, VOCABULARY = 256, 2, 4096


def write(directory: Path, width: int) -> Path:
    """A Mixtral of one layer with random weights."""
    config = json.loads((MERGE / "config.json").read_text())
    config |= {"intermediate_size": width, "num_local_experts": EXPERTS, "num_hidden_layers": 1}
    keys = config["num_key_value_heads"] * HIDDEN // config["num_attention_heads"]
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        **{f"{name}.weight": (VOCABULARY, HIDDEN) for name in ("model.embed_tokens", "lm_head")},
        **{f"{layer}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"},
        **{f"{layer}self_attn.{name}_proj.weight": (keys, HIDDEN) for name in "kv"},
        f"{layer}mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{layer}mlp.experts.gate_up_proj": (EXPERTS, 2 * width, HIDDEN),
        f"{layer}mlp.experts.down_proj": (EXPERTS, HIDDEN, width),
    }
    rng = np.random.default_rng(5)
    tensors = {name: rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm")
    tensors |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    bits = {name: ("BF16", (array.view(np.uint32) >> 16).astype(np.uint16)) for name, array in tensors.items()}
    return Parts(bits, config).save(directory)


def main() -> None:
    moments.PRECISE = walk.PRECISE = 2048  # wider moments may lie in files
    directory, (width, more) = Path(sys.argv[1]), map(int, sys.argv[2:])
    rules = parse_rules((), "F16", "F16", None, True, False)
    merge = write(directory / "merge", width)
    memory = psutil.Process().memory_info().rss + more
    method = Method(Settings(DATA / "text" / "calib.txt", 4, memory=memory))
    request = Request(rules, keys=method.keys())
    plan = make_plan(open_checkpoint(merge), find_file_type("Q4_K_S"), request)
    told: list[object] = []
    files: set[str] = set()

    def tell(event: object) -> None:
        told.append(event)
        files.update(path.name for path in (directory / "x.gguf.gptq").glob("*.moments"))

    with method.prepared([plan], [directory / "x.gguf"], tell):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    planned = next(event.memory.total for event in told if isinstance(event, Started))
    used = int(status["VmHWM"].split()[0]) << 10
    print(json.dumps({"memory": memory, "planned": planned, "used": used, "spilled": bool(files)}))


if __name__ == "__main__":
    main()
