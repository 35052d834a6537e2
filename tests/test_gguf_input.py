"""GGUF files as input: the bytes of their checkpoint, and of llama.cpp's quantizer on the same file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import bundled
from gguf_files import Parts, changed, load, sharded
from neighbour_quantizer import quantize
from test_golden import GOLDEN, QUANTS

from gguf_moe.gguf_reader import read_gguf

FLOATS = ("F32", "F16", "BF16")
STRING, ARRAY, U32, I32, U16 = (
    getattr(gguf.GGUFValueType, name) for name in ("STRING", "ARRAY", "UINT32", "INT32", "UINT16")
)


def convert(run, source: Path, target: Path, *options: object) -> bytes:
    result = run("convert", source, "-o", target, "--force", *options)
    assert result.exit_code == 0, result.stderr
    return target.read_bytes()


def refusal(run, source: Path, *options: object) -> str:
    """The one line that `convert` prints; asserts that nothing was left beside the source."""
    before = sorted(source.parent.iterdir())
    result = run("convert", source, *options)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert sorted(source.parent.iterdir()) == before
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant not in FLOATS])
def test_bf16_gives_what_llama_cpp_made_of_the_checkpoint(quant: str, run, made, tmp_path: Path) -> None:
    want = json.loads((GOLDEN / f"tidepool-spm.{quant}.json").read_text())["file"]
    data = convert(run, made("spm", "BF16"), tmp_path / "out.gguf", "--quant", quant)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (want["size"], want["sha256"])


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("quant", ["Q2_K", "Q4_K_M", "Q5_0", "IQ4_XS", "Q8_0"])
def test_quantized_as_by_llama_cpp(source: str, quant: str, run, made, tmp_path: Path) -> None:
    want = quantize(made("json", source), tmp_path / "want.gguf", quant)
    assert convert(run, made("json", source), tmp_path / "out.gguf", "--quant", quant) == want


@pytest.mark.parametrize("source", ["F32", "BF16"])
@pytest.mark.parametrize("quant", FLOATS)
def test_16_and_32_bits_stay_what_the_checkpoint_gives(source: str, quant: str, run, made, tmp_path: Path) -> None:
    data = convert(run, made("spm", source), tmp_path / "out.gguf", "--quant", quant)
    assert data == made("spm", quant).read_bytes()


@pytest.mark.parametrize("source", ["Q8_0", "Q4_K_M", "IQ4_NL", "Q5_1"])
@pytest.mark.parametrize("quant", ["Q2_K", "Q4_K_M", "Q8_0", "F16", "F32"])
def test_requantized_as_by_llama_cpp(source: str, quant: str, run, made, tmp_path: Path) -> None:
    want = quantize(made("spm", source), tmp_path / "want.gguf", quant, allow_requantize=True)
    options = ("--quant", quant, "--allow-requantize")
    assert convert(run, made("spm", source), tmp_path / "out.gguf", *options) == want


def test_requantizing_has_to_be_allowed(run, made, tmp_path: Path) -> None:
    source = Path(shutil.copy(made("spm", "Q8_0"), tmp_path / "in.gguf"))
    assert refusal(run, source, "--bits", 4) == (
        f"gguf-moe: {source}: tensor output.weight is Q8_0, so quantized already; as Q6_K it would be worse than from "
        "the original: convert that, or give --allow-requantize"
    )
    assert convert(run, source, tmp_path / "out.gguf", "--quant", "Q8_0") == source.read_bytes()


@pytest.mark.parametrize("source", ["BF16", "F16", "Q4_K_M", "Q2_K"])
def test_without_a_file_type_all_types_are_kept(source: str, run, made, tmp_path: Path) -> None:
    want = quantize(made("spm", source), tmp_path / "want.gguf", copy=True)
    assert convert(run, made("spm", source), tmp_path / "out.gguf") == want


@pytest.mark.parametrize("source", ["F32", "BF16", "Q4_K_M", "Q3_K_S", "Q6_K"])
def test_a_file_type_that_the_file_does_not_say_is_guessed(source: str, run, made, tmp_path: Path) -> None:
    bare = changed(made("spm", source), tmp_path / "bare.gguf", lambda p: p.keys.pop("general.file_type"))
    want = quantize(bare, tmp_path / "want.gguf", copy=True)
    assert convert(run, bare, tmp_path / "out.gguf") == want


def test_the_default_name_is_beside_the_file_and_never_it(run, made, tmp_path: Path) -> None:
    source = Path(shutil.copy(made("spm", "BF16"), tmp_path / "TidePool-4x4M-v1-BF16.gguf"))
    assert (
        refusal(run, source, "--force") == f"gguf-moe: {source}: is the input itself; name another file with --output"
    )
    assert run("convert", source, "--bits", 4).exit_code == 0
    assert (tmp_path / "TidePool-4x4M-v1-Q4_K_M.gguf").read_bytes() == made("spm", "Q4_K_M").read_bytes()
    alias = tmp_path / "alias.gguf"
    alias.hardlink_to(source)
    assert "is the input itself" in refusal(run, source, "--bits", 4, "-o", alias, "--force")
    assert source.read_bytes() == made("spm", "BF16").read_bytes()


def test_without_a_name_the_default_is_the_files(run, made, tmp_path: Path) -> None:
    def nameless(parts: Parts) -> None:
        for name in [name for name in parts.keys if name.startswith("general.") and name != "general.architecture"]:
            del parts.keys[name]

    source = changed(made("spm", "BF16"), tmp_path / "old model.bf16.gguf", nameless)
    assert run("convert", source, "--bits", 2).exit_code == 0
    assert (tmp_path / "old-model-Q2_K.gguf").is_file()
    first = sharded(source, tmp_path / "in", 2)[0]
    assert run("convert", first, "--bits", 2).exit_code == 0
    assert (tmp_path / "in" / "model-Q2_K.gguf").is_file()


# Keys that the gguf package writes and llama.cpp's quantizer copies: all kinds, empty ones, NULs.
def odd_keys(parts: Parts) -> None:
    kinds = gguf.GGUFValueType
    for kind in (kinds.UINT8, kinds.UINT16, kinds.UINT32, kinds.UINT64):
        parts.set(f"x.{kind.name}", 200, kind)
    for kind in (kinds.INT8, kinds.INT16, kinds.INT32, kinds.INT64):
        parts.set(f"x.{kind.name}", -100, kind)
        parts.set(f"x.{kind.name}s", [1, -2, 3], ARRAY, kind)
    parts.set("x.f32", float(np.float32(0.1)), kinds.FLOAT32)
    parts.set("x.f64", 0.1, kinds.FLOAT64)
    parts.set("x.bool", True, kinds.BOOL)
    parts.set("x.bools", [True, False], ARRAY, kinds.BOOL)
    parts.set("x.empty", "", STRING)
    parts.set("x.latin", b"caf\xe9", STRING)
    parts.set("x.nul", "cut\0here", STRING)
    parts.set("x.nuls", ["a\0b", "", b"\xff\0", "c"], ARRAY, STRING)


def test_keys_are_copied_as_by_llama_cpp(run, made, tmp_path: Path) -> None:
    source = changed(made("spm", "BF16"), tmp_path / "odd.gguf", odd_keys)
    assert b"cut\0here" in source.read_bytes()
    want = quantize(source, tmp_path / "want.gguf", "Q4_0")
    assert convert(run, source, tmp_path / "out.gguf", "--quant", "Q4_0") == want
    assert b"cut\0here" not in want
    assert convert(run, source, tmp_path / "same.gguf", "--quant", "BF16") == source.read_bytes()


def test_empty_arrays_are_copied_as_by_llama_cpp(run, made, tmp_path: Path) -> None:
    """The gguf package writes none, so one is put in by hand: a key of 25 bytes, in place of a text of one's length."""
    filler = changed(made("spm", "BF16"), tmp_path / "f.gguf", lambda p: p.set("x.e", "12345678", STRING))
    old = b"\x03\0\0\0\0\0\0\0x.e" + b"\x08\0\0\0" + b"\x08\0\0\0\0\0\0\0" + b"12345678"
    new = b"\x07\0\0\0\0\0\0\0x.empty" + b"\x09\0\0\0" + b"\x04\0\0\0" + bytes(8)
    assert len(old) == len(new)
    data = filler.read_bytes()
    assert data.count(old) == 1
    source = tmp_path / "empty.gguf"
    source.write_bytes(data.replace(old, new))
    want = quantize(source, tmp_path / "want.gguf", "Q8_0")
    assert convert(run, source, tmp_path / "out.gguf", "--quant", "Q8_0") == want


