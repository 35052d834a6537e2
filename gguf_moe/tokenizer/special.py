"""Special tokens: their ids, and which of them are added to a text.

As llama.cpp's converter (build 11434) finds them: texts from tokenizer_config.json and the post-processor of
tokenizer.json give ids through the added tokens, config.json's ids fill what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gguf

TYPES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
NORMALIZER_KEYS = {name: f"tokenizer.ggml.normalizer.{name}" for name in ("lowercase", "strip_accents")}


@dataclass
class Special:
    """Special tokens in the order of their keys."""

    ids: dict[str, int] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)  # whether a text gets that token; unset: llama.cpp's default
    normalizer: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_keys(self, writer: gguf.GGUFWriter) -> None:
        """Add ids and flags to `writer`; GGUF has no key for some of them (as cls)."""
        for name, value in self.ids.items():
            if add := getattr(writer, f"add_{name}_token_id", None):
                add(value)
        for name, flag in self.added.items():
            if add := getattr(writer, f"add_add_{name}_token", None):
                add(flag)

    def add_normalizer_keys(self, writer: gguf.GGUFWriter) -> None:
        """Add what the normalizer does to letters."""
        for name, flag in self.normalizer.items():
            writer.add_bool(NORMALIZER_KEYS[name], flag)


def find_special(
    tokenizer: dict[str, Any], settings: dict[str, Any], config: dict[str, Any], size: int, settings_add: bool
) -> Special:
    """The special tokens of tokenizer.json, tokenizer_config.json (`settings`) and config.json, each {} if absent.

    `size` bounds the ids. `settings_add` tells whether `add_bos_token` and its like mean what they say: beside a
    tokenizer.json they do not, its post-processor alone adds tokens.
    """
    special = Special(normalizer=_normalizer_flags(tokenizer.get("normalizer")))
    names = {name: text_of(settings.get(f"{name}_token")) for name in TYPES}
    if tokenizer:
        names["bos"] = names["bos"] or names["cls"]
        names["eos"] = names["eos"] or names["sep"]
        post = tokenizer.get("post_processor") or {}
        for processor in post.get("processors", [post]):
            kind = processor.get("type")
            if kind == "ByteLevel":
                special.added.setdefault("bos", False)
                special.added.setdefault("eos", False)
            elif kind == "RobertaProcessing":
                special.added |= {"bos": True, "eos": True, "sep": True}
                for name, like in (("cls", "bos"), ("sep", "eos")):
                    names[name] = names[name] or processor.get(name, [names[like]])[0]
            elif kind == "TemplateProcessing":
                _follow_template(processor, names, special.added, bool(settings))
    added: dict[str, Any] = {}
    for entry in tokenizer.get("added_tokens") or []:
        added.setdefault(entry["content"], entry["id"])
    if settings:
        for name, text in names.items():
            if isinstance(flag := settings.get(f"add_{name}_token"), bool):
                special.added.setdefault(name, flag and settings_add)
            if text in added:
                _set_id(special, name, added[text], size)
    inner = config.get("text_config") or {}
    for name in names:
        key = f"{name}_token_id"
        _set_id(special, name, config[key] if config.get(key) is not None else inner.get(key), size)
    return special


def text_of(entry: Any) -> str | None:
    """The text of a `..._token` of tokenizer_config.json, which is a string or an added token as an object."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _set_id(special: Special, name: str, value: Any, size: int) -> None:
    """An id once set stays. Lists (as several eos) are no id; out of range is what llama.cpp ignores at loading."""
    if not isinstance(value, int) or isinstance(value, bool) or name in special.ids:
        return
    if 0 <= value < size:
        special.ids[name] = value
    else:
        special.notes.append(f"{name}_token_id {value} is not one of {size} tokens and is left out")


def _follow_template(
    processor: dict[str, Any], names: dict[str, str | None], added: dict[str, bool], known: bool
) -> None:
    """What a TemplateProcessing tells of bos, eos and sep. `known`: there is a tokenizer_config.json."""
    single, first, last = processor.get("single") or [], None, None
    if len(single) > 1:
        if first := _special_name(single[0]):
            if not known:
                names["bos"] = first
            elif first not in (names["bos"], names["cls"]):
                unset = next((name for name in ("bos", "cls") if not names[name]), None)
                if unset:
                    names[unset] = first
            added["bos"] = first in (names["bos"], names["cls"])
        if last := _special_name(single[-1]):
            if known and last != names["eos"]:  # the former end of text becomes an end of turn
                further = next((name for name in ("eot", "eom") if name not in names), None)
                if further:
                    names[further] = names["eos"]
            names["eos"] = last
            added["eos"] = True
    pair = list(processor.get("pair") or [])
    if pair and first and _special_name(pair[0]) == first:
        pair = pair[1:]
    if pair and last and _special_name(pair[-1]) == last:
        pair = pair[:-1]
    ends = [item.get("Sequence", {}).get("id") for item in (pair[:1] + pair[-1:])]
    if ends == ["A", "B"] and len(pair) > 2:
        middle = [_special_name(item) for item in pair[1:-1]]
        known_ends = [text for text in (names["sep"], names["eos"]) if text]
        added["sep"] = (middle[0] in known_ends and not last) or (len(middle) == 2 and middle[1] in known_ends)
        if added["sep"]:
            names["sep"] = names["sep"] or names["eos"]


def _special_name(item: dict[str, Any]) -> str | None:
    return item.get("SpecialToken", {}).get("id")


def _normalizer_flags(step: dict[str, Any] | None) -> dict[str, bool]:
    kind = (step or {}).get("type")
    if kind == "Sequence":
        flags: dict[str, bool] = {}
        for part in step["normalizers"]:
            flags |= _normalizer_flags(part)
        return flags
    if kind == "BertNormalizer":
        return {name: step[name] for name in NORMALIZER_KEYS if isinstance(step.get(name), bool)}
    return {"lowercase": True} if kind == "Lowercase" else {"strip_accents": True} if kind == "StripAccents" else {}
