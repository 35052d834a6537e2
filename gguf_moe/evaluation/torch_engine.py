"""The engine of our own: the forward pass in torch, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from gguf_moe.errors import UsageError
from gguf_moe.evaluation.engines import Loaded, Settings
from gguf_moe.evaluation.forward import Model, load_model
from gguf_moe.evaluation.memory import plan_memory
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.sweep import sweep
from gguf_moe.evaluation.text import TextTokenizer, read_tokenizer
from gguf_moe.gguf_keys import ModelKeys


class Engine:
    """See `engines.Engine`."""

    NOTE = (
        "By gguf-moe's own forward pass: only weights are quantized. llama.cpp also rounds activations to 8 bits, "
        "which is most of its KL divergence at 6 and 8 bits; --engine llama.cpp measures that."
    )

    def __init__(self, settings: Settings) -> None:
        self.settings, self.dtype = settings, getattr(torch, settings.dtype)
        try:
            torch.zeros(1, device=settings.device).item()  # read back, which `meta` cannot
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0].split(". ")[0]  # torch goes on at length
            raise UsageError(f"--device {settings.device}: torch cannot use it: {reason}") from None

    @contextmanager
    def tokenizer(self, base: ModelSource) -> Iterator[TextTokenizer]:
        yield read_tokenizer(ModelKeys(base.path, base.keys))

    def model(self, source: ModelSource) -> Model:
        """A model on the settings' device. Raises GgufMoeError where it is none that the forward pass knows."""
        return load_model(source, self.settings.device, self.dtype)

    @contextmanager
    def load(self, sources: Sequence[ModelSource], chunks: int, most: int | None) -> Iterator[Loaded]:
        settings, models = self.settings, [self.model(source) for source in sources]
        plan = plan_memory(models, chunks, settings.context, settings.memory, most)
        yield Loaded(plan.sweep, plan, lambda windows, show: sweep(models, windows, plan.group, show))
