"""Options that several commands share, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gguf_moe.checkpoint import Checkpoint, open_checkpoint
from gguf_moe.gguf_source import GgufModel, open_gguf
from gguf_moe.recipe_file import RecipeFile
from gguf_moe.request import Request
from gguf_moe.rules import merge, parse_rules


def request_options(command: Callable) -> Callable:
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
