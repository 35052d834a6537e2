"""`gguf-moe inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gguf_moe import report
from gguf_moe.cli.progress import warn
from gguf_moe.gguf_reader import read_gguf


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List the tensors too.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, for programs.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show metadata, experts, types and bits per weight of a GGUF FILE."""
    facts = report.gguf_facts(read_gguf(file))
    warn(report.name_warnings(facts))
    click.echo(json.dumps(facts, indent=1) if as_json else report.gguf_text(facts, tensors=tensors))
