"""llama.cpp's quantizer: `llama_model_quantize` through the cyllama package (xllamacpp's library does not export it).

It runs in a process of its own: two copies of llama.cpp in one would share C++'s unique symbols.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf

_CODE = """
import sys
from cyllama.llama import llama_cpp
source, target, file_type, requantize, copy = sys.argv[1:]
params = llama_cpp.LlamaModelQuantizeParams()
params.ftype, params.nthread = int(file_type), 2
params.allow_requantize, params.only_copy = requantize == "True", copy == "True"
llama_cpp.model_quantize(source, target, params)
"""


def quantize(
    source: Path, target: Path, file_type: str = "F32", *, allow_requantize: bool = False, copy: bool = False
) -> bytes:
    """What llama-quantize makes of a GGUF file, written to `target`. AssertionError with its words when it refuses."""
    member = "ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"
    arguments = [source, target, int(gguf.LlamaFileType[member]), allow_requantize, copy]
    command = [sys.executable, "-c", _CODE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target.read_bytes()
