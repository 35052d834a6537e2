"""GGUF input in parts: shards, and the early layout with a tensor for each expert."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import bundled, with_experts
from gguf_files import Parts, changed, load, sharded
from neighbour_quantizer import quantize
from neighbours import Llama
from test_gguf_input import I32, U16, convert, refusal


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


UNDECODED = ("IQ1_S", "IQ2_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4")


@pytest.mark.parametrize("kind", UNDECODED)
def test_types_that_are_not_decoded_are_copied(kind: str, run, made, tmp_path: Path) -> None:
    """Random blocks, in stacks too; experts 0 and 2 are the same."""
    rng = np.random.default_rng(UNDECODED.index(kind))
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]

    def retype(parts: Parts) -> None:
        for name, (_, shape, _) in parts.tensors.items():
            if "_exps" in name:
                data = rng.integers(0, 64, (shape[0], shape[1] * shape[2] // block * nbytes), np.uint8)
                data[2] = data[0]
                parts.tensors[name] = (kind, shape, data.tobytes())

    source = changed(made("spm", "Q8_0"), tmp_path / "in.gguf", retype)
    want = quantize(source, tmp_path / "want.gguf", copy=True)
    assert convert(run, source, tmp_path / "out.gguf") == want
    old = changed(source, tmp_path / "old.gguf", split_experts)
    assert convert(run, old, tmp_path / "out.gguf") == want
    assert refusal(run, source, "--quant", "Q8_0", "--allow-requantize") == (
        f"gguf-moe: {source}: tensor blk.0.ffn_down_exps.weight is {kind}, which gguf-moe cannot decode to Q8_0; "
        "convert the original"
    )


def test_experts_alike_in_numbers_alone_keep_their_blocks(run, made, tmp_path: Path) -> None:
    """Blocks of zeros by their scale, with other codes: decoded they are the same."""

    def zero(parts: Parts) -> None:
        for name, (kind, shape, data) in parts.tensors.items():
            if "_exps" in name:
                blocks = np.frombuffer(data, np.uint8).reshape(shape[0], -1, 34).copy()
                blocks[:2, :, :2], blocks[0, :, 2:], blocks[1, :, 2:] = 0, 1, 2
                parts.tensors[name] = (kind, shape, blocks.tobytes())

    source = changed(made("spm", "Q8_0"), tmp_path / "in.gguf", zero)
    assert convert(run, source, tmp_path / "out.gguf") == quantize(source, tmp_path / "want.gguf", copy=True)


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
