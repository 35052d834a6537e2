"""`export --method gptq`: ladders, their manifest and their card."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from gptq_runs import CALIB, EVAL, FEW, one_layer, values

from gguf_moe.card_body import making_section
from gguf_moe.manifest import ExportedFile, Level, Manifest
from gguf_moe.methods.gptq import Method
from gguf_moe.methods.store import LayerFile

LEVELS = ("--quant", "Q4_K_S", "--quant", "Q5_K_S", "--output-tensor-type", "Q8_0", "--name", "one")
DIGEST = hashlib.sha256(CALIB.read_bytes()).hexdigest()
FILES = ["one-4x2.7M-Q4_K_S.gguf", "one-4x2.7M-Q5_K_S.gguf"]


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_layer().save(tmp_path_factory.mktemp("merge") / "one")


@pytest.fixture(scope="module")
def ladder(run, merge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ladder")
    result = run("export", merge, *LEVELS, *FEW, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stderr.count(" on 2 windows of 512 tokens") == 1
    assert {path.name for path in out.iterdir()} == {*FILES, "manifest.json", "README.md", "SHA256SUMS"}
    return out


def digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.gguf")}


def test_one_walk_serves_the_ladder_and_each_level_is_what_convert_makes(
    ladder: Path, run, merge: Path, tmp_path: Path
) -> None:
    for name, quant in zip(FILES, ("Q4_K_S", "Q5_K_S")):
        path = tmp_path / name
        asked = (*LEVELS[4:], "--quant", quant, *FEW, "--calib-original")
        assert run("convert", merge, *asked, "-o", path).exit_code == 0
        assert path.read_bytes() == (ladder / name).read_bytes()


def test_manifest_and_card_say_how(ladder: Path) -> None:
    for level in json.loads((ladder / "manifest.json").read_text())["levels"]:
        assert level["recipe"]["calib"] == "calib.txt"
        assert level["recipe"]["keys"]["gguf_moe.method"] == "gptq"
        assert level["recipe"]["keys"]["gguf_moe.gptq.text_sha256"] == [DIGEST]
    card = (ladder / "README.md").read_text()
    assert f"Q4_K_S, Q5_K_S were chosen with error feedback (GPTQ) on calib.txt (SHA-256 {DIGEST}): " in card
    assert "byte for byte" not in card


def test_the_second_run_has_nothing_to_do_and_another_text_makes_anew(ladder: Path, run, merge: Path) -> None:
    before = digests(ladder)
    result = run("export", merge, *LEVELS, *FEW, "-o", ladder)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.count(" is complete") == 2
    result = run("export", merge, *LEVELS[2:], *FEW, "--calib", EVAL, "-o", ladder)
    assert f"{FILES[1]} is begun anew" in result.stdout
    after = digests(ladder)
    assert after[FILES[0]] == before[FILES[0]]
    assert after[FILES[1]] != before[FILES[1]]
    other = hashlib.sha256(EVAL.read_bytes()).hexdigest()
    assert values(ladder / FILES[1])["gguf_moe.gptq.text_sha256"] == [other]
    card = (ladder / "README.md").read_text()
    assert DIGEST in card
    assert other in card
    run("export", merge, *LEVELS, *FEW, "-o", ladder)
    assert digests(ladder) == before


def test_on_quantized_layers_each_level_has_its_own_walk(run, merge: Path, tmp_path: Path) -> None:
    result = run("export", merge, *LEVELS, *FEW, "--calib-quantized", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr.count(" on 2 windows of 512 tokens") == 2
    assert result.stderr.count(": error feedback in ") == 2
    path = tmp_path / "one.gguf"
    assert run("convert", merge, *LEVELS[2:], *FEW, "-o", path).exit_code == 0
    assert path.read_bytes() == (tmp_path / "out" / FILES[1]).read_bytes()


def test_a_level_that_goes_meanwhile_is_not_made_without_the_method(
    run, merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Method._choose

    def lose(method: Method, *arguments: object) -> None:
        choose(method, *arguments)
        (tmp_path / FILES[0]).unlink()

    assert run("export", merge, *LEVELS[:2], *LEVELS[4:], *FEW, "-o", tmp_path).exit_code == 0
    monkeypatch.setattr(Method, "_choose", lose)
    result = run("export", merge, *LEVELS, *FEW, "-o", tmp_path)
    said = f"{tmp_path / FILES[0]}: changed while codes were chosen; run again\n"
    assert (result.exit_code, said in result.stderr) == (1, True)
    assert not list(tmp_path.glob("*.gguf"))


def test_an_interrupted_ladder_is_taken_up(ladder: Path, run, merge: Path, tmp_path: Path, monkeypatch) -> None:
    out, finish, done = tmp_path / "out", LayerFile.finish, []

    def stop(file: LayerFile) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        finish(file)
        done.append(file.layer)

    with monkeypatch.context() as patched:
        patched.setattr(LayerFile, "finish", stop)
        result = run("export", merge, *LEVELS, *FEW, "-o", out)
    assert "interrupted: 3 of 4 layers have their codes; the same command goes on behind them\n" in result.stderr
    assert {path.name for path in out.iterdir()} == {f"{name}.gptq" for name in FILES}
    result = run("export", merge, *LEVELS, *FEW, "-o", out)
    assert result.exit_code == 0
    assert result.stderr.count(" on 2 windows of 512 tokens") == 1  # for the second level
    assert not list(out.glob("*.gptq"))
    assert digests(out) == digests(ladder)


def test_codes_of_a_level_that_was_finished_in_a_stopped_run_go_too(run, merge: Path, tmp_path: Path) -> None:
    """A kill between the names of two levels leaves both levels' codes."""
    out = tmp_path / "out"
    cli_export = sys.modules["gguf_moe.cli.export"]

    def stop(*arguments: object, **options: object) -> None:
        run_plans(*arguments, **options)
        raise KeyboardInterrupt

    run_plans = cli_export.run_plans
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cli_export, "run_plans", stop)
        run("export", merge, *LEVELS[:2], *LEVELS[4:], *FEW, "-o", out)
    assert [path.name for path in out.glob("*.gptq")] == [f"{FILES[0]}.gptq"]
    result = run("export", merge, *LEVELS, *FEW, "-o", out)
    assert f"{FILES[0]} is complete" in result.stdout
    assert not list(out.glob("*.gptq"))


