"""`tokenizer.model`, a SentencePiece model, with the added tokens beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from sentencepiece import SentencePieceProcessor

from gguf_moe.checkpoint import read_optional_json
from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer.vocabulary import ADDED_SCORE, SPACE, Reading, Token, looks_special, token_id

_PROBE = "a  \ufb01"  # two spaces and a ligature, which normalizers change


def read_sentencepiece(path: Path, settings: dict[str, Any]) -> Reading:
    """Tokens as llama.cpp's converter has them: pieces, then added_tokens.json, then `added_tokens_decoder` of
    tokenizer_config.json (`settings`); later ones replace. GgufMoeError if the two lists contradict each other."""
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise GgufMoeError(f"{path}: not a SentencePiece model: {reason}") from None
    reading = Reading(add_space_prefix=settings.get("add_prefix_space"))
    pieces = {i: _piece(model, i) for i in range(model.vocab_size())}
    added = _added_tokens(path.parent, settings)
    reading.tokens = pieces | added
    replaced = [i for i, token in added.items() if i in pieces and pieces[i].text != token.text]
    for i in replaced[:4]:
        reading.notes.append(f"{path}: the added token {added[i].text!r} takes the place of {pieces[i].text!r}, id {i}")
    reading.notes += _unfollowed(path, model, reading)
    return reading


def _piece(model: SentencePieceProcessor, i: int) -> Token:
    kinds = {
        gguf.TokenType.UNKNOWN: model.is_unknown(i),
        gguf.TokenType.CONTROL: model.is_control(i),
        gguf.TokenType.UNUSED: model.is_unused(i),
        gguf.TokenType.BYTE: model.is_byte(i),
    }
    kind = next((kind for kind, yes in kinds.items() if yes), gguf.TokenType.NORMAL)
    return Token(model.id_to_piece(i), model.get_score(i), kind)


def _added_tokens(directory: Path, settings: dict[str, Any]) -> dict[int, Token]:
    """The tokens of added_tokens.json and of added_tokens_decoder, which decides on type and text."""
    path, where = directory / "added_tokens.json", directory / "tokenizer_config.json"
    tokens: dict[int, Token] = {}
    for text, value in read_optional_json(path).items():
        i = token_id(path, value)
        if i in tokens:
            raise GgufMoeError(f"{path}: {tokens[i].text!r} and {text!r} have the same id {i}")
        tokens[i] = Token(text, ADDED_SCORE, gguf.TokenType.USER_DEFINED)
    for value, entry in (settings.get("added_tokens_decoder") or {}).items():
        i, text = token_id(where, value), entry["content"]
        if i in tokens and tokens[i].text != text:
            raise GgufMoeError(f"{where}: token {i} is {text!r}, but {tokens[i].text!r} in {path.name}")
        if entry.get("special") or looks_special(text):
            tokens[i] = Token(text, ADDED_SCORE, gguf.TokenType.CONTROL)
        else:
            tokens[i] = Token(text.replace(SPACE, " "), ADDED_SCORE, gguf.TokenType.USER_DEFINED)
    return tokens


def _unfollowed(path: Path, model: SentencePieceProcessor, reading: Reading) -> list[str]:
    """What llama.cpp will not do as SentencePiece does. The keys are those of its converter all the same."""
    notes = []
    normal = [token for token in reading.tokens.values() if token.type == gguf.TokenType.NORMAL]
    if not any(token.type == gguf.TokenType.BYTE for token in reading.tokens.values()):
        notes.append(f"{path}: without byte tokens; llama.cpp aborts on a character that has no token")
    # SentencePiece gives a user-defined piece +0.0, and -0.0 to the first pair that it joined.
    whole = [token.text for token in normal if len(token.text) > 1 and str(token.score) == "0.0"]
    if whole:
        notes.append(
            f"{path}: llama.cpp's converter makes {len(whole)} user-defined pieces ({whole[0]!r}, ...) plain tokens, "
            f"which llama.cpp may split; under added_tokens_decoder in tokenizer_config.json they stay whole"
        )
    if any(not token.score.is_integer() for token in normal):
        notes.append(f"{path}: a unigram model; llama.cpp joins the best pairs instead and splits many texts otherwise")
    normalized = model.normalize(_PROBE)
    if normalized.removeprefix(SPACE) != _PROBE.replace(" ", SPACE):
        notes.append(f"{path}: SentencePiece normalizes texts ({_PROBE!r} to {normalized!r}), llama.cpp does not")
    prefix = normalized.startswith(SPACE)
    if prefix != (reading.add_space_prefix in (None, True)):
        key = gguf.Keys.Tokenizer.ADD_PREFIX
        notes.append(
            f"{path}: SentencePiece puts {'a' if prefix else 'no'} space before the text, llama.cpp does otherwise; "
            f"--override-kv {key}=bool:{str(prefix).lower()} corrects it"
        )
    return notes
