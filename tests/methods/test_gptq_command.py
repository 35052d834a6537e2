"""What `--method gptq` prints, and what it refuses before the work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import MERGE
from gptq_runs import CALIB, FEW, one_layer

from gguf_moe.methods import gptq

GPTQ = ("--method", "gptq")
ON = (*GPTQ, "--calib")
HERE = Path(__file__).parent


def test_what_a_run_tells(run, tmp_path: Path) -> None:
    merge = one_layer().save(tmp_path / "one")
    result = run("convert", merge, "--quant", "Q4_K_S", *FEW, "-o", tmp_path / "x.gguf")
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"{merge} on 2 windows of 512 tokens, 2 a sweep; at most ")
    tenths = [line for line in lines if "% of the codes chosen, at " in line]
    assert tenths[-1] == "100 % of the codes chosen, at output.weight"
    assert len(tenths) == 10
    summary = lines[lines.index(tenths[-1]) + 1]
    assert "-Q4_K_S.gguf: error feedback in " in summary
    assert summary.endswith(" % of the plain encoder's error")
    assert " of the rows of 17 matrices, " in summary
    assert "x.gguf written in " in result.stdout


def test_a_dry_run_is_quick_and_writes_nothing(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gptq, "read_windows", None)
    plain, ours = (run("convert", MERGE, "--bits", 3, "--dry-run", *more, "-o", tmp_path) for more in ((), FEW))
    assert ours.exit_code == 0
    tables = [[line for line in result.stdout.splitlines() if "blk." in line] for result in (plain, ours)]
    assert tables[0] == tables[1] != []
    assert ours.stdout.splitlines()[-1] == f"would be written to {tmp_path}/{MERGE.name}-Q3_K_M.gguf"
    ladder = run("export", MERGE, "--quant", "Q2_K", "--dry-run", *FEW, "-o", tmp_path / "out")
    assert ladder.exit_code == 0
    for output, expected in ((plain.stdout, False), (ours.stdout, True), (ladder.stdout, True)):
        note = f"codes would be chosen on {CALIB} before, which takes far longer, and room for them twice\n"
        assert (note in output) == expected
    assert list(tmp_path.iterdir()) == []


REFUSED = [  # options; exit code; the line
    ((*GPTQ,), 2, "--method gptq needs --calib, a text"),
    (("--calib", CALIB), 2, "--calib and what goes with it are for --method gptq"),
    (("--damping", 0.1), 2, "--calib and what goes with it are for --method gptq"),
    (("--memory", "9G"), 2, "--calib and what goes with it are for --method gptq"),
    ((*ON, "absent.txt"), 1, "absent.txt: not readable: No such file or directory"),
    ((*ON, "."), 1, ".: not readable: Is a directory"),
    ((*ON, "empty.txt"), 1, "empty.txt: 1 tokens, expected 1024 at least, two windows of 512; give a longer text"),
    ((*ON, "short.txt"), 1, "short.txt: 9 tokens, expected 1024 at least, two windows of 512; give a longer text"),
    ((*ON, "latin.txt"), 1, "latin.txt: not a readable UTF-8 text: 'utf-8' codec can't decode byte 0xe9"),
    ((*FEW, "--device", "tpu9"), 2, "--device tpu9: torch cannot use it: Invalid device string: 'tpu9'"),
    ((*FEW, "--device", "meta"), 2, "--device meta: torch cannot use it: "),
    ((*FEW, "--damping", "0"), 2, "--damping 0: expected a number above 0, of 1 at most"),
    ((*FEW, "--damping", "-1"), 2, "--damping -1: expected a number above 0, of 1 at most"),
    ((*FEW, "--damping", "nan"), 2, "--damping nan: expected a number above 0, of 1 at most"),
    ((*FEW, "--damping", "inf"), 2, "--damping inf: expected a number above 0, of 1 at most"),
    (
        (*FEW, "--bits", 16),
        2,
        "--method gptq: one-4x2.7M-BF16.gguf has no matrix whose codes could be chosen; ",
    ),
    ((*FEW, "--memory", "1M"), 2, "--memory: 1.00 MB are allowed, but error feedback on 2 windows takes "),
]


@pytest.mark.parametrize(("options", "code", "line"), REFUSED)
def test_what_is_refused(options: tuple, code: int, line: str, run, tmp_path: Path, monkeypatch) -> None:
    merge = one_layer().save(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("Call me Ishmael.\n")
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    bits = () if "--bits" in options else ("--bits", 4)
    before = sorted(tmp_path.iterdir())
    result = run("convert", merge, *bits, "--name", "one", *options, "-o", tmp_path / "x.gguf")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1].startswith(f"gguf-moe: {line}")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is what this wants to be missing")
def test_no_cuda(run, tmp_path: Path) -> None:
    result = run("convert", MERGE, "--bits", 4, *FEW, "--device", "cuda", "-o", tmp_path / "x.gguf")
    assert (result.exit_code, result.stderr.startswith("gguf-moe: --device cuda: torch cannot use it: ")) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_method(run, tmp_path: Path) -> None:
    result = run("convert", MERGE, "--bits", 4, "--method", "awq", "-o", tmp_path / "x.gguf")
    assert result.exit_code == 2
    assert "Invalid value for '--method': 'awq' is not one of 'rtn', 'gptq'" in result.stderr


def test_memory_that_fits_fewer_windows_says_how_many(run, tmp_path: Path, monkeypatch) -> None:
    """The remedy is true: so many windows are taken, one more is not."""
    merge = one_layer().save(tmp_path / "one")
    resident = 500_000_000
    memory = type("Memory", (), {"memory_info": lambda self: type("Info", (), {"rss": resident})()})
    monkeypatch.setattr("gguf_moe.evaluation.memory.psutil.Process", memory)
    asked = ("convert", merge, "--quant", "Q4_K_S", *ON, CALIB, "--memory", "760M", "-o", tmp_path / "x.gguf")
    refused = run(*asked)
    assert refused.exit_code == 2
    fitting = int(refused.stderr.rpartition("; allow more, or give --calib-chunks ")[2])
    assert fitting > 1
    walked = []
    monkeypatch.setattr(gptq, "walk", lambda model, now, windows, chooser: walked.append(len(windows)) or 1 / 0)
    assert run(*asked, "--calib-chunks", fitting + 1).exit_code == 2
    with pytest.raises(ZeroDivisionError):
        run(*asked, "--calib-chunks", fitting)
    assert walked == [fitting]


@pytest.mark.parametrize("module", ["torch", "psutil"])
def test_what_is_not_installed(module: str, tmp_path: Path) -> None:
    """The default needs none of it."""
    code = f"import sys; sys.modules[{module!r}] = None; from gguf_moe.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", str(MERGE), "--quant", "F16", "-o", str(tmp_path / "x.gguf")]
    command[command.index("F16")] = "Q8_0"
    done = subprocess.run([*command, *map(str, FEW)], capture_output=True, text=True, check=False)
    said = f"gguf-moe: --method gptq needs {module}, which is not installed: pip install 'gguf-moe[eval]'\n"
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (2, said, [])
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_model_that_the_engine_cannot_run(run, tmp_path: Path) -> None:
    merge = one_layer().save(tmp_path / "one")
    key = "llama.expert_weights_scale=float:2.5"
    result = run("convert", merge, "--bits", 4, "--override-kv", key, *FEW, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 1
    assert "llama.expert_weights_scale is 2.5, expected 1.0" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("x.gguf*"))


def test_a_context_that_is_too_short_is_warned_of(run, tmp_path: Path) -> None:
    parts = one_layer()
    parts.config["max_position_embeddings"] = 256
    result = run("convert", parts.save(tmp_path / "one"), "--quant", "Q4_K_S", *FEW, "-o", tmp_path / "x.gguf")
    assert "is made for 256 tokens, windows of 512 tell little" in result.stderr


def test_a_disk_without_room_for_the_codes_too(run, tmp_path: Path, monkeypatch) -> None:
    """The file itself would fit, but not beside the chosen codes."""
    merge = one_layer().save(tmp_path / "one")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_600_000))
    plain = run("convert", merge, "--quant", "Q4_K_S", "-o", tmp_path / "plain.gguf")
    assert plain.exit_code == 0, plain.output
    size = (tmp_path / "plain.gguf").stat().st_size
    assert 1_500_000 < size < 2_600_000
    result = run("convert", merge, "--quant", "Q4_K_S", *FEW, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"gguf-moe: {tmp_path}: needs ")
    assert result.stderr.endswith(" bytes while codes are chosen, but only 2600000 are free\n")
    assert not list(tmp_path.glob("x.gguf*"))


def test_every_module_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib")
    root = HERE.parent.parent
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {str(path.parent.relative_to(root)).replace(os.sep, ".") for path in root.glob("gguf_moe/**/__init__.py")}
    assert set(listed) == there | {"quant"}
