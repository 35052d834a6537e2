"""`gguf-moe validate` as a user runs it: what it prints and writes, what it refuses, and going on after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DATA, MERGE, bundled
from gguf_files import sharded
from test_golden import GOLDEN

from gguf_moe.cli.validate import WIDTH
from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation import torch_engine
from gguf_moe.evaluation.engines import Settings
from gguf_moe.evaluation.events import Notice, Progress, Started
from gguf_moe.evaluation.validate import validate
from gguf_moe.evaluation.weights import Weights

TEXT = DATA / "text" / "eval.txt"
SHORT = ("--ctx", 64, "--chunks", 5)
FILE_NAMES = [
    *("name", "quant", "size_bytes", "bits_per_weight", "ppl", "ppl_error", "ppl_ratio", "ppl_ratio_error"),
    *("kld_mean", "kld_error", "kld_median", "kld_p90", "kld_p95", "kld_p99", "kld_p999", "kld_max"),
    *("dp_mean", "dp_rms", "same_top", "routing"),
]
ROUTING_NAMES = ["same_set", "same_first", "jaccard", "weight_l1", "load"]


@pytest.fixture
def small_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a sweep, whatever the memory."""
    real = torch_engine.plan_memory
    monkeypatch.setattr(torch_engine, "plan_memory", lambda *a: replace(real(*a), sweep=2, group=1))


