"""Shards: cut where llama.cpp's own tools cut, loaded by llama.cpp, and made one file again without loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import for_the_converter
from hypothesis import given
from hypothesis import strategies as st
from neighbours import Llama
from test_golden import GOLDEN

from gguf_moe import sharding
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.sharding import Splitting, cut

CASES = json.loads((GOLDEN / "splits.json").read_text())
BY_CONVERTER = [case for case in CASES if case["tool"] == "converter"]
BY_GGUF_SPLIT = [case for case in CASES if case["tool"] == "gguf-split" and case["shards"]]
REFUSED = [case for case in CASES if not case["shards"]]


def name(case: dict) -> str:
    return " ".join([case["quant"], *case["options"]])


def files(run: Callable, directory: Path, *arguments: object) -> list[Path]:
    """What a command leaves in an empty directory, called after x.gguf; in order."""
    directory.mkdir()
    result = run(*arguments, "-o", directory / "x.gguf")
    assert result.exit_code == 0, result.output
    return sorted(directory.iterdir())


def hashes(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def unfused_merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return for_the_converter(tmp_path_factory.mktemp("merge"))


@pytest.fixture(scope="module")
def whole(run, unfused_merge: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that llama-gguf-split was given."""
    directory = tmp_path_factory.mktemp("whole")
    paths = {case["quant"]: directory / f"{case['quant']}.gguf" for case in BY_GGUF_SPLIT}
    for quant, path in paths.items():
        assert run("convert", unfused_merge, "--quant", quant, "-o", path).exit_code == 0
    return paths


@pytest.mark.parametrize("case", BY_CONVERTER, ids=name)
def test_convert_splits_as_llama_cpps_converter(case: dict, run, unfused_merge: Path, tmp_path: Path) -> None:
    made = files(run, tmp_path / "out", "convert", unfused_merge, "--quant", case["quant"], *case["options"])
    assert hashes(made) == case["shards"]


@pytest.mark.parametrize("case", BY_GGUF_SPLIT, ids=name)
def test_split_and_convert_cut_as_llama_gguf_split(case: dict, run, unfused_merge, whole, tmp_path: Path) -> None:
    source, quant, options = whole[case["quant"]], case["quant"], case["options"]
    made = files(run, tmp_path / "split", "split", source, *options)
    assert hashes(made) == case["shards"]
    model = source if quant == "BF16" else unfused_merge  # of a checkpoint the converter's rule for BF16
    assert hashes(files(run, tmp_path / "convert", "convert", model, "--quant", quant, *options)) == case["shards"]
    assert files(run, tmp_path / "merge", "merge", made[0])[0].read_bytes() == source.read_bytes()


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_a_first_tensor_above_the_limit_has_a_shard_to_itself(case: dict, run, whole, tmp_path: Path) -> None:
    """llama-gguf-split ends with an error there; with later ones it does the same."""
    made = files(run, tmp_path / "out", "split", whole[case["quant"]], *case["options"])
    tensors = [tensor for path in made for tensor in read_gguf(path).tensors]
    assert len(read_gguf(made[0]).tensors) == 1
    assert tensors[0].nbytes > 2_000_000
    assert [t.name for t in tensors] == [t.name for t in read_gguf(whole[case["quant"]]).tensors]


def test_the_golden_set_is_whole() -> None:
    assert (len(BY_CONVERTER), len(BY_GGUF_SPLIT), len(REFUSED)) == (13, 10, 1)


@pytest.mark.parametrize("options", [c["options"] for c in BY_GGUF_SPLIT if c["quant"] == "Q4_K_M"], ids=" ".join)
def test_llama_cpp_loads_shards_and_says_what_the_whole_file_says(options: list, run, made, tmp_path: Path) -> None:
    tokens = np.load(GOLDEN / "transformers.npz")["prompt0"].tolist()
    with Llama(made("json", "Q4_K_M")) as model:
        want = model.logits(tokens)
    shards = files(run, tmp_path / "out", "split", made("json", "Q4_K_M"), *options)
    with Llama(shards[0]) as model:
        assert np.array_equal(model.logits(tokens), want)
    shards[-1].unlink()
    with pytest.raises(GgufMoeError, match="does not load"):
        Llama(shards[0])


