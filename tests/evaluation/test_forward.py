"""The forward pass beside transformers' own, recorded in tests/golden."""

from __future__ import annotations

from pathlib import Path

import architectures as cases
import numpy as np
import pytest
import torch
from checkpoints import MERGE, bundled
from gguf_files import changed
from running import model, run
from test_architectures import ONE_A_FAMILY, convert
from test_gguf_layouts import split_experts
from test_golden import GOLDEN

from gguf_moe.evaluation.layer import Rows

TRANSFORMERS = np.load(GOLDEN / "transformers.npz")
LOGITS = np.load(GOLDEN / "architectures.npz")
PROMPTS = range(4)


@pytest.mark.parametrize("number", PROMPTS)
def test_the_bundled_merge_is_transformers(number: int) -> None:
    logits, routings = run(model(MERGE), TRANSFORMERS[f"prompt{number}"])
    assert np.abs(logits[-4:] - TRANSFORMERS[f"logits{number}"]).max() < 1e-3
    experts = np.concatenate([routing.experts.numpy() for routing in routings])
    assert np.array_equal(experts, TRANSFORMERS[f"experts{number}"])


@pytest.mark.parametrize("name", cases.CASES)
def test_every_architecture_is_transformers(name: str, saved: cases.Saved) -> None:
    assert error(saved(name), name) < 1e-3


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_gguf_files_are_transformers(name: str, run: object, saved: cases.Saved) -> None:
    assert error(convert(run, saved(name), "F32"), name) < 1e-3


def error(path: Path, name: str) -> float:
    """The largest difference of the kept logits."""
    logits, _ = run(model(path), cases.prompt())
    return float(np.abs(logits[list(cases.KEPT_POSITIONS)][:, cases.KEPT_LOGITS] - LOGITS[name]).max())


def test_a_checkpoint_and_its_gguf_file_give_the_same_bits(made) -> None:
    prompt = TRANSFORMERS["prompt0"]
    assert np.array_equal(run(model(MERGE), prompt)[0], run(model(made("json", "BF16")), prompt)[0])


def test_experts_one_by_one_give_the_same_bits(made, tmp_path: Path) -> None:
    split = changed(made("json", "Q4_K_M"), tmp_path / "split.gguf", split_experts)
    prompt = TRANSFORMERS["prompt1"]
    assert np.array_equal(run(model(split), prompt)[0], run(model(made("json", "Q4_K_M")), prompt)[0])


def test_among_equal_routers_the_lower_experts_win(tmp_path: Path) -> None:
    parts = bundled()
    for name, (_, array) in parts.tensors.items():
        if name.endswith("mlp.gate.weight"):
            array = array.copy()
            array[3] = array[2] = array[1]  # the last three alike
            parts.tensors[name] = ("BF16", array)
    _, routings = run(model(parts.save(tmp_path / "alike")), TRANSFORMERS["prompt0"])
    for routing in routings:
        pairs = {tuple(pair) for pair in routing.experts.reshape(-1, 2).tolist()}
        assert pairs <= {(0, 1), (1, 0), (1, 2)}
        assert torch.allclose(routing.weights.sum(-1), torch.ones(1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.5), (torch.float16, 0.05)])
def test_narrow_dtypes_stay_close(dtype: torch.dtype, bound: float) -> None:
    logits, routings = run(model(MERGE, dtype=dtype), TRANSFORMERS["prompt3"])
    assert logits.dtype == np.float32
    assert routings[0].weights.dtype == torch.float32
    assert 0 < np.abs(logits[-4:] - TRANSFORMERS["logits3"]).max() < bound


def test_observers_see_what_each_matrix_is_multiplied_with(saved: cases.Saved) -> None:
    """Their x and the file's matrices give the model's own results: all products are seen, with their true inputs."""
    tested = model(saved("qwen2moe-6"))
    seen: dict[tuple[str, int | None], torch.Tensor] = {}

    class Spy:
        shown = None

        def route(self, probabilities: torch.Tensor, rows: slice) -> None:
            assert len(probabilities) == len(range(len(cases.prompt()))[rows])

        def see(self, names: tuple[str, ...], x: torch.Tensor, rows: Rows, expert: int | None, own: bool) -> None:
            assert own
            for name in names:
                assert x.shape == (len(np.atleast_1d(ids[rows])), tested.weights.source.tensors[name].shape[-1])
                seen[name, expert] = torch.cat([seen[name, expert], x]) if (name, expert) in seen else x.clone()

    ids = np.array(cases.prompt())
    _, routings = run(tested, ids, Spy())
    matrices = {name for name, t in tested.weights.source.tensors.items() if len(t.shape) > 1}
    assert {name for name, _ in seen} == matrices - {"token_embd.weight", "output.weight"}
    for layer, routing in enumerate(routings):
        x = seen[f"blk.{layer}.ffn_gate_inp.weight", None]
        assert x.equal(seen[f"blk.{layer}.ffn_up_shexp.weight", None])
        for expert in range(6):
            mine = x[(routing.experts[0] == expert).any(-1)]
            kinds = [
                seen.get((f"blk.{layer}.ffn_{kind}_exps.weight", expert), x[:0]) for kind in ("gate", "up", "down")
            ]
            assert mine.equal(kinds[0])
            assert mine.equal(kinds[1])
            assert len(mine) == len(kinds[2])
