"""`gguf-moe validate` as a user runs it: what it prints and writes, what it refuses, and going on after a stop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import DATA, MERGE, bundled
from test_golden import GOLDEN

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
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[1] for row in rows if row and row[0] == "*" and row[1].endswith(".gguf")] == [f.name for f in files]
    chosen = "the smallest file with a mean KL of at most 0.02: json-Q4_K_M.gguf, 5.84 MB"
    assert result.stdout.splitlines()[-1] == chosen
    none = run(*arguments, "--max-kld", 1e-9, "--check")
    assert (none.exit_code, none.stderr.splitlines()[-1]) == (1, "gguf-moe: no file has a mean KL of at most 1e-09")
    assert run(*arguments, "--max-kld", 1e-9).exit_code == 0
    assert run(*arguments, "--check").exit_code == 2


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
    state.write_bytes(b"PK\x03\x04 no")
    with pytest.raises(GgufMoeError, match="not a whole state file"):
        validate(MERGE, files, TEXT, settings)


def test_what_is_refused(run, made, saved, tmp_path: Path) -> None:
    file = made("json", "Q2_K")
    (tmp_path / "short.txt").write_text("too short")
    other = bundled().save(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = dict(vocabulary["model"]["vocab"])
    a, b = (next(t for t, n in tokens.items() if n == number) for number in (500, 501))
    tokens[a], tokens[b] = tokens[b], tokens[a]
    vocabulary["model"]["vocab"] = tokens
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    cases = [
        ((MERGE, file, "--text", tmp_path / "short.txt"), 1, "short.txt: "),
        ((MERGE, file, "--text", tmp_path / "none.txt"), 1, "none.txt: "),
        ((MERGE, tmp_path / "none.gguf", "--text", TEXT), 1, "none.gguf"),
        ((other, file, "--text", TEXT), 1, "tokenizer.ggml.tokens[500] is "),
        ((saved("qwen2"), file, "--text", TEXT), 1, "general.architecture is 'llama', expected 'qwen2' as in the base"),
        ((MERGE, file, "--text", TEXT, "--memory", "1M"), 2, "--memory: 1000000 bytes are allowed"),
        ((MERGE, file, "--text", TEXT, "--device", "tpu9"), 2, "--device tpu9: torch cannot use it"),
        ((MERGE, file, "--text", TEXT, "--json", tmp_path / "no" / "r.json"), 1, "no such directory"),
        ((MERGE, file, "--text", TEXT, "--html", tmp_path), 1, f"{tmp_path}: is a directory"),
        ((MERGE, file, "--text", TEXT, "--plots", file), 1, f"{file}: is no directory"),
        ((MERGE, "--text", TEXT), 2, "FILES"),
    ]
    for arguments, code, message in cases:
        result = run("validate", *arguments)
        assert (result.exit_code, message in result.stderr) == (code, True), (arguments, result.stderr)


def test_a_text_that_the_importance_matrix_knows_is_warned_of(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(GOLDEN)
    run("convert", MERGE, "--quant", "Q2_K", "--imatrix", "tidepool.imatrix.gguf", "-o", tmp_path / "weighed.gguf")
    calibration = DATA / "text" / "calib.txt"
    warned = run("validate", MERGE, tmp_path / "weighed.gguf", "--text", calibration, *SHORT)
    assert "weighed.gguf: its importance matrix was made from a text called calib.txt too" in warned.stderr
    assert "importance" not in run("validate", MERGE, tmp_path / "weighed.gguf", "--text", TEXT, *SHORT).stderr


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
    assert not list(out.glob("*.partial"))


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
