"""Chat templates, as text from file to file: a template is a program from a stranger and never rendered here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf

from gguf_moe.checkpoint import read_json
from gguf_moe.errors import GgufMoeError

NONE = "none"  # what a user says to leave all templates out
DEFAULT = "default"


def read_chat_templates(directory: Path, settings: dict[str, Any], asked: str | None) -> dict[str, str]:
    """Templates by name, "default" being the one without a name.

    `asked` is a file that replaces them all, or "none". Otherwise the first of: tokenizer_config.json (`settings`),
    chat_template.jinja with additional_chat_templates/*.jinja, chat_template.json. Raises GgufMoeError for a template
    that is not text, or for names that GGUF cannot tell apart.
    """
    if asked == NONE:
        return {}
    if asked is not None:
        return {DEFAULT: _read_asked(Path(asked))}
    found, where = settings.get("chat_template"), directory / "tokenizer_config.json"
    if found is None and settings:  # without that file llama.cpp's converter does not look at the others
        jinja, other = directory / "chat_template.jinja", directory / "chat_template.json"
        if jinja.is_file():
            more = sorted(p for p in (directory / "additional_chat_templates").glob("*.jinja") if p.is_file())
            named = [(DEFAULT, jinja), *((path.stem, path) for path in more)]
            found, where = [{"name": name, "template": _read_text(path)} for name, path in named], jinja
        elif other.is_file():
            found, where = read_json(other).get("chat_template"), other
    if found is None:
        return {}
    return _by_name(where, [{"name": DEFAULT, "template": found}] if isinstance(found, str) else found)


def add_chat_templates(writer: gguf.GGUFWriter, templates: dict[str, str]) -> None:
    """Add the templates' keys. The list of names is sorted: llama.cpp's converter has it in the order of a hash set."""
    named = [name for name in templates if name != DEFAULT]
    for name in named:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), templates[name])
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, sorted(named))
    if DEFAULT in templates:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE, templates[DEFAULT])


def _by_name(where: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, list):
        raise GgufMoeError(f"{where}: chat_template is a JSON {type(found).__name__}, expected text or a list")
    templates: dict[str, str] = {}
    for entry in found:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name or not isinstance(text, str):
            raise GgufMoeError(
                f"{where}: chat_template has the entry {str(entry)[:80]!r}, expected a name and a template as text"
            )
        name = re.sub(r"[^0-9A-Za-z]", "_", name)
        if name in templates:
            raise GgufMoeError(f"{where}: two chat templates with the name {name!r}, GGUF has room for one")
        templates[name] = text
    return templates


def _read_asked(path: Path) -> str:
    if not path.is_file():
        raise GgufMoeError(f"{path}: no such file; --chat-template takes a file with a template, or {NONE}")
    text = _read_text(path)
    if not text.strip():
        raise GgufMoeError(f"{path}: the chat template is empty; --chat-template {NONE} leaves templates out")
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GgufMoeError(f"{path}: a chat template has to be UTF-8: {error}") from None
