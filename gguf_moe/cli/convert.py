"""`gguf-moe convert`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gguf_moe import report
from gguf_moe.cli.options import (
    as_request,
    dry_run_notes,
    find_target,
    is_gguf,
    method_options,
    open_model,
    output_options,
    request_options,
)
from gguf_moe.cli.progress import progress_lines, progress_of_method, warn
from gguf_moe.convert import check_target
from gguf_moe.convert import convert as run_plan
from gguf_moe.duplicates import find_duplicates
from gguf_moe.errors import UsageError
from gguf_moe.methods import Method
from gguf_moe.plan import make_plan
from gguf_moe.recipe import BITS, FileType, find_file_type
from gguf_moe.recipe_file import RecipeFile, read_recipe


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice([str(b) for b in BITS]), help="Bits a weight; short for a usual --quant.")
@click.option("--quant", "quant_name", metavar="NAME", help="A file type of llama.cpp, as Q4_K_M or BF16, in any case.")
@output_options
@click.option("--threads", type=click.IntRange(1, 1024), help="How many threads encode; by default one a core.")
@request_options
@method_options
def convert(
    model: Path,
    bits: str | None,
    quant_name: str | None,
    output: str | None,
    threads: int | None,
    force: bool,
    dry_run: bool,
    recipe: Path | None,
    method: Method,
    **asked: Any,
) -> None:
    """Convert MODEL to one GGUF file or to shards.

    MODEL is the directory of a merge (config.json, tokenizer, safetensors), or a GGUF file, the first shard if there
    are several. A GGUF file keeps its tensors' types unless --bits or --quant is given."""
    asked_recipe = read_recipe(recipe) if recipe else RecipeFile()
    file_type = asked_recipe.file_type
    if not (is_gguf(model) and bits is quant_name is file_type is None):
        file_type = _asked_file_type(bits, quant_name, file_type)
    plan = make_plan(open_model(model), file_type, as_request(asked_recipe, keys=method.keys(), **asked))
    method.check([plan])
    target = find_target(output, model, plan.default_name)
    if not dry_run:
        check_target(plan, target, force=force)
    warn(plan.warnings)
    duplicates = find_duplicates([plan])
    if method.text:  # by whose tokens an expert's codes are its own
        duplicates = replace(duplicates, twins={})
    if dry_run:
        click.echo("\n".join([report.plan_text(plan), *duplicates.notes(), *dry_run_notes(method)]))
        click.echo(f"would be written to {report.target_text(plan, target)}")
        return
    started = time.monotonic()
    with (
        progress_of_method(str(model)) as tell,
        method.prepared([plan], [target], tell) as (made,),
        progress_lines() as show,
    ):
        run_plan(made, target, threads=threads, force=force, twins=duplicates.twins, on_progress=show)
    click.echo("\n".join([report.plan_summary(plan), *duplicates.notes()]))
    click.echo(f"{report.target_text(plan, target)} written in {time.monotonic() - started:.1f} seconds")


def _asked_file_type(bits: str | None, name: str | None, recipe: FileType | None) -> FileType:
    if bits is None and name is None and recipe is not None:
        return recipe
    if (bits is None) == (name is None):
        raise UsageError("give either --bits or --quant")
    return find_file_type(name if name is not None else BITS[int(bits or 0)])
