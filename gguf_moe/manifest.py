"""manifest.json: what an export records beside its files, for programs and for its own next run.

People edit such files. So each field is checked when it is read back, and what nobody here wrote is passed over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np

import quant
from gguf_moe import __version__
from gguf_moe.checkpoint import read_json
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import write_whole
from gguf_moe.request import Request

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DROPPED = ("text", "origin")  # of a rule: the same once more, and where on the user's disk it was written


@dataclass(frozen=True)
class ExportedFile:
    """One file on disk: a level, or a shard of one."""

    name: str  # without a directory
    size: int  # bytes
    sha256: str
    fingerprint: str  # of what it was made from
    mtime_ns: int


@dataclass(frozen=True)
class Level:
    """One rung of the ladder."""

    quant: str
    files: tuple[ExportedFile, ...]
    bits_per_weight: float  # all tensor data over all weights
    types: dict[str, int]  # number of tensors of each
    source: str  # name of the checkpoint's directory or of the GGUF file, no path
    recipe: dict[str, Any]  # what the user asked, JSON values as of `recipe_values`
    seconds: float | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def program_versions() -> dict[str, str]:
    """What bytes and times depend on: versions of gguf-moe and its neighbours, and the codecs that run."""
    return {
        "name": "gguf-moe",
        "version": __version__,
        "codecs": quant.backend(),
        "numpy": np.__version__,
        "gguf": version("gguf"),
        "python": platform.python_version(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Manifest:
    """Everything that manifest.json holds."""

    levels: tuple[Level, ...]
    program: dict[str, str] = field(default_factory=program_versions)
    created: str = field(default_factory=_now)  # UTC, ISO 8601


def recipe_values(request: Request) -> dict[str, Any]:
    """What a user asks, as JSON values, without what is at its default. Of a file of theirs the name only."""
    values = _json_values(request)
    if "chat_template" in values:
        values["chat_template"] = PurePath(values["chat_template"]).name
    return values


def _json_values(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        stated = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in _DROPPED}
        defaults = {f.name: _default(f) for f in dataclasses.fields(value)}
        return {name: _json_values(v) for name, v in stated.items() if v != defaults[name]}
    if isinstance(value, dict):  # keys
        return {key: item.value for key, item in value.items()}
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, frozenset):
        return sorted(value)
    return [_json_values(element) for element in value] if isinstance(value, tuple) else value


def _default(field_: dataclasses.Field) -> Any:
    factory = field_.default_factory
    return field_.default if factory is dataclasses.MISSING else factory()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the directory's manifest.json, whole or not at all. Raises GgufMoeError when that cannot be."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False)
    write_whole(directory / MANIFEST, f"{text}\n".encode())


def read_manifest(directory: Path) -> Manifest | None:
    """The directory's manifest.json, None when there is none.

    Raises GgufMoeError that names the field when one is missing or is not what it must be: who can do without then
    trusts nothing of it.
    """
    path = directory / MANIFEST
    if not os.path.lexists(path):
        return None
    fields = _Fields(f"{path}:", read_json(path))
    levels = tuple(_level(each) for each in fields.objects("levels"))
    names = [file.name for level in levels for file in level.files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise GgufMoeError(f"{path}: lists {min(twice)} twice, expected each file once")
    return Manifest(levels, fields.mapping("program", str), fields.text("created"))


def _level(fields: _Fields) -> Level:
    number = fields.take("seconds", (int, float, type(None)), "a number or null", lambda n: n is None or _measure(n))
    files = tuple(_file(each) for each in fields.objects("files"))
    if not files:
        fields.fail("files", "at least one")
    bits = fields.take("bits_per_weight", (int, float), "a number", _measure)
    recipe = fields.take("recipe", (dict,), "an object")
    return Level(fields.text("quant"), files, bits, fields.mapping("types", int), fields.text("source"), recipe, number)


def _file(fields: _Fields) -> ExportedFile:
    return ExportedFile(
        fields.take("name", (str,), "the name of a .gguf file, no path", _is_file_name),
        fields.take("size", (int,), "bytes", lambda n: n >= 0),
        fields.take("sha256", (str,), "64 hexadecimal digits", _SHA256.fullmatch),
        fields.text("fingerprint"),
        fields.take("mtime_ns", (int,), "nanoseconds"),
    )


def _measure(number: float) -> bool:
    return math.isfinite(number) and number >= 0


def _is_file_name(name: str) -> bool:
    return name == PureWindowsPath(name).name and name.endswith(".gguf") and name.isprintable()


@dataclass(frozen=True)
class _Fields:
    """An object of the file with checked access; errors name file and field. where: "FILE:" or "FILE: levels[0]"."""

    where: str
    values: dict[str, Any]

    def take(self, key: str, kinds: tuple[type, ...], expected: str, fits: Callable[[Any], Any] | None = None) -> Any:
        value = self.values.get(key, ...)
        if type(value) not in kinds or (fits and not fits(value)):  # a bool is an int to isinstance
            self.fail(key, expected)
        return value

    def fail(self, key: str, expected: str) -> NoReturn:
        found = f"is {self.values[key]!r:.80}" if key in self.values else "is missing"
        raise GgufMoeError(f"{self._at(key)} {found}, expected {expected}")

    def text(self, key: str) -> str:
        return self.take(key, (str,), "text")

    def mapping(self, key: str, kind: type) -> dict[str, Any]:
        expected = f"an object of {'texts' if kind is str else 'integers'}"
        return self.take(key, (dict,), expected, lambda found: {type(v) for v in found.values()} <= {kind})

    def objects(self, key: str) -> list[_Fields]:
        values = self.take(key, (list,), "a list of objects", lambda found: {type(v) for v in found} <= {dict})
        return [_Fields(f"{self._at(key)}[{number}]", value) for number, value in enumerate(values)]

    def _at(self, key: str) -> str:
        return f"{self.where} {key}" if self.where.endswith(":") else f"{self.where}.{key}"
