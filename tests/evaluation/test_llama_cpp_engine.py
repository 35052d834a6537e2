"""llama.cpp as an engine: its logits under our formulas give llama-perplexity's figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import DATA, MERGE
from neighbours import Llama
from test_golden import GOLDEN

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation import llama_cpp
from gguf_moe.evaluation.events import Progress
from gguf_moe.evaluation.figures import Scores, figures
from gguf_moe.evaluation.llama_cpp import libllama, load, sweep
from gguf_moe.evaluation.text import EvaluationText, read_text

EVALUATION = json.loads((GOLDEN / "tidepool.eval.json").read_text())["files"]
LEVELS = [name.split()[1] for name in EVALUATION if "imatrix" not in name]


def evaluation_text(path: Path, chunks: int | None = None) -> EvaluationText:
    with Llama(path, vocabulary_only=True) as model:
        return read_text(DATA / "text" / "eval.txt", model.text_tokenizer(), chunks=chunks)


def evaluate(files: list[Path], chunks: int | None = None) -> list[dict[str, float]]:
    """The figures of all files, the first of which is the base."""
    scores = [Scores(str(path)) for path in files]
    text = evaluation_text(files[0], chunks)
    with load(files, 512, threads=1) as models:
        for event in sweep(models, text.windows):
            scores[event.model].add(event.base, event.logits, event.targets)
    return [figures(score) for score in scores]


def check(found: dict[str, float], quant: str) -> None:
    """Against llama-perplexity's figures of the same file, whose base logits were rounded to 16 bits."""
    golden = EVALUATION[f"tidepool-spm {quant}"]
    for name in ("ppl", "ppl_base", "ppl_ratio"):
        assert found[name] == pytest.approx(golden[name], rel=0.002), name
    for name, theirs in (("kld_mean", "kld_mean"), ("kld_median", "kld_median"), ("dp_rms", "dp_rms_percent")):
        assert found[name] == pytest.approx(golden[theirs], rel=0.03, abs=5e-7), name
    for name in ("kld_p90", "kld_p95", "kld_p99", "kld_p999", "ppl_error", "ppl_base_error", "ppl_ratio_error"):
        assert found[name] == pytest.approx(golden[name], rel=0.05, abs=1e-6), name
    assert found["kld_error"] == pytest.approx(golden["kld_mean_error"], rel=0.05, abs=1e-6)
    assert found["same_top"] == pytest.approx(golden["same_top_percent"], abs=0.3)
    assert found["dp_mean"] == pytest.approx(golden["dp_mean_percent"], abs=0.02)
    assert found["correlation"] == pytest.approx(golden["correlation_percent"], abs=0.02)


def test_figures_of_four_bits_are_llama_perplexitys(made) -> None:
    base, level = evaluate([made("spm", "BF16"), made("spm", "Q4_K_M")])
    check(level, "Q4_K_M")
    assert (base["kld_max"], base["same_top"], base["ppl_ratio"]) == (0, 100, 1)
    assert base["ppl"] == level["ppl_base"]


@pytest.mark.long
def test_figures_of_every_level_are_llama_perplexitys(made) -> None:
    _, *levels = evaluate([made("spm", quant) for quant in ("BF16", *LEVELS)])
    for found, quant in zip(levels, LEVELS):
        check(found, quant)


def test_windows_are_evaluated_alone_and_the_base_once(made, monkeypatch: pytest.MonkeyPatch) -> None:
    files, calls = [made("json", "Q8_0"), made("json", "Q2_K"), made("json", "Q2_K")], []
    text = evaluation_text(files[0], chunks=2)
    logits = llama_cpp.Llama.logits
    monkeypatch.setattr(llama_cpp.Llama, "logits", lambda self, *a: calls.append(self.path) or logits(self, *a))
    progress: list[Progress] = []
    with load(files, 512, threads=1) as models:
        events = list(sweep(models, text.windows, progress.append))
    assert calls == files * 2
    assert progress == [Progress(done, 6) for done in range(1, 7)]
    assert [(event.model, event.chunk) for event in events] == [(m, c) for c in (0, 1) for m in (0, 1, 2)]
    for one, other in zip(events[1::3], events[2::3]):
        assert np.array_equal(one.logits, other.logits), "of the same file"
    with Llama(files[1], exact=False) as model:
        whole = model.logits(text.windows[1])
    assert np.array_equal(events[4].logits, whole[256:511])
    assert np.array_equal(events[4].targets, text.windows[1, 257:])
    assert events[4].base is events[3].logits


def test_without_xllamacpp_it_says_how_to_get_it(made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    libllama.cache_clear()
    with pytest.raises(UsageError, match=r"--engine llama\.cpp needs the xllamacpp package .*pip install 'gguf-moe\["):
        load([made("json", "Q2_K")], 8).__enter__()
    libllama.cache_clear()


def test_what_llama_cpp_does_not_run_is_refused(made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes GGUF files only; make one: gguf-moe convert --bits 16"):
        load([MERGE], 8).__enter__()
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(GgufMoeError, match=r"a\.gguf: llama\.cpp does not load it: .+"):
        load([made("json", "Q2_K"), tmp_path / "a.gguf"], 8).__enter__()
    with (
        load([made("json", "Q2_K")], 8) as models,
        pytest.raises(GgufMoeError, match=r"llama\.cpp does not evaluate it \(status -1\): .*invalid token.*"),
    ):
        next(sweep(models, np.full((1, 8), 4096, np.int32)))
