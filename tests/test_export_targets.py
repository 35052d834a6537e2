"""Folders that are full, read-only, lost, or somebody else's: exports leave them whole and say why."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from checkpoints import MERGE
from exports import digests, found, interrupt, plans_of, slow_export

from gguf_moe.checksums import read_sums
from gguf_moe.errors import GgufMoeError
from gguf_moe.export import LOCK, export
from gguf_moe.partial import PartialFile

CAN_UNSHARE = shutil.which("unshare") and not subprocess.call(
    ["unshare", "--map-root-user", "--mount", "true"], stderr=subprocess.DEVNULL
)


def test_a_file_of_somebody_else_needs_force(run, want, tmp_path: Path) -> None:
    path = tmp_path / f"{MERGE.name}-Q2_K.gguf"
    path.write_text("mine")
    result = run("export", MERGE, "-o", tmp_path, "--quant", "Q8_0", "--quant", "Q2_K")
    assert (result.exit_code, result.stderr) == (1, f"gguf-moe: {path}: exists; use --force to replace it\n")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K", "--force").exit_code == 0
    assert digests(tmp_path) == want(("Q2_K",))


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / f"{MERGE.name}-Q2_K.gguf"
    with pytest.raises(GgufMoeError, match="appeared while it was being written"):
        export(plans_of(MERGE, ("Q2_K",)), tmp_path, recipe={}, on_event=lambda event: path.write_text("mine"))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_of_the_partial_names_is_not_written_through(link: Callable, want, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / "out").mkdir()
    link(kept, tmp_path / "out" / f"{MERGE.name}-Q2_K.gguf.partial")
    export(plans_of(MERGE, ("Q2_K",)), tmp_path / "out", recipe={})
    assert kept.read_text() == "mine"
    assert digests(tmp_path / "out") == want(("Q2_K",))


def test_a_list_of_checksums_that_is_none_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("mine")
    with pytest.raises(GgufMoeError, match="SHA256SUMS: line 1 is 'mine'"):
        export(plans_of(MERGE, ("Q2_K",)), tmp_path, recipe={})
    assert [path.name for path in tmp_path.iterdir()] == ["SHA256SUMS"]


def test_a_file_in_place_of_the_folder(run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    result = run("export", MERGE, "-o", tmp_path / "out", "--quant", "Q2_K")
    assert result.exit_code == 1
    assert "out: is a file, expected a directory for the levels; name another with --output" in result.stderr


def test_a_manifest_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(GgufMoeError, match="levels is missing, expected a list of objects; mend it or move it away"):
        export(plans_of(MERGE, ("Q2_K",)), tmp_path, recipe={})
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_a_level_that_was_deleted_is_not_listed_any_more(run, tmp_path: Path) -> None:
    run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K", "--quant", "Q8_0")
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(sums.read_text() + f"{'0' * 64}  somebody's\n")
    next(tmp_path.glob("*Q8_0.gguf")).unlink()
    run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K")
    assert list(read_sums(tmp_path)) == [f"{MERGE.name}-Q2_K.gguf", "somebody's"]


def test_two_models_in_one_folder_are_not_mixed_up(run, tmp_path: Path) -> None:
    run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K", "--split-max-tensors", "30")
    result = run("export", MERGE, "-o", tmp_path, "--quant", "Q8_0", "--quant", "Q2_K", "--name", "Another")
    assert f"leaves out {MERGE.name}-Q2_K-00001-of-00002.gguf, which is not named Another-" in result.stderr
    card = (tmp_path / "README.md").read_text()
    assert MERGE.name not in card.partition("## How these files were made")[0]
    assert card.count("[Another-") == 2
    assert len(read_sums(tmp_path)) == 4


def test_a_second_export_into_one_folder_is_told_so(run, want, tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / LOCK):
        result = run("export", MERGE, "-o", tmp_path, "--quant", "Q2_K")
        assert result.exit_code == 1
        assert (
            result.stderr == f"gguf-moe: {tmp_path}: another export is writing there; wait for it or name another one\n"
        )
    assert digests(tmp_path) == {}


def test_two_exports_at_once(want, tmp_path: Path) -> None:
    first = slow_export(tmp_path / "out", "Q6_K", "Q2_K")
    second = slow_export(tmp_path / "out", "Q6_K", "Q2_K", wait=False)
    assert second.wait(60) == 1
    assert second.stderr is not None
    assert "another export is writing there" in second.stderr.read()
    assert first.wait(60) == 0
    assert digests(tmp_path / "out") == want(("Q6_K", "Q2_K"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_interrupt_says_how_to_go_on(number: signal.Signals, want, tmp_path: Path) -> None:
    process = slow_export(tmp_path, "Q6_K", "Q2_K")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "gguf-moe: interrupted; the same command goes on from here" in stderr
    assert {event.state for event in found(plans_of(MERGE, ("Q6_K", "Q2_K")), tmp_path).values()} == {"resumed"}
    assert digests(tmp_path) == want(("Q6_K", "Q2_K"))


def test_a_lost_output_folder(run, want, tmp_path: Path) -> None:
    process = slow_export(tmp_path / "out", "Q6_K", "Q2_K")
    shutil.rmtree(tmp_path / "out")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.count("\n") == 1
    assert f"{tmp_path / 'out'}: not written: [Errno 2]" in stderr
    assert run("export", MERGE, "-o", tmp_path / "out", "--quant", "Q6_K", "--quant", "Q2_K").exit_code == 0
    assert digests(tmp_path / "out") == want(("Q6_K", "Q2_K"))


def test_a_full_disk(want, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system takes no more at some write: whichever it is, the next run goes on."""
    plans = plans_of(MERGE, ("Q2_K", "Q8_0"))
    write, record = PartialFile.write, PartialFile._record
    left = 0

    def full(real: Callable) -> Callable:
        def call(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        return call

    monkeypatch.setattr(PartialFile, "write", full(write))
    monkeypatch.setattr(PartialFile, "_record", full(record))
    for budget in (0, 1, 2, 3, 5, 8, 13, 21, 34):
        left = budget
        with pytest.raises(GgufMoeError, match="No space left on device; what is whole stays, run again to go on"):
            export(plans, tmp_path, recipe={})
        assert digests(tmp_path) == {}
    monkeypatch.undo()
    assert {event.state for event in found(plans, tmp_path).values()} == {"resumed"}
    assert digests(tmp_path) == want(("Q2_K", "Q8_0"))


def test_too_little_space_is_found_before_writing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of(MERGE, ("Q2_K", "Q8_0"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(GgufMoeError, match="needs 13767680 bytes more, but only 10000000 are free on that disk"):
        export(plans, tmp_path, recipe={})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=14_000_000))
    interrupt(plans, tmp_path, 0.8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    export(plans, tmp_path, recipe={})  # what is there already needs no more


@pytest.mark.skipif(not CAN_UNSHARE, reason="needs leave to mount a tmpfs; test_a_full_disk is for elsewhere")
def test_a_tiny_tmpfs_that_fills_up_or_is_read_only(want, tmp_path: Path) -> None:
    """Somebody else fills the disk in the middle; later it has room again; then it is mounted read-only."""
    script = """
set -e
mount -t tmpfs -o size=12m none "$1"
go() { "$2" -m gguf_moe export "$3" -o "$1/out" --threads 1 --quant Q2_K --quant Q3_K_S; }
export QUANT_BACKEND=numpy
go "$@" > /dev/null 2> "$4" &
until [ -s "$(echo "$1"/out/*Q3_K_S.gguf.journal)" ]; do sleep 0.01; done
dd if=/dev/zero of="$1/filler" bs=1M 2> /dev/null || true
if wait $!; then exit 9; fi
ls "$1"/out/*.gguf 2> /dev/null && exit 8
rm "$1/filler"
go "$@" > /dev/null
mount -o remount,ro "$1"
if go "$@" --quant Q8_0 2>> "$4"; then exit 7; fi
cd "$1/out" && sha256sum *.gguf
"""
    log, place = tmp_path / "log", tmp_path / "disk"
    place.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", place, sys.executable, MERGE, log]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done, log.read_text())
    first, second = log.read_text().splitlines()
    assert f"{place / 'out'}: not written: [Errno 28] No space left on device; what is whole stays" in first
    assert f"{place / 'out'}: not written: [Errno 30] Read-only file system" in second
    sums = dict(reversed(line.split()) for line in done.stdout.splitlines())
    assert {name[:-5].rpartition("-")[2]: digest for name, digest in sums.items()} == want(("Q2_K", "Q3_K_S"))
