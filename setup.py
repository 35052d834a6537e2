"""The optional C extension; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("quant/native")

# Contraction must be off: a fused multiply-add rounds once where ggml rounds twice, and the bytes differ.
FLAGS = {
    "unix": [
        *("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-wrapv", "-fvisibility=hidden"),
        *("-Wall", "-Wextra", "-Wno-psabi"),
    ],
    "msvc": ["/std:c11", "/O2", "/fp:strict"],
}


class BuildNative(build_ext):
    """Flags by compiler, which is known only when building starts."""

    def build_extensions(self) -> None:
        """Build with the flags of the compiler at hand."""
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS["msvc" if self.compiler.compiler_type == "msvc" else "unix"]
        super().build_extensions()


native = Extension(
    "quant._native",
    sorted(str(path) for path in NATIVE.glob("*.c")),
    depends=[str(path) for path in NATIVE.glob("*.h")],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
    optional=True,  # without a compiler the package works in NumPy
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildNative}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
