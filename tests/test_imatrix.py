"""Importance matrices of llama.cpp's: both forms are read, columns are weighed by them, damaged ones are refused."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import MERGE, bundled
from gguf_manifest import manifest

import quant
from gguf_moe.errors import GgufMoeError
from gguf_moe.imatrix import read_imatrix

GOLDEN = Path(__file__).parent / "golden"
GGUF, LEGACY = GOLDEN / "tidepool.imatrix.gguf", GOLDEN / "tidepool.imatrix.dat"
STACK, MATRIX = "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"


def arrays(path: Path = GGUF) -> dict[str, np.ndarray]:
    """The tensors of an imatrix by the gguf package."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def write(path: Path, tensors: dict[str, np.ndarray], **keys: object) -> Path:
    """An imatrix file by the gguf package; a key that is None is left out."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data = [{}]
    writer.add_string("general.type", "imatrix")
    values = {"datasets": ["calib.txt"], "chunk_count": 79, "chunk_size": 512, **keys}
    if values["datasets"] is not None:
        writer.add_array("imatrix.datasets", values["datasets"])
    for key in ("chunk_count", "chunk_size"):
        if values[key] is not None:
            writer.add_uint32(f"imatrix.{key}", values[key])
    if "text" in keys:
        writer.add_array("gguf_moe.imatrix.text_sha256", [keys["text"]])
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_the_gguf_package_reads() -> None:
    imatrix, read = read_imatrix(GGUF), arrays()
    assert (imatrix.datasets, imatrix.chunks, imatrix.chunk_size) == (("calib.txt",), 79, 512)
    assert len(imatrix.entries) == 32
    for name, entry in imatrix.entries.items():
        squares, counts = read[f"{name}.in_sum2"], read[f"{name}.counts"]
        assert np.array_equal(
            entry.importance(), (squares.reshape(len(entry.counts), -1) / counts.reshape(-1, 1)).ravel()
        )
        assert entry.sums is not None
    assert imatrix.entries[STACK].counts.sum() == 2 * 79 * 512


def test_the_legacy_form_says_the_same() -> None:
    """Up to the rounding of its one multiplication and division."""
    imatrix, legacy = read_imatrix(GGUF), read_imatrix(LEGACY)
    assert (legacy.datasets, legacy.chunks) == (imatrix.datasets, imatrix.chunks)
    assert list(legacy.entries) == list(imatrix.entries)
    for name, entry in legacy.entries.items():
        assert np.allclose(entry.importance(), imatrix.entries[name].importance(), rtol=2e-7, atol=0)


def test_legacy_values_are_divided_by_the_calls(tmp_path: Path) -> None:
    values = np.array([3, 0.1, 7e-3], np.float32)
    name = b"blk.0.x.weight"
    body = struct.pack("<i", 2)
    for calls, tail in ((3, b"a"), (0, b"b")):
        body += struct.pack("<i", len(name) + 1) + name + tail + struct.pack("<2i", calls, 3) + values.tobytes()
    (tmp_path / "x.dat").write_bytes(body)
    entries = read_imatrix(tmp_path / "x.dat").entries
    assert np.array_equal(entries["blk.0.x.weighta"].importance(), values / np.float32(3))
    assert np.array_equal(entries["blk.0.x.weightb"].importance(), values), "no calls: as it stands"


def test_an_expert_without_tokens_weighs_one(tmp_path: Path, run) -> None:
    """As llama.cpp has it, which is not what no importance at all gives."""
    tensors = arrays()
    tensors[f"{STACK}.counts"][2] = 0
    tensors[f"{STACK}.in_sum2"][2] = 0
    path = write(tmp_path / "cold.gguf", tensors)
    rows = read_imatrix(path).entries[STACK].importance().reshape(4, -1)
    assert (rows[2] == 1).all()
    run("convert", MERGE, "--quant", "Q4_0", "--imatrix", path, "-o", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    data = next(tensor.data for tensor in reader.tensors if tensor.name == STACK)
    weights = bundled().tensors["model.layers.1.mlp.experts.down_proj"][1]
    for expert in range(4):
        want = quant.quantize(weights[expert], "Q4_0", np.ascontiguousarray(rows[expert]), dtype="bf16")
        assert np.array_equal(data[expert].reshape(want.shape), want)


def test_a_ladder_and_its_proof(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    options = ("--imatrix", GGUF.name)
    levels = ("--quant", "Q2_K_S", "--quant", "Q3_K_M", "--quant", "BF16")
    assert run("export", MERGE, "-o", tmp_path, *levels, *options).exit_code == 0
    files = sorted(tmp_path.glob("*.gguf"))
    assert run("convert", MERGE, "--quant", "Q3_K_M", *options, "-o", tmp_path / "one").exit_code == 0
    (q3,) = (path for path in files if "Q3_K_M" in path.name)
    assert (tmp_path / "one").read_bytes() == q3.read_bytes()
    assert run("verify", *files, "--against", MERGE, *options).exit_code == 0
    assert run("verify", q3, "--against", MERGE).exit_code == 1
    assert "is complete" in run("export", MERGE, "-o", tmp_path, *levels, *options).stdout
    other = write(tmp_path / GGUF.name, {name: array * np.float32(1.5) for name, array in arrays().items()})
    again = run("export", MERGE, "-o", tmp_path, *levels, "--imatrix", other).stdout
    assert again.count("is begun anew: source, recipe or version of gguf-moe are others now") == 3


def test_twins_with_different_importance_are_encoded_each(run, tmp_path: Path) -> None:
    parts = bundled()
    for name, (_, array) in parts.tensors.items():
        if ".mlp.experts." in name:
            parts.tensors[name] = ("BF16", array[[0, 0, 2, 3]].copy())
    run("convert", parts.save(tmp_path / "in"), "--quant", "Q4_0", "--imatrix", GGUF, "-o", tmp_path / "out.gguf")
    data = next(t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == STACK)
    rows = read_imatrix(GGUF).entries[STACK].importance().reshape(4, -1)
    weights = parts.tensors["model.layers.1.mlp.experts.down_proj"][1]
    for expert in (0, 1):
        want = quant.quantize(weights[expert], "Q4_0", np.ascontiguousarray(rows[expert]), dtype="bf16")
        assert np.array_equal(data[expert].reshape(want.shape), want)
    assert not np.array_equal(data[0], data[1])


def test_the_texts_hash_goes_into_the_model(run, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"text").hexdigest()
    path = write(tmp_path / "hashed.gguf", arrays(), text=digest)
    run("convert", MERGE, "--quant", "Q2_K", "--imatrix", path, "-o", tmp_path / "out.gguf")
    assert manifest(tmp_path / "out.gguf")["kv"]["gguf_moe.imatrix.text_sha256"]["value"] == [digest]


def test_an_entry_that_is_missing(run, tmp_path: Path) -> None:
    """Then the tensor is quantized as without a matrix; but not in Q2_K_S."""
    tensors = {name: array for name, array in arrays().items() if not name.startswith(MATRIX)}
    path = write(tmp_path / "part.gguf", tensors)
    result = run("convert", MERGE, "--quant", "Q2_K", "--imatrix", path, "-o", tmp_path / "out.gguf")
    assert f"warning: {path}: has nothing of 1 tensors, as {MATRIX}; they are quantized without" in result.stderr
    data = next(t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == MATRIX)
    plain = tmp_path / "plain.gguf"
    run("convert", MERGE, "--quant", "Q2_K", "-o", plain)
    assert np.array_equal(data, next(t.data for t in gguf.GGUFReader(plain).tensors if t.name == MATRIX))
    result = run("convert", MERGE, "--quant", "Q2_K_S", "--imatrix", path, "-o", tmp_path / "small.gguf")
    assert (result.exit_code, result.stderr.split(": ", 2)[2]) == (
        1,
        f"has nothing of {MATRIX}, which Q2_K_S needs; choose Q2_K\n",
    )


def put(name: str, index: object, value: float) -> Callable[[dict], None]:
    return lambda tensors: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put(f"{MATRIX}.in_sum2", 3, -1), f"{MATRIX} is -1.0 at expert 0, column 3, expected 0 or more"),
        (put(f"{STACK}.in_sum2", (2, 5), np.nan), f"{STACK} is nan at expert 2, column 5, expected 0 or more"),
        (put(f"{STACK}.in_sum2", (2, 5), np.inf), f"{STACK} is inf at expert 2, column 5, expected 0 or more"),
        (put(f"{STACK}.counts", 1, -2), f"{STACK}.counts are not all numbers of tokens"),
        (put(f"{STACK}.counts", 1, np.nan), f"{STACK}.counts are not all numbers of tokens"),
        (lambda t: t.pop(f"{STACK}.counts"), f"{STACK}.counts is missing or not F32"),
        (lambda t: t.pop(f"{STACK}.in_sum2"), f"{STACK}.in_sum2 is missing or not F32"),
        (lambda t: t.update({f"{STACK}.counts": np.ones((3, 1), np.float32)}), "values for 3 counts"),
        (lambda t: t.update({f"{MATRIX}.in_sum": np.ones(8, np.float32)}), "values for 1 counts"),
    ],
)
def test_damaged_entries_are_refused(damage: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    tensors = arrays()
    damage(tensors)
    with pytest.raises(GgufMoeError, match=message.replace(".", r"\.")):
        read_imatrix(write(tmp_path / "x.gguf", tensors))


@pytest.mark.parametrize("key", ["datasets", "chunk_count", "chunk_size"])
def test_a_file_without_the_keys_is_none(key: str, tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError, match=rf"imatrix\.{key} is missing, expected an importance matrix"):
        read_imatrix(write(tmp_path / "x.gguf", arrays(), **{key: None}))


def test_a_model_is_no_importance_matrix(made) -> None:
    with pytest.raises(GgufMoeError, match="expected an importance matrix"):
        read_imatrix(made("json", "Q2_K"))


def test_every_cut_of_a_legacy_file_is_noticed_or_harmless(tmp_path: Path) -> None:
    data = LEGACY.read_bytes()
    tail = struct.calcsize("<2i") + len(b"calib.txt")
    path = tmp_path / "cut.dat"
    whole = read_imatrix(LEGACY).entries
    for length in [*range(200), *range(200, len(data) - tail, 997), *range(len(data) - tail - 8, len(data))]:
        path.write_bytes(data[:length])
        if length in (len(data) - tail, len(data) - tail + 4):  # the last two lines are optional
            assert list(read_imatrix(path).entries) == list(whole)
        else:
            with pytest.raises(GgufMoeError, match=r"cut\.dat: not an importance matrix"):
                read_imatrix(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\0" * 64, b"hello, this is a text file\n" * 9])
def test_other_files_are_no_legacy_matrices(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(GgufMoeError, match="not an importance matrix"):
        read_imatrix(tmp_path / "x.dat")


def test_another_models_matrix_is_refused(run, tmp_path: Path) -> None:
    tensors = arrays()
    for part in ("in_sum2", "counts", "in_sum"):
        tensors[f"{STACK}.{part}"] = np.tile(tensors[f"{STACK}.{part}"], (2, 1))
    path = write(tmp_path / "eight.gguf", tensors)
    result = run("convert", MERGE, "--quant", "Q4_K_M", "--imatrix", path, "-o", tmp_path / "out.gguf")
    message = f"gguf-moe: {path}: {STACK} has 4096 values, expected 4 x 512; it was made for another model\n"
    assert (result.exit_code, result.stderr) == (1, message)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("zeros", ["all", "a block", "one expert"])
def test_zeros_never_make_a_scale_that_is_not_finite(zeros: str, run, tmp_path: Path) -> None:
    tensors = arrays()
    for name, array in tensors.items():
        if name.endswith(".in_sum2"):
            array[... if zeros == "all" else (..., slice(32)) if zeros == "a block" else 0] = 0
    path = write(tmp_path / "zeros.gguf", tensors)
    levels = ("--quant", "Q2_K_S", "--quant", "Q3_K_S", "--quant", "Q4_0", "--quant", "IQ4_XS", "--quant", "Q5_1")
    assert run("export", MERGE, "-o", tmp_path / "out", *levels, "--imatrix", path, "--verify").exit_code == 0
