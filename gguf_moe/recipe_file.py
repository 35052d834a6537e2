"""Recipe files: a user's choice of types in TOML, its keys named like the options of the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_moe.errors import UsageError
from gguf_moe.recipe import BITS, FileType, find_file_type
from gguf_moe.rules import Override, Rules, parse_pattern, parse_type

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS: dict[str, type] = {
    "bits": int,
    "quant": str,
    "output-tensor-type": str,
    "token-embedding-type": str,
    "router-type": str,
    "pure": bool,
    "leave-output-tensor": bool,
    "strict": bool,
    "tensor-type": list,
}
RULE_KEYS: dict[str, type] = {"pattern": str, "type": str, "layers": str}
MAX_LAYER = 1 << 16
_TOML_NAMES = {int: "an integer", str: "a string", bool: "true or false", list: "[[tensor-type]] tables"}


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe asks: a file type where it names one, rules, and whether fallbacks are refused."""

    file_type: FileType | None = None
    rules: Rules = field(default_factory=Rules)
    strict: bool = False


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe; UsageError naming the key for whatever it does not know or understand."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--recipe {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--recipe {path}: not readable as TOML: {error}") from None
    _check(content, KEYS, str(path))

    def kind(key: str) -> str | None:
        return parse_type(content[key], f"{path}: {key}") if key in content else None

    rules = Rules(
        tuple(_override(rule, f"{path}: tensor-type {i}") for i, rule in enumerate(content.get("tensor-type", []), 1)),
        kind("output-tensor-type"),
        kind("token-embedding-type"),
        kind("router-type"),
        content.get("pure", False),
        content.get("leave-output-tensor", False),
    )
    return RecipeFile(_file_type(content, path), rules, content.get("strict", False))


def _file_type(content: Mapping[str, Any], path: Path) -> FileType | None:
    if "bits" in content and "quant" in content:
        raise UsageError(f"{path}: give either bits or quant")
    if content.get("bits", 2) not in BITS:
        raise UsageError(f"{path}: bits is {content['bits']}, expected one of {', '.join(map(str, BITS))}")
    name = BITS[content["bits"]] if "bits" in content else content.get("quant")
    try:
        return None if name is None else find_file_type(name)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _check(content: Mapping[str, Any], known: Mapping[str, type], where: str) -> None:
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}, expected one of {', '.join(known)}")
        if type(value) is not known[key]:  # a bool is an int to isinstance
            raise UsageError(f"{where}: {key} is {value!r}, expected {_TOML_NAMES[known[key]]}")


def _override(rule: Any, where: str) -> Override:
    if not isinstance(rule, dict):
        raise UsageError(f"{where} is {rule!r}, expected a table with pattern and type")
    _check(rule, RULE_KEYS, where)
    for key in ("pattern", "type"):
        if key not in rule:
            raise UsageError(f"{where}: {key} is missing")
    kind, layers = parse_type(rule["type"], where), rule.get("layers")
    text = f"{rule['pattern']}={kind}" + (f" in layers {layers}" if layers is not None else "")
    numbers = None if layers is None else _layers(layers, where)
    return Override(parse_pattern(rule["pattern"], where), kind, numbers, text, f"{where}, {text}")


def _layers(text: str, where: str) -> frozenset[int]:
    """Numbers and ranges, both ends included: 0-3, 28-31."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= MAX_LAYER:
            raise UsageError(f"{where}: layers is {text!r}, expected numbers and ranges as '0-3, 28-31'")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)
