"""IQ4_NL and IQ4_XS: 4-bit codes into a table of 16 unevenly spaced values.

Encoders take x and importance (or None), float32 [blocks, n], return the records [blocks]. Decoders return float32
[blocks, n]. Source: ggml's quantize_row_iq4_nl_impl and dequantize_row_iq4_nl, _xs.
"""

from __future__ import annotations

import numpy as np

from .fit import F, clamp, from_lanes, inverse, near, peak, to_lanes
from .floats import from_f16, to_f16
from .formats import FORMATS
from .packing import join_planes, pack_scales_8x6, split_planes, unpack_scales_8x6
from .weighted import TABLE, importance_weights, nearest_code, sum_of_squares, table


def _fit(x: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Lanes of 32 weights [32, lanes] and their scales [lanes]."""
    lanes = to_lanes(x, 32)
    if importance is None:
        return lanes, table(lanes, lanes * lanes)
    sigma2 = sum_of_squares(x) * F(2 / x.shape[1])
    return lanes, table(lanes, importance_weights(lanes, to_lanes(importance, 32), sigma2))


def encode_iq4_nl(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """d * TABLE[q]."""
    lanes, scale = _fit(x, importance)
    out = np.empty(len(x), FORMATS["IQ4_NL"].dtype)
    out["d"] = to_f16(scale)
    q = nearest_code(lanes * inverse(scale))
    put(out, from_lanes(q, 32))
    return out


def put(blocks: np.ndarray, q: np.ndarray) -> None:
    """Set the codes of records [blocks]: q uint8 [blocks, n]."""
    blocks["qs"] = join_planes(q, 4, 16)


def decode_iq4_nl(blocks: np.ndarray) -> np.ndarray:
    """d * TABLE[q]."""
    y = TABLE[split_planes(blocks["qs"], 4, 16)]
    y *= from_f16(blocks["d"])[:, None]
    return y


def encode_iq4_xs(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
    """(d * (u - 32)) * TABLE[q], u 6 bits, 8 sub-blocks."""
    lanes, scale = _fit(x, importance)
    scale = scale.reshape(-1, 8)
    _, largest = peak(np.ascontiguousarray(scale.T))
    d = -largest / F(32)
    out = np.empty(len(x), FORMATS["IQ4_XS"].dtype)
    out["d"] = to_f16(d)
    s = clamp(near(inverse(d)[:, None] * scale), -32, 31)
    delta = (d[:, None] * s.astype(F)).ravel()  # the float32 d, not the stored one
    q = nearest_code(lanes * inverse(delta))
    out["sl"], out["sh"] = pack_scales_8x6((s + 32).astype(np.uint8))
    put(out, from_lanes(q, 256))
    return out


def decode_iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """(d * (u - 32)) * TABLE[q]."""
    s = unpack_scales_8x6(blocks["sl"], blocks["sh"]).astype(F) - F(32)
    scale = from_f16(blocks["d"])[:, None] * s  # [blocks, 8]
    y = TABLE[split_planes(blocks["qs"], 4, 16)].reshape(-1, 8, 32)  # [blocks, subs, elements]
    y *= scale[:, :, None]
    return y.reshape(-1, 256)


CODECS = {"IQ4_NL": (encode_iq4_nl, decode_iq4_nl), "IQ4_XS": (encode_iq4_xs, decode_iq4_xs)}
