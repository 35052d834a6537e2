"""Bars, lines and warnings for a person watching."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import click
from tqdm import tqdm

from gguf_moe import report
from gguf_moe.filling import Progress

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
def progress_share(unit: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal for what is done of a total, both in parts of which `unit` are one window. Elsewhere nothing.
    It comes with the first step, behind what is said before, and goes when all is done."""
    layout = "{l_bar}{bar}| {n:.1f} of {total:.0f} windows [{elapsed}<{remaining}]"
    options = {"bar_format": layout, "unit_scale": 1 / unit, "dynamic_ncols": True, "leave": False}
    with tqdm(**options, delay=1e-9, disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            if bar.total is None:
                bar.total, bar.initial, bar.n = total, done, done
            bar.update(done - bar.n)

        yield advance


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
