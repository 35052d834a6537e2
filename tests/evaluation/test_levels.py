"""The levels of the bundled merge on the whole evaluation text, beside the same files run by transformers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sentencepiece
from checkpoints import DATA
from running import model
from test_golden import GOLDEN

from gguf_moe.evaluation.events import Routed
from gguf_moe.evaluation.sweep import sweep

WANT = json.loads((GOLDEN / "tidepool.eval.json").read_text())["transformers"]
LEVELS = [name for name in WANT["files"] if "-" not in name]
CONTEXT = 512


@pytest.mark.long
def test_levels_lose_what_they_lose_in_transformers(made, merges) -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(merges["spm"] / "tokenizer.model"))
    ids = np.array([1, *tokenizer.encode((DATA / "text" / "eval.txt").read_text().removesuffix("\n"))])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT).copy()
    windows[:, 0] = 1  # BOS
    models = [model(path) for path in (merges["spm"], *(made("spm", level) for level in LEVELS))]
    sums = {name: np.zeros(len(models)) for name in ("nll", "kld", "same_top", "same_set", "same_first")}
    positions = 0
    for event in sweep(models, windows):
        if isinstance(event, Routed):
            pair = [routing.experts[:, CONTEXT // 2 : -1] for routing in (event.base, event.routing)]
            sets = [experts.sort(-1).values for experts in pair]
            sums["same_set"][event.model] += float((sets[0] == sets[1]).all(-1).double().mean())
            sums["same_first"][event.model] += float((pair[0] == pair[1])[..., 0].double().mean())
            continue
        base, mine = (logits.double().log_softmax(-1) for logits in (event.base, event.logits))
        sums["nll"][event.model] -= float(mine.gather(1, event.targets[:, None]).sum())
        sums["kld"][event.model] += float((base.exp() * (base - mine)).sum())
        sums["same_top"][event.model] += int((base.argmax(-1) == mine.argmax(-1)).sum())
        positions += len(event.targets) if event.model == 0 else 0
    assert math.exp(sums["nll"][0] / positions) == pytest.approx(WANT["base_ppl"], rel=1e-4)
    layers = models[0].hyper.facts.layers
    for number, level in enumerate(LEVELS, 1):
        want = WANT["files"][level]
        assert math.exp(sums["nll"][number] / positions) == pytest.approx(want["ppl"], rel=1e-3), level
        assert sums["kld"][number] / positions == pytest.approx(want["kld_mean"], rel=0.02), level
        assert 100 * sums["same_top"][number] / positions == pytest.approx(want["same_top"], abs=0.3), level
        for figure in ("same_set", "same_first"):
            assert sums[figure][number] / layers == pytest.approx(want["routing"][figure], abs=0.002), (level, figure)
