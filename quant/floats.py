"""F32, F16 and BF16: one weight a block. Also the two roundings the other formats use for their scale fields."""

from __future__ import annotations

import numpy as np

from .formats import FORMATS


def to_f16(x: np.ndarray) -> np.ndarray:
    """float32 to float16, nearest, ties to even, subnormals kept; every NaN becomes sign | 0x7E00.

    Source: ggml_compute_fp32_to_fp16. NumPy's cast agrees except that it keeps the payload of a NaN.
    """
    half = np.asarray(x, np.float32).astype(np.float16)
    bad = np.isnan(half)
    if bad.any():
        bits = half.view(np.uint16)
        bits[bad] = bits[bad] & 0x8000 | 0x7E00
    return half


def from_f16(half: np.ndarray) -> np.ndarray:
    """float16 to float32, exact; a signalling NaN comes out quiet. Source: ggml_compute_fp16_to_fp32."""
    x = half.astype(np.float32)
    bad = np.isnan(x)
    if bad.any():
        x.view(np.uint32)[bad] |= 0x00400000
    return x


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), nearest, ties to even; a NaN keeps its upper bits and becomes quiet.

    Source: ggml_compute_fp32_to_bf16.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    bad = np.isnan(x)
    if bad.any():
        rounded[bad] = (bits[bad] >> 16 | 0x0040).astype(np.uint16)
    return rounded


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32, exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _codec(name: str, to_field, from_field) -> tuple:
    dtype = FORMATS[name].dtype

    def encode(x: np.ndarray, importance: np.ndarray | None, row_blocks: int) -> np.ndarray:
        return to_field(x[:, 0]).astype(dtype["x"], copy=False).view(dtype)

    def decode(blocks: np.ndarray) -> np.ndarray:
        return from_field(blocks["x"])[:, None]

    return encode, decode


CODECS = {
    "F32": _codec("F32", np.ascontiguousarray, lambda x: x.astype(np.float32)),
    "F16": _codec("F16", to_f16, from_f16),
    "BF16": _codec("BF16", to_bf16, from_bf16),
}
