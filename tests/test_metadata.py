"""Names, sources and keys that a user gives: as llama.cpp's converter and quantizer take them, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml
from checkpoints import MERGE
from neighbours import Llama

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.metadata import computed_size_label
from gguf_moe.plan import Plan, make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.report import printable
from gguf_moe.request import Request


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A copy of the bundled merge to change."""
    return Path(shutil.copytree(MERGE, tmp_path / MERGE.name))


def plan(merge: Path, quant: str = "Q4_K_M", **asked: Any) -> Plan:
    return make_plan(open_checkpoint(merge), find_file_type(quant), Request(**asked))


def values(made: Plan, prefix: str = "") -> dict[str, Any]:
    return {key: item.value for key, item in made.keys.items() if key.startswith(prefix)}


def donors(made: Plan) -> list[dict[str, str]]:
    """general.base_model.* as one mapping each, in order."""
    found = values(made, "general.base_model.")
    entries: list[dict[str, str]] = [{} for _ in range(found.pop("general.base_model.count", 0))]
    for key, value in found.items():
        number, _, field = key.removeprefix("general.base_model.").partition(".")
        entries[int(number)][field] = value
    return entries


def names(made: Plan) -> list[str]:
    return [entry["repo_url"].removeprefix("https://huggingface.co/") for entry in donors(made)]


def card(merge: Path, **fields: Any) -> None:
    (merge / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n")


def config(merge: Path, content: Any, name: str = "mergekit_moe_config.yml") -> None:
    (merge / "mergekit_moe_config.yml").unlink(missing_ok=True)
    (merge / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))


EXPERTS = ["a/first-7B", "b/second", "a/first-7B", "c/third"]
MOE = {"base_model": "z/base-v0.1", "experts": [{"source_model": name, "positive_prompts": ["x"]} for name in EXPERTS]}


def test_the_bundled_card_and_configuration_agree(merge: Path) -> None:
    with_both = make_plan(open_checkpoint(merge), find_file_type("Q4_K_M")).files[0].header
    (merge / "mergekit_moe_config.yml").unlink()
    assert make_plan(open_checkpoint(merge), find_file_type("Q4_K_M")).files[0].header == with_both


def test_without_a_card_the_experts_then_the_base_model(merge: Path) -> None:
    card(merge, license="mit")
    config(merge, MOE)
    made = plan(merge)
    assert names(made) == ["a/first-7B", "b/second", "c/third", "z/base-v0.1"]
    # As the gguf package reads the same ids from a card.
    card(merge, license="mit", base_model=["a/first-7B", "b/second", "c/third", "z/base-v0.1"])
    (merge / "mergekit_moe_config.yml").unlink()
    assert donors(plan(merge)) == donors(made)
    assert donors(made)[3]["version"] == "v0.1"


def test_the_configuration_orders_the_card_whose_details_stay(merge: Path) -> None:
    third = {"name": "Third", "organization": "C", "author": "Carol", "repo_url": "https://huggingface.co/c/third/"}
    card(merge, base_model=["x/dataset-parent", third, "z/base-v0.1", "B/Second"])
    config(merge, MOE)
    made = plan(merge)
    assert [e["repo_url"].split("co/")[1] for e in donors(made)] == [
        *("a/first-7B", "B/Second", "c/third/", "x/dataset-parent", "z/base-v0.1"),
    ]
    assert donors(made)[2] == third


def test_the_base_model_is_left_out_where_the_card_leaves_it_out(merge: Path) -> None:
    card(merge, base_model=["c/third", "b/second"])
    config(merge, MOE)
    assert names(plan(merge)) == ["a/first-7B", "b/second", "c/third"]


def test_an_expert_that_is_the_base_model_stands_once(merge: Path) -> None:
    card(merge, license="mit")
    config(merge, {**MOE, "base_model": "b/second"})
    assert names(plan(merge)) == ["a/first-7B", "b/second", "c/third"]


