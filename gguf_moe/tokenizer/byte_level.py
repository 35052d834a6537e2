"""Byte-level BPE, as of Llama 3, Qwen, GPT-2, Mistral-Nemo and DeepSeek: llama.cpp's tokenizer model "gpt2"."""

from __future__ import annotations

from typing import Any

import gguf

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer.pretokenizers import find_pre
from gguf_moe.tokenizer.tokenizer_json import BpeFile, named_specials, unlike_added
from gguf_moe.tokenizer.vocabulary import SPACE, Reading, Token, looks_special

_SPACE_LETTER = "\u0120"  # the letter that stands for a space byte


def read_byte_level(file: BpeFile, settings: dict[str, Any], pre: str | None) -> Reading:
    """Tokens, merges and the pre-tokenizer's name, which `pre` sets.

    llama.cpp's converter writes an added token as the tokenizer decodes it: the same text, or one that llama.cpp would
    not find. So the text stays here. GgufMoeError for an unknown pre-tokenizer, or a tokenizer without merges.
    """
    if not file.merges:
        raise GgufMoeError(f"{file.path}: a byte-level BPE without merges; llama.cpp does not load it")
    name, notes = find_pre(file, pre)
    reading = Reading(model="gpt2", pre=name, add_space_prefix=settings.get("add_prefix_space"), notes=notes)
    reading.merges = [" ".join(part.replace(" ", _SPACE_LETTER) for part in pair) for pair in file.merges]
    named = named_specials(settings)
    for i, text in file.texts.items():
        reading.tokens[i] = _token(text, gguf.TokenType.CONTROL if text in named else gguf.TokenType.NORMAL)
    for i, entry in file.added.items():
        text = entry["content"]
        if entry.get("special") or looks_special(text):
            reading.tokens[i] = _token(text, gguf.TokenType.CONTROL)
        else:
            reading.tokens[i] = _token(text.replace(SPACE, " "), gguf.TokenType.USER_DEFINED)
    reading.notes += unlike_added(file)
    for step in file.steps("normalizer"):
        if step.get("type") != "ByteLevel":
            reading.notes.append(
                f"{file.path}: llama.cpp does not apply the tokenizer's step {step.get('type')}; texts that it changes "
                f"may split otherwise"
            )
    if any(step.get("add_prefix_space") for step in file.steps("pre_tokenizer") if step.get("type") == "ByteLevel"):
        reading.notes.append(f"{file.path}: the tokenizer puts a space before the text, llama.cpp does not")
    return reading


def _token(text: str, kind: gguf.TokenType) -> Token:
    return Token(text, 0.0, kind)
