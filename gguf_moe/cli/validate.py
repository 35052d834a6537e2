"""`gguf-moe validate`, and the validation of an export."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import click

from gguf_moe import report
from gguf_moe.cli.options import text_options
from gguf_moe.cli.progress import progress_of_text
from gguf_moe.cli.reports import check_targets, write_json
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.engines import MODULES, Settings, load
from gguf_moe.evaluation.pareto import by_size, smallest
from gguf_moe.evaluation.validate import validate as run
from gguf_moe.gguf_source import shard_path

WIDTH = 100  # characters of a line, the table's included


@click.command()
@click.argument("base", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="What to evaluate on: a UTF-8 text.")
@text_options
@click.option("--engine", default="torch", show_default=True, type=click.Choice(list(MODULES)), help="Who computes.")
@click.option("--bootstrap", default=0, type=click.IntRange(0), metavar="N", help="Intervals of KL by N resamples.")
@click.option("--max-kld", type=click.FloatRange(0), metavar="X", help="Name the smallest file of such a mean KL.")
@click.option("--max-ppl-ratio", type=click.FloatRange(0), metavar="X", help="... of such a perplexity ratio.")
@click.option("--check", is_flag=True, help="Exit with 1 when no file holds these bounds.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as a page.")
@click.option("--plots", type=click.Path(path_type=Path), metavar="DIR", help="Write its plots as PNG and SVG.")
def validate(
    base: Path,
    files: tuple[Path, ...],
    text: Path,
    max_kld: float | None,
    max_ppl_ratio: float | None,
    check: bool,
    json_path: Path | None,
    html: Path | None,
    plots: Path | None,
    **settings: Any,
) -> None:
    """Measure what GGUF FILES lost against MODEL, a checkpoint's directory or a GGUF file, on a text: perplexity, KL
    divergence, and where tokens went to other experts. Of shards the first counts."""
    bounded = max_kld is not None or max_ppl_ratio is not None
    if check and not bounded:
        raise UsageError("--check needs a bound, --max-kld or --max-ppl-ratio")
    check_targets((json_path, html), plots, settings["state"])
    draw_page = load("page", "pictures need").write_page if html else None
    draw_plots = load("plots", "pictures need").write_plots if plots else None
    found = evaluate(base, _firsts(files), text, Settings(**settings))
    try:
        if json_path:
            write_json(json_path, found)
        if html:
            draw_page(found, html)
        if plots:
            draw_plots(found, plots)
    finally:  # either may fail, by a full disk or a pipe that nobody reads, and hours of work have to be somewhere
        click.echo("\n".join(validation_lines(found)))
    if state := settings["state"]:
        state.unlink(missing_ok=True)
    if bounded:
        _choose(found, max_kld, max_ppl_ratio, check)


def evaluate(base: Path, files: list[Path], text: Path, settings: Settings) -> dict[str, Any]:
    """Run the validation under a bar, telling beforehand what it takes; the report."""
    with progress_of_text(f"{len(files)} file{'s' if len(files) > 1 else ''} and the base", settings.state) as tell:
        return run(base, files, text, settings, tell)


def _firsts(files: tuple[Path, ...]) -> list[Path]:
    """Files, each once, without the shards whose first is among them; one without its first is refused later."""
    return list(dict.fromkeys(file for file in files if (first := shard_path(file, 0)) == file or first not in files))


def validation_lines(found: dict[str, Any]) -> list[str]:
    """The table by size, the smallest first, and what its figures are."""
    rows: list[tuple[object, ...]] = [
        ("", "level", "size", "bits", "PPL", "", "ratio", "mean KL", "99% KL", "same top", "same experts")
    ]
    for file, label in zip(*by_size(found)):
        routing = file["routing"]
        rows.append(
            (
                "*" if file["name"] in found["pareto"] else "",
                report.printable(label),
                *_columns(file),
                f"{file['ppl_ratio']:.4f}",
                f"{file['kld_mean']:.6f}",
                f"{file['kld_p99']:.4f}",
                f"{file['same_top']:.2f} %",
                f"{100 * routing['same_set']:.2f} %" if routing else "-",
            )
        )
    rows.append(("", "base", *_columns(found["base"]), "", "", "", "", ""))
    text = found["text"]
    return [
        report.table(rows, "<<>>>>>>>>>"),
        f"* no other file is as small and as near to the base, {report.printable(found['base']['name'])}",
        "bits: of a weight; +-: standard error; KL: in nats a token; 99% KL: what 1 % of the tokens exceed",
        f"{report.printable(text['name'])} (SHA-256 {text['sha256'][:12]}...): {found['chunks']} windows of "
        f"{found['ctx']}, {found['scored']} of {found['tokens']} tokens scored",
        textwrap.fill(report.printable(found["note"]), WIDTH),
    ]


def _columns(model: dict[str, Any]) -> tuple[str, ...]:
    size, bits = report.size_text(model["size_bytes"]), f"{model['bits_per_weight']:.2f}"
    return size, bits, f"{model['ppl']:.4f}", f"+- {model['ppl_error']:.4f}"


def _choose(found: dict[str, Any], max_kld: float | None, max_ppl_ratio: float | None, check: bool) -> None:
    """Name the smallest file that holds the bounds; exit with 1 if there is none and that is to be checked."""
    bounds = {"a mean KL": max_kld, "a perplexity ratio": max_ppl_ratio}
    asked = " and ".join(f"{what} of at most {bound:g}" for what, bound in bounds.items() if bound is not None)
    if chosen := smallest(found["files"], max_kld, max_ppl_ratio):
        size = report.size_text(chosen["size_bytes"])
        click.echo(f"the smallest file with {asked}: {report.printable(chosen['name'])}, {size}")
    elif check:
        raise GgufMoeError(f"no file has {asked}")
    else:
        click.echo(f"no file has {asked}")
