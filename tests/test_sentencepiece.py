"""SentencePiece models: llama.cpp splits text as SentencePiece does, or a note says where it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import DATA
from neighbours import Llama
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from vocabularies import (
    CALIB,
    TEXTS,
    vocabulary_file,
)

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer import read_vocabulary


def test_ids_of_tokenizer_model_are_sentencepieces(made) -> None:
    processor = SentencePieceProcessor(model_file=str(DATA / "tokenizers" / "tidepool.tokenizer.model"))
    text = (DATA / "text" / "eval.txt").read_text()
    with Llama(made("spm", "Q2_K"), vocabulary_only=True) as model:
        assert model.tokenize(text, special=False) == [1, *processor.encode(text)]


def train_sentencepiece(path: Path, **options: object) -> SentencePieceProcessor:
    """A SentencePiece BPE of 1000 pieces as Llama's are, save for `options`, written to `path`."""
    usual = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    with path.open("wb") as file:
        SentencePieceTrainer.train(input=str(CALIB), model_writer=file, vocab_size=1000, **usual | options)
    return SentencePieceProcessor(model_file=str(path))


def unlike_sentencepiece(path: Path, processor: SentencePieceProcessor, size: int = 1000) -> tuple[list[str], str]:
    """Texts that llama.cpp splits otherwise than SentencePiece, of over 200, and the notes on that."""
    notes = vocabulary_file(path.parent, size, path.with_suffix(".gguf")).notes
    with Llama(path.with_suffix(".gguf"), vocabulary_only=True) as model:
        wrong = [text for text in TEXTS if model.tokenize(text, special=False) != [1, *processor.encode(text)]]
    return wrong, " ".join(notes)


def test_mistrals_real_tokenizer_model_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    shutil.copy(DATA / "tokenizers" / "mistral-v3.tokenizer.model", path)
    wrong, notes = unlike_sentencepiece(path, SentencePieceProcessor(model_file=str(path)), 32768)
    assert wrong == []
    assert "makes 20 user-defined pieces ('[REFERENCE_DOC_19]', ...) plain tokens" in notes


def test_control_pieces_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    assert unlike_sentencepiece(path, train_sentencepiece(path, control_symbols=["<tool>"])) == ([], "")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"user_defined_symbols": ["<tool>"]}, "makes 1 user-defined pieces ('<tool>', ...) plain tokens"),
        ({"add_dummy_prefix": False}, "puts no space before the text, llama.cpp does otherwise; --override-kv "),
        ({"normalization_rule_name": "nmt_nfkc"}, "SentencePiece normalizes texts ('a  ﬁ' to '▁a▁▁fi')"),
        ({"remove_extra_whitespaces": True}, "SentencePiece normalizes texts ('a  ﬁ' to '▁a▁ﬁ')"),
        ({"model_type": "unigram"}, "a unigram model; llama.cpp joins the best pairs instead"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_llama_cpp_does_not_take_from_sentencepiece_is_noted(options: dict, note: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    wrong, notes = unlike_sentencepiece(path, train_sentencepiece(path, **options))
    assert note in notes
    assert wrong, "the note would be idle"


def test_the_remedy_for_the_space_prefix_works(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    processor = train_sentencepiece(path, add_dummy_prefix=False)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    assert unlike_sentencepiece(path, processor) == ([], "")


def test_a_model_without_byte_pieces_is_noted(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=False)
    (note,) = read_vocabulary(tmp_path, 1000).notes
    assert note.endswith("without byte tokens; llama.cpp aborts on a character that has no token")


def test_added_tokens_beside_a_tokenizer_model(tmp_path: Path) -> None:
    """Pieces, added_tokens.json, added_tokens_decoder: what comes later decides, and takes the place of a piece."""
    path = tmp_path / "tokenizer.model"
    processor = train_sentencepiece(path, user_defined_symbols=["<tool>"])
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 1000, "Call me": 1001, "<mask>": 1002}')
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "3": {"content": "<tool>", "special": False},
        "500": {"content": "Ishmael", "special": False},
        "1002": {"content": "<mask>", "special": False},
        "1003": {"content": "white▁whale", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    vocabulary = vocabulary_file(tmp_path, 1006, tmp_path / "v.gguf")
    tokens = vocabulary.tokens
    assert [(tokens[i].text, tokens[i].type, tokens[i].score) for i in (0, 3, 500, *range(1000, 1006))] == [
        ("<unk>", 3, -1000.0), ("<tool>", 4, -1000.0), ("Ishmael", 4, -1000.0),
        ("<|im_end|>", 4, -1000.0), ("Call me", 4, -1000.0), ("<mask>", 3, -1000.0), ("white whale", 4, -1000.0),
        ("[PAD1004]", 5, -10000.0), ("[PAD1005]", 5, -10000.0),
    ]  # fmt: skip
    assert vocabulary.notes == (
        f"{path}: the added token 'Ishmael' takes the place of {processor.id_to_piece(500)!r}, id 500",
    )
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        for before, i, after in (("so ", 3, " it"), ("I am ", 500, ""), ("", 1001, " then"), ("the ", 1003, "s")):
            want = [1, *processor.encode(before), i, *processor.encode(after)]
            assert model.tokenize(before + tokens[i].text + after, special=False) == want


@pytest.mark.parametrize(
    ("added", "decoder", "message"),
    [
        ({"a b": 1000, "b c": 1000}, {}, "added_tokens.json: 'a b' and 'b c' have the same id 1000"),
        ({"a b": 1000}, {"1000": "b c"}, "tokenizer_config.json: token 1000 is 'b c', but 'a b' in added_tokens.json"),
        ({"<s>": 1000}, {}, "tokenizer.model: tokens 1, 1000 have the same text '<s>'"),
        ({"a b": 1004}, {}, "1005 tokens, but the embedding has 1003 rows (vocab_size); surplus from id 1004: 'a b'"),
        ({"a b": -1}, {}, "added_tokens.json: token id -1, expected a whole number"),
        ({"\ud800": 1000}, {}, "tokenizer.model: token 1000 is '\\ud800', which is no Unicode text"),
        ({"a" * 10_000_000: 1000}, {}, "token 1000 has 10000000 bytes, expected at most 65535"),
    ],
    ids=lambda value: value[-40:] if isinstance(value, str) else "",
)
def test_contradictory_added_tokens_are_refused(added: dict, decoder: dict, message: str, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    entries = {i: {"content": text} for i, text in decoder.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(GgufMoeError) as caught:
        read_vocabulary(tmp_path, 1003)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
