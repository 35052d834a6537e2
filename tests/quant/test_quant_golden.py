"""Known checksums of ggml's output, for machines without the reference.

The values come from ggml 0.20.2, 0.26.0 and 0.27.0, which agree; none is our own output.
"""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from quant import FORMATS, dequantize, quantize

# format: CRC-32 of all blocks, first 8 bytes, CRC-32 of the decoded float32
GOLDEN = {
    "Q4_0": ("990b9d1a", "27a9b366b7a85a43", "831d991f"),
    "Q4_1": ("c8f456f5", "ad283cb32b983746", "db440fa0"),
    "Q5_0": ("a39d86eb", "27a5980ccdd377bc", "8f235bdc"),
    "Q5_1": ("ca4e6d79", "87243cb32373322c", "682d1c04"),
    "Q8_0": ("d936730c", "3119491f0d00e64e", "b134d044"),
    "Q2_K": ("bd0de0ff", "4b88cfce7b6758ae", "1dc2be9a"),
    "Q3_K": ("2b57f109", "7e8041fd9332fdf5", "dc786e9a"),
    "Q4_K": ("d5f0fbc0", "3212391eeff6abf2", "e340d04a"),
    "Q5_K": ("46e37bda", "e70d2f1ef1f7acf2", "adf65e97"),
    "Q6_K": ("08fc8874", "5e488df0965d5d5f", "a3e511ae"),
    "IQ4_NL": ("f3e44af3", "5499c355b7a84a32", "62ae5196"),
    "IQ4_XS": ("711833e6", "1286ff03bca80d29", "6d3f3be9"),
}
# format: CRC-32 of all blocks and first 8 bytes, with importance
WITH_IMPORTANCE = {
    "Q4_0": ("add3b2c7", "16a9b366b7a85a33"),
    "Q4_1": ("f0cc760b", "8d28e2b22b983746"),
    "Q5_0": ("25f75f33", "1aa5980ccdd377bc"),
    "Q5_1": ("6f58d287", "852427b32373322c"),
    "Q8_0": ("d936730c", "3119491f0d00e64e"),
    "Q2_K": ("96c4a924", "4b77bfbd7b6768ad"),
    "Q3_K": ("0f65018b", "7e8041fd9332fdf5"),
    "Q4_K": ("3fcb789a", "7f12611eedf2acef"),
    "Q5_K": ("742fac4b", "100e491ef0f8aaf3"),
    "Q6_K": ("cf78fd5b", "5e488df0975c5d5f"),
    "IQ4_NL": ("cb918dee", "0a99c255b7b84a32"),
    "IQ4_XS": ("8c9c47f2", "0506003c4568f307"),
}


def golden_weights() -> np.ndarray:
    """float32 [2, 512] from a small generator anyone can repeat, with a zero, a negative and a constant run."""
    state, values = 12345, []
    for _ in range(1024):
        total = 0
        for _ in range(4):
            state = (1103515245 * state + 12345) % 2**31
            total += state >> 16 & 1023
        values.append((total - 2046) / 4096)
    x = np.array(values, "<f4").reshape(2, 512)
    x[1, 256:288] = 0
    x[1, 288:304] = -(x[1, 288:304] * x[1, 288:304])
    x[1, 304:320] = 0.25
    assert f"{zlib.crc32(x.tobytes()):08x}" == "4740c1f9"
    return x


def test_every_block_format_has_golden_values():
    assert set(GOLDEN) == set(WITH_IMPORTANCE) == set(FORMATS) - {"F32", "F16", "BF16"}


@pytest.mark.parametrize("fmt", GOLDEN)
def test_golden_checksums(fmt):
    blocks, first, decoded = GOLDEN[fmt]
    data = quantize(golden_weights(), fmt)
    assert data[0, :8].tobytes().hex() == first
    assert f"{zlib.crc32(data.tobytes()):08x}" == blocks
    assert f"{zlib.crc32(dequantize(data, fmt).astype('<f4').tobytes()):08x}" == decoded


@pytest.mark.parametrize("fmt", WITH_IMPORTANCE)
def test_golden_checksums_with_importance(fmt):
    importance = (((7919 * np.arange(512)) % 1000 + 1) / 256).astype("<f4")
    assert f"{zlib.crc32(importance.tobytes()):08x}" == "03f35c60"
    data = quantize(golden_weights(), fmt, importance)
    assert data[0, :8].tobytes().hex() == WITH_IMPORTANCE[fmt][1]
    assert f"{zlib.crc32(data.tobytes()):08x}" == WITH_IMPORTANCE[fmt][0]
