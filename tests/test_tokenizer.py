"""Vocabularies: llama.cpp splits text as the checkpoint's own tokenizer does."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from checkpoints import DATA, MERGE
from neighbours import Llama
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer import read_vocabulary


def awkward_strings() -> list[str]:
    """200 strings: spaces, Unicode, digits, code, control characters, special tokens, and random mixtures."""
    fixed = [
        "", " ", "  ", "   ", " a", "a ", " a b  c   d ", "\n", "\n\n", "\r\n", "\t", "\t\ta", "\x00", "a\x00b", "\x7f",
        "Hello world", "HELLO", "hello", "don't we'll I'VE", "naïve café", "e\u0301", "ﬁ ligature", "İstanbul", "ß", "Ω≈ç√",
        "日本語のテキスト", "中文 文本", "한국어", "العربية", "עברית", "हिन्दी", "ไทย", "Русский", "🙂", "👩‍👩‍👧‍👦", "🇩🇪", "\ufeffbom",
        "\u200b", "\u00a0", "\u2028", "\u3000", "▁", "▁▁", "▁a", "a▁b", "a ▁ b", "0", "12345", "3.14159", "1e-10", "0x41",
        "<0x41>", "<0x", "<s>", "</s>", "<unk>", "<s></s>", "a<s>b", " <s> ", "<s", "<|im_start|>", "[INST]", "def f(x):\n    return x",
        "if (a && b) { return; }", "#include <stdio.h>", "https://example.org/a?b=c&d=%20", "user@host", "a_b_c", "camelCase",
        "----", "====", "....", "!!!???", "''\"\"``", "\\n", "$x^2$", "{}[]()", "aaaaaaaaaaaaaaaaaaaaaaaa", "the the the",
        " the", "THE LORD", "Ahab", "whale-ship", "x" * 300, " " * 100, "\n" * 50, "a b" * 40, "ab " * 40, "\U0010ffff", "\U00020000",
    ]  # fmt: skip
    source = (DATA / "text" / "eval.txt").read_text()
    pick = random.Random(7)
    alphabet = [*"abcdefghij ABC 0123456789 .,;:!?-_()[]{}<>/\\\"'\n\t", "é", "ß", "日", "🙂", "▁", "  ", "the ", " of"]
    while len(fixed) < 200:
        if len(fixed) % 2:
            start = pick.randrange(len(source) - 200)
            fixed.append(source[start : start + pick.randrange(1, 200)])
        else:
            fixed.append("".join(pick.choices(alphabet, k=pick.randrange(1, 60))))
    return fixed


def differing(model: Llama, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    assert len(texts) >= 200
    return [text for text in texts if model.tokenize(text) != tokenizer.encode(text).ids]


def test_ids_of_tokenizer_json_are_the_tokenizers_packages(made) -> None:
    tokenizer = Tokenizer.from_file(str(MERGE / "tokenizer.json"))
    text = (DATA / "text" / "eval.txt").read_text()
    with Llama(made("json", "Q2_K"), vocabulary_only=True) as model:
        assert model.tokenize(text) == tokenizer.encode(text).ids
        assert differing(model, tokenizer, awkward_strings()) == []


def variant(tmp_path: Path, change) -> Path:
    """The merge's tokenizer files with tokenizer.json changed by `change`."""
    directory = tmp_path / "variant"
    directory.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(MERGE / name, directory / name)
    settings = json.loads((MERGE / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": True, "add_eos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    content = json.loads((MERGE / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def vocabulary_file(directory: Path, size: int, path: Path) -> Path:
    """A GGUF file that holds a vocabulary and nothing else, for llama.cpp to tokenize with."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    read_vocabulary(directory, size).add_keys(writer)
    for add in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 4096, "content": "<|call me|>", "special": False, **flags})


@pytest.mark.parametrize(
    "change",
    [use_prepend, use_no_bos, use_eos, use_flags_without_template, use_merge_strings, use_added_token],
    ids=lambda f: f.__name__,
)
def test_variants_of_tokenizer_json_are_followed(change, tmp_path: Path) -> None:
    directory = variant(tmp_path, change)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [*(t for t in awkward_strings() if t and "<s>" not in t and "</s>" not in t), "so <|call me|> Ishmael"]
    texts += [t + " again" for t in texts[:60]]
    with Llama(vocabulary_file(directory, 4100, tmp_path / "v.gguf"), vocabulary_only=True) as model:
        assert differing(model, tokenizer, texts) == []


def test_ids_of_tokenizer_model_are_sentencepieces(made) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(DATA / "tokenizers" / "tidepool.tokenizer.model"))
    text = (DATA / "text" / "eval.txt").read_text()
    with Llama(made("spm", "Q2_K"), vocabulary_only=True) as model:
        assert model.tokenize(text, special=False) == [1, *processor.encode(text)]


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


def wordpiece(content: dict) -> None:
    content["model"] = {"type": "WordPiece", "vocab": {"a": 0}}


def byte_level(content: dict) -> None:
    content["model"]["byte_fallback"] = False


def same_text(content: dict) -> None:
    content["added_tokens"].append({"id": 4096, "content": "the", "special": False})


def bad_merge(content: dict) -> None:
    content["model"]["merges"][5] = ["a", "b", "c"]


def bad_id(content: dict) -> None:
    content["model"]["vocab"]["the"] = -4


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (wordpiece, 4096, "tokenizer model is 'WordPiece', expected 'BPE' with byte fallback"),
        (
            byte_level,
            4096,
            "a BPE tokenizer without byte fallback (byte-level, as of Llama 3 or Qwen) is not supported",
        ),
        (same_text, 4100, "have the same text 'the'"),
        (bad_merge, 4096, "merge 5 is ['a', 'b', 'c'], expected a pair of tokens"),
        (bad_id, 4096, "token id -4, expected a whole number"),
        (lambda content: None, 4090, "4096 tokens, but the embedding has 4090 rows (vocab_size); surplus from id 4090"),
    ],
)
def test_bad_tokenizers_are_refused(change, size: int, message: str, tmp_path: Path) -> None:
    directory = variant(tmp_path, change)
    with pytest.raises(GgufMoeError) as caught:
        read_vocabulary(directory, size)
    assert message in str(caught.value)
    assert str(directory / "tokenizer.json") in str(caught.value)


def test_broken_sentencepiece_and_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError, match=r"no tokenizer, expected tokenizer\.model or tokenizer\.json"):
        read_vocabulary(tmp_path, 10)
    (tmp_path / "tokenizer.model").write_bytes(b"no protobuf at all")
    with pytest.raises(GgufMoeError, match=r"tokenizer\.model: not a SentencePiece model"):
        read_vocabulary(tmp_path, 10)
