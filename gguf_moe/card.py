"""README.md of an export: the model card that the Hugging Face Hub shows, written anew at every run.

What people write between the marks stays, and so do the keys of the front matter that are theirs. A README.md that
does not have the marks is somebody's own: it is left alone, and the card goes to a file beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import yaml

from gguf_moe import card_body as body
from gguf_moe.donors import expert_donors
from gguf_moe.errors import UsageError
from gguf_moe.gguf_file import write_whole
from gguf_moe.manifest import Level, Manifest
from gguf_moe.metadata import check_unfolded, read_card
from gguf_moe.naming import is_repo_id
from gguf_moe.plan import Plan

CARD, BESIDE = "README.md", "README.gguf-moe.md"
PLACES = ("top", "end")  # of the blocks for a person's own text
_MARK = re.compile(r"^<!-- yours, (top|end): (begin|end) -->[ \t]*(?:\r?\n|\Z)", re.MULTILINE)
_MARKS = [(place, side) for place in PLACES for side in ("begin", "end")]
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.MULTILINE | re.DOTALL)
_NOTE = (
    "<!-- Written by gguf-moe, anew at every export. Yours is what stands between the lines of `yours`, and each key "
    "of the front matter that gguf-moe does not set. -->"
)
_HUB_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/(.+?)/?")
_DONOR = re.compile(r"general\.base_model\.(\d{1,9})\.(?:name|repo_url)", re.ASCII)
_General = gguf.Keys.General


def write_card(
    directory: Path,
    plan: Plan,
    manifest: Manifest,
    *,
    quantized_by: str | None = None,
    repo: str | None = None,
    report: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the model card of the files that the manifest lists into `directory`; return what is to be said of it.

    plan: of any of the levels; they differ in no key that the card shows. repo: the id that the files will have on the
    Hub. report: what `validate --json` gives; its figures fill columns of the table of files.

    Raises UsageError for an impossible repo, GgufMoeError when the source's model card has become unreadable or the
    file cannot be written.
    """
    check_repo(repo)
    fields, warnings = _front_matter(plan, quantized_by)
    sections, more = _sections(plan, manifest, repo, report)
    warnings += more
    for name in (CARD, BESIDE):
        path = directory / name
        try:
            kept = _read_kept(path)
        except Exception as error:  # a foreign YAML parser on a person's file: any error is the file's
            reason = " ".join(str(error).split())
            warnings.append(f"{path}: not a whole card of gguf-moe's, so it stays as it is: {reason}")
            continue
        merged, changed = _with_kept(fields, kept.fields)
        write_whole(path, _assembled(merged, sections, kept).encode())
        warnings += [f"{path}: {change}" for change in changed]
        return warnings + ([f"{path}: holds the model card"] if name != CARD else [])
    return [*warnings, f"{directory}: no model card is written; move one of {CARD} and {BESIDE} away"]


def check_repo(repo: str | None) -> None:
    """Refuse what cannot be the id of a repository on the Hub."""
    if repo is not None and not is_repo_id(repo):
        raise UsageError(f"--repo {repo}: no id of a repository on the Hub, expected ORGANIZATION/NAME")


@dataclass(frozen=True)
class _Kept:
    """A person's part of an earlier card: keys of the front matter, text by place, and what stands behind the end."""

    fields: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(PLACES, ""))
    behind: str = ""
    newline: str = "\n"


