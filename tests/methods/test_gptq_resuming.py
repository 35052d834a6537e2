"""Runs of `--method gptq` that are stopped, or find something else than they left: the same bytes, and no leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import bundled, with_experts
from gptq_runs import CALIB, EVAL, FEW, kept, one_layer

from gguf_moe.methods import gptq
from gguf_moe.methods.store import LOCK, LayerFile

pytestmark = pytest.mark.long
ASKED = ("--quant", "Q4_K_S", "--output-tensor-type", "Q4_0")


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_experts(bundled(), 4, layers=2).save(tmp_path_factory.mktemp("merge") / "two")


@pytest.fixture(scope="module")
def undisturbed(run, merge: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("undisturbed") / "x.gguf"
    assert run("convert", merge, *ASKED, *FEW, "-o", path).exit_code == 0
    return path.read_bytes()


def begun(merge: Path, target: Path, there: str) -> subprocess.Popen:
    """The command in a child, which has begun to write `there` in its directory when this returns."""
    arguments = ("convert", merge, *ASKED, *FEW, "-o", target)
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_moe", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = kept(target) / there
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return process


def stopped_behind(run, monkeypatch: pytest.MonkeyPatch, merge: Path, target: Path, layers: int, *more: object) -> str:
    """Interrupt a run when so many layers are done; what it says."""
    finish, done = LayerFile.finish, []

    def stop(file: LayerFile) -> None:
        if len(done) == layers:
            raise KeyboardInterrupt
        finish(file)
        done.append(file.layer)

    with monkeypatch.context() as patched:
        patched.setattr(LayerFile, "finish", stop)
        result = run("convert", merge, *ASKED, *FEW, *more, "-o", target)
    assert result.exit_code == 1
    assert not target.exists()
    return result.stderr


def layers_of(target: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in kept(target).glob("*.layer")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--device", "cdua"), "--device cdua: "),
        (("--memory", "1M", "--damping", 0.1), "--memory: "),
        (("--calib", "short.txt"), "short.txt: 3 tokens, expected 1024 at least"),
    ],
)
def test_a_call_that_is_refused_costs_no_layer(
    more: tuple, message: str, run, merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("hi\n")
    target = tmp_path / "x.gguf"
    stopped_behind(run, monkeypatch, merge, target, 1)
    before = layers_of(target)
    result = run("convert", merge, *ASKED, *FEW, *more, "-o", target)
    assert result.exit_code != 0
    assert message in result.stderr
    assert layers_of(target) == before != {}


@pytest.mark.parametrize(
    ("number", "there"),
    [(signal.SIGKILL, "1.partial"), (signal.SIGTERM, "0.layer"), (signal.SIGINT, "1.partial")],
    ids=["kill within a layer", "SIGTERM behind one", "Ctrl-C within one"],
)
def test_a_killed_run_is_taken_up(
    number: signal.Signals, there: str, run, merge: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    target = tmp_path / "x.gguf"
    process = begun(merge, target, there)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    said = "interrupted: 1 of 3 layers have their codes; the same command goes on behind them\n"
    assert (said in stderr) == (number != signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf.gptq"]
    before = layers_of(target)
    assert list(before) == ["0.layer"]
    seen = {}
    finish = LayerFile.finish
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerFile, "finish", lambda file: (finish(file), seen.update(layers_of(target))))
        result = run("convert", merge, *ASKED, *FEW, "-o", target)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    assert seen.items() >= before.items()
    assert target.read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_stop_just_when_a_layer_is_finished(run, merge: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "x.gguf"

    def stop(directory: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gguf_moe.methods.store.sync_directory", stop)
    result = run("convert", merge, *ASKED, *FEW, "-o", target)
    assert "interrupted: 1 of 3 layers have their codes" in result.stderr
    assert list(layers_of(target)) == ["0.layer"]


def test_nothing_is_kept_before_a_layer_is_done(run, merge: Path, tmp_path: Path, monkeypatch) -> None:
    stderr = stopped_behind(run, monkeypatch, merge, tmp_path / "x.gguf", 0)
    assert "interrupted before a layer was finished\n" in stderr
    assert list(tmp_path.iterdir()) == []


def test_all_layers_done_and_the_file_not_written(
    run, merge: Path, undisturbed: bytes, tmp_path: Path, monkeypatch
) -> None:
    """The next run needs no text any more: it does not even start the engine."""
    target = tmp_path / "x.gguf"

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["gguf_moe.cli.convert"], "run_plan", stop)
        result = run("convert", merge, *ASKED, *FEW, "-o", target)
    assert "interrupted: 3 of 3 layers have their codes" in result.stderr
    monkeypatch.setattr(gptq, "read_windows", stop)
    assert run("convert", merge, *ASKED, *FEW, "-o", target).exit_code == 0
    assert target.read_bytes() == undisturbed


def test_a_full_disk_is_told(run, merge: Path, tmp_path: Path, monkeypatch) -> None:
    """While a layer's file is written; what is finished stays for the next run."""
    target, fsync = tmp_path / "x.gguf", os.fsync

    def full(handle: int) -> None:
        if (kept(target) / "1.partial").exists():
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    result = run("convert", merge, *ASKED, *FEW, "-o", target)
    said = f"{kept(target)}/1.partial: not written: [Errno 28] No space left on device; run again to go on"
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, f"gguf-moe: {said}")
    assert list(layers_of(target)) == ["0.layer"]


