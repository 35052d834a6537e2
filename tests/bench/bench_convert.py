"""Time of whole conversions of a generated bf16 Mixtral of 1.1 billion parameters: python tests/bench/bench_convert.py

Q4_K_M beside BF16 (reading and writing without
encoding), the model read from disk and from the page cache, three rounds in turn, the best of each. Files lie in a
temporary directory (some 5 GB). No limit is checked.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from billion import forget, generate  # noqa: E402

from gguf_moe.checkpoint import open_checkpoint  # noqa: E402
from gguf_moe.convert import convert  # noqa: E402
from gguf_moe.plan import make_plan  # noqa: E402
from gguf_moe.recipe import find_file_type  # noqa: E402

ROUNDS = 3


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