def test_a_nul_in_a_checkpoints_texts_is_cut_as_by_llama_cpp(run, tmp_path: Path) -> None:
    directory = bundled().save(tmp_path / "merge")
    content = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": "a\0b"}))
    bf16 = convert(run, directory, tmp_path / "bf16.gguf", "--quant", "BF16")
    assert b"a\0b" in bf16
    want = quantize(tmp_path / "bf16.gguf", tmp_path / "want.gguf", "Q5_0")
    assert convert(run, directory, tmp_path / "out.gguf", "--quant", "Q5_0") == want


@pytest.mark.parametrize("align", [8, 64, 1024])
def test_any_alignment_is_read_and_32_written(align: int, run, made, tmp_path: Path) -> None:
    source = load(made("spm", "BF16")).save(tmp_path / "in.gguf", align)
    assert read_gguf(source).keys["general.alignment"] == align
    assert convert(run, source, tmp_path / "out.gguf", "--quant", "Q4_K_M") == made("spm", "Q4_K_M").read_bytes()


def test_version_2_is_read(run, made, tmp_path: Path) -> None:
    data = made("spm", "BF16").read_bytes()
    source = tmp_path / "v2.gguf"
    source.write_bytes(data[:4] + b"\x02" + data[5:])
    assert convert(run, source, tmp_path / "out.gguf", "--quant", "Q4_K_M") == made("spm", "Q4_K_M").read_bytes()
