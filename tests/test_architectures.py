"""Every family and odd shape: transformers' logits out of llama.cpp, and llama.cpp's bytes out of us.

Golden data are transformers' and llama.cpp's (tests/tools/make_architectures_golden.py); the checkpoints are made here
from names and shapes alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import architectures as cases
import numpy as np
import pytest
from checkpoints import Parts
from neighbours import Llama
from test_golden import GOLDEN

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.plan import make_plan
from gguf_moe.recipe import FILE_TYPES, find_file_type

RECORDED = json.loads((GOLDEN / "architectures.json").read_text())
LOGITS = np.load(GOLDEN / "architectures.npz")
QUANTS = [name for name in FILE_TYPES if name != "Q2_K_S"]
ENCODED = ("Q3_K_M", "Q4_K_M", "F16")  # converted whole by default; all others in the long tests
ONE_A_FAMILY = (  # whose routers are not on the edge between two experts
    *("llama", "mistral-head-dim", "mixtral-head-dim-3", "qwen2", "qwen3", "qwen2moe-6", "qwen3moe-tied-8"),
    "deepseek-5",
)
Saved = Callable[[str], Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """saved("qwen3"): the directory of that case's checkpoint, made once a session."""
    directory = tmp_path_factory.mktemp("architectures")

    def make(name: str) -> Path:
        if not (directory / name).exists():
            cases.save(parts(name), directory / name)
        return directory / name

    return make


def parts(name: str) -> Parts:
    return cases.parts(dict(RECORDED[name]["config"]), RECORDED[name]["tensors"])


def convert(run, directory: Path, quant: str, *options: object) -> Path:
    path = directory.parent / f"{directory.name}-{quant}.gguf"
    result = run("convert", directory, "--quant", quant, "--force", "-o", path, *options)
    assert result.exit_code == 0, result.output
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_golden_set_is_whole() -> None:
    assert set(RECORDED) == set(cases.CASES) == set(LOGITS)
    assert all(set(case["files"]) == set(QUANTS) for case in RECORDED.values())


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_are_transformers(name: str, run, saved: Saved) -> None:
    path = convert(run, saved(name), "F32")
    assert logits_error(path, name) < 1e-5


def logits_error(path: Path, name: str) -> float:
    """Root mean square of the difference from transformers' logits over their spread."""
    want = LOGITS[name]
    with Llama(path) as model:
        have = model.logits(cases.prompt())[list(cases.KEPT_POSITIONS)][:, cases.KEPT_LOGITS]
    return float(np.sqrt(np.mean((have - want) ** 2)) / want.std())


@pytest.mark.parametrize("name", cases.CASES)
def test_keys_types_and_order_are_llama_cpps(name: str, saved: Saved) -> None:
    checkpoint = open_checkpoint(saved(name))
    for quant in QUANTS:
        plan = make_plan(checkpoint, find_file_type(quant))
        want = RECORDED[name]["files"][quant]
        assert dict(sorted(plan.types.items())) == want["types"], quant
        assert sha256(plan.header) == want["header"], quant


@pytest.mark.parametrize("quant", ENCODED)
@pytest.mark.parametrize("name", cases.CASES)
def test_whole_files_are_llama_cpps(name: str, quant: str, run, saved: Saved) -> None:
    data = convert(run, saved(name), quant).read_bytes()
    assert sha256(data) == RECORDED[name]["files"][quant]["file"]


@pytest.mark.long
@pytest.mark.parametrize("quant", [q for q in QUANTS if q not in ENCODED])
@pytest.mark.parametrize("name", cases.CASES)
def test_whole_files_of_the_other_types_are_llama_cpps(name: str, quant: str, run, saved: Saved) -> None:
    data = convert(run, saved(name), quant).read_bytes()
    assert sha256(data) == RECORDED[name]["files"][quant]["file"]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_eight_bits_predict_closely(name: str, run, saved: Saved) -> None:
    assert logits_error(convert(run, saved(name), "Q8_0"), name) < 0.06