def test_references_with_revisions_adapters_mappings_and_paths(merge: Path) -> None:
    card(merge, license="mit")
    experts = [
        "a/one@main+lora/adapter",
        {"model": {"path": "b/two", "revision": "x"}, "lora": None},
        "/home/ann/private/models/three-7B/",
        "C:\\four",
        "./five",
    ]
    config(
        merge, {"experts": [{"source_model": name} for name in experts], "shared_experts": [{"source_model": "s/6"}]}
    )
    found = donors(plan(merge))
    assert [entry.get("repo_url") for entry in found] == [
        *("https://huggingface.co/a/one", "https://huggingface.co/b/two", None, None, None),
        "https://huggingface.co/s/6",
    ]
    assert [entry["name"] for entry in found] == ["One", "Two", "Three 7B", "Four", "Five", "6"]
    assert b"private" not in plan(merge).files[0].header


@pytest.mark.parametrize(
    "content",
    [
        {"models": [{"model": "a/one"}, {"model": "b/two"}], "base_model": "z/base"},
        {"slices": [{"sources": [{"model": "a/one"}, {"model": "b/two"}]}, {"sources": [{"model": "a/one"}]}],
         "base_model": "z/base"},
    ],
)  # fmt: skip
def test_the_configuration_of_a_dense_merge(content: dict, merge: Path) -> None:
    card(merge, license="mit")
    config(merge, content, "mergekit_config.yml")
    assert names(plan(merge)) == ["a/one", "b/two", "z/base"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "holds a list, expected a mapping"),
        ("a: [", "while parsing"),
        ("a: 1\n---\nb: 2\n", "expected a single"),
    ],
)
def test_an_odd_configuration_is_warned_of(content: str, reason: str, merge: Path) -> None:
    config(merge, content)
    made = plan(merge)
    path = merge / "mergekit_moe_config.yml"
    start = f"{path}: not understood, so general.base_model keeps the model card's order: {reason}"
    assert [w for w in made.warnings if w.startswith(start)]
    assert len(names(made)) == 4


@pytest.mark.parametrize("content", [{"experts": 5}, {"experts": [1, None, {}]}, {"slices": [1]}, {"base_model": [1]}])
def test_a_configuration_that_names_nothing_changes_nothing(content: dict, merge: Path) -> None:
    before = names(plan(merge))
    config(merge, content)
    assert names(plan(merge)) == before


METADATA = {
    "general.name": "Deep Tide",
    "general.author": "Ann",
    "general.basename": "Deep",
    "general.size_label": "4x5M",
    "general.quantized_by": "Bob",
    "general.url": "https://example.org",
    "general.sampling.temp": 0.5,
    "general.sampling.top_k": 40,
    "general.tags": ["one", "two"],
    "general.base_models": [{"name": "Only", "repo_url": "https://example.org/only"}],
    "general.datasets": [],
    "general.version": None,
}