@pytest.mark.parametrize("options", [c["options"] for c in BY_CONVERTER if c["quant"] == "BF16"], ids=" ".join)
def test_llama_cpp_loads_the_shards_of_a_conversion(options: list, run, made, tmp_path: Path, merges) -> None:
    tokens = np.load(GOLDEN / "transformers.npz")["prompt1"].tolist()
    with Llama(made("json", "BF16")) as model:
        want = model.logits(tokens)
    shards = files(run, tmp_path / "out", "convert", merges["json"], "--bits", 16, *options)
    with Llama(shards[0]) as model:
        assert np.array_equal(model.logits(tokens), want)


limits = st.builds(
    Splitting, st.none() | st.integers(1, 5000), st.none() | st.integers(1, 20), tensors_in_first=st.booleans()
)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=60), limits, st.booleans())
def test_cutting_loses_nothing_and_keeps_to_the_limits(sizes: list[int], limit: Splitting, by_converter: bool) -> None:
    ranges = cut(sizes, limit, by_converter=by_converter)
    assert [number for shard in ranges for number in shard] == list(range(len(sizes)))
    assert (len(ranges[0]) > 0) == limit.tensors_in_first
    counted = sizes if by_converter else [(size + 31) // 32 * 32 for size in sizes]
    shards = ranges if limit.tensors_in_first else ranges[1:]
    for shard, following in zip(shards, [*shards[1:], None]):
        held = sum(counted[i] for i in shard)
        assert 1 <= len(shard) <= (limit.max_tensors or len(sizes))
        assert len(shard) == 1 or held <= (limit.max_bytes or held)
        if following is not None:  # no shard is begun without need
            full = len(shard) == limit.max_tensors
            assert full or held + counted[following.start] > (limit.max_bytes or float("inf"))


def test_more_shards_than_gguf_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^65536 shards, but GGUF counts at most 65535; allow larger ones$"):
        cut([1] * 65536, Splitting(max_tensors=1), by_converter=True)
    assert len(cut([1] * 65535, Splitting(max_tensors=1), by_converter=True)) == sharding.MAX_SHARDS


def test_convert_names_the_shards(run, merges, tmp_path: Path) -> None:
    arguments = ("convert", merges["json"], "--bits", 4, "-o", tmp_path, "--split-max-size", "2m")
    dry = run(*arguments, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    first = tmp_path / "TidePool-4x4M-v1-Q4_K_M-00001-of-00004.gguf"
    assert dry.output.splitlines()[-1] == f"would be written to {first} and 3 more shards"
    assert [line.split() for line in dry.output.splitlines() if "-of-00004  " in line][1] == [
        *("00002-of-00004", "19"),
        "1717792",
    ]
    done = run(*arguments)
    assert done.stdout.splitlines()[-1].startswith(f"{first} and 3 more shards written in ")
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert (len(sizes), sizes[1]) == (4, 1717792)
    assert run(*arguments).stderr == f"gguf-moe: {first}: exists; use --force to replace it\n"
    assert run(*arguments, "--force").exit_code == 0


def test_what_fits_into_one_shard_is_an_ordinary_file(run, made, merges, tmp_path: Path) -> None:
    (path,) = files(run, tmp_path / "out", "convert", merges["json"], "--bits", 4, "--split-max-size", "1G")
    assert (path.name, path.read_bytes()) == ("x.gguf", made("json", "Q4_K_M").read_bytes())


@pytest.mark.parametrize("size", ["0", "-1", "1.5G", "4GB", "4T", "M", "", "1e9", "٣M", "9" * 19])
def test_what_is_no_size(size: str, run, made) -> None:
    result = run("split", made("json", "Q2_K"), "--split-max-size", size, "--dry-run")
    assert result.exit_code == 2
    assert f"{size!r} is no size, expected bytes or a number with K, M or G, as 4G" in result.stderr
