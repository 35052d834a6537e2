"""ggml's own codes, each weight rounded to the nearest its block can hold: llama.cpp's bytes. The default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gguf

from gguf_moe.errors import UsageError
from gguf_moe.methods import Event, Settings
from gguf_moe.plan import Plan


class Method:
    """See `methods.Method`."""

    text = None

    def __init__(self, settings: Settings) -> None:
        if replace(settings, ladder=False) != Settings():
            raise UsageError("--calib and what goes with it are for --method gptq")

    def keys(self) -> dict[str, gguf.GGUFValue]:
        return {}

    def check(self, plans: Sequence[Plan]) -> None:
        pass

    @contextmanager
    def prepared(
        self, plans: Sequence[Plan], targets: Sequence[Path], on_event: Callable[[Event], None]
    ) -> Iterator[list[Plan]]:
        yield list(plans)

    def forget(self, targets: Sequence[Path]) -> None:
        pass
