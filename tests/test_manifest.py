"""manifest.json: everything comes back, whatever else people write into it; what is damaged is named, not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import write_whole
from gguf_moe.manifest import (
    MANIFEST,
    ExportedFile,
    Level,
    Manifest,
    program_versions,
    read_manifest,
    recipe_values,
    write_manifest,
)
from gguf_moe.recipe_file import read_recipe
from gguf_moe.request import Request
from gguf_moe.sharding import Splitting

SHARDS = tuple(ExportedFile(f"Größe-Q4_K_M-0000{n}-of-00002.gguf", 7 + n, f"{n}" * 64, "f", 5) for n in (1, 2))
LEVELS = (
    Level("Q4_K_M", SHARDS, 4.83, {"Q4_K": 25, "F32": 3}, "merge", {"pure": True, "splitting": {"max_bytes": 7}}, 12.5),
    Level("Q8_0", (ExportedFile("m-Q8_0.gguf", 0, "a" * 64, "g", 1 << 62),), 8.5, {}, "m", {}, None),
)
WHOLE = Manifest(LEVELS)


def test_everything_comes_back(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, WHOLE)
    assert read_manifest(tmp_path) == WHOLE
    later = replace(WHOLE, levels=LEVELS[:1])
    write_manifest(tmp_path, later)
    assert read_manifest(tmp_path) == later
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_what_programs_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, WHOLE)
    content = json.loads((tmp_path / MANIFEST).read_text())
    assert list(content) == ["levels", "program", "created"]
    assert content["program"] == program_versions()
    assert list(content["program"]) == ["name", "version", "codecs", "numpy", "gguf", "python"]
    assert list(content["levels"][0]) == [
        *("quant", "files", "bits_per_weight", "types", "source", "recipe", "seconds"),
    ]
    assert content["levels"][0]["files"][1] == {
        "name": SHARDS[1].name,
        "size": 9,
        "sha256": "2" * 64,
        "fingerprint": "f",
        "mtime_ns": 5,
    }
    assert content["created"].endswith("+00:00")
    assert LEVELS[0].size == 17


def edited(directory: Path, change: Callable[[Any], Any]) -> Path:
    """The directory with a manifest that `change` has been at, in place or by what it returns."""
    write_manifest(directory, WHOLE)
    content = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(change(content) or content))
    return directory


def test_what_people_add_is_passed_over(tmp_path: Path) -> None:
    def add(content: dict) -> None:
        content["note"] = "mine"
        content["levels"][0]["note"] = content["levels"][0]["files"][0]["note"] = ["mine"]
        content["levels"][1]["bits_per_weight"] = 8  # a number without a fraction is one too

    assert read_manifest(edited(tmp_path, add)) == replace(
        WHOLE, levels=(LEVELS[0], replace(LEVELS[1], bits_per_weight=8))
    )


def put(*path: str | int, value: Any = ...) -> Callable[[Any], None]:
    """Set what stands at the path, or take it away."""

    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        if value is ...:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


DAMAGE = {
    "levels[0].source is missing, expected text": put("levels", 0, "source"),
    "levels[1].source is 7, expected text": put("levels", 1, "source", value=7),
    "levels[0].recipe is [], expected an object": put("levels", 0, "recipe", value=[]),
    "program is {'name': 1}, expected an object of texts": put("program", value={"name": 1}),
    "created is None, expected text": put("created", value=None),
    "levels is {}, expected a list of objects": put("levels", value={}),
    "levels is [None], expected a list of objects": put("levels", value=[None]),
    "levels[1].files is [], expected at least one": put("levels", 1, "files", value=[]),
    "levels[0].quant is missing, expected text": put("levels", 0, "quant"),
    "levels[0].seconds is True, expected a number or null": put("levels", 0, "seconds", value=True),
    "levels[0].seconds is -1, expected a number or null": put("levels", 0, "seconds", value=-1),
    "levels[0].bits_per_weight is nan, expected a number": put("levels", 0, "bits_per_weight", value=float("nan")),
    "levels[0].types is {'F32': '3'}, expected an object of integers": put("levels", 0, "types", value={"F32": "3"}),
    "levels[0].files[1].size is -1, expected bytes": put("levels", 0, "files", 1, "size", value=-1),
    "levels[0].files[1].size is 9.0, expected bytes": put("levels", 0, "files", 1, "size", value=9.0),
    "levels[0].files[0].sha256 is 'abc', expected 64 hexadecimal digits": put(
        "levels", 0, "files", 0, "sha256", value="abc"
    ),
    "levels[1].files[0].mtime_ns is missing, expected nanoseconds": put("levels", 1, "files", 0, "mtime_ns"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(message: str, tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError) as error:
        read_manifest(edited(tmp_path, DAMAGE[message]))
    assert str(error.value) == f"{tmp_path / MANIFEST}: {message}"


@pytest.mark.parametrize("name", ["../m.gguf", "/etc/m.gguf", "C:\\m.gguf", "a\\m.gguf", "m.bin", "", "a\nb.gguf"])
def test_only_names_of_files_beside_are_taken(name: str, tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError, match=r"files\[0\]\.name is .*, expected the name of a \.gguf file, no path$"):
        read_manifest(edited(tmp_path, put("levels", 0, "files", 0, "name", value=name)))


def test_a_file_listed_twice(tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError, match=r"manifest\.json: lists m-Q8_0\.gguf twice, expected each file once$"):
        read_manifest(edited(tmp_path, put("levels", 0, "files", 0, "name", value="m-Q8_0.gguf")))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff{}", b"[" * 100_000, b'{"source": 1e9'])
def test_what_is_no_manifest_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(GgufMoeError, match=r"manifest\.json: (not readable as JSON|holds a JSON list)"):
        read_manifest(tmp_path)


def test_any_cut_of_the_file_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path, WHOLE)
    content = (tmp_path / MANIFEST).read_bytes()
    for length in range(len(content) - 2):
        (tmp_path / MANIFEST).write_bytes(content[:length])
        with pytest.raises(GgufMoeError):
            read_manifest(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_whole(path, b"before")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(GgufMoeError, match=r"/f: not written: \[Errno 28\] No space left on device$"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_recipe_says_what_was_asked_and_no_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'bits = 4\nrouter-type = "F16"\n[[tensor-type]]\npattern = "ffn_down"\nlayers = "0-2, 9"\ntype = "q6_k"\n'
    )
    rules = read_recipe(tmp_path / "mine.toml").rules
    request = Request(
        rules,
        override_kv=("a.b=int:1",),
        metadata=tmp_path / "meta.json",
        chat_template=str(tmp_path / "chat.jinja"),
        splitting=Splitting(max_tensors=9, tensors_in_first=False),
    )
    asked = recipe_values(request)
    assert asked == {
        "rules": {"overrides": [{"pattern": "ffn_down", "type": "Q6_K", "layers": [0, 1, 2, 9]}], "router": "F16"},
        "chat_template": "chat.jinja",
        "override_kv": ["a.b=int:1"],
        "metadata": "meta.json",
        "splitting": {"max_tensors": 9, "tensors_in_first": False},
    }
    assert json.loads(json.dumps(asked)) == asked
    assert recipe_values(Request()) == {}
    assert recipe_values(Request(chat_template="none")) == {"chat_template": "none"}
