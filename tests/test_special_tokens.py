"""Ids and flags of special tokens, and chat templates: the keys that llama.cpp's converter writes."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from checkpoints import MERGE
from neighbours import Llama
from tokenizers import Tokenizer
from vocabularies import awkward_strings, differing, keys_of, save_tokenizer, variant, vocabulary_file

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer import read_vocabulary
from gguf_moe.tokenizer.special import Special, find_special

SETTINGS = json.loads((MERGE / "tokenizer_config.json").read_text())


def item(text: str) -> dict:
    return {"SpecialToken": {"id": text, "type_id": 0}}


A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
BYTE_LEVEL = {"type": "ByteLevel"}
ADDED = [{"id": i, "content": text} for i, text in enumerate(("<unk>", "<s>", "</s>", "<eot>", "<mask>", "<cls>"))]


def template(single: list[dict], pair: list[dict] | None = None) -> dict:
    return {"type": "TemplateProcessing", "single": single, "pair": pair or []}


def find(post: dict | None, settings: dict, config: dict | None = None, **tokenizer: object) -> Special:
    document = {"added_tokens": ADDED, "post_processor": post, **tokenizer}
    return find_special(document, settings, config or {}, 10, settings_add=True)


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
EITHER = {"bos": 1, "eos": 2}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<cls>", 5]}


@pytest.mark.parametrize(
    ("post", "settings", "ids", "added"),
    [
        (None, NAMED, EITHER, {}),
        (None, NAMED | {"add_bos_token": True, "add_eos_token": False}, EITHER, {"bos": True, "eos": False}),
        (ROBERTA, NAMED, EITHER | {"sep": 2, "cls": 5}, {"bos": True, "eos": True, "sep": True}),
        (template([item("<s>"), A]), NAMED, EITHER, {"bos": True}),
        (template([item("<s>"), A, item("</s>")]), NAMED, EITHER, {"bos": True, "eos": True}),
        (template([A]), NAMED, EITHER, {}),
        (template([item("<s>"), A], [item("<s>"), A, item("<s>"), B]), NAMED, EITHER, {"bos": True, "sep": False}),
        (
            template([item("<s>"), A], [item("<s>"), A, item("</s>"), B]),
            NAMED,
            EITHER | {"sep": 2},
            {"bos": True, "sep": True},
        ),
        (template([A], [A, item("<mask>"), item("</s>"), B]), NAMED, EITHER | {"sep": 2}, {"sep": True}),
        # Another last token than the named end of text: that one becomes the end of a turn.
        (template([A, item("<eot>")]), NAMED, {"bos": 1, "eos": 3, "eot": 2}, {"eos": True}),
        (None, {"cls_token": "<cls>", "sep_token": "</s>"}, {"bos": 5, "eos": 2, "sep": 2, "cls": 5}, {}),
        (None, {"mask_token": "<mask>", "pad_token": "<s>", "unk_token": "<unk>"}, {"unk": 0, "pad": 1, "mask": 4}, {}),
    ],
)
def test_ids_and_flags_are_the_gguf_packages(
    post: dict | None, settings: dict, ids: dict, added: dict, tmp_path: Path
) -> None:
    special = find(post, settings)
    assert (list(special.ids.items()), list(special.added.items())) == (list(ids.items()), list(added.items()))
    save_tokenizer(tmp_path, {"added_tokens": ADDED, "post_processor": post}, settings)
    neighbour = gguf.SpecialVocab(tmp_path, n_vocab=10)
    assert (list(ids.items()), list(added.items())) == (
        list(neighbour.special_token_ids.items()),
        list(neighbour.add_special_token.items()),
    )


@pytest.mark.parametrize(
    ("post", "settings", "ids", "added"),
    [
        (BYTE_LEVEL, NAMED, EITHER, {"bos": False, "eos": False}),
        (BYTE_LEVEL, NAMED | {"add_bos_token": True}, EITHER, {"bos": False, "eos": False}),
        (template([item("<s>"), A]), NAMED | {"add_bos_token": False}, EITHER, {"bos": True}),
        (template([item("<s>"), A, item("</s>")]), {k: {"content": v} for k, v in NAMED.items()}, EITHER, {"bos": True, "eos": True}),
        (template([item("<cls>"), A]), NAMED, EITHER | {"cls": 5}, {"bos": True}),
        (template([item("<s>"), A]), {"eos_token": "</s>"}, EITHER, {"bos": True}),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template([item("<s>"), A])]}, NAMED, EITHER, {"bos": True, "eos": False}),
    ],
)  # fmt: skip
def test_ids_and_flags_where_llama_cpp_is_ahead_of_its_package(
    post: dict | None, settings: dict, ids: dict, added: dict
) -> None:
    """gguf 0.19 lets settings overrule a template, takes no account of ByteLevel, and compares objects with texts."""
    special = find(post, settings)
    assert (special.ids, list(special.added.items()), special.notes) == (ids, list(added.items()), [])


def test_config_json_fills_ids_that_are_missing() -> None:
    config = {"bos_token_id": 7, "eos_token_id": [2, 3], "pad_token_id": 6, "text_config": {"unk_token_id": 5}}
    assert find(None, {"bos_token": "<s>"}, config).ids == {"bos": 1, "pad": 6, "unk": 5}
    assert find(template([item("<s>"), A]), {}, config).ids == {"bos": 7, "pad": 6, "unk": 5}
    assert list(find(None, {"pad_token": "<s>"}, config).ids) == ["pad", "bos", "unk"], (
        "those of the tokenizer come first"
    )


def test_ids_out_of_range_are_left_out_with_a_note() -> None:
    special = find(None, {}, {"bos_token_id": 10, "pad_token_id": -1, "eos_token_id": True, "unk_token_id": "0"})
    assert special.ids == {}
    assert special.notes == [
        "bos_token_id 10 is not one of 10 tokens and is left out",
        "pad_token_id -1 is not one of 10 tokens and is left out",
    ]


def test_normalizers_that_change_letters_have_their_keys() -> None:
    steps = [{"type": "Lowercase"}, {"type": "NFC"}, {"type": "StripAccents"}]
    assert find(None, {}, normalizer={"type": "Sequence", "normalizers": steps}).normalizer == {
        "lowercase": True,
        "strip_accents": True,
    }
    bert = {"type": "BertNormalizer", "lowercase": False, "strip_accents": None}
    special = find(None, {}, normalizer=bert)
    writer = gguf.GGUFWriter(None, "llama")
    special.add_normalizer_keys(writer)
    assert writer.kv_data[0]["tokenizer.ggml.normalizer.lowercase"].value is False


def test_keys_have_ggufs_names_and_cls_has_none() -> None:
    special = Special(
        {name: i for i, name in enumerate(("bos", "eos", "unk", "sep", "pad", "cls", "mask", "eot", "eom"))}
    )
    special.added = {"bos": True, "eos": False, "sep": True, "cls": True}
    writer = gguf.GGUFWriter(None, "llama")
    special.add_keys(writer)
    assert [key.removeprefix("tokenizer.ggml.") for key in writer.kv_data[0]][1:] == [
        *(
            "bos_token_id",
            "eos_token_id",
            "unknown_token_id",
            "seperator_token_id",
            "padding_token_id",
            "mask_token_id",
        ),
        *("eot_token_id", "eom_token_id", "add_bos_token", "add_eos_token", "add_sep_token"),
    ]


def test_an_end_that_the_template_adds_is_added_by_llama_cpp(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["added_tokens"].append(content["added_tokens"][2] | {"id": 4096, "content": "<eot>"})
        content["post_processor"]["single"].append(item("<eot>"))
        content["post_processor"]["special_tokens"]["<eot>"] = {"id": "<eot>", "ids": [4096], "tokens": ["<eot>"]}

    directory = variant(tmp_path, change)
    special = vocabulary_file(directory, 4097, tmp_path / "v.gguf").special
    assert (special.ids["eos"], special.ids["eot"]) == (4096, 2)
    with Llama(tmp_path / "v.gguf", vocabulary_only=True) as model:
        assert differing(model, Tokenizer.from_file(str(directory / "tokenizer.json")), awkward_strings()) == []


def test_what_the_template_adds_beyond_llama_cpp_is_noted(tmp_path: Path) -> None:
    directory = variant(tmp_path, lambda content: content["post_processor"]["single"].insert(1, item("<s>")))
    (note,) = read_vocabulary(directory, 4096).notes
    assert note == (
        f"{directory / 'tokenizer.json'}: the post-processor makes [1, 1, 4003] of 'a', llama.cpp [1, 4003]"
    )


@pytest.mark.parametrize(
    ("size", "key", "value"),
    [(32016, "eot_token_id", 32010), (49152, "add_bos_token", False), (32017, "eot_token_id", None)],
)
def test_sizes_that_llama_cpps_converter_knows(size: int, key: str, value: object) -> None:
    """CodeLlama and Granite, by their number of tokens; for the llama architecture alone."""
    vocabulary = read_vocabulary(MERGE, size)
    assert keys_of(vocabulary).get(key) == value
    if key == "eot_token_id":
        assert key not in keys_of(vocabulary, "qwen2moe")
    else:
        assert keys_of(vocabulary, "qwen2moe")[key] is True
        assert list(keys_of(vocabulary)) == list(keys_of(vocabulary, "qwen2moe")), "the value changes in its place"


def merge_with(directory: Path, settings: dict, **files: str) -> Path:
    """The merge's tokenizer with other settings and further files; a double underscore in a name is a slash."""
    save_tokenizer(directory, json.loads((MERGE / "tokenizer.json").read_text()), SETTINGS | settings)
    for name, text in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory


