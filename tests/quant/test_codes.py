"""Other codes inside blocks: ggml's decoder reads what `grid` says of them, and the same codes give the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

import quant


def blocks(fmt: str, rows: int = 6) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(8).normal(0, 0.02, (rows, 512)).astype(np.float32)
    x[:, 256:] *= 30
    x[1, :32] = 0  # a scale of 0
    return x, quant.quantize(x, fmt)


@pytest.mark.parametrize("fmt", quant.CODED)
def test_a_code_stands_for_what_the_grid_says(fmt: str) -> None:
    _, data = blocks(fmt)
    levels, (step, offset) = quant.levels(fmt), quant.grid(data, fmt)
    assert (np.diff(levels) > 0).all()
    scale = np.abs(quant.dequantize(data, fmt)).max()
    for q in range(len(levels)):
        decoded = quant.dequantize(quant.with_codes(data, fmt, q), fmt)
        assert np.abs(decoded - (offset + step * levels[q])).max() < 1e-6 * scale + 1e-5 * np.abs(step).max()


@pytest.mark.parametrize("fmt", quant.CODED)
def test_every_weight_has_its_own_code(fmt: str) -> None:
    x, data = blocks(fmt)
    levels, (step, offset) = quant.levels(fmt), quant.grid(data, fmt)
    q = np.random.default_rng(9).integers(0, len(levels), x.shape).astype(np.uint8)
    decoded = quant.dequantize(quant.with_codes(data, fmt, q), fmt)
    assert np.allclose(decoded, offset + step * levels[q], rtol=1e-4, atol=1e-5 * np.abs(step).max())


@pytest.mark.parametrize("fmt", quant.CODED)
def test_the_nearest_codes_are_the_encoders_or_as_near(fmt: str) -> None:
    """The encoder's own codes come out of its grid; where two are as near, either may."""
    x, data = blocks(fmt)
    levels, (step, offset) = quant.levels(fmt), quant.grid(data, fmt)
    values = offset[..., None] + step[..., None] * levels  # [rows, columns, codes]
    nearest = np.abs(values - x[..., None]).min(-1)
    again = quant.dequantize(quant.with_codes(data, fmt, np.abs(values - x[..., None]).argmin(-1)), fmt)
    assert np.allclose(np.abs(again - x), nearest, atol=1e-5 * np.abs(step).max())
    assert (nearest <= np.abs(quant.dequantize(data, fmt) - x) + 1e-5 * np.abs(step).max()).all()


def test_scales_stay() -> None:
    fmt = "Q4_K"
    _, data = blocks(fmt)
    records = [d.view(quant.FORMATS[fmt].dtype) for d in (data, quant.with_codes(data, fmt, 0))]
    for field in ("d", "dmin", "scales"):
        assert (records[0][field] == records[1][field]).all()
    assert not records[1]["qs"].any()


def test_formats_of_single_weights_have_no_codes() -> None:
    with pytest.raises(ValueError, match="BF16 has no codes; expected one of Q8_0, "):
        quant.levels("bf16")
    assert set(quant.FORMATS) - set(quant.CODED) == {"F32", "F16", "BF16"}
