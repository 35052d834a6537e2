"""GGUF files that are well-formed but no working model: shown by `inspect`, refused by `convert` in one line."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import Parts, changed, load
from neighbour_quantizer import quantize
from test_gguf_input import ARRAY, I32, STRING, U32, convert, refusal

from gguf_moe.convert import convert as run_plan
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_source import open_gguf
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type

F32, BOOL = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.BOOL
TOKENS, TYPES, SCORES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores"))
HINT = "; --override-kv sets it"


def put(name: str, value: object, kind: gguf.GGUFValueType = U32, element: object = None) -> Callable[[Parts], None]:
    return lambda parts: parts.set(name, value, kind, element)


def edit(name: str, change: Callable[[list], object]) -> Callable[[Parts], None]:
    return lambda parts: change(parts.keys[name].value)


def drop(name: str) -> Callable[[Parts], object]:
    return lambda parts: parts.keys.pop(name)


def byte_token(text: str) -> Callable[[Parts], None]:
    return edit(TOKENS, lambda tokens: tokens.__setitem__(7, text))


CASES: dict[str, tuple[Callable[[Parts], object], str]] = {
    # (12) sizes that contradict each other
    "no architecture": (drop("general.architecture"), "general.architecture is missing, expected the name of a model"),
    "architecture a number": (
        put("general.architecture", 3),
        "general.architecture is 3, expected the name of a model",
    ),
    "no layers": (drop("llama.block_count"), "llama.block_count is missing, expected an integer from 1 to 512"),
    "0 layers": (put("llama.block_count", 0), "llama.block_count is 0, expected an integer from 1 to 512"),
    "2^31 layers": (put("llama.block_count", 1 << 31), f"llama.block_count is {1 << 31}, expected an integer from 1"),
    "layers as text": (put("llama.block_count", "4", STRING), "llama.block_count is '4', expected an integer from 1"),
    "too few layers": (
        put("llama.block_count", 3),
        "llama.block_count is 3, expected more than the layer of tensor blk.3.attn_k.weight",
    ),
    "no experts": (
        drop("llama.expert_count"),
        "llama.expert_count is missing, expected that of blk.0.ffn_down_exps.weight of shape [4, 256, 512]",
    ),
    "0 experts": (put("llama.expert_count", 0), "llama.expert_count is 0, expected that of blk.0.ffn_down_exps.weight"),
    "1 expert": (put("llama.expert_count", 1), "llama.expert_used_count is 2, expected an integer from 1 to 1"),
    "3 experts": (put("llama.expert_count", 3), "llama.expert_count is 3, expected that of blk.0.ffn_down_exps.weight"),
    "1025 experts": (put("llama.expert_count", 1025), "llama.expert_count is 1025, expected an integer from 0 to 1024"),
    "0 experts used": (
        put("llama.expert_used_count", 0),
        "llama.expert_used_count is 0, expected an integer from 1 to 4",
    ),
    "5 experts used": (
        put("llama.expert_used_count", 5),
        "llama.expert_used_count is 5, expected an integer from 1 to 4",
    ),
    "no experts used": (drop("llama.expert_used_count"), "llama.expert_used_count is missing, expected an integer"),
    "0 heads": (put("llama.attention.head_count", 0), "head_count is 0, expected a positive integer"),
    "no heads": (drop("llama.attention.head_count"), "head_count is missing, expected a positive integer"),
    "more key heads": (
        put("llama.attention.head_count_kv", 8),
        "head_count_kv is 8, expected a divisor of head_count, 4",
    ),
    "3 key heads": (
        put("llama.attention.head_count_kv", 3),
        "head_count_kv is 3, expected a divisor of head_count, 4",
    ),
    "0 key heads": (
        put("llama.attention.head_count_kv", 0),
        "head_count_kv is 0, expected a divisor of head_count, 4",
    ),
    "negative heads": (
        put("llama.attention.head_count", -4, I32),
        "head_count is -4, expected an integer, or 4 of them",
    ),
    "heads of 3 layers": (
        put("llama.attention.head_count", [4, 4, 4], ARRAY, U32),
        "llama.attention.head_count is an array of 3, expected an integer, or 4 of them",
    ),
    "odd rotary dimension": (put("llama.rope.dimension_count", 63), "rope.dimension_count is 63, expected an even"),
    **{
        f"epsilon {value}": (
            put("llama.attention.layer_norm_rms_epsilon", value, F32),
            f"llama.attention.layer_norm_rms_epsilon is {value}, expected a positive number{HINT}",
        )
        for value in (0.0, math.nan, math.inf, -1.0)
    },
    "an adapter": (put("general.type", "adapter", STRING), "general.type is 'adapter', expected 'model'"),
    "no tensors": (lambda p: p.tensors.clear(), "no tensors, expected a model"),
    "an empty tensor": (
        lambda p: p.tensors.update({"output_norm.weight": ("F32", (0,), b"")}),
        "tensor output_norm.weight has shape [0], so no weights",
    ),
    # (13) vocabularies
    "tokens a number": (put(TOKENS, 3), f"{TOKENS} is 3, expected an array of texts"),
    "tokens of numbers": (put(TOKENS, [1, 2], ARRAY, I32), f"{TOKENS} is an array of 2, expected an array of texts"),
    "a token too few": (edit(TOKENS, lambda t: t.pop()), f"{SCORES} is an array of 4096, expected an array of 4095"),
    "a score too few": (
        edit(SCORES, lambda t: t.pop()),
        f"{SCORES} is an array of 4095, expected an array of 4096, one",
    ),
    "a type too many": (edit(TYPES, lambda t: t.append(1)), f"{TYPES} is an array of 4097, expected an array of 4096"),
    "types a number": (put(TYPES, 1), f"{TYPES} is 1, expected an array of 4096, one for each token"),
    "fewer tokens than rows": (
        lambda p: [p.keys[name].value.pop() for name in (TOKENS, TYPES, SCORES)],
        f"{TOKENS} is an array of 4095, expected 4096, a token for each row of token_embd.weight",
    ),
    "byte -1": (byte_token("<0x-1>"), "token 7 is of type byte, but '<0x-1>'; expected <0x00> to <0xFF>"),
    "byte ZZ": (byte_token("<0xZZ>"), "token 7 is of type byte, but '<0xZZ>'; expected <0x00> to <0xFF>"),
    "end beyond the vocabulary": (
        put("tokenizer.ggml.eos_token_id", 4096),
        f"tokenizer.ggml.eos_token_id is 4096, expected an integer from 0 to 4095{HINT}",
    ),
    "padding of -1": (
        put("tokenizer.ggml.padding_token_id", (1 << 32) - 1),
        f"tokenizer.ggml.padding_token_id is 4294967295, expected an integer from 0 to 4095{HINT}",
    ),
    # others
    "a shard number as text": (put("split.no", "0", STRING), "split.no is '0', expected an integer"),
    "a shard count as flag": (put("split.count", True, BOOL), "split.count is True, expected an integer"),
    "falcon": (
        lambda p: [
            p.set("general.architecture", "falcon", STRING),
            *(p.keys.update({"falcon" + k[5:]: v}) for k, v in list(p.keys.items()) if k.startswith("llama.")),
        ],
        "llama.cpp has types of its own for falcon, which gguf-moe does not know",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_but_shown(case: str, run, made, tmp_path: Path) -> None:
    change, message = CASES[case]
    path = changed(made("spm", "Q4_0"), tmp_path / "in.gguf", change)
    line = refusal(run, path, "--quant", "Q4_0")
    assert line.startswith(f"gguf-moe: {path}: ")
    assert message in line
    assert run("inspect", path, "--tensors").exit_code == 0
    assert run("inspect", path, "--json").exit_code == 0


def test_options_for_checkpoints_are_refused(run, made) -> None:
    for option in ("--pre", "--chat-template"):
        result = run("convert", made("spm", "BF16"), "--bits", 4, option, "x")
        assert result.exit_code == 2
        assert result.stderr == (f"gguf-moe: {option} is for checkpoints; --override-kv sets the keys of a GGUF file\n")


def test_a_file_that_is_not_there(run, tmp_path: Path) -> None:
    result = run("convert", tmp_path / "none.gguf", "--bits", 4)
    assert result.exit_code == 1
    assert f"{tmp_path / 'none.gguf'}: not readable: " in result.stderr


# (14) numbers that are not finite. A block's scale at byte 0 in Q8_0, Q4_0 and Q4_K, whose minimum is at 2.
DAMAGED = {
    "Q8_0": (0, 0x7C00, "Q8_0", "the scales of the block at [3, 32] are not finite; it is damaged"),
    "Q4_0": (0, 0x7E00, "Q4_0", "the scales of the block at [3, 32] are not finite; it is damaged"),
    "Q4_K_S": (2, 0xFC00, "Q4_K_S", "the scales of the block at [4, 0] are not finite; it is damaged"),
    "F16": (0, 0x7C00, "BF16", "holds infinity at [2, 17]"),
}
REQUANTIZED = {
    "Q8_0": (0, 0x7C00, "Q2_K", "holds infinity at [3, 3"),
    "Q4_0": (0, 0x7E00, "Q8_0", "holds NaN at [3, 32]"),
    "Q4_K_S": (2, 0xFC00, "F16", "holds infinity at [4, 0]"),
}


@pytest.mark.parametrize(
    ("source", "case"), [*DAMAGED.items(), *REQUANTIZED.items()], ids=[*DAMAGED, *(f"{s} decoded" for s in REQUANTIZED)]
)
def test_damaged_blocks(source: str, case: tuple[int, int, str, str], run, made, tmp_path: Path) -> None:
    """Blocks are counted from the start of the tensor: block 25 of 8 a row, 4 of 1 a row; weight 2 * 256 + 17."""
    at, bits, quant, message = case
    name = "blk.2.attn_q.weight"
    block, size = {"Q8_0": (25, 34), "Q4_0": (25, 18), "Q4_K_S": (4, 144), "F16": (2 * 256 + 17, 2)}[source]

    def damage(parts: Parts) -> None:
        kind, shape, data = parts.tensors[name]
        start = block * size + at
        parts.tensors[name] = (kind, shape, data[:start] + struct.pack("<H", bits) + data[start + 2 :])

    path = changed(made("spm", source), tmp_path / "in.gguf", damage)
    target = tmp_path / "out.gguf"
    result = run("convert", path, "--quant", quant, "--allow-requantize", "-o", target)
    assert result.exit_code == 1
    assert f"{path}: tensor {name}" in (line := result.stderr.splitlines()[-1])
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf"]
    with pytest.raises(AssertionError, match=r"invalid data|validation failed"):
        quantize(path, tmp_path / "want.gguf", quant, allow_requantize=True)


def test_a_file_that_shrinks_meanwhile(made, tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    path.write_bytes(made("spm", "BF16").read_bytes())
    plan = make_plan(open_gguf(path), find_file_type("Q4_0"))
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(GgufMoeError, match=r"in\.gguf: changed since it was opened: "):
        run_plan(plan, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


def foreign(parts: Parts) -> None:
    """Attention in a type that gguf-moe does not decode: IQ2_XS, 74 bytes for 256 weights."""
    for name in list(parts.tensors):
        if "attn_q.weight" in name:
            _, shape, _ = parts.tensors[name]
            size = shape[0] * shape[1] // 256 * 74
            data = np.random.default_rng(1).integers(0, 60, size, np.uint8)
            parts.tensors[name] = ("IQ2_XS", shape, data.tobytes())


def test_types_that_are_not_decoded_are_copied(run, made, tmp_path: Path) -> None:
    path = changed(made("spm", "Q4_0"), tmp_path / "in.gguf", foreign)
    want = quantize(path, tmp_path / "want.gguf", copy=True)
    assert convert(run, path, tmp_path / "out.gguf") == want
    assert load(tmp_path / "out.gguf").tensors["blk.0.attn_q.weight"][0] == "IQ2_XS"
    assert refusal(run, path, "--quant", "Q4_0", "--allow-requantize") == (
        f"gguf-moe: {path}: tensor blk.0.attn_q.weight is IQ2_XS, which gguf-moe cannot decode to Q4_0; convert the "
        "original"
    )


def test_heads_may_differ_by_layer(run, made, tmp_path: Path) -> None:
    """The rules take those of the first layer: 8 to 2 there, so 4 a group, where the file type asks."""

    def change(parts: Parts) -> None:
        parts.set("llama.attention.head_count", [8, 4, 4, 4], ARRAY, I32)
        parts.set("llama.attention.head_count_kv", [2, 2, 2, 2], ARRAY, I32)

    path = changed(made("spm", "BF16"), tmp_path / "in.gguf", change)
    want = quantize(path, tmp_path / "want.gguf", "Q2_K")
    assert convert(run, path, tmp_path / "out.gguf", "--quant", "Q2_K") == want
    assert load(tmp_path / "out.gguf").tensors["blk.0.attn_v.weight"][0] == "Q4_K"


def test_outer_ones_are_dropped_as_by_llama_cpp(run, made, tmp_path: Path) -> None:
    """A merge of one expert: the converter leaves stacks of one, the quantizer matrices."""

    def one(parts: Parts) -> None:
        parts.set("llama.expert_count", 1, U32)
        parts.set("llama.expert_used_count", 1, U32)
        for name, (kind, shape, data) in list(parts.tensors.items()):
            if "_exps" in name or "ffn_gate_inp" in name:
                parts.tensors[name] = (kind, (1, *shape[1:]), data[: len(data) // shape[0]])

    path = changed(made("spm", "BF16"), tmp_path / "in.gguf", one)
    want = quantize(path, tmp_path / "want.gguf", "Q4_K_M")
    assert convert(run, path, tmp_path / "out.gguf", "--quant", "Q4_K_M") == want
    assert convert(run, path, tmp_path / "same.gguf", "--quant", "BF16") == path.read_bytes()


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q3_K_M"])
def test_rules_follow_names_in_other_architectures(quant: str, run, tmp_path: Path) -> None:
    """Qwen2-MoE's shared experts, fused attention, a layer without attn_v, tensors that are never quantized."""
    rng = np.random.default_rng(3)
    parts = Parts({}, {})
    parts.set("general.architecture", "qwen2moe", STRING)
    sizes = {"context_length": 64, "embedding_length": 256, "block_count": 12, "feed_forward_length": 256}
    sizes |= {"attention.head_count": 8, "attention.head_count_kv": 2, "expert_count": 4, "expert_used_count": 2}
    sizes |= {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256}
    for name, value in sizes.items():
        parts.set(f"qwen2moe.{name}", value, U32)
    parts.set("qwen2moe.attention.layer_norm_rms_epsilon", 1e-6, F32)
    shapes = {"attn_q.weight": (8, 256), "attn_q.bias": (256,), "attn_v.weight": (8, 256), "attn_qkv.weight": (8, 256)}
    shapes |= {"ffn_down_exps.weight": (4, 8, 256), "ffn_down_shexp.weight": (8, 256), "ffn_gate_inp.weight": (4, 256)}
    shapes |= {"ffn_norm.weight": (256,), "attn_output.weight": (8, 256), "ffn_gate_inp_shexp.weight": (256,)}
    shapes |= {"attn_q_norm.weight": (8, 256), "ssm_conv1d.weight": (8, 256), "position_embd.weight": (8, 256)}
    for layer in range(12):
        for name, shape in shapes.items():
            if (layer, name) != (5, "attn_v.weight"):
                data = rng.normal(0, 1, shape).astype(np.float32).tobytes()
                parts.tensors[f"blk.{layer}.{name}"] = ("F32", shape, data)
    for name in ("token_embd.weight", "output_norm.weight", "position_embd.weight"):
        parts.tensors[name] = ("F32", (8, 256), rng.normal(0, 1, (8, 256)).astype(np.float32).tobytes())
    path = parts.save(tmp_path / "in.gguf")
    want = quantize(path, tmp_path / "want.gguf", quant)
    assert convert(run, path, tmp_path / "out.gguf", "--quant", quant) == want


def test_names_do_not_reach_the_terminal(run, made, tmp_path: Path) -> None:
    name = "blk.0.\x1b[2Jffn_up_exps.weight"

    def change(parts: Parts) -> None:
        parts.tensors = {name if "blk.0.ffn_up" in n else n: entry for n, entry in parts.tensors.items()}

    path = changed(made("spm", "BF16"), tmp_path / "in.gguf", change)
    for options in (["--dry-run"], ["-o", tmp_path / "out.gguf"]):
        result = run("convert", path, "--quant", "F16", *options)
        assert result.exit_code == 0, result.stderr
        assert "\x1b" not in result.output
    assert r"blk.0.\x1b[2Jffn_up_exps.weight" in run("convert", path, "--bits", 4, "--dry-run").stdout
    assert r"blk.0.\x1b[2Jffn_up_exps.weight" in run("inspect", path, "--tensors").stdout
