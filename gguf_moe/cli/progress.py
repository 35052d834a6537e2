"""Bars, lines and warnings for a person watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from tqdm import tqdm

from gguf_moe import report
from gguf_moe.evaluation.events import MemoryPlan, Notice, Started
from gguf_moe.evaluation.validate import STEPS, Event
from gguf_moe.filling import Progress
from gguf_moe.methods import Chosen, Summary
from gguf_moe.methods import Event as MethodEvent

PLAIN_STEPS = 10  # progress lines where there is no terminal


def warn(warnings: Iterable[str]) -> None:
    """A line on stderr for each warning."""
    for warning in warnings:
        click.echo(f"gguf-moe: warning: {report.one_line(warning)}", err=True)


@contextmanager
def progress_bar(*, leave: bool = True) -> Iterator[Callable[[Progress], None]]:
    """A bar for the whole work, on a terminal: bytes read, rate, time left, the tensor at hand. Elsewhere nothing.

    leave: it stays when all is done.
    """
    disable = not sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, dynamic_ncols=True, leave=leave, disable=disable) as bar:

        def advance(progress: Progress) -> None:
            if bar.total is None:  # what an earlier run did is not this one's rate
                bar.total, bar.initial, bar.n = progress.total, progress.done, progress.done
            bar.set_postfix_str(report.printable(progress.tensor), refresh=False)
            bar.update(progress.done - bar.n)

        yield advance


@contextmanager
def progress_of_text(what: str, state: Path | None) -> Iterator[Callable[[Event], None]]:
    """What a run of a text through models tells: warnings, what it takes, and on a terminal a bar. The bar comes with
    the first step, behind what is said before, and goes when all is done. what: the models; state: where an interrupted
    run has left what it did."""
    layout = "{l_bar}{bar}| {n:.1f} of {total:.0f} windows [{elapsed}<{remaining}]"
    options = {"bar_format": layout, "unit_scale": 1 / STEPS, "dynamic_ncols": True, "leave": False}
    try:
        with tqdm(**options, delay=1e-9, disable=not sys.stderr.isatty()) as bar:

            def tell(event: Event) -> None:
                if isinstance(event, Notice):
                    warn([event.text])
                elif isinstance(event, Started):
                    click.echo(_started_line(event, what), err=True)
                    bar.total = STEPS * event.chunks
                    bar.initial = bar.n = STEPS * event.done  # what an earlier run did is not this one's rate
                else:
                    bar.update(event.done - bar.n)

            yield tell
    except (KeyboardInterrupt, SystemExit):
        if state:
            behind = "; the same command goes on behind the last finished sweep"
            click.echo(f"gguf-moe: interrupted{behind if state.exists() else ' before a sweep was finished'}", err=True)
        raise


@contextmanager
def progress_of_method(what: str) -> Iterator[Callable[[MethodEvent], None]]:
    """What a method tells while it chooses codes: warnings, what it takes, on a terminal a bar over all matrices and
    elsewhere a line for every tenth, and what came of it."""
    shown = 0
    with tqdm(unit=" matrices", dynamic_ncols=True, leave=False, delay=1e-9, disable=not sys.stderr.isatty()) as bar:

        def tell(event: MethodEvent) -> None:
            nonlocal shown
            if isinstance(event, Notice):
                warn([event.text])
            elif isinstance(event, Chosen):
                bar.total = event.total
                bar.set_postfix_str(report.printable(event.matrix), refresh=False)
                bar.update(event.done - bar.n)
                if bar.n == event.total:
                    bar.clear()
                if bar.disable and (step := PLAIN_STEPS * event.done // event.total) > shown:
                    shown = step
                    tenth = 100 * step // PLAIN_STEPS
                    click.echo(f"{tenth} % of the codes chosen, at {report.printable(event.matrix)}", err=True)
            else:
                click.echo(event.text if isinstance(event, Summary) else _started_line(event, what), err=True)

        yield tell


def _started_line(event: Started, what: str) -> str:
    text = f"{what} on {event.chunks} windows of {event.context} tokens"
    text += f", {event.done} of them done already" if event.done else ""
    return f"{text}, {event.sweep} a sweep" + (_memory_text(event.memory) if event.memory else "")


def _memory_text(plan: MemoryPlan) -> str:
    size = report.size_text
    states = plan.sweep * plan.per_chunk
    return (
        f"; at most {size(plan.total)} of memory: {size(plan.held)} held already, {size(states)} hidden states, "
        f"{size(max(plan.matrices + plan.between, plan.logits))} weights and what they give"
    )


@contextmanager
def progress_lines() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line for every tenth otherwise."""
    if sys.stderr.isatty():
        with progress_bar() as show:
            yield show
        return
    shown = 0

    def line(progress: Progress) -> None:
        nonlocal shown
        if (step := PLAIN_STEPS * progress.done // progress.total) > shown:
            shown = step
            click.echo(f"{100 * step // PLAIN_STEPS} % written, at {report.printable(progress.tensor)}", err=True)

    yield line
