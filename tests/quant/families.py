"""Families of weight blocks: ordinary ones and every kind known to break an encoder. Seeded, all finite.

A family is a function (rng, rows) -> float32 [rows, 256]; `FAMILIES` lists them by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

COLUMNS = 256
FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {}
FLT_MAX = np.finfo(np.float32).max


def _family(function: Callable) -> Callable:
    FAMILIES[function.__name__] = function
    return function


def draw(name: str, seed: int, rows: int) -> np.ndarray:
    """float32 [rows, 256] of one family."""
    rng = np.random.default_rng([seed, *name.encode()])
    with np.errstate(all="ignore"):
        x = np.asarray(FAMILIES[name](rng, rows))
        x = np.ascontiguousarray(np.clip(np.nan_to_num(x), -FLT_MAX, FLT_MAX), np.float32)
    assert x.shape == (rows, COLUMNS)
    return x


def _normal(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.standard_normal((rows, COLUMNS), np.float32)


def _bits_to_floats(bits: np.ndarray) -> np.ndarray:
    """Random 32-bit patterns to floats; the exponent of infinities and NaN is lowered."""
    return np.where((bits & 0x7F800000) == 0x7F800000, bits ^ 0x00800000, bits).astype(np.uint32).view(np.float32)


@_family
def normal(rng, rows):
    return _normal(rng, rows) * np.float32(0.02)


@_family
def student(rng, rows):
    return rng.standard_t(rng.choice([1.2, 2, 3, 5], (rows, 1)), (rows, COLUMNS)) * 0.02


@_family
def laplace_and_uniform(rng, rows):
    x = rng.laplace(0, 0.05, (rows, COLUMNS))
    x[::2] = rng.uniform(-1, 1, x[::2].shape)
    return x


@_family
def far_magnitudes(rng, rows):
    """Whole rows at 1e-44 .. 1e38: subnormals, scales that vanish in F16 or overflow to infinity."""
    return _normal(rng, rows).astype(float) * 10.0 ** rng.uniform(-45, 38.5, (rows, 1))


@_family
def denormals(rng, rows):
    return _bits_to_floats(rng.integers(0, 2000, (rows, COLUMNS)) | rng.integers(0, 2, (rows, COLUMNS)) << 31)


@_family
def around_epsilon(rng, rows):
    """Around 1e-15, the searches' floor, and around the magnitudes whose inverse or square leaves float32."""
    center = rng.choice([1e-15, 3e-16, 2e-38, 4e-37, 1e-19, 1.8e19, 5e5, 8e6], (rows, 1))
    return _normal(rng, rows) * center * 2.0 ** rng.integers(-2, 3, (rows, 1))


@_family
def constant(rng, rows):
    """Constant rows and constant runs of 16 and 32, either sign, some zero."""
    run = np.repeat(_normal(rng, rows)[:, :16], 16, axis=1)
    wide = np.repeat(_normal(rng, rows)[:, :8], 32, axis=1)
    kind = rng.integers(0, 4, (rows, 1))
    x = np.choose(kind, [run[:, :1], run, wide, np.where(run > 0, run, 0)])
    return np.broadcast_to(x, (rows, COLUMNS))


@_family
def zeros(rng, rows):
    """Zeros of one sign or both, and rows with a few other values."""
    sign = np.where(rng.integers(0, 2, (rows, COLUMNS)), -0.0, 0.0)
    x = np.choose(rng.integers(0, 4, (rows, 1)), [np.zeros_like(sign), np.full_like(sign, -0.0), sign, sign])
    spots = rng.random((rows, COLUMNS)) < np.where(rng.random((rows, 1)) < 0.5, 0.02, 0)
    return np.where(spots, _normal(rng, rows), x)


@_family
def sparse(rng, rows):
    keep = rng.random((rows, COLUMNS)) < rng.choice([0.01, 0.05, 0.3, 0.9], (rows, 1))
    return np.where(keep, _normal(rng, rows), 0)


@_family
def one_sign(rng, rows):
    return np.abs(_normal(rng, rows)) * rng.choice([-1, 1], (rows, 1))


@_family
def far_from_zero(rng, rows):
    spread = rng.choice([1e-2, 1e-4, 1e-6], (rows, 1))
    return rng.choice([-1, 1], (rows, 1)) + _normal(rng, rows) * spread


