"""Our files are llama.cpp's: golden manifests that llama.cpp's converter and quantizer left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from gguf_manifest import compare, manifest

GOLDEN = Path(__file__).parent / "golden"
QUANTS = sorted(path.name.split(".")[1] for path in GOLDEN.glob("tidepool-spm.*[!x].json"))
WEIGHED = sorted(
    path.name.split(".")[1].removesuffix("-imatrix") for path in GOLDEN.glob("tidepool-spm.*-imatrix.json")
)


def test_the_golden_set_is_whole() -> None:
    assert (len(QUANTS), len(WEIGHED)) == (19, 17)


@pytest.mark.parametrize("quant", QUANTS)
def test_with_tokenizer_model_the_whole_file_is_llama_cpps(quant: str, made) -> None:
    want = json.loads((GOLDEN / f"tidepool-spm.{quant}.json").read_text())
    data = made("spm", quant).read_bytes()
    assert compare(want, manifest(made("spm", quant))) == []
    assert (len(data), hashlib.sha256(data).hexdigest()) == (want["file"]["size"], want["file"]["sha256"])


@pytest.mark.parametrize("quant", QUANTS)
def test_with_tokenizer_json_only_scores_and_the_space_prefix_differ(quant: str, made) -> None:
    want = json.loads((GOLDEN / f"tidepool.{quant}.json").read_text())
    have = manifest(made("json", quant))
    assert compare(want, have, ignore=["tokenizer.ggml.scores"]) == []
    assert set(have["kv"]) - set(want["kv"]) == {"tokenizer.ggml.add_space_prefix"}
    ours = [key for key in have["kv"] if key in want["kv"]]
    assert ours == list(want["kv"]), "keys stand in another order"
    assert [t["name"] for t in have["tensors"]] == [t["name"] for t in want["tensors"]]


@pytest.mark.parametrize("quant", WEIGHED)
def test_with_an_importance_matrix_the_whole_file_is_llama_cpps(
    quant: str, run, merges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GOLDEN)  # the file's path, as it is given, stands in a key
    path = tmp_path / "out.gguf"
    result = run("convert", merges["spm"], "--quant", quant, "--imatrix", "tidepool.imatrix.gguf", "-o", path)
    assert result.exit_code == 0, result.output
    want = json.loads((GOLDEN / f"tidepool-spm.{quant}-imatrix.json").read_text())
    assert compare(want, manifest(path)) == []
    assert hashlib.sha256(path.read_bytes()).hexdigest() == want["file"]["sha256"]
