"""What the commands print and return."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
from checkpoints import MERGE

import quant
from gguf_moe import __version__, report
from gguf_moe.cli.progress import progress_of_text
from gguf_moe.evaluation.events import Progress, Started
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.recipe import FILE_TYPES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", MERGE, "--quant", "Q9_Z"], f"unknown quant 'Q9_Z', expected one of {', '.join(FILE_TYPES)}"),
        (["convert", MERGE, "--quant", "q2_k_s"], "Q2_K_S needs an importance matrix"),
        (["convert", MERGE], "give either --bits or --quant"),
        (["convert", MERGE, "--bits", "4", "--quant", "Q4_0"], "give either --bits or --quant"),
        (["convert", MERGE, "--bits", "7"], "'7' is not one of '2', '3', '4', '5', '6', '8', '16'"),
        (["convert"], "Missing argument 'MODEL'"),
    ],
)
def test_usage_errors_exit_2(arguments: list, message: str, run) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_directory_that_is_none(run, tmp_path: Path) -> None:
    result = run("convert", tmp_path / "none", "--bits", 4)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "no such directory" in result.stderr


def test_version_names_the_backend(run) -> None:
    assert run("--version").output == f"gguf-moe {__version__} (codecs: {quant.backend()})\n"


def test_plain_progress_without_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gguf_moe", "convert", MERGE, "--bits", "8", "-o", tmp_path / "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = [line.split(" %")[0] for line in done.stderr.splitlines()]
    assert steps == ["10", "20", "30", "40", "50", "60", "70", "80", "90", "100"]


def test_inspect_json_agrees_with_the_gguf_reader(run, made) -> None:
    path = made("json", "Q4_K_M")
    facts = json.loads(run("inspect", path, "--json").output)
    reader = gguf.GGUFReader(path)
    weights = sum(int(t.n_elements) for t in reader.tensors)
    nbytes = sum(int(t.n_bytes) for t in reader.tensors)
    assert facts["size_bytes"] == path.stat().st_size
    assert (facts["file_type"], facts["experts"], facts["experts_used"]) == ("Q4_K_M", 4, 2)
    assert facts["weights"] == weights
    assert facts["bits_per_weight"] == pytest.approx(8 * nbytes / weights)
    assert {name: entry["tensors"] for name, entry in facts["types"].items()} == {"Q4_K": 25, "Q6_K": 5, "F32": 13}
    assert [t["name"] for t in facts["tensors"]] == [t.name for t in reader.tensors]
    assert facts["keys"]["tokenizer.ggml.tokens"]["length"] == 4096


def test_inspect_text(run, made) -> None:
    path = made("json", "Q4_K_M")
    text = run("inspect", path).output
    assert text.startswith(f"{path}: Q4_K_M, 5.84 MB, 9181440 weights, 5.00 bits per weight\n")
    assert "experts: 4, of which 2 are used for a token" in text
    assert "general.base_model.0.name" in text
    assert "blk.0.attn_q.weight" not in text
    assert "blk.0.attn_q.weight" in run("inspect", path, "--tensors").output


@pytest.mark.parametrize("content", [b"", b"GGU", b"GGML" + bytes(60), b"GGUF" + b"\x63\0\0\0" + bytes(40)])
def test_inspect_of_no_gguf(content: bytes, run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    result = run("inspect", path)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert f"{path}: not a readable GGUF file" in result.stderr


def test_inspect_of_a_truncated_file(run, made, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(made("json", "Q2_K").read_bytes()[:-100_000])
    result = run("inspect", path)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)


def test_escapes_in_a_file_do_not_reach_the_terminal(run, tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a\x1b[2Jb\x9b")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    output = run("inspect", path).output
    assert "a\\x1b[2Jb\\x9b" in output
    assert "\x1b" not in output
    assert read_gguf(path).tensors == ()


def test_table_and_sizes() -> None:
    assert report.table([("a", 1), ("bcd", 234)], "<>") == "a      1\nbcd  234"
    assert [report.size_text(n) for n in (999, 1000, 5_838_336, 2 * 10**12)] == [
        "999 B",
        "1.00 kB",
        "5.84 MB",
        "2.00 TB",
    ]


def test_a_bar_of_windows_comes_behind_what_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_of_text("two files", None) as tell:
        tell(Started(30, 512, 1, 30, None))
        time.sleep(0.2)  # tqdm draws ten times a second at most
        tell(Progress(166, 3000))
    first, bar = terminal.getvalue().split("\n", 1)
    assert first == "two files on 30 windows of 512 tokens, 1 of them done already, 30 a sweep"
    assert "1.7 of 30 windows" in bar
