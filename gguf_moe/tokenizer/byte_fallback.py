"""BPE with byte fallback, as of Llama 2 and Mistral: the kind that mergekit leaves without its `tokenizer.model`.

Texts and types are those of llama.cpp's converter, save where llama.cpp would not find an added token then. Scores are
not: llama.cpp joins the adjacent pair whose joined token has the highest score, so a token's score is minus the lowest
rank of the merges that make it. (llama.cpp's converter gives all tokens -1000 and so joins leftmost first, which is
another tokenizer.)
"""

from __future__ import annotations

from typing import Any

import gguf

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer.tokenizer_json import BpeFile, named_specials, unlike_added
from gguf_moe.tokenizer.vocabulary import SPACE, Reading, Token


def read_byte_fallback(file: BpeFile, settings: dict[str, Any]) -> Reading:
    """Tokens with scores; GgufMoeError where one of the 256 byte tokens is missing."""
    if absent := [byte for byte in (f"<0x{b:02X}>" for b in range(256)) if byte not in file.vocabulary]:
        raise GgufMoeError(f"{file.path}: byte fallback without the token {absent[0]}; llama.cpp would abort on it")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(file.merges):
        ranks.setdefault("".join(pair), rank)
    below_all = -float(len(file.merges))
    named = named_specials(settings)
    prefix, notes = _space_prefix(file)
    reading = Reading(add_space_prefix=prefix, notes=notes + unlike_added(file))
    for i, text in file.texts.items():
        kind = gguf.TokenType.NORMAL
        if _is_byte(text):
            kind = gguf.TokenType.BYTE
        elif text in named:
            kind = gguf.TokenType.CONTROL
        reading.tokens[i] = Token(text, -float(ranks[text]) if text in ranks else below_all, kind)
    for i, entry in file.added.items():
        text, special = entry["content"], entry["content"] in named
        if i not in reading.tokens:
            text = _text_of_added(file, entry)
        elif reading.tokens[i].type == gguf.TokenType.NORMAL:  # llama.cpp's converter leaves it so, and never finds it
            special = bool(entry.get("special"))
        else:
            continue
        kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        reading.tokens[i] = Token(text, -float(ranks[text]) if text in ranks else below_all, kind)
    return reading


def _text_of_added(file: BpeFile, entry: dict[str, Any]) -> str:
    """The text that llama.cpp has to look for. A union of tokenizers adds one's pieces to the other, as `▁is`: those
    are found after spaces have become visible, while llama.cpp looks before."""
    only_spaces = [step.get("type") for step in file.steps("normalizer")] == ["Replace"]
    return entry["content"].replace(SPACE, " ") if only_spaces and entry.get("normalized") else entry["content"]


def _space_prefix(file: BpeFile) -> tuple[bool, list[str]]:
    """Whether the tokenizer puts a space before the text, and the steps that llama.cpp cannot follow."""
    steps = file.steps("normalizer") + file.steps("pre_tokenizer")
    prefix, notes = False, []
    if not any(step.get("type") in ("Replace", "Metaspace") for step in steps):
        notes.append(f"{file.path}: the tokenizer leaves spaces as they are, llama.cpp replaces them with {SPACE}")
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            scheme = step.get("prepend_scheme", "always")
            prefix |= scheme != "never"
            if scheme != "never":
                notes.append(f"{file.path}: a text that begins with a space gets no second one, from llama.cpp it does")
            if scheme == "first":
                notes.append(f"{file.path}: text after a special token gets no space, from llama.cpp it does")
        elif kind != "Replace" or step.get("pattern") != {"String": " "} or step.get("content") != SPACE:
            notes.append(
                f"{file.path}: llama.cpp does not apply the tokenizer's step {kind}; some texts may split otherwise"
            )
    return prefix, notes


def _is_byte(text: str) -> bool:
    """`<0x-1>` and `<0xZZ>` are ordinary tokens: taken for bytes, they have made programs write out of bounds."""
    hexadecimal = all(c in "0123456789abcdefABCDEF" for c in text[3:5])
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">") and hexadecimal
