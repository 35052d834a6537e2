"""Which files are worth their size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

File = Mapping[str, Any]  # of a report: size_bytes, kld_mean and ppl_ratio are looked at


def pareto(files: Sequence[File]) -> list[File]:
    """The files for which there is no other that is smaller or as small and nearer to the base or as near."""

    def beats(a: File, b: File) -> bool:
        ours, theirs = ((file["size_bytes"], file["kld_mean"]) for file in (a, b))
        return ours != theirs and all(x <= y for x, y in zip(ours, theirs))

    return [file for file in files if not any(beats(other, file) for other in files)]


def smallest(files: Sequence[File], max_kld: float | None = None, max_ppl_ratio: float | None = None) -> File | None:
    """The smallest file that loses no more than allowed, in mean KL divergence and perplexity; None: all lose more."""
    limits = {"kld_mean": max_kld, "ppl_ratio": max_ppl_ratio}
    asked = {name: limit for name, limit in limits.items() if limit is not None}
    holding = [file for file in files if all(file[name] <= limit for name, limit in asked.items())]
    return min(holding, key=lambda file: (file["size_bytes"], file["kld_mean"]), default=None)


def by_size(report: Mapping[str, Any]) -> tuple[list[File], list[str]]:
    """A report's files, the smallest first, and what to call each: its level, or its name where several have that."""
    files = sorted(report["files"], key=lambda file: (file["size_bytes"], file["kld_mean"]))
    count = Counter(file["quant"] for file in files)
    return files, [f["quant"] if count[f["quant"]] == 1 else f["name"].removesuffix(".gguf") for f in files]