def _read_kept(path: Path) -> _Kept:
    """ValueError, or the YAML parser's error, when the file is not a card whose marks and front matter are whole."""
    if not os.path.lexists(path):
        return _Kept()
    if not path.is_file():
        raise ValueError("is no regular file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    front = _FRONT_MATTER.match(text)
    fields = yaml.safe_load(front[1]) if front else None
    if front is None or not isinstance(fields, (dict, type(None))):
        raise ValueError("does not begin with keys and values between lines ---")
    check_unfolded(fields)
    marks = list(_MARK.finditer(text, front.end()))
    if [mark.groups() for mark in marks] != _MARKS:
        raise ValueError("does not have each of the four lines <!-- yours, ... --> once and in order")
    texts = {place: text[marks[2 * n].end() : marks[2 * n + 1].start()] for n, place in enumerate(PLACES)}
    newline = "\r\n" if "\r\n" in marks[0][0] else "\n"
    return _Kept(fields or {}, texts, text[marks[-1].end() :], newline)


def _with_kept(fields: dict[str, Any], kept: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our keys, then those that only the earlier card has. Lists are joined; a single value that was changed is ours
    again, which is said."""
    merged, changed = {**fields, **{key: value for key, value in kept.items() if key not in fields}}, []
    for key in fields.keys() & kept.keys():
        if isinstance(fields[key], list):
            theirs = kept[key] if isinstance(kept[key], list) else [kept[key]]
            merged[key] = fields[key] + [value for value in theirs if value not in fields[key]]
        elif fields[key] != kept[key]:
            changed.append(f"{key} was {kept[key]!r:.80} and is {fields[key]!r:.80} again, as the source has it")
    return merged, sorted(changed)


def _assembled(fields: dict[str, Any], sections: tuple[str, str], kept: _Kept) -> str:
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)
    heading, rest = sections
    parts = [f"---\n{front}---\n{_NOTE}\n\n{heading}\n\n<!-- yours, top: begin -->\n", kept.texts["top"]]
    parts += [f"<!-- yours, top: end -->\n\n{rest}\n\n<!-- yours, end: begin -->\n", kept.texts["end"]]
    parts += ["<!-- yours, end: end -->\n", kept.behind]
    return "".join(part if n % 2 else part.replace("\n", kept.newline) for n, part in enumerate(parts))


def _sections(
    plan: Plan, manifest: Manifest, repo: str | None, report: Mapping[str, Any] | None
) -> tuple[tuple[str, str], list[str]]:
    """The heading, and all below a person's own text at the top; and warnings."""
    values = {key: item.value for key, item in plan.keys.items()}
    stem = plan.default_name.removesuffix(".gguf").removesuffix(plan.file_type.name)
    levels = sorted((level for level in manifest.levels if _is_of(stem, level)), key=lambda level: level.size)
    others = [level.files[0].name for level in manifest.levels if not _is_of(stem, level)]
    title = str(values.get(_General.NAME) or stem.rstrip("-."))
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", stem).strip("-.") or "model"
    files, warnings = body.files_section(levels, report)
    warnings += [f"{CARD}: leaves out {name}, which is not named {stem}..., so of another model" for name in others]
    donors = expert_donors(plan.directory) if plan.directory.is_dir() else []
    experts = body.model_number(values, gguf.Keys.LLM.EXPERT_COUNT)
    if donors and len(donors) != experts:
        warnings.append(f"{plan.directory}: mergekit's configuration has {len(donors)} experts, the model {experts}")
        donors = []
    sections = [
        body.introduction(title, values),
        files,
        body.experts_section(donors) if donors else "",
        body.model_section(values, plan.elements),
        body.run_section(levels, repo, stem) if levels else "",
        body.making_section(manifest),
    ]
    return (f"# {body.escaped(title)} GGUF", "\n\n".join(part for part in sections if part)), warnings


def _is_of(stem: str, level: Level) -> bool:
    """Whether a level's files are named as this model's; of others in the folder the card knows nothing."""
    name = re.escape(stem + level.quant)
    return bool(re.fullmatch(rf"{name}(-\d{{5}}-of-\d{{5}})?\.gguf", level.files[0].name))


def _front_matter(plan: Plan, quantized_by: str | None) -> tuple[dict[str, Any], list[str]]:
    """The keys that the Hub reads; and warnings."""
    values = {key: item.value for key, item in plan.keys.items()}
    source = read_card(plan.directory) if plan.directory.is_dir() else {}
    bases, nameless = _base_models(values)
    pipeline = source.get("pipeline_tag")
    tags = ["gguf", *(tag for tag in _texts(values.get(_General.TAGS)) if tag != pipeline)]
    if body.model_number(values, gguf.Keys.LLM.EXPERT_COUNT):
        tags.append("moe")
    if plan.directory.is_dir() and expert_donors(plan.directory):
        tags += ["merge", "mergekit"]
    fields = {
        "base_model": bases,
        "base_model_relation": "quantized" if bases else None,
        "license": values.get(_General.LICENSE),
        "license_name": values.get(_General.LICENSE_NAME),
        "license_link": values.get(_General.LICENSE_LINK),
        "language": _texts(values.get(_General.LANGUAGES)),
        "library_name": "gguf",
        "pipeline_tag": pipeline,
        "tags": list(dict.fromkeys(tags)),
        "quantized_by": quantized_by or values.get(_General.QUANTIZED_BY),
    }
    shown = {key: body.one_line(value) if isinstance(value, str) else value for key, value in fields.items()}
    warnings = [f"{CARD}: base_model lacks {name}, which has no id on the Hub" for name in nameless]
    return {key: value for key, value in shown.items() if value and isinstance(value, (str, list))}, warnings


def _base_models(values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Ids on the Hub of the merge itself, where the keys have it, and of its donors in their order; and the names of
    donors that have none."""
    numbers = sorted({int(match[1]) for key in values if (match := _DONOR.fullmatch(key))})
    ids = [_repo_id(values.get(key)) for key in (_General.SOURCE_REPO_URL, _General.REPO_URL)]
    nameless = []
    for number in numbers:
        ids.append(_repo_id(values.get(_General.BASE_MODEL_REPO_URL.format(id=number))))
        if ids[-1] is None:
            name = values.get(_General.BASE_MODEL_NAME.format(id=number))
            nameless.append(body.one_line(name) if isinstance(name, str) else f"number {number}")
    return list(dict.fromkeys(name for name in ids if name)), nameless


def _repo_id(url: Any) -> str | None:
    match = _HUB_URL.fullmatch(url) if isinstance(url, str) else None
    return match[1] if match and is_repo_id(match[1]) else None


def _texts(values: Any) -> list[str]:
    """The texts of a key that may be an array of a GGUF file, or no array at all."""
    listed = [] if values is None or isinstance(values, (str, bytes, int, float)) else list(values)
    return [body.one_line(value) for value in listed if isinstance(value, str)]
