"""Files whose codes are chosen with error feedback: beside the plain ones, and as llama.cpp and the gguf package read
them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import architectures
import gguf
import numpy as np
import oracle
import pytest
import torch
from checkpoints import MERGE, bundled, with_experts
from gptq_runs import CALIB, EVAL, FEW, bfloat16, changed, decoded, first_layer, noted, one_layer, tensors, values
from neighbours import Llama

from gguf_moe.evaluation.forward import load_model
from gguf_moe.evaluation.source import open_model
from gguf_moe.evaluation.text import read_text, read_tokenizer
from gguf_moe.gguf_keys import ModelKeys
from gguf_moe.methods.gptq import CONTEXT
from gguf_moe.methods.walk import shown

SMALL = ("--output-tensor-type", "F16")  # the largest matrix of small models
MATRIX = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down)(_exps|_shexp)?)\.weight|output\.weight")


@pytest.fixture(scope="module")
def ours(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq") / "ours.gguf"
    result = run("convert", MERGE, "--quant", "Q3_K_M", *FEW, "-o", path)
    assert result.exit_code == 0, result.output
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path


@pytest.mark.parametrize("windows", [79, 128, 256, 1024, 2048, 4095])
def test_shown_tokens_stand_at_all_places_of_windows(windows: int) -> None:
    tokens = range(windows * CONTEXT)[shown(windows * CONTEXT)]
    assert 1900 < len(tokens) < 2200
    counts = np.bincount(np.array(tokens) % CONTEXT, minlength=CONTEXT)
    assert counts.max() <= 6


def test_only_codes_and_keys_differ_from_the_plain_file(ours: Path, made) -> None:
    plain = made("json", "Q3_K_M")
    chosen = {name for name in tensors(plain) if MATRIX.fullmatch(name)}
    assert len(chosen) == 29
    assert changed(ours, plain) == {*chosen, "token_embd.weight"}
    readers = gguf.GGUFReader(ours), gguf.GGUFReader(plain)
    offsets = [[tensor.data_offset - reader.data_offset for tensor in reader.tensors] for reader in readers]
    assert offsets[0] == offsets[1]
    sizes = [path.stat().st_size - reader.data_offset for path, reader in zip((ours, plain), readers)]
    assert sizes[0] == sizes[1]
    found, expected = values(ours), values(plain)
    assert {key: found[key] for key in expected} == expected
    assert {key: value for key, value in found.items() if key not in expected} == {
        "gguf_moe.method": "gptq",
        "gguf_moe.gptq.text_sha256": [hashlib.sha256(CALIB.read_bytes()).hexdigest()],
        "gguf_moe.gptq.chunks": 2,
        "gguf_moe.gptq.damping": pytest.approx(0.01),
        "gguf_moe.gptq.calibrated_on": "quantized",
    }


def test_the_embedding_is_ggmls_with_even_importance(ours: Path) -> None:
    weights = bfloat16(bundled().tensors["model.embed_tokens.weight"][1])
    tensor = tensors(ours)["token_embd.weight"]
    expected = oracle.load("libggml-python").quantize(weights, tensor.tensor_type.name, np.ones(256, np.float32))
    assert np.array_equal(tensor.data, expected)


def test_llama_cpp_runs_it(ours: Path, made) -> None:
    text = EVAL.read_text()
    found = []
    for path in (made("json", "BF16"), ours):
        with Llama(path, exact=False) as model:
            found.append(model.perplexity(text, chunks=4))
    assert found[0] < found[1] < 1.05 * found[0]


def test_less_is_lost_than_by_the_plain_encoder(ours: Path, run, made, tmp_path: Path) -> None:
    arguments = ("--text", EVAL, "--ctx", 256, "--chunks", 6, "--json", tmp_path / "r.json")
    result = run("validate", MERGE, ours, made("json", "Q3_K_M"), *arguments)
    assert result.exit_code == 0, result.output
    mine, plain = json.loads((tmp_path / "r.json").read_text())["files"]
    assert mine["kld_mean"] < 0.7 * plain["kld_mean"]
    assert mine["size_bytes"] - plain["size_bytes"] in range(512)


def test_the_same_bytes_twice_on_any_number_of_threads(run, tmp_path: Path) -> None:
    merge = one_layer().save(tmp_path / "one")
    found = []
    for number, threads in enumerate((1, 2)):
        path = tmp_path / f"{number}.gguf"
        assert run("convert", merge, "--bits", 2, *FEW, "--threads", threads, "-o", path).exit_code == 0
        found.append(path.read_bytes())
    assert found[0] == found[1]


def test_options_reach_codes_and_keys(run, tmp_path: Path) -> None:
    merge = with_experts(bundled(), 4, layers=2).save(tmp_path / "merge")
    for name, more in {"usual": (), "damped": ("--damping", 0.5), "original": ("--calib-original",)}.items():
        path = tmp_path / f"{name}.gguf"
        assert run("convert", merge, "--quant", "Q4_K_S", *SMALL, *FEW, *more, "-o", path).exit_code == 0
    found = {path.stem: values(path) for path in tmp_path.glob("*.gguf")}
    assert found["damped"]["gguf_moe.gptq.damping"] == 0.5
    assert found["original"]["gguf_moe.gptq.calibrated_on"] == "original"
    assert len(changed(tmp_path / "damped.gguf", tmp_path / "usual.gguf")) == 14
    # The first layer is calibrated on the same states, so it is the same.
    other = changed(tmp_path / "original.gguf", tmp_path / "usual.gguf")
    assert not [name for name in other if name.startswith("blk.0.attn")]
    assert len([name for name in other if name.startswith("blk.1")]) == 7


CASES = {  # rows of 96, 160 and 64 columns have fallback formats
    "llama-linear": ("IQ4_XS", SMALL),
    "mixtral-tied-7": ("IQ4_XS", ()),
    "qwen2moe-narrow-8": ("Q5_K_M", SMALL),
    "deepseek-8": ("Q3_K_M", SMALL),
    "qwen3moe-tied-8": ("Q6_K", ("--experts-used", 3)),
    "qwen2-yarn": ("Q4_1", SMALL),
}
FORMATS: set[str] = set()


@pytest.mark.parametrize("case", CASES)
def test_every_family_and_fallback(case: str, run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind, more = CASES[case]
    notes = noted(monkeypatch)
    plain, path = tmp_path / "plain.gguf", tmp_path / "ours.gguf"
    model = architectures.save(first_layer(case), tmp_path / case)
    assert run("convert", model, "--quant", kind, *more, "-o", plain).exit_code == 0
    result = run("convert", model, "--quant", kind, *more, *FEW, "-o", path)
    assert result.exit_code == 0, result.output
    coded = {name for name, tensor in tensors(plain).items() if tensor.tensor_type.name != "F16"}
    matrices = {name for name in coded if MATRIX.fullmatch(name)}
    different = changed(path, plain)
    assert different <= {*matrices, "token_embd.weight"}
    assert {note["tensor"] for note in notes} == matrices
    assert different >= {note["tensor"] for note in notes if note["loss"] < note["plain_loss"]}
    assert all(0 < note["loss"] <= note["plain_loss"] for note in notes)
    assert sum(note["loss"] for note in notes) < 0.8 * sum(note["plain_loss"] for note in notes)
    if "tied" in case:
        assert "output.weight" not in tensors(path)
    if "tied" in case or "mixtral" in case:
        with Llama(path, exact=False) as loaded:
            assert np.isfinite(loaded.logits([1, 5, 9, 300])).all()
    FORMATS.update(tensors(path)[name].tensor_type.name for name in matrices)


def test_the_cases_have_all_fallback_formats() -> None:
    wanted = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q6_K"}
    assert not wanted - FORMATS


def test_a_gguf_file_gives_what_its_checkpoint_gives(run, tmp_path: Path) -> None:
    merge = one_layer().save(tmp_path / "one")
    wide, one, other = (tmp_path / f"{name}.gguf" for name in ("wide", "one", "other"))
    assert run("convert", merge, "--quant", "BF16", "-o", wide).exit_code == 0
    for source, path in ((merge, one), (wide, other)):
        assert run("convert", source, "--quant", "Q4_K_M", *FEW, "-o", path).exit_code == 0
    assert not changed(one, other)


def test_what_a_recipe_keeps_and_shards(run, tmp_path: Path) -> None:
    merge = one_layer().save(tmp_path / "one")
    types = ("--tensor-type", "attn_k=F16", "--tensor-type", "ffn_down=Q8_0", "--router-type", "Q8_0")
    asked = ("--bits", 3, *types, "--leave-output-tensor")
    plain, whole = tmp_path / "plain.gguf", tmp_path / "whole.gguf"
    assert run("convert", merge, *asked, "-o", plain).exit_code == 0
    assert run("convert", merge, *asked, *FEW, "-o", whole).exit_code == 0
    kinds = ("attn_q", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp")
    assert changed(whole, plain) == {"token_embd.weight", *(f"blk.0.{kind}.weight" for kind in kinds)}
    assert run("convert", merge, *asked, *FEW, "--split-max-size", "600K", "-o", tmp_path / "cut.gguf").exit_code == 0
    shards = sorted(tmp_path.glob("cut-*.gguf"))
    assert len(shards) > 3
    assert not list(tmp_path.glob("*.gptq"))
    data = {name: tensor.data for shard in shards for name, tensor in tensors(shard).items()}
    assert data.keys() == tensors(whole).keys()
    assert all(np.array_equal(tensor.data, data[name]) for name, tensor in tensors(whole).items())
    assert "gguf_moe.method" in values(shards[0])


def test_what_a_gguf_file_has_in_its_type_already_is_copied(run, made, tmp_path: Path) -> None:
    """Decoded and encoded anew it would lose."""
    merge = one_layer().save(tmp_path / "one")
    four, six = tmp_path / "four.gguf", tmp_path / "six.gguf"
    assert run("convert", merge, "--quant", "Q4_K_M", "-o", four).exit_code == 0
    more = ("--tensor-type", "ffn=Q4_K", "--tensor-type", "attn_q=Q3_K", "--allow-requantize")
    assert run("convert", four, "--quant", "Q4_K_M", *more, *FEW, "-o", six).exit_code == 0
    before, after = tensors(four), tensors(six)
    same = {name for name in before if np.array_equal(before[name].data, after[name].data)}
    assert {name for name in before if before[name].tensor_type == after[name].tensor_type} == same
    assert "blk.0.attn_q.weight" not in same
    result = run("convert", four, *FEW, "-o", tmp_path / "kept.gguf")
    assert (result.exit_code, "has no matrix whose codes could be chosen" in result.stderr) == (2, True)


def test_few_tokens_are_damped_and_never_lose_more_than_plain(run, monkeypatch, tmp_path: Path) -> None:
    notes = noted(monkeypatch)
    merge = one_layer().save(tmp_path / "one")
    options = ("--method", "gptq", "--calib", CALIB, "--calib-chunks", 1, "--damping", 1e-9)
    result = run("convert", merge, "--bits", 2, *options, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 0, result.output
    assert all(0 < note["loss"] <= note["plain_loss"] for note in notes)
    more = [note for note in notes if note["damping"] > 1e-9]
    summary = next(line for line in result.stderr.splitlines() if "error feedback in" in line)
    assert more
    assert f"; more damping than 1e-09 in {more[0]['tensor']}" in summary
    for name, tensor in tensors(tmp_path / "x.gguf").items():
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all(), name


def test_identical_experts_get_codes_of_their_own(run, tmp_path: Path) -> None:
    parts = one_layer()
    for name, (kind, array) in parts.tensors.items():
        if ".mlp.experts." in name:
            parts.tensors[name] = (kind, np.stack([array[0], array[0], *array[2:]]))
    merge = parts.save(tmp_path / "twice")
    plain = run("convert", merge, "--quant", "Q4_K_S", *SMALL, "-o", tmp_path / "plain.gguf")
    same = "experts 0 and 1 are identical in all layers by their sampled rows"
    assert f"{same}; they are encoded once\n" in plain.stdout
    result = run("convert", merge, "--quant", "Q4_K_S", *SMALL, *FEW, "-o", tmp_path / "ours.gguf")
    assert f"{same}\n" in result.stdout
    for path, alike in ((tmp_path / "plain.gguf", True), (tmp_path / "ours.gguf", False)):
        stack = tensors(path)["blk.0.ffn_up_exps.weight"].data
        assert np.array_equal(stack[0], stack[1]) == alike


class Inputs:
    """The observer that keeps what the router of the first layer is given: float32 [tokens, hidden]."""

    shown = None

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def route(self, *arguments: object) -> None:
        pass

    def see(self, names: tuple[str, ...], x: torch.Tensor, *others: object) -> None:
        if names == ("blk.0.ffn_gate_inp.weight",):
            self.parts.append(x.numpy().copy())


def router_inputs(merge: Path) -> np.ndarray:
    source = open_model(merge)
    model, inputs = load_model(source), Inputs()
    text = read_text(CALIB, read_tokenizer(ModelKeys(source.path, source.keys)), chunks=2)
    with torch.inference_mode():
        model.run_layer(0, model.embed(text.windows), model.rotation(512), inputs)
    return np.concatenate(inputs.parts)


def rare_direction(x: np.ndarray, tokens: int) -> np.ndarray:
    """bfloat16 bits of a router's row that is positive for so many of the inputs [tokens, hidden]."""
    level = np.linalg.lstsq(x, np.ones(len(x), np.float32), rcond=1e-3)[0]
    for threshold in np.linspace(0.01, 300, 3000, dtype=np.float32):
        bits = ((x[700] - threshold * level).view(np.uint32) >> 16).astype(np.uint16)
        if (x @ bfloat16(bits) > 0).sum() == tokens:
            return bits
    raise AssertionError("no such direction")


