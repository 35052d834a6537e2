"""What a matrix knows of each expert, and what stands in for the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_golden import GOLDEN

from gguf_moe.coverage import cold_experts, coverage, effective_channels, replace_cold
from gguf_moe.errors import GgufMoeError
from gguf_moe.imatrix import Entry, Imatrix, read_imatrix
from gguf_moe.imatrix_file import write_gguf

GGUF, LEGACY = GOLDEN / "tidepool.imatrix.gguf", GOLDEN / "tidepool.imatrix.dat"
UP, DOWN, DENSE = "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"


def matrix(counts: list[int], base: float = 1.0) -> Imatrix:
    """One layer; expert e has mean squares of base * (e + 1) over four columns, means of half that."""
    tokens = np.array(counts)
    means = base * np.arange(1, len(counts) + 1, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    entry = Entry(means * tokens[:, None], tokens, 0.5 * means * tokens[:, None])
    dense = Entry(np.ones((1, 4), np.float32), np.array([9]), np.ones((1, 4), np.float32))
    return Imatrix(Path("im.gguf"), {DENSE: dense, DOWN: entry, UP: entry}, ("a.txt",), 1, 512)


def test_the_reference_is_covered() -> None:
    rows = coverage(read_imatrix(GGUF))
    assert [(row.layer, row.expert) for row in rows] == [(layer, expert) for layer in range(4) for expert in range(4)]
    for layer in range(4):
        assert sum(row.tokens for row in rows if row.layer == layer) == 2 * 79 * 512
        assert sum(row.share for row in rows if row.layer == layer) == pytest.approx(1)
    assert cold_experts(rows, 200) == []
    assert coverage(read_imatrix(LEGACY)) == []


def test_effective_channels() -> None:
    assert effective_channels(np.full(64, 3.0)) == pytest.approx(64)
    assert effective_channels(np.eye(64)[5]) == pytest.approx(1)
    assert effective_channels(np.zeros(64)) == 0
    assert 2 < effective_channels(np.array([4.0, 4.0, 1.0, 0.0])) < 3


def test_ones_is_what_llama_cpp_makes_of_no_data() -> None:
    found = replace_cold(matrix([500, 3, 500]), 200, "ones")
    for name in (UP, DOWN):
        entry = found.entries[name]
        assert entry.counts.tolist() == [500, 0, 500]
        assert entry.importance().reshape(3, 4).tolist() == [[1.0] * 4, [1.0] * 4, [3.0] * 4]
        assert not entry.sums[1].any()
    assert found.notes == ("layer 0 expert 1, 3 tokens: no data, all columns weigh alike",)


@pytest.mark.parametrize(("tokens", "kept"), [(3, 3), (0, 1)])
def test_mean_is_that_of_the_other_experts_means(tokens: int, kept: int) -> None:
    entry = replace_cold(matrix([500, tokens, 1000]), 200, "mean").entries[DOWN]
    assert entry.counts.tolist() == [500, kept, 1000]
    assert entry.importance().reshape(3, 4)[1].tolist() == [2.0] * 4  # of 1 and 3
    assert (entry.sums[1] / kept).tolist() == [1.0] * 4


def test_base_is_another_matrix() -> None:
    found = replace_cold(matrix([500, 3, 500]), 200, "base", matrix([1, 700, 1], base=10))
    entry = found.entries[UP]
    assert entry.counts.tolist() == [500, 700, 500]
    assert entry.importance().reshape(3, 4)[1].tolist() == [20.0] * 4


def test_what_is_warm_stays(tmp_path: Path) -> None:
    before = matrix([500, 3, 500])
    for remedy in ("ones", "mean"):
        after = replace_cold(before, 200, remedy)
        assert after.entries[DENSE] is before.entries[DENSE]
        assert (after.entries[UP].squares[[0, 2]] == before.entries[UP].squares[[0, 2]]).all()
        write_gguf(tmp_path / f"{remedy}.gguf", after)
        again = read_imatrix(tmp_path / f"{remedy}.gguf")
        assert again.notes == after.notes
        assert np.isfinite(again.entries[UP].importance()).all()
    assert before.entries[UP].counts.tolist() == [500, 3, 500]
    assert replace_cold(before, 3, "mean").entries == before.entries


@pytest.mark.parametrize(
    ("counts", "remedy", "base", "message"),
    [
        (
            [3, 3],
            "mean",
            None,
            "im.gguf: blk.0.ffn_down_exps.weight has no expert with enough tokens to take the mean of",
        ),
        ([500, 3], "base", matrix([9, 0]), "blk.0.ffn_down_exps.weight has no data of expert 1; expected it of a base"),
        ([500, 3], "base", matrix([9, 9, 9]), "has no data of expert 1"),
        ([500, 3], "base", replace(matrix([9, 9]), entries={}), "has no data of expert 1"),
    ],
)
def test_what_has_no_stand_in_is_refused(counts: list[int], remedy: str, base: Imatrix | None, message: str) -> None:
    with pytest.raises(GgufMoeError) as error:
        replace_cold(matrix(counts), 200, remedy, base)
    assert message in str(error.value)
