"""What a file says of the method that chose its codes, and whether it can be so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import gguf

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.guards import CALIBRATION
from gguf_moe.methods import KEY

CHUNKS, DAMPING, CALIBRATED_ON = "gguf_moe.gptq.chunks", "gguf_moe.gptq.damping", "gguf_moe.gptq.calibrated_on"
BASES = ("quantized", "original")  # layers that were calibrated on
_Type = gguf.GGUFValueType


def _is_hash(value: gguf.GGUFValue) -> bool:
    texts = list(value.value[:2]) if value.sub_type is _Type.STRING else []
    return len(texts) == 1 and isinstance(texts[0], str) and re.fullmatch("[0-9a-f]{64}", texts[0]) is not None


# What each key of gptq has to be, in their order in a file.
_GPTQ: dict[str, tuple[gguf.GGUFValueType, Callable[[gguf.GGUFValue], bool], str]] = {
    KEY: (_Type.STRING, lambda value: True, "'gptq'"),
    CALIBRATION: (_Type.ARRAY, _is_hash, "one text of 64 hexadecimal digits"),
    CHUNKS: (_Type.UINT32, lambda value: True, "a number"),
    DAMPING: (_Type.FLOAT32, lambda value: 0 < value.value < math.inf, "a positive number"),
    CALIBRATED_ON: (_Type.STRING, lambda value: value.value in BASES, " or ".join(map(repr, BASES))),
}
KEYS = tuple(_GPTQ)


@dataclass(frozen=True)
class Said:
    """That error feedback chose a file's codes. keys: as the file has them, in the method's order."""

    keys: dict[str, gguf.GGUFValue] = field(repr=False)
    problems: tuple[str, ...]  # of keys that are no such method's
    damping: float  # the least that can be said to have been; 0 where the file does not tell


def read_said(values: Mapping[str, gguf.GGUFValue]) -> Said | None:
    """What a file's keys say of its method; None where they are silent, which means ggml's own codes.

    Raises GgufMoeError for a method that is not known.
    """
    if (method := values.get(KEY)) is None:
        return None
    if method.type is not _Type.STRING or method.value != "gptq":
        found = f"{method.value!r:.60}" if method.type is not _Type.ARRAY else "an array"
        raise GgufMoeError(
            f"key {KEY} is {found} ({method.type.name}), expected 'gptq' (STRING), the only method that this version "
            "can check; verify with the gguf-moe that made the file"
        )
    problems = []
    for key, (kind, is_sound, expected) in _GPTQ.items():
        value = values.get(key)
        if value is None or value.type is not kind or not is_sound(value):
            found = "missing" if value is None else f"{_text(value)} ({value.type.name})"
            problems.append(f"key {key} is {found}, expected {expected} ({kind.name}); make the file anew")
    damping = 0.0 if any(problem.startswith(f"key {DAMPING} ") for problem in problems) else values[DAMPING].value
    return Said({key: _held(values[key]) for key in _GPTQ if key in values}, tuple(problems), damping)


def _held(value: gguf.GGUFValue) -> gguf.GGUFValue:
    """The value apart from the file that it was read from, which may change; but for long arrays, which are unsound."""
    if value.type is not _Type.ARRAY or len(value.value) > 1:
        return value
    return gguf.GGUFValue(list(value.value), value.type, value.sub_type)


def _text(value: gguf.GGUFValue) -> str:
    if value.type is not _Type.ARRAY:
        return f"{value.value!r:.60}"
    return f"{list(value.value[:2])!r:.60} of {len(value.value)} elements"
