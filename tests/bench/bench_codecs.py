"""Speed of the codecs beside ggml's, on one core: python tests/bench/bench_codecs.py [--json FILE]

512 x 4096 float32 weights, normal * 0.02; encoding by each of our backends and by ggml_quantize_chunk (libggml-python)
alternately in this process, best of five by processor time, without and with importance. Bytes are compared with
ggml's, with importance with those of the current ggml in xllamacpp. Prints a table; no limit is checked here.
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

from quant import BACKENDS, FORMATS, dequantize, quantize, use_backend  # noqa: E402

ROWS, COLUMNS, ROUNDS = 512, 4096, 5
BEST = BACKENDS[-1]


def measure(fmt: str, x: np.ndarray, importance: np.ndarray | None) -> dict:
    """Millions of weights a second for one format, by backend; "ggml" and "decode" (our best backend's) beside."""
    timed, current = oracle.load("libggml-python"), oracle.load("xllamacpp")
    want = (timed if importance is None else current).quantize(x, fmt, importance)
    best = dict.fromkeys([*BACKENDS, "decode", "ggml"], float("inf"))
    equal = True
    for _ in range(ROUNDS):
        for name in best:
            use_backend(BEST if name in ("decode", "ggml") else name)
            start = time.process_time()
            if name == "ggml":
                result = timed.quantize(x, fmt, importance)
            elif name == "decode":
                result = dequantize(want, fmt)
            else:
                result = quantize(x, fmt, importance)
            best[name] = min(best[name], time.process_time() - start)
            equal &= name in ("decode", "ggml") or np.array_equal(result, want)
            del result
    speed = {name: x.size / 1e6 / seconds for name, seconds in best.items()}
    return {"format": fmt, "importance": importance is not None, **speed, "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
    w = np.abs(rng.standard_normal(COLUMNS, np.float32))
    out = sys.stdout.write
    out(f"NumPy {np.__version__}, ggml {oracle.load('libggml-python').version}, one core, Mweights/s\n\n")
    out(f"| format | {' | '.join(BACKENDS)} | ggml | {BEST} / ggml | bytes equal | our decoding |\n")
    out("|---|" + "---:|" * (len(BACKENDS) + 2) + "---|---:|\n")
    rows = []
    for fmt in FORMATS:
        for importance in (None, w) if FORMATS[fmt].block_length > 1 else (None,):
            row = measure(fmt, x, importance)
            rows.append(row)
            out(f"| {fmt}{' with importance' if row['importance'] else ''} | ")
            out(
                " | ".join(
                    f"{row[name]:.0f}" if row[name] >= 100 else f"{row[name]:.1f}" for name in (*BACKENDS, "ggml")
                )
            )
            out(f" | {row[BEST] / row['ggml']:.1f} | {'yes' if row['equal'] else 'NO'} | {row['decode']:.0f} |\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
