"""Imports point one way, and library code neither prints nor exits."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each room and the rooms it may use; `quant` may be used by all and uses none.
ALLOWED = {
    "cli": "card checkpoint cli convert coverage duplicates errors estimate evaluation export filling gguf_file "
    "gguf_reader gguf_source imatrix imatrix_file manifest methods origin plan recipe recipe_file report request "
    "resharding rules sharding verify",
    "__main__": "cli",
    "__init__": "",
    "card": "card_body donors errors gguf_file manifest metadata naming plan",
    "card_body": "donors manifest naming report",
    "manifest": "checkpoint errors gguf_file request",
    "evaluation": "arch checkpoint errors evaluation gguf_file gguf_keys gguf_reader gguf_source imatrix mapping plan "
    "recipe report request tokenizer",
    "methods": "checkpoint errors evaluation gguf_file gguf_source layout mapping methods plan report",
    "report": "gguf_reader naming plan recipe",
    "convert": "duplicates errors filling gguf_file layout plan",
    "verify": "checkpoint checksums errors filling gguf_reader gguf_source layout mapping nearness origin pool",
    "nearness": "encoding gguf_reader mapping",
    "checksums": "errors gguf_file",
    "origin": "checkpoint encoding errors gguf_file gguf_reader gguf_source layout mapping methods plan recipe "
    "request sharding",
    "resharding": "convert errors filling gguf_file gguf_reader gguf_source layout mapping plan recipe sharding",
    "export": "checksums convert duplicates errors filling layout manifest partial plan",
    "partial": "errors gguf_file gguf_reader layout",
    "estimate": "encoding plan",
    "filling": "duplicates encoding gguf_file layout mapping pool recipe",
    "pool": "",
    "encoding": "checkpoint errors mapping",
    "duplicates": "mapping plan",
    "plan": "arch checkpoint errors gguf_file gguf_keys gguf_reader gguf_source imatrix layout mapping "
    "metadata naming overrides plan_checks recipe request rules tokenizer",
    "plan_checks": "errors gguf_reader imatrix layout mapping recipe request",
    "imatrix": "checkpoint errors gguf_reader mapping",
    "coverage": "errors imatrix",
    "imatrix_file": "errors gguf_file gguf_reader imatrix",
    "layout": "gguf_file gguf_reader mapping recipe sharding",
    "sharding": "errors gguf_file",
    "gguf_keys": "arch errors mapping recipe",
    "gguf_source": "checkpoint errors gguf_reader mapping recipe",
    "metadata": "checkpoint donors errors gguf_file mapping request",
    "donors": "",
    "naming": "",
    "overrides": "errors",
    "mapping": "arch checkpoint errors recipe",
    "arch": "arch checkpoint errors",
    "tokenizer": "checkpoint errors tokenizer",
    "request": "rules sharding",
    "recipe_file": "errors recipe rules",
    "rules": "errors recipe",
    "recipe": "errors",
    "gguf_file": "errors gguf_reader",
    "gguf_reader": "errors",
    "checkpoint": "errors",
    "errors": "",
}
ONLY_IN_CLI = {"click", "tqdm"}
FILES = sorted([*(ROOT / "gguf_moe").rglob("*.py"), *(ROOT / "quant").rglob("*.py")])


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parts[-2] == "quant", f"{path}: relative import"
            found |= {f"{node.module or 'quant'}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    used = imports(path)
    if package == "quant":
        assert not [name for name in used if name.split(".")[0] == "gguf_moe"]
        return
    room = rest[0]
    rooms = {name.split(".")[1] for name in used if name.startswith("gguf_moe.")} - {"__version__"}
    assert rooms <= set(ALLOWED[room].split())
    if room != "cli":
        assert not {name.split(".")[0] for name in used} & ONLY_IN_CLI


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_neither_prints_nor_exits(path: Path) -> None:
    if "cli" in path.parts:
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {ast.unparse(call) for call in calls}
    assert not names & {"print", "exit", "quit", "sys.exit", "os._exit"}
