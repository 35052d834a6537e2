"""The table of block formats: one record per format, in ggml's field names.

Everything that lists formats (dispatch, command line choices, tests, documents) follows from `FORMATS`. A new format
is one record here and one encode/decode pair in a codec module (`floats`, `legacy`, `kquants`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Fields that hold a floating point number a decoder multiplies with: an infinity or NaN there spoils the block.
# `x` is the value itself in the formats that store one weight a block.
_FLOAT_FIELDS = ("d", "dmin", "m", "x")


@dataclass(frozen=True)
class Format:
    """One block format.

    name: ggml's name, upper case. ggml_id: the tensor type number in a GGUF file. block_length: weights in a block.
    dtype: the block's bytes as a NumPy record (little-endian, no padding).
    """

    name: str
    ggml_id: int
    block_length: int
    dtype: np.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes in one block."""
        return self.dtype.itemsize

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one weight, scales included."""
        return 8 * self.block_bytes / self.block_length

    @property
    def scale_fields(self) -> tuple[str, ...]:
        """Names of the floating point fields: d, dmin, m; or x, the value itself, in F32, F16 and BF16."""
        return tuple(field for field in self.dtype.names if field in _FLOAT_FIELDS)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights. ValueError if `columns` is not a multiple of the block length."""
        if columns < 0 or columns % self.block_length:
            raise ValueError(
                f"{self.name}: {columns} columns is not a multiple of the block length {self.block_length}"
            )
        return columns // self.block_length * self.block_bytes


def _format(name: str, ggml_id: int, block_length: int, block_bytes: int, fields: list[tuple]) -> Format:
    dtype = np.dtype(fields)
    if dtype.itemsize != block_bytes:
        raise AssertionError(f"{name}: record of {dtype.itemsize} bytes, ggml's block has {block_bytes}")
    return Format(name, ggml_id, block_length, dtype)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _format("F32", 0, 1, 4, [("x", "<f4")]),
        _format("F16", 1, 1, 2, [("x", "<f2")]),
        _format("BF16", 30, 1, 2, [("x", "<u2")]),  # the upper half of a float32; NumPy has no such type
        _format("Q8_0", 8, 32, 34, [("d", "<f2"), ("qs", "i1", 32)]),
        _format("Q4_0", 2, 32, 18, [("d", "<f2"), ("qs", "u1", 16)]),
        _format("Q4_1", 3, 32, 20, [("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
        _format("Q5_0", 6, 32, 22, [("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
        _format("Q5_1", 7, 32, 24, [("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
        _format("Q2_K", 10, 256, 84, [("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")]),
        _format("Q3_K", 11, 256, 110, [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
        _format("Q4_K", 12, 256, 144, [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
        _format(
            "Q5_K",
            13,
            256,
            176,
            [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)],
        ),
        _format("IQ4_NL", 20, 32, 18, [("d", "<f2"), ("qs", "u1", 16)]),
        _format("IQ4_XS", 23, 256, 136, [("d", "<f2"), ("sh", "<u2"), ("sl", "u1", 4), ("qs", "u1", 128)]),
        _format("Q6_K", 14, 256, 210, [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
    )
}


def format_named(name: str) -> Format:
    """The format of that name, in any case. ValueError listing the known names otherwise."""
    found = FORMATS.get(name.upper()) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return found
