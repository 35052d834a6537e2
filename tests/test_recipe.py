"""Types by llama.cpp's rules: counts from its own dry runs on four model shapes, and its row-width fallbacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from gguf_moe.errors import UsageError
from gguf_moe.recipe import BITS, FALLBACKS, FILE_TYPES, KEPT, RecipeFacts, choose_type, find_file_type

# Shapes: layers, experts, query heads, key heads, tied embeddings.
SHAPES = {
    "A": RecipeFacts(32, 4, 32, 8, tied=False),
    "B": RecipeFacts(32, 8, 32, 8, tied=False),
    "C": RecipeFacts(32, 0, 32, 32, tied=True),
    "D": RecipeFacts(80, 0, 64, 8, tied=False),
}
# Quantized tensors of each type, as `llama-quantize --dry-run` (build 11434) reports them, for A, B, C and D.
COUNTS = """
Q2_K   | Q2_K:129 Q3_K:64 Q4_K:32 Q6_K:1 | Q2_K:97 Q3_K:32 Q5_K:32 Q6_K:1 Q8_0:64 | Q2_K:128 Q3_K:96 Q6_K:1 | Q2_K:321 Q3_K:160 Q5_K:80 Q6_K:1
Q2_K_S | Q2_K:189 Q4_K:36 Q6_K:1 | Q2_K:157 Q4_K:4 Q6_K:1 Q8_0:64 | Q2_K:220 Q4_K:4 Q6_K:1 | Q2_K:471 Q4_K:10 Q5_K:80 Q6_K:1
Q3_K_S | Q3_K:225 Q6_K:1 | Q3_K:129 Q5_K:32 Q6_K:1 Q8_0:64 | Q3_K:224 Q6_K:1 | Q3_K:481 Q5_K:80 Q6_K:1
Q3_K_M | Q3_K:129 Q4_K:92 Q5_K:4 Q6_K:1 | Q3_K:97 Q4_K:30 Q5_K:34 Q6_K:1 Q8_0:64 | Q3_K:128 Q4_K:92 Q5_K:4 Q6_K:1 | Q3_K:321 Q4_K:155 Q5_K:85 Q6_K:1
Q3_K_L | Q3_K:129 Q5_K:96 Q6_K:1 | Q3_K:129 Q5_K:32 Q6_K:1 Q8_0:64 | Q3_K:128 Q5_K:96 Q6_K:1 | Q3_K:321 Q5_K:240 Q6_K:1
Q4_0   | Q4_0:225 Q6_K:1 | Q4_0:161 Q6_K:1 Q8_0:64 | Q4_0:224 Q6_K:1 | Q4_0:561 Q6_K:1
Q4_1   | Q4_1:225 Q6_K:1 | Q4_1:161 Q6_K:1 Q8_0:64 | Q4_1:224 Q6_K:1 | Q4_1:561 Q6_K:1
Q4_K_S | Q4_K:217 Q5_K:8 Q6_K:1 | Q4_K:125 Q5_K:36 Q6_K:1 Q8_0:64 | Q4_K:216 Q5_K:8 Q6_K:1 | Q4_K:471 Q5_K:90 Q6_K:1
Q4_K_M | Q4_K:193 Q6_K:33 | Q4_K:113 Q5_K:32 Q6_K:17 Q8_0:64 | Q4_K:192 Q6_K:33 | Q4_K:441 Q5_K:40 Q6_K:81
Q5_0   | Q5_0:225 Q6_K:1 | Q5_0:161 Q6_K:1 Q8_0:64 | Q5_0:224 Q6_K:1 | Q5_0:561 Q6_K:1
Q5_1   | Q5_1:225 Q6_K:1 | Q5_1:161 Q6_K:1 Q8_0:64 | Q5_1:224 Q6_K:1 | Q5_1:561 Q6_K:1
Q5_K_S | Q5_K:225 Q6_K:1 | Q5_K:161 Q6_K:1 Q8_0:64 | Q5_K:224 Q6_K:1 | Q5_K:561 Q6_K:1
Q5_K_M | Q5_K:193 Q6_K:33 | Q5_K:145 Q6_K:17 Q8_0:64 | Q5_K:192 Q6_K:33 | Q5_K:481 Q6_K:81
Q6_K   | Q6_K:226 | Q6_K:162 Q8_0:64 | Q6_K:225 | Q6_K:562
IQ4_NL | IQ4_NL:189 Q5_K:36 Q6_K:1 | IQ4_NL:125 Q5_K:36 Q6_K:1 Q8_0:64 | IQ4_NL:220 Q5_K:4 Q6_K:1 | IQ4_NL:471 Q5_K:90 Q6_K:1
IQ4_XS | IQ4_XS:189 Q5_K:36 Q6_K:1 | IQ4_XS:125 Q5_K:36 Q6_K:1 Q8_0:64 | IQ4_XS:220 Q5_K:4 Q6_K:1 | IQ4_XS:471 Q5_K:90 Q6_K:1
Q8_0   | Q8_0:226 | Q8_0:226 | Q8_0:225 | Q8_0:562
""".strip().splitlines()  # noqa: E501
# The same with an importance matrix, where that makes a difference.
WEIGHED = """
Q4_0   | Q4_0:221 Q4_1:4 Q6_K:1 | Q4_0:157 Q4_1:4 Q6_K:1 Q8_0:64 | Q4_0:220 Q4_1:4 Q6_K:1 | Q4_0:551 Q4_1:10 Q6_K:1
Q5_0   | Q5_0:221 Q5_1:4 Q6_K:1 | Q5_0:157 Q5_1:4 Q6_K:1 Q8_0:64 | Q5_0:220 Q5_1:4 Q6_K:1 | Q5_0:551 Q5_1:10 Q6_K:1
IQ4_NL | IQ4_NL:193 Q5_K:32 Q6_K:1 | IQ4_NL:129 Q5_K:32 Q6_K:1 Q8_0:64 | IQ4_NL:224 Q6_K:1 | IQ4_NL:481 Q5_K:80 Q6_K:1
IQ4_XS | IQ4_XS:193 Q5_K:32 Q6_K:1 | IQ4_XS:129 Q5_K:32 Q6_K:1 Q8_0:64 | IQ4_XS:224 Q6_K:1 | IQ4_XS:481 Q5_K:80 Q6_K:1
""".strip().splitlines()
PER_LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def counts(quant: str, facts: RecipeFacts) -> Counter[str]:
    file_type = FILE_TYPES[quant]
    roles = [(role, layer) for layer in range(facts.layers) for role in PER_LAYER]
    roles += [("token_embd", 0)] + [("output", 0)] * (not facts.tied)
    return Counter(choose_type(file_type, role, layer, 4096, facts).type for role, layer in roles)


def check_counts(line: str, imatrix: bool) -> None:
    quant, *cells = (cell.strip() for cell in line.split("|"))
    assert len(cells) == len(SHAPES)
    for facts, cell in zip(SHAPES.values(), cells):
        want = {name: int(count) for name, count in (item.split(":") for item in cell.split())}
        assert counts(quant, replace(facts, imatrix=imatrix)) == want


@pytest.mark.parametrize("line", COUNTS, ids=lambda line: line.split()[0])
def test_counts_are_llama_cpps(line: str) -> None:
    check_counts(line, imatrix=False)
    if line.split()[0] not in {weighed.split()[0] for weighed in WEIGHED}:
        check_counts(line, imatrix=True)


@pytest.mark.parametrize("line", WEIGHED, ids=lambda line: line.split()[0])
def test_counts_with_an_importance_matrix_are_llama_cpps(line: str) -> None:
    check_counts(line, imatrix=True)


def test_all_quantized_file_types_are_in_the_table() -> None:
    assert {line.split()[0] for line in COUNTS} == {t.name for t in FILE_TYPES.values() if t.quantized}


@pytest.mark.parametrize("quant", FILE_TYPES)
@pytest.mark.parametrize("role", [KEPT, "router"])
def test_norms_and_router_stay_f32(quant: str, role: str) -> None:
    assert choose_type(FILE_TYPES[quant], role, 0, 4096, SHAPES["B"]).type == "F32"


@pytest.mark.parametrize(("wanted", "fallback"), FALLBACKS.items())
def test_rows_that_a_block_does_not_divide_fall_back(wanted: str, fallback: str) -> None:
    file_type = next(t for t in FILE_TYPES.values() if t.default == wanted)
    for columns, expected in ((256, wanted), (96, fallback), (288, fallback), (36, "F16")):
        choice = choose_type(file_type, "attn_q", 0, columns, SHAPES["A"])
        assert (choice.type, choice.wanted) == (expected, wanted)


def test_output_of_odd_rows_is_q8_0() -> None:
    assert choose_type(FILE_TYPES["Q4_K_M"], "output", 0, 96, SHAPES["A"]).type == "Q8_0"


def test_names_in_any_case_aliases_and_bits() -> None:
    assert find_file_type("q3_k").name == "Q3_K_M"
    assert find_file_type("bf16").id == 32
    assert [FILE_TYPES[name].id for name in BITS.values()] == [10, 12, 15, 17, 18, 7, 32]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"unknown quant 'Q9', expected one of Q2_K, .*F32"):
        find_file_type("Q9")
