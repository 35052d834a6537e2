"""Q2_K, Q3_K, Q4_K, Q5_K and Q6_K: blocks of 256 weights, a scale for each sub-block of 16 or 32, the scales quantized.

Encoders take x and importance (or None), float32 [blocks, 256], return the records [blocks]. Decoders return float32
[blocks, 256]. All encoders go the same way: search scale and codes of each sub-block, quantize the scales of a block
together, then quantize the weights once more with the scales a decoder will see. Source: ggml's quantize_row_q*_K_ref,
and quantize_row_q*_K_impl where importance is given.

Arrays over sub-blocks are [blocks, sub-blocks] or, flat, [lanes] with lane = block * sub-blocks + sub-block.
"""

from __future__ import annotations

import numpy as np

from .fit import (
    EPSILON,
    ZERO,
    F,
    affine,
    clamp,
    coordinate,
    extremes,
    from_lanes,
    near,
    peak,
    round_codes,
    symmetric,
    to_lanes,
    total,
)
from .floats import from_f16, to_f16
from .formats import FORMATS
from .packing import (
    join_planes,
    pack_scales_16x6,
    pack_scales_and_mins,
    split_planes,
    unpack_scales_16x6,
    unpack_scales_and_mins,
)
from .weighted import importance_weights, positive, sum_of_squares

BLOCK = 256


def _largest(values: np.ndarray) -> np.ndarray:
    """max(0, ...) of each block by strict comparison, so +0 if nothing is positive. [blocks, subs] to [blocks]."""
    top = np.fmax.reduce(values, axis=1)
    return np.where(top > 0, top, ZERO)