def text_replaced(merge: Path, target: Path) -> tuple[object, ...]:
    return ("--calib", EVAL)


def weight_changed(merge: Path, target: Path) -> tuple[object, ...]:
    path = merge / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    return ()


def identity_damaged(merge: Path, target: Path) -> tuple[object, ...]:
    (kept(target) / "identity.json").write_text("{")
    return ()


CHANGES: dict[str, tuple[Callable[[Path, Path], tuple[object, ...]], str]] = {
    "another text": (text_replaced, "text"),
    "another damping": (lambda *_: ("--damping", 0.02), "damping"),
    "fewer windows": (lambda *_: ("--calib-chunks", 1), "chunks"),
    "original layers": (lambda *_: ("--calib-original",), "calibrated_on"),
    "another type": (lambda *_: ("--tensor-type", "attn_q=Q8_0"), "recipe"),
    "a changed weight": (weight_changed, "source"),
    "a damaged identity": (identity_damaged, "identity"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_follows_from_something_else_is_begun_anew(change: str, run, tmp_path: Path, monkeypatch) -> None:
    merge, target = one_layer().save(tmp_path / "one"), tmp_path / "x.gguf"
    stopped_behind(run, monkeypatch, merge, target, 1)
    make, what = CHANGES[change]
    stderr = stopped_behind(run, monkeypatch, merge, target, 0, *make(merge, target))
    assert f"gguf-moe: warning: {kept(target)}: begun anew, the earlier run had another {what}\n" in stderr
    assert not kept(target).exists()


def test_layers_of_nobody_knows_what_are_not_believed(run, tmp_path: Path, monkeypatch) -> None:
    """As a kill leaves them while an earlier run's files are removed."""
    merge, target, fresh = one_layer().save(tmp_path / "one"), tmp_path / "x.gguf", tmp_path / "fresh.gguf"
    stopped_behind(run, monkeypatch, merge, target, 1, "--damping", 0.5)
    (kept(target) / "identity.json").unlink()
    for path in (target, fresh):
        assert run("convert", merge, *ASKED, *FEW, "-o", path).exit_code == 0
    assert target.read_bytes() == fresh.read_bytes()


def test_another_imatrix_of_the_same_name_is_noticed(run, tmp_path: Path, monkeypatch) -> None:
    merge = one_layer().save(tmp_path / "one")
    imatrix = tmp_path / "im.gguf"
    collecting = ("imatrix", merge, "--text", CALIB, "--ctx", 64, "--chunks", 4, "-o", imatrix)
    assert run(*collecting).exit_code == 0
    stopped_behind(run, monkeypatch, merge, tmp_path / "x.gguf", 1, "--imatrix", imatrix)
    assert run(*collecting, "--all-experts", "--force").exit_code == 0
    result = run("convert", merge, *ASKED, *FEW, "--imatrix", imatrix, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 0
    assert "begun anew, the earlier run had another " in result.stderr


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:1000] + b"\1" + data[1001:]])
def test_a_damaged_layer_is_quantized_anew(
    damage, run, merge: Path, undisturbed: bytes, tmp_path: Path, monkeypatch
) -> None:
    target = tmp_path / "x.gguf"
    stopped_behind(run, monkeypatch, merge, target, 2)
    layer = kept(target) / "0.layer"
    data = layer.read_bytes()
    layer.write_bytes(damage(data))
    assert layer.read_bytes() != data
    result = run("convert", merge, *ASKED, *FEW, "-o", target)
    assert f"gguf-moe: warning: {layer}: damaged, its layer is quantized anew\n" in result.stderr
    assert target.read_bytes() == undisturbed


def test_two_runs_at_once(run, merge: Path, undisturbed: bytes, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    first = begun(merge, target, "0.partial")
    result = run("convert", merge, *ASKED, *FEW, "-o", target)
    assert result.exit_code == 1
    assert result.stderr == f"gguf-moe: {kept(target)}: another run is at work there; wait for it\n"
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert target.read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_source_that_changes_meanwhile_is_refused(run, tmp_path: Path, monkeypatch) -> None:
    merge = one_layer().save(tmp_path / "one")
    finish = LayerFile.finish
    monkeypatch.setattr(LayerFile, "finish", lambda file: (finish(file), weight_changed(merge, merge)))
    result = run("convert", merge, *ASKED, *FEW, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 1
    said = f"gguf-moe: {merge}: changed while codes were chosen; run again when it is whole"
    assert result.stderr.splitlines()[-1] == said
    assert not (tmp_path / "x.gguf").exists()


def test_what_is_not_ours_stays(run, merge: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    kept(target).mkdir()
    for name in ("mine.json", "0.layer"):
        (kept(target) / name).write_text("mine")
    assert run("convert", merge, *ASKED, *FEW, "-o", target).exit_code == 0
    assert [path.name for path in kept(target).iterdir()] == ["mine.json"]
    assert not (kept(target) / LOCK).exists()
