"""Tokenizers for tests: awkward texts, tokenizers trained on the spot, and files for llama.cpp to tokenize with."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import gguf
from checkpoints import DATA, MERGE
from neighbours import Llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gguf_moe.tokenizer import Vocabulary, read_vocabulary

CALIB = DATA / "text" / "calib.txt"
NO_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)  # of an added token


@cache
def awkward_strings() -> tuple[str, ...]:
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
    return tuple(fixed)


# What pre-tokenizers quarrel about: letters and their marks, kinds of digits and spaces, contractions, case, line ends.
PRE_TOKENIZER_STRINGS = (
    "e\u0301a\u0308o\u0302", "a\u0300\u0301\u0302b", "\u1100\u1161\u11a8", "ا\u0651\u064e", "नमस्ते दुनिया", "สวัสดีชาวโลก", "བཀྲ་ཤིས།", "မင်္ဂလာပါ",
    "Hello123 world 45678", "x²+y³=½", "①②③", "Ⅷ", "१२३", "٣٤٥", "𝒜𝒷𝒸 𝟘𝟙𝟚", "3,141.59", "1_000_000", "0b1010", "1e5f", "1234567890123",
    "ǅ ǈ", "HTTPServer parseJSON", "getHTTPResponseCode", "İIıi", "ſ K", "'ſ", "Ω Å", "fi\ufb01", "ǆ",
    "iPhone's McDonald's O'Neil's", "it's IT'S It'S", "'s 'S 't 'T", "don’t", "we'Ve I'LL you'd'",
    "foo/bar//baz", "a/\n/b", "...\n\n...", "  \n  \n", "\n \n", "\r\r\n", "a\r\nb\rc", "a \n", "a  \n\n b", "\n\n  x", "x   \t  y",
    "\u00a0\u00a0x", "\u2003x", "x\u3000y", "\u0085x", "\x1c\x1d", "\u180e", "x\u2028\u2029y", "   \u00a0  z",
    "𓀀𓀁", "🏳️‍🌈🏴‍☠️", "👍🏽", "\ufe0f", "\u20e3 1\u20e3", "\ue000\uf8ff", "\ufffd", "\u061c\u200f", "ﷺ", "漢字かなカナ한글", "ーー", "々〇〻", "！？。、",
    "<|begin_of_text|>hi<|eot_id|>", "<|im_start|>user\nhi<|im_end|>", "[INST] hi [/INST]", "<think>a</think>", "<|endoftext|>", "a<|endoftext|> b",
    "#define X(a) \\\n  (a)\n\tb", "    def f():\n        pass\n\n\n", "\t\t\tx\t", '{"a": [1, 2]}', "&amp; <b>", "100%", "$5.00", "€5", "°C", "×÷",
    "~`@#$%^&*()_+-=[]{}|;':\",./<>?", "a!b", "!a", " !a", "!!a", "-x -1 --y", "(a)(b)", "\"quote\" 'single'",
)  # fmt: skip


EVAL = (DATA / "text" / "eval.txt").read_text()
TEXTS = (
    *awkward_strings(),
    *PRE_TOKENIZER_STRINGS,
    *(EVAL[i : i + 2000] for i in range(0, len(EVAL), 2000)),
    "so <|call me|> Ishmael<|im_end|>",
    "zebra zebra  zebras",
    "<tool>a</tool> <tool>",
    "<|begin_of_text|><|im_end|>\n",
)


def known_limit(pre: str, text: str) -> bool:
    """Texts that llama.cpp may split otherwise under that pre-tokenizer; docs/format.md tells users.

    Its patterns for these two look for letters, \\p{L}, where the tokenizers' own have letters and marks, \\p{M}.
    """
    return pre in ("tekken", "gpt-4o") and any(unicodedata.category(c).startswith("M") for c in text)


def differing(model: Llama, tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts that llama.cpp gives other ids than the tokenizers package."""
    texts = list(texts)
    assert len(texts) >= 200
    return [text for text in texts if model.tokenize(text) != tokenizer.encode(text).ids]


def vocabulary_file(
    directory: Path, size: int, path: Path, *, arch: str = "llama", **options: str | None
) -> Vocabulary:
    """Write a GGUF that holds the vocabulary of `directory` and nothing else, for llama.cpp to tokenize with."""
    vocabulary = read_vocabulary(directory, size, **options)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    vocabulary.add_keys(writer)
    for add in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return vocabulary


def keys_of(vocabulary: Vocabulary, arch: str = "llama") -> dict[str, object]:
    """The tokenizer's keys without their prefix, in order."""
    writer = gguf.GGUFWriter(None, arch)
    vocabulary.add_keys(writer)
    return {
        key.removeprefix("tokenizer.ggml."): item.value
        for key, item in writer.kv_data[0].items()
        if key.startswith("tokenizer.")
    }


@cache
def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, size: int = 1500, more: tuple[str, ...] = ()) -> str:
    """A byte-level BPE of `size` tokens, two of them special, trained on the calibration text, Unicode and `more`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin_of_text|>", "<|im_end|>"],
        show_progress=False,
    )
    lines = CALIB.read_text().splitlines(keepends=True)[:800]
    tokenizer.train_from_iterator([*lines, *PRE_TOKENIZER_STRINGS * 20, *awkward_strings(), *more * 5], trainer)
    return tokenizer.to_str()


def save_tokenizer(directory: Path, document: dict, settings: dict | None = None) -> Path:
    """A directory with tokenizer.json and, unless None, tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(document))
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def variant(tmp_path: Path, change: Callable[[dict], object]) -> Path:
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
