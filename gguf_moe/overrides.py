"""Keys that a user sets by hand: KEY=TYPE:VALUE, written where and as llama.cpp's quantizer writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import gguf
import numpy as np

from gguf_moe.errors import UsageError

MAX_BYTES = 127  # of a key and of a text, as llama.cpp's buffers have it
_Type = gguf.GGUFValueType
_INTEGERS = (_Type.UINT8, _Type.INT8, _Type.UINT16, _Type.INT16, _Type.UINT32, _Type.INT32, _Type.UINT64, _Type.INT64)
# What a key may be overridden with, by the type that it has.
_KINDS = {
    **dict.fromkeys(_INTEGERS, "int"),
    _Type.FLOAT32: "float",
    _Type.FLOAT64: "float",
    _Type.BOOL: "bool",
    _Type.STRING: "str",
}
_WRITTEN = {"int": _Type.UINT32, "float": _Type.FLOAT32, "bool": _Type.BOOL, "str": _Type.STRING}

# Keys that follow from the tensors or the file's make-up: another value makes a file that loads wrongly or not at all.
_FIXED_LLM = (
    *(gguf.Keys.LLM.BLOCK_COUNT, gguf.Keys.LLM.EMBEDDING_LENGTH, gguf.Keys.LLM.FEED_FORWARD_LENGTH),
    *(gguf.Keys.LLM.EXPERT_COUNT, gguf.Keys.LLM.VOCAB_SIZE, gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH),
    *(gguf.Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, gguf.Keys.LLM.LEADING_DENSE_BLOCK_COUNT),
    *(gguf.Keys.LLM.EXPERT_SHARED_COUNT, gguf.Keys.Attention.HEAD_COUNT, gguf.Keys.Attention.HEAD_COUNT_KV),
    *(gguf.Keys.Attention.KEY_LENGTH, gguf.Keys.Attention.VALUE_LENGTH, gguf.Keys.Rope.DIMENSION_COUNT),
)
_FIXED = (
    *(gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.TYPE, gguf.Keys.General.ALIGNMENT),
    *(gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION),
    *(gguf.Keys.General.BASE_MODEL_COUNT, gguf.Keys.General.DATASET_COUNT),
    *(gguf.Keys.Tokenizer.MODEL, gguf.Keys.Split.LLM_KV_SPLIT_NO, gguf.Keys.Split.LLM_KV_SPLIT_COUNT),
    gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,
)


def apply_overrides(
    keys: dict[str, Any], overrides: Sequence[str], architecture: str, vocabulary: int
) -> tuple[dict[str, Any], list[str]]:
    """The keys with the overrides in their order at the end, also those that were there before; and warnings.

    keys: `gguf.GGUFValue` by key. Raises UsageError for what is no override, for keys that other things decide, and
    for a value of another type than the key has.
    """
    keys = dict(keys)
    known = frozenset(_known(gguf.Keys, architecture))
    warnings = []
    for text in overrides:
        key, kind, value = _parse(text)
        _check(text, key, kind, value, keys.get(key), architecture, vocabulary)
        if key not in keys and key not in known:
            warnings.append(f"--override-kv {text}: {key} is no key of llama.cpp's that gguf-moe knows of")
        keys.pop(key, None)
        keys[key] = gguf.gguf_writer.GGUFValue(value, _WRITTEN[kind])
    return keys, warnings


def _parse(text: str) -> tuple[str, str, Any]:
    key, separator, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not key or not separator or not colon or kind not in _WRITTEN:
        raise UsageError(f"--override-kv {text}: expected KEY=TYPE:VALUE with a TYPE of {', '.join(_WRITTEN)}")
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise UsageError(f"--override-kv {text}: not valid UTF-8")
    for what, part in (("key", key), ("value", value)):
        if (size := len(part.encode())) > MAX_BYTES:
            raise UsageError(f"--override-kv {text}: a {what} of {size} bytes, llama.cpp takes {MAX_BYTES} at most")
    return key, kind, _value(text, kind, value)


def _value(text: str, kind: str, value: str) -> Any:
    """The value; a negative integer is refused because llama.cpp writes its absolute value."""
    if kind == "str":
        return value
    if kind == "bool":
        if value in ("true", "false"):
            return value == "true"
        raise UsageError(f"--override-kv {text}: {value!r}, expected true or false")
    if kind == "int":
        if value.isascii() and value.isdigit() and int(value) < 1 << 32:
            return int(value)
        raise UsageError(f"--override-kv {text}: {value!r}, expected an integer from 0 to 4294967295")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise UsageError(f"--override-kv {text}: {value!r}, expected a finite 32-bit number")
    return number


def _check(text: str, key: str, kind: str, value: Any, present: Any, architecture: str, vocabulary: int) -> None:
    """Refuse what would break the file, or is said better elsewhere."""
    if key == gguf.Keys.LLM.EXPERT_USED_COUNT.format(arch=architecture):
        raise UsageError(f"--override-kv {text}: give --experts-used, which checks the number")
    if key in _FIXED or key in [fixed.format(arch=architecture) for fixed in _FIXED_LLM]:
        raise UsageError(f"--override-kv {text}: {key} follows from the tensors or the file and cannot be set")
    if present is not None and _KINDS.get(present.type) != kind:
        wanted = _KINDS.get(present.type)
        remedy = f"expected {wanted}" if wanted else "a list, which cannot be overridden"
        raise UsageError(f"--override-kv {text}: {key} is of type {present.type.name}, {remedy}")
    if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
        if kind != "int":
            raise UsageError(f"--override-kv {text}: a token id, expected int")
        if value >= vocabulary:
            raise UsageError(f"--override-kv {text}: token {value}, but the vocabulary has {vocabulary}")


def _known(namespace: type, architecture: str) -> Iterator[str]:
    """Every key that the gguf package has a name for."""
    for name, value in vars(namespace).items():
        if name.startswith("__"):
            continue
        if isinstance(value, str):
            yield value.replace("{arch}", architecture)
        elif isinstance(value, type):
            yield from _known(value, architecture)
