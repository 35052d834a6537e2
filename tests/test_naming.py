"""File names as the Hugging Face Hub reads them; where Node is present, by the Hub's own code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
from checkpoints import MERGE

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.naming import HUB_LABELS, default_file_name, hub_labels, name_warnings
from gguf_moe.plan import make_plan
from gguf_moe.recipe import FILE_TYPES, find_file_type
from gguf_moe.request import Request

# name, basename, finetune, version, size label -> the stem before the file type and its separator
STEMS = {
    ("TidePool 4x4M v1", "TidePool", None, "v1", "4x4M"): "TidePool-4x4M-v1-",
    ("x", "Foo", "instruct", "v0.1", "8x7B"): "Foo-8x7B-instruct-v0.1-",
    ("Foo Q4_K_M merge", None, None, None, "4x7B"): "Foo-merge-4x7B-",
    ("Foo-F16", None, None, None, "4x7B"): "Foo-4x7B-",
    ("foo-bf16-q8_0", None, None, None, "4x7B"): "foo-4x7B-",
    ("UD-Q4_K_XL", None, None, None, None): "UD.",
    ("Q4_K_M", None, None, None, None): "model-",
    ("NF16SF32 stays", None, None, None, None): "NF16SF32-stays-",
    ("Storm", None, "cloud", None, "4x7B"): "Storm-4x7B-cloud.",
    ("UD", None, None, None, None): "UD.",
    ("UD", "UD", None, "v1", None): "UD-v1-",
    ("../..//etc/passwd", None, None, None, None): "etc-passwd-",
    ("-rf --force", None, None, None, None): "rf-force-",
    (".hidden", None, None, None, None): "hidden-",
    ("a\x1b[2J\nb:*?\"<>|c", None, None, None, None): "a-2J-b-c-",
    ("Großes Modell ß", None, None, None, "4x7B"): "Großes-Modell-ß-4x7B-",
    ("混合专家模型", None, None, None, "4x7B"): "混合专家模型-4x7B-",
    ("", None, None, None, None): "model-",
    (None, None, None, None, None): "ggml-model-",
    ("a" * 500, None, None, None, None): "a" * 200 + "-",
    ("é" * 500, None, None, None, None): "é" * 100 + "-",
    ("x" + "専" * 500, None, None, None, None): "x" + "専" * 66 + "-",
    ("foo_Q4_0_", None, None, None, None): "foo_Q4_0_-",
}  # fmt: skip
NAMES = [
    *(default_file_name(*parts, file_type) for parts in STEMS for file_type in ("Q4_K_M", "F16", "Q2_K", "BF16")),
    *(f"m-{label}.gguf" for label in HUB_LABELS),
    *(f"m-UD-{label}-00001-of-00003.gguf" for label in HUB_LABELS),
    *("m.gguf", "m.Q4_K_M.gguf", "m-q4_k_m.gguf", "m-Q4_K_M-imat.gguf", "m-Q4_K_M_imat.gguf", "m-F16-Q4_K_M.gguf"),
    *(
        "m-Q4_0_4_4.gguf",
        "m-Q4_1_SOME_F16.gguf",
        "m-IQ4_XS.gguf",
        "m-MXFP4_MOE.gguf",
        "m-\u017ff16.gguf",
        "m-Q9_Z.gguf",
    ),
    *("Q4_K_MQ5_K_M.gguf", "mQ4_K_M.bin", "\u0131-q8_0-ß.gguf", "m-Q4_K_M-00001-of-00002.gguf", "m-Q3_K-Q4_K.gguf"),
]


@pytest.mark.parametrize("parts", STEMS, ids=lambda parts: repr(parts)[:40])
@pytest.mark.parametrize("file_type", ["Q4_K_M", "F16"])
def test_default_names_end_in_the_file_type_and_are_read_so(parts: tuple, file_type: str) -> None:
    name = default_file_name(*parts, file_type)
    assert name == f"{STEMS[parts]}{file_type}.gguf"
    assert hub_labels(name)[-1] == file_type
    assert len(f".{name}.12345678.partial".encode()) <= 255
    if not hub_labels(STEMS[parts]):
        assert name_warnings(name, file_type) == []


def test_plain_names_follow_the_published_convention() -> None:
    """The regular expression of ggml's document on the naming convention."""
    convention = re.compile(
        r"^(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))-"
        r"(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)"
        r"(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?-(?:(?P<Version>v\d+(?:\.\d+)*))"
        r"(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?(?:-(?P<Type>LoRA|vocab))?(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
    )
    name = default_file_name("ignored", "Deep Tide", "instruct", "v0.2", "4x7.2B", "Q4_K_M")
    match = convention.match(name)
    assert match is not None
    groups = match.group("BaseName", "SizeLabel", "FineTune", "Version", "Encoding")
    assert groups == ("Deep-Tide", "4x7.2B", "instruct", "v0.2", "Q4_K_M")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "TidePool-4x4M-v1-Q4_K_M.gguf"),
        ({"name": "Deep Tide"}, "Deep-Tide-4x4M-Q4_K_M.gguf"),
        ({"name": "Deep-8x7B-Instruct-v2"}, "Deep-8x7B-Instruct-v2-Q4_K_M.gguf"),
        ({"name": "me/Deep-Q8_0", "size_label": "4x9M"}, "me-Deep-4x9M-Q4_K_M.gguf"),
        ({"size_label": "4x9M"}, "TidePool-4x9M-v1-Q4_K_M.gguf"),
        ({"override_kv": ("general.basename=str:Tide",)}, "Tide-4x4M-v1-Q4_K_M.gguf"),
    ],
)
def test_what_the_user_names_is_in_the_default_name(asked: dict, expected: str) -> None:
    made = make_plan(open_checkpoint(MERGE), find_file_type("Q4_K_M"), Request(**asked))
    assert made.default_name == expected


