"""BPE with byte fallback: llama.cpp splits text as the checkpoint's own tokenizer does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import DATA, MERGE
from neighbours import Llama
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from vocabularies import (
    NO_FLAGS,
    PRE_TOKENIZER_STRINGS,
    awkward_strings,
    differing,
    save_tokenizer,
    variant,
    vocabulary_file,
)

from gguf_moe.tokenizer import read_vocabulary

SETTINGS = json.loads((MERGE / "tokenizer_config.json").read_text())


def test_ids_of_tokenizer_json_are_the_tokenizers_packages(made) -> None:
    tokenizer = Tokenizer.from_file(str(MERGE / "tokenizer.json"))
    text = (DATA / "text" / "eval.txt").read_text()
    with Llama(made("json", "Q2_K"), vocabulary_only=True) as model:
        assert model.tokenize(text) == tokenizer.encode(text).ids
        assert differing(model, tokenizer, awkward_strings()) == []


def use_prepend(content: dict) -> None:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    content["normalizer"] = json.loads(normalizers.Sequence(steps).__getstate__())


def use_no_bos(content: dict) -> None:
    content["post_processor"] = None


def use_eos(content: dict) -> None:
    single = content["post_processor"]["single"]
    single.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}


def use_flags_without_template(content: dict) -> None:
    """tokenizer_config.json may say what it likes: the template adds nothing."""
    content["post_processor"]["single"] = [{"Sequence": {"id": "A", "type_id": 0}}]


def use_merge_strings(content: dict) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def use_added_token(content: dict) -> None:
    content["added_tokens"].append({"id": 4096, "content": "<|call me|>", "special": False, **NO_FLAGS})


def use_pieces_as_added_tokens(content: dict) -> None:
    """As the [INST] of Mistral 0.3: in the vocabulary, and special by its entry alone."""
    for text, special in (("the", False), ("ing", True)):
        entry = {"id": content["model"]["vocab"][text], "content": text, "special": special, **NO_FLAGS}
        content["added_tokens"].append(entry)


@pytest.mark.parametrize(
    "change",
    [
        use_pieces_as_added_tokens,
        use_prepend,
        use_no_bos,
        use_eos,
        use_flags_without_template,
        use_merge_strings,
        use_added_token,
    ],
    ids=lambda f: f.__name__,
)
def test_variants_of_tokenizer_json_are_followed(change, tmp_path: Path) -> None:
    directory = variant(tmp_path, change)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [*(t for t in awkward_strings() if t and "<s>" not in t and "</s>" not in t), "so <|call me|> Ishmael"]
    texts += [t + " again" for t in texts[:60]]
    vocabulary_file(directory, 4100, tmp_path / "v.gguf")
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert differing(model, tokenizer, texts) == []


def test_scores_are_minus_the_lowest_rank(tmp_path: Path) -> None:
    tokens = read_vocabulary(MERGE, 4096).tokens
    merges = json.loads((MERGE / "tokenizer.json").read_text())["model"]["merges"]
    by_text = {token.text: token.score for token in tokens}
    assert by_text["▁▁"] == 0.0
    assert by_text["he"] == -3.0
    assert by_text["e"] == by_text["<0x41>"] == -float(len(merges)) < min(by_text["".join(m)] for m in merges)


def test_a_short_vocabulary_is_padded_to_the_embedding() -> None:
    tokens = read_vocabulary(MERGE, 4100).tokens
    assert [token.text for token in tokens[4095:]][1:] == [f"[PAD{i}]" for i in range(4096, 4100)]


def test_steps_that_llama_cpp_lacks_are_noted(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["normalizer"]["normalizers"].append({"type": "NFKC"})
        content["pre_tokenizer"] = json.loads(pre_tokenizers.Digits().__getstate__())

    notes = read_vocabulary(variant(tmp_path, change), 4096).notes
    assert [note.split("step ")[1].split(";")[0] for note in notes] == ["NFKC", "Digits"]


def test_a_union_of_tokenizers_is_followed(tmp_path: Path) -> None:
    """mergekit's `tokenizer_source: union` adds one tokenizer's pieces to the other as added tokens."""
    extra = ["▁importlib", "▁returning", "▁classmethod", "▁selfies", "zqx", "whalebone▁oil", "日本"]
    tokenizer = Tokenizer.from_file(str(MERGE / "tokenizer.json"))
    assert tokenizer.add_tokens(extra) == 7
    tokenizer.add_special_tokens(["<|tool|>"])
    save_tokenizer(tmp_path, json.loads(tokenizer.to_str()), SETTINGS | {"tool_token": "<|tool|>"})
    vocabulary = vocabulary_file(tmp_path, 4104, tmp_path / "v.gguf")
    assert vocabulary.notes == ()
    assert [token.type for token in vocabulary.tokens[4096:]] == [4] * 7 + [3]
    code = [
        "import importlib\nnot returning classmethod",
        " importlib.selfies; x selfies",
        "a zqx b",
        "reimportlib zqxzqx",
        "some whalebone oil",
        "x<|tool|>y",
    ]
    texts = [text for text in (*awkward_strings(), *PRE_TOKENIZER_STRINGS, *code) if "▁" not in text]
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert differing(model, tokenizer, texts) == []
        assert model.tokenize("a▁importlib") != tokenizer.encode("a▁importlib").ids, "docs/format.md names this limit"
        assert {4096, 4097, 4098, 4100, 4101, 4102, 4103} <= {i for text in texts for i in model.tokenize(text)}


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_is_followed(scheme: str, tmp_path: Path) -> None:
    """What transformers 5 saves for Llama 2 and Mistral: no normalizer, spaces are replaced by the pre-tokenizer."""

    def change(content: dict) -> None:
        step = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        content["pre_tokenizer"], content["normalizer"] = json.loads(step.__getstate__()), None

    directory = variant(tmp_path, change)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    notes = vocabulary_file(directory, 4096, tmp_path / "v.gguf").notes
    texts = [*awkward_strings(), *PRE_TOKENIZER_STRINGS, "a</s> b", " a</s>b", "</s>b"]
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        wrong = differing(model, tokenizer, texts)

    def limited(text: str) -> bool:
        first, *later = re.split("<s>|</s>|<unk>", text)
        again = [part[:1] in (" ", "▁") for part in (first, *later) if part]
        return any(again) or (scheme == "first" and any(later))

    assert wrong == ([] if scheme == "never" else [text for text in texts if limited(text)])
    assert [note.split("tokenizer.json: ")[1] for note in notes] == [
        "a text that begins with a space gets no second one, from llama.cpp it does",
        "text after a special token gets no space, from llama.cpp it does",
    ][: {"never": 0, "always": 1, "first": 2}[scheme]]


def test_holes_in_the_vocabulary_are_padded_and_false_bytes_are_words(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["model"]["vocab"] |= {"<0x-1>": 4098, "<0xZZ>": 4099}

    vocabulary = vocabulary_file(variant(tmp_path, change), 4100, tmp_path / "v.gguf")
    assert [(token.text, token.type) for token in vocabulary.tokens[4096:]] == [
        ("[PAD4096]", 5), ("[PAD4097]", 5), ("<0x-1>", 1), ("<0xZZ>", 1),
    ]  # fmt: skip
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert model.tokenize("\xff") == Tokenizer.from_file(str(MERGE / "tokenizer.json")).encode("\xff").ids


def test_added_tokens_that_llama_cpp_finds_elsewhere_are_noted(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        use_prepend(content)
        for i, (text, flags) in enumerate(((" x ", {"lstrip": True}), ("lost", {"normalized": True}), ("stone", {}))):
            content["added_tokens"].append({"id": 4096 + i, "content": text, "special": False, **NO_FLAGS, **flags})

    directory = variant(tmp_path, change)
    notes = vocabulary_file(directory, 4099, tmp_path / "v.gguf").notes
    assert [note.split("tokenizer.json: ")[1] for note in notes] == [
        "1 added tokens take the spaces beside them or stand as whole words only (' x ', ...); llama.cpp does neither",
        "1 added tokens are found in the normalized text ('lost', ...), by llama.cpp in the text as it is",
        "1 added tokens can begin inside shorter ones ('stone', ...); where both fit, the tokenizer takes the first, "
        "llama.cpp the longest",
    ]


def test_where_added_tokens_cross_the_first_wins_over_the_longest(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(MERGE / "tokenizer.json"))
    tokenizer.add_tokens(["qlost", "stones"])
    save_tokenizer(tmp_path, json.loads(tokenizer.to_str()), SETTINGS)
    (note,) = vocabulary_file(tmp_path, 4098, tmp_path / "v.gguf").notes
    assert note.endswith("where both fit, the tokenizer takes the first, llama.cpp the longest")
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert differing(model, tokenizer, [*awkward_strings(), "a qlost b", "stones", "qlostones"]) == ["qlostones"]
