"""TEMP"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class ExportedFile:
    name: str
    size: int
    sha256: str
    fingerprint: str
    mtime_ns: int


@dataclass(frozen=True)
class Level:
    quant: str
    files: tuple
    bits_per_weight: float
    types: dict
    seconds: float | None


@dataclass(frozen=True)
class Manifest:
    source: str
    recipe: dict
    levels: tuple


def make_manifest(source, recipe, levels):
    return Manifest(source.name, recipe, tuple(levels))


def read_manifest(d):
    p = d / "manifest.json"
    if not p.exists():
        return None
    m = json.loads(p.read_text())
    return Manifest(
        m["source"],
        m["recipe"],
        tuple(Level(**{**l, "files": tuple(ExportedFile(**f) for f in l["files"])}) for l in m["levels"]),
    )


def write_manifest(d, m):
    t = d / "manifest.json.tmp"
    t.write_text(json.dumps(dataclasses.asdict(m)))
    t.replace(d / "manifest.json")
