"""The figures in the README are those of the files."""

from __future__ import annotations

import re
from pathlib import Path

from gguf_moe.gguf_reader import read_gguf
from gguf_moe.recipe import BITS, FILE_TYPES
from gguf_moe.report import gguf_facts, gguf_text

README = (Path(__file__).parent.parent / "README.md").read_text()
ROW = re.compile(r"^\| (\w+) \| (\d*) ?\| (\d+) \| ([\d.]+) \|$", re.MULTILINE)


def test_the_table_of_file_types(made) -> None:
    rows = ROW.findall(README)
    assert {row[0] for row in rows} == FILE_TYPES.keys() - {"Q2_K_S"}
    bits = {name: str(number) for number, name in BITS.items()}
    for name, number, size, effective in rows:
        facts = gguf_facts(read_gguf(made("json", name)))
        assert (number, int(size)) == (bits.get(name, ""), facts["size_bytes"])
        assert effective == f"{facts['bits_per_weight']:.2f}"


def test_the_example(made) -> None:
    text = gguf_text(gguf_facts(read_gguf(made("json", "Q4_K_M"))), tensors=False)
    histogram = text.split("\n\n")[2]
    assert histogram in README