@_family
def spike(rng, rows):
    """One large weight, on nothing or on noise."""
    x = _normal(rng, rows).astype(float) * rng.choice([0, 1e-6, 1e-2], (rows, 1))
    x[np.arange(rows), rng.integers(0, COLUMNS, rows)] = rng.choice([-1, 1], rows) * 10.0 ** rng.uniform(-3, 7, rows)
    return x


@_family
def integers(rng, rows):
    """Integers, halves and quarters, many on the border between two codes, many of equal magnitude."""
    step = rng.choice([1, 0.5, 0.25], (rows, 1))
    return rng.integers(-9, 10, (rows, COLUMNS)) * step


@_family
def exact_ties(rng, rows):
    """Values halfway between two codes of each code count, or one float nearer to zero; the ends fixed so that the
    scale is a power of two."""
    top = rng.choice([3, 4, 8, 15, 16, 31, 32, 127], (rows, 1))
    x = rng.integers(-2 * top, 2 * top + 1, (rows, COLUMNS)) * 0.5
    x = np.where(rng.random(x.shape) < 0.5, x, np.nextafter(x.astype(np.float32), np.float32(0)))
    x[:, ::16] = -top
    x[:, 8::16] = np.where(rng.random((rows, 1)) < 0.5, top, -top)
    return x * 2.0 ** rng.integers(-8, 4, (rows, 1))


@_family
def tied_peaks(rng, rows):
    """Two magnitudes, and +a beside -a: the first decides the sign of the scale."""
    a = np.abs(_normal(rng, rows)[:, :1])
    x = np.where(rng.integers(0, 2, (rows, COLUMNS)), a, -a)
    return np.where(rng.random((rows, COLUMNS)) < rng.random((rows, 1)), x, x * 0.25)


@_family
def rounded(rng, rows):
    """Weights that came from float16, bfloat16 or an 8-bit grid."""
    x = _normal(rng, rows) * np.float32(0.02)
    half = x.astype(np.float16).astype(np.float32)
    bf16 = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return np.choose(rng.integers(0, 3, (rows, 1)), [half, bf16, np.rint(x * 1000) / 1000])


@_family
def uneven_sub_blocks(rng, rows):
    """Each run of 16 at a scale of its own, some of them zero or far away."""
    scale = 10.0 ** rng.uniform(-8, 4, (rows, 16)) * (rng.random((rows, 16)) < 0.9)
    shift = np.repeat(_normal(rng, rows)[:, :16] * (rng.random((rows, 16)) < 0.3), 16, axis=1)
    return _normal(rng, rows) * np.repeat(scale, 16, axis=1) + shift


@_family
def far_elements(rng, rows):
    """Every weight at a magnitude of its own, over the whole exponent range."""
    return _normal(rng, rows).astype(float) * 10.0 ** rng.uniform(-44, 38, (rows, COLUMNS))


@_family
def float_patterns(rng, rows):
    return _bits_to_floats(rng.integers(0, 2**32, (rows, COLUMNS), np.uint32))


@_family
def bf16_patterns(rng, rows):
    return _bits_to_floats(rng.integers(0, 2**16, (rows, COLUMNS), np.uint32) << np.uint32(16))


def importances(seed: int, columns: int) -> dict[str, np.ndarray]:
    """Importance vectors float32 [columns]: ordinary ones, and those that leave a sub-block almost or quite without."""
    rng = np.random.default_rng(seed)
    magnitude = np.abs(rng.standard_normal(columns))
    vectors = {
        "magnitudes": magnitude,
        "ones": np.ones(columns),
        "half zeros": magnitude * (rng.random(columns) < 0.5),
        "mostly zeros": magnitude * (rng.random(columns) < 0.05),
        "zeros": np.zeros(columns),
        "sub-blocks of zeros": np.repeat(rng.random(columns // 16) < 0.5, 16),
        "log-normal": rng.lognormal(0, 4, columns),
        "24 decades": 10.0 ** rng.uniform(-12, 12, columns),
        "68 decades": 10.0 ** rng.uniform(-38, 30, columns),
        "squares": rng.chisquare(1, columns),
        "tiny": np.full(columns, 1e-20),
        "subnormal": np.full(columns, 1e-41),
    }
    return {name: vector.astype(np.float32) for name, vector in vectors.items()}
