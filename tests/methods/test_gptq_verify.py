"""`verify --against` of files whose codes error feedback chose: what derives is compared bit for bit, and the rest has
to lie near the model's weights, row by row and expert by expert."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import DATA, MERGE, as_dtype, bundled
from gptq_runs import DERIVED, GPTQ, LEVELS, NEAR, UNPROVEN

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.gguf_reader import GgufFile, read_gguf
from gguf_moe.gguf_source import open_gguf
from gguf_moe.methods.said import KEYS as SAID
from gguf_moe.origin import Origin
from gguf_moe.request import Request
from gguf_moe.verify import verify

IMATRIX = DATA.parent / "golden" / "tidepool.imatrix.gguf"


def damaged(source: Path, target: Path, tensor: str, change: Callable[[np.ndarray], object]) -> Path:
    """A copy with the rows of a tensor, uint8 [experts, rows, row bytes], changed in place."""
    data = np.frombuffer(source.read_bytes(), np.uint8).copy()
    file = read_gguf(source)
    change(rows(data, file, tensor))
    target.write_bytes(data)
    return target


def rows(data: np.ndarray, file: GgufFile, name: str) -> np.ndarray:
    info = next(tensor for tensor in file.tensors if tensor.name == name)
    start = file.data_start + info.offset
    return data[start : start + info.nbytes].reshape(*((1,) * (3 - len(info.shape))), *info.shape[:-1], -1)


def decoded(path: Path, tensor: str) -> np.ndarray:
    """By the gguf package: float32 [rows, columns]."""
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor)
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    return values.reshape(-1, values.shape[-1])


def away(path: Path, row: int, tensor: str, model: np.ndarray) -> str:
    difference = np.linalg.norm((decoded(path, tensor)[row] - model[row]).astype(np.float64))
    return f"{100 * difference / np.linalg.norm(model[row].astype(np.float64)):.3g} %"


def test_export_verifies_what_it_has_made(ladder, level, run) -> None:
    directory, printed = ladder
    assert printed.splitlines()[-1] == "3 of 3 files are good"
    result = run("verify", *(level(quant) for quant in LEVELS), "--against", MERGE)
    whole = "good: structure, 43 tensors finite, SHA-256 as in SHA256SUMS"
    lines = [f"{level(quant)}: {whole}, {DERIVED}, {NEAR}; not proven: {UNPROVEN}" for quant in LEVELS]
    assert result.stdout.splitlines() == [*lines, "3 of 3 files are good"]
    assert (result.exit_code, result.stderr) == (0, "")
    assert not list(directory.glob("*.gptq"))


def test_json_says_the_same(level, run, tmp_path: Path) -> None:
    path = Path(shutil.copy(level("Q2_K"), tmp_path))
    (facts,) = json.loads(run("verify", path, "--against", MERGE, "--json").stdout)["files"]
    assert facts == {
        "file": str(path),
        "good": True,
        "proven": ["structure", "43 tensors finite", DERIVED, NEAR],
        "unproven": ["SHA-256 (no SHA256SUMS beside it)", UNPROVEN],
        "problems": [],
        "sha256": None,
    }


def test_alone_nothing_is_said_of_the_method(level, tmp_path: Path) -> None:
    verdict = verify(Path(shutil.copy(level("Q2_K"), tmp_path)))
    assert (verdict.proven, verdict.unproven[1:]) == (["structure", "43 tensors finite"], ["content"])


def test_needs_no_torch(level) -> None:
    code = "import sys; sys.modules['torch'] = None; from gguf_moe.cli import main; main()"
    command = [sys.executable, "-c", code, "verify", level("Q2_K"), "--against", MERGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith(f"not proven: {UNPROVEN}\n1 of 1 files are good\n"), done.stderr


def test_shards_made_with_an_importance_matrix(run, tmp_path: Path) -> None:
    """On the layers as they are quantized, which is the default; each shard is looked at by itself."""
    options = ("--imatrix", IMATRIX)
    made = run("convert", MERGE, "--bits", 3, *options, *GPTQ, "--split-max-tensors", 12, "-o", tmp_path / "x.gguf")
    assert made.exit_code == 0, made.output
    shards = sorted(tmp_path.glob("x-*.gguf"))
    result = run("verify", *shards, "--against", MERGE, *options, "--json")
    assert result.exit_code == 0, result.output
    files = json.loads(result.stdout)["files"]
    assert len(files) == 4
    counts = [[int(text.split(" tensors")[0].split()[-1]) for text in file["proven"][2:]] for file in files]
    assert [sum(of_kind) for of_kind in zip(*counts)] == [14, 29]
    without = json.loads(run("verify", *shards, "--against", MERGE, "--json").stdout)["files"]
    assert without[0]["problems"][0].startswith("key quantize.imatrix.file is ")


def test_a_model_whose_inputs_are_nearly_dead(run, tmp_path: Path) -> None:
    """Of 256 columns 8 matter: the others are free to move, and do."""
    parts = as_dtype(bundled(), "F32")
    for name, (dtype, array) in parts.tensors.items():
        if "layernorm" in name:
            parts.tensors[name] = (dtype, np.concatenate([array[:8], array[8:] * np.float32(1e-3)]))
    model, path = parts.save(tmp_path / MERGE.name), tmp_path / "x.gguf"
    assert run("convert", model, "--bits", 2, *GPTQ, "-o", path).exit_code == 0
    verdict = verify(path, origin=Origin(open_checkpoint(model), Request()))
    assert (verdict.problems, verdict.proven[-1]) == ([], NEAR)


def test_copies_derive_from_such_a_file_bit_for_bit(run, level, tmp_path: Path) -> None:
    """Its keys come along, but the codes of the copy are not chosen anew. Those of another type are ggml's own, and
    nothing says otherwise."""
    source, path = level("Q8_0"), tmp_path / "x.gguf"
    for options in ((), ("--bits", 4, "--allow-requantize")):
        assert run("convert", source, "-o", path, "--force", *options).exit_code == 0
        said = {key for key in read_gguf(path).keys if key.startswith("gguf_moe.")}
        assert said == ({"gguf_moe.gptq.text_sha256"} if options else set(SAID))
        verdict = verify(path, origin=Origin(open_gguf(source), Request(allow_requantize=bool(options))))
        assert (verdict.problems, verdict.proven[-1]) == ([], f"derives from {source} bit for bit")
    shutil.copy(level("Q2_K"), path)
    assert not verify(path, origin=Origin(open_gguf(source), Request())).good


def zeroed(blocks: np.ndarray) -> None:
    blocks[0, 19] = 0


def swapped_rows(blocks: np.ndarray) -> None:
    blocks[0, [19, 40]] = blocks[0, [40, 19]]


def negated(blocks: np.ndarray) -> None:
    blocks[0, 19, 1::34] ^= 0x80  # Q8_0: the signs of its scales


@pytest.mark.parametrize("quant", LEVELS)
def test_a_row_that_is_damaged_or_another(quant: str, level, made, origin, tmp_path: Path) -> None:
    name, plain = "blk.1.attn_q.weight", made("json", quant)
    model, usual = decoded(made("json", "F32"), name), away(plain, 19, name, decoded(made("json", "F32"), name))
    nothing = "damaged or another model's"
    changes = [(zeroed, nothing), (swapped_rows, "the model's row 40")]
    for change, instead in changes + ([(negated, nothing)] if quant == "Q8_0" else []):
        path = damaged(level(quant), tmp_path / "x.gguf", name, change)
        verdict = verify(path, origin=origin)
        found = away(path, 19, name, model)
        assert verdict.problems == [
            f"tensor {name}: row 19 is {found} of its length away from the model's, the plain encoder's {usual}: it is "
            f"{instead}"
        ]
        assert found == {zeroed: "100 %", negated: "200 %"}.get(change, found)
        assert verdict.proven == ["structure", "43 tensors finite", DERIVED]
        assert verdict.unproven[-1] == UNPROVEN


@pytest.mark.parametrize("quant", LEVELS)
def test_swapped_experts(quant: str, level, origin, tmp_path: Path) -> None:
    """They differ by a tenth of their length, which is a third of what 2 bits lose."""

    def swap(blocks: np.ndarray) -> None:
        blocks[[1, 2]] = blocks[[2, 1]]

    path = level(quant)
    for name in ("blk.0.ffn_down_exps.weight", "blk.3.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight"):
        path = damaged(path, tmp_path / "x.gguf", name, swap)
    (problem,) = verify(path, origin=origin).problems
    if quant == "Q8_0":  # where the first row is seen to be another
        assert problem.startswith("tensor blk.0.ffn_down_exps.weight: row 256 is ")
    else:
        assert problem.startswith(
            "tensor blk.0.ffn_down_exps.weight: expert 1 is the model's expert 2, expected expert 1"
        )
    assert problem.endswith(" (and 2 more of the tensors)")


@pytest.mark.parametrize("quant", LEVELS)
def test_tensors_of_another_layer_and_of_another_model(quant: str, level, origin, tmp_path: Path) -> None:
    source = level(quant)
    name, other = "blk.1.ffn_gate_exps.weight", "blk.2.ffn_gate_exps.weight"
    donor = rows(np.frombuffer(source.read_bytes(), np.uint8), read_gguf(source), other).copy()
    path = damaged(source, tmp_path / "x.gguf", name, lambda blocks: np.copyto(blocks, donor))
    (problem,) = verify(path, origin=origin).problems
    assert re.match(
        rf"tensor {name}: row [01] is 1\d\d % of its length away from the model's, the plain encoder's ", problem
    )
    assert problem.endswith("%: it is damaged or another model's")

    parts, generator = bundled(), np.random.default_rng(1)
    for key in ("model.layers.0.self_attn.o_proj.weight", "model.layers.3.mlp.experts.down_proj"):
        dtype, array = parts.tensors[key]
        parts.tensors[key] = (dtype, generator.permuted(array, axis=-1))
    model = parts.save(tmp_path / MERGE.name)
    (problem,) = verify(source, origin=Origin(open_checkpoint(model), Request())).problems
    assert problem.startswith("tensor blk.0.attn_output.weight: row 0 is 1")
    assert problem.endswith("it is damaged or another model's (and 1 more of the tensors)")


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_gate_inp.weight", "output_norm.weight"])
def test_a_bit_of_what_derives(name: str, level, origin, tmp_path: Path) -> None:
    def flip(blocks: np.ndarray) -> None:
        blocks.reshape(-1)[85] ^= 1

    source = level("Q2_K")
    path = damaged(source, tmp_path / "x.gguf", name, flip)
    file = read_gguf(source)
    at = file.data_start + next(tensor.offset for tensor in file.tensors if tensor.name == name) + 85
    found, expected = (copy.read_bytes()[at] for copy in (path, source))
    verdict = verify(path, origin=origin)
    where = "block 0 of row 1" if name == "token_embd.weight" else "weight 21 of row 0"
    difference = f"byte {at} of the file is {found:02x}, expected {expected:02x}"
    assert verdict.problems == [f"tensor {name}: {where}: {difference}"]
    assert verdict.proven == ["structure", "43 tensors finite", NEAR]


def test_a_scale_that_is_not_finite(level, origin, tmp_path: Path) -> None:
    def spoil(blocks: np.ndarray) -> None:
        blocks[0, 19, 80:82] = np.frombuffer(struct.pack("<e", math.inf), np.uint8)

    name = "blk.1.attn_q.weight"
    verdict = verify(damaged(level("Q2_K"), tmp_path / "x.gguf", name, spoil), origin=origin)
    assert verdict.problems == [f"tensor {name}: block 0 of row 19 has a scale that is infinite or NaN"]
    assert verdict.proven == ["structure", DERIVED]


def test_a_weight_of_the_model_that_is_not_finite(level, tmp_path: Path) -> None:
    parts = bundled()
    dtype, array = parts.tensors["model.layers.2.self_attn.v_proj.weight"]
    parts.tensors["model.layers.2.self_attn.v_proj.weight"] = (dtype, np.full_like(array, 0x7FC0))
    origin = Origin(open_checkpoint(parts.save(tmp_path / MERGE.name)), Request())
    assert verify(level("Q8_0"), origin=origin).problems == [
        f"{tmp_path / MERGE.name / 'model.safetensors'}: tensor model.layers.2.self_attn.v_proj.weight holds NaN at "
        "[0, 0]; mend the checkpoint"
    ]
