"""`gguf-moe imatrix`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from gguf_moe import report
from gguf_moe.cli.options import text_options
from gguf_moe.cli.progress import progress_of_text, warn
from gguf_moe.cli.reports import check_targets, write_json
from gguf_moe.convert import check_output
from gguf_moe.coverage import (
    MIN_TOKENS,
    REMEDIES,
    ExpertCoverage,
    cold_experts,
    coverage,
    coverage_report,
    replace_cold,
)
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.engines import WEIGHINGS, Settings, load
from gguf_moe.imatrix import Imatrix, read_imatrix
from gguf_moe.imatrix_file import STATS, merge, statistics, write_gguf, write_legacy

_WRITERS: dict[str, Callable[[Path, Imatrix], None]] = {"gguf": write_gguf, "dat": write_legacy}
_SHOWN = ("sum_sq", "mean", "std_deviation", "h_norm")  # of STATS


@click.command()
@click.argument("inputs", metavar="MODEL|FILES...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="What to calibrate on: a UTF-8 text.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="The matrix to write.")
@click.option("--merge", "merging", is_flag=True, help="Add up matrices, FILES, of one model.")
@click.option("--show", is_flag=True, help="Print what a matrix, FILE, holds.")
@click.option("--format", "form", default="gguf", show_default=True, type=click.Choice(list(_WRITERS)), help="Of FILE.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--process-output", is_flag=True, help="Collect for the output matrix too.")
@click.option(
    "--from-chunk", "skip", default=0, type=click.IntRange(0), metavar="N", help="Leave out N windows before."
)
@click.option("--all-experts", is_flag=True, help="Show every token to every expert; what the model computes stays.")
@click.option(
    "--weigh",
    type=click.Choice(WEIGHINGS),
    help=f"With --all-experts, what a token weighs: its probability of that expert, or 1.  [default: {WEIGHINGS[0]}]",
)
@click.option(
    "--min-tokens",
    default=MIN_TOKENS,
    show_default=True,
    type=click.IntRange(0),
    metavar="N",
    help="An expert that saw fewer is cold.",
)
@click.option("--cold-experts", "remedy", type=click.Choice(REMEDIES), help="What stands in for a cold expert's data.")
@click.option("--base-imatrix", type=click.Path(path_type=Path), metavar="FILE", help="For --cold-experts=base.")
@text_options
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the coverage as JSON."
)
@click.option("--plots", type=click.Path(path_type=Path), metavar="DIR", help="Draw the coverage as PNG and SVG.")
def imatrix(
    inputs: tuple[Path, ...],
    text: Path | None,
    output: Path | None,
    merging: bool,
    show: bool,
    form: str,
    force: bool,
    min_tokens: int,
    remedy: str | None,
    base_imatrix: Path | None,
    json_path: Path | None,
    plots: Path | None,
    **collecting: Any,
) -> None:
    """Make an importance matrix of MODEL, a checkpoint's directory or a GGUF file, from a text; or add up or show
    matrices that exist. Says how much of the text each expert saw."""
    _check_call(inputs, text, output, merging, show, remedy, base_imatrix, collecting)
    check_targets([json_path], plots, output, collecting["state"])
    if output:
        check_output(output, [path for path in (*inputs, text, base_imatrix) if path and path.is_file()], force=force)
    base = read_imatrix(base_imatrix) if base_imatrix else None
    draw = load("plots", "pictures need").write_coverage if plots else None
    if text:
        found = _collect(inputs[0], text, **collecting)
    else:
        found = merge([read_imatrix(path) for path in inputs]) if merging else read_imatrix(inputs[0])
    if remedy:
        found = _remedied(found, min_tokens, remedy, base, output if text else None)
    rows = coverage(found)
    if show:
        click.echo("\n".join(_description(inputs[0], found)))
    if rows:
        click.echo(_coverage_table(rows, min_tokens))
    told = coverage_report(found, rows, min_tokens)
    if json_path:
        write_json(json_path, told)
    if draw:
        draw(told, plots)
    if output:
        _WRITERS[form](output, found)
        click.echo(f"{output} written: {len(found.entries)} tensors, {_texts(found)}")
        if state := collecting["state"]:
            state.unlink(missing_ok=True)
    if not remedy:
        warn(_cold_warnings(rows, min_tokens))


def _check_call(
    inputs: tuple[Path, ...],
    text: Path | None,
    output: Path | None,
    merging: bool,
    show: bool,
    remedy: str | None,
    base_imatrix: Path | None,
    collecting: dict[str, Any],
) -> None:
    """Refuse options that do not go together."""
    if merging + show + bool(text) != 1:
        raise UsageError("give one of --text, --merge and --show")
    if len(inputs) > 1 and not merging:
        raise UsageError(f"{len(inputs)} inputs, expected one; to add up matrices give --merge")
    if bool(output) == show:
        raise UsageError("--show writes no matrix, leave out --output" if show else "--output is missing")
    if (remedy == "base") != bool(base_imatrix):
        raise UsageError("--cold-experts=base and --base-imatrix need each other")
    if show and remedy:
        raise UsageError("--cold-experts changes a matrix, --show does not; give --merge FILE -o OTHER to change one")
    if collecting["weigh"] and not collecting["all_experts"]:
        raise UsageError("--weigh is for --all-experts")


def _collect(
    model: Path, text: Path, *, all_experts: bool, weigh: str | None, process_output: bool, **asked: Any
) -> Imatrix:
    settings, weighing = Settings(**asked), (weigh or WEIGHINGS[0]) if all_experts else None
    calibrate = load("calibrate", "calibration needs").calibrate
    with progress_of_text(str(model), settings.state) as tell:
        return calibrate(model, text, settings, weighing=weighing, process_output=process_output, on_event=tell)


def _remedied(found: Imatrix, min_tokens: int, remedy: str, base: Imatrix | None, collected: Path | None) -> Imatrix:
    """The matrix with its cold experts' data replaced, of which it tells. Where that cannot be, what was `collected`
    for a file is kept beside it."""
    try:
        replaced = replace_cold(found, min_tokens, remedy, base)
    except GgufMoeError as error:
        if collected is None:
            raise
        kept = collected.with_name(f"{collected.name}.collected")
        write_gguf(kept, found)
        raise GgufMoeError(
            f"{error}; what was collected is in {kept}, to be taken from there with --merge and another remedy"
        ) from None
    for note in replaced.notes[len(found.notes) :]:
        click.echo(note, err=True)
    return replaced


def _texts(found: Imatrix) -> str:
    names = ", ".join(map(report.printable, found.datasets)) or "no text is named"
    size = f" of {found.chunk_size} tokens" if found.chunk_size else ""
    return f"{names}, {found.chunks} windows{size}"


def _description(path: Path, found: Imatrix) -> list[str]:
    """Where a matrix is from, and the statistics of each tensor's inputs."""
    rows: list[tuple[object, ...]] = [("tensor", "experts", "columns", "tokens", *_SHOWN)]
    for name, entry in found.entries.items():
        values = dict(zip(STATS, statistics(found, name).tolist()))
        numbers = (f"{values[key]:.4g}" for key in _SHOWN)
        rows.append((report.printable(name), *entry.squares.shape, int(entry.counts.sum()), *numbers))
    return [
        f"{path}: {len(found.entries)} tensors, {_texts(found)}",
        *(f"text with SHA-256 {digest}" for digest in map(report.printable, found.texts)),
        *map(report.printable, found.notes),
        "",
        report.table(rows, "<>>>>>>>"),
        "",
    ]


def _coverage_table(rows: list[ExpertCoverage], min_tokens: int) -> str:
    lines: list[tuple[object, ...]] = [("layer", "expert", "tokens", "share", "channels", "inner channels", "")]
    for row in rows:
        numbers = f"{100 * row.share:.1f} %", f"{row.channels:.1f}", f"{row.inner_channels:.1f}"
        lines.append((row.layer, row.expert, row.tokens, *numbers, "cold" if row.tokens < min_tokens else ""))
    return report.table(lines, ">>>>>><")


def _cold_warnings(rows: Iterable[ExpertCoverage], min_tokens: int) -> list[str]:
    """A line for each layer that has cold experts, and one on what can be done."""
    lines = []
    for layer, cold in groupby(cold_experts(list(rows), min_tokens), key=lambda row: row.layer):
        names = ", ".join(f"{row.expert} ({row.tokens})" for row in cold)
        lines.append(f"layer {layer}: fewer than {min_tokens} tokens reached expert {names}")
    remedy = "--all-experts shows them all tokens; a longer text, or one of their kind, may reach them; --cold-experts"
    return [*lines, f"{remedy}=ones, mean or base has something stand in for their data"] if lines else []
