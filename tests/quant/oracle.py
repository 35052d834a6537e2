"""ggml itself, through ctypes: the reference for every byte.

Two builds: the one in libggml-python (ggml 0.20.2), and the current one inside xllamacpp's extension module. Both are
compiled for plain x86-64, so without contraction to FMA. On Linux x86-64 a missing reference is a failure, not a skip.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from quant import FORMATS

NAMES = ("libggml-python", "xllamacpp")
_DECODERS = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}


def load(name: str) -> Ggml:
    """The reference called `name`; fails the test on Linux x86-64 if it is not there, skips it elsewhere."""
    try:
        return _load(name)
    except (ImportError, OSError) as error:
        where = f"{platform.system()} {platform.machine()}"
        message = f"the reference {name} does not load on {where}: {error}"
        if where == "Linux x86_64":
            pytest.fail(message + "; install the dev requirements of pyproject.toml")
        pytest.skip(message)


@cache
def _load(name: str) -> Ggml:
    if name == "libggml-python":
        spec = importlib.util.find_spec("libggml")
        pattern = "lib*/libggml-base.so"
    else:
        spec = importlib.util.find_spec("xllamacpp")
        pattern = "xllamacpp*.so"
    if spec is None:
        raise ImportError(f"no package {name}")
    if name == "xllamacpp":
        import xllamacpp  # noqa: F401  loads the libraries it needs
    for folder in spec.submodule_search_locations:
        for path in Path(folder).glob(pattern):
            return Ggml(path)
    raise ImportError(f"no {pattern} in {spec.submodule_search_locations}")


class Ggml:
    """One build of ggml."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        self._library.ggml_version.restype = ctypes.c_char_p
        self.version = self._library.ggml_version().decode()

    def quantize(self, x: np.ndarray, fmt: str, importance: np.ndarray | None = None) -> np.ndarray:
        """float32 [rows, columns] to uint8 [rows, row bytes]; importance: float32 [columns]."""
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        rows, columns = x.shape
        out = np.empty((rows, FORMATS[fmt].row_bytes(columns)), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        written = self._quantize(FORMATS[fmt].ggml_id, x.ctypes.data, out.ctypes.data, 0, rows, columns, weights)
        assert written == out.nbytes
        return out

    def dequantize(self, data: np.ndarray, fmt: str) -> np.ndarray:
        """uint8 [rows, row bytes] to float32 [rows, columns]."""
        assert data.dtype == np.uint8
        assert data.flags.c_contiguous
        form = FORMATS[fmt]
        out = np.empty((len(data), data.shape[1] // form.block_bytes * form.block_length), np.float32)
        if fmt == "F32":
            return data.view(np.float32).copy()
        name = _DECODERS.get(fmt) or "dequantize_row_" + re.sub("I?Q", lambda m: m[0].lower(), fmt).replace(
            "_NL", "_nl"
        ).replace("_XS", "_xs")
        function = getattr(self._library, name)
        function.restype = None
        function(*map(ctypes.c_void_p, (data.ctypes.data, out.ctypes.data)), ctypes.c_int64(out.size))
        return out
