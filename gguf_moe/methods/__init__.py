"""Ways to choose the codes of a quantized file: a module for each, with a class `Method`. `rtn` is ggml's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import gguf

from gguf_moe.errors import UsageError
from gguf_moe.evaluation.events import Notice, Started
from gguf_moe.plan import Plan

METHODS = ("rtn", "gptq")
KEY = "gguf_moe.method"  # in a file that another method than rtn has made


@dataclass(frozen=True)
class Settings:
    """What a method may be told. All but rtn need a text."""

    text: Path | None = None
    chunks: int | None = None  # windows of the text at most
    ladder: bool = False  # several files are made together
    original: bool | None = None  # calibrate on the layers as they were, or as they have been quantized; None: as usual
    damping: float = 0.01
    device: str = "cpu"
    memory: int | None = None  # bytes at most; None: most of what is free


@dataclass(frozen=True)
class Chosen:
    """A matrix, by its tensor and expert, has its codes; done of total, over all files."""

    matrix: str
    done: int
    total: int


@dataclass(frozen=True)
class Summary:
    """What came of a file: one line."""

    text: str


Event = Notice | Started | Chosen | Summary


class Method(Protocol):
    """What a method's module has as `Method`."""

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError for settings that are not the method's."""

    text: Path | None  # that it goes by

    def keys(self) -> dict[str, gguf.GGUFValue]:
        """What a file says of how it was made."""

    def check(self, plans: Sequence[Plan]) -> None:
        """Raises UsageError for a plan that the method has nothing to do with."""

    def prepared(
        self, plans: Sequence[Plan], targets: Sequence[Path], on_event: Callable[[Event], None]
    ) -> AbstractContextManager[list[Plan]]:
        """The plans with rows whose codes are chosen, until their files are written, which are to be called `targets`.
        What is kept beside them goes when the block ends well, else the same call goes on from it."""

    def forget(self, targets: Sequence[Path]) -> None:
        """Remove what is still kept beside targets that are whole."""


def find_method(name: str, settings: Settings) -> Method:
    """The method of that name. Raises UsageError where it needs what is not installed."""
    try:
        module = import_module(f"gguf_moe.methods.{name}")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--method {name} needs {error.name}, which is not installed: pip install 'gguf-moe[eval]'"
        ) from None
    return module.Method(settings)
