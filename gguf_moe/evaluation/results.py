"""The report of a validation, as JSON values under fixed names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gguf_moe import __version__
from gguf_moe.evaluation.engines import Settings
from gguf_moe.evaluation.figures import figures, intervals, kld_histogram
from gguf_moe.evaluation.pareto import pareto
from gguf_moe.evaluation.routing import routing_figures
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.state import Measured
from gguf_moe.evaluation.text import EvaluationText


def make_report(
    sources: Sequence[ModelSource],
    models: Sequence[Measured],
    text: EvaluationText,
    settings: Settings,
    note: str,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What `validate --json` gives; base and models in the order of the sources.

    tokens: those that were evaluated; scored: positions that the figures are of, from the middle of each window on.
    """
    chunks, context = text.windows.shape
    count = Counter(source.name for source in sources[1:])
    files = [{**_facts(s), **_measures(m, settings)} for s, m in zip(sources[1:], models[1:])]
    for file, source in zip(files, sources[1:]):  # those of one name, in several directories, by their paths
        file["name"] = source.name if count[source.name] == 1 else str(source.path)
    best = [file["name"] for file in pareto(files)]
    return {
        "program": {"name": "gguf-moe", "version": __version__},
        "engine": settings.engine,
        "device": settings.device,
        "dtype": settings.dtype,
        "note": note,
        "warnings": list(warnings),
        "base": {**_facts(sources[0]), **_base_measures(models[0])},
        "text": {"name": text.name, "sha256": text.sha256},
        "ctx": context,
        "chunks": chunks,
        "tokens": chunks * context,
        "scored": len(models[0].scores.positions),
        "pareto": best,
        "files": files,
    }


def _facts(source: ModelSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "quant": source.quant,
        "size_bytes": source.size_bytes,
        "bits_per_weight": source.bits_per_weight,
    }


def _base_measures(model: Measured) -> dict[str, Any]:
    found = figures(model.scores)
    load = model.routing.load.figures() if model.routing else None
    return {"ppl": found["ppl"], "ppl_error": found["ppl_error"], "load": load}


def _measures(model: Measured, settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {**figures(model.scores), "kld_histogram": kld_histogram(model.scores)}
    if settings.bootstrap:
        found["intervals"] = intervals(model.scores, settings.bootstrap)
    routing = model.routing and routing_figures(model.routing, model.scores.positions["kld"])
    return {**found, "routing": routing}
