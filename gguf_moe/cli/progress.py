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


class Bar:
    """A bar for the whole work, on a terminal: bytes read, rate, time left, the tensor at hand. Elsewhere nothing."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, progress: Progress) -> None:
        """Advance to `progress`; the bar begins where the first one is, so that the rate is this run's."""
        if self.bar is None:
            quiet = not sys.stderr.isatty()
            self.bar = tqdm(
                total=progress.total,
                initial=progress.done,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                disable=quiet,
            )
        self.bar.set_postfix_str(report.printable(progress.tensor), refresh=False)
        self.bar.update(progress.done - self.bar.n)


@contextmanager
def progress_lines() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line for every tenth otherwise."""
    if sys.stderr.isatty():
        with Bar() as bar:
            yield bar.show
        return
    shown = 0

    def line(progress: Progress) -> None:
        nonlocal shown
        if (step := PLAIN_STEPS * progress.done // progress.total) > shown:
            shown = step
            click.echo(f"{100 * step // PLAIN_STEPS} % written, at {report.printable(progress.tensor)}", err=True)

    yield line
