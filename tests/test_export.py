"""A ladder from one read: the bytes of single conversions, each encoding made once, and what is told of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MERGE, Parts, bundled
from neighbours import Llama

import quant
from gguf_moe import filling
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.duplicates import find_duplicates
from gguf_moe.estimate import new_encodings
from gguf_moe.export import LADDER, Found, export
from gguf_moe.plan import make_plans
from gguf_moe.recipe import find_file_type

DEFAULT = [argument for name in LADDER for argument in ("--quant", name)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def levels(directory: Path) -> dict[str, str]:
    """SHA-256 of the levels in a directory, by file type."""
    return {path.stem.rpartition("-")[2]: sha256(path) for path in directory.glob("*.gguf")}


@pytest.mark.parametrize("quants", [(), ("BF16", "Q4_K_M", "F32"), ("q6_k", "Q8_0", "f16", "Q6_K"), ("BF16", "F16")])
def test_every_file_is_the_one_that_convert_makes(quants: tuple[str, ...], run, made, tmp_path: Path) -> None:
    """Also where files of several orders of tensors grow side by side."""
    result = run("export", MERGE, "-o", tmp_path / "out", *(x for name in quants for x in ("--quant", name)))
    assert result.exit_code == 0, result.output
    names = [name.upper() for name in quants] or LADDER
    assert levels(tmp_path / "out") == {name: sha256(made("json", name)) for name in names}
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".partial", ".journal", ".lock")]


def test_a_gguf_file_as_model(run, made, tmp_path: Path) -> None:
    result = run("export", made("json", "BF16"), "-o", tmp_path, "--quant", "Q4_K_M", "--quant", "Q2_K")
    assert result.exit_code == 0, result.output
    assert levels(tmp_path) == {name: sha256(made("json", name)) for name in ("Q4_K_M", "Q2_K")}


@pytest.mark.parametrize("weights", [1 << 20, 12_345])
def test_each_encoding_is_made_once(weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "PIECE_WEIGHTS", weights)
    plans = make_plans(open_checkpoint(MERGE), [find_file_type(name) for name in LADDER])
    encoded: Counter[str] = Counter()
    quantize = quant.quantize

    def count(rows, kind, *importance, **options):
        encoded[kind] += rows.size
        return quantize(rows, kind, *importance, **options)

    monkeypatch.setattr(quant, "quantize", count)
    export(plans, tmp_path, recipe={})
    wanted = {(t.info.name, t.info.type): t.mapped.elements for plan in plans for t in plan.tensors}
    assert encoded == Counter({kind: sum(n for (_, k), n in wanted.items() if k == kind) for _, kind in wanted})


def test_twins_in_a_ladder(run, tmp_path: Path) -> None:
    """Repeated experts and an output that is the embedding, in levels that share their type and levels that do not."""
    parts = bundled()
    for name, (_, array) in parts.tensors.items():
        if ".mlp.experts." in name:
            parts.tensors[name] = ("BF16", array[[0, 1, 0, 0]].copy())
    parts.tensors["lm_head.weight"] = parts.tensors["model.embed_tokens.weight"]
    directory = parts.save(tmp_path / MERGE.name)
    plans = make_plans(open_checkpoint(directory), [find_file_type(q) for q in ("BF16", "Q8_0", "Q4_K_M", "Q2_K")])
    assert find_duplicates(plans).twins
    quants = ("--quant", "BF16", "--quant", "Q8_0", "--quant", "Q4_K_M")
    result = run("export", directory, "-o", tmp_path / "out", *quants)
    assert "experts 0, 2 and 3 are identical" in result.stdout
    for name, digest in levels(tmp_path / "out").items():
        run("convert", directory, "--quant", name, "-o", tmp_path / "one.gguf", "--force")
        assert sha256(tmp_path / "one.gguf") == digest


def test_the_dry_run_tells_sizes_and_costs(run, made, tmp_path: Path) -> None:
    result = run("export", MERGE, "-o", tmp_path / "deep" / "out", "--dry-run", "--quant", "Q2_K", "--quant", "Q4_K_M")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1][:6] == ["Q2_K", "1", str(made("json", "Q2_K").stat().st_size), "3.90", "MB", "3.32"]
    assert rows[3][:3] == ["all", "2", str(sum(made("json", q).stat().st_size for q in ("Q2_K", "Q4_K_M")))]
    assert list(tmp_path.iterdir()) == []
    assert result.stdout.splitlines()[-1].startswith(
        f"would be written to {tmp_path / 'deep' / 'out'}: 9.74 MB, free are "
    )
    told = json.loads(run("export", MERGE, "-o", tmp_path, "--dry-run", "--json").stdout)
    assert [level["quant"] for level in told["levels"]] == list(LADDER)
    assert told["needed_bytes"] == sum(level["size_bytes"] for level in told["levels"])
    assert told["levels"][0]["seconds"] > 0


def test_the_dry_run_tells_of_too_little_space(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    last = run("export", MERGE, "-o", tmp_path, "--dry-run", "--quant", "Q2_K").stdout.splitlines()[-1]
    assert last.endswith(": 3.90 MB, free are 3.00 MB, too little unless an earlier run left much of it there")


def test_the_same_level_in_two_forms_is_warned_of(run, tmp_path: Path) -> None:
    arguments = ("export", MERGE, "-o", tmp_path, "--quant", "Q2_K")
    assert run(*arguments).stderr == ""
    whole, first = f"{MERGE.name}-Q2_K.gguf", f"{MERGE.name}-Q2_K-00001-of-00002.gguf"
    told = run(*arguments, "--split-max-size", "3M").stderr
    assert told == f"gguf-moe: warning: {whole} and {first} are both Q2_K; delete one before they are published\n"


def test_an_empty_output_is_not_the_directory_at_hand(run) -> None:
    result = run("export", MERGE, "-o", "")
    assert (result.exit_code, result.stderr) == (2, "gguf-moe: --output is empty, expected a directory\n")


def test_costs_count_each_encoding_once() -> None:
    plans = make_plans(
        open_checkpoint(MERGE), [find_file_type(name) for name in ("Q4_K_S", "Q4_K_M", "Q4_K_S", "Q6_K")]
    )
    _, medium, again, large = new_encodings(plans)
    assert again == {}
    assert set(large) == {"Q6_K"}
    earlier = {(tensor.info.name, tensor.info.type) for tensor in plans[0].tensors}
    own = [t for t in plans[1].tensors if (t.info.name, t.info.type) not in earlier]
    assert 0 < sum(medium.values()) == sum(tensor.mapped.elements for tensor in own) < plans[1].elements


def test_events_for_programs(run, tmp_path: Path) -> None:
    arguments = ("export", MERGE, "-o", tmp_path, "--json", "--quant", "Q8_0", "--quant", "Q2_K")
    events = [json.loads(line) for line in run(*arguments).stdout.splitlines()]
    assert {event["event"] for event in events} == {"progress", "finished"}
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"]
    finished = {event["level"]["quant"]: event["level"] for event in events if event["event"] == "finished"}
    assert {name: level["files"][0]["sha256"] for name, level in finished.items()} == levels(tmp_path)
    again = [json.loads(line) for line in run(*arguments).stdout.splitlines()]
    assert [(event["event"], event["state"]) for event in again] == [("found", "complete")] * 2


def test_a_second_run_touches_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("export", MERGE, "-o", tmp_path, "--quant", "Q8_0", "--quant", "Q2_K")
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.gguf")}
    monkeypatch.setattr(quant, "quantize", None)
    result = run(*arguments)
    assert result.exit_code == 0
    assert "TidePool-4x4M-v1-Q8_0.gguf is complete" in result.stdout.splitlines()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.gguf")} == before


def test_a_level_more_makes_only_that_level(run, made, tmp_path: Path) -> None:
    run("export", MERGE, "-o", tmp_path, "--quant", "Q8_0")
    seen = []
    plans = make_plans(open_checkpoint(MERGE), [find_file_type(name) for name in ("Q2_K", "Q8_0")])
    manifest = export(plans, tmp_path, recipe={}, on_event=seen.append)
    found = [event for event in seen if isinstance(event, Found)]
    assert [(event.file, event.state) for event in found] == [("TidePool-4x4M-v1-Q8_0.gguf", "complete")]
    assert [level.quant for level in manifest.levels] == ["Q2_K", "Q8_0"]
    assert levels(tmp_path) == {name: sha256(made("json", name)) for name in ("Q2_K", "Q8_0")}
    run("export", MERGE, "-o", tmp_path, "--quant", "Q6_K")
    listed = (tmp_path / "SHA256SUMS").read_text()
    assert all(f"TidePool-4x4M-v1-{name}.gguf" in listed for name in ("Q2_K", "Q6_K", "Q8_0"))


def test_a_weight_that_is_not_finite_leaves_no_final_name(run, tmp_path: Path) -> None:
    parts: Parts = bundled()
    array = parts.tensors["model.layers.2.mlp.experts.down_proj"][1].copy()
    array[1, 5, 7] = 0x7FC0
    parts.tensors["model.layers.2.mlp.experts.down_proj"] = ("BF16", array)
    result = run("export", parts.save(tmp_path / "in"), "-o", tmp_path / "out", "--quant", "Q4_K_M", "--quant", "BF16")
    assert result.exit_code == 1
    assert "holds NaN at [1, 5, 7]" in result.stderr
    assert not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--quant", "Q9_K"), 2, "Q9_K"),
        (("--threads", "0"), 2, "--threads"),
        (("--repo", "not an id"), 2, "--repo not an id: no id of a repository on the Hub"),
        (("--tensor-type", "nothing_like_it=Q8_0"), 2, "nothing_like_it"),
    ],
)
def test_wrong_calls(arguments: tuple[str, ...], code: int, message: str, run, tmp_path: Path) -> None:
    result = run("export", MERGE, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_every_level_loads_in_llama_cpp_whole_and_in_shards(run, made, tmp_path: Path) -> None:
    options = ("--split-max-size", "2M", "--no-tensor-first-split")
    assert run("export", MERGE, "-o", tmp_path / "whole", "--quant", "BF16", *DEFAULT).exit_code == 0
    assert run("export", MERGE, "-o", tmp_path / "shards", "--quant", "BF16", *DEFAULT, *options).exit_code == 0
    wholes = sorted((tmp_path / "whole").glob("*.gguf"))
    assert len(wholes) == len(LADDER) + 1
    for path in wholes:
        first = next((tmp_path / "shards").glob(f"{path.stem}-00001-of-*.gguf"))
        with Llama(path) as model, Llama(first) as shards:
            logits = model.logits([1, 300, 400, 500])
            assert np.isfinite(logits).all()
            assert np.array_equal(shards.logits([1, 300, 400, 500]), logits)


def test_shards_are_those_that_convert_makes(run, tmp_path: Path) -> None:
    options = ("--split-max-tensors", "9")
    for quant_name in ("Q4_K_M", "BF16"):
        run("convert", MERGE, "-o", tmp_path / f"{MERGE.name}-{quant_name}.gguf", "--quant", quant_name, *options)
    run("export", MERGE, "-o", tmp_path / "out", "--quant", "Q4_K_M", "--quant", "BF16", *options)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) == 10
    assert {p.name: sha256(p) for p in shards} == {p.name: sha256(p) for p in (tmp_path / "out").glob("*.gguf")}


def test_what_was_exported_verifies(run, tmp_path: Path) -> None:
    run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K", "--quant", "Q6_K", "--split-max-size", "3M")
    result = run("verify", *sorted(tmp_path.glob("*.gguf")), "--against", MERGE)
    assert result.exit_code == 0, result.output
    assert "SHA-256 as in SHA256SUMS, derives from" in result.stdout


def test_a_last_look_at_the_files(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("export", MERGE, "-o", tmp_path, "--quant", "Q2_K", "--quant", "Q6_K", "--verify")
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "2 of 2 files are good"
    path = tmp_path / f"{MERGE.name}-Q6_K.gguf"
    data = bytearray(path.read_bytes())
    data[3_000_000] ^= 4
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that lies
    result = run(*arguments)
    assert result.exit_code == 1
    assert f"{path}: BAD: " in result.stdout
    assert result.stderr == "gguf-moe: delete what is not good, and run again to make it anew\n"
    lines = run(*arguments, "--json").stdout.splitlines()
    assert [(each["event"], each.get("good")) for each in map(json.loads, lines)][-1] == ("verified", 1)


def test_each_level_remembers_its_own_recipe(run, tmp_path: Path) -> None:
    run("export", MERGE, "-o", tmp_path, "--quant", "Q8_0", "--pure")
    run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K")
    levels_told = json.loads((tmp_path / "manifest.json").read_text())["levels"]
    recipes = {level["quant"]: (level["source"], level["recipe"]) for level in levels_told}
    assert recipes == {"Q2_K": (MERGE.name, {}), "Q8_0": (MERGE.name, {"rules": {"pure": True}})}
    assert "Asked for Q8_0, beside the file type:" in (tmp_path / "README.md").read_text()


def test_a_closed_pipe_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    def closed(event: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        export(make_plans(open_checkpoint(MERGE), [find_file_type("Q2_K")]), tmp_path, recipe={}, on_event=closed)
