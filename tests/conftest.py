"""The bundled merge, in the forms that tests need, and its conversions made once a session."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import architectures
import pytest
from checkpoints import DATA, MERGE
from click.testing import CliRunner, Result

from gguf_moe.cli import cli

NEED_TORCH = (
    "calibrate",
    "forward",
    "imatrix_command",
    "levels",
    "memory",
    "source",
    "sweep",
    "validate",
)  # of the extra gguf-moe[eval]
collect_ignore = [] if find_spec("torch") else ["methods", *(f"evaluation/test_{name}.py" for name in NEED_TORCH)]

RunCli = Callable[..., Result]
Make = Callable[[str, str], Path]
HUB = Path(__file__).parent / "hub"


@pytest.fixture(scope="session")
def run() -> RunCli:
    """Run the command line in this process: run("convert", path, "--bits", 4)."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)

    return invoke


@pytest.fixture(scope="session")
def merges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The merge as mergekit left it ("json": tokenizer.json alone) and with its SentencePiece model beside ("spm")."""
    spm = tmp_path_factory.mktemp("spm") / MERGE.name
    shutil.copytree(MERGE, spm)
    shutil.copy(DATA / "tokenizers" / "tidepool.tokenizer.model", spm / "tokenizer.model")
    return {"json": MERGE, "spm": spm}


@pytest.fixture(scope="session")
def made(run: RunCli, merges: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made("json", "Q4_K_M"): the merge converted, once a session."""
    directory = tmp_path_factory.mktemp("made")

    def make(variant: str, quant: str) -> Path:
        path = directory / f"{variant}-{quant}.gguf"
        if not path.exists():
            result = run("convert", merges[variant], "--quant", quant, "-o", path)
            assert result.exit_code == 0, result.output
        return path

    return make


@pytest.fixture(scope="session")
def want(made) -> Callable[[Sequence[str]], dict[str, str]]:
    """What an undisturbed conversion makes."""
    return lambda quants: {q: hashlib.sha256(made("json", q).read_bytes()).hexdigest() for q in quants}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> architectures.Saved:
    """saved("qwen3"): the checkpoint of that case of `architectures`, made once a session."""
    directory = tmp_path_factory.mktemp("architectures")

    def make(name: str) -> Path:
        if not (directory / name).exists():
            architectures.save(architectures.recorded(name), directory / name)
        return directory / name

    return make


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str], list[Path]], dict[str, Any]]:
    """hub(names, files): what the Hub's own code reads, installed with npm once."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("the Hub's own readers need Node and npm")
    directory = tmp_path_factory.mktemp("hub")
    for file in ("package.json", "read.mjs"):
        shutil.copy(HUB / file, directory / file)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", "--fetch-retries=1"]
    installed = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"npm does not install the Hub's readers: {(installed.stderr + installed.stdout)[-300:]}")

    def read(names: list[str], files: list[Path]) -> dict[str, Any]:
        asked = json.dumps({"names": names, "files": [str(file) for file in files]})
        done = subprocess.run(
            ["node", "read.mjs"], cwd=directory, input=asked, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return read
