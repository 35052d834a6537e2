"""A model that does not fit stays within the bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import bundled, with_experts

HERE = Path(__file__).parent
MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")


def measured(path: Path, *numbers: int) -> dict[str, int]:
    """What the child tells, whose plan has to hold and to be no wild guess."""
    child = subprocess.run(
        [sys.executable, HERE / "big_model.py", path, *map(str, numbers)],
        env={"PYTHONPATH": ":".join([str(HERE.parent.parent), str(HERE.parent)])},
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(child.stdout)
    assert 0.7 * found["planned"] < found["used"] <= found["planned"] <= found["memory"]
    return found


@pytest.mark.parametrize(("models", "chunks"), [(2, 10), (0, 40)])
def test_a_model_four_times_the_memory(models: int, chunks: int, tmp_path: Path) -> None:
    found = measured(tmp_path / "big", models, chunks, 96, 256 * MIB)
    assert found["size"] >= 4 * found["memory"]
    assert found["sweeps"] > 1


def test_logits_of_long_windows(tmp_path: Path) -> None:
    path = with_experts(bundled(), 4).save(tmp_path / "one layer")
    assert measured(path, 3, 8, 3072, 2048 * MIB)["group"] == 8
