"""Real neighbours to compare with: llama.cpp, as the second engine of `validate` calls it, with figures of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gguf_moe.evaluation import llama_cpp
from gguf_moe.evaluation.llama_cpp import libllama


class Llama(llama_cpp.Llama):
    """A GGUF file loaded by llama.cpp, on one thread, with exact (F32) caches unless told otherwise."""

    def windows(self, text: str) -> Iterator[list[int]]:
        """The windows of llama-perplexity: the text's tokens in pieces of the context, each with BOS in front."""
        ids = self.tokenize(text.removesuffix("\n"), special=False)
        for start in range(0, len(ids) - self.context_length + 1, self.context_length):
            yield [ids[0], *ids[start + 1 : start + self.context_length]]

    def perplexity(self, text: str, chunks: int | None = None) -> float:
        """llama-perplexity's figure: the second half of each window is scored."""
        total, count, first = 0.0, 0, self.context_length // 2
        for i, window in enumerate(self.windows(text)):
            if i == chunks:
                break
            scores = self.logits(window)[first:-1].astype(np.float64)
            scores -= scores.max(axis=1, keepdims=True)
            chosen = scores[np.arange(len(scores)), window[first + 1 :]]
            total += float((np.log(np.exp(scores).sum(axis=1)) - chosen).sum())
            count += len(scores)
        return math.exp(total / count)


__all__ = ["Llama", "libllama"]
