"""Every byte and every decoded bit against ggml."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import oracle
import pytest
from families import COLUMNS, FAMILIES, draw, importances

import quant
from quant import FORMATS, dequantize, first_nonfinite_scale, quantize

FORMAT_NAMES = list(FORMATS)


def assert_same_blocks(ours: np.ndarray, theirs: np.ndarray, fmt: str, x: np.ndarray, what: str) -> int:
    """Compare encoded rows; returns how many blocks were compared."""
    form = FORMATS[fmt]
    a, b = ours.reshape(-1, form.block_bytes), theirs.reshape(-1, form.block_bytes)
    assert a.shape == b.shape
    wrong = np.flatnonzero((a != b).any(axis=1))
    if wrong.size:
        i = wrong[0]
        raise AssertionError(
            f"{fmt}, {what}: {wrong.size} of {len(a)} blocks differ; the first is {i}:\n"
            f"weights {x.reshape(-1, form.block_length)[i].tolist()}\nours   {a[i].tobytes().hex()}\n"
            f"theirs {b[i].tobytes().hex()}"
        )
    return len(a)


def assert_same_floats(ours: np.ndarray, theirs: np.ndarray, fmt: str, what: str) -> int:
    """Compare decoded rows bit for bit, NaN included; returns how many blocks were compared."""
    a, b = ours.view(np.uint32), theirs.view(np.uint32)
    assert a.shape == b.shape
    wrong = np.argwhere(a != b)
    if wrong.size:
        i = tuple(wrong[0])
        raise AssertionError(f"{fmt}, {what}: {len(wrong)} weights differ; {i}: ours {a[i]:08x} theirs {b[i]:08x}")
    return a.size // FORMATS[fmt].block_length


def in_turn(backends: tuple[str, ...]) -> Iterator[None]:
    """Once for each backend, while it runs; without any, once as it is."""
    for name in backends:
        quant.use_backend(name)
        yield
        quant.use_backend(None)
    if not backends:
        yield


def compare_weighted(fmt: str, blocks: int, seed: int, columns: int = 768, backends: tuple[str, ...] = ()) -> int:
    """At least `blocks` blocks with importance, all families by all vectors, against current ggml; the count."""
    ggml = oracle.load("xllamacpp")
    vectors = importances(seed, columns)
    rows = -(-blocks * FORMATS[fmt].block_length // (columns * len(FAMILIES) * len(vectors)))
    compared = 0
    for family in FAMILIES:
        x = draw(family, seed, 3 * rows).reshape(rows, columns)
        for name, w in vectors.items():
            theirs = ggml.quantize(x, fmt, w)
            for _ in in_turn(backends):
                compared += assert_same_blocks(quantize(x, fmt, w), theirs, fmt, x, f"{family}, importance {name}")
    return compared


def compare(ggml: oracle.Ggml, fmt: str, blocks: int, seed: int, backends: tuple[str, ...] = ()) -> tuple[int, int]:
    """At least `blocks` blocks, all families in equal parts: encode with both, decode with both. Returns the counts."""
    rows = -(-blocks * FORMATS[fmt].block_length // (COLUMNS * len(FAMILIES)))
    encoded = decoded = 0
    for family in FAMILIES:
        for start in range(0, rows, 4096):
            x = draw(family, seed + start, min(4096, rows - start))
            theirs = ggml.quantize(x, fmt)
            floats = ggml.dequantize(theirs, fmt)
            for _ in in_turn(backends):
                encoded += assert_same_blocks(quantize(x, fmt), theirs, fmt, x, family)
                decoded += assert_same_floats(dequantize(theirs, fmt), floats, fmt, family)
    return encoded, decoded


@pytest.mark.parametrize("reference", oracle.NAMES)
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_same_bytes_as_ggml(fmt, reference):
    encoded, decoded = compare(oracle.load(reference), fmt, 20_000, seed=1 + oracle.NAMES.index(reference))
    assert encoded == decoded >= 20_000


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_same_bytes_as_ggml_in_small_pieces(fmt, monkeypatch):
    """One degenerate block sends its whole piece down the exact, slower rounding; small pieces take both ways."""
    monkeypatch.setattr(quant, "PIECE", 2 * FORMATS[fmt].block_length)
    encoded, _ = compare(oracle.load("libggml-python"), fmt, 3000, seed=50)
    assert encoded >= 3000


@pytest.mark.long
@pytest.mark.parametrize("backend", ["all"])  # in turn, so that ggml is asked once
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_same_bytes_as_ggml_a_million_blocks(fmt, record_property):
    encoded, decoded = compare(oracle.load("libggml-python"), fmt, 1_000_000, 1000, quant.BACKENDS)
    record_property("blocks", encoded)
    assert encoded == decoded >= 1_000_000 * len(quant.BACKENDS)


@pytest.mark.parametrize("reference", oracle.NAMES)
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_decoding_random_bytes(fmt, reference):
    """Fields no encoder writes: infinite and NaN scales, codes out of range."""
    data = np.random.default_rng(5).integers(0, 256, (20_000, FORMATS[fmt].block_bytes), np.uint8)
    assert first_nonfinite_scale(data, fmt) is not None
    assert assert_same_floats(dequantize(data, fmt), oracle.load(reference).dequantize(data, fmt), fmt, "random bytes")


@pytest.mark.parametrize("fmt", ["F16", "BF16"])
def test_decoding_every_16_bit_pattern(fmt):
    data = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(1, -1)
    assert assert_same_floats(dequantize(data, fmt), oracle.load("libggml-python").dequantize(data, fmt), fmt, "all")


@pytest.mark.parametrize("fmt", ["F16", "BF16"])
def test_rounding_beside_every_16_bit_value(fmt):
    """Each value of the format, its float32 neighbours, and the middle to the next value with its neighbours."""
    every = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(1, -1)
    bits = dequantize(every, fmt).view(np.uint32).astype(np.int64)
    half_step = 1 << (12 if fmt == "F16" else 15)
    near = bits + np.array([[-1], [0], [1], [half_step - 1], [half_step], [half_step + 1]])
    x = np.clip(near, 0, 2**32 - 1).astype(np.uint32).view(np.float32)  # [6, 65536], NaN with payloads included
    assert_same_blocks(quantize(x, fmt), oracle.load("libggml-python").quantize(x, fmt), fmt, x, "beside values")


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_not_finite_weights(fmt, value):
    """One spot a row, or a few: even these take ggml's course (a converter refuses them before encoding)."""
    x = draw("normal", 7, 512)
    rng = np.random.default_rng(8)
    x[rng.random(x.shape) < rng.choice([0.002, 0.05, 1], (512, 1), p=[0.6, 0.3, 0.1])] = value
    assert_same_blocks(quantize(x, fmt), oracle.load("libggml-python").quantize(x, fmt), fmt, x, str(value))


