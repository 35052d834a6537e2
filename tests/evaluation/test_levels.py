"""The levels of the bundled merge on the whole evaluation text, beside the same files run by transformers."""

from __future__ import annotations

import json

import pytest
from checkpoints import DATA
from test_golden import GOLDEN

WANT = json.loads((GOLDEN / "tidepool.eval.json").read_text())["transformers"]
LEVELS = [name for name in WANT["files"] if "-" not in name]


@pytest.mark.long
def test_levels_lose_what_they_lose_in_transformers(run, made, merges, tmp_path) -> None:
    files = [made("spm", level) for level in LEVELS]
    result = run(
        "validate", merges["spm"], *files, "--text", DATA / "text" / "eval.txt", "--json", tmp_path / "report.json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["base"]["ppl"] == pytest.approx(WANT["base_ppl"], rel=1e-4)
    for have, want in zip(report["base"]["load"]["tokens"], WANT["base_load_per_layer"]):
        assert have == pytest.approx(want, abs=1e-3)
    for level, found in zip(LEVELS, report["files"]):
        want = WANT["files"][level]
        assert found["ppl"] == pytest.approx(want["ppl"], rel=1e-3), level
        assert found["kld_mean"] == pytest.approx(want["kld_mean"], rel=0.02), level
        assert found["same_top"] == pytest.approx(want["same_top"], abs=0.3), level
        for figure in ("same_set", "same_first"):
            assert found["routing"][figure] == pytest.approx(want["routing"][figure], abs=0.002), (level, figure)
