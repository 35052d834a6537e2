"""The searches for scale and codes that the formats share.

Lane-major: arrays are float32 [element, lane], a lane being one sub-block (a run of weights with one scale). ggml sums
in element order, so the same bits come out only if a sum never runs inside a lane's vector register: every operation
here works across lanes, and a sum adds one row after the other. Codes stay float32 in the searches: they are small
integers, and each use of them is in a float product.

A search keeps no array of the best codes: codes are a function of the step's scale (and shift), so the accepted step is
remembered a lane and its codes are computed once at the end.
"""

from __future__ import annotations

import numpy as np

F = np.float32
ZERO, ONE, INF = F(0), F(1), F(np.inf)
EPSILON = F(1e-15)  # GROUP_MAX_EPS: lanes below it get scale 0
MAGIC = F(12582912)  # 1.5 * 2**23: adding it leaves the rounded integer in the low mantissa bits
LIMIT = F(2**22)  # below it (v + MAGIC) - MAGIC equals the bit formula


def to_lanes(x: np.ndarray, length: int) -> np.ndarray:
    """[blocks, n] to a contiguous [length, lanes], always a copy; the sub-blocks of a block are neighbouring lanes."""
    return np.array(x.reshape(-1, length).T, order="C")


def from_lanes(codes: np.ndarray, block_length: int) -> np.ndarray:
    """Codes [length, lanes], whole numbers 0..255 as float32, to uint8 [blocks, block_length]."""
    return np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, block_length)


def total(a: np.ndarray, out: np.ndarray | None = None, *, start: np.floating | None = ZERO) -> np.ndarray:
    """Sum of each lane in element order. a: [element, lanes]. Returns [lanes].

    start: +0, or None for the first element itself, which keeps the sign of a sum of negative zeros.

    NumPy reduces the outer axis of a C-contiguous array row after row. With a single lane it would drop the lane axis
    and sum pairwise, hence the second way, which is always in order.
    """
    if a.shape[1] > 1:
        return np.add.reduce(a, axis=0, out=out, initial=start)
    last = np.add.accumulate(a, axis=0)[-1]
    if start is not None:
        last = last + start
    if out is None:
        return last
    out[...] = last
    return out


def near(v: np.ndarray) -> np.ndarray:
    """Nearest integer, ties to even, as ggml's nearest_int: a bit formula, also where it means nothing.

    v: float32. Returns int32. For |v| >= 2**22, infinities and NaN the result is whatever the mantissa of v + MAGIC
    says; degenerate blocks do reach that, so np.rint would not do.
    """
    bits = np.add(v, MAGIC).view(np.int32)
    bits &= 0x007FFFFF
    bits -= 0x00400000
    return bits


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is 0; a NaN is not 0."""
    return np.where(d != 0, ONE / d, ZERO)


def clamp(codes: np.ndarray, low: int, high: int) -> np.ndarray:
    """Clamp integers in place and return them (np.clip spends longer on its arguments than a lane array takes)."""
    np.maximum(codes, codes.dtype.type(low), out=codes)
    return np.minimum(codes, codes.dtype.type(high), out=codes)


def round_codes(v: np.ndarray, low: int, high: int, bottom: np.floating, top: np.floating) -> None:
    """v <- clamp(near(v), low, high), in place, as floats.

    bottom, top: bounds of v, NaN if v may hold NaN. They decide whether the float form of the rounding is exact, and
    which side of the clamp can act at all.
    """
    if bottom > -LIMIT and top < LIMIT:  # false for NaN
        np.add(v, MAGIC, out=v)
        np.subtract(v, MAGIC, out=v)
        if bottom < low - 0.25:
            np.maximum(v, F(low), out=v)
        if top > high + 0.25:
            np.minimum(v, F(high), out=v)
    else:
        v[...] = clamp(near(v), low, high)


def extremes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of each lane; NaN if the lane holds one. The sign of a zero is arbitrary."""
    return np.minimum.reduce(x, axis=0), np.maximum.reduce(x, axis=0)


