"""Options that several commands share, and what they make of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from gguf_moe.checkpoint import Checkpoint, open_checkpoint
from gguf_moe.errors import UsageError
from gguf_moe.evaluation.engines import DTYPES, KEPT_WINDOWS
from gguf_moe.gguf_source import GgufModel, open_gguf
from gguf_moe.methods import METHODS, Method, find_method
from gguf_moe.methods import Settings as MethodSettings
from gguf_moe.recipe_file import RecipeFile
from gguf_moe.request import Request
from gguf_moe.rules import merge, parse_rules
from gguf_moe.sharding import Splitting


def request_options(command: Callable) -> Callable:
    """The options that become a `Request`, for every command that makes files; those of `splitting_options` too."""
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
        click.option(
            "--imatrix",
            type=click.Path(path_type=Path),
            help="Importance matrix, GGUF or .dat, to weigh columns.",
        ),
        click.option("--name", help="general.name, and the default file name's first part."),
        click.option("--size-label", metavar="LABEL", help="general.size_label, as 4x7B."),
        click.option(
            "--allow-requantize", is_flag=True, help="Decode and quantize anew what is quantized in a GGUF MODEL."
        ),
    )
    command = splitting_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def text_options(command: Callable) -> Callable:
    """The options that become `Settings`, for every command that runs a text through models."""
    options = (
        click.option(
            "--ctx", "context", default=512, show_default=True, type=click.IntRange(8), help="Tokens of a window."
        ),
        click.option("--chunks", type=click.IntRange(1), metavar="N", help="The first N windows only."),
        click.option("--device", default="cpu", show_default=True, help="Torch's: cpu, cuda, cuda:1, mps."),
        click.option(
            "--dtype", default=DTYPES[0], show_default=True, type=click.Choice(DTYPES), help="Of the matrices."
        ),
        click.option(
            "--memory", type=Size(), metavar="N[K|M|G]", help="Bytes at most; by default most of what is free."
        ),
        click.option(
            "--resume", "state", type=click.Path(path_type=Path), metavar="FILE", help="Keep finished sweeps there."
        ),
        click.option(
            "--save-every",
            "most",
            type=click.IntRange(1),
            metavar="N",
            help=f"Windows of a sweep at most; with --resume {KEPT_WINDOWS} by default.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def method_options(command: Callable, *, ladder: bool = False) -> Callable:
    """The options that become a `Method`, which the command takes as `method`. ladder: it makes several files."""

    @click.option(
        "--method",
        "method_name",
        default=METHODS[0],
        show_default=True,
        type=click.Choice(METHODS),
        help="How codes are chosen: as ggml does, or with error feedback on a text.",
    )
    @click.option("--calib", type=click.Path(path_type=Path), metavar="TEXT", help="What gptq calibrates on.")
    @click.option(
        "--calib-chunks", type=click.IntRange(1, 2**32 - 1), metavar="N", help="The first N windows of it only."
    )
    @click.option(
        "--calib-original/--calib-quantized",
        default=None,
        help="Calibrate on layers as they were, once for all files of an export, where it is the default; or as they "
        "are quantized by then, the default of convert.",
    )
    @click.option("--damping", type=float, metavar="X", help="Of gptq: above 0, to 1; 0.01 by default.")
    @click.option("--device", help="Torch's, for gptq: cpu, cuda, cuda:1.")
    @click.option("--memory", type=Size(), metavar="N[K|M|G]", help="Bytes that gptq may take; most of what is free.")
    @wraps(command)
    def with_method(
        method_name: str,
        calib: Path | None,
        calib_chunks: int | None,
        calib_original: bool | None,
        damping: float | None,
        device: str | None,
        memory: int | None,
        **others: Any,
    ) -> Any:
        asked = {"damping": damping, "device": device}
        given = {key: value for key, value in asked.items() if value is not None}
        settings = MethodSettings(calib, calib_chunks, ladder, calib_original, memory=memory, **given)
        return command(method=find_method(method_name, settings), **others)

    return with_method


def dry_run_notes(method: Method) -> list[str]:
    """What a dry run has to say of a method's own work, a line."""
    note = f"codes would be chosen on {method.text} before, which takes far longer, and room for them twice"
    return [note] if method.text else []


class Size(click.ParamType):
    """Bytes, in decimal units as llama.cpp's tools take them."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([1-9][0-9]{0,17})([KMG]?)", value, re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size, expected bytes or a number with K, M or G, as 4G", param, ctx)
        return int(match[1]) * 1000 ** " KMG".index(match[2].upper() or " ")


def splitting_options(command: Callable) -> Callable:
    """The options that become a `Splitting`, which the command takes as `splitting`; None where none is given."""

    @click.option("--split-max-size", type=Size(), metavar="N[K|M|G]", help="Shards of at most as many bytes of data.")
    @click.option("--split-max-tensors", type=click.IntRange(1), metavar="N", help="Shards of at most N tensors.")
    @click.option("--no-tensor-first-split", is_flag=True, help="A first shard with the metadata alone.")
    @wraps(command)
    def with_splitting(
        split_max_size: int | None, split_max_tensors: int | None, no_tensor_first_split: bool, **others: Any
    ) -> Any:
        asked = split_max_size or split_max_tensors or no_tensor_first_split
        splitting = Splitting(split_max_size, split_max_tensors, not no_tensor_first_split) if asked else None
        return command(splitting=splitting, **others)

    return with_splitting


def output_options(command: Callable) -> Callable:
    """Where to write, for every command that makes one model."""
    options = (
        click.option("-o", "--output", metavar="PATH", help="File or directory; by default beside the input."),
        click.option("--force", is_flag=True, help="Replace an existing file."),
        click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def find_target(output: str | None, source: Path, default_name: str) -> Path:
    """What --output means: a file, or a directory for the default name; without it beside the source. Shards are called
    after it."""
    if output and output.endswith("/") and not Path(output).is_dir():  # else a file of that name would be written
        raise UsageError(f"--output {output}: no such directory")
    target = Path(output) if output else (source if source.name not in ("", "..") else source.resolve()).parent
    return target / default_name if target.is_dir() else target


def as_request(
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


def is_gguf(model: Path) -> bool:
    """Whether MODEL means a GGUF file, else the directory of a checkpoint."""
    return model.is_file() or (model.suffix == ".gguf" and not model.is_dir())


def open_model(model: Path) -> Checkpoint | GgufModel:
    """The checkpoint in a directory, or the model in a GGUF file."""
    return open_gguf(model) if is_gguf(model) else open_checkpoint(model)
