"""Each bad checkpoint ends in one line that names the place, exit code 1, and no file; before any weight is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MERGE, Parts, bundled, unfused

SHARD = "model-00003-of-00006.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A copy of the bundled merge to spoil."""
    return Path(shutil.copytree(MERGE, tmp_path / "in" / MERGE.name))


def refusal(run, merge: Path, *options: object) -> str:
    """The one line that `convert` prints; asserts exit code 1 and that nothing was left, not even a partial file."""
    output = merge.parent.parent / "out"
    output.mkdir(exist_ok=True)
    result = run("convert", merge, "--bits", 2, "-o", output, *options)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert list(output.iterdir()) == []
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict], None]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def edit_map(merge: Path, name: str, file: str) -> None:
    content = json.loads((merge / INDEX).read_text())
    content["weight_map"][name] = file
    (merge / INDEX).write_text(json.dumps(content))


def edit_vocabulary(merge: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((merge / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    (merge / "tokenizer.json").write_text(json.dumps(content))


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


DOWN = "model.layers.0.mlp.experts.down_proj"
CONFIG = {
    "architecture": (
        {"architectures": ["PhiForCausalLM"]},
        "config.json: architecture 'PhiForCausalLM' is not supported, expected one of MixtralForCausalLM, MistralFor",
    ),
    "no architecture": ({"architectures": None}, "config.json: architecture None is not supported"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
    "more experts than tensors": (
        {"num_local_experts": 5},
        f"{DOWN} has shape [4, 256, 512], expected [5, 256, 512] by config.json",
    ),
    "top-k above the experts": (
        {"num_experts_per_tok": 5},
        "num_experts_per_tok is 5, but there are 4 experts (num_local_experts); llama.cpp aborts on such a file",
    ),
    "one expert": (
        {"num_local_experts": 1},
        "num_experts_per_tok is 2, but there are 1 experts (num_local_experts); llama.cpp aborts on such a file: use "
        "--experts-used 1",
    ),
    "no expert": ({"num_local_experts": 0}, "num_local_experts is 0, expected an integer of at least 1"),
    "text for a number": ({"hidden_size": "256"}, "hidden_size is '256', expected an integer of at least 1"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, expected an integer of at least 1"),
    "heads not in groups": (
        {"num_key_value_heads": 3},
        "num_attention_heads 4 is no multiple of num_key_value_heads 3",
    ),
    "negative epsilon": ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a positive 32-bit number"),
    "activation": ({"hidden_act": "relu"}, "hidden_act is 'relu', but llama.cpp computes 'silu'"),
    "vanishing epsilon": ({"rms_norm_eps": 1e-60}, "rms_norm_eps is 1e-60, expected a positive 32-bit number"),
    "odd head size": ({"head_dim": 63}, "a head size of 63 is odd"),
    "rope type": ({"rope_parameters": {"rope_type": "x"}}, "rope_type 'x' is not known to llama.cpp in this"),
    "more layers": ({"num_hidden_layers": 5}, "tensors are absent: model.layers.4."),
    "fewer layers": ({"num_hidden_layers": 3}, "is of layer 3, but config.json says num_hidden_layers = 3"),
    "vocabulary": (
        {"vocab_size": 4000},
        "embed_tokens.weight has shape [4096, 256], expected [4000, 256] by config.json",
    ),
    "endless layers": ({"num_hidden_layers": 1 << 31}, "num_hidden_layers is 2147483648, llama.cpp takes 512 at most"),
    "more than 32 bits": ({"max_position_embeddings": 1 << 40}, "max_position_embeddings is 1099511627776, expected"),
    "float for an integer": ({"num_local_experts": 4.0}, "num_local_experts is 4.0, expected an integer of at least 1"),
    "huge theta": (
        {"rope_parameters": {"rope_theta": 1e300}},
        "rope_theta is 1e+300, expected a positive 32-bit number",
    ),
    "rope a list": ({"rope_parameters": [1]}, "rope parameters are [1], expected an object"),
    "nested architecture": ({"architectures": [["MixtralForCausalLM"]]}, "architecture ['MixtralForCausalLM'] is not"),
    "wider": ({"hidden_size": 512}, "shape [4096, 256], expected [4096, 512] by config.json"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_config(case: str, run, merge: Path) -> None:
    changes, message = CONFIG[case]
    edit_json(merge / "config.json", **changes)
    assert message in refusal(run, merge)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json: no such file"),
    "config no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config a list": (
        lambda m: (m / "config.json").write_text("[]"),
        "config.json: holds a JSON list, expected an object",
    ),
    "deep config": (lambda m: (m / "config.json").write_text("[" * 100_000), "config.json: not readable as JSON"),
    "missing shard": (lambda m: (m / SHARD).unlink(), f"{INDEX}: names {SHARD}, which does not exist"),
    "shard outside": (lambda m: edit_map(m, DOWN, "../x.safetensors"), f"{DOWN} is placed in '../x.safetensors'"),
    "absolute shard": (lambda m: edit_map(m, DOWN, "/etc/passwd"), f"{DOWN} is placed in '/etc/passwd'"),
    "tensor in the wrong shard": (
        lambda m: edit_map(m, DOWN, "model-00004-of-00006.safetensors"),
        f"{DOWN} is said to be in model-00004-of-00006.safetensors, but is in {SHARD}",
    ),
    "tensor in no shard": (lambda m: edit_map(m, "extra", SHARD), f"{INDEX}: tensor extra is not in {SHARD}"),
    "index without map": (lambda m: (m / INDEX).write_text("{}"), f"{INDEX}: weight_map is missing or empty"),
    "truncated shard": (lambda m: truncate(m / SHARD, 3_000_000), "but the file has 3000000 bytes; it is truncated"),
    "empty shard": (lambda m: truncate(m / SHARD, 0), f"{SHARD}: header of 0 bytes in a file of 0 bytes"),
    "header longer than the file": (
        lambda m: (m / SHARD).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
        f"{SHARD}: header of {1 << 40} bytes in a file of 10 bytes",
    ),
    "header no JSON": (
        lambda m: (m / SHARD).write_bytes(struct.pack("<Q", 4) + b"{{{{"),
        f"{SHARD}: unreadable safetensors header",
    ),
    "unknown dtype": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].update(dtype="F8_E4M3")),
        f"{SHARD}: tensor {DOWN}: dtype F8_E4M3, expected one of BF16, F16, F32",
    ),
    "negative shape": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].update(shape=[-4, 256, 512])),
        f"{DOWN}: shape [-4, 256, 512] or offsets",
    ),
    "bytes against the shape": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].update(shape=[4, 256, 511])),
        f"{DOWN}: 1048576 bytes of data, but BF16 [4, 256, 511] takes 1046528",
    ),
    "overlapping tensors": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].update(data_offsets=[16, 1048592])),
        f"{SHARD}: invalid safetensors file",
    ),
    "entry without dtype": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].pop("dtype")),
        f"{DOWN}: header entry lacks dtype, shape or data_offsets",
    ),
    "dtype no text": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].update(dtype=["BF16"])),
        f"{DOWN}: dtype ['BF16'], expected one of BF16, F16, F32",
    ),
    "card with a list for a name": (
        lambda m: (m / "README.md").write_text("---\nname: [a, b]\n---\n"),
        "README.md: general.name would be ['a', 'b'], expected text",
    ),
    "text for a temperature": (
        lambda m: (m / "generation_config.json").write_text('{"temperature": "hot"}'),
        "general.sampling.temp, of README.md, generation_config.json or --metadata, is 'hot': required ",
    ),
    "added token without text": (
        lambda m: edit_json(m / "tokenizer.json", added_tokens=[{"id": 0}]),
        "a tokenizer file holds something unexpected: KeyError('content')",
    ),
    "normalizer a list": (
        lambda m: edit_json(m / "tokenizer.json", normalizer=[1]),
        "tokenizer.json: the tokenizers package cannot read it: data did not match any variant",
    ),
    "settings a list": (
        lambda m: (m / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json: holds a JSON list, expected an object",
    ),
    "a byte without a token": (
        lambda m: edit_vocabulary(m, lambda v: v.update({"<0x8>": v.pop("<0x80>")})),
        "byte fallback without the token <0x80>; llama.cpp would abort on it",
    ),
    "two texts with one id": (
        lambda m: edit_vocabulary(m, lambda v: v.update(qqqq=0)),
        "tokens '<unk>' and 'qqqq' have the same id 0",
    ),
    "fractional id": (lambda m: edit_vocabulary(m, lambda v: v.update(the=1.5)), "token id 1.5, expected a whole"),
    "added token of another text": (
        lambda m: edit_json(m / "tokenizer.json", added_tokens=[{"id": 5, "content": "five"}]),
        "added token 'five' has the id 5 of '<0x02>'",
    ),
    "chat template a number": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template=[1]),
        "tokenizer_config.json: chat_template has the entry '1', expected a name and a template as text",
    ),
    "half a character": (
        lambda m: edit_json(m / "tokenizer_config.json", chat_template="\ud800"),
        "the tokenizer's files or the model card hold what GGUF cannot",
    ),
    "endless dimensions": (
        lambda m: edit_header(m / SHARD, lambda h: h[DOWN].update(shape=[2**64 - 1] * 100_000)),
        "expected whole numbers and at most 4 dimensions",
    ),
    "endless file name": (lambda m: edit_map(m, DOWN, "x" * 5000), "File name too long"),
    "broken model card": (
        lambda m: (m / "README.md").write_text("---\nname: [\n---\n"),
        "README.md: model card or generation_config.json unreadable",
    ),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer.json: not readable as JSON"),
    "no tokenizer": (
        lambda m: (m / "tokenizer.json").unlink(),
        "no tokenizer, expected tokenizer.model or tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, run, merge: Path) -> None:
    change, message = FILES[case]
    change(merge)
    assert message in refusal(run, merge)


def remove(parts: Parts, *names: str) -> None:
    for name in names:
        del parts.tensors[name]


def rename(parts: Parts, old: str, new: str) -> None:
    parts.tensors[new] = parts.tensors.pop(old)


def mix(parts: Parts) -> None:
    """Layer 2 stays one tensor an expert, layer 0 is fused."""
    fused = bundled().tensors
    for name in list(parts.tensors):
        if name.startswith("model.layers.0.block_sparse_moe.experts"):
            del parts.tensors[name]
    for name in ("gate_up_proj", "down_proj"):
        parts.tensors[f"model.layers.0.mlp.experts.{name}"] = fused[f"model.layers.0.mlp.experts.{name}"]


EXPERT = "model.layers.1.block_sparse_moe.experts."
TENSORS: dict[str, tuple[Callable[[Parts], object], str]] = {
    "missing expert": (
        lambda p: remove(p, *(f"{EXPERT}2.w{i}.weight" for i in (1, 2, 3))),
        f"3 tensors are absent: {EXPERT}2.w1.weight, {EXPERT}2.w2.weight, {EXPERT}2.w3.weight "
        "(config.json says 4 layers of 4 experts)",
    ),
    "missing down projection": (
        lambda p: remove(p, f"{EXPERT}3.w2.weight"),
        f"1 tensors are absent: {EXPERT}3.w2.weight",
    ),
    "missing router": (
        lambda p: remove(p, "model.layers.3.block_sparse_moe.gate.weight"),
        "absent: model.layers.3.block_sparse_moe.gate.weight",
    ),
    "missing norm": (lambda p: remove(p, "model.norm.weight"), "absent: model.norm.weight"),
    "gap in the experts": (
        lambda p: [rename(p, f"{EXPERT}3.w{i}.weight", f"{EXPERT}4.w{i}.weight") for i in (1, 2, 3)],
        f"{EXPERT}4.w1.weight is of expert 4, but config.json says num_local_experts = 4",
    ),
    "transposed router": (
        lambda p: p.tensors.update(
            {"model.layers.0.block_sparse_moe.gate.weight": ("BF16", np.zeros((256, 4), np.uint16))}
        ),
        "gate.weight has shape [256, 4], expected [4, 256] by config.json",
    ),
    "expert of another shape": (
        lambda p: p.tensors.update({f"{EXPERT}1.w1.weight": ("BF16", np.zeros((256, 512), np.uint16))}),
        f"{EXPERT}1.w1.weight has shape [256, 512], expected [512, 256] by config.json",
    ),
    "unknown tensor": (
        lambda p: p.tensors.update({"model.layers.0.lora": ("BF16", np.zeros(4, np.uint16))}),
        "tensor model.layers.0.lora is unknown to architecture llama",
    ),
    "router under both names": (
        lambda p: p.tensors.update(
            {"model.layers.0.mlp.gate.weight": p.tensors["model.layers.0.block_sparse_moe.gate.weight"]}
        ),
        "is there twice, as model.layers.0.block_sparse_moe.gate.weight and model.layers.0.mlp.gate.weight",
    ),
    "two layouts": (mix, "two expert layouts are mixed, model.layers.0.mlp.experts."),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, run, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    parts = unfused(bundled())
    change(parts)
    line = refusal(run, parts.save(tmp_path / "in" / "merge"))
    assert message in line
    assert str(tmp_path / "in" / "merge") in line


def test_a_tensor_in_two_shards(run, merge: Path) -> None:
    (merge / INDEX).unlink()
    shutil.copy(merge / SHARD, merge / "model-00007-of-00006.safetensors")
    assert f"stands in {SHARD} too" in refusal(run, merge)


def test_all_of_it_is_found_before_a_weight_is_read(run, merge: Path) -> None:
    (merge / SHARD).unlink()
    assert "which does not exist" in refusal(run, merge, "--dry-run")


@pytest.mark.parametrize(
    ("value", "word", "name", "index"),
    [
        (0x7FC0, "NaN", "model.layers.2.mlp.experts.gate_up_proj", (3, 700, 17)),
        (0xFF80, "infinity", "model.layers.1.self_attn.q_proj.weight", (70, 255)),
        (0x7F80, "infinity", "model.norm.weight", (200,)),
        (0xFFC1, "NaN", "model.layers.3.mlp.experts.down_proj", (0, 1, 2)),
    ],
)
def test_a_weight_that_is_not_finite(value: int, word: str, name: str, index: tuple, run, tmp_path: Path) -> None:
    parts = bundled()
    array = parts.tensors[name][1].copy()
    array[index] = value
    parts.tensors[name] = ("BF16", array)
    path = parts.save(tmp_path / "in" / "merge")
    assert f"tensor {name} holds {word} at {list(index)}" in (line := last_line(run, path))
    assert "model.safetensors" in line


def test_weights_too_large_for_f16(run, tmp_path: Path) -> None:
    parts = bundled()
    array = parts.tensors["model.embed_tokens.weight"][1].copy()
    array[300, 40] = 0x7E80  # 8.5e37
    parts.tensors["model.embed_tokens.weight"] = ("BF16", array)
    path = parts.save(tmp_path / "in" / "merge")
    for quant, column in (("F16", 40), ("Q8_0", 32), ("Q4_K_M", 0)):
        line = last_line(run, path, "--quant", quant)
        assert f"tensor model.embed_tokens.weight: weights from [300, {column}] on are too large for " in line
    output = tmp_path / "large.gguf"
    assert run("convert", path, "--quant", "BF16", "-o", output).exit_code == 0


def last_line(run, merge: Path, *quant: str) -> str:
    """The refusal of a conversion that had begun: exit code 1, no file left, the reason in the last line."""
    output = merge.parent.parent / "out"
    output.mkdir(exist_ok=True)
    result = run("convert", merge, *(quant or ("--bits", 2)), "-o", output)
    assert result.exit_code == 1
    assert list(output.iterdir()) == []
    return result.stderr.splitlines()[-1]
