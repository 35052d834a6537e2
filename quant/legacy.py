"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 32 weights, one scale, codes by one direct rounding.

Encoders take x and importance (or None), float32 [blocks, 32], return the records [blocks]. Decoders return float32
[blocks, 32]. Field names and formulas as in ggml's quantize_row_q4_0_ref .. quantize_row_q8_0_ref, and, with a search
instead of the direct rounding, quantize_row_q4_0_impl .. quantize_row_q5_1_impl where importance is given.
"""

from __future__ import annotations

import numpy as np

from .fit import F, affine, extremes, from_lanes, inverse, peak, strict_extremes, symmetric, to_lanes
from .floats import from_f16, to_f16
from .formats import FORMATS
from .packing import join_bits, join_planes, split_bits, split_planes
from .weighted import importance_weights, row_mean_square

FLT_MAX = np.finfo(np.float32).max


def trunc(v: np.ndarray) -> np.ndarray:
    """float32 to int32 toward zero; NaN and anything outside int32 give -2**31, on every machine (as on x86)."""
    inside = (v >= F(-(2.0**31))) & (v < F(2.0**31))  # false for NaN
    return np.where(inside, v, F(-(2.0**31))).astype(np.int32)


def _encode_signed(fmt: str, n_max: int):
    """Q4_0 and Q5_0: x ~ d * (q - n_max); d from the signed value of largest magnitude, so q = 0 is hit exactly."""

    def encode(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
        if importance is not None:
            lanes, w = _weigh(x, importance, row_blocks)
            scale, codes = symmetric(lanes, w, n_max)
            return _pack(fmt, from_lanes(codes, 32), scale)
        x = to_lanes(x, 32)
        bounds = extremes(x)
        _, m = peak(x, bounds)
        d = m / F(-n_max)
        r = inverse(d)
        reach = (np.maximum(np.abs(bounds[0]), np.abs(bounds[1])) * np.abs(r)).max()
        x *= r
        x += F(n_max + 0.5)
        if reach < n_max + 0.25:  # so 0.25 < x: minimum and truncation may change places
            q = np.minimum(x, F(2 * n_max - 1), out=x)
        else:
            q = np.minimum(trunc(x).astype(np.int8), np.int8(2 * n_max - 1)).view(np.uint8)
        return _pack(fmt, from_lanes(q, 32), d)

    return encode


def _encode_affine(fmt: str, n_max: int):
    """Q4_1 and Q5_1: x ~ d * q + m, m the smallest value, d the range over n_max."""

    def encode(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
        if importance is not None:
            lanes, w = _weigh(x, importance, row_blocks)
            scale, offset, codes = affine(lanes, w, n_max, -0.9, 0.05, 36, guarded=True)
            return _pack(fmt, from_lanes(codes, 32), scale, -offset)
        x = to_lanes(x, 32)
        bounds = extremes(x)
        low, high = strict_extremes(x, bounds, start=(FLT_MAX, -FLT_MAX))
        d = (high - low) / F(n_max)
        r = inverse(d)
        reach = ((bounds[1] - low) * r).max()
        x -= low
        x *= r
        x += F(0.5)
        if reach < n_max + 0.25 and not np.isnan(bounds[0]).any():
            q = x
        else:
            q = trunc(x)
            # Q4_1 alone has the minimum, and takes it of the low 8 bits as signed
            q = np.minimum(q.astype(np.int8), np.int8(15)).view(np.uint8) if n_max == 15 else q.astype(np.uint8)
        return _pack(fmt, from_lanes(q, 32), d, low)

    return encode


def _weigh(x: np.ndarray, importance: np.ndarray, row_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Lanes of x and their weights; the mean square under the root is the whole row's."""
    lanes = to_lanes(x, 32)
    return lanes, importance_weights(lanes, to_lanes(importance, 32), row_mean_square(x, row_blocks))


def _pack(fmt: str, q: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
    """q: uint8 [blocks, 32]; d, m: float32 [blocks]."""
    out = np.empty(len(q), FORMATS[fmt].dtype)
    out["d"] = to_f16(d)
    if m is not None:
        out["m"] = to_f16(m)
    put(out, q)
    return out


def put(blocks: np.ndarray, q: np.ndarray) -> None:
    """Set the codes of records [blocks] of Q4_0 to Q5_1: q uint8 [blocks, 32]."""
    blocks["qs"] = join_planes(q, 4, 16)
    if "qh" in blocks.dtype.names:
        blocks["qh"] = join_bits(q >> 4 & 1)


def _codes(blocks: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 32]."""
    q = split_planes(blocks["qs"], 4, 16)
    if "qh" in blocks.dtype.names:
        q |= split_bits(blocks["qh"]) << 4
    return q


def _decode_signed(n_max: int):
    def decode(blocks: np.ndarray) -> np.ndarray:
        y = _codes(blocks).astype(F)
        y -= F(n_max)
        y *= from_f16(blocks["d"])[:, None]
        return y

    return decode


def _decode_affine(blocks: np.ndarray) -> np.ndarray:
    d, m = from_f16(blocks["d"]), from_f16(blocks["m"])
    m[np.isnan(d)] = 0  # of two NaN ggml keeps the first; NumPy keeps either, by version
    y = _codes(blocks).astype(F)
    y *= d[:, None]
    y += m[:, None]
    return y


def encode_q8_0(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """x ~ d * q, q -127..127, rounded half away from zero. Importance has no effect, as in ggml."""
    v = to_lanes(x, 32)
    low, high = extremes(v)
    a = np.maximum(np.abs(low), np.abs(high))
    for lane in np.flatnonzero(np.isnan(a)):  # as the C loop: the value after the last NaN counts
        a[lane] = 0
        for magnitude in np.abs(v[:, lane]):
            a[lane] = a[lane] if a[lane] > magnitude else magnitude
    d = a / F(127)
    r = inverse(d)
    reach = (np.maximum(np.abs(low), np.abs(high)) * r).max()
    v *= r
    # Below 2**22 adding the float just under a half and truncating is roundf, also for 0.49999997.
    v += np.copysign(F(0.49999997), v)
    q = v.astype(np.int8) if reach < 127.25 else trunc(v).astype(np.int8)
    out = np.empty(len(x), FORMATS["Q8_0"].dtype)
    out["d"] = to_f16(d)
    out["qs"] = q.T
    return out


def put_q8_0(blocks: np.ndarray, q: np.ndarray) -> None:
    """Set the codes of records [blocks]: q uint8 [blocks, 32], 0 for -127."""
    blocks["qs"] = q.astype(np.int16) - 127


def decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """q * d."""
    y = blocks["qs"].astype(F)
    y *= from_f16(blocks["d"])[:, None]
    return y


CODECS = {
    "Q4_0": (_encode_signed("Q4_0", 8), _decode_signed(8)),
    "Q5_0": (_encode_signed("Q5_0", 16), _decode_signed(16)),
    "Q4_1": (_encode_affine("Q4_1", 15), _decode_affine),
    "Q5_1": (_encode_affine("Q5_1", 31), _decode_affine),
    "Q8_0": (encode_q8_0, decode_q8_0),
}
