"""Exports that are stopped or find something else than they left: nothing half, nothing twice, the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import MERGE
from exports import copy, die, digests, flip, found, in_a_child, interrupt, plans_of

import quant
from gguf_moe import export as export_module
from gguf_moe import partial
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.errors import GgufMoeError
from gguf_moe.export import LADDER, Event, export
from gguf_moe.filling import Progress
from gguf_moe.partial import PartialFile
from gguf_moe.plan import make_plans
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request
from gguf_moe.rules import parse_rules

MIXED = ("Q4_K_M", "BF16")  # of two orders of tensors


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
@pytest.mark.parametrize("step", ["rename", "link", "sync_directory", "write_manifest", "write_sums", "fsync"])
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


def test_a_run_of_another_recipe_leaves_what_was_begun(run, tmp_path: Path) -> None:
    """The finished file of the first recipe is complete beside the second one's partial file."""
    first, second = (("--quant", "Q2_K"), ("--quant", "Q2_K", "--tensor-type", "attn_q=Q8_0"))
    run("export", MERGE, "-o", tmp_path, *first)
    rules = parse_rules(("attn_q=Q8_0",), None, None, None, False, False)
    interrupt(make_plans(open_checkpoint(MERGE), [find_file_type("Q2_K")], Request(rules)), tmp_path, 0.5)
    assert f"{MERGE.name}-Q2_K.gguf is complete" in run("export", MERGE, "-o", tmp_path, *first).stdout
    assert f"{MERGE.name}-Q2_K.gguf goes on at" in run("export", MERGE, "-o", tmp_path, *second).stdout


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


def test_a_journal_that_ends_within_a_matrix(want, tmp_path: Path) -> None:
    """As a version that divides the work otherwise might leave it: the rest of the matrix is made."""
    plans = plans_of(MERGE, ("Q2_K", "BF16"))
    interrupt(plans, tmp_path, 0.5)
    for journal in tmp_path.glob("*.journal"):
        first, *_, last, _ = journal.read_text().split("\n")
        done = int(last.split()[0]) - 1000
        digest = hashlib.sha256(journal.with_suffix(".partial").read_bytes()[:done]).hexdigest()
        journal.write_text(f"{first}\n{done} {digest}\n")
    assert {event.state for event in found(plans, tmp_path).values()} == {"resumed"}
    assert digests(tmp_path) == want(("Q2_K", "BF16"))


def test_what_was_found_is_told_before_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of(MERGE, ("Q2_K",))
    monkeypatch.setattr(export_module, "write_manifest", lambda *_: os.stat(tmp_path / "nothing"))
    with pytest.raises(GgufMoeError):
        export(plans, tmp_path, recipe={})
    monkeypatch.undo()
    events: list[Event] = []
    export(plans, tmp_path, recipe={}, on_event=events.append)
    assert [type(event).__name__ for event in events] == ["Found", "Finished"]


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


@pytest.mark.parametrize("share", [-1, 0.95])
def test_a_source_that_disappears_is_named(share: float, tmp_path: Path) -> None:
    """Before the first byte, and when all of it was read."""
    merge = copy(tmp_path)
    plans = plans_of(merge, ("Q8_0",))
    lost = merge / "model-00002-of-00006.safetensors"

    def lose(event: Event | None = None) -> None:
        if event is None or (isinstance(event, Progress) and event.done >= share * event.total):
            lost.unlink(missing_ok=True)

    if share < 0:
        lose()
    with pytest.raises(GgufMoeError, match=f"^{merge}.*changed since it was opened.*{lost.name}"):
        export(plans, tmp_path / "out", recipe={}, on_event=lose)
    assert digests(tmp_path / "out") == {}


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
