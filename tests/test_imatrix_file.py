"""Importance matrices that we write are llama.cpp's, in both forms; sums of them are sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_moe.errors import GgufMoeError
from gguf_moe.imatrix import Entry, Imatrix, read_imatrix
from gguf_moe.imatrix_file import STATS, chunk_count, merge, write_gguf, write_legacy

GOLDEN = Path(__file__).parent / "golden"
GGUF, LEGACY = GOLDEN / "tidepool.imatrix.gguf", GOLDEN / "tidepool.imatrix.dat"
STACK, MATRIX = "blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"


def test_the_gguf_form_is_llama_cpps(tmp_path: Path) -> None:
    """All but the last digits of statistics, which are sums in another order there."""
    path = tmp_path / "out.gguf"
    write_gguf(path, read_imatrix(GGUF))
    have, want = gguf.GGUFReader(path), gguf.GGUFReader(GGUF)
    assert path.read_bytes()[: have.data_offset] == GGUF.read_bytes()[: want.data_offset]
    for ours, theirs in zip(have.tensors, want.tensors):
        if theirs.name.endswith(".stats"):
            assert np.allclose(ours.data, theirs.data, rtol=2e-5, atol=0, equal_nan=True), theirs.name
        else:
            assert np.array_equal(ours.data, theirs.data)
    assert len(STATS) == 12


def test_the_legacy_form_is_llama_cpps(tmp_path: Path) -> None:
    write_legacy(tmp_path / "out.dat", read_imatrix(GGUF))
    assert (tmp_path / "out.dat").read_bytes() == LEGACY.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    imatrix = replace(read_imatrix(GGUF), texts=("ab" * 32, "cd" * 32), notes=("a note",))
    write_gguf(tmp_path / "out.gguf", imatrix)
    again = read_imatrix(tmp_path / "out.gguf")
    assert replace(again, path=imatrix.path, entries={}) == replace(imatrix, entries={})
    for name, entry in imatrix.entries.items():
        for have, want in zip(vars(again.entries[name]).values(), vars(entry).values()):
            assert np.array_equal(have, want)


def test_a_sum_of_gguf_matrices() -> None:
    imatrix = read_imatrix(GGUF)
    twice = merge([imatrix, replace(imatrix, datasets=("more.txt",))])
    assert (twice.datasets, twice.chunks, twice.chunk_size) == (("calib.txt", "more.txt"), 158, 512)
    for name, entry in imatrix.entries.items():
        assert np.array_equal(twice.entries[name].squares, 2 * entry.squares)
        assert np.array_equal(twice.entries[name].counts, 2 * entry.counts)
        assert np.array_equal(twice.entries[name].sums, 2 * entry.sums)
        assert np.array_equal(twice.entries[name].importance(), entry.importance())


def test_a_legacy_matrix_counts_for_its_calls() -> None:
    """The same matrix in both forms, added: the same means; every expert is credited alike, as in llama.cpp."""
    imatrix, legacy = read_imatrix(GGUF), read_imatrix(LEGACY)
    both = merge([imatrix, legacy])
    entry, first = both.entries[MATRIX], imatrix.entries[MATRIX]
    assert entry.sums is None
    assert entry.counts.tolist() == [first.counts[0] + 79 * 512]
    assert np.allclose(entry.importance(), first.importance(), rtol=1e-6)
    calls = legacy.entries[STACK].counts[0]
    assert np.array_equal(both.entries[STACK].counts, imatrix.entries[STACK].counts + 512 * calls)


def test_an_entry_that_only_one_has_stays() -> None:
    imatrix = read_imatrix(GGUF)
    part = replace(imatrix, entries={MATRIX: imatrix.entries[MATRIX]})
    assert merge([part, imatrix]).entries.keys() == imatrix.entries.keys()
    assert list(merge([part, imatrix]).entries) == sorted(imatrix.entries)


def test_the_texts_hashes_are_kept() -> None:
    first, second = (replace(read_imatrix(GGUF), texts=(digit * 64,)) for digit in "ab")
    assert merge([first, first]).texts == ("a" * 64,)
    assert merge([first, second]).texts == ("a" * 64, "b" * 64)


def test_matrices_of_two_models_are_not_added() -> None:
    imatrix = read_imatrix(GGUF)
    other = replace(imatrix, entries={MATRIX: Entry(np.ones((1, 8), np.float32), np.array([3]))})
    with pytest.raises(GgufMoeError, match=rf"{MATRIX} has 8 values, expected 256 as before"):
        merge([imatrix, other])


def test_experts_without_data(tmp_path: Path) -> None:
    squares = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    squares[1] = 0
    entries = {
        "blk.0.ffn_up_exps.weight": Entry(squares, np.array([2, 0, 700]), squares / 2),
        "blk.0.never.weight": Entry(np.zeros((1, 4), np.float32), np.array([0])),
    }
    imatrix = Imatrix(Path("x"), entries, ("a.txt",), 0, 512)
    assert chunk_count(imatrix) == 1
    write_legacy(tmp_path / "x.dat", imatrix)
    legacy = read_imatrix(tmp_path / "x.dat")
    assert list(legacy.entries) == ["blk.0.ffn_up_exps.weight"], "what has no data at all is left out"
    rows = legacy.entries["blk.0.ffn_up_exps.weight"].importance().reshape(3, 4)
    assert (rows[1] == 1).all()
    assert np.allclose(rows[2], squares[2] / 700)
    write_gguf(tmp_path / "x.gguf", imatrix)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    stats = tensors["blk.0.ffn_up_exps.weight.stats"]
    assert stats[STATS.index("elements")] == 8
    assert np.isnan(stats[STATS.index("gain")])
