"""Block codecs of GGUF files: the bytes of ggml's quantization formats from float weights, and back. NumPy,
and C kernels where they are installed.

`quantize` gives ggml's own bytes for every block, `dequantize` its float32 bits. Both work in pieces that fit the
processor's cache; neither result depends on the size of the pieces, on strides or on threads. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import codes, compiled
from .backend import BACKENDS, CODECS, backend, level, use_backend
from .floats import from_bf16
from .formats import FORMATS, Format, format_named

__all__ = [
    "BACKENDS",
    "CODED",
    "FORMATS",
    "Format",
    "backend",
    "dequantize",
    "first_nonfinite",
    "first_nonfinite_scale",
    "grid",
    "levels",
    "quantize",
    "use_backend",
    "with_codes",
]

CODED = tuple(codes.CODES)  # formats that have codes, of which `levels`, `grid` and `with_codes` know

PIECE = 1 << 17  # weights encoded at a time: few enough for the caches, enough to hide the cost of a NumPy call


def quantize(x: np.ndarray, fmt: str, importance: np.ndarray | None = None, *, dtype: str | None = None) -> np.ndarray:
    """Encode weights.

    x: float32 or float16 [..., columns], any strides, may be read-only; or uint16 bit patterns with dtype="bf16".
    fmt: a name in FORMATS, any case. importance: how much each column matters, float32 [columns], or [experts, columns]
    for x [experts, ..., columns]; finite and not negative. As in ggml, Q8_0 and the formats of one weight ignore it.
    Returns uint8 [..., row bytes], rows without padding.

    Nothing is clamped: a scale may overflow to infinity, see `first_nonfinite_scale`.
    TypeError: the dtype of x. ValueError: unknown format or dtype name, no column axis, columns that are not a
    multiple of the block length, importance of another shape, negative or not finite.
    """
    form = format_named(fmt)
    x = np.asarray(x)
    _check_dtype(x, dtype)
    if x.ndim == 0:
        raise ValueError(f"{form.name}: expected an array [..., columns], got a scalar")
    form.row_bytes(x.shape[-1])
    n = form.block_length
    out = np.empty((*x.shape[:-1], x.shape[-1] // n), form.dtype)
    weights = None if importance is None else _check_importance(importance, x)
    if native := level():
        compiled.encode(native, form, x, weights, out)
        return _as_bytes(out)
    encode, _ = CODECS[form.name]
    with np.errstate(all="ignore"):  # overflow, inf and NaN take the course ggml gives them
        for at in _pieces(x.shape, n, whole_rows=weights is not None):
            blocks = _widen(x[at], dtype).reshape(-1, n)  # [blocks, n]
            w = None if weights is None else np.ascontiguousarray(weights[at]).reshape(-1, n)
            target = out[_in_blocks(at, n)]
            target[...] = encode(blocks, w, target.shape[-1]).reshape(target.shape)
    return _as_bytes(out)


def dequantize(data: np.ndarray, fmt: str) -> np.ndarray:
    """Decode blocks: uint8 [..., row bytes], any strides, to float32 [..., columns].

    TypeError: data is not uint8. ValueError: unknown format, or row bytes that are not a multiple of a block's.
    """
    form, blocks = _as_blocks(data, fmt)
    n = form.block_length
    out = np.empty((*blocks.shape[:-1], blocks.shape[-1] * n), np.float32)
    if native := level():
        compiled.decode(native, form, blocks, out)
        return out
    _, decode = CODECS[form.name]
    with np.errstate(all="ignore"):
        for at in _pieces(out.shape, n):
            source = np.ascontiguousarray(blocks[_in_blocks(at, n)]).reshape(-1)
            out[at] = decode(source).reshape(out[at].shape)
    return out


def levels(fmt: str) -> np.ndarray:
    """What each code of a format stands for, before step and offset: float32 [codes], rising. ValueError: as `grid`."""
    return codes.find(format_named(fmt)).levels


def grid(data: np.ndarray, fmt: str) -> tuple[np.ndarray, np.ndarray]:
    """What a block's scales make of codes: step and offset, float32 [..., columns]. Code q of a weight stands for
    offset + step * levels[q], but for rounding.

    data: uint8 [..., row bytes]. ValueError: a format without codes, and as `dequantize`.
    """
    of = levels(fmt)
    low, high = (dequantize(with_codes(data, fmt, q), fmt) for q in (0, len(of) - 1))
    with np.errstate(all="ignore"):  # a scale that is not finite gives a step that is none
        step = (high - low) / (of[-1] - of[0])
        return step, low - step * of[0]


def with_codes(data: np.ndarray, fmt: str, q: np.ndarray | int) -> np.ndarray:
    """Blocks with other codes and the same scales: uint8 [..., row bytes].

    data: uint8 [..., row bytes]. q: uint8 [..., columns], or one for all; indices of `levels`. ValueError: as `grid`.
    """
    form, blocks = _as_blocks(data, fmt)
    coding = codes.find(form)
    out = blocks.copy()
    shape = (*blocks.shape[:-1], blocks.shape[-1] * form.block_length)
    flat = np.broadcast_to(np.asarray(q, np.uint8), shape).reshape(-1, form.block_length)
    coding.put(out.reshape(-1), flat)
    return _as_bytes(out)


def first_nonfinite(x: np.ndarray, *, dtype: str | None = None) -> int | None:
    """Index, counted over all weights in order, of the first infinity or NaN, which no block can hold. None if there is
    none. x, dtype and errors as of `quantize`."""
    x = np.asarray(x)
    _check_dtype(x, dtype)
    if not x.size:
        return None
    rows = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    if native := level():
        found = compiled.first_nonfinite(native, rows)
        return None if found < 0 else found
    height = max(1, PIECE // rows.shape[1])
    for start in range(0, len(rows), height):
        finite = np.isfinite(_widen(rows[start : start + height], dtype))
        if not finite.all():
            return start * rows.shape[1] + int(np.argmin(finite))
    return None


def first_nonfinite_scale(data: np.ndarray, fmt: str) -> int | None:
    """Index, counted over all blocks in order, of the first with an infinite or NaN scale field (d, dmin, m; in F32,
    F16 and BF16 the value itself). None if there is none. Errors as `dequantize`."""
    form, blocks = _as_blocks(data, fmt)
    if form.block_length == 1:
        return first_nonfinite(blocks["x"], dtype="bf16" if form.name == "BF16" else None)
    first = None
    for field in form.scale_fields:
        finite = np.isfinite(blocks[field].ravel())
        if not finite.all():
            index = int(np.argmin(finite))
            first = index if first is None else min(first, index)
    return first


def _check_dtype(x: np.ndarray, dtype: str | None) -> None:
    if dtype not in (None, "bf16"):
        raise ValueError(f"unknown dtype {dtype!r}; known: 'bf16', or None for the array's own")
    if dtype == "bf16":
        if x.dtype != np.uint16:
            raise TypeError(f'dtype="bf16" needs uint16 bit patterns, got {x.dtype}')
    elif x.dtype not in (np.float32, np.float16):
        hint = {"float64": "; cast it first: x.astype(np.float32)", "uint16": '; bfloat16 bits need dtype="bf16"'}
        raise TypeError(f"expected float32 or float16 weights, got {x.dtype}{hint.get(x.dtype.name, '')}")


def _widen(piece: np.ndarray, dtype: str | None) -> np.ndarray:
    if dtype == "bf16":
        return from_bf16(np.ascontiguousarray(piece))
    return np.ascontiguousarray(piece, np.float32)


def _check_importance(importance: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Importance as a read-only float32 view of x's shape."""
    w = np.asarray(importance)
    if w.dtype != np.float32:
        raise TypeError(f"expected float32 importance, got {w.dtype}")
    if w.shape not in ((x.shape[-1],), (x.shape[0], x.shape[-1])) or (w.ndim == 2 and x.ndim < 3):
        stacked = f" or {[x.shape[0], x.shape[-1]]}, a row an expert" if x.ndim > 2 else ""
        raise ValueError(f"importance has shape {list(w.shape)}, expected {[x.shape[-1]]}{stacked}")
    bad = ~(np.isfinite(w) & (w >= 0))
    if bad.any():
        place = np.argwhere(bad)[0]
        raise ValueError(f"importance{place.tolist()} is {w[tuple(place)]}, expected a finite number of at least 0")
    if w.ndim == 2:
        w = w.reshape(len(w), *(1,) * (x.ndim - 2), -1)
    return np.broadcast_to(w, x.shape)