def test_a_metadata_file_is_read_as_the_gguf_package_reads_it(merge: Path, tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(METADATA))
    made = plan(merge, "F16", metadata=path, name="Given", size_label="4x6M")
    expected = gguf.Metadata.load(path, merge, "Given", made.elements)
    expected.size_label = "4x6M"
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type("model")
    expected.set_gguf_meta_model(writer)
    want = {key: item.value for key, item in writer.kv_data[0].items()}
    have = values(made, "general.")
    assert {key: have[key] for key in want} == want
    assert [key for key in have if key in want] == list(want)
    assert have["general.name"] == "Given"
    assert "general.version" not in have
    assert donors(made) == METADATA["general.base_models"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: no such file"),
        ("[1]", "{path}: holds a JSON list, expected an object"),
        ({"general.nmae": "x"}, "{path}: unknown key 'general.nmae', expected one of general.name, general.author, "),
        ({"general.name": 5}, "{path}: general.name is 5, expected text"),
        ({"general.sampling.top_k": True}, "{path}: general.sampling.top_k is True, expected an integer"),
        ({"general.sampling.temp": "hot"}, "{path}: general.sampling.temp is 'hot', expected a number"),
        ({"general.tags": [1]}, "{path}: general.tags is [1], expected a list of texts"),
        ({"general.base_models": ["a/b"]}, "{path}: general.base_models is ['a/b'], expected a list of objects"),
        (
            {"general.datasets": [{"name": 3}]},
            "{path}: general.datasets is [{{'name': 3}}], expected a list of objects of texts",
        ),
    ],
)
def test_a_wrong_metadata_file(content: Any, message: str, run, tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = run("convert", MERGE, "--bits", 4, "--metadata", path, "-o", tmp_path / "out.gguf")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith(f"gguf-moe: --metadata {message.format(path=path)}")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("option", ["--name", "--size-label"])
def test_an_empty_name(option: str, run) -> None:
    result = run("convert", MERGE, "--bits", 4, option, " ")
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: {option} is empty\n")


def test_the_computed_size_label(merge: Path) -> None:
    made = plan(merge)
    assert computed_size_label([tensor.mapped for tensor in made.tensors]) == "4x4.5M"


OVERRIDES = {
    "no type": ("a.b=5", "expected KEY=TYPE:VALUE with a TYPE of int, float, bool, str"),
    "no value": ("a.b", "expected KEY=TYPE:VALUE with a TYPE of int, float, bool, str"),
    "no key": ("=int:5", "expected KEY=TYPE:VALUE with a TYPE of int, float, bool, str"),
    "unknown type": ("a.b=uint:5", "expected KEY=TYPE:VALUE with a TYPE of int, float, bool, str"),
    "long key": (f"{'k' * 128}=int:5", "a key of 128 bytes, llama.cpp takes 127 at most"),
    "long text": (f"a.b=str:{'é' * 64}", "a value of 128 bytes, llama.cpp takes 127 at most"),
    "not UTF-8": ("a.b=str:\udcff", "not valid UTF-8"),
    "negative": ("a.b=int:-1", "'-1', expected an integer from 0 to 4294967295"),
    "wide": ("a.b=int:4294967296", "'4294967296', expected an integer from 0 to 4294967295"),
    "fraction": ("a.b=int:1.5", "'1.5', expected an integer from 0 to 4294967295"),
    "word": ("a.b=float:x", "'x', expected a finite 32-bit number"),
    "infinity": ("a.b=float:inf", "'inf', expected a finite 32-bit number"),
    "huge": ("a.b=float:1e39", "'1e39', expected a finite 32-bit number"),
    "maybe": ("a.b=bool:maybe", "'maybe', expected true or false"),
    "layers": ("llama.block_count=int:3", "llama.block_count follows from the tensors or the file and cannot be set"),
    "experts": (
        "llama.expert_count=int:2",
        "llama.expert_count follows from the tensors or the file and cannot be set",
    ),
    "file type": (
        "general.file_type=int:2",
        "general.file_type follows from the tensors or the file and cannot be set",
    ),
    "split": ("split.count=int:2", "split.count follows from the tensors or the file and cannot be set"),
    "experts used": ("llama.expert_used_count=int:1", "give --experts-used, which checks the number"),
    "text for a number": ("llama.context_length=str:4k", "llama.context_length is of type UINT32, expected int"),
    "integer for a float": ("llama.rope.freq_base=int:1", "llama.rope.freq_base is of type FLOAT32, expected float"),
    "number for a name": ("general.name=int:1", "general.name is of type STRING, expected str"),
    "a list": ("general.tags=str:moe", "general.tags is of type ARRAY, a list, which cannot be overridden"),
    "token": ("tokenizer.ggml.bos_token_id=int:4096", "token 4096, but the vocabulary has 4096"),
    "token text": ("tokenizer.ggml.eot_token_id=str:x", "a token id, expected int"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides_that_cannot_be_written(case: str, run, tmp_path: Path) -> None:
    override, message = OVERRIDES[case]
    result = run("convert", MERGE, "--bits", 4, "--override-kv", override, "-o", tmp_path / "out.gguf")
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: --override-kv {printable(override)}: {message}\n")
    assert not (tmp_path / "out.gguf").exists()


def test_an_unknown_key_is_written_with_a_warning_and_a_known_one_without(merge: Path) -> None:
    overrides = ("llama.expert_weights_scale=float:1.5", "llama.contxt_length=int:5", "general.license.name=str:own")
    made = plan(merge, override_kv=overrides)
    assert made.warnings == (
        f"--override-kv {overrides[1]}: llama.contxt_length is no key of llama.cpp's that gguf-moe knows of",
    )
    assert list(values(made))[-3:] == [text.partition("=")[0] for text in overrides]


def test_llama_cpp_loads_a_file_with_overrides(run, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    overrides = ["llama.context_length=int:64", "llama.rope.freq_base=float:20000", "general.name=str:Läufer"]
    result = run("convert", MERGE, "--bits", 8, *[f"--override-kv={o}" for o in overrides], "-o", path)
    assert result.exit_code == 0
    with Llama(path, context=32) as model:
        assert model.lib.llama_model_n_ctx_train(model.model) == 64
