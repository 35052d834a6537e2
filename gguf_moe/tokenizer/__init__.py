"""The vocabulary of a checkpoint as GGUF keys: tokens, scores or merges, types, special ids, flags, chat templates.

Two sources: `tokenizer.model` (SentencePiece), and `tokenizer.json`, which is all that mergekit leaves today. That one
holds a BPE either with byte fallback, GGUF's tokenizer model "llama" as SentencePiece's is, or byte-level: "gpt2".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gguf_moe.checkpoint import read_optional_json
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.tokenizer.byte_fallback import read_byte_fallback
from gguf_moe.tokenizer.byte_level import read_byte_level
from gguf_moe.tokenizer.chat_templates import read_chat_templates
from gguf_moe.tokenizer.pretokenizer_table import ADDING_BOS
from gguf_moe.tokenizer.sentencepiece_model import read_sentencepiece
from gguf_moe.tokenizer.special import find_special
from gguf_moe.tokenizer.tokenizer_json import BpeFile, unlike_ends
from gguf_moe.tokenizer.vocabulary import Reading, Token, Vocabulary, pad

MODEL, JSON = "tokenizer.model", "tokenizer.json"


def read_vocabulary(
    directory: Path, size: int, *, pre: str | None = None, chat_template: str | None = None
) -> Vocabulary:
    """The vocabulary of the model in `directory`, padded to `size`, the number of embedding rows.

    `pre` names the pre-tokenizer of a byte-level BPE; `chat_template` is a file that replaces the model's templates,
    or "none". Raises GgufMoeError for a missing, unsupported or contradictory tokenizer, more tokens than `size`, or a
    text that two ids share; UsageError for a `pre` that llama.cpp does not know or that is not wanted.
    """
    path = next((directory / name for name in (MODEL, JSON) if os.path.lexists(directory / name)), None)
    if path is None:
        raise GgufMoeError(f"{directory}: no tokenizer, expected {MODEL} or {JSON}")
    if not path.is_file():
        raise GgufMoeError(f"{path}: is no regular file, nor a link to one")
    settings = read_optional_json(directory / "tokenizer_config.json")
    document = read_optional_json(directory / JSON)
    try:
        file = BpeFile(path, document) if path.name == JSON else None
        reading = _read(path, file, settings, pre)
        config = read_optional_json(directory / "config.json")
        special = find_special(document, settings, config, size, settings_add=file is None)
        templates = read_chat_templates(directory, settings, chat_template)
        if file:
            if reading.model == "llama" or reading.pre in ADDING_BOS:
                special.added.setdefault("bos", False)  # the post-processor adds none, llama.cpp would by default
            reading.notes += unlike_ends(file, special.ids, special.added)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise GgufMoeError(f"{directory}: a tokenizer file holds something unexpected: {error!r}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust code in the tokenizers package; no module exports it
            raise
        raise GgufMoeError(f"{path}: the tokenizers package gives up on it: {error}") from None
    tokens = pad(path, reading.tokens, size)
    notes = (*reading.notes, *(f"{directory}: {note}" for note in special.notes))
    return Vocabulary(tokens, reading, special, templates, notes)


def _read(path: Path, file: BpeFile | None, settings: dict[str, Any], pre: str | None) -> Reading:
    if file and file.byte_level:
        return read_byte_level(file, settings, pre)
    if pre is not None:
        raise UsageError(f"--pre {pre}: {path} is no byte-level BPE, llama.cpp splits it without a pre-tokenizer")
    if file is None:
        return read_sentencepiece(path, settings)
    if not file.byte_fallback:
        raise GgufMoeError(
            f"{path}: a BPE that is neither byte-level nor has byte fallback; llama.cpp has no such kind"
        )
    return read_byte_fallback(file, settings)


__all__ = ["Token", "Vocabulary", "read_vocabulary"]
