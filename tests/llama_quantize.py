"""llama.cpp's quantizer: the libllama of the npm package @node-llama-cpp/linux-x64 (xllamacpp does not export it).

`quantize` runs it in a process of its own: two libllama in one process would share C++'s unique symbols, and a failed
assertion of the neighbour's ends its process. The structures are those of the pinned version, and checked by defaults.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from ctypes import Structure, Union, c_bool, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import gguf

PACKAGE = "@node-llama-cpp/linux-x64@3.22.1"  # llama.cpp v0.5.0
CACHE = Path(__file__).resolve().parent.parent / "build" / "node-llama-cpp"
NO_TYPE = 43  # GGML_TYPE_COUNT: nothing asked
KV_TAGS = {"int": 0, "float": 1, "bool": 2, "str": 3}


class _TypeOverride(Structure):
    _fields_ = (("pattern", c_char_p), ("type", c_int))


class _Value(Union):
    _fields_ = (("int", c_int64), ("float", c_double), ("bool", c_bool), ("str", c_char * 128))


class _KeyOverride(Structure):
    _fields_ = (("tag", c_int), ("key", c_char * 128), ("value", _Value))


class _Params(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy")),
        *((name, c_bool) for name in ("pure", "keep_split", "dry_run")),
        *((name, c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", c_size_t),
    )


def quantize(
    source: Path,
    target: Path,
    file_type: str,
    *,
    tensor_types: Sequence[tuple[str, str]] = (),
    output: str | None = None,
    token_embedding: str | None = None,
    pure: bool = False,
    leave_output: bool = False,
    allow_requantize: bool = False,
    override_kv: Sequence[tuple[str, str, Any]] = (),
) -> None:
    """Quantize a GGUF file as llama-quantize does. Raises AssertionError with llama.cpp's words when it refuses.

    tensor_types: (regular expression, type); override_kv: (key, int | float | bool | str, value).
    """
    asked = {name: value for name, value in locals().items() if name not in ("source", "target")}
    command = [sys.executable, __file__, json.dumps({**asked, "source": str(source), "target": str(target)})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def _type(name: str | None) -> int:
    return NO_TYPE if name is None else int(gguf.GGMLQuantizationType[name])


def fetch() -> Path:
    """The package's directory of libraries; fetched with npm where it is not there yet."""
    target = CACHE / PACKAGE.rpartition("@")[2]
    if not target.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["npm", "pack", "--silent", PACKAGE, "--pack-destination", scratch], check=True, text=True)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                archive.extractall(scratch, filter="data")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(scratch) / "package" / "bins" / "linux-x64", target)
    return target


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(fetch().glob("libllama.v*.so"))))
    library.llama_model_quantize_default_params.restype = _Params
    return library


def _run(asked: Mapping[str, Any]) -> int:
    library = _library()
    params = library.llama_model_quantize_default_params()
    defaults = (params.output_tensor_type, params.token_embedding_type, params.quantize_output_tensor, params.pure)
    assert defaults == (NO_TYPE, NO_TYPE, True, False), f"llama_model_quantize_params has another layout: {defaults}"
    member = "ALL_F32" if asked["file_type"] == "F32" else f"MOSTLY_{asked['file_type']}"
    params.nthread, params.ftype = 2, int(gguf.LlamaFileType[member])
    params.output_tensor_type, params.token_embedding_type = _type(asked["output"]), _type(asked["token_embedding"])
    params.pure, params.quantize_output_tensor = asked["pure"], not asked["leave_output"]
    params.allow_requantize = asked["allow_requantize"]
    types = (_TypeOverride * (len(asked["tensor_types"]) + 1))()
    for entry, (pattern, kind) in zip(types, asked["tensor_types"]):
        entry.pattern, entry.type = pattern.encode(), _type(kind)
    keys = (_KeyOverride * (len(asked["override_kv"]) + 1))()
    for entry, (key, tag, value) in zip(keys, asked["override_kv"]):
        entry.tag, entry.key = KV_TAGS[tag], key.encode()
        setattr(entry.value, tag, value.encode() if tag == "str" else value)
    params.tt_overrides = ctypes.addressof(types) if asked["tensor_types"] else None
    params.kv_overrides = ctypes.addressof(keys) if asked["override_kv"] else None
    return library.llama_model_quantize(asked["source"].encode(), asked["target"].encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(_run(json.loads(sys.argv[1])))
