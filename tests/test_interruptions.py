"""Exports that are killed, run out of disk, lose their folder or find another's files: nothing half, nothing twice."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import pytest
from checkpoints import MERGE

import quant
from gguf_moe import export as export_module
from gguf_moe import partial
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.errors import GgufMoeError
from gguf_moe.export import LADDER, LOCK, Event, Found, export
from gguf_moe.filling import Progress
from gguf_moe.partial import PartialFile
from gguf_moe.plan import Plan, make_plans
from gguf_moe.recipe import find_file_type

MIXED = ("Q4_K_M", "BF16")  # of two orders of tensors
CAN_UNSHARE = shutil.which("unshare") and not subprocess.call(
    ["unshare", "--map-root-user", "--mount", "true"], stderr=subprocess.DEVNULL
)


def plans_of(directory: Path, quants: Sequence[str]) -> list[Plan]:
    return make_plans(open_checkpoint(directory), [find_file_type(quant) for quant in quants])


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of what has a final name, by file type."""
    return {
        path.stem.rpartition("-")[2]: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.gguf")
    }


@pytest.fixture(scope="session")
def want(made) -> Callable[[Sequence[str]], dict[str, str]]:
    """What an undisturbed conversion makes."""
    return lambda quants: {q: hashlib.sha256(made("json", q).read_bytes()).hexdigest() for q in quants}


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MERGE, tmp_path / MERGE.name))


def interrupt(plans: Sequence[Plan], directory: Path, share: float) -> None:
    """Run an export up to a share of the work."""

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= share * event.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(plans, directory, recipe={}, on_event=stop)


def found(plans: Sequence[Plan], directory: Path, **options: bool) -> dict[str, Found]:
    """Run an export to its end; what it found, by file type."""
    seen: list[Event] = []
    export(plans, directory, recipe={}, on_event=seen.append, **options)
    return {event.file[:-5].rpartition("-")[2]: event for event in seen if isinstance(event, Found)}


