"""Models in several files, as llama.cpp's tools make them: where they are cut, what shards say and are called.

Its converter and its llama-gguf-split differ in two things: the converter counts tensors without padding, and orders
the keys otherwise. `by_converter` follows it; else llama-gguf-split, which is what cuts a quantized file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from gguf_moe.errors import UsageError
from gguf_moe.gguf_file import padded

MAX_SHARDS = 65535  # split.count is a u16; the names have five digits
NO, COUNT, TENSORS = (
    gguf.Keys.Split.LLM_KV_SPLIT_NO,
    gguf.Keys.Split.LLM_KV_SPLIT_COUNT,
    gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,
)


@dataclass(frozen=True)
class Splitting:
    """When a new shard begins. A tensor that is larger than `max_bytes` of data has a shard to itself."""

    max_bytes: int | None = None
    max_tensors: int | None = None
    tensors_in_first: bool = True  # else the first shard holds the metadata alone


def cut(sizes: Sequence[int], splitting: Splitting, *, by_converter: bool) -> list[range]:
    """The tensors of each shard, as ranges of their numbers. sizes: bytes of each tensor, without padding.

    Raises UsageError for more shards than GGUF can count.
    """
    starts = [0] if splitting.tensors_in_first else [0, 0]
    held = 0
    for number, nbytes in enumerate(sizes):
        nbytes = nbytes if by_converter else padded(nbytes)
        count = number - starts[-1]
        too_many = splitting.max_tensors is not None and count >= splitting.max_tensors
        too_large = splitting.max_bytes is not None and held + nbytes > splitting.max_bytes
        if count and (too_many or too_large):
            starts.append(number)
            held = 0
        held += nbytes
    if len(starts) > MAX_SHARDS:
        raise UsageError(f"{len(starts)} shards, but GGUF counts at most {MAX_SHARDS}; allow larger ones")
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)])]


def shard_suffix(number: int, count: int) -> str:
    """What stands between the name and .gguf; `number` from 0, the name counts from 1."""
    return f"-{number + 1:05}-of-{count:05}"


def split_keys(number: int, count: int, tensors: int, *, by_converter: bool) -> dict[str, Any]:
    """The keys of a shard, `number` from 0; the first has the model's keys before them. tensors: of all shards."""
    keys = {
        NO: gguf.GGUFValue(number, gguf.GGUFValueType.UINT16),
        COUNT: gguf.GGUFValue(count, gguf.GGUFValueType.UINT16),
        TENSORS: gguf.GGUFValue(tensors, gguf.GGUFValueType.INT32),
    }
    return {key: keys[key] for key in ((NO, COUNT, TENSORS) if by_converter else (NO, TENSORS, COUNT))}
