"""A ladder whose codes error feedback chose, made once for the tests of what is to be said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import MERGE
from gptq_runs import GPTQ, LEVELS

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.origin import Origin
from gguf_moe.request import Request


@pytest.fixture(scope="session")
def ladder(run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three levels of one calibration, exported with --verify, and what was printed."""
    directory = tmp_path_factory.mktemp("ladder")
    levels = [argument for level in LEVELS for argument in ("--quant", level)]
    result = run("export", MERGE, "-o", directory, *levels, *GPTQ, "--calib-original", "--verify")
    assert result.exit_code == 0, result.output
    return directory, result.stdout


@pytest.fixture(scope="session")
def level(ladder) -> Callable[[str], Path]:
    return lambda quant: next(ladder[0].glob(f"*-{quant}.gguf"))


@pytest.fixture(scope="session")
def origin() -> Origin:
    return Origin(open_checkpoint(MERGE), Request())
