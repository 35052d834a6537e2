"""Time and memory of the ten-level ladder of a generated bf16 Mixtral: python tests/bench/bench_export.py

Beside it, in the same run, ten single conversions, and what ggml would need for the same encodings: its time on a
sample of each tensor in the type of each level, scaled up, on as many threads. The model is read from disk each time.
Files lie in a temporary directory (some 11 GB). No limit is checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "quant")]

import oracle  # noqa: E402
from billion import forget, generate  # noqa: E402

from gguf_moe.checkpoint import open_checkpoint  # noqa: E402
from gguf_moe.convert import convert  # noqa: E402
from gguf_moe.export import LADDER  # noqa: E402
from gguf_moe.plan import Plan, make_plans  # noqa: E402
from gguf_moe.recipe import find_file_type  # noqa: E402

ROUNDS = 3
SAMPLE_ROWS = 64


def ggml_seconds(plans: list[Plan], threads: int) -> float:
    """What ggml needs to encode all tensors of all levels: a sample of each, on all threads at once, scaled up."""
    ggml = oracle.load("libggml-python")
    seconds = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for plan in plans:
            for tensor in plan.tensors:
                if tensor.info.type == "F32":
                    continue
                slab = tensor.mapped.slabs[0]
                rows = slab.read(slab.source.matrix(), 0, min(slab.rows, SAMPLE_ROWS))
                x = (rows.astype(np.uint32) << 16).view(np.float32)
                started = time.perf_counter()
                list(pool.map(ggml.quantize, [x] * threads, [tensor.info.type] * threads))
                seconds += (time.perf_counter() - started) * tensor.mapped.elements / (threads * x.size)
    return seconds


def timed(work: Callable[[], object], source: Path) -> float:
    """Seconds of `work`, with the model on disk and nothing left to be written from before."""
    forget(source)
    os.sync()
    started = time.monotonic()
    work()
    return time.monotonic() - started


def ladder(source: Path, target: Path) -> int:
    """`gguf-moe export` in a process of its own: its peak resident memory in kB."""
    code = "import re; from gguf_moe.cli import cli; cli(standalone_mode=False); "
    code += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    command = [sys.executable, "-c", code, "export", source, "-o", target]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        source = generate(Path(name) / "billion")
        plans = make_plans(open_checkpoint(source), [find_file_type(quant) for quant in LADDER])
        elements = plans[0].elements
        sys.stdout.write(f"{elements / 1e9:.2f} billion weights, {threads} threads\n")
        singles, whole, peaks = {}, [], []
        for _ in range(ROUNDS):
            for plan in plans:
                target = Path(name) / "single.gguf"
                seconds = timed(lambda plan=plan, target=target: convert(plan, target, force=True), source)
                singles[plan.file_type.name] = min(seconds, singles.get(plan.file_type.name, seconds))
                target.unlink()
            target = Path(name) / "ladder"
            whole.append(timed(lambda target=target: peaks.append(ladder(source, target)), source))
            shutil.rmtree(target)
        ggml = ggml_seconds(plans, threads)
    for quant, seconds in singles.items():
        sys.stdout.write(f"convert {quant}: {seconds:.2f} s\n")
    ours, alone = min(whole), sum(singles.values())
    sys.stdout.write(f"ladder of {len(plans)}: {ours:.2f} s; ten single runs {alone:.2f} s, ratio {ours / alone:.2f}\n")
    sys.stdout.write(f"ggml's encodings alone: {ggml:.1f} s, {ggml / ours:.1f} times the ladder\n")
    sys.stdout.write(f"peak resident memory of the ladder: {max(peaks) / 1024:.0f} MiB\n")


if __name__ == "__main__":
    main()