WARNINGS = {
    "m-Q4_K_M.gguf": [],
    "m-q4_k_m.gguf": [],
    "m.Q4_K_M.gguf": [],
    "m-UD-Q4_K_M.gguf": [],
    "m-Q4_K_XL.gguf": [],
    "m-Q4_K_M-00001-of-00002.gguf": [],
    "m.gguf": ["the Hub finds no quantization in the name; expected one at its end, as -Q4_K_M.gguf"],
    "m-Q4_K_M.bin": ["the Hub takes no file for GGUF whose name does not end in .gguf"],
    "m-Q5_K_M.gguf": ["the Hub reads Q5_K_M, but the file says Q4_K_M"],
    "m-F16-Q4_K_M.gguf": ["names 2 quantizations, F16 and Q4_K_M; the Hub takes Q4_K_M"],
    "m-Q4_K_M-imat.gguf": ["'-imat' stands behind the quantization, where only a shard number belongs"],
    "m-Q4_K_M_imat.gguf": ["the Hub reads Q4_K_M_IMAT, but the file says Q4_K_M"],
    "m-Q4_K_M-f16-x.gguf": [
        "names 2 quantizations, Q4_K_M and F16; the Hub takes F16",
        "'-x' stands behind the quantization, where only a shard number belongs",
        "the Hub reads F16, but the file says Q4_K_M",
    ],
}


@pytest.mark.parametrize("name", WARNINGS)
def test_inspect_warns_of_names_that_the_hub_misreads(name: str, run, made, tmp_path: Path) -> None:
    path = tmp_path / name
    path.symlink_to(made("json", "Q4_K_M"))
    result = run("inspect", path)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [f"gguf-moe: warning: {name}: {warning}" for warning in WARNINGS[name]]
    json.loads(run("inspect", path, "--json").stdout)  # warnings do not spoil it


def test_a_file_without_a_file_type_is_not_compared() -> None:
    assert name_warnings("m-Q5_K_M.gguf", None) == []


def test_names_are_read_as_the_hub_reads_them(hub) -> None:
    found = hub(NAMES, [])
    for name, read in zip(NAMES, found["names"], strict=True):
        assert hub_labels(name) == read["labels"], name
        assert (hub_labels(name) or [None])[-1] == read["label"], name
    assert [*found["known"], "MXFP4"] == list(HUB_LABELS)
    assert set(FILE_TYPES) <= set(found["known"])


def test_the_hub_reads_default_names_as_their_file_type(hub) -> None:
    names = [default_file_name(*parts, file_type) for parts in STEMS for file_type in FILE_TYPES]
    shards = [name.replace(".gguf", "-00002-of-00003.gguf") for name in names]
    found = hub(names + shards, [])["names"]
    assert [read["label"] for read in found] == [*FILE_TYPES] * len(STEMS) * 2
    assert [read["shard"]["total"] for read in found[len(names) :]] == ["00003"] * len(shards)


def test_the_hub_reads_our_files(hub, made) -> None:
    path = made("json", "Q4_K_M")
    reader = gguf.GGUFReader(path)
    read = hub([], [path])["files"][0]
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    want = {key: value for key, value in keys.items() if not isinstance(value, list)}
    have = {key: value for key, value in read["metadata"].items() if key in want}
    assert have == pytest.approx(want)
    assert read["tensors"] == [[t.name, [int(n) for n in t.shape], int(t.tensor_type)] for t in reader.tensors]
    assert read["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