def test_experts_of_no_and_of_few_tokens_get_sane_codes(run, monkeypatch, tmp_path: Path) -> None:
    """All rows of the router are zero, so that every token goes to the first two experts, but for one row."""
    parts = one_layer()
    x = router_inputs(parts.save(tmp_path / "usual"))
    name = "model.layers.0.mlp.gate.weight"
    router = np.zeros_like(parts.tensors[name][1])
    router[2] = rare_direction(x, 3)
    parts.tensors[name] = ("BF16", router)
    merge = parts.save(tmp_path / "rare")
    notes = noted(monkeypatch)
    files = {}
    for kind, options in {"F32": (), "Q2_K": (), "ours": FEW}.items():
        files[kind] = tmp_path / f"{kind}.gguf"
        quant = "Q2_K" if kind == "ours" else kind
        assert run("convert", merge, "--quant", quant, *options, "-o", files[kind]).exit_code == 0
    assert all(0 < note["loss"] <= note["plain_loss"] for note in notes)
    assert sum(note["expert"] in (2, 3) for note in notes) == 6
    for kind in ("gate", "up", "down"):
        name = f"blk.0.ffn_{kind}_exps.weight"
        weights, plain, chosen = (decoded(file, name) for file in files.values())
        for expert in (2, 3):
            before, after = plain[expert] - weights[expert], chosen[expert] - weights[expert]
            assert np.isfinite(after).all()
            assert np.linalg.norm(after) < 1.7 * np.linalg.norm(before)
            if kind != "down":  # under the layer's moments
                assert np.linalg.norm(after @ x.T) < 0.75 * np.linalg.norm(before @ x.T)
