"""`gguf-moe imatrix` as a user runs it: what it prints and writes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from checkpoints import DATA, MERGE
from gguf_manifest import manifest
from test_golden import GOLDEN

from gguf_moe.imatrix import read_imatrix

CALIB, EVAL = DATA / "text" / "calib.txt", DATA / "text" / "eval.txt"
GGUF, LEGACY = GOLDEN / "tidepool.imatrix.gguf", GOLDEN / "tidepool.imatrix.dat"
FEW = ("--text", CALIB, "--ctx", 64, "--chunks", 4)  # 256 tokens, about 128 for an expert


def test_it_collects_writes_and_says_what_each_expert_saw(run, tmp_path: Path) -> None:
    out, found = tmp_path / "out.gguf", tmp_path / "coverage.json"
    result = run("imatrix", MERGE, *FEW, "-o", out, "--json", found, "--plots", tmp_path / "plots", "--min-tokens", 100)
    assert result.exit_code == 0, result.output
    matrix = read_imatrix(out)
    assert (len(matrix.entries), matrix.chunks, matrix.chunk_size) == (32, 4, 64)
    assert matrix.texts == (hashlib.sha256(CALIB.read_bytes()).hexdigest(),)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["layer", "expert", "tokens", "share", "channels", "inner", "channels"]
    assert result.stdout.splitlines()[-1] == f"{out} written: 32 tensors, {CALIB}, 4 windows of 64 tokens"
    told = json.loads(found.read_text())
    counts = {layer: matrix.entries[f"blk.{layer}.ffn_up_exps.weight"].counts.tolist() for layer in range(4)}
    for row, line in zip(told["experts"], rows[1:17], strict=True):
        assert row["tokens"] == counts[row["layer"]][row["expert"]] == int(line[2])
        assert row["share"] == pytest.approx(row["tokens"] / 512)
        assert 1 < row["channels"] <= 256
        assert 1 < row["inner_channels"] <= 512
        assert (line[-1] == "cold") == (row["tokens"] < 100) == ([row["layer"], row["expert"]] in told["cold"])
    assert 0 < len(told["cold"]) < 16
    cold = [(layer, expert) for layer, tokens in counts.items() for expert, n in enumerate(tokens) if n < 100]
    for layer, expert in cold:
        line = next(line for line in result.stderr.splitlines() if f"layer {layer}: fewer than 100 tokens" in line)
        assert f"{expert} ({counts[layer][expert]})" in line
    for remedy in ("--all-experts", "longer text", "--cold-experts=ones, mean or base"):
        assert remedy in result.stderr
    assert "at most" in result.stderr.splitlines()[0]
    ElementTree.parse(tmp_path / "plots" / "imatrix-coverage.svg")
    assert (tmp_path / "plots" / "imatrix-coverage.png").stat().st_size > 5000


def test_a_level_knows_the_text_and_validate_warns(run, tmp_path: Path) -> None:
    out, level = tmp_path / "im.gguf", tmp_path / "level.gguf"
    assert run("imatrix", MERGE, *FEW, "-o", out).exit_code == 0
    assert run("convert", MERGE, "--quant", "Q2_K_S", "--imatrix", out, "-o", level).exit_code == 0
    keys = manifest(level)["kv"]
    assert keys["gguf_moe.imatrix.text_sha256"]["value"] == [hashlib.sha256(CALIB.read_bytes()).hexdigest()]
    other = tmp_path / "renamed.txt"
    other.write_bytes(CALIB.read_bytes())
    warned = run("validate", MERGE, level, "--text", other, "--ctx", 64, "--chunks", 2).stderr
    assert "level.gguf: its importance matrix was made from this very text, renamed.txt" in warned
    silent = run("validate", MERGE, level, "--text", EVAL, "--ctx", 64, "--chunks", 2).stderr
    assert "importance matrix" not in silent


def test_both_forms_and_their_sum(run, tmp_path: Path) -> None:
    ours, legacy, both = (tmp_path / name for name in ("a.gguf", "a.dat", "both.gguf"))
    assert run("imatrix", MERGE, *FEW, "-o", ours).exit_code == 0
    assert run("imatrix", MERGE, *FEW, "-o", legacy, "--format", "dat").exit_code == 0
    assert read_imatrix(legacy).datasets == (str(CALIB),)
    result = run("imatrix", "--merge", ours, GGUF, "-o", both)
    assert result.exit_code == 0, result.output
    one, two, total = (read_imatrix(path) for path in (ours, GGUF, both))
    assert total.datasets == (str(CALIB), "calib.txt")
    name = "blk.1.ffn_down_exps.weight"
    assert (total.entries[name].counts == one.entries[name].counts + two.entries[name].counts).all()
    assert (total.entries[name].squares == one.entries[name].squares + two.entries[name].squares).all()
    converted = run("imatrix", "--merge", GGUF, "--format", "dat", "-o", tmp_path / "converted.dat")
    assert converted.exit_code == 0
    assert (tmp_path / "converted.dat").read_bytes() == LEGACY.read_bytes()


def test_show_prints_what_a_matrix_holds(run) -> None:
    lines = run("imatrix", "--show", GGUF).stdout.splitlines()
    assert lines[0] == f"{GGUF}: 32 tensors, calib.txt, 79 windows of 512 tokens"
    row = next(line.split() for line in lines if line.startswith("blk.3.ffn_down_exps.weight"))
    assert row[1:4] == ["4", "512", "80896"]
    entry = read_imatrix(GGUF).entries["blk.2.ffn_up_exps.weight"]
    assert any(line.split()[:3] == ["2", "1", str(entry.counts[1])] for line in lines)
    legacy = run("imatrix", "--show", LEGACY).stdout
    assert "channels" not in legacy  # it does not tell experts apart
    assert f"{LEGACY}: 32 tensors, calib.txt, 79 windows" in legacy


def test_every_expert_sees_every_token(run, tmp_path: Path) -> None:
    plain, router, even = (tmp_path / name for name in ("plain.gguf", "router.gguf", "even.gguf"))
    run("imatrix", MERGE, *FEW, "-o", plain)
    result = run("imatrix", MERGE, *FEW, "--all-experts", "-o", router)
    assert "warning" not in result.stderr  # no expert is cold
    run("imatrix", MERGE, *FEW, "--all-experts", "--weigh", "even", "-o", even)
    matrices = [read_imatrix(path) for path in (plain, router, even)]
    name = "blk.0.ffn_down_exps.weight"
    assert [m.entries[name].counts.sum() for m in matrices] == [512, 1024, 1024]
    assert len({m.entries[name].importance().tobytes() for m in matrices}) == 3
    note = "every expert saw every token, weighted by the router's probability"
    assert matrices[1].notes == (note,)
    assert note in run("imatrix", "--show", router).stdout
    assert matrices[0].notes == ()


def test_a_longer_run_is_kept_and_goes_on(run, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out.gguf"
    result = run("imatrix", MERGE, *FEW, "-o", out, "--resume", state, "--save-every", 3)
    assert ", 3 a sweep" in result.stderr
    assert not state.exists()


def test_what_stands_in_is_told_and_warned_of_no_more(run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    result = run("imatrix", MERGE, *FEW, "-o", out, "--min-tokens", 100, "--cold-experts", "mean")
    assert (result.exit_code, "warning" in result.stderr) == (0, False)
    notes = read_imatrix(out).notes
    assert notes
    assert set(notes) <= set(result.stderr.splitlines())


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_was_collected_outlives_a_remedy_that_cannot_be(run, tmp_path: Path) -> None:
    out, plain = tmp_path / "out.gguf", tmp_path / "plain.gguf"
    result = run("imatrix", MERGE, *FEW, "-o", out, "--min-tokens", 9999, "--cold-experts", "mean")
    kept = tmp_path / "out.gguf.collected"
    assert (result.exit_code, len(result.stderr.splitlines()[1:])) == (1, 1)
    assert "has no expert with enough tokens to take the mean of; what was collected is in" in result.stderr
    assert not out.exists()
    assert run("imatrix", MERGE, *FEW, "-o", plain).exit_code == 0
    assert kept.read_bytes() == plain.read_bytes()
    assert run("imatrix", "--merge", kept, "--cold-experts", "ones", "--min-tokens", 9999, "-o", out).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-o", "x.gguf"), 2, "give one of --text, --merge and --show"),
        ((*FEW,), 2, "--output is missing"),
        ((*FEW, "--show"), 2, "give one of --text, --merge and --show"),
        ((*FEW, "-o", "x.gguf", MERGE), 2, "2 inputs, expected one; to add up matrices give --merge"),
        ((*FEW, "-o", "x.gguf", "--cold-experts", "base"), 2, "--cold-experts=base and --base-imatrix need each other"),
        ((*FEW, "-o", "x.gguf", "--weigh", "even"), 2, "--weigh is for --all-experts"),
        ((*FEW, "-o", "nowhere/x.gguf"), 1, "nowhere/x.gguf: cannot be written: No such file"),
        ((*FEW, "-o", "there.gguf"), 1, "there.gguf: exists; use --force to replace it"),
        (("--text", "absent.txt", "-o", "x.gguf"), 1, "absent.txt: "),
        (("--text", "short.txt", "-o", "x.gguf"), 1, "short.txt: 3 tokens, expected 1024 at least"),
    ],
)
def test_wrong_calls_are_refused_before_the_work(
    arguments: tuple, code: int, message: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_bytes(b"mine")
    Path("short.txt").write_text("hi\n")
    result = run("imatrix", MERGE, *arguments)
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1)
    assert message in result.stderr
    assert Path("there.gguf").read_bytes() == b"mine"
    assert not Path("x.gguf").exists()


def test_without_torch_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from gguf_moe.cli import main; main()"
    arguments = ["imatrix", str(MERGE), "--text", str(CALIB), "-o", str(tmp_path / "x.gguf")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    message = "gguf-moe: calibration needs torch, which is not installed: pip install 'gguf-moe[eval]'\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_the_text_and_the_input_are_not_written_over(run, tmp_path: Path) -> None:
    text = tmp_path / "calib.txt"
    text.write_bytes(CALIB.read_bytes())
    for arguments in ((MERGE, "--text", text, "-o", text), ("--merge", GGUF, "-o", GGUF)):
        result = run("imatrix", *arguments, "--force")
        assert result.exit_code == 1
        assert "is the input itself" in result.stderr
    assert text.read_bytes() == CALIB.read_bytes()
