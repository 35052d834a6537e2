"""Tokenizer files that are broken or contradict themselves are refused, in one line that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from vocabularies import (
    NO_FLAGS,
    variant,
)

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.tokenizer import read_vocabulary


def wordpiece(content: dict) -> None:
    content["model"] = {"type": "WordPiece", "vocab": {"a": 0}}


def neither(content: dict) -> None:
    content["model"]["byte_fallback"] = False


def same_text(content: dict) -> None:
    content["added_tokens"].append({"id": 4096, "content": "the", "special": False})


def bad_merge(content: dict) -> None:
    content["model"]["merges"][5] = ["a", "b", "c"]


def unknown_part(content: dict) -> None:
    content["model"]["merges"].append(["the", "zzzz"])


def unknown_whole(content: dict) -> None:
    content["model"]["merges"].append(["the", "the"])


def prefixed(content: dict) -> None:
    content["model"]["continuing_subword_prefix"] = "##"


def random_merges(content: dict) -> None:
    content["model"]["dropout"] = 0.1


def panicking(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def hole_in_added(content: dict) -> None:
    content["added_tokens"].append({"id": 4099, "content": "<x>", "special": False, **NO_FLAGS})


def id_of_another(content: dict) -> None:
    content["added_tokens"].append({"id": 2, "content": "<x>", "special": False, **NO_FLAGS})


def endless(content: dict) -> None:
    content["added_tokens"].append({"id": 4096, "content": "x" * 10_000_000, "special": False, **NO_FLAGS})


def nothing(content: dict) -> None:
    content.clear()


def template_without_ids(content: dict) -> None:
    content["post_processor"]["special_tokens"] = {}


def bad_regex(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}


def bad_id(content: dict) -> None:
    content["model"]["vocab"]["the"] = -4


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (wordpiece, 4096, "tokenizer model is 'WordPiece', expected 'BPE' with a vocabulary"),
        (neither, 4096, "a BPE that is neither byte-level nor has byte fallback; llama.cpp has no such kind"),
        (same_text, 4100, "have the same text 'the'"),
        (bad_merge, 4096, "merge 5 is ['a', 'b', 'c'], expected a pair of tokens"),
        (bad_id, 4096, "token id -4, expected a whole number"),
        (unknown_part, 4096, "is ['the', 'zzzz'], but no token has the text 'zzzz'"),
        (unknown_whole, 4096, "is ['the', 'the'], but no token has the text 'thethe'"),
        (prefixed, 4096, "continuing_subword_prefix is '##'; llama.cpp has nothing like it"),
        (random_merges, 4096, "dropout is 0.1; llama.cpp has nothing like it"),
        (panicking, 4096, "the tokenizers package gives up on it: chunk size must be non-zero"),
        (hole_in_added, 4100, "'<x>' has the id 4099, but the tokenizers package gives it the next free one, 4096"),
        (id_of_another, 4096, "added token '<x>' has the id 2 of '</s>'"),
        (endless, 4100, "token 4096 has 10000000 bytes, expected at most 65535"),
        (nothing, 4096, "tokenizer model is None, expected 'BPE' with a vocabulary"),
        (template_without_ids, 4096, "the post-processor's template names '<s>' without giving its ids"),
        (bad_regex, 4096, "the tokenizers package cannot read it: Oniguruma error"),
        (lambda content: None, 4090, "4096 tokens, but the embedding has 4090 rows (vocab_size); surplus from id 4090"),
    ],
)
def test_bad_tokenizers_are_refused(change, size: int, message: str, tmp_path: Path) -> None:
    directory = variant(tmp_path, change)
    with pytest.raises(GgufMoeError) as caught:
        read_vocabulary(directory, size)
    assert message in str(caught.value)
    assert str(directory / "tokenizer.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_sentencepiece_and_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError, match=r"no tokenizer, expected tokenizer\.model or tokenizer\.json"):
        read_vocabulary(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf at all")
    with pytest.raises(GgufMoeError, match=r"tokenizer\.model: not a SentencePiece model"):
        read_vocabulary(tmp_path, 10)


def test_pre_is_for_byte_level_alone(merges) -> None:
    with pytest.raises(UsageError, match=r"^--pre qwen2: .*tokenizer\.json is no byte-level BPE, llama\.cpp splits it"):
        read_vocabulary(merges["json"], 4096, pre="qwen2")
    with pytest.raises(
        UsageError, match=r"^--pre qwen2: .*tokenizer\.model is no byte-level BPE, llama\.cpp splits it"
    ):
        read_vocabulary(merges["spm"], 4096, pre="qwen2")
