"""A text as llama-perplexity gives it to a model: token ids in windows.

The ids follow from a model's GGUF keys alone, so that a checkpoint and its GGUF files get the same ones: those of
llama.cpp. SentencePiece joins by scores and the tokenizers package by merges; what llama.cpp does around them is here.
One case is left: a user-defined token that llama.cpp takes for the end of a turn by its text, as `<|im_end|>`. It does
not look for that in a text, and this does.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_keys import ModelKeys
from gguf_moe.tokenizer.pretokenizer_table import ADDING_BOS, IGNORING_MERGES, LLAMA_CPPS
from gguf_moe.tokenizer.pretokenizers import word_splitter
from gguf_moe.tokenizer.tokenizer_json import DEFAULT_IDS

MIN_CONTEXT = 8
_Keys = gguf.Keys.Tokenizer
_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # types of pieces in a SentencePiece model
_BPE = 2  # ... and of the model

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TextTokenizer:
    """A vocabulary in use on plain text, in which control tokens have no meaning."""

    bos: int | None  # the token before a text; None: it gets none
    encode: Encode  # a text's ids without it


@dataclass(frozen=True)
class EvaluationText:
    """A text in windows, each of which is evaluated alone."""

    name: str
    sha256: str  # of the file
    windows: np.ndarray = field(repr=False)  # int32 [chunks, context], BOS in the first place of each if there is one

    @property
    def first(self) -> int:
        """The first scored position: those from here to the last but one predict the token after them."""
        return self.windows.shape[1] // 2

    @property
    def targets(self) -> np.ndarray:
        """The ids that the scored positions predict: [chunks, context - 1 - first]."""
        return self.windows[:, self.first + 1 :]


def read_text(
    path: Path, tokenizer: TextTokenizer, *, context: int = 512, chunks: int | None = None, skip: int = 0
) -> EvaluationText:
    """The windows of `context` tokens of a text file, `chunks` at most behind the first `skip`; what is left at the end
    is dropped.

    Raises GgufMoeError for a file that is not UTF-8 or shorter than two windows, UsageError for numbers that make no
    windows.
    """
    if context < MIN_CONTEXT or (chunks is not None and chunks < 1):
        raise UsageError(f"windows of {context} tokens, {chunks} at most; expected {MIN_CONTEXT} and 1 at least")
    try:
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise GgufMoeError(f"{path}: not a readable UTF-8 text: {reason}") from None
    ids = tokenizer.encode(text.removesuffix("\n"))
    if tokenizer.bos is not None:
        ids.insert(0, tokenizer.bos)
    ids = ids[skip * context :]
    if len(ids) < 2 * context:
        behind = f" behind the first {skip} windows" if skip else ""
        raise GgufMoeError(
            f"{path}: {len(ids)} tokens{behind}, expected {2 * context} at least, two windows of {context}; "
            "give a longer text or shorter windows"
        )
    count = min(len(ids) // context, chunks or len(ids))
    windows = np.array(ids[: count * context], np.int32).reshape(count, context)
    if tokenizer.bos is not None:
        windows[:, 0] = tokenizer.bos
    return EvaluationText(path.name, hashlib.sha256(data).hexdigest(), windows)


def read_tokenizer(model: ModelKeys) -> TextTokenizer:
    """The tokenizer that a model's keys describe.

    Raises GgufMoeError for a vocabulary that is neither SentencePiece's nor a byte-level BPE, that contradicts itself,
    whose way of splitting words is not known here, or that puts EOS after a text.
    """
    kind = model.value(_Keys.MODEL)
    if kind not in DEFAULT_IDS:
        model.fail(_Keys.MODEL, " or ".join(DEFAULT_IDS))
    if model.value(_Keys.ADD_EOS):
        model.fail(_Keys.ADD_EOS, "False: a text that is cut into windows has no end")
    try:
        return _build(model, kind)
    except GgufMoeError:
        raise
    except Exception as error:  # the tokenizers package raises no narrower type
        reason = " ".join(str(error).split())
        raise GgufMoeError(f"{model.path}: the tokenizer's keys make no tokenizer: {reason}") from None


def _build(model: ModelKeys, kind: str) -> TextTokenizer:
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(model.value(_Keys.LIST))]
    types = list(model.value(_Keys.TOKEN_TYPE) or [gguf.TokenType.NORMAL] * len(tokens))
    user_defined = [(t, i) for i, (t, type_) in enumerate(zip(tokens, types)) if type_ == gguf.TokenType.USER_DEFINED]
    user_defined.sort(key=lambda item: -len(item[0].encode()))
    if kind == "llama":
        encode_part, adds_bos = _sentencepiece(model, tokens, types), True
        prefix = " " if model.value(_Keys.ADD_PREFIX) in (None, True) else ""
    else:
        encode_part, adds_bos, prefix = _byte_level(model, tokens), model.value(_Keys.PRE) in ADDING_BOS, ""

    def encode(text: str) -> list[int]:
        ids, after_token = [], True
        for part in _cut(text, user_defined):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += encode_part(prefix + part if after_token else part)
            after_token = isinstance(part, int)
        if ids and max(ids) >= len(tokens):
            raise GgufMoeError(f"{model.path}: the vocabulary has no tokens for some of the text's characters")
        return ids

    if (said := model.value(_Keys.ADD_BOS)) is not None:
        adds_bos = bool(said)
    bos = model.integer(_Keys.BOS_ID, 0, len(tokens) - 1, DEFAULT_IDS[kind]["bos"]) if adds_bos else None
    return TextTokenizer(bos, encode)


def _cut(text: str, user_defined: list[tuple[str, int]]) -> list[str | int]:
    """The text around user-defined tokens, and those as ids; the longest are looked for first, in all of the text."""
    parts: list[str | int] = [text] if text else []
    for token, i in user_defined:
        if token not in text:
            continue
        whole, parts = parts, []
        for part in whole:
            pieces = [part] if isinstance(part, int) else part.split(token)
            between = [item for piece in pieces for item in (i, piece)][1:]
            parts += [item for item in between if item != ""]
    return parts


def _sentencepiece(model: ModelKeys, tokens: list[str], types: list[int]) -> Encode:
    """Joins the pair with the best score, the leftmost of equals; what is no token then is spelt in bytes.

    llama.cpp joins to tokens of any type, so all are normal pieces here; SentencePiece asks for one more, for unknowns.
    """
    scores = model.value(_Keys.SCORES) or [0.0] * len(tokens)
    kinds = [_BYTE if kind == gguf.TokenType.BYTE else _NORMAL for kind in types]
    pieces = [*zip(tokens, scores, kinds), ("\uffff", 0.0, _UNKNOWN)]
    proto = [_field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind)) for text, score, kind in pieces]
    trainer = _field(3, _BPE) + _field(35, int(_BYTE in kinds)) + _field(40, len(tokens))  # byte fallback, unknown's id
    normalizer = _field(3, 0) + _field(4, 0) + _field(5, 1)  # nothing before a text, all spaces, and visible
    processor = SentencePieceProcessor(model_proto=b"".join(proto) + _field(2, trainer) + _field(3, normalizer))
    return processor.encode


def _field(number: int, value: bytes | float) -> bytes:
    """A field of a protocol buffer, which is what a SentencePiece model is."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    high = _varint(value >> 7) if value > 127 else b""
    return bytes([value & 127 | (128 if high else 0)]) + high


def _byte_level(model: ModelKeys, tokens: list[str]) -> Encode:
    """Splits into words, then joins in each the pair that comes first among the merges."""
    pre = model.value(_Keys.PRE)
    if pre not in LLAMA_CPPS:
        model.fail(_Keys.PRE, "a way of splitting words that gguf-moe knows", "; --engine llama.cpp knows them all")
    merges = {}
    for merge in model.value(_Keys.MERGES):
        space = merge.index(" ", 1)  # a token may begin with a space
        merges.setdefault((merge[:space], merge[space + 1 :]))
    vocabulary = {text: i for i, text in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocabulary, list(merges), ignore_merges=pre in IGNORING_MERGES))
    bpe.pre_tokenizer = word_splitter(LLAMA_CPPS[pre])
    return lambda text: bpe.encode(text).ids
