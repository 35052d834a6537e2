#!/usr/bin/env python3
"""The shards that llama.cpp's converter and llama-gguf-split make of the bundled merge: tests/golden/splits.json.

usage: PYTHONPATH=LLAMA_CPP:LLAMA_CPP/gguf-py make_splits_golden.py LIBLLAMA LLAMA_GGUF_SPLIT, as `make golden` does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import convert_hf_to_gguf  # noqa: E402
from checkpoints import for_the_converter  # noqa: E402
from llama_quantizer import load_quantizer  # noqa: E402

CONVERTER = {
    "BF16": (
        ("--split-max-size", "2M"),
        ("--split-max-size", "3M"),
        ("--split-max-size", "500K"),
        ("--split-max-size", "6291456"),
        ("--split-max-size", "4M", "--no-tensor-first-split"),
        ("--split-max-tensors", "1"),
        ("--split-max-tensors", "10"),
        ("--split-max-tensors", "10", "--no-tensor-first-split"),
        ("--split-max-tensors", "100"),
        ("--split-max-tensors", "4", "--split-max-size", "3M"),
        ("--no-tensor-first-split",),
    ),
    "F32": (("--split-max-size", "8M"), ("--split-max-tensors", "20", "--no-tensor-first-split")),
}
SPLIT = {  # the last of BF16 is refused, since its first tensor is larger
    "BF16": (
        ("--split-max-size", "3M"),
        ("--split-max-tensors", "12"),
        ("--split-max-size", "2M"),
    ),
    "Q4_K_M": (
        ("--split-max-size", "1M"),
        ("--split-max-size", "2M"),
        ("--split-max-size", "2M", "--no-tensor-first-split"),
        ("--split-max-tensors", "1"),
        ("--split-max-tensors", "10"),
        ("--split-max-tensors", "14", "--no-tensor-first-split"),
    ),
    "Q2_K": (("--split-max-size", "1M"), ("--split-max-tensors", "7")),
}


def shards(directory: Path, make: Callable[[Path], None]) -> dict[str, str]:
    """SHA-256 by name of the files that `make` leaves in an empty directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    make(directory)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def convert(source: Path, target: Path, quant: str, options: Sequence[str]) -> None:
    sys.argv[1:] = [str(source), "--outfile", str(target), "--outtype", quant.lower(), *options]
    convert_hf_to_gguf.main()


def main() -> None:
    library, tool = sys.argv[1:]
    quantize, results = load_quantizer(library), []
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        merge = for_the_converter(Path(scratch))
        whole, out = {kind: Path(scratch) / f"{kind}.gguf" for kind in SPLIT}, Path(scratch) / "out"
        convert(merge, whole["BF16"], "BF16", ())
        for kind in whole.keys() - {"BF16"}:
            quantize(whole["BF16"], whole[kind], kind)
        for kind, cases in CONVERTER.items():
            for options in cases:
                made = shards(out, lambda d: convert(merge, d / "x.gguf", kind, options))  # noqa: B023
                results.append({"tool": "converter", "quant": kind, "options": options, "shards": made})
        for kind, cases in SPLIT.items():
            for options in cases:
                command = [tool, *options, whole[kind], out / "x"]
                made = shards(out, lambda d: subprocess.run(command, check=False, stdout=sys.stderr))  # noqa: B023
                results.append({"tool": "gguf-split", "quant": kind, "options": options, "shards": made})
    lines = ",\n".join(json.dumps(result) for result in results)
    (TESTS / "golden" / "splits.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
