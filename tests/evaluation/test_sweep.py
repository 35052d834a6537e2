"""Lock step: the same as each model by itself, whatever the sweep; and what a sweep refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from architectures import Saved
from checkpoints import MERGE, bundled
from running import model, run, windows

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.events import Progress, Routed, Scored
from gguf_moe.evaluation.memory import plan_memory
from gguf_moe.evaluation.sweep import sweep

MIB = 1 << 20


def test_lock_step_is_each_model_by_itself(made) -> None:
    paths, ids = [MERGE, made("json", "Q4_0"), made("json", "Q2_K")], windows(5, 64)
    models, told = [model(path) for path in paths], []
    routed, scored = {}, {}
    for event in sweep(models, ids, group=2, on_progress=told.append):
        if isinstance(event, Routed):
            routed[event.model, event.layer] = event
        else:
            scored[event.model, event.chunk] = replace(event, base=event.base.clone(), logits=event.logits.clone())
    assert routed.keys() == {(m, layer) for m in range(3) for layer in range(4)}
    assert scored.keys() == {(m, chunk) for m in range(3) for chunk in range(5)}
    assert told == [Progress(n, 3 * (4 + 3)) for n in range(1, 22)]
    for chunk, window in enumerate(ids):
        alone = [run(model, window) for model in models]
        for number, (logits, routings) in enumerate(alone):
            event: Scored = scored[number, chunk]
            assert np.allclose(event.logits, logits[32:63], atol=1e-4)
            assert np.allclose(event.base, alone[0][0][32:63], atol=1e-4)
            assert event.targets.tolist() == window[33:].tolist()
            for layer, routing in enumerate(routings):
                step: Routed = routed[number, layer]
                assert step.routing.experts[chunk].equal(routing.experts[0])
                assert step.base.experts[chunk].equal(alone[0][1][layer].experts[0])
                assert np.allclose(step.routing.weights[chunk], routing.weights[0], atol=1e-5)


def test_pieces_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = windows(3, 48)
    whole = [event.logits.clone() for event in sweep([model(MERGE)], ids) if isinstance(event, Scored)]
    monkeypatch.setattr("gguf_moe.evaluation.layer.PIECE_TOKENS", 20)
    monkeypatch.setattr("gguf_moe.evaluation.weights.PIECE_WEIGHTS", 1000)
    monkeypatch.setattr("gguf_moe.evaluation.forward.PANEL_WEIGHTS", 10000)
    pieces = [event.logits.clone() for event in sweep([model(MERGE)], ids) if isinstance(event, Scored)]
    assert len(whole) == len(pieces) == 3
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(whole, pieces))


def test_a_dense_model_routes_nothing(saved: Saved) -> None:
    events = list(sweep([model(saved("llama"))], windows(2, 16)))
    assert [type(event) for event in events] == [Scored, Scored]


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("model.layers.2.self_attn.v_proj.weight", "layer 2 gives activations that are not finite, first in chunk 0"),
        ("lm_head.weight", "output.weight gives activations that are not finite, first in chunk 0"),
    ],
)
def test_damage_is_named(tensor: str, where: str, tmp_path: Path) -> None:
    parts = bundled()
    dtype, array = parts.tensors[tensor]
    array = array.copy()
    array[5, 7] = 0x7FC0  # NaN in bfloat16
    parts.tensors[tensor] = (dtype, array)
    path = parts.save(tmp_path / "damaged")
    with pytest.raises(GgufMoeError) as error:
        list(sweep([model(MERGE), model(path)], windows(2, 16)))
    assert str(error.value).startswith(f"{path}: {where}")


def test_chunks_are_shared_out_by_memory() -> None:
    models = [model(MERGE)] * 3
    plan = plan_memory(models, 100, 512, 1 << 40)
    assert plan.sweep == 100
    assert plan.held > 50 * MIB
    smaller = plan_memory(models, 100, 512, plan.total - 60 * plan.per_chunk)
    assert smaller.total <= plan.total - 60 * plan.per_chunk
    assert smaller.sweep in (34, 50), "even shares"
    assert plan_memory(models, 100, 512, 1 << 40, most=7).sweep == 7
    assert plan_memory(models, 100, 512).sweep == 100, "in what is free"
    with pytest.raises(UsageError, match=r"--memory: 1\.05 MB are allowed, but .* takes \S+ MB, of which"):
        plan_memory(models, 100, 512, MIB)
