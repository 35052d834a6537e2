"""`gguf-moe split` and `gguf-moe merge`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from gguf_moe import report
from gguf_moe.cli.options import find_target, output_options, splitting_options
from gguf_moe.cli.progress import progress_lines
from gguf_moe.errors import UsageError
from gguf_moe.plan import Plan
from gguf_moe.resharding import plan_merge, plan_split, reshard
from gguf_moe.sharding import Splitting


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@splitting_options
@output_options
def split(file: Path, splitting: Splitting | None, output: str | None, force: bool, dry_run: bool) -> None:
    """Cut a GGUF FILE into shards.

    llama.cpp loads them by the first; what they hold is not changed. FILE may be the first of shards too, which are cut
    anew."""
    if splitting is None:
        raise UsageError("give --split-max-size, --split-max-tensors or --no-tensor-first-split")
    _run(plan_split(file, splitting), file, output, force, dry_run)


@click.command()
@click.argument("file", metavar="FIRST_SHARD", type=click.Path(path_type=Path))
@output_options
def merge(file: Path, output: str | None, force: bool, dry_run: bool) -> None:
    """Make one GGUF file of shards.

    FIRST_SHARD is the first of them; the others are found beside it."""
    _run(plan_merge(file), file, output, force, dry_run)


def _run(plan: Plan, file: Path, output: str | None, force: bool, dry_run: bool) -> None:
    target = find_target(output, file, plan.default_name)
    if dry_run:
        click.echo(report.plan_text(plan, tensors=False))
        click.echo(f"would be written to {report.target_text(plan, target)}")
        return
    started = time.monotonic()
    with progress_lines() as show:
        reshard(plan, target, force=force, on_progress=show)
    click.echo(report.plan_text(plan, tensors=False))
    click.echo(f"{report.target_text(plan, target)} written in {time.monotonic() - started:.1f} seconds")
