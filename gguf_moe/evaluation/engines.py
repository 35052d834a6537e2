"""The engines that can compute logits, one module each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from gguf_moe.errors import UsageError
from gguf_moe.evaluation.events import MemoryPlan, Progress, Routed, Scored
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.text import TextTokenizer

MODULES = {"torch": "torch_engine", "llama.cpp": "llama_cpp"}
WEIGHINGS = ROUTER, EVEN = "router", "even"  # what a token counts for an expert where each is shown all
KEPT_WINDOWS = 32
DTYPES = ("float32", "bfloat16", "float16")

Sweep = Callable[[np.ndarray, Callable[[Progress], None]], Iterator[Routed | Scored]]


@dataclass(frozen=True)
class Settings:
    """How a text is run. device, dtype and memory are for torch."""

    context: int = 512  # tokens of a window
    chunks: int | None = None  # windows at most
    skip: int = 0  # windows at the text's beginning that are left out
    engine: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    memory: int | None = None  # bytes at most; None: most of what is free
    bootstrap: int = 0  # resamples for the intervals of the KL divergence's quantiles
    state: Path | None = None  # where finished sweeps are kept until all are
    most: int | None = None  # windows of a sweep

    @property
    def sweep(self) -> int | None:
        """Windows of a sweep at most: few enough, where they are kept, that a stop does not cost much."""
        return self.most or (KEPT_WINDOWS if self.state else None)


@dataclass(frozen=True)
class Loaded:
    """Models ready to be run: the base, which is the first, and others."""

    chunks: int  # of a sweep
    memory: MemoryPlan | None
    sweep: Sweep


class Engine(Protocol):
    """What an engine's module has as `Engine`."""

    NOTE: str  # what its figures are, beside the other engine's

    def __init__(self, settings: Settings) -> None: ...

    def tokenizer(self, base: ModelSource) -> AbstractContextManager[TextTokenizer]:
        """The base's tokenizer."""

    def load(self, sources: Sequence[ModelSource], chunks: int, most: int | None) -> AbstractContextManager[Loaded]:
        """The models, for so many chunks of the settings' context, `most` in a sweep."""


def load(module: str, needing: str) -> ModuleType:
    """A module of the evaluation. Raises UsageError, which says who is `needing`, where what it needs is not there."""
    try:
        return import_module(f"gguf_moe.evaluation.{module}")
    except ModuleNotFoundError as error:
        raise UsageError(f"{needing} {error.name}, which is not installed: pip install 'gguf-moe[eval]'") from None


def open_engine(settings: Settings) -> Engine:
    """The settings' engine. Raises UsageError where what it needs is not installed, or for settings it cannot have."""
    return load(MODULES[settings.engine], "validation needs").Engine(settings)
