"""A model that does not fit stays within the bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("work", "chunks"), [("evaluate", 10), ("calibrate", 40)])
def test_a_model_four_times_the_memory(work: str, chunks: int, tmp_path: Path) -> None:
    path = [str(HERE.parent.parent), str(HERE.parent)]
    child = subprocess.run(
        [sys.executable, HERE / "big_model.py", tmp_path / "big", work],
        env={"PYTHONPATH": ":".join(path)},
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(child.stdout)
    assert found["size"] >= 4 * found["memory"]
    assert found["used"] <= found["planned"] <= found["memory"]
    assert found["used"] > 0.7 * found["planned"]  # the plan is no wild guess
    assert found["sweep"] < chunks