def in_a_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; its exit status as `waitpid` gives it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("after", [False, True], ids=["before the write", "after it"])
def test_a_kill_at_every_journal_write(after: bool, want, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run resumes the one before, gets one record further, and is killed there."""
    plans = plans_of(MERGE, MIXED)
    record = PartialFile._record
    records = 0

    def killed(partial: PartialFile) -> None:
        nonlocal records
        records += 1
        if records < 2 and not after:
            return record(partial)
        if after:
            record(partial)
        return die()

    kills = 0
    while True:
        monkeypatch.setattr(PartialFile, "_record", killed)
        status = in_a_child(lambda: export(plans, tmp_path, recipe={}))
        assert os.WIFSIGNALED(status) or status == 0
        assert digests(tmp_path).items() <= want(MIXED).items()
        if status == 0:
            break
        kills += 1
    assert digests(tmp_path) == want(MIXED)
    assert kills > len(plans[0].tensors)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["rename", "sync_directory", "write_manifest", "write_sums", "fsync"])
def test_a_kill_while_a_level_is_finished(step: str, after: bool, want, tmp_path: Path, monkeypatch) -> None:
    """Files have their names, but manifest, checksums or journals do not say so yet: nothing is made again."""
    plans = plans_of(MERGE, MIXED)
    module = next(m for m in (partial, export_module, os) if hasattr(m, step))
    real = getattr(module, step)
    monkeypatch.setattr(module, step, lambda *a, **k: (real(*a, **k) if after else None, die()))
    assert os.WIFSIGNALED(in_a_child(lambda: export(plans, tmp_path, recipe={})))
    monkeypatch.undo()
    assert digests(tmp_path).items() <= want(MIXED).items()
    encoded = []
    quantize = quant.quantize
    monkeypatch.setattr(quant, "quantize", lambda *a, **k: (encoded.append(a[1]), quantize(*a, **k))[1])
    states = found(plans, tmp_path)
    assert "anew" not in {event.state for event in states.values()}
    assert "Q4_K" not in encoded, "Q4_K_M was whole"
    assert digests(tmp_path) == want(MIXED)
    assert {path.suffix for path in tmp_path.iterdir()} == {".gguf", ".json", ""}
    assert {line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()} == {
        f"{MERGE.name}-{name}.gguf" for name in MIXED
    }


@pytest.mark.long
def test_kills_at_thirty_random_moments(want, tmp_path: Path) -> None:
    """The real command, in the slower backend, so that a ladder takes longer than a start of Python."""
    rng = random.Random(7)
    command = [sys.executable, "-m", "gguf_moe", "export", str(MERGE), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "QUANT_BACKEND": "numpy"}
    expected = want(LADDER)
    kills = finished = 0
    while kills < 30:
        process = subprocess.Popen([*command, "--threads", "1"], env=environment, stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.3, 2.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert digests(tmp_path / "out").items() <= expected.items()
            continue
        assert process.returncode == 0
        assert digests(tmp_path / "out") == expected
        finished += 1
        shutil.rmtree(tmp_path / "out")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(tmp_path / "out") == expected
    assert finished < 15, "most kills must have come in the middle"


def test_an_interrupted_run_is_taken_up(want, tmp_path: Path) -> None:
    plans = plans_of(MERGE, ("Q2_K", "Q8_0"))
    interrupt(plans, tmp_path, 0.5)
    assert digests(tmp_path) == {}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".journal", ".journal", ".partial", ".partial"]
    states = found(plans, tmp_path)
    assert {name: event.state for name, event in states.items()} == {"Q2_K": "resumed", "Q8_0": "resumed"}
    assert all(0.4 < event.done / event.size < 0.6 for event in states.values())
    assert digests(tmp_path) == want(("Q2_K", "Q8_0"))


def test_another_set_of_levels_takes_up_what_it_shares(want, tmp_path: Path) -> None:
    interrupt(plans_of(MERGE, ("Q2_K", "Q8_0")), tmp_path, 0.5)
    states = found(plans_of(MERGE, ("Q8_0", "Q6_K")), tmp_path)
    assert {name: event.state for name, event in states.items()} == {"Q8_0": "resumed"}
    assert digests(tmp_path) == want(("Q8_0", "Q6_K"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("where", [10, 1000, 300_000])
def test_a_damaged_partial_file_is_begun_anew(where: int, want, tmp_path: Path) -> None:
    plans = plans_of(MERGE, ("Q2_K", "Q8_0"))
    interrupt(plans, tmp_path, 0.5)
    flip(next(tmp_path.glob("*Q2_K.gguf.partial")), where)
    states = found(plans, tmp_path)
    assert (states["Q2_K"].state, states["Q2_K"].why) == ("anew", "what is there is damaged")
    assert states["Q8_0"].state == "resumed"
    assert digests(tmp_path) == want(("Q2_K", "Q8_0"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * 500),
        lambda path: path.write_text(path.read_text().replace("1", "2")),
        lambda path: path.write_text(path.read_text() + "99999999999999999999 " + "0" * 64 + "\n"),
        lambda path: path.write_text(path.read_text() + "0 " + "0" * 64 + "\n"),
        lambda path: path.write_text(path.read_text() + "12 abc\n"),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".partial").unlink(),
        lambda path: path.with_suffix(".partial").write_bytes(b""),
        lambda path: truncate(path.with_suffix(".partial")),
    ],
)
def test_a_damaged_journal_costs_work_but_no_bytes(damage, want, tmp_path: Path) -> None:
    plans = plans_of(MERGE, ("Q2_K",))
    interrupt(plans, tmp_path, 0.5)
    damage(next(tmp_path.glob("*.journal")))
    assert found(plans, tmp_path)["Q2_K"].state == "anew"
    assert digests(tmp_path) == want(("Q2_K",))


def test_a_torn_last_line_of_the_journal_counts_not(want, tmp_path: Path) -> None:
    plans = plans_of(MERGE, ("Q2_K",))
    interrupt(plans, tmp_path, 0.5)
    journal = next(tmp_path.glob("*.journal"))
    journal.write_text(journal.read_text() + "1234567 00ab")
    assert found(plans, tmp_path)["Q2_K"].state == "resumed"
    assert digests(tmp_path) == want(("Q2_K",))


def changed(directory: Path) -> None:
    """Change one weight of the checkpoint."""
    flip(
        directory / "model-00003-of-00006.safetensors",
        (directory / "model-00003-of-00006.safetensors").stat().st_size - 2,
    )


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_source_is_begun_anew(finished: bool, run, tmp_path: Path) -> None:
    merge = copy(tmp_path)
    quants, out = ("Q2_K", "Q8_0"), tmp_path / "out"
    plans = plans_of(merge, quants)
    if finished:
        export(plans, out, recipe={})
    else:
        interrupt(plans, out, 0.7)
    changed(merge)
    states = found(plans_of(merge, quants), out)
    assert {(event.state, event.why.split(" are")[0]) for event in states.values()} == {
        ("anew", "source, recipe or version of gguf-moe")
    }
    for quant_name, digest in digests(out).items():
        run("convert", merge, "--quant", quant_name, "-o", tmp_path / "one.gguf", "--force")
        assert hashlib.sha256((tmp_path / "one.gguf").read_bytes()).hexdigest() == digest


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    merge = copy(tmp_path)
    plans = plans_of(merge, ("Q8_0",))

    def change(event: Event) -> None:
        if isinstance(event, Progress) and event.done < event.total / 4:
            changed(merge)

    with pytest.raises(GgufMoeError, match="changed while it was being read; run again to begin anew"):
        export(plans, tmp_path / "out", recipe={}, on_event=change)
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert found(plans_of(merge, ("Q8_0",)), tmp_path / "out")["Q8_0"].state == "anew"


def test_a_changed_recipe_is_begun_anew(run, tmp_path: Path) -> None:
    interrupt(plans_of(MERGE, ("Q2_K",)), tmp_path, 0.5)
    options = ("--quant", "Q2_K", "--tensor-type", "attn_q=Q8_0")
    result = run("export", MERGE, "-o", tmp_path, *options)
    assert "is begun anew: source, recipe or version of gguf-moe are others now" in result.stdout
    run("convert", MERGE, *options, "-o", tmp_path / "one.gguf")
    assert len(set(digests(tmp_path).values())) == 1


def test_a_finished_file_that_was_damaged_is_made_again(run, want, tmp_path: Path) -> None:
    plans = plans_of(MERGE, ("Q2_K", "Q8_0"))
    export(plans, tmp_path, recipe={})
    flip(next(tmp_path.glob("*Q2_K.gguf")), 2_000_000)
    assert found(plans, tmp_path)["Q2_K"].why == "the finished file was changed"
    assert digests(tmp_path) == want(("Q2_K", "Q8_0"))
    os.utime(next(tmp_path.glob("*Q2_K.gguf")))
    assert {event.state for event in found(plans, tmp_path).values()} == {"complete"}, "only the date is another"


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


def slow_export(out: Path, *quants: str, wait: bool = True) -> subprocess.Popen:
    """The command in the slower backend on one thread, begun; it has written something when this returns."""
    arguments = [str(MERGE), "-o", str(out), "--threads", "1", *(x for name in quants for x in ("--quant", name))]
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_moe", "export", *arguments],
        env={**os.environ, "QUANT_BACKEND": "numpy"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while wait and not any(path.stat().st_size > 500 for path in out.glob("*.journal")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


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