def _pieces(shape: tuple[int, ...], n: int, *, whole_rows: bool = False) -> Iterator[tuple]:
    """Indices that cut an array [..., columns] into parts of about PIECE weights, at multiples of n columns."""
    columns = shape[-1]
    width = columns if whole_rows else max(n, min(columns, PIECE // n * n))
    height = max(1, PIECE // max(width, 1))
    for lead in np.ndindex(shape[:-2]):
        for row in range(0, shape[-2] if len(shape) > 1 else 1, height):
            rows = (slice(row, row + height),) if len(shape) > 1 else ()
            for column in range(0, columns, max(width, 1)):
                yield (*lead, *rows, slice(column, column + width))


def _in_blocks(at: tuple, n: int) -> tuple:
    """The same part of the array of blocks."""
    return (*at[:-1], slice(at[-1].start // n, at[-1].stop // n))


def _as_bytes(blocks: np.ndarray) -> np.ndarray:
    """Records [..., blocks] to uint8 [..., row bytes]."""
    return blocks.view(np.uint8) if blocks.size else np.empty(_byte_shape(blocks), np.uint8)


def _byte_shape(blocks: np.ndarray) -> tuple[int, ...]:
    return (*blocks.shape[:-1], blocks.shape[-1] * blocks.itemsize)


def _as_blocks(data: np.ndarray, fmt: str) -> tuple[Format, np.ndarray]:
    """uint8 [..., row bytes] to records [..., blocks]."""
    form = format_named(fmt)
    data = np.asarray(data)
    if data.dtype != np.uint8:
        raise TypeError(f"{form.name}: expected uint8 data, got {data.dtype}")
    if data.ndim == 0 or data.shape[-1] % form.block_bytes:
        length = data.shape[-1] if data.ndim else "a scalar"
        raise ValueError(f"{form.name}: rows of {length} bytes are not a multiple of the block's {form.block_bytes}")
    if not data.size:
        return form, np.empty((*data.shape[:-1], data.shape[-1] // form.block_bytes), form.dtype)
    if data.strides[-1] != 1:
        data = np.ascontiguousarray(data)
    return form, data.view(form.dtype)