def test_an_export_is_validated_and_its_own_text_warned_of(run, merge: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(CALIB.read_text()[:9000])
    asked = (*LEVELS[2:], "--method", "gptq", "--calib", text)
    result = run("export", merge, *asked, "--validate", text, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "its codes were chosen from this very text, short.txt" in result.stderr
    [level] = json.loads((tmp_path / "out" / "validation.json").read_text())["files"]
    assert 0 < level["kld_mean"] < 0.1
    assert f"| {level['kld_mean']:.5f} |" in (tmp_path / "out" / "README.md").read_text()


def test_it_is_validated_and_warned_of_its_own_text(ladder: Path, run, merge: Path, tmp_path: Path) -> None:
    text = tmp_path / "renamed.txt"
    text.write_bytes(CALIB.read_bytes())
    result = run("validate", merge, ladder / FILES[0], "--text", text, "--ctx", 64, "--chunks", 2)
    said = "its codes were chosen from this very text, renamed.txt; its figures are better here than elsewhere"
    assert f"{FILES[0]}: {said}" in result.stderr


def test_a_file_in_the_place_of_the_directory(run, merge: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    result = run("export", merge, *LEVELS, *FEW, "-o", tmp_path / "out")
    said = "out: is a file, expected a directory for the levels; name another with --output\n"
    assert (result.exit_code, result.stderr) == (1, f"gguf-moe: {tmp_path}/{said}")


def test_what_a_card_says_of_mixed_and_damaged_manifests() -> None:
    file = ExportedFile("a.gguf", 1, "0" * 64, "f", 1)

    def section(*recipes: dict) -> str:
        levels = [Level(f"Q{n}", (file,), 4.0, {}, "one", recipe) for n, recipe in enumerate(recipes)]
        return making_section(Manifest(tuple(levels)))

    keys = {"gguf_moe.method": "gptq", "gguf_moe.gptq.text_sha256": ["<b>"]}
    plain = "Quantized tensors are byte for byte what llama.cpp's converter and quantizer make of them."
    assert plain in section({}, {"keys": 3}, {"keys": {}})
    mixed = section({"keys": keys, "calib": "<i>.txt"}, {})
    assert "The codes of Q0 were chosen with error feedback (GPTQ) on &lt;i&gt;.txt (SHA-256 &lt;b&gt;): " in mixed
    assert "Quantized tensors of the others are byte for byte" in mixed
    assert "on a text (SHA-256 not known)" in section({"keys": {**keys, "gguf_moe.gptq.text_sha256": 1}})
