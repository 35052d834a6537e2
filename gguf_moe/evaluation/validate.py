"""Validation: a base and its quantized files through a text, sweep by sweep, to a report of what each has lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf_moe.evaluation.engines import Engine, Loaded, Settings, open_engine
from gguf_moe.evaluation.events import Notice, Progress, Routed, Scored, Started
from gguf_moe.evaluation.figures import Scores
from gguf_moe.evaluation.guards import calibration_warnings, check_alike, context_warnings
from gguf_moe.evaluation.results import make_report
from gguf_moe.evaluation.routing import ExpertLoad, RoutingScores
from gguf_moe.evaluation.source import ModelSource, open_model
from gguf_moe.evaluation.state import Kept, Measured, State, check_unchanged, identity, read_state, write_state
from gguf_moe.evaluation.text import EvaluationText, read_text
from gguf_moe.gguf_keys import ModelKeys, expert_count

STEPS = 100  # of progress, a chunk
Event = Started | Progress | Notice


def read_windows(base: ModelSource, text: Path, settings: Settings) -> tuple[Engine, EvaluationText]:
    """The engine and the text in the base's tokens. Raises UsageError where the engine is not there, and as
    `read_text` does."""
    engine = open_engine(settings)
    with engine.tokenizer(base) as tokenizer:
        return engine, read_text(text, tokenizer, context=settings.context, chunks=settings.chunks, skip=settings.skip)


def take_up(state: Kept, settings: Settings, on_event: Callable[[Event], None]) -> None:
    """Go on from what an earlier run has kept; where that was of something else, say so and begin anew."""
    if settings.state and (different := read_state(settings.state, state)):
        on_event(Notice(f"{settings.state}: begun anew, the earlier run had another {different}"))


def sweeps(
    state: Kept,
    sources: Sequence[ModelSource],
    total: int,
    size: int,
    settings: Settings,
    on_event: Callable[[Event], None],
) -> Iterator[tuple[slice, Callable[[Progress], None]]]:
    """The sweeps of `size` that are left of `total` windows: which windows, and whom to tell how far each sweep is.

    Behind each the files are looked at for changes, and what is known by then is kept.
    """
    for start in range(state.done, total, size):
        part = slice(start, min(start + size, total))
        steps = STEPS * (part.stop - part.start)

        def show(progress: Progress, before: int = STEPS * start, steps: int = steps) -> None:
            on_event(Progress(before + steps * progress.done // progress.total, STEPS * total))

        yield part, show
        check_unchanged(state, sources)
        if settings.state:
            write_state(settings.state, state)


def validate(
    base: Path,
    files: Sequence[Path],
    text: Path,
    settings: Settings,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """The report of what `files` lost against `base`, a checkpoint or a GGUF file, on a text.

    With `settings.state` finished sweeps are kept there, and a further call goes on behind them; whoever has the report
    removes the file. Raises UsageError for settings that cannot be had, GgufMoeError for files that are not the base's,
    or not whole, and for a text that is too short.
    """
    sources = [open_model(path) for path in (base, *files)]
    for source in sources[1:]:
        check_alike(sources[0], source)
    engine, read = read_windows(sources[0], text, settings)
    warnings = [*sources[0].warnings, *context_warnings(sources[0], settings.context)]
    warnings += calibration_warnings(sources, read)
    for warning in warnings:
        on_event(Notice(warning))
    state = State(identity(sources, read, settings), [Measured(Scores(str(source.path))) for source in sources])
    take_up(state, settings, on_event)
    if state.done < len(read.windows):
        with engine.load(sources, len(read.windows) - state.done, state.sweep or settings.sweep) as loaded:
            on_event(Started(*read.windows.shape, state.done, loaded.chunks, loaded.memory))
            _run(loaded, sources, read, state, settings, on_event)
    return make_report(sources, state.models, read, settings, engine.NOTE, warnings)


def _run(
    loaded: Loaded,
    sources: Sequence[ModelSource],
    text: EvaluationText,
    state: State,
    settings: Settings,
    on_event: Callable[[Event], None],
) -> None:
    """Run what is left, a sweep at a time."""
    experts, total = expert_count(ModelKeys(sources[0].path, sources[0].keys)), len(text.windows)
    state.sweep = state.sweep or loaded.chunks
    for part, show in sweeps(state, sources, total, loaded.chunks, settings, on_event):
        for event in loaded.sweep(text.windows[part], show):
            _note(event, state.models[event.model], text.first, experts)


def _note(event: Routed | Scored, model: Measured, first: int, experts: int) -> None:
    """Take an event into what is known of its model."""
    if isinstance(event, Scored):
        model.scores.add(event.base, event.logits, event.targets)
        return
    model.routing = model.routing or RoutingScores(ExpertLoad(experts))
    ours, theirs = event.routing, event.base
    for arrays in zip(theirs.experts, theirs.weights, ours.experts, ours.weights):  # a chunk each
        model.routing.add(event.layer, *(array[first:-1] for array in arrays))
