"""The vocabulary of an output: its tokens and all that its tokenizer keys say."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer.chat_templates import add_chat_templates
from gguf_moe.tokenizer.special import Special

SPACE = "\u2581"  # the visible space of SentencePiece vocabularies
PAD_SCORE = -10000.0  # what llama.cpp's converter gives to tokens without a text of their own
ADDED_SCORE = -1000.0  # ... and to added tokens
MAX_TEXT_BYTES = 65535  # of a token; the longest of real vocabularies have some hundred
CODE_LLAMA_SIZE, CODE_LLAMA_EOT = 32016, 32010  # llama.cpp knows CodeLlama, and Granite, by the size of the vocabulary
GRANITE_SIZE = 49152
_SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_ENDS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary. `score` is for the SentencePiece kind alone."""

    text: str
    score: float
    type: gguf.TokenType


@dataclass
class Reading:
    """What a reader of one kind of tokenizer file found. Ids of `tokens` may have holes."""

    tokens: dict[int, Token] = field(default_factory=dict)
    model: str = "llama"  # llama.cpp's name of the kind: "llama" joins by scores, "gpt2" by merges
    pre: str = "default"
    merges: list[str] | None = None
    add_space_prefix: bool | None = None  # None: not said, llama.cpp's default holds
    notes: list[str] = field(default_factory=list)  # what llama.cpp will not do as this tokenizer does


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer becomes in GGUF. `tokens` has exactly one entry for each row of the embedding."""

    tokens: list[Token] = field(repr=False)
    reading: Reading = field(repr=False)
    special: Special = field(repr=False)
    chat_templates: dict[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()

    def add_keys(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer's keys to `writer`, in the order of llama.cpp's converter."""
        reading, llama = self.reading, writer.arch == "llama"
        if reading.add_space_prefix is not None and (llama or reading.merges is None):  # else it means nothing
            writer.add_add_space_prefix(reading.add_space_prefix)
        writer.add_tokenizer_model(reading.model)
        writer.add_tokenizer_pre(reading.pre)
        writer.add_token_list([token.text for token in self.tokens])
        if reading.merges is None:
            writer.add_token_scores([token.score for token in self.tokens])
        writer.add_token_types([int(token.type) for token in self.tokens])
        if reading.merges is not None:
            writer.add_token_merges(reading.merges)
        self.special.add_keys(writer)
        add_chat_templates(writer, self.chat_templates)
        self.special.add_normalizer_keys(writer)
        if llama and len(self.tokens) == CODE_LLAMA_SIZE and "eot" not in self.special.ids:
            writer.add_eot_token_id(CODE_LLAMA_EOT)
        if llama and len(self.tokens) == GRANITE_SIZE:
            writer.add_add_bos_token(False)


def pad(path: Path, tokens: dict[int, Token], size: int) -> list[Token]:
    """`tokens` as a list of `size`, ids without a token filled as llama.cpp's converter does.

    Raises GgufMoeError for ids beyond `size`, a text that two ids share (llama.cpp aborts on it), or one far too long.
    """
    surplus = sorted(i for i in tokens if i >= size)
    if surplus:
        texts = ", ".join(repr(tokens[i].text[:40]) for i in surplus[:4])
        raise GgufMoeError(
            f"{path}: {surplus[-1] + 1} tokens, but the embedding has {size} rows (vocab_size); surplus from id "
            f"{surplus[0]}: {texts}"
        )
    padded = [tokens.get(i) or Token(f"[PAD{i}]", PAD_SCORE, gguf.TokenType.UNUSED) for i in range(size)]
    for i, token in enumerate(padded):
        check_text(path, i, token.text)
    text, count = Counter(token.text for token in padded).most_common(1)[0]
    if count > 1:
        ids = [i for i, token in enumerate(padded) if token.text == text]
        raise GgufMoeError(f"{path}: tokens {', '.join(map(str, ids[:4]))} have the same text {text!r}")
    return padded


def check_text(path: Path, i: int, text: str) -> None:
    """Refuse a token's text that is no Unicode, or so long that it is no token."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise GgufMoeError(f"{path}: token {i} is {text[:40]!r}, which is no Unicode text") from None
    if length > MAX_TEXT_BYTES:
        raise GgufMoeError(f"{path}: token {i} has {length} bytes, expected at most {MAX_TEXT_BYTES}")


def token_id(path: Path, value: Any) -> int:
    """Ids are whole numbers; as keys of JSON objects they are text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GgufMoeError(f"{path}: token id {value!r}, expected a whole number")
    return value


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token by its text alone."""
    return text in _SPECIAL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _SPECIAL_ENDS)
