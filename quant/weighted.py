"""Searches that come in with importance: the weights, the positive-scale fit; and the table search of IQ4_*.

Lane-major as in `fit`: float32 [element, lane].
"""

from __future__ import annotations

import numpy as np

from .fit import EPSILON, INF, ONE, ZERO, F, near, peak, to_lanes, total

# The values of the 16 codes of IQ4_NL and IQ4_XS (ggml's kvalues_iq4nl).
TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# The midpoints between them are multiples of 1/2, so the code of v follows from floor(2 v), here from -256 to 255.
_CODES = np.searchsorted((TABLE[1:] + TABLE[:-1]) / 2, np.arange(-256, 256) / 2, side="right").astype(np.uint8)


def row_mean_square(x: np.ndarray, row_blocks: int) -> np.ndarray:
    """Mean square of the row that each block lies in. x: [blocks, n], whole rows. Returns [blocks]."""
    rows = x.reshape(-1, row_blocks * x.shape[1])  # [rows, columns]
    return np.repeat(sum_of_squares(rows) / F(rows.shape[1]), row_blocks)


def sum_of_squares(x: np.ndarray) -> np.ndarray:
    """In element order. x: [blocks, n]. Returns [blocks]."""
    lanes = to_lanes(x, x.shape[1])
    return total(np.multiply(lanes, lanes, out=lanes))


def importance_weights(x: np.ndarray, importance: np.ndarray, sigma2: np.ndarray) -> np.ndarray:
    """importance * sqrt(sigma2 + x * x), ggml's weights where an importance matrix is given.

    x, importance: [element, lanes]; sigma2: a mean square for each block, of which a lane is an equal part.
    """
    w = x * x
    w += np.repeat(sigma2, x.shape[1] // len(sigma2))
    np.sqrt(w, out=w)
    w *= importance
    return w


def positive(v: np.ndarray, w: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit v ~ scale * code, codes 0..n_max, with weights w: the scales (or mins) of a block by one more scale.

    v, w: float32 [sub-block, lanes], a lane being a block. Source: ggml's make_qp_quants. Returns scale [lanes] and
    codes uint8 [sub-block, lanes], which a negative v can bring above n_max: ggml keeps the low 8 bits.
    """
    m = np.zeros(v.shape[1], F)
    for row in v:
        m = np.where(m > row, m, row)
    dead = m < EPSILON
    m = np.where(dead, INF, m)  # multiplier 0, codes 0

    def error(s: np.ndarray, codes: np.ndarray) -> np.ndarray:
        delta = v - (ONE / s) * codes.astype(F)
        return total((w * delta) * delta)

    kept = F(n_max) / m
    best = error(kept, near(kept * v).astype(np.uint8))
    for k in range(-4, 5):
        if k == 0:
            continue
        s = (F(0.1) * F(k) + F(n_max)) / m
        err = error(s, np.minimum(near(s * v), n_max))
        better = err < best
        best, kept = np.where(better, err, best), np.where(better, s, kept)
    whole = np.minimum(near(kept * v), n_max)
    codes = whole.astype(np.uint8)
    wv = w * v
    p, q = total(wv * whole.astype(F)), total((w * whole.astype(F)) * whole.astype(F))
    for _ in range(5):
        if not _sweep_positive(v, w, wv, codes, p, q, n_max):
            break
    scale = np.where(q > 0, p / q, ZERO)
    scale[dead] = 0
    codes[:, dead] = 0
    return scale, codes


def _sweep_positive(v, w, wv, codes, p, q, n_max: int) -> bool:
    """One sweep of `positive`; codes, p, q change in place. Returns whether any lane changed.

    A lane whose sweep changed nothing is at a fixed point, so it may go along with the others.
    """
    changed = False
    for v_i, w_i, wv_i, code in zip(v, w, wv, codes, strict=True):
        old = code.astype(F)
        p_rest = p - wv_i * old
        q_rest = q - (w_i * old) * old
        whole = np.minimum(near((v_i * q_rest) / p_rest), n_max)
        new = whole.astype(F)
        p_new = p_rest + wv_i * new
        q_new = q_rest + (w_i * new) * new
        better = (p_rest > 0) & (q_rest > 0) & (whole != code)
        better &= (p_new * p_new) * q > (p * p) * q_new
        if better.any():
            np.copyto(code, whole.astype(np.uint8), where=better)
            np.copyto(p, p_new, where=better)
            np.copyto(q, q_new, where=better)
            changed = True
    return changed


def nearest_code(v: np.ndarray) -> np.ndarray:
    """Index of the table value nearest to v, a tie to the upper; 15 for NaN. Returns uint8. Source: best_index_int8."""
    doubled = np.fmax(np.fmin(np.floor(v + v), F(255)), F(-256))
    return _CODES[doubled.astype(np.int16) + 256]


def table(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Fit x ~ scale * TABLE[code] with weights w. Source: ggml's quantize_row_iq4_nl_impl, ntry 7.

    Returns the signed scale [lanes]; 0 for lanes below EPSILON.
    """
    amax, m = peak(x)
    dead = amax < EPSILON
    m = np.where(dead, INF, m)

    def sums(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = TABLE[nearest_code(x * s)]
        weighted = w * values
        return total(weighted * x), total(weighted * values)

    p, q = sums(ONE / (-m / TABLE[0]))
    scale = np.where(q > 0, p / q, ZERO)
    best = scale * p
    for k in range(-7, 8):
        p, q = sums((F(k) + TABLE[0]) / m)
        better = (q > 0) & (p * p > best * q)
        scale = np.where(better, p / q, scale)
        best = np.where(better, scale * p, best)
    scale[dead] = 0
    return scale
