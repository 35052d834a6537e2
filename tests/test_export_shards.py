"""Levels in shards: they take their names together, however many they are, and whatever interrupts them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import MERGE
from exports import die, found, in_a_child, interrupt

from gguf_moe import partial
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.export import export
from gguf_moe.plan import Plan, make_plans
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request
from gguf_moe.rules import parse_rules
from gguf_moe.sharding import Splitting


def plans_of(*quants: str, types: Sequence[str] = (), shards_of: int = 15) -> list[Plan]:
    rules = parse_rules(tuple(types), None, None, None, False, False)
    request = Request(rules=rules, splitting=Splitting(max_tensors=shards_of))
    return make_plans(open_checkpoint(MERGE), [find_file_type(quant) for quant in quants], request)


def sums(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.gguf")}


def test_a_finished_level_stays_until_all_its_new_shards_are_whole(tmp_path: Path) -> None:
    export(plans_of("Q4_K_M"), tmp_path, recipe={})
    before = sums(tmp_path)
    other = plans_of("Q4_K_M", types=["attn_q=Q8_0"])
    interrupt(other, tmp_path, 0.8)
    assert sums(tmp_path) == before
    assert {event.state for event in found(other, tmp_path).values()} == {"resumed"}
    after = sums(tmp_path)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_shards_of_another_recipe_are_begun_anew_without_force(tmp_path: Path) -> None:
    interrupt(plans_of("Q4_K_M"), tmp_path, 0.8)
    assert sums(tmp_path) == {}, "a level that is not whole has no names"
    states = found(plans_of("Q4_K_M", types=["attn_q=Q8_0"]), tmp_path)
    assert {event.state for event in states.values()} == {"anew"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("types", [(), ("attn_q=Q8_0",)], ids=["same recipe", "another"])
def test_a_kill_between_the_names_of_two_shards(types: Sequence[str], tmp_path: Path, monkeypatch) -> None:
    """What has its name already is taken up, or is made again; `found` uses no force."""
    plans = plans_of("Q4_K_M")
    rename, renamed = partial.rename, 0

    def killed(*arguments: object) -> None:
        nonlocal renamed
        renamed += 1
        rename(*arguments) if renamed < 3 else die()

    monkeypatch.setattr(partial, "rename", killed)
    assert os.WIFSIGNALED(in_a_child(lambda: export(plans, tmp_path / "out", recipe={})))
    monkeypatch.undo()
    assert len(sums(tmp_path / "out")) == 2
    assert not list((tmp_path / "out").glob("*-00001-of-*.gguf")), "the first, by which the others are found, is last"
    again = plans_of("Q4_K_M", types=types)
    states = found(again, tmp_path / "out")
    assert {event.state for event in states.values()} == ({"anew"} if types else {"resumed"})
    export(again, tmp_path / "whole", recipe={})
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_more_shards_than_a_process_may_hold_open(tmp_path: Path) -> None:
    command = 'ulimit -n 64; exec "$0" -m gguf_moe export "$@" --split-max-tensors 2 --quant BF16 --quant Q2_K'
    arguments = ["sh", "-c", command, sys.executable, MERGE, "-o", tmp_path, "--quant", "Q4_K_M", "--quant", "Q8_0"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(sums(tmp_path)) == 4 * 22
