"""Ids and windows of a text are llama.cpp's, for every kind of vocabulary and every way of splitting words known."""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import DATA, MERGE
from neighbours import Llama
from tokenizers import pre_tokenizers
from vocabularies import (
    CALIB,
    NO_FLAGS,
    PRE_TOKENIZER_STRINGS,
    TEXTS,
    awkward_strings,
    save_tokenizer,
    train_byte_level,
    variant,
    vocabulary_file,
)

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.text import TextTokenizer, read_text, read_tokenizer
from gguf_moe.gguf_keys import ModelKeys
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.tokenizer.pretokenizer_table import ADDING_BOS, LLAMA_CPPS, NAMES

EVAL = DATA / "text" / "eval.txt"
ARRAY, STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
# Where a joined token may lie across any border that a pattern draws, whatever merges the text was made with.
BORDERS = (
    *awkward_strings(), *PRE_TOKENIZER_STRINGS, *(EVAL.read_text()[i : i + 2000] for i in range(0, 30_000, 2000)),
    "éÉcole ÀÉa naïveÉcole ßA AßA ÖLö ЖжЖ жЖж ДОМдом", "a1b22c333d4444 55555 666666 7777777", "1,234,567.89 12 345",
    "x'S y'sD 'Dm z'll", "a/b/\n//\n/ab..\n\n", "$+<=>^~|$$ a+b", "(abc) (def)", "foo\tbar\t\tbaz", "中\u3000文\u2003a",
)  # fmt: skip


def keys_in(path: Path, **changed: object) -> ModelKeys:
    """The keys of a file, some with other values (None: without)."""
    values = dict(read_gguf(path).values)
    for name, value in changed.items():
        key = f"tokenizer.ggml.{name}"
        old = values.pop(key, gguf.GGUFValue(None, STRING))
        if value is not None:
            values[key] = replace(old, value=value)
    return ModelKeys(path, values)


def differing(path: Path, texts: tuple[str, ...]) -> list[str]:
    """The texts that get other ids here than from llama.cpp."""
    ours = read_tokenizer(keys_in(path))
    with Llama(path, vocabulary_only=True) as model:
        theirs = model.text_tokenizer()
        assert ours.bos == theirs.bos
        return [text for text in texts if ours.encode(text) != theirs.encode(text)]


@pytest.mark.parametrize("form", ["json", "spm"])
def test_ids_of_the_merge_are_llama_cpps(form: str, made) -> None:
    whole = (EVAL.read_text(), CALIB.read_text())
    assert differing(made(form, "Q2_K"), (*whole, *TEXTS, "a</s>b <s> <unk>", "\uffff a")) == []


@pytest.mark.parametrize("form", ["json", "spm"])
def test_a_checkpoint_and_its_file_get_the_same_windows(form: str, made, merges) -> None:
    plan = make_plan(open_checkpoint(merges[form]), find_file_type("BF16"))
    tokenizers = (read_tokenizer(ModelKeys(MERGE, plan.keys)), read_tokenizer(keys_in(made(form, "Q2_K"))))
    ours, theirs = (read_text(EVAL, tokenizer).windows for tokenizer in tokenizers)
    assert np.array_equal(ours, theirs)


