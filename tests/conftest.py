"""The bundled merge, in the forms that tests need, and its conversions made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import architectures
import pytest
from checkpoints import DATA, MERGE
from click.testing import CliRunner, Result

from gguf_moe.cli import cli

collect_ignore = [] if find_spec("torch") else ["evaluation"]  # needs the extra gguf-moe[eval]

RunCli = Callable[..., Result]
Make = Callable[[str, str], Path]


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
def saved(tmp_path_factory: pytest.TempPathFactory) -> architectures.Saved:
    """saved("qwen3"): the checkpoint of that case of `architectures`, made once a session."""
    directory = tmp_path_factory.mktemp("architectures")

    def make(name: str) -> Path:
        if not (directory / name).exists():
            architectures.save(architectures.recorded(name), directory / name)
        return directory / name

    return make
