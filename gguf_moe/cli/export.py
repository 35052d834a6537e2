"""`gguf-moe export`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from gguf_moe import report
from gguf_moe.card import check_repo, write_card
from gguf_moe.checkpoint import read_optional_json
from gguf_moe.cli.options import as_request, dry_run_notes, method_options, open_model, request_options
from gguf_moe.cli.progress import progress_bar, progress_of_method, warn
from gguf_moe.cli.reports import check_ours, write_json
from gguf_moe.cli.validate import evaluate, validation_lines
from gguf_moe.cli.verify import verify_files
from gguf_moe.duplicates import find_duplicates
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.estimate import seconds_of_encoding
from gguf_moe.evaluation.engines import Settings
from gguf_moe.evaluation.guards import check_alike
from gguf_moe.evaluation.source import open_model as open_source
from gguf_moe.evaluation.source import planned_model
from gguf_moe.evaluation.validate import read_windows
from gguf_moe.export import LADDER, Event, Finished, Found, unfinished
from gguf_moe.export import export as run_plans
from gguf_moe.filling import Progress
from gguf_moe.manifest import Manifest, recipe_values
from gguf_moe.methods import Method
from gguf_moe.plan import Plan, make_plans
from gguf_moe.recipe import find_file_type
from gguf_moe.recipe_file import RecipeFile, read_recipe

REPORT = "validation.json"  # beside the files, the last validation's


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", "directory", required=True, metavar="DIR", help="Directory; made if it is missing.")
@click.option(
    "--quant", "names", multiple=True, metavar="NAME", help=f"A level, repeatable; by default {' '.join(LADDER)}."
)
@click.option("--threads", type=click.IntRange(1, 1024), help="How many threads encode; by default one a core.")
@click.option("--force", is_flag=True, help="Replace files that no export made.")
@click.option("--dry-run", is_flag=True, help="Print the levels with sizes and costs, and write nothing.")
@click.option("--verify", is_flag=True, help="Read every file once more at the end, and check all of it.")
@click.option("--validate", "text", type=click.Path(path_type=Path), metavar="TEXT", help="Then measure what is lost.")
@click.option("--json", "as_json", is_flag=True, help="Events as JSON, one a line, for programs.")
@click.option("--quantized-by", metavar="NAME", help="Who stands in the model card as its maker.")
@click.option("--repo", metavar="ORG/NAME", help="Where the files will be published, for the card's commands.")
@request_options
@partial(method_options, ladder=True)
@click.pass_context
def export(
    context: click.Context,
    model: Path,
    directory: str,
    names: tuple[str, ...],
    threads: int | None,
    force: bool,
    dry_run: bool,
    verify: bool,
    text: Path | None,
    as_json: bool,
    quantized_by: str | None,
    repo: str | None,
    recipe: Path | None,
    method: Method,
    **asked: Any,
) -> None:
    """Write a ladder of GGUF files of MODEL from one read.

    They go into a directory, with checksums and a model card. Run again, it goes on where it stopped, and makes anew
    only what the model or the options have changed."""
    check_repo(repo)
    if not directory:  # as an unset variable is; the path of nothing would be the directory at hand
        raise UsageError("--output is empty, expected a directory")
    output = Path(directory)
    asked_recipe = read_recipe(recipe) if recipe else RecipeFile()
    request = as_request(asked_recipe, keys=method.keys(), **asked)
    levels = [find_file_type(name) for name in names] or [asked_recipe.file_type]
    if levels == [None]:
        levels = [find_file_type(name) for name in LADDER]
    plans = make_plans(open_model(model), list(dict.fromkeys(levels)), request)
    method.check(plans)
    warn(dict.fromkeys(warning for plan in plans for warning in plan.warnings))
    if dry_run:
        _print_levels(plans, output, threads, as_json, dry_run_notes(method))
        return
    if text:
        _check_validation(model, output, plans[0], text, force)
    duplicates = find_duplicates(plans)
    if method.text:  # by whose tokens an expert's codes are its own
        duplicates = dataclasses.replace(duplicates, twins={})
    try:
        open_plans = unfinished(plans, output, force=force)
        targets = [output / plan.default_name for plan in open_plans]
        with (
            progress_of_method(str(model)) as tell,
            method.prepared(open_plans, targets, tell) as made,
            progress_bar() as show_progress,
        ):
            chosen = {plan.default_name: plan for plan in made}
            for plan in unfinished(plans, output, force=force):
                if plan.default_name not in chosen:  # its codes would be ggml's, whatever its keys say
                    raise GgufMoeError(f"{output / plan.default_name}: changed while codes were chosen; run again")
            manifest = run_plans(
                [chosen.get(plan.default_name, plan) for plan in plans],
                output,
                recipe={**recipe_values(request), **({"calib": method.text.name} if method.text else {})},
                threads=threads,
                force=force,
                twins=duplicates.twins,
                on_event=_Watcher(show_progress, as_json).show,
            )
        method.forget([output / plan.default_name for plan in plans])
    except (KeyboardInterrupt, SystemExit):
        click.echo("gguf-moe: interrupted; the same command goes on from here", err=True)
        raise
    if not as_json:
        click.echo("\n".join([*duplicates.notes(), f"{_count(len(plans))} complete in {output}"]))
    try:
        if text:
            _validate(model, output, plans, manifest, text, as_json)
    finally:  # the ladder is there, however its validation ends
        found = _last_report(output, manifest)
        warn(write_card(output, plans[0], manifest, quantized_by=quantized_by, repo=repo, report=found))
    files = [file.path(output / plan.default_name) for plan in plans for file in plan.files]
    if verify and not verify_files(files, None, as_json, event="verified"):
        click.echo("gguf-moe: delete what is not good, and run again to make it anew", err=True)
        context.exit(1)


def _check_validation(model: Path, output: Path, plan: Plan, text: Path, force: bool) -> None:
    """Refuse before the ladder what its validation would refuse after it."""
    base, name = open_source(model), plan.default_name
    read_windows(base, text, Settings())
    check_alike(base, planned_model(output / name, plan.file_type.name, plan.size, plan))
    if (output / REPORT).exists() and not force:
        check_ours(output / REPORT)


def _validate(model: Path, output: Path, plans: list[Plan], manifest: Manifest, text: Path, as_json: bool) -> None:
    """Measure this run's levels; the report stands beside them, and knows by their hashes of which files it is."""
    firsts = [plan.files[0].path(output / plan.default_name) for plan in plans]
    settings = Settings(state=output / f"{REPORT}.partial")
    found = evaluate(model, firsts, text, settings)
    hashes = _hashes(manifest)
    for file in found["files"]:
        file["sha256"] = hashes[file["name"]]
    write_json(output / REPORT, found)
    settings.state.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps({"event": "validated", "report": REPORT}))
    else:
        click.echo("\n".join(validation_lines(found)))


