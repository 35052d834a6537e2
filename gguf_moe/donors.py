"""Which models were merged, in the order of the experts, as mergekit's own configuration beside the weights tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import yaml

MOE_CONFIG, MERGE_CONFIG = "mergekit_moe_config.yml", "mergekit_config.yml"
MAX_BYTES = 1 << 18  # a hundred times what people write; the parser takes seconds for a megabyte
_NOT_UNDERSTOOD = (OSError, ValueError, RecursionError, yaml.YAMLError)


def in_expert_order(card: list[dict] | None, directory: Path, total: int) -> tuple[list[dict] | None, list[str]]:
    """The base models that the card lists, put into the order of the experts; and warnings.

    Each donor stands once, where its first expert is; what the card says of it is kept. What else the card lists
    follows in the card's order. Where the card lists none, mergekit's base model, which gave everything but the
    experts, comes last. Without a configuration of mergekit's the card stays as it is.
    """
    path = _config_path(directory)
    if path is None:
        return card, []
    try:
        config = _read_config(path)
        donors = list(dict.fromkeys(_merged(config)))
        base = _model_id(config.get("base_model"))
    except _NOT_UNDERSTOOD as error:
        reason = " ".join(str(error).split())
        return card, [f"{path}: not understood, so general.base_model keeps the model card's order: {reason}"]
    if base and not card and base not in donors:
        donors.append(base)
    ordered, rest = [], list(card or [])
    for entry in _entries(donors, total):
        same = next((other for other in rest if _same(entry, other)), {})
        if same:
            rest.remove(same)
        ordered.append({**entry, **same})
    return [*ordered, *rest] or card, []


@dataclass(frozen=True)
class Donor:
    """Where an expert comes from. prompts: how many examples of its use the configuration has, where it has any."""

    name: str  # org/name, or a name alone
    prompts: int | None


def expert_donors(directory: Path) -> list[Donor]:
    """The donor of each expert, in their order; none where mergekit's configuration does not name them all.

    What is not understood of a configuration is none here: `in_expert_order` has warned of it.
    """
    path = _config_path(directory)
    try:
        experts = _read_config(path).get("experts") if path else None
    except _NOT_UNDERSTOOD:
        return []
    donors = []
    for item in _mappings(experts):
        prompts = item.get("positive_prompts")
        if name := _model_id(item.get("source_model")):
            donors.append(Donor(name, len(prompts) if isinstance(prompts, list) else None))
    return donors if isinstance(experts, list) and len(donors) == len(experts) else []


def _config_path(directory: Path) -> Path | None:
    return next((directory / n for n in (MOE_CONFIG, MERGE_CONFIG) if (directory / n).is_file()), None)


def _read_config(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size} bytes are too many")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"holds a {type(config).__name__}, expected a mapping")
    return config


def _merged(config: dict[str, Any]) -> Iterator[str]:
    """Ids of the merged models in the configuration's order: experts, or models, or sources of slices."""
    for section, key in (("experts", "source_model"), ("shared_experts", "source_model"), ("models", "model")):
        yield from _ids(config.get(section), key)
    for part in _mappings(config.get("slices")):
        yield from _ids(part.get("sources"), "model")


def _ids(section: Any, key: str) -> Iterator[str]:
    for item in _mappings(section):
        if name := _model_id(item.get(key)):
            yield name


def _mappings(section: Any) -> list[dict]:
    return [item for item in section if isinstance(item, dict)] if isinstance(section, list) else []


def _model_id(reference: Any) -> str | None:
    """org/name of a reference of mergekit's: no revision, no LoRA. Of a path on the merger's disk the last part only,
    since the rest is nobody else's business."""
    if isinstance(reference, dict):
        return _model_id(reference.get("model", reference.get("path")))
    if not isinstance(reference, str):
        return None
    name = reference.split("+")[0].split("@")[0].strip().replace("\\", "/").rstrip("/")
    if name.count("/") > 1 or name.startswith(("/", ".", "~")) or ":" in name:
        name = name.rpartition("/")[2]
    return name or None


def _entries(names: list[str], total: int) -> list[dict]:
    """What the gguf package makes of these ids in a model card."""
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {"base_model": names}, None, None, total)
    return metadata.base_models or []


def _same(donor: dict, other: Any) -> bool:
    """Whether two entries are of one model: the same repository, or the same names where one has no repository."""
    if not isinstance(other, dict):
        return False

    def text(entry: dict, key: str) -> str:
        return str(entry.get(key) or "").lower()

    if text(donor, "repo_url") and text(other, "repo_url"):
        return text(donor, "repo_url") == text(other, "repo_url").rstrip("/")
    return all(text(donor, key) == text(other, key) for key in ("name", "organization"))
