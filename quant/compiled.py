"""The C kernels (quant/native) behind NumPy arrays: checks, strides and addresses. Releases the GIL."""

from __future__ import annotations

import importlib
import sys

import numpy as np

from .formats import FORMATS, Format

try:
    _native = importlib.import_module("quant._native")  # `from . import` would hide why it is missing
    LEVELS: tuple[str, ...] = _native.levels() if sys.byteorder == "little" else ()
    MISSING = "" if LEVELS else "this machine is big-endian"
except ImportError as error:
    LEVELS, MISSING = (), str(error)

_SOURCE_TYPES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}


def _rows(x: np.ndarray) -> np.ndarray:
    """x as [rows, columns] with contiguous columns: the same memory where that is possible."""
    x = np.atleast_2d(x)
    return x if x.shape[1] <= 1 or x.strides[1] == x.itemsize else np.ascontiguousarray(x)


def encode(level: str, form: Format, x: np.ndarray, importance: np.ndarray | None, out: np.ndarray) -> None:
    """Encode x (float32, float16 or bfloat16 bits, [..., columns]) to records out [..., blocks], C-contiguous.

    importance: float32 of x's shape, the same for all rows of a matrix, or None.
    """
    source_type = FORMATS[_SOURCE_TYPES[x.dtype]].ggml_id
    for lead in np.ndindex(x.shape[:-2]):
        rows, target = _rows(x[lead]), out[lead]
        if not target.size:
            continue
        weights = None if importance is None else np.ascontiguousarray(np.atleast_2d(importance[lead])[0])
        _native.encode(
            LEVELS.index(level),
            form.ggml_id,
            rows.ctypes.data,
            source_type,
            *rows.shape,
            rows.strides[0],
            0 if weights is None else weights.ctypes.data,
            target.ctypes.data,
        )


def decode(level: str, form: Format, blocks: np.ndarray, out: np.ndarray) -> None:
    """Decode records [..., blocks] to float32 out [..., columns], C-contiguous."""
    for lead in np.ndindex(blocks.shape[:-2]):
        rows, target = _rows(blocks[lead]), np.atleast_2d(out[lead])
        if target.size:
            _native.decode(
                LEVELS.index(level), form.ggml_id, rows.ctypes.data, *target.shape, rows.strides[0], target.ctypes.data
            )


def first_nonfinite(level: str, x: np.ndarray) -> int:
    """Number of the first infinity or NaN in x [rows, columns], dtypes as of `encode`; -1 if there is none."""
    rows = _rows(x)
    source_type = FORMATS[_SOURCE_TYPES[x.dtype]].ggml_id
    return _native.first_nonfinite(LEVELS.index(level), rows.ctypes.data, source_type, *rows.shape, rows.strides[0])
