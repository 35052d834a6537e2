"""`gguf-moe validate`, and the validation of an export."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click

from gguf_moe import report
from gguf_moe.cli.options import Size
from gguf_moe.cli.progress import progress_share, warn
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.engines import DTYPES, MODULES, Settings
from gguf_moe.evaluation.events import MemoryPlan, Notice, Started
from gguf_moe.evaluation.pareto import by_size, smallest
from gguf_moe.evaluation.validate import STEPS, Event
from gguf_moe.evaluation.validate import validate as run
from gguf_moe.gguf_file import write_whole
from gguf_moe.gguf_source import shard_path

_MARKS, _START = (b' },\n "engine": "', b"<title>What quantizing "), 1 << 10  # a report has one in its first bytes
WIDTH = 100  # characters of a line, the table's included


@click.command()
@click.argument("base", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="What to evaluate on: a UTF-8 text.")
@click.option("--ctx", "context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window.")
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="The first N windows only.")
@click.option("--engine", default="torch", show_default=True, type=click.Choice(list(MODULES)), help="Who computes.")
@click.option("--device", default="cpu", show_default=True, help="Torch's: cpu, cuda, cuda:1, mps.")
@click.option("--dtype", default=DTYPES[0], show_default=True, type=click.Choice(DTYPES), help="Of the matrices.")
@click.option("--memory", type=Size(), metavar="N[K|M|G]", help="Bytes at most; by default most of what is free.")
@click.option("--bootstrap", default=0, type=click.IntRange(0), metavar="N", help="Intervals of KL by N resamples.")
@click.option("--max-kld", type=click.FloatRange(0), metavar="X", help="Name the smallest file of such a mean KL.")
@click.option("--max-ppl-ratio", type=click.FloatRange(0), metavar="X", help="... of such a perplexity ratio.")
@click.option("--check", is_flag=True, help="Exit with 1 when no file holds these bounds.")
@click.option("--resume", "state", type=click.Path(path_type=Path), metavar="FILE", help="Keep finished sweeps there.")
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
    _check_targets(json_path, html, plots, settings["state"])
    draw = _plotting(html, plots)
    found = evaluate(base, _firsts(files), text, Settings(**settings))
    try:
        if json_path:
            write_json(json_path, found)
        draw(found)
    finally:  # either may fail, by a full disk or a pipe that nobody reads, and hours of work have to be somewhere
        click.echo("\n".join(validation_lines(found)))
    if state := settings["state"]:
        state.unlink(missing_ok=True)
    if bounded:
        _choose(found, max_kld, max_ppl_ratio, check)


def _check_targets(json_path: Path | None, html: Path | None, plots: Path | None, state: Path | None) -> None:
    """Refuse before the work what cannot be written after it, and to replace what no validation wrote."""
    targets = [path for path in (json_path, html, plots, state) if path]
    if len({path.resolve() for path in targets}) < len(targets):
        raise UsageError("--json, --html, --plots and --resume have one path for two of them")
    for path in targets:
        if path.exists() and path.is_dir() != (path == plots):
            raise GgufMoeError(f"{path}: is {'no' if path == plots else 'a'} directory")
        try:
            TemporaryFile(dir=path if path.is_dir() else path.absolute().parent).close()
        except OSError as error:
            raise GgufMoeError(f"{path}: cannot be written: {error.strerror}") from None
    for path in (json_path, html):
        if path and path.exists():
            check_ours(path)


def check_ours(path: Path) -> None:
    """Refuse to replace a file that is no report: an option without its value takes the next word, a model's name."""
    if not path.is_file():
        raise GgufMoeError(f"{path}: is no regular file")
    with path.open("rb") as file:
        start = file.read(_START)
    if start and not any(mark in start for mark in _MARKS):
        raise GgufMoeError(f"{path}: exists and is no report of a validation; remove it, or give another name")


def evaluate(base: Path, files: list[Path], text: Path, settings: Settings) -> dict[str, Any]:
    """Run the validation under a bar, telling beforehand what it takes; the report."""
    try:
        with progress_share(STEPS) as show:

            def tell(event: Event) -> None:
                if isinstance(event, Notice):
                    warn([event.text])
                elif isinstance(event, Started):
                    click.echo(_started_line(event, len(files)), err=True)
                else:
                    show(event.done, event.total)

            return run(base, files, text, settings, tell)
    except (KeyboardInterrupt, SystemExit):
        if settings.state:
            behind = "; the same command goes on behind the last finished sweep"
            when = behind if settings.state.exists() else " before a sweep was finished"
            click.echo(f"gguf-moe: interrupted{when}", err=True)
        raise


def write_json(path: Path, found: dict[str, Any]) -> None:
    """The report as a file."""
    write_whole(path, f"{json.dumps(found, indent=1, allow_nan=False)}\n".encode())


def _plotting(html: Path | None, plots: Path | None) -> Callable[[dict[str, Any]], None]:
    """What writes page and plots; UsageError where what it needs is not installed."""
    if not (html or plots):
        return lambda found: None
    try:
        from gguf_moe.evaluation.page import write_page
        from gguf_moe.evaluation.plots import write_plots
    except ModuleNotFoundError as error:
        raise UsageError(f"--html and --plots need {error.name}: pip install 'gguf-moe[eval]'") from None

    def draw(found: dict[str, Any]) -> None:
        if html:
            write_page(found, html)
        if plots:
            write_plots(found, plots)

    return draw


def _firsts(files: tuple[Path, ...]) -> list[Path]:
    """Files, each once, without the shards whose first is among them; one without its first is refused later."""
    return list(dict.fromkeys(file for file in files if (first := shard_path(file, 0)) == file or first not in files))


def _started_line(event: Started, files: int) -> str:
    text = f"{files} file{'s' if files > 1 else ''} and the base on {event.chunks} windows of {event.context} tokens"
    text += f", {event.done} of them done already" if event.done else ""
    return f"{text}, {event.sweep} a sweep" + (_memory_text(event.memory) if event.memory else "")


def _memory_text(plan: MemoryPlan) -> str:
    size = report.size_text
    states = plan.sweep * plan.per_chunk
    return (
        f"; at most {size(plan.total)} of memory: {size(plan.held)} held already, {size(states)} hidden states, "
        f"{size(max(plan.matrices + plan.between, plan.logits))} weights and logits"
    )


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
