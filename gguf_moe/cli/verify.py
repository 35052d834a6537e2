"""`gguf-moe verify`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from gguf_moe import report
from gguf_moe.cli.options import as_request, open_model, request_options
from gguf_moe.cli.progress import progress_bar
from gguf_moe.errors import UsageError
from gguf_moe.origin import Origin
from gguf_moe.recipe_file import RecipeFile, read_recipe
from gguf_moe.request import Request
from gguf_moe.verify import Verdict
from gguf_moe.verify import verify as verify_file


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="MODEL", help="Prove that the files derive from it."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, for programs.")
@request_options
@click.pass_context
def verify(
    context: click.Context,
    files: tuple[Path, ...],
    against: Path | None,
    as_json: bool,
    recipe: Path | None,
    **asked: Any,
) -> None:
    """Check GGUF FILES, alone or against their MODEL.

    Checked are structure, finite weights, SHA256SUMS beside them; and that they are what a conversion of MODEL gives,
    with the other options as they were made with."""
    request = as_request(read_recipe(recipe) if recipe else RecipeFile(), **asked)
    if against is None and request != Request():
        raise UsageError("options of a conversion need --against MODEL")
    origin = Origin(open_model(against), request) if against else None
    if not verify_files(files, origin, as_json):
        context.exit(1)


def verify_files(files: Sequence[Path], origin: Origin | None, as_json: bool, **more: str) -> bool:
    """Check files and print what was found of them; whether all are good. more: stands in the JSON too."""
    verdicts = []
    for file in files:
        with progress_bar(leave=False) as show:
            verdict = verify_file(file, origin=origin, on_progress=show)
        verdicts.append(verdict)
        if not as_json:
            click.echo(report.one_line(_text(verdict)))
    good = sum(verdict.good for verdict in verdicts)
    if as_json:
        click.echo(json.dumps({**more, "files": [_facts(verdict) for verdict in verdicts], "good": good}))
    else:
        click.echo(f"{good} of {len(files)} files are good")
    return good == len(files)


def _text(verdict: Verdict) -> str:
    proven = ", ".join(verdict.proven)
    if verdict.good:
        unproven = f"; not proven: {', '.join(verdict.unproven)}" if verdict.unproven else ""
        return f"{verdict.path}: good: {proven}{unproven}"
    return f"{verdict.path}: BAD: {'; '.join(verdict.problems)}" + (f"; proven: {proven}" if proven else "")


def _facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "file": str(verdict.path),
        "good": verdict.good,
        "proven": verdict.proven,
        "unproven": verdict.unproven,
        "problems": verdict.problems,
        "sha256": verdict.sha256,
    }
