"""What error feedback wins on the bundled merge: the whole calibration text, the whole evaluation text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gptq_runs import CALIB, EVAL
from test_golden import GOLDEN

WANT = json.loads((GOLDEN / "tidepool.eval.json").read_text())["transformers"]["files"]
LEVELS = ("Q2_K", "Q3_K_M", "Q4_K_M")


@pytest.mark.long
def test_half_of_what_an_importance_matrix_leaves_is_lost(run, made, merges, tmp_path: Path) -> None:
    """Against llama.cpp's files with its importance matrix of the same text, of the same sizes, as transformers ran
    them in float32."""
    files = [tmp_path / f"{level}.gguf" for level in LEVELS]
    for level, path in zip(LEVELS, files):
        options = ("--method", "gptq", "--calib", CALIB)
        result = run("convert", merges["spm"], "--quant", level, *options, "-o", path)
        assert result.exit_code == 0, result.output
    result = run("validate", merges["spm"], *files, "--text", EVAL, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    for level, found in zip(LEVELS, json.loads((tmp_path / "report.json").read_text())["files"], strict=True):
        theirs = WANT[f"{level}-imatrix"]
        assert found["kld_mean"] <= 0.6 * theirs["kld_mean"], level
        assert found["ppl"] <= theirs["ppl"], level
        assert found["routing"]["same_set"] >= theirs["routing"]["same_set"], level
        added = found["size_bytes"] - made("spm", level).stat().st_size
        assert 0 < added < 1024, "the keys alone"
