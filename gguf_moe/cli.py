"""The command line: parse, call one function, print. Tables go to stdout, progress and warnings to stderr."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

import quant
from gguf_moe import __version__, report
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.convert import check_target
from gguf_moe.convert import convert as run_plan
from gguf_moe.duplicates import find_duplicates
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.filling import Progress
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.gguf_source import open_gguf
from gguf_moe.plan import make_plan
from gguf_moe.recipe import BITS, FileType, find_file_type
from gguf_moe.recipe_file import RecipeFile, read_recipe
from gguf_moe.request import Request
from gguf_moe.rules import merge, parse_rules

PLAIN_STEPS = 10  # progress lines where there is no terminal


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


def _request_options(command: Callable) -> Callable:
    """The options that become a `Request`, for every command that makes files."""
    options = (
        click.option("--recipe", type=click.Path(path_type=Path), help="TOML file with any of the options on types."),
        click.option(
            "--tensor-type",
            multiple=True,
            metavar="PATTERN=TYPE",
            help="Type of the tensors in whose name the regular expression is found; repeatable, the first match wins.",
        ),
        click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight."),
        click.option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight."),
        click.option("--router-type", metavar="TYPE", help="Type of the routers; F32 by default."),
        click.option("--pure", is_flag=True, help="The file type's main type for all matrices, no mix."),
        click.option("--leave-output-tensor", is_flag=True, help="Keep output.weight in the source's type."),
        click.option("--strict", is_flag=True, help="Refuse a type whose block does not divide a row, no fallback."),
        click.option(
            "--experts-used",
            type=click.IntRange(1),
            metavar="N",
            help="Experts of a token, instead of the model's.",
        ),
        click.option("--pre", metavar="NAME", help="llama.cpp's name for the splitting of words by a byte-level BPE."),
        click.option("--chat-template", metavar="FILE|none", help="A chat template in place of the model's, or none."),
        click.option("--override-kv", multiple=True, metavar="KEY=TYPE:VALUE", help="Set a key."),
        click.option("--metadata", type=click.Path(path_type=Path), help="JSON file of general.* keys."),
        click.option("--name", help="general.name, and the default file name's first part."),
        click.option("--size-label", metavar="LABEL", help="general.size_label, as 4x7B."),
        click.option(
            "--allow-requantize", is_flag=True, help="Decode and quantize anew what is quantized in a GGUF MODEL."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _as_request(
    recipe: RecipeFile,
    tensor_type: tuple[str, ...],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    router_type: str | None,
    pure: bool,
    leave_output_tensor: bool,
    strict: bool,
    **asked: Any,
) -> Request:
    rules = parse_rules(tensor_type, output_tensor_type, token_embedding_type, router_type, pure, leave_output_tensor)
    return Request(rules=merge(rules, recipe.rules), strict=strict or recipe.strict, **asked)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--bits", type=click.Choice([str(b) for b in BITS]), help="Bits a weight; short for a usual --quant.")
@click.option("--quant", "quant_name", metavar="NAME", help="A file type of llama.cpp, as Q4_K_M or BF16, in any case.")
@click.option("-o", "--output", metavar="PATH", help="File or directory; by default beside MODEL.")
@click.option("--threads", type=click.IntRange(1, 1024), help="How many threads encode; by default one a core.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--dry-run", is_flag=True, help="Print the plan, tensor by tensor, and write nothing.")
@_request_options
def convert(
    model: Path,
    bits: str | None,
    quant_name: str | None,
    output: str | None,
    threads: int | None,
    force: bool,
    dry_run: bool,
    recipe: Path | None,
    **asked: Any,
) -> None:
    """Convert MODEL to one GGUF file: the directory of a merge (config.json, tokenizer, safetensors), or a GGUF file,
    the first shard if there are several. A GGUF file keeps its tensors' types unless --bits or --quant is given."""
    if output and output.endswith("/") and not Path(output).is_dir():  # else a file of that name would be written
        raise UsageError(f"--output {output}: no such directory")
    asked_recipe = read_recipe(recipe) if recipe else RecipeFile()
    is_gguf = model.is_file() or (model.suffix == ".gguf" and not model.is_dir())
    file_type = asked_recipe.file_type
    if not (is_gguf and bits is quant_name is file_type is None):
        file_type = _asked_file_type(bits, quant_name, file_type)
    source = open_gguf(model) if is_gguf else open_checkpoint(model)
    plan = make_plan(source, file_type, _as_request(asked_recipe, **asked))
    target = Path(output) if output else (model if model.name not in ("", "..") else model.resolve()).parent
    if target.is_dir():
        target = target / plan.default_name
    if not dry_run:
        check_target(plan, target, force=force)
    for warning in plan.warnings:
        click.echo(f"gguf-moe: warning: {report.one_line(warning)}", err=True)
    duplicates = find_duplicates([plan])
    if dry_run:
        click.echo("\n".join([report.plan_text(plan), *duplicates.notes()]))
        click.echo(f"would be written to {target}")
        return
    started = time.monotonic()
    with _progress(sum(t.mapped.nbytes for t in plan.tensors)) as show:
        run_plan(plan, target, threads=threads, force=force, twins=duplicates.twins, on_progress=show)
    click.echo("\n".join([report.plan_summary(plan), *duplicates.notes()]))
    click.echo(f"{target} written in {time.monotonic() - started:.1f} seconds")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List the tensors too.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, for programs.")
def inspect(file: Path, tensors: bool, as_json: bool) -> None:
    """Show metadata, experts, types and bits per weight of a GGUF FILE."""
    facts = report.gguf_facts(read_gguf(file))
    for warning in report.name_warnings(facts):
        click.echo(f"gguf-moe: warning: {report.one_line(warning)}", err=True)
    click.echo(json.dumps(facts, indent=1) if as_json else report.gguf_text(facts, tensors=tensors))


def _asked_file_type(bits: str | None, name: str | None, recipe: FileType | None) -> FileType:
    if bits is None and name is None and recipe is not None:
        return recipe
    if (bits is None) == (name is None):
        raise UsageError("give either --bits or --quant")
    return find_file_type(name if name is not None else BITS[int(bits or 0)])


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, a line for every tenth otherwise."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True) as bar:

            def advance(progress: Progress) -> None:
                bar.set_postfix_str(report.printable(progress.tensor), refresh=False)
                bar.update(progress.done - bar.n)

            yield advance
        return
    shown = 0

    def line(progress: Progress) -> None:
        nonlocal shown
        if (step := PLAIN_STEPS * progress.done // progress.total) > shown:
            shown = step
            click.echo(f"{100 * step // PLAIN_STEPS} % written, at {report.printable(progress.tensor)}", err=True)

    yield line


def main() -> None:
    """Entry point. A polite kill unwinds like Ctrl-C, so that no temporary file stays."""
    logging.basicConfig(level=logging.ERROR)  # the gguf package warns of what we have checked ourselves
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # no SIGHUP on Windows
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    cli(prog_name="gguf-moe")