def strict_extremes(x: np.ndarray, bounds=None, start=None) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest of each lane as a C loop finds them: strict comparisons in element order.

    So of equal values (+0, -0) the first stays, NaN never wins, and what lies outside `start` does not count.
    bounds: `extremes(x)` if at hand. start: the pair of initial values, else the first element for both.
    """
    low, high = bounds or extremes(x)
    doubt = np.flatnonzero((low == 0) | (high == 0) | ~np.isfinite(high - low))
    if doubt.size:
        low, high = low.copy(), high.copy()
        part = x[:, doubt]
        a, b = (part[0].copy(), part[0].copy()) if start is None else (np.full(doubt.size, F(v)) for v in start)
        for row in part:
            np.copyto(a, row, where=row < a)
            np.copyto(b, row, where=row > b)
        low[doubt], high[doubt] = a, b
    return low, high


def peak(x: np.ndarray, bounds=None) -> tuple[np.ndarray, np.ndarray]:
    """(largest magnitude, the signed value that has it, the first of equals) of each lane; both +0 if all are zero."""
    low, high = bounds or extremes(x)
    m = np.where(high > -low, high, low)
    doubt = np.flatnonzero((high == -low) | np.isnan(low))
    if doubt.size:  # ties, zeros and NaN: the order of the elements decides
        amax, signed = np.zeros(doubt.size, F), np.zeros(doubt.size, F)
        for row in x[:, doubt]:
            magnitude = np.abs(row)
            larger = magnitude > amax
            np.copyto(amax, magnitude, where=larger)
            np.copyto(signed, row, where=larger)
        m[doubt] = signed
    return np.abs(m), m


def affine(
    x: np.ndarray,
    w: np.ndarray,
    n_max: int,
    r0: float,
    r1: float,
    last_step: int,
    absolute: bool = False,
    guarded: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit x ~ scale * code - offset, codes 0..n_max, offset >= 0, with weights w. Source: ggml's make_qkx2_quants,
    and with `guarded` its make_qkx3_quants, which clamps before it rounds (ggml from 0.26 on).

    x, w: float32 [element, lanes]. Tries ranges (r0 + r1 * t + n_max), t = 0..last_step, each refined by weighted
    least squares, keeps the smallest error (absolute, else squared). Returns scale, offset [lanes] and the codes
    [element, lanes] as float32.
    """
    bounds = extremes(x)
    ends = np.stack(bounds)  # [2, lanes]
    low, high = strict_extremes(x, bounds)
    low = np.where(low > 0, ZERO, low)
    flat = high == low
    high = np.where(flat, INF, high)  # range inf: multiplier 0, codes 0, no division by zero
    codes, work, wl = np.empty_like(x), np.empty_like(x), w * x
    sum_w, sum_x = total(w), total(wl, start=None)  # ggml starts these two with their first terms

    def encode(s: np.ndarray, shift: np.ndarray, guarded: bool = False) -> None:
        np.subtract(x, shift, out=codes)
        np.multiply(codes, s, out=codes)
        reach = (ends - shift) * s  # rounding is monotone: the products of the extremes bound the others
        if guarded:
            np.copyto(codes, ZERO, where=~(codes > 0))
            np.minimum(codes, F(n_max), out=codes)
            reach = np.fmax(np.fmin(reach, F(n_max)), ZERO)
        round_codes(codes, 0, n_max, np.minimum.reduce(reach, axis=None), np.maximum.reduce(reach, axis=None))

    def error(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
        np.multiply(codes, scale, out=work)
        np.add(work, shift, out=work)
        np.subtract(work, x, out=work)
        if absolute:
            np.abs(work, out=work)
        else:
            np.multiply(work, work, out=work)
        np.multiply(work, w, out=work)
        return total(work)

    kept_s, kept_low = F(n_max) / (high - low), low
    scale = ONE / kept_s
    encode(kept_s, kept_low)
    best = error(scale, low)
    best[flat] = -INF  # never improved on
    first = np.ones(best.shape, bool)  # lanes whose best is still the first pass, which is never guarded
    for t in range(last_step + 1):
        s = (F(r0) + F(r1) * F(t) + F(n_max)) / (high - low)
        encode(s, low, guarded)
        np.multiply(w, codes, out=wl)
        a = total(wl)
        np.multiply(wl, codes, out=work)
        b = total(work)
        np.multiply(wl, x, out=wl)
        c = total(wl)
        det = sum_w * b - a * a
        sigma = (sum_w * c - sum_x * a) / det
        mu = (b * sum_x - a * c) / det
        positive = mu > 0
        np.copyto(mu, ZERO, where=positive)
        np.copyto(sigma, c / b, where=positive)
        err = error(sigma, mu)
        better = (err < best) & (det > 0)
        if better.any():
            best = np.where(better, err, best)
            scale = np.where(better, sigma, scale)
            kept_s, kept_low = np.where(better, s, kept_s), np.where(better, low, kept_low)
            low = np.where(better, mu, low)
            first &= ~better
    encode(kept_s, kept_low)
    if guarded:
        unguarded = codes[:, first]
        encode(kept_s, kept_low, guarded)
        codes[:, first] = unguarded
    scale[flat] = 0
    return scale, -low, codes


def symmetric(x: np.ndarray, w: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit x ~ scale * (code - n_max), codes 0..2*n_max-1, with weights w. Source: ggml's make_qx_quants, rmse_type 1.

    x, w: float32 [element, lanes]. Returns the signed scale [lanes] and the codes [element, lanes] as float32. Lanes
    below EPSILON: scale 0 and codes 0 (not n_max).
    """
    bounds = extremes(x)
    amax, m = peak(x, bounds)
    dead = amax < EPSILON
    m = np.where(dead, INF, m)  # multiplier 0, codes 0
    reach = np.maximum(np.abs(bounds[0]), np.abs(bounds[1]))  # as amax, but NaN if the lane holds NaN
    wx, codes, work = w * x, np.empty_like(x), np.empty_like(x)

    def encode(s: np.ndarray) -> None:
        np.multiply(x, s, out=codes)
        top = np.maximum.reduce(np.abs(s) * reach)
        round_codes(codes, -n_max, n_max - 1, -top, top)

    def sums() -> tuple[np.ndarray, np.ndarray]:
        np.multiply(wx, codes, out=work)
        p = total(work)
        np.multiply(w, codes, out=work)
        np.multiply(work, codes, out=work)
        return p, total(work)

    kept = F(-n_max) / m
    encode(kept)
    p, q = sums()
    scale = np.where(q != 0, p / q, ZERO)
    best = scale * p
    for k in range(-9, 10):
        if k == 0:
            continue
        s = -(F(n_max) + F(0.1) * F(k)) / m
        encode(s)
        p, q = sums()
        better = (q > 0) & (p * p > best * q)
        if better.any():
            scale = np.where(better, p / q, scale)
            best = np.where(better, scale * p, best)
            kept = np.where(better, s, kept)
    encode(kept)
    codes += F(n_max)
    if dead.any():
        scale[dead] = 0
        codes[:, dead] = 0
    return scale, codes


def coordinate(x: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit x ~ scale * (code - n_max) with weights x*x, one code at a time. Source: ggml's make_q3_quants.

    x: float32 [element, lanes]. At most five sweeps over the elements. Returns as `symmetric`.
    """
    bounds = extremes(x)
    amax, m = peak(x, bounds)
    dead = amax < EPSILON
    s = F(-n_max) / np.where(dead, INF, m)
    reach = (np.abs(s) * np.maximum(np.abs(bounds[0]), np.abs(bounds[1]))).max()
    w = x * x
    wx = w * x
    codes = x * s
    round_codes(codes, -n_max, n_max - 1, -reach, reach)
    p, q = total(wx * codes), total((w * codes) * codes)

    # A lane whose sweep changed nothing is at a fixed point: only the others go on, gathered into smaller arrays.
    active = np.flatnonzero(~dead)
    for _ in range(5):
        if not active.size:
            break
        lanes = [np.ascontiguousarray(a[..., active]) for a in (x, w, wx, codes, p, q)]
        changed = _sweep(*lanes, n_max)
        codes[:, active], p[active], q[active] = lanes[3:]
        active = active[changed]
    scale = np.where(q > 0, p / q, ZERO)
    codes += F(n_max)
    scale[dead] = 0
    codes[:, dead] = 0
    return scale, codes


def _sweep(x, w, wx, codes, p, q, n_max: int) -> np.ndarray:
    """One sweep of `coordinate` over the elements; codes, p, q change in place. Returns which lanes changed."""
    changed = np.zeros(p.shape, bool)
    for x_i, w_i, wx_i, code in zip(x, w, wx, codes, strict=True):
        p_rest = p - wx_i * code
        q_rest = q - (w_i * code) * code
        new = clamp(near((x_i * q_rest) / p_rest), -n_max, n_max - 1).astype(F)
        p_new = p_rest + wx_i * new
        q_new = q_rest + (w_i * new) * new
        better = (p_rest > 0) & (new != code) & (q_new > 0)
        better &= (p_new * p_new) * q > (p * p) * q_new
        if better.any():
            np.copyto(code, new, where=better)
            np.copyto(p, p_new, where=better)
            np.copyto(q, q_new, where=better)
            changed |= better
    return changed