def report_of(run, path: Path, *arguments: object) -> dict:
    result = run("validate", *arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def test_the_report_has_the_promised_names(run, made, tmp_path: Path) -> None:
    files = [made("json", level) for level in ("Q2_K", "Q8_0")]
    report = report_of(run, tmp_path / "r.json", MERGE, *files, "--text", TEXT, *SHORT, "--bootstrap", 20)
    assert {"base", "text", "ctx", "chunks", "tokens", "files"} <= report.keys()
    assert (report["ctx"], report["chunks"], report["tokens"], report["text"]["name"]) == (64, 5, 320, "eval.txt")
    for file in report["files"]:
        assert set(FILE_NAMES) <= file.keys()
        assert set(ROUTING_NAMES) <= file["routing"].keys()
    small, large = report["files"]
    assert small["kld_mean"] > large["kld_mean"] > 0
    assert small["routing"]["same_set"] < large["routing"]["same_set"] <= 1
    assert small["intervals"]["kld_median"][0] <= small["kld_median"] <= small["intervals"]["kld_median"][1]


def test_a_gguf_base_gives_what_its_checkpoint_gives(run, made, tmp_path: Path) -> None:
    file = made("json", "Q4_K_M")
    want = report_of(run, tmp_path / "a.json", MERGE, file, "--text", TEXT, *SHORT)
    have = report_of(run, tmp_path / "b.json", made("json", "BF16"), file, "--text", TEXT, *SHORT)
    assert have["files"] == want["files"]


def test_the_table_marks_and_chooses(run, made) -> None:
    files = [made("json", level) for level in ("Q2_K", "Q4_K_M", "Q8_0")]
    arguments = ("validate", MERGE, *files, "--text", TEXT, *SHORT)
    result = run(*arguments, "--max-kld", 0.02)
    head, *rows = result.stdout.splitlines()
    assert [row.split()[:2] for row in rows[:3]] == [["*", level] for level in ("Q2_K", "Q4_K_M", "Q8_0")]
    assert rows[3].split()[:3] == ["base", "18.37", "MB"]
    assert head.split()[0] == "level"
    assert max(map(len, (head, *rows))) <= WIDTH
    assert "near to the base, TidePool-4x4M-v1" in rows[4]
    chosen = "the smallest file with a mean KL of at most 0.02: json-Q4_K_M.gguf, 5.84 MB"
    assert result.stdout.splitlines()[-1] == chosen
    none = run(*arguments, "--max-kld", 1e-9, "--check")
    assert (none.exit_code, none.stderr.splitlines()[-1]) == (1, "gguf-moe: no file has a mean KL of at most 1e-09")
    assert run(*arguments, "--max-kld", 1e-9).exit_code == 0
    assert run(*arguments, "--check").exit_code == 2


def test_files_of_one_name_are_told_apart(run, made, tmp_path: Path) -> None:
    paths = [tmp_path / name / "model.gguf" for name in "abc"]
    for path, level in zip(paths, ("Q4_K_M", "Q2_K", "Q8_0")):
        path.parent.mkdir()
        shutil.copy(made("json", level), path)
    with paths[1].open("ab") as file:
        file.write(bytes(10**7))  # larger than what is better
    report = report_of(run, tmp_path / "r.json", MERGE, *paths, made("json", "Q4_0"), "--text", TEXT, *SHORT)
    assert [file["name"] for file in report["files"]] == [*map(str, paths), "json-Q4_0.gguf"]
    assert [name for name in report["pareto"] if name in map(str, paths)] == [str(paths[0]), str(paths[2])]


def test_of_shards_the_first_counts(run, made, tmp_path: Path) -> None:
    paths = sharded(made("json", "Q2_K"), tmp_path / "shards", 3)
    report = report_of(run, tmp_path / "r.json", MERGE, *paths[::-1], paths[0], "--text", TEXT, *SHORT)
    assert [file["name"] for file in report["files"]] == [paths[0].name]
    alone = run("validate", MERGE, *paths[1:], "--text", TEXT, *SHORT)
    assert (alone.exit_code, alone.stdout) == (1, "")
    assert f"{paths[1]}: is shard 2 of 3; give the first, {paths[0].name}" in alone.stderr


@pytest.mark.usefixtures("small_sweeps")
def test_sweeps_change_nothing_and_the_base_is_run_once(made, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [made("json", level) for level in ("Q2_K", "Q4_K_M", "Q8_0")]
    read: list[Path] = []
    matrix = Weights.matrix
    monkeypatch.setattr(Weights, "matrix", lambda w, *a, **k: (read.append(w.source.path), matrix(w, *a, **k))[1])
    one = validate(MERGE, files[:1], TEXT, Settings(context=64, chunks=5))
    of_base = read.count(MERGE)
    read.clear()
    three = validate(MERGE, files, TEXT, Settings(context=64, chunks=5))
    assert read.count(MERGE) == of_base == read.count(files[0])
    monkeypatch.undo()
    assert three["files"][0] == one["files"][0]
    whole = validate(MERGE, files[:1], TEXT, Settings(context=64, chunks=5))
    for name in FILE_NAMES[4:-1]:
        assert whole["files"][0][name] == pytest.approx(one["files"][0][name], rel=1e-3, abs=1e-6), name


@pytest.mark.usefixtures("small_sweeps")
@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_stopped_run_goes_on_behind_its_finished_sweeps(sweeps: int, made, tmp_path: Path) -> None:
    files, state = [made("json", "Q2_K")], tmp_path / "state"
    settings = Settings(context=64, chunks=5, state=state)
    want = validate(MERGE, files, TEXT, replace(settings, state=None))

    def stop(event: object) -> None:
        if isinstance(event, Progress) and event.done > (2 * sweeps + 0.5) / 5 * event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(MERGE, files, TEXT, settings, stop)
    seen: list[object] = []
    assert validate(MERGE, files, TEXT, settings, seen.append) == want
    assert [event.done for event in seen if isinstance(event, Started)] == [2 * sweeps]
    assert validate(MERGE, files, TEXT, replace(settings, context=32), seen.append)["ctx"] == 32
    assert "begun anew, the earlier run had another ctx" in next(e.text for e in seen if isinstance(e, Notice))
    whole = state.read_bytes()
    entry = whole.rindex(b"PK\1\2")  # of the last array in the archive's directory: flags at 8, compression at 10
    odd = [whole[: entry + at] + bytes([value]) + whole[entry + at + 1 :] for at, value in ((8, 64), (10, 8))]
    for damaged in (b"", b"PK\3\4 no", whole[: len(whole) // 2], *odd):
        state.write_bytes(damaged)
        with pytest.raises(GgufMoeError, match="not a whole state file"):
            validate(MERGE, files, TEXT, replace(settings, context=32))
        assert state.read_bytes() == damaged


@pytest.mark.usefixtures("small_sweeps")
def test_a_file_that_changes_meanwhile_is_refused(made, tmp_path: Path) -> None:
    path, state = tmp_path / "model.gguf", tmp_path / "state"
    shutil.copy(made("json", "Q8_0"), path)

    def make_anew(event: object) -> None:
        if isinstance(event, Progress) and event.done > 0.6 * event.total:
            shutil.copy(made("json", "Q8_0"), path)

    with pytest.raises(GgufMoeError, match=r"model\.gguf: changed while it was evaluated"):
        validate(MERGE, [path], TEXT, Settings(context=64, chunks=4, state=state), make_anew)
    with np.load(state) as arrays:
        assert len(arrays["1.positions"]) == 2, "the sweep before"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_report_is_not_lost_with_the_table_nor_the_table_with_a_report(run, made, tmp_path: Path) -> None:
    arguments = ["validate", MERGE, made("json", "Q2_K"), "--text", TEXT, *SHORT, "--json", tmp_path / "r.json"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gguf_moe", *map(str, arguments)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "gguf-moe: [Errno 28] No space left on device")
    assert json.loads((tmp_path / "r.json").read_text())["chunks"] == 5
    (tmp_path / "plots" / "perplexity.png").mkdir(parents=True)
    result = run(*arguments, "--plots", tmp_path / "plots")
    assert (result.exit_code, "perplexity.png: not written: " in result.stderr) == (1, True)
    assert "Q2_K" in result.stdout


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("make_report", "gguf-moe: interrupted; the same command goes on behind the last finished sweep\n"),
        ("write_state", "gguf-moe: interrupted before a sweep was finished\n"),
    ],
)
def test_an_interruption_says_what_is_kept(
    step: str, said: str, run, made, small_sweeps, tmp_path: Path, monkeypatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gguf_moe.evaluation.validate.{step}", stop)
    result = run("validate", MERGE, made("json", "Q2_K"), "--text", TEXT, *SHORT, "--resume", tmp_path / "state")
    assert said in result.stderr


def test_what_is_refused(run, made, saved, tmp_path: Path) -> None:
    file = made("json", "Q2_K")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    other = bundled().save(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = dict(vocabulary["model"]["vocab"])
    a, b = (next(t for t, n in tokens.items() if n == number) for number in (500, 501))
    tokens[a], tokens[b] = tokens[b], tokens[a]
    vocabulary["model"]["vocab"] = tokens
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    cases = [
        ((MERGE, file, "--text", short), 1, "short.txt: "),
        ((MERGE, file, "--text", tmp_path / "none.txt"), 1, "UTF-8 text: No such file or directory\n"),
        ((MERGE, tmp_path / "none.gguf", "--text", TEXT), 1, "none.gguf"),
        ((other, file, "--text", TEXT), 1, "tokenizer.ggml.tokens[500] is "),
        ((saved("qwen2"), file, "--text", TEXT), 1, "general.architecture is 'llama', expected 'qwen2' as in the base"),
        ((MERGE, file, "--text", TEXT, "--memory", "1M"), 2, "--memory: 1.00 MB are allowed"),
        ((MERGE, file, "--text", TEXT, "--device", "tpu9"), 2, "--device tpu9: torch cannot use it"),
        ((MERGE, file, "--text", TEXT, "--json", tmp_path / "no" / "r.json"), 1, "cannot be written: No such file"),
        ((MERGE, file, "--text", TEXT, "--html", tmp_path), 1, f"{tmp_path}: is a directory"),
        ((MERGE, file, "--text", TEXT, "--plots", file), 1, f"{file}: is no directory"),
        ((MERGE, file, "--text", TEXT, "--device", "vulkan"), 2, "from the 'Vulkan' backend\n"),
        ((MERGE, file, "--text", TEXT, "--device", "hpu"), 2, "--device hpu: torch cannot use it"),
        ((MERGE, file, "--text", TEXT, "--device", "meta"), 2, "--device meta: torch cannot use it"),
        ((MERGE, file, "--text", TEXT, "--resume", short), 1, "not a whole state file; name"),
        ((MERGE, "--text", TEXT), 2, "FILES"),
    ]
    before = file.read_bytes()
    for arguments, code, message in cases:
        result = run("validate", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), (arguments, result.stderr)
    assert (file.read_bytes(), short.read_text()) == (before, "too short")


def test_levels_of_one_name_are_told_apart(run, made, tmp_path: Path) -> None:
    file, other = made("json", "Q2_K"), tmp_path / "json-Q2_K.gguf"
    shutil.copy(file, other)
    result = run("validate", MERGE, file, other, "--text", TEXT, *SHORT)
    labels = [line.split()[1] for line in result.stdout.splitlines()[1:3]]
    assert labels == [str(file.with_suffix("")), str(other.with_suffix(""))]


def test_nothing_is_replaced_but_reports(run, made, tmp_path: Path) -> None:
    file, text, other = made("json", "Q2_K"), tmp_path / "text.txt", tmp_path / "manifest.json"
    shutil.copy(TEXT, text)
    other.write_text(json.dumps({"program": {"name": "gguf-moe"}}, indent=1))
    before = [path.read_bytes() for path in (file, text, other)]
    arguments = ("validate", MERGE, file, "--text", text, *SHORT)
    same, link = tmp_path / "same", tmp_path / "sub" / ".." / "same"
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (("--json", file), 1, f"{file}: exists and is no report of gguf-moe"),
        (("--html", text), 1, f"{text}: exists and is no report of gguf-moe"),
        (("--json", other), 1, f"{other}: exists and is no report of gguf-moe"),
        (("--json", tmp_path / "pipe"), 1, "pipe: is no regular file"),
        (("--json", same, "--html", link), 2, "one path is given for two files to write"),
        (("--json", same, "--resume", same), 2, "one path is given for two files to write"),
    ]
    for more, code, message in cases:
        result = run(*arguments, *more)
        assert (result.exit_code, message in result.stderr) == (code, True), (more, result.stderr)
        assert result.stdout == "", "refused before the work"
    assert [path.read_bytes() for path in (file, text, other)] == before
    (tmp_path / "empty").touch()
    for _ in range(2):
        assert run(*arguments, "--json", tmp_path / "empty", "--html", tmp_path / "r.html").exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files from anyone")
@pytest.mark.parametrize("option", ["--json", "--html", "--plots", "--resume"])
def test_where_nothing_can_be_written_it_says_so_before_the_work(option: str, run, made) -> None:
    result = run("validate", MERGE, made("json", "Q2_K"), "--text", TEXT, *SHORT, option, "/proc/r")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "/proc/r: cannot be written: " in result.stderr


def test_a_text_that_the_importance_matrix_knows_is_warned_of(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(GOLDEN)
    run("convert", MERGE, "--quant", "Q2_K", "--imatrix", "tidepool.imatrix.gguf", "-o", tmp_path / "weighed.gguf")
    calibration = DATA / "text" / "calib.txt"
    warned = run("validate", MERGE, tmp_path / "weighed.gguf", "--text", calibration, *SHORT)
    assert "weighed.gguf: its importance matrix was made from a text called calib.txt too" in warned.stderr
    assert "importance" not in run("validate", MERGE, tmp_path / "weighed.gguf", "--text", TEXT, *SHORT).stderr


def test_a_text_of_that_hash_is_warned_of_whatever_its_name(run, tmp_path: Path) -> None:
    key = f"gguf_moe.imatrix.text_sha256=str:{hashlib.sha256(TEXT.read_bytes()).hexdigest()}"
    run("convert", MERGE, "--quant", "Q2_K", "--override-kv", key, "-o", tmp_path / "hashed.gguf")
    text = shutil.copy(TEXT, tmp_path / "renamed.txt")
    warned = run("validate", MERGE, tmp_path / "hashed.gguf", "--text", text, *SHORT)
    assert "hashed.gguf: its importance matrix was made from this very text, renamed.txt" in warned.stderr
    text.write_text(TEXT.read_text() + "\nmore")
    assert "importance" not in run("validate", MERGE, tmp_path / "hashed.gguf", "--text", text, *SHORT).stderr


def test_windows_beyond_what_the_model_is_made_for_are_warned_of(run, made) -> None:
    arguments = ("validate", MERGE, made("json", "Q2_K"), "--text", TEXT, "--chunks", 1, "--ctx")
    warned = run(*arguments, 513)
    assert warned.exit_code == 0
    assert "warning: TidePool-4x4M-v1: is made for 512 tokens, windows of 513 tell little" in warned.stderr
    assert "warning" not in run(*arguments, 512).stderr


def test_without_torch_the_command_says_how_to_get_it(made) -> None:
    code = "import sys; sys.modules['torch'] = None; from gguf_moe.cli import main; main()"
    arguments = ["validate", str(MERGE), str(made("json", "Q2_K")), "--text", str(TEXT)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = "gguf-moe: validation needs torch, which is not installed: pip install 'gguf-moe[eval]'\n"
    assert done.stderr == message


def test_llama_cpp_as_the_engine(run, made, tmp_path: Path) -> None:
    arguments = (made("json", "BF16"), made("json", "Q2_K"), "--text", TEXT, *SHORT)
    torch = report_of(run, tmp_path / "a.json", *arguments)
    other = report_of(run, tmp_path / "b.json", *arguments, "--engine", "llama.cpp")
    assert other["files"][0]["routing"] is None
    assert other["files"][0]["ppl"] == pytest.approx(torch["files"][0]["ppl"], rel=0.02)
    assert "activations" in other["note"]


def test_an_export_with_its_validation(run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:6000])
    out = tmp_path / "out"
    arguments = ("export", MERGE, "-o", out, "--quant", "Q2_K", "--quant", "Q8_0")
    assert run(*arguments, "--validate", tmp_path / "none.txt").exit_code == 1
    assert not out.exists()
    assert run(*arguments, "--validate", text).exit_code == 0
    report = json.loads((out / "validation.json").read_text())
    ratio = f"| {report['files'][0]['ppl_ratio']:.4f} |"
    assert ratio in (out / "README.md").read_text()
    assert report["text"]["sha256"] in (out / "README.md").read_text()
    assert run(*arguments).exit_code == 0
    assert ratio in (out / "README.md").read_text(), "the last report's figures stay"
    run(*arguments, "--pure")
    assert ratio not in (out / "README.md").read_text(), "the files are others now"
    (out / "validation.json").write_text("cut sho")
    damaged = run(*arguments)
    assert (damaged.exit_code, "validation.json: " in damaged.stderr) == (0, True)
    assert "the card shows no figures" in damaged.stderr
    assert not list(out.glob("*.partial"))


def test_an_export_refuses_beforehand_what_its_validation_would(run, tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", ("export", MERGE, "-o", tmp_path / "out", "--quant", "Q2_K", "--validate", TEXT)
    result = run(*arguments, "--experts-used", 1)
    assert result.exit_code == 1
    assert "llama.expert_used_count is 1, expected 2 as in the base" in result.stderr
    assert not out.exists()
    out.mkdir()
    (out / "validation.json").write_text('{"mine": 1}')
    result = run(*arguments)
    assert (result.exit_code, "validation.json: exists and is no report" in result.stderr) == (1, True)
    assert [path.name for path in out.iterdir()] == ["validation.json"]


def test_an_export_has_its_card_however_its_validation_ends(run, tmp_path: Path, monkeypatch) -> None:
    def stop(*arguments: object) -> None:
        raise GgufMoeError("stopped")

    monkeypatch.setattr(Weights, "matrix", stop)
    result = run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K", "--validate", TEXT)
    assert (result.exit_code, "stopped" in result.stderr) == (1, True)
    assert "Q2_K" in (tmp_path / "README.md").read_text()


def test_page_and_plots(run, made, tmp_path: Path) -> None:
    files = [made("json", level) for level in ("Q2_K", "Q8_0")]
    result = run(
        *("validate", MERGE, *files, "--text", TEXT, *SHORT),
        *("--html", tmp_path / "page.html", "--plots", tmp_path / "plots"),
    )
    assert result.exit_code == 0, result.output
    assert "<svg" in (tmp_path / "page.html").read_text()
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png", ".svg"}
    shutil.rmtree(tmp_path / "plots")
    merge = shutil.copytree(MERGE, tmp_path / "merge")
    assert run("validate", merge, *files, "--text", TEXT, *SHORT, "--plots", merge).exit_code == 0
    assert (merge / "kl-size.svg").exists()
