"""Which implementation of the codecs runs. For now there is one, NumPy; a native one will be picked here, once.

A codec is a pair of functions:
    encode(x, importance, row_blocks) -> records [blocks]
        x: float32 [blocks, block_length], C-contiguous, left as it is. importance: None, or float32 of the same shape;
        then x is whole rows of row_blocks blocks, since some formats weigh by a mean over the row.
    decode(records [blocks]) -> float32 [blocks, block_length]
"""

from __future__ import annotations

from collections.abc import Callable

from . import floats, iquants, kquants, legacy

CODECS: dict[str, tuple[Callable, Callable]] = {**floats.CODECS, **legacy.CODECS, **kquants.CODECS, **iquants.CODECS}


def backend() -> str:
    """The name of the implementation in use: "numpy"."""
    return "numpy"


def encoder(name: str) -> Callable:
    """The encode function of the format called `name` (a key of FORMATS)."""
    return CODECS[name][0]


def decoder(name: str) -> Callable:
    """The decode function of the format called `name`."""
    return CODECS[name][1]