def test_the_reference_is_the_version_it_should_be():
    assert oracle.load("libggml-python").version == "0.20.2"
    assert oracle.load("xllamacpp").version != "0.20.2"


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_same_bytes_as_ggml_with_importance(fmt):
    assert compare_weighted(fmt, 20_000, seed=11) >= 20_000


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_same_bytes_as_ggml_with_importance_in_small_pieces(fmt, monkeypatch):
    monkeypatch.setattr(quant, "PIECE", 768)
    assert compare_weighted(fmt, 2000, seed=12) >= 2000


@pytest.mark.long
@pytest.mark.parametrize("backend", ["all"])
@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_same_bytes_as_ggml_with_importance_in_many_blocks(fmt):
    compared = compare_weighted(fmt, 200_000, 2000, backends=quant.BACKENDS)
    assert compared >= 200_000 * len(quant.BACKENDS)


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_a_row_of_importance_for_each_expert(fmt):
    x = np.stack([draw("student", seed, 24).reshape(8, 768) for seed in range(3)])  # [experts, rows, columns]
    w = np.stack([importances(seed, 768)["squares"] for seed in range(3)])
    for ours, expert, weights in zip(quantize(x, fmt, w), x, w):
        assert_same_blocks(ours, oracle.load("xllamacpp").quantize(expert, fmt, weights), fmt, expert, "an expert")
