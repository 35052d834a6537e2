"""The C kernels: there when a compiler is, chosen openly, compiled without contraction, safe from many threads."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
from families import draw, importances

import quant
from quant import compiled, dequantize, quantize

NATIVE = Path(quant.__file__).parent / "native"
COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
HEADERS = Path(sysconfig.get_paths()["include"], "Python.h").exists()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_the_extension_is_built_where_it_can_be() -> None:
    if not (COMPILER and HEADERS):
        pytest.skip("no C compiler or no Python headers: NumPy alone")
    assert compiled.LEVELS, f"the extension was lost: {compiled.MISSING}"


def test_x86_has_its_levels() -> None:
    if not compiled.LEVELS or platform.machine() != "x86_64":
        pytest.skip("no C kernels, or not x86-64")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert compiled.LEVELS[0] == "baseline"
    assert ("avx2" in compiled.LEVELS) == (" avx2 " in flags)
    assert ("avx512" in compiled.LEVELS) == (" avx512vl " in flags and " avx512dq " in flags)


def test_the_backend_is_told(backend: str) -> None:
    assert quant.backend().removeprefix("native ").split()[0] == backend


def test_the_variable_forces_a_backend(backend: str) -> None:
    done = run_python("import quant; print(quant.backend())", QUANT_BACKEND=backend)
    assert done.stdout.strip().removeprefix("native ").split()[0] == backend


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'mmx', expected one of numpy"):
        quant.use_backend("mmx")
    assert "unknown backend 'mmx'" in run_python("import quant", QUANT_BACKEND="mmx").stderr


def test_a_missing_extension_is_explained() -> None:
    code = "import sys; sys.modules['quant._native'] = None; import quant; print(quant.backend()); "
    code += "import numpy; print(quant.quantize(numpy.ones((1, 32), 'f4'), 'Q8_0').shape)"
    first, second = run_python(code, QUANT_BACKEND="").stdout.splitlines()
    assert first.startswith("numpy (no native: ")
    assert "quant._native" in first
    assert second == "(1, 34)"


def test_threads_give_the_same_bytes() -> None:
    x, w = draw("student", 3, 3072).reshape(1024, 768), importances(3, 768)["squares"]
    want = quantize(x, "Q4_K", w)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: quantize(x[i : i + 33], "Q4_K", w), range(0, 1024, 33)))
    assert np.array_equal(np.concatenate(parts), want)


@pytest.mark.parametrize("fmt", quant.FORMATS)
def test_rows_at_any_stride_and_address(fmt: str, backend: str) -> None:
    x = draw("normal", 8, 12).reshape(6, 512)
    want = quantize(x, fmt)
    raw = np.zeros(x.nbytes + 5, np.uint8)
    odd = raw[5:].view(np.float32).reshape(6, 512)
    odd[:] = x
    wide = np.zeros((6, 1024), np.float32)
    wide[:, ::2] = x
    fortran = np.asfortranarray(x)
    for other in (odd, wide[:, ::2], fortran, x[::-1][::-1], np.broadcast_to(x, (2, 6, 512))[1]):
        assert np.array_equal(quantize(other, fmt), want)
    assert np.array_equal(quantize(x[::-2], fmt), want[::-2])
    spread = np.zeros((6, want.shape[1] + 7), np.uint8)
    spread[:, 7:] = want
    assert np.array_equal(dequantize(spread[:, 7:], fmt).view(np.uint32), dequantize(want, fmt).view(np.uint32))


def test_contraction_would_change_bytes_and_is_off(tmp_path: Path, backend: str) -> None:
    """The same source compiled with fused multiply-add gives other blocks: those are where ours must equal ggml's."""
    if not COMPILER or backend not in ("avx512", "avx2"):
        pytest.skip("needs a C compiler and a level whose registers come with FMA")
    library = tmp_path / "contracted.so"
    sources = [str(path) for path in NATIVE.glob("*.c") if path.name != "module.c"]
    flags = ["-std=gnu11", "-O2", "-mfma", "-ffp-contract=fast", "-Wno-psabi", "-fPIC", "-shared"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(library)], check=True)
    x = draw("normal", 4, 4096)
    ours = quantize(x, "Q4_K")
    contracted = np.empty_like(ours)
    level = compiled.LEVELS.index(backend)
    encode = ctypes.CDLL(str(library)).quant_encode
    encode.argtypes = [
        *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ]
    assert encode(level, 12, x.ctypes.data, 0, *x.shape, x.strides[0], None, contracted.ctypes.data) == 0
    differing = (contracted != ours).any(axis=1)
    assert differing.any(), "contraction changes nothing here, so this test shows nothing"
    assert np.array_equal(ours[differing], oracle.load("libggml-python").quantize(x, "Q4_K")[differing])
