"""GGUF files as input: the bytes of their checkpoint, and of llama.cpp's quantizer on the same file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import bundled, with_experts
from gguf_files import Parts, changed, load
from neighbour_quantizer import quantize
from neighbours import Llama
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


def sharded(source: Path, directory: Path, count: int, order: Callable[[list], list] = list) -> list[Path]:
    """Shards as llama.cpp's converter leaves them: all keys in the first, an even number of tensors in each."""
    parts = load(source)
    names = order(list(parts.tensors))
    directory.mkdir()
    paths = []
    for i in range(count):
        held = names[len(names) * i // count : len(names) * (i + 1) // count]
        shard = Parts(dict(parts.keys) if i == 0 else {}, {name: parts.tensors[name] for name in held})
        shard.set("split.no", i, U16)
        shard.set("split.count", count, U16)
        shard.set("split.tensors.count", len(names), I32)
        paths.append(shard.save(directory / f"model-{i + 1:05d}-of-{count:05d}.gguf"))
    return paths


@pytest.mark.parametrize("quant", ["Q4_K_M", "BF16"])
def test_shards_give_the_same_as_the_whole(quant: str, run, made, tmp_path: Path) -> None:
    first = sharded(made("spm", "BF16"), tmp_path / "in", 3)[0]
    assert convert(run, first, tmp_path / "out.gguf", "--quant", quant) == made("spm", quant).read_bytes()
    assert quantize(first, tmp_path / "want.gguf", "Q4_K_M") == made("spm", "Q4_K_M").read_bytes()


def resplit(path: Path, **changes: int) -> None:
    def change(parts: Parts) -> None:
        for name, value in changes.items():
            key = "split." + name.replace("_", ".")
            parts.keys[key].value = value

    shutil.move(changed(path, path.with_suffix(".new"), change), path)


SHARDS: dict[str, tuple[Callable[[list[Path]], Path], str]] = {
    "the second": (lambda p: p[1], "is shard 2 of 3; give the first, model-00001-of-00003.gguf"),
    "one missing": (
        lambda p: p[2].unlink() or p[0],
        "is the first of 3 shards, but model-00003-of-00003.gguf is missing",
    ),
    "another name": (
        lambda p: Path(shutil.move(p[0], p[0].with_name("model.gguf"))),
        "model.gguf: is shard 1 of 3 by its keys, expected a name that ends in -00001-of-00003.gguf",
    ),
    "a number repeated": (
        lambda p: resplit(p[2], no=1) or p[0],
        "model-00003-of-00003.gguf: split.no and split.count are 1 and 3, expected 2 and 3",
    ),
    "of another model": (
        lambda p: resplit(p[1], count=5) or p[0],
        "model-00002-of-00003.gguf: split.no and split.count are 1 and 5, expected 1 and 3",
    ),
    "other tensors": (
        lambda p: resplit(p[1], tensors_count=77) or p[0],
        "model-00002-of-00003.gguf: split.tensors.count is 77, but the 3 shards have 43 tensors",
    ),
    "a tensor in two": (
        lambda p: (shutil.copy(p[0], p[1]) and resplit(p[1], no=1)) or p[0],
        "stands in model-00001-of-00003.gguf too",
    ),
    "a number too large": (
        lambda p: resplit(p[0], count=65535) or p[0],
        "is shard 1 of 65535 by its keys, expected a name that ends in -00001-of-65535.gguf",
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_shards_that_do_not_fit(case: str, run, made, tmp_path: Path) -> None:
    change, message = SHARDS[case]
    path = change(sharded(made("spm", "Q4_0"), tmp_path / "in", 3))
    assert message in refusal(run, path)


def test_split_keys_in_a_whole_file_are_dropped(run, made, tmp_path: Path) -> None:
    """`llama-gguf-split --merge` leaves them with a count of 0."""

    def change(parts: Parts) -> None:
        parts.set("split.no", 0, U16)
        parts.set("split.tensors.count", 43, I32)
        parts.set("split.count", 0, U16)

    merged = changed(made("spm", "BF16"), tmp_path / "merged.gguf", change)
    assert convert(run, merged, tmp_path / "out.gguf", "--quant", "Q4_K_M") == made("spm", "Q4_K_M").read_bytes()
    assert convert(run, merged, tmp_path / "bf16.gguf", "--quant", "BF16") == made("spm", "BF16").read_bytes()


def split_experts(parts: Parts) -> None:
    """The layout of early 2024: a tensor for each expert, in the order in which the converter met them."""
    tensors: dict = {}
    for name, entry in parts.tensors.items():
        if not (match := re.fullmatch(r"(blk\.\d+\.)ffn_gate_exps\.weight", name)):
            if "_exps" not in name:
                tensors[name] = entry
            continue
        stacks = {kind: parts.tensors[f"{match[1]}ffn_{kind}_exps.weight"] for kind in ("gate", "down", "up")}
        for expert in range(entry[1][0]):
            for kind, (dtype, (count, *shape), data) in stacks.items():
                size = len(data) // count
                tensors[f"{match[1]}ffn_{kind}.{expert}.weight"] = (
                    dtype,
                    tuple(shape),
                    data[size * expert : size * (expert + 1)],
                )
    parts.tensors = tensors


@pytest.mark.parametrize("source", ["BF16", "F16", "Q4_K_M"])
def test_split_experts_are_stacked_without_loss(source: str, run, made, tmp_path: Path) -> None:
    old = changed(made("spm", source), tmp_path / "old.gguf", split_experts)
    assert "blk.3.ffn_up.3.weight" in {t.name for t in gguf.GGUFReader(old).tensors}
    want = quantize(made("spm", source), tmp_path / "want.gguf", copy=True)
    assert convert(run, old, tmp_path / "out.gguf") == want
    assert convert(run, old, tmp_path / "same.gguf", "--quant", source) == made("spm", source).read_bytes()
    with Llama(tmp_path / "out.gguf") as model:
        assert np.isfinite(model.logits([1, 400, 500])).all()


def test_an_f16_router_stays_one(run, made, tmp_path: Path) -> None:
    """As the converter of early 2024 left it; llama.cpp's quantizer keeps it, and llama.cpp runs it."""

    def half(parts: Parts) -> None:
        for name, (kind, shape, data) in parts.tensors.items():
            if "ffn_gate_inp" in name:
                assert kind == "F32"
                parts.tensors[name] = ("F16", shape, np.frombuffer(data, np.float32).astype(np.float16).tobytes())

    new = changed(made("spm", "F16"), tmp_path / "new.gguf", half)
    old = changed(new, tmp_path / "old.gguf", split_experts)
    want = quantize(new, tmp_path / "want.gguf", "Q6_K")
    assert convert(run, old, tmp_path / "out.gguf", "--quant", "Q6_K") == want
    assert load(tmp_path / "out.gguf").tensors["blk.1.ffn_gate_inp.weight"][0] == "F16"
    with Llama(tmp_path / "out.gguf") as model:
        assert np.isfinite(model.logits([1, 400, 500])).all()


def test_split_experts_are_quantized_as_stacks(run, made, tmp_path: Path) -> None:
    old = changed(made("spm", "BF16"), tmp_path / "old.gguf", split_experts)
    assert convert(run, old, tmp_path / "out.gguf", "--quant", "Q4_K_M") == made("spm", "Q4_K_M").read_bytes()


def test_twelve_split_experts_stand_by_number(run, tmp_path: Path) -> None:
    directory = with_experts(bundled(), 12).save(tmp_path / "merge")
    convert(run, directory, tmp_path / "new.gguf", "--quant", "BF16")
    old = changed(tmp_path / "new.gguf", tmp_path / "old.gguf", split_experts)
    assert convert(run, old, tmp_path / "out.gguf", "--quant", "BF16") == (tmp_path / "new.gguf").read_bytes()


def mixed(parts: Parts) -> None:
    """Expert 2 of one stack in another type, as no program wrote it but a file may have it."""
    split_experts(parts)
    _, shape, _ = parts.tensors["blk.1.ffn_up.2.weight"]
    parts.tensors["blk.1.ffn_up.2.weight"] = ("Q4_0", shape, bytes(shape[0] * shape[1] // 32 * 18))


def test_experts_of_several_types(run, made, tmp_path: Path) -> None:
    old = changed(made("spm", "Q8_0"), tmp_path / "old.gguf", mixed)
    assert refusal(run, old) == (
        f"gguf-moe: {old}: the experts of blk.1.ffn_up_exps.weight are Q4_0 and Q8_0; give --bits or --quant to make "
        "them one type"
    )
    assert "tensor blk.1.ffn_up.2.weight is Q4_0, so quantized already; as Q8_0" in refusal(run, old, "--quant", "Q8_0")
    convert(run, old, tmp_path / "out.gguf", "--quant", "Q8_0", "--allow-requantize")
    have, want = load(tmp_path / "out.gguf").tensors, load(made("spm", "Q8_0")).tensors
    name = "blk.1.ffn_up_exps.weight"
    assert {n for n in want if have[n] != want[n]} == {name}
    size = len(want[name][2]) // 4
    assert have[name][2] == want[name][2][: 2 * size] + bytes(size) + want[name][2][3 * size :]


OLD: dict[str, tuple[Callable[[Parts], object], str]] = {
    "an expert missing": (
        lambda p: p.tensors.pop("blk.2.ffn_down.3.weight"),
        "1 tensors are absent: blk.2.ffn_down.3.weight (expert_count is 4)",
    ),
    "a kind missing": (
        lambda p: [p.tensors.pop(f"blk.2.ffn_gate.{e}.weight") for e in range(4)],
        "4 tensors are absent: blk.2.ffn_gate.0.weight, blk.2.ffn_gate.1.weight, blk.2.ffn_gate.2.weight, blk.2.ffn_",
    ),
    "an expert too many": (
        lambda p: p.tensors.update({"blk.2.ffn_up.4.weight": p.tensors["blk.2.ffn_up.0.weight"]}),
        "tensor blk.2.ffn_up.4.weight is of expert 4, but expert_count is 4",
    ),
    "both layouts": (
        lambda p: p.tensors.update({"blk.2.ffn_up_exps.weight": p.tensors["blk.2.ffn_up.0.weight"]}),
        "experts are there twice, as blk.2.ffn_up_exps.weight and one by one",
    ),
    "another shape": (
        lambda p: p.tensors.update({"blk.0.ffn_up.1.weight": p.tensors["blk.0.ffn_down.1.weight"]}),
        "tensor blk.0.ffn_up.1.weight has shape [256, 512], expected that of blk.0.ffn_up.0.weight, [512, 256]",
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_split_experts_that_do_not_fit(case: str, run, made, tmp_path: Path) -> None:
    change, message = OLD[case]
    old = changed(made("spm", "BF16"), tmp_path / "old.gguf", lambda p: (split_experts(p), change(p)))
    assert message in refusal(run, old, "--bits", 4)