def templates(directory: Path, asked: str | None = None) -> dict[str, object]:
    """The keys of the chat templates, in order, shortened."""
    keys = keys_of(read_vocabulary(directory, 4096, chat_template=asked))
    raw = {key.removeprefix("tokenizer."): value for key, value in keys.items()}
    return {key: value for key, value in raw.items() if key.startswith("chat_template")}


MORE = {"additional_chat_templates__b.jinja": "B", "additional_chat_templates__a-x.jinja": "A"}
BESIDE = {"chat_template.jinja": "J", "chat_template.json": '{"chat_template": "N"}'}
EVIL = "{{ ''.__class__.__mro__[1].__subclasses__() }}\n\x1b[2J"


@pytest.mark.parametrize(
    ("settings", "files", "expected"),
    [
        ({}, {}, {}),
        ({"chat_template": EVIL}, BESIDE, {"chat_template": EVIL}),
        ({}, BESIDE, {"chat_template": "J"}),
        ({}, {"chat_template.json": '{"chat_template": "N"}'}, {"chat_template": "N"}),
        (
            {},
            BESIDE | MORE,
            {"chat_template.a_x": "A", "chat_template.b": "B", "chat_templates": ["a_x", "b"], "chat_template": "J"},
        ),
        (
            {"chat_template": [{"name": n, "template": n.upper()} for n in ("tool use", "default", "rag")]},
            {},
            {
                "chat_template.tool_use": "TOOL USE",
                "chat_template.rag": "RAG",
                "chat_templates": ["rag", "tool_use"],
                "chat_template": "DEFAULT",
            },
        ),
    ],
)
def test_chat_templates_are_kept_as_they_are(settings: dict, files: dict, expected: dict, tmp_path: Path) -> None:
    found = templates(merge_with(tmp_path, settings, **files))
    assert list(found.items()) == list(expected.items())


