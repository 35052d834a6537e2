"""Speed of the codecs beside ggml's, on one core: python tests/bench/bench_codecs.py [--json FILE]

512 x 4096 float32 weights, normal * 0.02; encoding by ours and by ggml_quantize_chunk alternately in this process, best
of five by processor time. Prints a table; no limit is checked here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "quant")]

import oracle  # noqa: E402

from quant import FORMATS, backend, dequantize, quantize  # noqa: E402

ROWS, COLUMNS, ROUNDS = 512, 4096, 5


def measure(fmt: str, x: np.ndarray, ggml: oracle.Ggml) -> dict:
    """Millions of weights a second for one format."""
    data = quantize(x, fmt)
    calls = {
        "ours": lambda: quantize(x, fmt),
        "ggml": lambda: ggml.quantize(x, fmt),
        "decode": lambda: dequantize(data, fmt),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    speed = {name: x.size / 1e6 / seconds for name, seconds in best.items()}
    equal = data.tobytes() == ggml.quantize(x, fmt).tobytes()
    return {"format": fmt, **speed, "ratio": speed["ours"] / speed["ggml"], "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    x = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
    ggml = oracle.load("libggml-python")
    out = sys.stdout.write
    out(f"backend {backend()}, NumPy {np.__version__}, ggml {ggml.version}, one core, millions of weights a second\n\n")
    out("| format | ours | ggml | ratio | bytes equal | our decoding |\n|---|---:|---:|---:|---|---:|\n")
    rows = []
    for fmt in FORMATS:
        row = measure(fmt, x, ggml)
        rows.append(row)
        out(f"| {fmt} | {row['ours']:.1f} | {row['ggml']:.1f} | {row['ratio']:.2f} | ")
        out(f"{'yes' if row['equal'] else 'NO'} | {row['decode']:.0f} |\n")
    if options.json:
        options.json.write_text(json.dumps({"backend": backend(), "ggml": ggml.version, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
