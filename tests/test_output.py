"""Whole files or none: names, existing files, full disks, kills; bounded memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MERGE, Parts, bundled

import quant
from gguf_moe import filling
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.convert import convert
from gguf_moe.errors import GgufMoeError
from gguf_moe.filling import Progress
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type

MEMORY_LIMIT = 700 << 20
COMMAND = [sys.executable, "-m", "gguf_moe"]


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MERGE, tmp_path / MERGE.name))


def test_default_name_is_beside_the_model(run, tmp_path: Path) -> None:
    result = run("convert", copy(tmp_path), "--bits", 2)
    assert result.exit_code == 0
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["TidePool-4x4M-v1-Q2_K.gguf"]
    summary, last = result.stdout.splitlines()
    assert summary.startswith("Q2_K: 43 tensors as Q2_K (")
    assert "bits per weight" in summary
    assert last.startswith(f"{tmp_path / 'TidePool-4x4M-v1-Q2_K.gguf'} written in ")


def test_a_directory_as_output_and_a_relative_model(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy(tmp_path))
    assert run("convert", ".", "--quant", "q8_0", "-o", tmp_path).exit_code == 0
    assert (tmp_path / "TidePool-4x4M-v1-Q8_0.gguf").is_file()


def test_an_existing_file_needs_force(run, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("mine")
    result = run("convert", MERGE, "--bits", 2, "-o", target)
    assert (result.exit_code, result.stderr) == (1, f"gguf-moe: {target}: exists; use --force to replace it\n")
    assert target.read_text() == "mine"
    assert run("convert", MERGE, "--bits", 2, "-o", target, "--force").exit_code == 0
    assert target.read_bytes()[:4] == b"GGUF"


def test_the_checkpoint_is_never_overwritten(run, tmp_path: Path) -> None:
    merge = copy(tmp_path)
    target = merge / "model-00001-of-00006.safetensors"
    before = target.read_bytes()
    result = run("convert", merge, "--bits", 2, "-o", target, "--force")
    assert result.exit_code == 1
    assert "is a file of the checkpoint itself" in result.stderr
    assert target.read_bytes() == before


def test_a_config_is_never_overwritten(run, tmp_path: Path) -> None:
    merge = copy(tmp_path)
    result = run("convert", merge, "--bits", 2, "-o", merge / "config.json", "--force")
    assert result.exit_code == 1
    assert (merge / "config.json").read_bytes() == (MERGE / "config.json").read_bytes()


def test_only_regular_files_are_replaced(run, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = run("convert", MERGE, "--bits", 2, "-o", pipe, "--force")
    assert result.exit_code == 1
    assert f"{pipe}: is no regular file" in result.stderr
    assert pipe.is_fifo()


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    plan = make_plan(open_checkpoint(MERGE), find_file_type("Q8_0"))
    with pytest.raises(GgufMoeError, match="appeared while it was being written"):
        convert(plan, target, on_progress=lambda progress: target.write_text("precious"))
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    assert target.read_text() == "precious"


def test_a_model_card_cannot_choose_the_directory(run, tmp_path: Path) -> None:
    merge = copy(tmp_path)
    (merge / "README.md").write_text("---\nbasename: a\nfinetune: '../../up/'\n---\n")
    assert run("convert", merge, "--bits", 2).exit_code == 0
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a-4x4M-..-..-up-v1-Q2_K.gguf"]


def test_a_missing_directory(run, tmp_path: Path) -> None:
    result = run("convert", MERGE, "--bits", 2, "-o", tmp_path / "no" / "out.gguf")
    assert result.exit_code == 1
    assert f"directory {tmp_path / 'no'} does not exist" in result.stderr


def test_dry_run_writes_nothing_and_lists_all(run, made, tmp_path: Path) -> None:
    merge = copy(tmp_path)
    result = run("convert", merge, "--bits", 4, "--dry-run")
    assert result.exit_code == 0
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["blk.3.ffn_down_exps.weight", "4", "x", "256", "x", "512", "Q6_K", "430080"] in rows
    assert len([row for row in rows if row and row[0].endswith(".weight")]) == 43
    size = made("json", "Q4_K_M").stat().st_size
    assert f"9181440 weights in {size} bytes (5.84 MB), 5.00 bits per weight" in result.stdout


def test_too_little_space_is_found_before_writing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = run("convert", MERGE, "--bits", 4, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1
    assert "needs 5838336 bytes, but only 1000000 are free" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))"
    code = f"{limit}; from gguf_moe.cli import main; main()"
    arguments = ["convert", str(MERGE), "--bits", "4", "-o", str(tmp_path / "out.gguf")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"gguf-moe: {tmp_path / 'out.gguf'}: not written: [Errno 27] File too large"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", quant.BACKENDS)
def test_bytes_depend_neither_on_threads_nor_pieces_nor_backend(
    backend: str, tmp_path: Path, made, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plan = make_plan(open_checkpoint(MERGE), find_file_type("Q4_K_M"))
    want = hashlib.sha256(made("json", "Q4_K_M").read_bytes()).hexdigest()
    quant.use_backend(backend)
    request.addfinalizer(lambda: quant.use_backend(None))
    for threads, weights in ((1, 1 << 20), (2, 1 << 16), (3, 12_345), (8, 1 << 18)):
        monkeypatch.setattr(filling, "PIECE_WEIGHTS", weights)
        target = tmp_path / f"{threads}.gguf"
        convert(plan, target, threads=threads)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == want


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(MERGE), find_file_type("Q8_0"))

    def fail(progress: Progress) -> None:
        if progress.done > progress.total // 2:
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, tmp_path / "out.gguf", on_progress=fail)
    assert list(tmp_path.iterdir()) == []


def start_slow_conversion(tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    """A conversion that has begun to write: it stops at the first line of progress, until it is killed."""
    code = "import time; from gguf_moe import cli; from gguf_moe.cli import progress; progress.PLAIN_STEPS = 100; "
    code += "echo = progress.click.echo; "
    code += "progress.click.echo = lambda *a, **k: (echo(*a, **k), time.sleep(60)); cli.main()"
    target = tmp_path / "out.gguf"
    arguments = ["convert", str(MERGE), "--bits", "6", "-o", str(target)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "% written" in process.stderr.readline()
    assert [p.name.endswith(".partial") for p in tmp_path.iterdir()] == [True]
    return process, target


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupts_clean_up(number: signal.Signals, tmp_path: Path) -> None:
    process, _ = start_slow_conversion(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_final_name(tmp_path: Path) -> None:
    process, target = start_slow_conversion(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert not target.exists()
    done = subprocess.run([*COMMAND, "convert", MERGE, "--bits", "6", "-o", target], capture_output=True, check=False)
    assert done.returncode == 0
    assert target.is_file()


@pytest.fixture(scope="module")
def big_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of an 8x7B Mixtral, experts fused as mergekit writes them: 1.4 billion weights."""
    hidden, feed_forward, experts = 4096, 14336, 8
    parts = bundled()
    parts.config.update(hidden_size=hidden, intermediate_size=feed_forward, num_local_experts=experts)
    parts.config.update(num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    rows = np.random.default_rng(5).normal(0, 0.02, (64, hidden)).astype(np.float32).view(np.uint32) >> 16
    rows = rows.astype(np.uint16)

    def matrix(*shape: int) -> tuple[str, np.ndarray]:
        return "BF16", np.resize(rows, shape)

    layer = "model.layers.0."
    tensors = {"model.embed_tokens.weight": matrix(4096, hidden), "model.norm.weight": matrix(hidden)}
    tensors["lm_head.weight"] = matrix(4096, hidden)
    tensors[layer + "mlp.gate.weight"] = matrix(experts, hidden)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}{name}.weight"] = matrix(hidden)
    for name, rows_of in (("q", hidden), ("k", 1024), ("v", 1024), ("o", hidden)):
        tensors[f"{layer}self_attn.{name}_proj.weight"] = matrix(rows_of, hidden)
    tensors[layer + "mlp.experts.gate_up_proj"] = matrix(experts, 2 * feed_forward, hidden)
    tensors[layer + "mlp.experts.down_proj"] = matrix(experts, hidden, feed_forward)
    return Parts(tensors, parts.config, dict.fromkeys(tensors, "model-00001-of-00001.safetensors")).save(
        tmp_path_factory.mktemp("big")
    )


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize("quant", ["Q4_K_M", "BF16"])
def test_memory_stays_bounded_for_experts_of_14336_x_4096(quant: str, big_layer: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    convert_within_the_limit(big_layer, target, "--quant", quant)
    within_the_limit("verify", str(target))
    within_the_limit("verify", str(target), "--against", str(big_layer))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_memory_stays_bounded_for_gguf_files(big_layer: Path, tmp_path: Path) -> None:
    """Read as bf16, decoded from blocks, and copied."""
    bf16, q8_0, target = (tmp_path / name for name in ("bf16.gguf", "q8_0.gguf", "out.gguf"))
    convert_within_the_limit(big_layer, bf16, "--quant", "BF16")
    convert_within_the_limit(bf16, q8_0, "--quant", "Q8_0")
    convert_within_the_limit(q8_0, target, "--quant", "Q4_K_M", "--allow-requantize")
    convert_within_the_limit(q8_0, target, "--force")
    assert target.read_bytes() == q8_0.read_bytes()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_a_ladder_stays_below_a_gibibyte_resident(big_layer: Path, tmp_path: Path) -> None:
    code = "import re; from gguf_moe.cli import cli; cli(standalone_mode=False); "
    code += "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    command = [sys.executable, "-c", code, "export", big_layer, "-o", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 1 << 20


def convert_within_the_limit(source: Path, target: Path, *options: str) -> None:
    within_the_limit("convert", str(source), "-o", str(target), *options)


def within_the_limit(*arguments: str) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))"
    code = f"{limit}; from gguf_moe.cli import main; main()"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # the limit counts the stacks of idle threads too
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
