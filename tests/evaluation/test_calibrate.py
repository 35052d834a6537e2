"""Collecting importance matrices: llama.cpp's statistic, what every expert may be shown, going on after a stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from architectures import Saved
from checkpoints import DATA, MERGE, bundled
from running import model, windows
from test_golden import GOLDEN

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.calibrate import Collector, calibrate, collect, dense_tokens
from gguf_moe.evaluation.engines import EVEN, ROUTER, Settings
from gguf_moe.evaluation.events import Notice, Progress, Started
from gguf_moe.evaluation.layer import _Matrices
from gguf_moe.imatrix import Entry, Imatrix, read_imatrix

CALIB = DATA / "text" / "calib.txt"
FEW = Settings(context=64, chunks=5)
STACKS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


@pytest.fixture(scope="module")
def whole(merges) -> Imatrix:
    """Of the bundled merge, from all of its calibration text."""
    return calibrate(merges["spm"], CALIB, Settings(), process_output=True)


def relative(have: Entry, want: Entry) -> np.ndarray:
    return np.abs(have.importance() / want.importance() - 1)


def test_it_is_what_llama_cpps_tool_gives_in_float32(whole: Imatrix) -> None:
    """llama-imatrix on the F32 file with F32 caches: the same counts, and the same sums but for the order of additions,
    which are float32 one by one there."""
    reference = read_imatrix(GOLDEN / "tidepool-float32.imatrix.gguf")
    assert list(whole.entries) == list(reference.entries)
    assert (whole.chunks, whole.chunk_size) == (reference.chunks, reference.chunk_size) == (79, 512)
    for name, want in reference.entries.items():
        have = whole.entries[name]
        assert have.counts.tolist() == want.counts.tolist(), name
        assert relative(have, want).max() < 2e-4, name
        scale = np.sqrt(want.squares * want.counts[:, None])  # no sum is larger than it
        assert (np.abs(have.sums - want.sums) < 1e-4 * scale).all(), name


def compare(have: Imatrix, within_tokens: int) -> np.ndarray:
    """Compare with the reference that came with the merge, llama-imatrix's of the BF16 file: which share of the values
    is off by more than 1 %, by matrix."""
    reference = read_imatrix(GOLDEN / "tidepool.imatrix.gguf")
    off = []
    for name, want in reference.entries.items():
        entry = have.entries[name]
        assert np.abs(entry.counts - want.counts).max() <= (within_tokens if "exps" in name else 0), name
        difference = relative(entry, want)
        if "exps" not in name:
            assert difference.max() < 0.005, name
        off.append((difference > 0.01).mean())
    return np.array(off)


def test_it_is_near_to_llama_cpps_run_with_rounded_activations(whole: Imatrix) -> None:
    """There llama.cpp rounds what matrices are multiplied with to BF16, keys and values to F16. A few tokens so go to
    other experts, of which a column that few tokens fill shows most."""
    assert compare(whole, within_tokens=10).max() < 0.02


def test_with_the_same_rounding_the_order_of_additions_is_left(merges, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides where a number at the edge is rounded to, and so which experts get a token or two: sums of ours in
    several orders are as far from each other."""

    def product(matrices: _Matrices, kind: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.bfloat16().float(), matrices.matrices[kind])

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: bool) -> torch.Tensor:
        return attention(q, k.half().float(), v.half().float(), **options)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(_Matrices, "product", product)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    off = compare(calibrate(merges["spm"], CALIB, Settings()), within_tokens=4)
    assert (off.max() < 0.01, (off > 0).sum() <= 3) == (True, True)


@pytest.mark.parametrize(
    ("context", "chunks", "counted"), [(512, 79, 40442), (342, 8, 2730), (520, 4, 2072), (300, 7, 2100)]
)
def test_small_ends_of_a_batch_count_for_experts_alone(context: int, chunks: int, counted: int) -> None:
    """As many tokens as llama-imatrix counted for attn_q with these windows."""
    assert dense_tokens(chunks, context).sum() == counted


def collected(
    path: Path, ids: np.ndarray, weighing: str | None = None, **options: bool
) -> tuple[Collector, torch.Tensor]:
    """The collector, and the hidden states behind the last layer."""
    tested = model(path)
    collector = Collector({}, tested.hyper.facts.experts, weighing)
    collector.begin(np.ones(ids.shape, bool), tested.weights.device)
    hidden: list[torch.Tensor] = []
    embed = type(tested).embed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tested), "embed", lambda m, w: hidden.append(embed(m, w)) or hidden[0])
        collect(tested, ids, collector, **options)
    return collector, hidden[0]


