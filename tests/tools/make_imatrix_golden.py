#!/usr/bin/env python3
"""What llama.cpp's collector makes of the bundled merge in float32: tests/golden/tidepool-float32.imatrix.gguf.

The F32 file, whose bytes are llama.cpp's own (test_golden.py), with F32 caches: no activation is rounded, so that the
statistic can be compared to the order of additions.

usage: make_imatrix_golden.py LLAMA_IMATRIX, the program that `make golden` builds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
MERGE, DATA = TESTS / "data" / "TidePool-4x4M-v1", TESTS / "data"
NAME = "tidepool-float32.imatrix.gguf"


def main() -> None:
    program = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        shutil.copytree(MERGE, folder / "merge")
        shutil.copy(DATA / "tokenizers" / "tidepool.tokenizer.model", folder / "merge" / "tokenizer.model")
        shutil.copy(DATA / "text" / "calib.txt", folder)
        convert = [sys.executable, "-m", "gguf_moe", "convert", "merge", "--quant", "F32", "-o", "f32.gguf"]
        collect = [program, "-m", "f32.gguf", "-f", "calib.txt", "-o", NAME, "--process-output", "--no-ppl"]
        exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
        for command in (convert, [*collect, *exact]):
            subprocess.run(command, cwd=folder, check=True)
        shutil.copy(folder / NAME, TESTS / "golden" / NAME)


if __name__ == "__main__":
    main()
