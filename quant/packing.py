"""Codes to bytes and back: bit planes, and the packings of the sub-block scales. All bit diagrams live here.

Codes are uint8 in natural order, block first: [blocks, ...]. ggml never stores neighbouring weights in one byte: a byte
holds weights a fixed distance apart, so that a SIMD register of bytes splits into registers of consecutive weights.
"""

from __future__ import annotations

import numpy as np


def split_planes(packed: np.ndarray, bits: int, stride: int) -> np.ndarray:
    """Bytes to codes: plane p of each run of `stride` bytes holds the next `stride` codes.

    packed: uint8 [blocks, bytes]. Returns uint8 [blocks, bytes * 8 // bits], every code below 2**bits.

        byte i of a run, bits = 4:   7 6 5 4 | 3 2 1 0          bits = 2:   7 6 | 5 4 | 3 2 | 1 0
                                    code i+S | code i                        i+3S  i+2S  i+S   i      (S = stride)

    With `stride` 32 this is `qs` of Q2_K to Q5_K and `qh` of Q6_K, with 16 `qs` of Q4_0 to Q5_1, with 32 and one bit
    `qh` of Q5_K and `hmask` of Q3_K, with 64 `ql` of Q6_K.
    """
    blocks, length = packed.shape
    runs = packed.reshape(blocks, length // stride, stride)
    planes = 8 // bits
    codes = np.empty((blocks, length // stride, planes, stride), np.uint8)
    for p in range(planes):
        np.right_shift(runs, np.uint8(p * bits), out=codes[:, :, p])
    if bits < 8:
        codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(blocks, length * planes)


def join_planes(codes: np.ndarray, bits: int, stride: int) -> np.ndarray:
    """Codes to bytes, the inverse of `split_planes`; codes are cut to their low `bits` bits.

    codes: uint8 [blocks, n]. Returns uint8 [blocks, n * bits // 8].
    """
    blocks, length = codes.shape
    planes = 8 // bits
    runs = codes.reshape(blocks, length // (stride * planes), planes, stride)
    mask = np.uint8((1 << bits) - 1)
    packed = runs[:, :, 0] & mask  # [blocks, runs, stride]
    for p in range(1, planes):
        packed |= (runs[:, :, p] & mask) << np.uint8(p * bits)
    return packed.reshape(blocks, length * bits // 8)


def split_bits(packed: np.ndarray) -> np.ndarray:
    """One bit a code, in order: code e is bit e of the little-endian integer `qh` of Q5_0 and Q5_1.

    packed: uint8 [blocks, bytes]. Returns uint8 [blocks, 8 * bytes].
    """
    return np.unpackbits(packed, axis=1, bitorder="little")


def join_bits(codes: np.ndarray) -> np.ndarray:
    """The inverse of `split_bits`: uint8 codes 0 or 1 [blocks, n] to uint8 [blocks, n // 8]."""
    return np.packbits(codes, axis=1, bitorder="little")


def pack_scales_and_mins(s: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and eight 6-bit mins in 12 bytes (Q4_K, Q5_K; ggml's get_scale_min_k4 reads them).

    s, m: uint8 [blocks, 8]. Returns uint8 [blocks, 12]:

        byte        7 6       5 4 3 2 1 0
        0..3     s[j+4] 5:4      s[j]            j = byte
        4..7     m[j+4] 5:4      m[j]            j = byte - 4
                 7 6 5 4      3 2 1 0
        8..11   m[j] 3:0     s[j] 3:0            j = byte - 4

    As in ggml s[0..3] and m[0..3] are written as whole bytes and the upper bits of the others or-ed onto them.
    """
    packed = np.empty((len(s), 12), np.uint8)
    packed[:, 0:4] = s[:, :4] | (s[:, 4:] >> 4) << 6
    packed[:, 4:8] = m[:, :4] | (m[:, 4:] >> 4) << 6
    packed[:, 8:12] = (s[:, 4:] & 15) | m[:, 4:] << 4
    return packed


def unpack_scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_scales_and_mins`: uint8 [blocks, 12] to (s, m), each uint8 [blocks, 8] below 64."""
    high_s, high_m, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    s = np.concatenate([high_s & 63, (low & 15) | (high_s >> 6) << 4], axis=1)
    m = np.concatenate([high_m & 63, (low >> 4) | (high_m >> 6) << 4], axis=1)
    return s, m


def pack_scales_16x6(u: np.ndarray) -> np.ndarray:
    """Sixteen 6-bit scales in 12 bytes (Q3_K).

    u: uint8 [blocks, 16], below 64. Returns uint8 [blocks, 12]:

        byte     7 6 5 4        3 2 1 0
        0..7   u[j+8] 3:0      u[j] 3:0                                         j = byte
                 7 6         5 4         3 2         1 0
        8..11  u[j+12] 5:4  u[j+8] 5:4  u[j+4] 5:4  u[j] 5:4                    j = byte - 8
    """
    return np.concatenate([join_planes(u, 4, 8), join_planes(u >> 4, 2, 4)], axis=1)


def unpack_scales_16x6(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_scales_16x6`: uint8 [blocks, 12] to uint8 [blocks, 16] below 64."""
    return split_planes(packed[:, :8], 4, 8) | split_planes(packed[:, 8:], 2, 4) << 4


def pack_scales_8x6(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales in a nibble and two bits each (IQ4_XS).

    u: uint8 [blocks, 8], below 64. Returns sl uint8 [blocks, 4] and sh uint16 [blocks]:

        sl, byte i:  u[2i+1] 3:0 | u[2i] 3:0          sh, bits 2j+1 and 2j:  u[j] 5:4
    """
    sl = join_planes(u, 4, 1)
    high = join_planes(u >> 4, 2, 1)  # [blocks, 2]
    return sl, high.view("<u2")[:, 0]


def unpack_scales_8x6(sl: np.ndarray, sh: np.ndarray) -> np.ndarray:
    """The inverse of `pack_scales_8x6`: uint8 [blocks, 8] below 64."""
    high = np.ascontiguousarray(sh).view(np.uint8).reshape(-1, 2)
    return split_planes(np.ascontiguousarray(sl), 4, 1) | split_planes(high, 2, 1) << 4
