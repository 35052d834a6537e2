"""The command line: parse, call one function, print. Tables go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

import click

import quant
from gguf_moe import __version__, report
from gguf_moe.cli.convert import convert
from gguf_moe.cli.export import export
from gguf_moe.cli.imatrix import imatrix
from gguf_moe.cli.inspect import inspect
from gguf_moe.cli.reshard import merge, split
from gguf_moe.cli.validate import validate
from gguf_moe.cli.verify import verify
from gguf_moe.errors import GgufMoeError


class _Group(click.Group):
    """Commands whose expected errors become one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GgufMoeError as error:
            click.echo(f"gguf-moe: {report.one_line(str(error))}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a path that is too long, or that may not be looked at
            click.echo(f"gguf-moe: {report.one_line(str(error))}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message=f"gguf-moe %(version)s (codecs: {quant.backend()})")
def cli() -> None:
    """Convert merged mixtures of experts to GGUF files, with the bytes that llama.cpp would have written."""


for command in (convert, export, imatrix, inspect, merge, split, validate, verify):
    cli.add_command(command)


def main() -> None:
    """Entry point. A polite kill unwinds like Ctrl-C, so that no temporary file stays."""
    logging.basicConfig(level=logging.ERROR)  # the gguf package warns of what we have checked ourselves
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # no SIGHUP on Windows
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    cli(prog_name="gguf-moe")