def test_every_expert_is_shown_every_token_and_the_model_computes_the_same() -> None:
    ids = windows(3, 48)
    alone, hidden = collected(MERGE, ids)
    shown, same = collected(MERGE, ids, EVEN)
    assert same.equal(hidden)
    alone, shown = alone.entries(), shown.entries()
    for layer in range(4):
        everything = alone[f"blk.{layer}.ffn_gate_inp.weight"]  # the experts' input too, for all tokens
        for kind in STACKS:
            entry = shown[f"blk.{layer}.{kind}.weight"]
            assert entry.counts.tolist() == [3 * 48] * 4
            if kind != "ffn_down_exps":
                assert np.allclose(entry.squares, everything.squares, rtol=1e-6)
        down = f"blk.{layer}.ffn_down_exps.weight"
        assert (shown[down].squares >= 0.999 * alone[down].squares).all()
        assert alone[down].counts.sum() == 2 * 3 * 48


def test_tokens_weigh_by_the_probability_of_the_expert() -> None:
    """Against plain sums over what the router sees, and its matrix."""
    ids, inputs = windows(2, 48), {}
    see = Collector.see

    def spy(
        collector: Collector,
        names: tuple[str, ...],
        x: torch.Tensor,
        rows: object,
        expert: int | None,
        own: bool = True,
    ) -> None:
        if "ffn_gate_inp" in names[0]:
            inputs[names[0]] = torch.cat([*([inputs[names[0]]] if names[0] in inputs else []), x.clone()])
        see(collector, names, x, rows, expert, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "see", spy)
        collector, _ = collected(MERGE, ids, ROUTER)
    weights, entries = model(MERGE).weights, collector.entries()
    for layer in range(4):
        x = inputs[f"blk.{layer}.ffn_gate_inp.weight"].double()
        p = (x @ weights.matrix(f"blk.{layer}.ffn_gate_inp.weight").double().T).softmax(-1)
        means = (p.T @ x.square()) / p.sum(0)[:, None]  # [experts, columns]
        entry = entries[f"blk.{layer}.ffn_up_exps.weight"]
        assert entry.counts.tolist() == [2 * 48] * 4
        assert np.allclose(entry.importance().reshape(4, -1), means, rtol=1e-4)
        assert not np.allclose(means[0], means[1], rtol=0.01)


@pytest.mark.parametrize(("case", "output"), [("qwen2moe-6", "output.weight"), ("mixtral-tied-7", "token_embd.weight")])
def test_all_matrices_of_a_model_are_seen(case: str, output: str, saved: Saved) -> None:
    collector, _ = collected(saved(case), windows(2, 16) % 64, process_output=True)
    matrices = {n for n, t in model(saved(case)).weights.source.tensors.items() if len(t.shape) > 1}
    assert set(collector.entries()) == (matrices - {"token_embd.weight"}) | {output}


def stop_after(sweeps: int, chunks: int) -> Callable[[object], None]:
    def stop(event: object) -> None:
        if isinstance(event, Progress) and event.done > (2 * sweeps + 0.5) / chunks * event.total:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_stopped_run_goes_on_behind_its_finished_sweeps(sweeps: int, tmp_path: Path) -> None:
    settings = replace(FEW, state=tmp_path / "state", most=2)
    want = calibrate(MERGE, CALIB, replace(FEW, most=2), weighing=ROUTER)
    with pytest.raises(KeyboardInterrupt):
        calibrate(MERGE, CALIB, settings, weighing=ROUTER, on_event=stop_after(sweeps, 5))
    seen: list[object] = []
    have = calibrate(MERGE, CALIB, replace(settings, most=None), weighing=ROUTER, on_event=seen.append)
    assert [event.done for event in seen if isinstance(event, Started)] == [2 * sweeps]
    for name, entry in want.entries.items():
        for key in ("squares", "counts", "sums"):
            assert np.array_equal(getattr(have.entries[name], key), getattr(entry, key)), name
    assert calibrate(MERGE, CALIB, settings, weighing=EVEN, on_event=seen.append).chunks == 5
    assert "begun anew, the earlier run had another weighing" in next(e.text for e in seen if isinstance(e, Notice))


def test_sweeps_and_skipped_windows_change_nothing_else() -> None:
    whole = calibrate(MERGE, CALIB, replace(FEW, chunks=6))
    first = calibrate(MERGE, CALIB, replace(FEW, chunks=4, most=3))
    rest = calibrate(MERGE, CALIB, replace(FEW, chunks=2, skip=4))
    for name, entry in whole.entries.items():
        assert np.allclose(first.entries[name].squares + rest.entries[name].squares, entry.squares, rtol=1e-4), name
        assert (first.entries[name].counts + rest.entries[name].counts).tolist() == entry.counts.tolist(), name
    with pytest.raises(GgufMoeError, match="tokens behind the first 650 windows, expected 128 at least"):
        calibrate(MERGE, CALIB, replace(FEW, skip=650))


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    parts = bundled()
    dtype, array = parts.tensors["model.layers.2.self_attn.v_proj.weight"]
    parts.tensors["model.layers.2.self_attn.v_proj.weight"] = dtype, (array := array.copy())
    array[5, 7] = 0x7FC0  # NaN in bfloat16
    with pytest.raises(
        GgufMoeError, match=r"in: the inputs of blk\.2\.attn_output\.weight are not finite; the file is"
    ):
        calibrate(parts.save(tmp_path / "in"), CALIB, FEW)