def _to_unsigned_codes(values: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales (or mins) of a block as codes of their largest. values: float32 [blocks, subs].

    Returns int32 codes [blocks, subs], not cut to any width (ggml stores what near gives), and the float32 unit
    [blocks] that a code counts.
    """
    top = _largest(values)
    inverse = np.where(top > 0, F(n_max) / top, ZERO)
    codes = near(inverse[:, None] * values)
    return codes, top / F(n_max)


def _requantize_affine(x, codes, unit_s, s, unit_m, m, n_max: int) -> None:
    """codes <- near((x + unit_m * m) / (unit_s * s)), in place; sub-blocks whose scale is 0 keep their codes.

    x, codes: [element, lanes]; units: float16 [blocks]; s, m: uint8 [blocks, subs].
    """
    delta = (from_f16(unit_s)[:, None] * s.astype(F)).ravel()
    shift = (from_f16(unit_m)[:, None] * m.astype(F)).ravel()
    dead = delta == 0
    delta[dead] = np.inf  # quotients 0, replaced in `_divide`
    low, high = extremes(x)
    a, b = (low + shift) / delta, (high + shift) / delta
    _divide(x + shift, delta, codes, dead, 0, n_max, np.minimum(a, b).min(), np.maximum(a, b).max())


def _requantize_signed(x, codes, unit, s, n_max: int) -> None:
    """codes <- near(x / (unit * s)) + n_max, in place; as `_requantize_affine`, s: signed [blocks, subs]."""
    delta = (from_f16(unit)[:, None] * s.astype(F)).ravel()
    dead = delta == 0
    delta[dead] = np.inf
    low, high = extremes(x)
    reach = (np.maximum(np.abs(low), np.abs(high)) / np.abs(delta)).max()
    _divide(x, delta, codes, dead, -n_max, n_max - 1, -reach, reach)


def _divide(x, delta, codes, dead, low: int, high: int, bottom, top) -> None:
    kept = codes[:, dead]
    np.divide(x, delta, out=codes)
    round_codes(codes, low, high, bottom, top)
    if low < 0:
        codes -= F(low)
    if kept.size:
        codes[:, dead] = kept


def _fit_affine(x, lanes, importance, sigma2_factor: int, n_max: int, s_max: int):
    """Scale and offset of each sub-block, and their codes, by the search with importance.

    Returns codes [element, lanes] of the weights, s and m uint8 [blocks, subs], and their units float32 [blocks].
    """
    subs = x.shape[1] // len(lanes)
    sigma2 = (F(sigma2_factor) * sum_of_squares(x)) / F(BLOCK)
    w = importance_weights(lanes, to_lanes(importance, len(lanes)), sigma2)
    scale, offset, codes = affine(lanes, w, n_max, -0.9, 0.05, 36, guarded=True)
    by_block = np.ascontiguousarray(total(w).reshape(-1, subs).T)  # [subs, blocks]
    unit_s, s = positive(np.ascontiguousarray(scale.reshape(-1, subs).T), by_block, s_max)
    unit_m, m = positive(np.ascontiguousarray(offset.reshape(-1, subs).T), by_block, s_max)
    return codes, s.T, m.T, unit_s, unit_m


def encode_q2_k(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """(d * s) * q - (dmin * m), s and m nibbles, q 2 bits, 16 sub-blocks."""
    lanes = to_lanes(x, 16)
    if importance is None:
        scale, offset, codes = affine(lanes, np.abs(lanes), 3, -0.5, 0.1, 15, absolute=True)
        s, unit_s = _to_unsigned_codes(scale.reshape(-1, 16), 15)
        m, unit_m = _to_unsigned_codes(offset.reshape(-1, 16), 15)
    else:
        codes, s, m, unit_s, unit_m = _fit_affine(x, lanes, importance, 1, 3, 15)
    out = np.empty(len(x), FORMATS["Q2_K"].dtype)
    out["d"], out["dmin"] = to_f16(unit_s), to_f16(unit_m)
    # A negative or wild code is cut to the byte, spoiling its neighbour, and read back from there, as in ggml.
    out["scales"] = s.astype(np.uint8) | m.astype(np.uint8) << 4
    _requantize_affine(lanes, codes, out["d"], out["scales"] & 15, out["dmin"], out["scales"] >> 4, 3)
    put_q2_k(out, from_lanes(codes, BLOCK))
    return out


def put_q2_k(blocks: np.ndarray, q: np.ndarray) -> None:
    """Set the codes of records [blocks]: q uint8 [blocks, 256]. So the others of this name."""
    blocks["qs"] = join_planes(q, 2, 32)


def decode_q2_k(blocks: np.ndarray) -> np.ndarray:
    """(d * s) * q - (dmin * m)."""
    q = split_planes(blocks["qs"], 2, 32)
    return _decode_affine(blocks, q, blocks["scales"] & 15, blocks["scales"] >> 4)


def encode_q3_k(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """(d * (u - 32)) * (q - 4), u 6 bits, q 3 bits, 16 sub-blocks."""
    lanes = to_lanes(x, 16)
    if importance is None:
        scale, codes = coordinate(lanes, 4)
        scale = scale.reshape(-1, 16)
        _, largest = peak(np.ascontiguousarray(scale.T))
        inverse = F(-32) / largest
        s = clamp(near(inverse[:, None] * scale).astype(np.int8), -32, 31)
        s[largest == 0] = -32  # u = 0
        d = np.where(largest != 0, F(1) / inverse, ZERO)
    else:
        w = importance_weights(lanes, to_lanes(importance, 16), (F(2) * sum_of_squares(x)) / F(BLOCK))
        scale, codes = symmetric(lanes, w, 4)
        by_block = np.ascontiguousarray(total(w).reshape(-1, 16).T)
        d, u = symmetric(np.ascontiguousarray(scale.reshape(-1, 16).T), by_block, 32)
        s = (u.T - F(32)).astype(np.int8)
    out = np.empty(len(x), FORMATS["Q3_K"].dtype)
    out["d"] = to_f16(d)
    out["scales"] = pack_scales_16x6((s + np.int8(32)).view(np.uint8))
    _requantize_signed(lanes, codes, out["d"], s, 4)
    put_q3_k(out, from_lanes(codes, BLOCK))
    return out


def put_q3_k(blocks: np.ndarray, q: np.ndarray) -> None:
    blocks["qs"] = join_planes(q & 3, 2, 32)
    blocks["hmask"] = join_planes(q >> 2, 1, 32)


def decode_q3_k(blocks: np.ndarray) -> np.ndarray:
    """(d * (u - 32)) * (q - 4)."""
    q = split_planes(blocks["qs"], 2, 32)
    q |= split_planes(blocks["hmask"], 1, 32) << 2
    s = unpack_scales_16x6(blocks["scales"]).view(np.int8) - np.int8(32)
    return _decode_signed(blocks, q, s, 4)


def _encode_q45_k(x, importance, fmt: str, n_max: int, r0: float, last_step: int) -> np.ndarray:
    lanes = to_lanes(x, 32)
    if importance is None:
        w = lanes * lanes
        rms = np.sqrt(total(w) / F(32))
        np.add(np.abs(lanes, out=w), rms, out=w)
        scale, offset, codes = affine(lanes, w, n_max, r0, 0.1, last_step)
        s, unit_s = _to_unsigned_codes(scale.reshape(-1, 8), 63)
        m, unit_m = _to_unsigned_codes(offset.reshape(-1, 8), 63)
    else:
        codes, s, m, unit_s, unit_m = _fit_affine(x, lanes, importance, 2, n_max, 63)
    s, m = s.astype(np.uint8), m.astype(np.uint8)  # the low 8 bits, and only then the limit
    if importance is None or fmt == "Q5_K":  # ggml forgets it in Q4_K with importance
        s, m = np.minimum(s, np.uint8(63)), np.minimum(m, np.uint8(63))
    out = np.empty(len(x), FORMATS[fmt].dtype)
    out["d"], out["dmin"] = to_f16(unit_s), to_f16(unit_m)
    out["scales"] = pack_scales_and_mins(s, m)
    s, m = unpack_scales_and_mins(out["scales"])
    _requantize_affine(lanes, codes, out["d"], s, out["dmin"], m, n_max)
    put_q45_k(out, from_lanes(codes, BLOCK))
    return out


def put_q45_k(blocks: np.ndarray, q: np.ndarray) -> None:
    blocks["qs"] = join_planes(q, 4, 32)
    if "qh" in blocks.dtype.names:
        blocks["qh"] = join_planes(q >> 4, 1, 32)


def encode_q4_k(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """(d * s) * q - (dmin * m), s and m 6 bits, q 4 bits, 8 sub-blocks."""
    return _encode_q45_k(x, importance, "Q4_K", 15, -1.0, 20)


def encode_q5_k(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """(d * s) * q - (dmin * m), s and m 6 bits, q 5 bits, 8 sub-blocks."""
    return _encode_q45_k(x, importance, "Q5_K", 31, -0.5, 15)


def decode_q4_k(blocks: np.ndarray) -> np.ndarray:
    """(d * s) * q - (dmin * m)."""
    return _decode_affine(blocks, split_planes(blocks["qs"], 4, 32), *unpack_scales_and_mins(blocks["scales"]))


def decode_q5_k(blocks: np.ndarray) -> np.ndarray:
    """(d * s) * q - (dmin * m)."""
    q = split_planes(blocks["qs"], 4, 32)
    q |= split_planes(blocks["qh"], 1, 32) << 4
    return _decode_affine(blocks, q, *unpack_scales_and_mins(blocks["scales"]))


def encode_q6_k(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """(d * s) * (q - 32), s 8 bits signed, q 6 bits, 16 sub-blocks."""
    lanes = to_lanes(x, 16)
    w = lanes * lanes if importance is None else to_lanes(importance, 16)
    scale, codes = symmetric(lanes, w, 32)
    scale = scale.reshape(-1, 16)
    amax, largest = peak(np.ascontiguousarray(scale.T))
    inverse = F(-128) / largest
    out = np.empty(len(x), FORMATS["Q6_K"].dtype)
    out["d"] = to_f16(F(1) / inverse)
    out["scales"] = np.minimum(near(inverse[:, None] * scale), 127).astype(np.int8)
    _requantize_signed(lanes, codes, out["d"], out["scales"], 32)
    put_q6_k(out, from_lanes(codes, BLOCK))
    out[amax < EPSILON] = np.zeros((), out.dtype)
    return out


def put_q6_k(blocks: np.ndarray, q: np.ndarray) -> None:
    blocks["ql"] = join_planes(q, 4, 64)
    blocks["qh"] = join_planes(q >> 4, 2, 32)


def decode_q6_k(blocks: np.ndarray) -> np.ndarray:
    """(d * s) * (q - 32)."""
    q = split_planes(blocks["ql"], 4, 64)
    q |= split_planes(blocks["qh"], 2, 32) << 4
    return _decode_signed(blocks, q, blocks["scales"], 32)


def _decode_affine(blocks: np.ndarray, q: np.ndarray, s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """q: uint8 [blocks, 256]; s, m: uint8 [blocks, subs]."""
    scale = from_f16(blocks["d"])[:, None] * s.astype(F)
    shift = from_f16(blocks["dmin"])[:, None] * m.astype(F)
    y = q.astype(F).reshape(*s.shape, -1)  # [blocks, subs, elements]
    y *= scale[:, :, None]
    y -= shift[:, :, None]
    return y.reshape(q.shape)


def _decode_signed(blocks: np.ndarray, q: np.ndarray, s: np.ndarray, n_max: int) -> np.ndarray:
    """q: uint8 [blocks, 256]; s: int8 [blocks, subs]."""
    scale = from_f16(blocks["d"])[:, None] * s.astype(F)
    y = q.astype(F).reshape(*s.shape, -1)  # [blocks, subs, elements]
    y -= F(n_max)
    y *= scale[:, :, None]
    return y.reshape(q.shape)


CODECS = {
    "Q2_K": (encode_q2_k, decode_q2_k),
    "Q3_K": (encode_q3_k, decode_q3_k),
    "Q4_K": (encode_q4_k, decode_q4_k),
    "Q5_K": (encode_q5_k, decode_q5_k),
    "Q6_K": (encode_q6_k, decode_q6_k),
}
