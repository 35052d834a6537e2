"""hypothesis: any finite weights, any shape and strides, any input type."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from families import COLUMNS, FAMILIES, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quant import FORMATS, dequantize, first_nonfinite_scale, quantize

formats = st.sampled_from(list(FORMATS))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arbitrary = hnp.arrays(np.float32, (2, COLUMNS), elements=finite, fill=finite)
from_families = st.builds(draw, st.sampled_from(list(FAMILIES)), st.integers(0, 2**32 - 1), st.just(4))
mixed = st.builds(
    lambda a, b, where: np.where(np.isin(np.arange(COLUMNS), where), a[:2], b[:2]),
    from_families,
    from_families,
    st.lists(st.integers(0, COLUMNS - 1), max_size=40),
)
weights = st.one_of(from_families, mixed, arbitrary)

many = settings(max_examples=300, deadline=None)
few = settings(max_examples=100, deadline=None)


@many
@given(weights, formats)
def test_any_finite_weights_give_ggmls_bytes_and_floats(x, fmt):
    ggml = oracle.load("libggml-python")
    data = quantize(x, fmt)
    assert data.tobytes() == ggml.quantize(x, fmt).tobytes()
    assert dequantize(data, fmt).tobytes() == ggml.dequantize(data, fmt).tobytes()


@st.composite
def strided(draw_value):
    """A view with the strides of a slice, a reversal or a transposition, and its contiguous copy."""
    lead = draw_value(st.lists(st.integers(0, 3), max_size=3))
    length = 256 * draw_value(st.integers(0, 3))
    skip = draw_value(st.sampled_from([1, 2, -1]))
    axis = draw_value(st.integers(0, len(lead)))
    order = draw_value(st.permutations(range(len(lead) + 1)))
    shape = [*lead, length]
    stored = list(shape)
    stored[axis] = stored[axis] * abs(skip)
    base = np.random.default_rng(draw_value(st.integers(0, 99))).standard_normal([stored[i] for i in order], np.float32)
    view = base.transpose(np.argsort(order))
    view = view[(slice(None),) * axis + (slice(None, None, skip),)]
    assert view.shape == tuple(shape)
    return view


@few
@given(strided(), formats)
def test_strides_and_shapes(view, fmt):
    copy = np.ascontiguousarray(view).reshape(view.shape)
    data = quantize(view, fmt)
    assert data.dtype == np.uint8
    assert data.shape == (*view.shape[:-1], FORMATS[fmt].row_bytes(view.shape[-1]))
    rows = copy.reshape(-1, copy.shape[-1]) if copy.size else copy[:0].reshape(0, COLUMNS)
    assert data.tobytes() == b"".join(quantize(row, fmt).tobytes() for row in rows)
    decoded = dequantize(data, fmt)
    assert decoded.shape == view.shape
    spread = np.repeat(data, 2, axis=0)[::2]  # any strides for decoding as well
    assert dequantize(spread, fmt).tobytes() == decoded.tobytes()


@few
@given(st.integers(0, 2**32 - 1), formats)
def test_half_floats_equal_widening_first(seed, fmt):
    bits = np.random.default_rng(seed).integers(0, 2**16, (3, COLUMNS), np.uint16)
    x = np.where((bits & 0x7C00) == 0x7C00, bits ^ 0x0400, bits).astype(np.uint16).view(np.float16)
    assert quantize(x, fmt).tobytes() == quantize(x.astype(np.float32), fmt).tobytes()


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from(["bf16_patterns", "rounded", "normal"]), formats)
def test_bfloat16_equals_widening_first(seed, family, fmt):
    bits = (draw(family, seed, 3).view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    data = quantize(bits, fmt, dtype="bf16")
    assert data.tobytes() == quantize(wide, fmt).tobytes()
    if fmt == "BF16":
        assert data.tobytes() == bits.tobytes()


@few
@given(st.lists(st.integers(0, 11), max_size=4), formats, st.sampled_from([np.inf, -np.inf, np.nan]), st.data())
def test_first_nonfinite_scale_finds_the_first(spoiled, fmt, value, data):
    form = FORMATS[fmt]
    encoded = quantize(np.random.default_rng(0).standard_normal((3, 4 * form.block_length), np.float32), fmt)
    blocks = encoded.view(form.dtype).reshape(-1)
    for index in spoiled:
        field = data.draw(st.sampled_from(form.scale_fields))
        # BF16 stores the upper half of the float32 pattern
        blocks[field][index] = np.float32(value).view(np.uint32) >> 16 if fmt == "BF16" else value
    assert first_nonfinite_scale(encoded, fmt) == min(spoiled, default=None)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.startswith("Q")])
def test_an_overflowing_scale_is_found(fmt):
    form = FORMATS[fmt]
    x = np.zeros((2, 4 * form.block_length), np.float32)
    x[1, 2 * form.block_length] = -3e9
    assert first_nonfinite_scale(quantize(x, fmt), fmt) == 6
