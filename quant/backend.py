"""Which implementation of the codecs runs: the C kernels at the best level of this CPU, or NumPy. Said openly.

A NumPy codec is a pair of functions:
    encode(x, importance, row_blocks) -> records [blocks]
        x: float32 [blocks, block_length], C-contiguous, left as it is. importance: None, or float32 of the same shape;
        then x is whole rows of row_blocks blocks, since some formats weigh by a mean over the row.
    decode(records [blocks]) -> float32 [blocks, block_length]
"""

from __future__ import annotations

import os
from collections.abc import Callable

from . import compiled, floats, iquants, kquants, legacy

CODECS: dict[str, tuple[Callable, Callable]] = {**floats.CODECS, **legacy.CODECS, **kquants.CODECS, **iquants.CODECS}

VARIABLE = "QUANT_BACKEND"
BACKENDS = ("numpy", *compiled.LEVELS)  # the last is the best


def use_backend(name: str | None) -> None:
    """Run one of BACKENDS from now on: "numpy", or a CPU level of the C kernels; None for the best there is.

    ValueError lists the names that this machine and installation have.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        missing = f"; the C kernels are missing: {compiled.MISSING}" if compiled.MISSING else ""
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}{missing}")
    _chosen = name or BACKENDS[-1]


def level() -> str | None:
    """The CPU level of the C kernels in use, or None for NumPy."""
    return None if _chosen == "numpy" else _chosen


def backend() -> str:
    """What runs, for people: "native avx512", "numpy", or "numpy (no native: reason)"."""
    if _chosen != "numpy":
        return f"native {_chosen}"
    return f"numpy (no native: {compiled.MISSING})" if compiled.MISSING else "numpy"


_chosen = "numpy"
use_backend(os.environ.get(VARIABLE) or None)
