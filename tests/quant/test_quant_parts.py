"""The building blocks against plain, slow statements of what they should do."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest

from quant.fit import near, peak, round_codes, strict_extremes, total
from quant.legacy import trunc
from quant.packing import (
    join_planes,
    pack_scales_16x6,
    pack_scales_and_mins,
    split_planes,
    unpack_scales_16x6,
    unpack_scales_and_mins,
)

SPECIAL = np.array(
    [
        *(0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 1e-45),
        *(4194303, 4194304, -4194304, 8388609, 2147483520, 2147483648, -2147483648, 3e9, -3e9),
        *(1e30, -1e30, np.inf, -np.inf, np.nan),
    ],
    np.float32,
)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 8, 17, 64, 1000, 20_000])
def test_total_adds_in_element_order(lanes):
    rng = np.random.default_rng(lanes)
    for elements in (8, 16, 32):
        a = (rng.standard_normal((elements, lanes)) * 10.0 ** rng.uniform(-4, 4, (elements, lanes))).astype(np.float32)
        expected = np.zeros(lanes, np.float32)
        for row in a:
            expected = expected + row
        assert total(a).tobytes() == expected.tobytes()
        out = np.empty(lanes, np.float32)
        total(a, out)
        assert out.tobytes() == expected.tobytes()
    assert not np.signbit(total(np.full((4, lanes), -0.0, np.float32))).any()


def _nearest_int(v: float) -> int:
    with np.errstate(all="ignore"):
        (bits,) = struct.unpack("<i", (np.float32(v) + np.float32(12582912)).tobytes())
    return (bits & 0x007FFFFF) - 0x00400000


def test_near_is_the_bit_formula_and_rounds_ties_to_even():
    with np.errstate(all="ignore"):
        assert near(SPECIAL).tolist() == [_nearest_int(v) for v in SPECIAL]
    small = np.arange(-64, 64, 0.125, np.float32)
    assert near(small).tolist() == [round(float(v)) for v in small]  # Python's round: ties to even


@pytest.mark.parametrize("scale", [1, 30, 1e5, 1e6, 1e7, 1e20])
def test_round_codes_equals_clamped_near(scale):
    v = (np.random.default_rng(3).standard_normal((32, 100)) * scale).astype(np.float32)
    for low, high in ((0, 3), (0, 31), (-4, 3), (-32, 31)):
        expected = np.clip(near(v.copy()), low, high)
        got = v.copy()
        round_codes(got, low, high, v.min(), v.max())
        assert (got == expected).all()
    with_nan = v.copy()
    with_nan[3, 5] = np.nan
    round_codes(with_nan, 1, 31, with_nan.min(), with_nan.max())
    assert with_nan[3, 5] == 1  # near(NaN) is 0


def test_trunc_is_the_x86_conversion():
    expected = [int(v) if math.isfinite(v) and -(2**31) <= v < 2**31 else -(2**31) for v in SPECIAL.tolist()]
    assert trunc(SPECIAL).tolist() == expected


def test_peak_and_extremes_take_the_first_of_equals():
    cases = np.array(list(itertools.product([0.0, -0.0, 2.0, -2.0, 1.0, np.nan], repeat=4)), np.float32).T.copy()
    amax, m = peak(cases)
    low, high = strict_extremes(cases)
    for lane, values in enumerate(cases.T):
        best = signed = np.float32(0)
        a = b = values[0]
        for v in values:
            if abs(v) > best:
                best, signed = abs(v), v
            a = v if v < a else a
            b = v if v > b else b
        assert (amax[lane].tobytes(), m[lane].tobytes()) == (best.tobytes(), signed.tobytes()), values
        assert np.array([low[lane], high[lane]]).tobytes() == np.array([a, b]).tobytes(), values


@pytest.mark.parametrize(("bits", "stride"), [(4, 16), (4, 32), (4, 64), (2, 32), (1, 32), (4, 8), (2, 4)])
def test_planes(bits, stride):
    """Code e sits in byte (e mod stride) of its run, in plane (e div stride) mod (8 / bits)."""
    planes, count = 8 // bits, 2 * stride * (8 // bits)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, count), np.uint8)
    expected = np.zeros((5, count // planes), np.uint8)
    for e in range(count):
        run, inside = divmod(e, stride * planes)
        expected[:, run * stride + inside % stride] |= codes[:, e] << np.uint8(bits * (inside // stride))
    assert join_planes(codes, bits, stride).tolist() == expected.tolist()
    assert split_planes(expected, bits, stride).tolist() == codes.tolist()


def test_scale_packings():
    rng = np.random.default_rng(4)
    s, m = rng.integers(0, 64, (2, 100, 8), np.uint8)
    packed = pack_scales_and_mins(s, m)
    assert packed.shape == (100, 12)
    back = unpack_scales_and_mins(packed)
    assert (back[0].tolist(), back[1].tolist()) == (s.tolist(), m.tolist())
    for j in range(8):  # as ggml's get_scale_min_k4 reads them
        if j < 4:
            scale, low = packed[:, j] & 63, packed[:, j + 4] & 63
        else:
            scale = packed[:, j + 4] & 15 | packed[:, j - 4] >> 6 << 4
            low = packed[:, j + 4] >> 4 | packed[:, j] >> 6 << 4
        assert (scale.tolist(), low.tolist()) == (s[:, j].tolist(), m[:, j].tolist())

    u = rng.integers(0, 64, (100, 16), np.uint8)
    packed = pack_scales_16x6(u)
    assert packed.shape == (100, 12)
    assert unpack_scales_16x6(packed).tolist() == u.tolist()
    for j in range(16):
        low = packed[:, j % 8] >> (0 if j < 8 else 4) & 15
        high = packed[:, 8 + j % 4] >> (2 * (j // 4)) & 3
        assert (low | high << 4).tolist() == u[:, j].tolist()
