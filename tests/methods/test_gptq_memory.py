"""Choosing codes stays within the memory that it tells, with moments in memory or in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
HERE = Path(__file__).parent
MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("more", "spilled"), [(1024 * MIB, False), (280 * MIB, True)])
def test_the_plan_holds(more: int, spilled: bool, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, HERE / "wide_model.py", tmp_path, "3072", str(more)],
        env={"PYTHONPATH": ":".join([str(HERE.parent.parent), str(HERE.parent)])},
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(child.stdout)
    assert found["spilled"] == spilled
    assert 0.7 * found["planned"] < found["used"] <= found["planned"] <= found["memory"]
    assert not list(tmp_path.glob("*.gptq"))
