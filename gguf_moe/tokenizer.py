"""The vocabulary of a checkpoint as GGUF keys: tokens, scores, types, special ids, flags.

Two sources: `tokenizer.model` (SentencePiece), and `tokenizer.json` with byte fallback, which is all that mergekit
leaves today. Both become GGUF's tokenizer model "llama". Byte-level BPE ("gpt2") is another reader in `READERS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from sentencepiece import SentencePieceProcessor

from gguf_moe.checkpoint import read_json
from gguf_moe.errors import GgufMoeError

SPACE = "\u2581"  # the visible space of SentencePiece vocabularies
PAD_SCORE = -10000.0  # what llama.cpp's converter gives to tokens without a text of their own
ADDED_SCORE = -1000.0  # ... and to added tokens
_SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_ENDS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True)
class Token:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: gguf.TokenType


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer becomes in GGUF. `tokens` has exactly one entry for each row of the embedding."""

    tokens: list[Token] = field(repr=False)
    add_space_prefix: bool | None  # None: not said, llama.cpp's default holds
    special: gguf.SpecialVocab = field(repr=False)
    notes: tuple[str, ...] = ()  # what llama.cpp will not do as this tokenizer does

    def add_keys(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer's keys to `writer`, in the order of llama.cpp's converter."""
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([token.text for token in self.tokens])
        writer.add_token_scores([token.score for token in self.tokens])
        writer.add_token_types([int(token.type) for token in self.tokens])
        self.special.add_to_gguf(writer, quiet=True)


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """The vocabulary of the model in `directory`, padded to `size`, the number of embedding rows.

    Raises GgufMoeError for a missing or unsupported tokenizer, more tokens than `size`, or a text that two ids share.
    """
    path = next((directory / name for name in READERS if (directory / name).is_file()), None)
    if path is None:
        raise GgufMoeError(f"{directory}: no tokenizer, expected {' or '.join(READERS)}")
    settings = _optional_json(directory / "tokenizer_config.json")
    try:
        tokens, prefix, notes = READERS[path.name](path, settings)
        special = _special_vocabulary(directory, size)
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise GgufMoeError(f"{directory}: a tokenizer file holds something unexpected: {error!r}") from None
    surplus = sorted(i for i in tokens if i >= size)
    if surplus:
        texts = ", ".join(repr(tokens[i].text) for i in surplus[:4])
        raise GgufMoeError(
            f"{path}: {surplus[-1] + 1} tokens, but the embedding has {size} rows (vocab_size); surplus from id "
            f"{surplus[0]}: {texts}"
        )
    padded = [tokens.get(i) or Token(f"[PAD{i}]", PAD_SCORE, gguf.TokenType.UNUSED) for i in range(size)]
    _check_distinct(path, padded)
    return Vocabulary(padded, prefix, special, tuple(notes))


# A reader takes its file and tokenizer_config.json, and returns tokens by id, the space prefix if known, and notes.
_Reading = tuple[dict[int, Token], "bool | None", list[str]]


def _read_sentencepiece(path: Path, settings: dict[str, Any]) -> _Reading:
    """`tokenizer.model` with added tokens, as llama.cpp's converter reads them (`_create_vocab_sentencepiece`)."""
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise GgufMoeError(f"{path}: not a SentencePiece model: {error}") from None
    tokens = {}
    for i in range(model.vocab_size()):
        kinds = {
            gguf.TokenType.UNKNOWN: model.is_unknown(i),
            gguf.TokenType.CONTROL: model.is_control(i),
            gguf.TokenType.UNUSED: model.is_unused(i),
            gguf.TokenType.BYTE: model.is_byte(i),
        }
        kind = next((kind for kind, yes in kinds.items() if yes), gguf.TokenType.NORMAL)
        tokens[i] = Token(model.id_to_piece(i), model.get_score(i), kind)
    added = path.parent / "added_tokens.json"
    for text, i in _optional_json(added).items():
        tokens[_token_id(added, i)] = Token(text, ADDED_SCORE, gguf.TokenType.USER_DEFINED)
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        text, special = entry["content"], entry.get("special")
        if special or _looks_special(text):
            token = Token(text, ADDED_SCORE, gguf.TokenType.CONTROL)
        else:
            token = Token(text.replace(SPACE, " "), ADDED_SCORE, gguf.TokenType.USER_DEFINED)
        tokens[_token_id(path.parent / "tokenizer_config.json", i)] = token
    return tokens, settings.get("add_prefix_space"), []


def _read_tokenizer_json(path: Path, settings: dict[str, Any]) -> _Reading:
    """`tokenizer.json` with byte fallback. Texts and types as llama.cpp's converter has them; scores that rank.

    llama.cpp joins the adjacent pair whose joined token has the highest score, so a token's score is minus the
    lowest rank of the merges that make it. (llama.cpp's converter gives all tokens -1000 and so joins leftmost
    first, which is another tokenizer.)
    """
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise GgufMoeError(f"{path}: tokenizer model is {kind!r}, expected 'BPE' with byte fallback")
    if not model.get("byte_fallback"):
        raise GgufMoeError(
            f"{path}: a BPE tokenizer without byte fallback (byte-level, as of Llama 3 or Qwen) is not supported yet; "
            f"supported are tokenizer.model and tokenizer.json with byte_fallback"
        )
    vocabulary = model["vocab"]
    ranks = _merge_ranks(path, model.get("merges") or [])
    below_all = -float(len(model.get("merges") or []))
    named = _named_specials(settings)

    def score(text: str) -> float:
        return -float(ranks[text]) if text in ranks else below_all

    tokens = {}
    if absent := [byte for byte in (f"<0x{b:02X}>" for b in range(256)) if byte not in vocabulary]:
        raise GgufMoeError(f"{path}: byte fallback without the token {absent[0]}; llama.cpp would abort on it")
    for text, i in vocabulary.items():
        if (token_id := _token_id(path, i)) in tokens:
            raise GgufMoeError(f"{path}: tokens {tokens[token_id].text!r} and {text!r} have the same id {i}")
        kind = gguf.TokenType.NORMAL
        if _is_byte(text):
            kind = gguf.TokenType.BYTE
        elif text in named:
            kind = gguf.TokenType.CONTROL
        tokens[token_id] = Token(text, score(text), kind)
    for entry in tokenizer.get("added_tokens") or []:
        text, i = entry["content"], _token_id(path, entry["id"])
        if i in tokens and tokens[i].text != text:
            raise GgufMoeError(f"{path}: added token {text!r} has the id {i} of {tokens[i].text!r}")
        if i not in tokens:
            kind = gguf.TokenType.CONTROL if text in named else gguf.TokenType.USER_DEFINED
            tokens[i] = Token(text, below_all, kind)
    prefix, notes = _space_prefix(path, tokenizer)
    return tokens, prefix, notes


READERS: dict[str, Callable[[Path, dict[str, Any]], _Reading]] = {
    "tokenizer.model": _read_sentencepiece,
    "tokenizer.json": _read_tokenizer_json,
}


def _merge_ranks(path: Path, merges: list[Any]) -> dict[str, int]:
    """The lowest rank of the merges that make each token. A merge is a pair, or both parts in one string."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise GgufMoeError(f"{path}: merge {rank} is {merge!r}, expected a pair of tokens")
        ranks.setdefault("".join(parts), rank)
    return ranks


def _space_prefix(path: Path, tokenizer: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether the tokenizer puts a space before the text, and the steps that llama.cpp cannot follow."""
    steps = _steps(tokenizer.get("normalizer"), "normalizers") + _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prefix, notes = False, []
    if not any(step.get("type") in ("Replace", "Metaspace") for step in steps):
        notes.append(f"{path}: the tokenizer leaves spaces as they are, llama.cpp replaces them with {SPACE}")
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE:
            prefix |= step.get("prepend_scheme", "always") != "never"
        elif kind != "Replace" or step.get("pattern") != {"String": " "} or step.get("content") != SPACE:
            notes.append(
                f"{path}: llama.cpp does not apply the tokenizer's step {kind}; some texts may split otherwise"
            )
    return prefix, notes


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of its steps."""
    if not step:
        return []
    return [one for part in step[inner] for one in _steps(part, inner)] if step.get("type") == "Sequence" else [step]


def _special_vocabulary(directory: Path, size: int) -> gguf.SpecialVocab:
    """Special ids, add flags and chat templates, by the gguf package; the post-processor decides on bos and eos."""
    tokenizer = _optional_json(directory / "tokenizer.json")
    special = gguf.SpecialVocab(directory, n_vocab=size)
    flags = _template_flags(tokenizer, special.special_token_ids)
    if tokenizer and not (directory / "tokenizer.model").is_file():  # tokenizer.json is all there is, and does no more
        special.add_special_token["bos"] = False
        if "eos" in special.add_special_token:
            special.add_special_token["eos"] = False
    special.add_special_token.update(flags)
    return special


def _template_flags(tokenizer: dict[str, Any], ids: dict[str, int]) -> dict[str, bool]:
    """{"bos": True, "eos": True} as far as a template of the post-processor adds that token before or after the text.

    The gguf package lets tokenizer_config.json overrule the template; current llama.cpp and `tokenizers` do not.
    """
    post = tokenizer.get("post_processor") or {}
    flags = {}
    for processor in post.get("processors", [post]):
        single = processor.get("single")
        if processor.get("type") == "TemplateProcessing" and isinstance(single, list) and len(single) > 1:
            for kind, item in (("bos", single[0]), ("eos", single[-1])):
                name = item.get("SpecialToken", {}).get("id")
                if name is not None and processor["special_tokens"][name]["ids"] == [ids.get(kind)]:
                    flags[kind] = True
    return flags


def _named_specials(settings: dict[str, Any]) -> set[str]:
    """Texts that tokenizer_config.json names as special: every `..._token`, and the lists of further ones."""
    named = set()
    for key, value in settings.items():
        if key.endswith("_token"):
            value = value.get("content") if isinstance(value, dict) else value
            named.add(value if isinstance(value, str) else None)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = settings.get(key) or []
        named.update(value.values() if isinstance(value, dict) else (v for v in value if isinstance(v, str)))
    return named - {None}


def _looks_special(text: str) -> bool:
    return text in _SPECIAL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _SPECIAL_ENDS)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">") and _is_hex(text[3:5])


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdefABCDEF" for c in text)


def _token_id(path: Path, value: Any) -> int:
    """Ids are whole numbers; as keys of JSON objects they are text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise GgufMoeError(f"{path}: token id {value!r}, expected a whole number")
    return value


def _check_distinct(path: Path, tokens: list[Token]) -> None:
    """Two ids with one text make llama.cpp abort."""
    text, count = Counter(token.text for token in tokens).most_common(1)[0]
    if count > 1:
        ids = [i for i, token in enumerate(tokens) if token.text == text]
        raise GgufMoeError(f"{path}: tokens {', '.join(map(str, ids[:4]))} have the same text {text!r}")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