def test_without_tokenizer_config_no_template_is_looked_for(tmp_path: Path) -> None:
    merge_with(tmp_path, {}, **BESIDE)
    (tmp_path / "tokenizer_config.json").unlink()
    assert templates(tmp_path) == {}


def test_a_users_template_replaces_all_and_none_leaves_all_out(tmp_path: Path) -> None:
    directory = merge_with(tmp_path / "m", {}, **BESIDE | MORE)
    (tmp_path / "mine.jinja").write_text("{{ messages }}\n", encoding="utf-8")
    assert templates(directory, str(tmp_path / "mine.jinja")) == {"chat_template": "{{ messages }}\n"}
    assert templates(directory, "none") == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "mine.jinja: no such file; --chat-template takes a file with a template, or none"),
        (b"", "mine.jinja: the chat template is empty; --chat-template none leaves templates out"),
        (b" \n", "mine.jinja: the chat template is empty; --chat-template none leaves templates out"),
        (
            b"\xff\xfe",
            "mine.jinja: a chat template has to be UTF-8: 'utf-8' codec can't decode byte 0xff in position 0",
        ),
    ],
)
def test_a_users_template_that_is_none_is_refused(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "mine.jinja").write_bytes(data)
    with pytest.raises(GgufMoeError) as caught:
        read_vocabulary(MERGE, 4096, chat_template=str(tmp_path / "mine.jinja"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "files", "message"),
    [
        ({"chat_template": 5}, {}, "chat_template is a JSON int, expected text or a list"),
        ({"chat_template": [{"name": "a"}]}, {}, "the entry \"{'name': 'a'}\", expected a name and a template as text"),
        (
            {"chat_template": [{"name": "a-b", "template": "1"}, {"name": "a_b", "template": "2"}]},
            {},
            "tokenizer_config.json: two chat templates with the name 'a_b', GGUF has room for one",
        ),
        ({}, {"chat_template.json": "["}, "chat_template.json: not readable as JSON"),
        ({}, {"chat_template.json": '{"chat_template": {}}'}, "chat_template.json: chat_template is a JSON dict"),
    ],
)
def test_odd_templates_are_refused(settings: dict, files: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(GgufMoeError) as caught:
        read_vocabulary(merge_with(tmp_path, settings, **files), 4096)
    assert message in str(caught.value)


def test_the_command_line_takes_template_and_pre(run, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(EVIL)
    asked = ("--chat-template", tmp_path / "mine.jinja")
    result = run("convert", MERGE, "--quant", "Q2_K", "-o", tmp_path / "a.gguf", *asked)
    assert result.exit_code == 0, result.output
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.chat_template"].contents() == EVIL
    shown = run("inspect", tmp_path / "a.gguf").output
    assert "\x1b" not in shown
    assert "{{ ''.__class__.__mro__[1].__subclasses__() }}\\n\\x1b[2J" in shown, "shown escaped, never rendered"
    wrong = run("convert", MERGE, "--quant", "Q2_K", "-o", tmp_path / "b.gguf", "--pre", "qwen2")
    assert (wrong.exit_code, "--pre qwen2" in wrong.output) == (2, True)
    assert not (tmp_path / "b.gguf").exists()
