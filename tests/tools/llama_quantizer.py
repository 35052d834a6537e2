"""llama.cpp's quantizer with everything it can be asked, for golden data: the libllama that `make golden` builds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import Structure, Union, c_bool, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import gguf

NO_TYPE = 43  # GGML_TYPE_COUNT: nothing asked
KV_TAGS = {"int": 0, "float": 1, "bool": 2, "str": 3}


class _TypeOverride(Structure):
    _fields_ = (("pattern", c_char_p), ("type", c_int))


class _Value(Union):
    _fields_ = (("int", c_int64), ("float", c_double), ("bool", c_bool), ("str", c_char * 128))


class _KeyOverride(Structure):
    _fields_ = (("tag", c_int), ("key", c_char * 128), ("value", _Value))


class _Params(Structure):
    """llama_model_quantize_params of that build."""

    _fields_ = (
        *((name, c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy")),
        *((name, c_bool) for name in ("pure", "keep_split", "dry_run")),
        *((name, c_void_p) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", c_size_t),
    )


_SILENT = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)


def load_quantizer(library: str) -> Callable[..., None]:
    """`quantize` below, of that library. AssertionError where the library's structures are others."""
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _Params
    llama.llama_log_set(_SILENT, None)
    params = llama.llama_model_quantize_default_params()
    defaults = (params.output_tensor_type, params.token_embedding_type, params.quantize_output_tensor, params.pure)
    assert defaults == (NO_TYPE, NO_TYPE, True, False), f"llama_model_quantize_params has another layout: {defaults}"

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
        override_kv: Sequence[tuple[str, str, Any]] = (),
    ) -> None:
        """Quantize a GGUF file as llama-quantize does; AssertionError when it refuses.

        tensor_types: (regular expression, type); override_kv: (key, int | float | bool | str, value).
        """
        params = llama.llama_model_quantize_default_params()
        params.nthread, params.ftype = 2, int(gguf.LlamaFileType[f"MOSTLY_{file_type}"])
        params.output_tensor_type, params.token_embedding_type = _type(output), _type(token_embedding)
        params.pure, params.quantize_output_tensor = pure, not leave_output
        types = (_TypeOverride * (len(tensor_types) + 1))()  # both lists end with an empty entry
        for entry, (pattern, kind) in zip(types, tensor_types):
            entry.pattern, entry.type = pattern.encode(), _type(kind)
        keys = (_KeyOverride * (len(override_kv) + 1))()
        for entry, (key, tag, value) in zip(keys, override_kv):
            entry.tag, entry.key = KV_TAGS[tag], key.encode()
            setattr(entry.value, tag, value.encode() if tag == "str" else value)
        params.tt_overrides = ctypes.addressof(types) if tensor_types else None
        params.kv_overrides = ctypes.addressof(keys) if override_kv else None
        status = llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
        assert status == 0, f"llama_model_quantize: {status}"

    return quantize


def _type(name: str | None) -> int:
    return NO_TYPE if name is None else int(gguf.GGMLQuantizationType[name])