def _hashes(manifest: Manifest) -> dict[str, str]:
    """Of each level's file, or first shard."""
    return {level.files[0].name: level.files[0].sha256 for level in manifest.levels}


def _last_report(output: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The last validation's report, without the files that are others now."""
    try:
        found = read_optional_json(output / REPORT)
    except GgufMoeError as error:
        warn([f"{error}; the card shows no figures"])
        return None
    files, hashes = found.get("files"), _hashes(manifest)
    if isinstance(files, list):
        named = [file for file in files if isinstance(file, dict)]
        found["files"] = [file for file in named if file.get("sha256") in (None, hashes.get(file.get("name")))]
    return found or None


class _Watcher:
    """Shows events: a bar on a terminal and a line for each level; or all of them as JSON."""

    def __init__(self, show_progress: Callable[[Progress], None], as_json: bool) -> None:
        self.show_progress, self.as_json, self.percent = show_progress, as_json, -1

    def show(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._advance(event)
        elif self.as_json:
            self._print_json(event)
        else:
            tqdm.write(_found_line(event) if isinstance(event, Found) else _finished_line(event))

    def _advance(self, progress: Progress) -> None:
        if not self.as_json:
            self.show_progress(progress)
        elif (percent := 100 * progress.done // progress.total) > self.percent:
            self.percent = percent
            self._print_json(progress)

    def _print_json(self, event: Event) -> None:
        click.echo(json.dumps({"event": type(event).__name__.lower(), **dataclasses.asdict(event)}))


def _count(levels: int) -> str:
    return "1 level is" if levels == 1 else f"{levels} levels are"


def _found_line(found: Found) -> str:
    if found.state == "complete":
        return f"{found.file} is complete"
    if found.state == "resumed":
        return f"{found.file} goes on at {100 * found.done // found.size} %"
    return f"{found.file} is begun anew: {found.why}"


def _finished_line(finished: Finished) -> str:
    level = finished.level
    more = len(level.files) - 1
    name = level.files[0].name + (f" and {more} more shard{'s' if more > 1 else ''}" if more else "")
    size = report.size_text(sum(file.size for file in level.files))
    return (
        f"{level.quant}: {name}, {size}, {level.bits_per_weight:.2f} bits per weight, after {level.seconds:.1f} seconds"
    )


def _print_levels(plans: list[Plan], output: Path, threads: int | None, as_json: bool, notes: list[str]) -> None:
    """The dry run: every level with its size and what it costs, and the disk that all need."""
    seconds = seconds_of_encoding(plans, threads)
    place = next(path for path in (output, *output.resolve().parents) if path.is_dir())
    needed, free = sum(plan.size for plan in plans), shutil.disk_usage(place).free
    if as_json:
        levels = [
            {
                "quant": plan.file_type.name,
                "files": [file.path(Path(plan.default_name)).name for file in plan.files],
                "size_bytes": plan.size,
                "bits_per_weight": plan.bits_per_weight,
                "seconds": cost,
            }
            for plan, cost in zip(plans, seconds)
        ]
        click.echo(json.dumps({"levels": levels, "needed_bytes": needed, "free_bytes": free}, indent=1))
        return
    rows: list[tuple[object, ...]] = [("level", "files", "bytes", "", "bits per weight", "encoding")]
    for plan, cost in zip(plans, seconds):
        size, bits = report.size_text(plan.size), f"{plan.bits_per_weight:.2f}"
        rows.append((plan.file_type.name, len(plan.files), plan.size, size, bits, f"{cost:.1f} s"))
    rows.append(
        ("all", sum(len(plan.files) for plan in plans), needed, report.size_text(needed), "", f"{sum(seconds):.1f} s")
    )
    click.echo(report.table(rows, "<>>>>>"))
    click.echo("\n".join(["encoding: about, beside what the levels above have encoded already", *notes]))
    enough = "" if needed <= free else ", too little unless an earlier run left much of it there"
    click.echo(f"would be written to {output}: {report.size_text(needed)}, free are {report.size_text(free)}{enough}")
