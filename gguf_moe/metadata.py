"""What general.* says of a model: names, authors, licence, sources, from the model card, the directory and the user."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf

from gguf_moe.checkpoint import read_json
from gguf_moe.donors import in_expert_order
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_file import encode_header
from gguf_moe.mapping import MappedTensor
from gguf_moe.request import Request

MAX_CARD_VALUES = 1 << 17  # the longest cards, with their tables of results, have some thousand
_General = gguf.Keys.General
BASE_MODELS = "general.base_models"
# The keys of a --metadata file, as llama.cpp's converter takes them, by the JSON values they hold.
_TEXTS = (
    *(_General.NAME, _General.AUTHOR, _General.VERSION, _General.ORGANIZATION, _General.FINETUNE, _General.BASENAME),
    *(_General.DESCRIPTION, _General.QUANTIZED_BY, _General.SIZE_LABEL, _General.LICENSE_NAME, _General.LICENSE_LINK),
    *(_General.URL, _General.DOI, _General.UUID, _General.REPO_URL),
    *(_General.SOURCE_URL, _General.SOURCE_DOI, _General.SOURCE_UUID, _General.SOURCE_REPO_URL),
    _General.SAMPLING_SEQUENCE,
)
_INTEGERS = (_General.SAMPLING_TOP_K, _General.SAMPLING_PENALTY_LAST_N, _General.SAMPLING_MIROSTAT)
_NUMBERS = (
    *(_General.SAMPLING_TOP_P, _General.SAMPLING_MIN_P, _General.SAMPLING_TEMP, _General.SAMPLING_PENALTY_REPEAT),
    *(_General.SAMPLING_XTC_PROBABILITY, _General.SAMPLING_XTC_THRESHOLD),
    *(_General.SAMPLING_MIROSTAT_TAU, _General.SAMPLING_MIROSTAT_ETA),
)
_LISTS = {_General.TAGS: str, _General.LANGUAGES: str, BASE_MODELS: dict, "general.datasets": dict}
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(_TEXTS, ((str,), "text")),
    **dict.fromkeys(_INTEGERS, ((int,), "an integer")),
    **dict.fromkeys(_NUMBERS, ((int, float), "a number")),
    **{key: ((list,), f"a list of {'texts' if kind is str else 'objects of texts'}") for key, kind in _LISTS.items()},
}


def read_metadata(directory: Path, mapped: list[MappedTensor], request: Request) -> tuple[gguf.Metadata, list[str]]:
    """Metadata by the gguf package's heuristics on model card and directory name, then what the user asks; warnings.

    Raises GgufMoeError for a card or generation_config.json that cannot be read, UsageError for a wrong --metadata.
    """
    check_asked(request)
    asked = _read_override(request.metadata) if request.metadata else {}
    total = sum(tensor.elements for tensor in mapped)
    read_card(directory)
    try:
        metadata = gguf.Metadata.load(request.metadata, directory.resolve(), request.name, total)
    except Exception as error:  # a foreign YAML or JSON parser on a user's file: any error is the file's
        raise _unreadable(directory, error) from None
    warnings: list[str] = []
    if BASE_MODELS not in asked:
        metadata.base_models, warnings = in_expert_order(metadata.base_models, directory, total)
    if metadata.name is None:
        metadata.name = directory.resolve().name
    if request.size_label is not None:
        metadata.size_label = request.size_label
    elif metadata.size_label is None:
        metadata.size_label = computed_size_label(mapped)
    return metadata, warnings


def read_card(directory: Path) -> dict[str, Any]:
    """What the front matter of the directory's model card says, {} without one; GgufMoeError when it is unreadable."""
    try:
        card = gguf.Metadata.load_model_card(directory.resolve())
        check_unfolded(card)
    except Exception as error:  # as above
        raise _unreadable(directory, error) from None
    return card


def _unreadable(directory: Path, error: Exception) -> GgufMoeError:
    reason = " ".join(str(error).split())
    return GgufMoeError(f"{directory / 'README.md'}: model card or generation_config.json unreadable: {reason}")


def check_asked(request: Request) -> None:
    """Refuse an empty name or size label, or one that is no text."""
    for option, value in (("name", request.name), ("size-label", request.size_label)):
        if value is not None and not value.strip():
            raise UsageError(f"--{option} is empty")
        if value is not None and value != value.encode(errors="replace").decode():
            raise UsageError(f"--{option} {value}: not valid UTF-8")


def check_unfolded(card: Any) -> None:
    """ValueError for YAML whose aliases make much of little: what the package makes text of would never end."""
    count, waiting = 0, [card]
    while waiting:
        value = waiting.pop()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(parts)
        if count > MAX_CARD_VALUES:
            raise ValueError(f"more than {MAX_CARD_VALUES} values once aliases are unfolded")
        waiting += parts


def computed_size_label(mapped: list[MappedTensor]) -> str:
    """Experts x the size of one dense parent, as 4x7B, as llama.cpp's converter counts them."""
    total = sum(tensor.elements for tensor in mapped)
    stacks = [tensor for tensor in mapped if len(tensor.shape) == 3]
    expert = sum(tensor.elements // tensor.shape[0] for tensor in stacks)
    shared = total - sum(tensor.elements for tensor in stacks)
    experts = sum(tensor.shape[0] for tensor in stacks) // len(stacks) if stacks else 0
    return gguf.size_label(total, shared, expert, experts)


def _read_override(path: Path) -> dict[str, Any]:
    """The keys of a --metadata file, checked: llama.cpp's converter ignores a wrong name and a missing file."""
    try:
        content = read_json(path)
    except GgufMoeError as error:
        raise UsageError(f"--metadata {error}") from None
    for key, value in content.items():
        if key not in _KINDS:
            raise UsageError(f"--metadata {path}: unknown key {key!r}, expected one of {', '.join(_KINDS)}")
        kinds, wanted = _KINDS[key]
        fits = value is None or (isinstance(value, kinds) and not isinstance(value, bool))
        if fits and key in _LISTS and value is not None:
            fits = all(isinstance(element, _LISTS[key]) for element in value)
        if fits and key in (BASE_MODELS, "general.datasets"):
            fits = all(isinstance(text, str) for element in value or () for text in element.values())
        if not fits:
            raise UsageError(f"--metadata {path}: {key} is {value!r}, expected {wanted}")
    return content


def add_metadata(writer: gguf.GGUFWriter, metadata: gguf.Metadata, directory: Path) -> None:
    """Add what the model card says. YAML reads `version: 1.0` as a number; GGUF wants it as text."""
    try:
        metadata.set_gguf_meta_model(writer)
    except (TypeError, AttributeError, ValueError) as error:
        raise GgufMoeError(
            f"{directory / 'README.md'}: a field of the model card has an unexpected type: {error}"
        ) from None
    for key, item in writer.kv_data[0].items():
        if item.type == gguf.GGUFValueType.STRING and not isinstance(item.value, str):
            if isinstance(item.value, (dict, list)):
                raise GgufMoeError(f"{directory / 'README.md'}: {key} would be {item.value!r:.80}, expected text")
            item.value = str(item.value)
        elif item.type == gguf.GGUFValueType.ARRAY:
            item.value = [str(element) for element in item.value]
        try:
            encode_header({key: item}, [])
        except (OverflowError, struct.error, TypeError, ValueError) as error:
            source = f"{directory}: {key}, of README.md, generation_config.json or --metadata,"
            raise GgufMoeError(f"{source} is {item.value!r:.80}: {error}") from None
