"""llama.cpp runs our files, and says what transformers and llama.cpp's own files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DATA
from neighbours import Llama
from test_golden import GOLDEN, QUANTS

from gguf_moe.errors import GgufMoeError

# Made by transformers in float32: tests/tools/make_transformers_golden.py.
TRANSFORMERS = np.load(GOLDEN / "transformers.npz")
PROMPTS = range(4)
EVALUATION = json.loads((GOLDEN / "tidepool.eval.json").read_text())

# llama.cpp rounds activations to the weights' precision: root mean square of the difference over the logits' spread,
# and how close two logits must be to change places.
TOLERANCE = {"F32": (1e-5, 1e-3), "BF16": (0.005, 0.1), "Q8_0": (0.02, 0.4)}


@pytest.mark.parametrize("quant", TOLERANCE)
def test_logits_and_greedy_continuation_are_transformers(quant: str, made) -> None:
    spread, tie = TOLERANCE[quant]
    whole = 0
    with Llama(made("json", quant)) as model:
        for i in PROMPTS:
            ids = TRANSFORMERS[f"prompt{i}"].tolist()
            want = TRANSFORMERS[f"logits{i}"]
            have = model.logits(ids)[-len(want) :]
            assert np.sqrt(np.mean((have - want) ** 2)) <= spread * want.std()
            for expected in TRANSFORMERS[f"greedy{i}"][len(ids) :]:
                last = model.logits(ids)[-1]
                chosen = int(last.argmax())
                if chosen != expected:
                    assert last[chosen] - last[expected] <= tie, f"prompt {i}, token {len(ids)}"
                    break
                ids.append(chosen)
            else:
                whole += 1
    assert whole >= 3, "greedy continuations part from transformers"


@pytest.mark.parametrize("quant", QUANTS)
def test_every_level_loads_and_predicts(quant: str, made) -> None:
    text = (DATA / "text" / "eval.txt").read_text()
    with Llama(made("json", quant), exact=False) as model:
        # The first four windows are hard: 55.6 with F32 weights. llama.cpp's own scores for tokenizer.json more than
        # double the perplexity of the whole text.
        assert 54 < model.perplexity(text, chunks=4) < 64


def test_perplexity_without_a_sentencepiece_model_is_the_golden_one_too(made) -> None:
    text = (DATA / "text" / "eval.txt").read_text()
    with Llama(made("json", "Q4_K_M"), exact=False) as model:
        assert model.perplexity(text) == pytest.approx(EVALUATION["files"]["tidepool-spm Q4_K_M"]["ppl"], rel=0.002)


def test_a_corrupt_file_is_noticed_by_the_neighbour(made, tmp_path: Path) -> None:
    """The tests above can fail: half a file does not load."""
    half = tmp_path / "half.gguf"
    half.write_bytes(made("json", "Q2_K").read_bytes()[:2_000_000])
    with pytest.raises(GgufMoeError, match=r"half\.gguf: llama\.cpp does not load it: .*"):
        Llama(half)
