"""What the package promises beside the bytes: errors, empty arrays, pieces, inputs left alone."""

from __future__ import annotations

import ast
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from families import draw

import quant
from quant import FORMATS, dequantize, first_nonfinite, first_nonfinite_scale, quantize
from quant.backend import CODECS

FORMAT_NAMES = list(FORMATS)


def test_the_table():
    import gguf

    assert list(CODECS) != []
    assert set(CODECS) == set(FORMATS)
    for name, form in FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (form.block_length, form.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
        assert form.ggml_id == kind.value
        assert form.name == name
        assert form.row_bytes(4 * form.block_length) == 4 * form.block_bytes
        assert form.scale_fields
    assert FORMATS["Q4_K"].bits_per_weight == 4.5
    assert FORMATS["Q6_K"].bits_per_weight == 6.5625
    assert FORMATS["Q5_1"].scale_fields == ("d", "m")
    assert FORMATS["Q2_K"].scale_fields == ("d", "dmin")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bf16"])
def test_the_first_nonfinite_weight_is_found(dtype: str):
    x = draw("normal", 3, 51).reshape(-1)[: 3 * 4321].reshape(3, 4321)
    bits = np.uint32 if dtype == "float32" else np.uint16
    as_bits = (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else x.astype(dtype).view(bits)
    odd = {"float32": (0x7F800000, 0xFF800001), "float16": (0x7C00, 0xFE01), "bf16": (0x7F80, 0xFFC0)}[dtype]

    def find(values: np.ndarray) -> int | None:
        return first_nonfinite(values, dtype="bf16") if dtype == "bf16" else first_nonfinite(values.view(dtype))

    assert find(as_bits) is None
    assert find(as_bits[:, :0]) is None
    for place in (0, 1023, 1024, 4320, 4321, 12962):
        for value in odd:
            spoilt = as_bits.copy()
            spoilt.reshape(-1)[place] = value
            spoilt.reshape(-1)[-1] = value  # not the first
            assert find(spoilt) == place
    wide = np.zeros((3, 2 * 4321 + 1), bits)
    wide[1, 2 * 77] = odd[0]
    assert find(wide[:, :-1:2]) == 4321 + 77


def test_row_bytes_refuses_part_blocks():
    with pytest.raises(ValueError, match=r"Q4_K.*300.*256"):
        FORMATS["Q4_K"].row_bytes(300)
    with pytest.raises(ValueError, match="-32"):
        FORMATS["Q8_0"].row_bytes(-32)


def test_any_case_of_the_name():
    x = draw("normal", 0, 2)
    assert quantize(x, "q4_k").tobytes() == quantize(x, "Q4_K").tobytes()
    assert dequantize(quantize(x, "bf16"), "Bf16").shape == x.shape


def _one_wrong(value: float) -> np.ndarray:
    """Importance of 256 columns with one value that is not allowed."""
    w = np.ones(256, np.float32)
    w[7] = value
    return w


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"Q9_9.*F32.*Q6_K", lambda x: quantize(x, "Q9_9")),
        (ValueError, r"Q9_9.*F32.*Q6_K", lambda x: dequantize(x.view(np.uint8), "Q9_9")),
        (ValueError, r"Q9_9", lambda x: first_nonfinite_scale(x.view(np.uint8), "Q9_9")),
        (ValueError, r"None.*known", lambda x: quantize(x, None)),
        (ValueError, r"Q4_K.*255.*256", lambda x: quantize(x[:, 1:], "Q4_K")),
        (ValueError, r"scalar", lambda x: quantize(np.float32(1), "F32")),
        (TypeError, r"float64.*astype", lambda x: quantize(x.astype(np.float64), "Q8_0")),
        (TypeError, r"int32", lambda x: quantize(x.astype(np.int32), "Q8_0")),
        (TypeError, r"uint16.*bf16", lambda x: quantize(x.astype(np.uint16), "Q8_0")),
        (TypeError, r"bf16.*uint16.*float32", lambda x: quantize(x, "Q8_0", dtype="bf16")),
        (TypeError, r"expected float32", lambda x: quantize(x.astype(x.dtype.newbyteorder()), "Q8_0")),
        (ValueError, r"'f8'", lambda x: quantize(x, "Q8_0", dtype="f8")),
        (ValueError, r"importance has shape \[3\], expected \[256\]", lambda x: quantize(x, "Q4_K", x[0, :3])),
        (TypeError, r"expected float32 importance, got float64", lambda x: quantize(x, "Q4_K", np.ones(256))),
        (ValueError, r"importance\[7\] is -1.0, expected a finite", lambda x: quantize(x, "Q4_K", _one_wrong(-1))),
        (ValueError, r"importance\[7\] is nan, expected a finite", lambda x: quantize(x, "Q8_0", _one_wrong(np.nan))),
        (ValueError, r"importance\[7\] is inf, expected a finite", lambda x: quantize(x, "Q4_0", _one_wrong(np.inf))),
        (
            ValueError,
            r"importance has shape \[3, 256\], expected \[256\] or \[2, 256\], a row an expert",
            lambda x: quantize(np.stack([x, x]), "Q4_K", np.ones((3, 256), np.float32)),
        ),
        (ValueError, r"Q4_K.*145.*144", lambda x: dequantize(np.zeros((2, 145), np.uint8), "Q4_K")),
        (ValueError, r"Q6_K.*209.*210", lambda x: first_nonfinite_scale(np.zeros(209, np.uint8), "Q6_K")),
        (ValueError, r"scalar", lambda x: dequantize(np.uint8(1), "Q8_0")),
        (TypeError, r"uint8.*float32", lambda x: dequantize(x, "Q4_K")),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call(draw("normal", 0, 2))


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (0, 3, 512), (0,), (3, 0)])
def test_empty(fmt, shape):
    data = quantize(np.empty(shape, np.float32), fmt)
    assert data.shape == (*shape[:-1], FORMATS[fmt].row_bytes(shape[-1]))
    assert data.dtype == np.uint8
    assert dequantize(data, fmt).shape == shape
    assert first_nonfinite_scale(data, fmt) is None


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
@pytest.mark.parametrize("piece", [1, 256, 768, 3000, 1 << 22])
def test_the_size_of_the_pieces_does_not_matter(fmt, piece, monkeypatch):
    """Rows of odd lengths cut anywhere; the pieces hold one block, a part of a row, or many rows."""
    families = ("normal", "float_patterns", "zeros", "uneven_sub_blocks", "far_magnitudes")
    x = np.concatenate([draw(name, 3, 3) for name in families]).reshape(3, 1280)
    monkeypatch.setattr(quant, "PIECE", 1 << 17)
    whole = quantize(x, fmt)
    floats = dequantize(whole, fmt)
    monkeypatch.setattr(quant, "PIECE", piece)
    assert quantize(x, fmt).tobytes() == whole.tobytes()
    assert dequantize(whole, fmt).tobytes() == floats.tobytes()


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_read_only_memory_map(fmt, tmp_path):
    x = draw("normal", 1, 20).reshape(10, 512)
    x.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.float32, "r", shape=(10, 512))
    data = quantize(mapped[3:9], fmt)
    assert type(data) is np.ndarray
    assert data.flags.writeable
    assert data.tobytes() == quantize(x[3:9].copy(), fmt).tobytes()
    data.tofile(tmp_path / "blocks")
    blocks = np.memmap(tmp_path / "blocks", np.uint8, "r", shape=data.shape)
    floats = dequantize(blocks, fmt)
    assert type(floats) is np.ndarray
    assert floats.flags.writeable
    assert floats.tobytes() == dequantize(data, fmt).tobytes()


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_input_stays_as_it_was_and_nothing_warns(fmt):
    for family in ("normal", "zeros", "float_patterns", "far_magnitudes"):
        x = draw(family, 2, 64)
        before = x.tobytes()
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")
            data = quantize(x, fmt)
            kept = data.tobytes()
            dequantize(data, fmt)
            first_nonfinite_scale(data, fmt)
        assert x.tobytes() == before
        assert data.tobytes() == kept


def test_the_package_needs_numpy_only():
    allowed = {"numpy", "quant", *sys.stdlib_module_names}
    files = sorted(Path(quant.__file__).parent.glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


@pytest.mark.parametrize("fmt", FORMAT_NAMES)
def test_the_weights_are_left_as_they_are(fmt):
    """One block alone is its own transpose, so a view would do for a copy."""
    x = draw("normal", 3, 1)[:, : FORMATS[fmt].block_length]
    before, w = x.copy(), np.ones(x.shape[1], np.float32)
    quantize(x, fmt)
    quantize(x, fmt, w)
    assert np.array_equal(x, before)
    assert (w == 1).all()