def test_ids_of_mistrals_real_vocabulary_are_llama_cpps(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizers" / "mistral-v3.tokenizer.model").read_bytes())
    vocabulary_file(tmp_path, 32768, tmp_path / "v.gguf")
    assert differing(tmp_path / "v.gguf", (EVAL.read_text(), *TEXTS)) == []


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A byte-level BPE whose words were never split, so that every border shows in the ids; and its size."""
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    document = json.loads(train_byte_level(unsplit, 6000, BORDERS))
    size = len(document["model"]["vocab"])
    for i, (text, special) in enumerate((("<|call me|>", False), ("me|><tool>", False), ("<pad>", True))):
        document["added_tokens"].append({"id": size + i, "content": text, "special": special, **NO_FLAGS})
    return save_tokenizer(tmp_path_factory.mktemp("unsplit"), document), size + 4


@pytest.mark.parametrize("pre", sorted(LLAMA_CPPS))
def test_ids_of_a_byte_level_vocabulary_are_llama_cpps(pre: str, byte_level, tmp_path: Path) -> None:
    directory, size = byte_level
    vocabulary_file(directory, size, tmp_path / "v.gguf", pre=pre)
    assert differing(tmp_path / "v.gguf", (*BORDERS, "so <|call me|><tool> <pad>a<|im_end|>")) == []


def test_ids_of_gpt2s_real_vocabulary_are_llama_cpps(tmp_path: Path) -> None:
    packed = (DATA / "tokenizers" / "gpt2.tokenizer.json.xz").read_bytes()
    save_tokenizer(tmp_path, json.loads(lzma.decompress(packed)))
    vocabulary_file(tmp_path, 50257, tmp_path / "v.gguf")
    assert differing(tmp_path / "v.gguf", (EVAL.read_text(), CALIB.read_text(), *TEXTS)) == []


def test_bos_by_default(byte_level, tmp_path: Path) -> None:
    directory, size = byte_level
    for pre in ("tekken", "qwen2"):
        vocabulary_file(directory, size, tmp_path / "v.gguf", pre=pre)
        keys = keys_in(tmp_path / "v.gguf", add_bos_token=None)
        assert read_tokenizer(keys).bos == (11 if pre in ADDING_BOS else None)
        assert read_tokenizer(keys_in(tmp_path / "v.gguf")).bos is None, "the file says so"


def test_user_defined_tokens_are_cut_out_the_longest_first(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        for i, text in enumerate(("stones", "qlost", "lost", " x ", "日本")):
            content["added_tokens"].append({"id": 4096 + i, "content": text, "special": False, **NO_FLAGS})

    vocabulary_file(variant(tmp_path, change), 4101, tmp_path / "v.gguf")
    texts = ("qlostones", "a x x b", "stones", " stones lost ", "日本日本", "losstonesqlost qlostqlost", *TEXTS)
    assert differing(tmp_path / "v.gguf", texts) == []
    assert max(read_tokenizer(keys_in(tmp_path / "v.gguf")).encode("日本")) == 4100


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected llama or gpt2"),
        ({"model": None}, "tokenizer.ggml.model is missing, expected llama or gpt2"),
        ({"add_eos_token": True}, "add_eos_token is True, expected False: a text that is cut into windows has no end"),
        ({"bos_token_id": 4096, "add_bos_token": True}, "bos_token_id is 4096, expected an integer from 0 to 4095"),
        ({"model": "gpt2", "pre": "viking"}, "expected a way of splitting words that gguf-moe knows; --engine "),
        ({"model": "gpt2", "pre": "qwen2"}, "the tokenizer's keys make no tokenizer"),
        ({"tokens": ["a"] * 4096}, "the tokenizer's keys make no tokenizer: INTERNAL: a is already defined."),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_vocabularies_without_windows_are_refused(changed: dict, message: str, made) -> None:
    path = made("json", "Q2_K")
    with pytest.raises(GgufMoeError) as caught:
        read_tokenizer(keys_in(path, **changed))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_adds_eos_is_refused_by_both_engines(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tokenizers" / "tidepool.tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    vocabulary_file(tmp_path, 4096, tmp_path / "v.gguf")
    with pytest.raises(GgufMoeError, match=r"v\.gguf: tokenizer\.ggml\.add_eos_token is True, expected False"):
        read_tokenizer(keys_in(tmp_path / "v.gguf"))
    with (
        Llama(tmp_path / "v.gguf", vocabulary_only=True) as model,
        pytest.raises(GgufMoeError, match=r"v\.gguf: its tokenizer puts EOS after a text"),
    ):
        model.text_tokenizer()


def test_every_name_with_a_pattern_is_one_of_llama_cpps() -> None:
    assert set(LLAMA_CPPS) < NAMES


def test_a_vocabulary_without_bytes_refuses_a_character_that_it_lacks(made) -> None:
    path = made("json", "Q2_K")
    types = [1 if kind == 6 else kind for kind in read_gguf(path).keys["tokenizer.ggml.token_type"]]
    tokenizer = read_tokenizer(keys_in(path, token_type=types))
    assert tokenizer.encode("whale")
    with pytest.raises(GgufMoeError, match="the vocabulary has no tokens for some of the text's characters"):
        tokenizer.encode("whale 鯨")


LETTERS = TextTokenizer(None, lambda text: list(map(ord, text)))


def test_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcdefghijklmnopqrstuvwxyz\n\n")
    text = read_text(path, LETTERS, context=8)
    assert (text.name, text.sha256) == ("a.txt", hashlib.sha256(path.read_bytes()).hexdigest())
    assert ["".join(map(chr, window)) for window in text.windows] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert (text.first, text.windows.dtype) == (4, np.int32)
    assert ["".join(map(chr, targets)) for targets in text.targets] == ["fgh", "nop", "vwx"]
    with_bos = read_text(path, replace(LETTERS, bos=42), context=9, chunks=2)
    assert ["".join(map(chr, window)) for window in with_bos.windows] == ["*abcdefgh", "*jklmnopq"]
    assert len(read_text(path, LETTERS, context=9, chunks=9).windows) == 3, "one newline is left"


def test_windows_of_the_merge_are_llama_perplexitys(made) -> None:
    path = made("spm", "Q2_K")
    with Llama(path, vocabulary_only=True) as model:
        theirs = list(model.windows(EVAL.read_text()))
        assert np.array_equal(read_text(EVAL, model.text_tokenizer()).windows, theirs)
    assert np.array_equal(read_text(EVAL, read_tokenizer(keys_in(path))).windows, theirs)
    assert len(theirs) == 102


def test_texts_that_make_no_windows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * 31)
    with pytest.raises(GgufMoeError, match=r"a\.txt: 31 tokens, expected 32 at least, two windows of 16; give"):
        read_text(path, LETTERS, context=16)
    for wrong in ({"context": 7}, {"chunks": 0}):
        with pytest.raises(UsageError, match="expected 8 and 1 at least"):
            read_text(path, LETTERS, **wrong)
    path.write_bytes(b"abc\xff")
    with pytest.raises(GgufMoeError, match=r"a\.txt: not a readable UTF-8 text: .* in position 3"):
        read_text(path, LETTERS)
    with pytest.raises(GgufMoeError, match=r"b\.txt: not a readable UTF-8 text: .*No such file"):
        read_text(tmp_path / "b.txt", LETTERS)
