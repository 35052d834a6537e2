"""The output before it exists: every key, every tensor's type, bytes and offset, from headers alone."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf

from gguf_moe import mapping
from gguf_moe.arch import Architecture, ModelFacts, find_architecture
from gguf_moe.checkpoint import Checkpoint
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import TensorInfo, encode_header, padded
from gguf_moe.recipe import Choice, FileType, RecipeFacts, choose_type
from gguf_moe.request import Request
from gguf_moe.tokenizer import Vocabulary, read_vocabulary
from quant import FORMATS

MAX_NAME = 200  # characters of a default file name


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output: where its rows come from, what it becomes, where its bytes go."""

    mapped: mapping.MappedTensor = field(repr=False)
    choice: Choice
    info: TensorInfo


@dataclass(frozen=True)
class Plan:
    """Everything about one output file. Made without reading a weight."""

    directory: Path
    file_type: FileType
    keys: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorPlan, ...] = field(repr=False)
    header: bytes = field(repr=False)
    default_name: str
    warnings: tuple[str, ...]

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of all tensors without padding."""
        return sum(t.info.nbytes for t in self.tensors)

    @cached_property
    def elements(self) -> int:
        """Weights of the model."""
        return sum(t.mapped.elements for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Effective: all tensor data over all weights."""
        return 8 * self.data_bytes / self.elements

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(padded(t.info.nbytes) for t in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors of each type, the commonest first."""
        return dict(Counter(t.info.type for t in self.tensors).most_common())


def make_plan(checkpoint: Checkpoint, file_type: FileType, request: Request | None = None) -> Plan:
    """Plan the conversion of a checkpoint to one file type.

    Raises GgufMoeError for anything about the checkpoint that would not give a working file.
    """
    request = request or Request()
    architecture = find_architecture(checkpoint.config)
    facts = architecture.facts(checkpoint.config, request.experts_used)
    mapped = mapping.map_tensors(checkpoint, architecture, facts)
    vocabulary = read_vocabulary(checkpoint.directory, facts.vocabulary)
    if file_type.quantized:
        mapped.sort(key=_quantizer_order)
    tensors = _place(mapped, file_type, architecture, facts)
    metadata = _read_metadata(checkpoint.directory, mapped)
    try:
        keys = _keys(architecture, facts, vocabulary, metadata, file_type)
        header = encode_header(keys, [t.info for t in tensors])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise GgufMoeError(
            f"{checkpoint.directory}: the tokenizer's files or the model card hold what GGUF cannot: {error!r}"
        ) from None
    general = gguf.Keys.General
    parts = (general.NAME, general.BASENAME, general.FINETUNE, general.VERSION, general.SIZE_LABEL)
    name = gguf.naming_convention(*(keys[key].value if key in keys else None for key in parts), file_type.name)
    name = re.sub(r"[^\w.+-]+", "-", name)[:MAX_NAME]  # from a model card, so anything
    return Plan(
        checkpoint.directory,
        file_type,
        keys,
        tensors,
        header,
        f"{name}.gguf",
        (*facts.notes, *vocabulary.notes, *_fallback_warning(tensors)),
    )


def _quantizer_order(tensor: mapping.MappedTensor) -> tuple[int, bytes]:
    """llama.cpp's quantizer writes what belongs to no layer first, then layer by layer, each by name."""
    return (-1 if tensor.layer is None else tensor.layer, tensor.name.encode())


def _place(
    mapped: list[mapping.MappedTensor], file_type: FileType, architecture: Architecture, facts: ModelFacts
) -> tuple[TensorPlan, ...]:
    tied = not any(tensor.role == "output" for tensor in mapped)
    recipe_facts = RecipeFacts(facts.layers, facts.experts, facts.heads, facts.kv_heads, tied, architecture.name)
    tensors = []
    offset = 0
    seen: Counter[str] = Counter()  # by role, as the quantizer counts
    for tensor in mapped:
        columns = tensor.shape[-1]
        by_layer = tensor.role == "ffn_down" and facts.experts > 1
        index = tensor.layer if by_layer and tensor.layer is not None else seen[tensor.role]
        choice = choose_type(file_type, tensor.role, index, columns, recipe_facts)
        seen[tensor.role] += 1
        nbytes = tensor.elements // columns * FORMATS[choice.type].row_bytes(columns)
        shape = _without_ones(tensor.shape) if file_type.quantized else tensor.shape
        tensors.append(TensorPlan(tensor, choice, TensorInfo(tensor.name, choice.type, shape, nbytes, offset)))
        offset += padded(nbytes)
    return tuple(tensors)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp's quantizer, unlike its converter, drops what GGUF has as trailing dimensions of 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _read_metadata(directory: Path, mapped: list[mapping.MappedTensor]) -> gguf.Metadata:
    """Names, authors, licence and sources, by the gguf package's heuristics on the model card and directory name."""
    total = sum(tensor.elements for tensor in mapped)
    try:
        metadata = gguf.Metadata.load(None, directory.resolve(), None, total)
    except Exception as error:  # a foreign YAML or JSON parser on a user's file: any error is the file's
        reason = " ".join(str(error).split())
        raise GgufMoeError(
            f"{directory / 'README.md'}: model card or generation_config.json unreadable: {reason}"
        ) from None
    if metadata.name is None:
        metadata.name = directory.resolve().name
    if metadata.size_label is None:
        stacks = [tensor for tensor in mapped if len(tensor.shape) == 3]
        expert = sum(tensor.elements // tensor.shape[0] for tensor in stacks)
        shared = total - sum(tensor.elements for tensor in stacks)
        experts = sum(tensor.shape[0] for tensor in stacks) // len(stacks) if stacks else 0
        metadata.size_label = gguf.size_label(total, shared, expert, experts)
    return metadata


def _keys(
    architecture: Architecture,
    facts: ModelFacts,
    vocabulary: Vocabulary,
    metadata: gguf.Metadata,
    file_type: FileType,
) -> dict[str, Any]:
    """All keys in the order of llama.cpp's converter, or of its quantizer, which sets two of them anew at the end."""
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    _add_metadata(writer, metadata)
    architecture.add_keys(writer, facts)
    if not file_type.quantized:
        writer.add_file_type(file_type.id)
    architecture.add_last_keys(writer, facts)
    if not file_type.quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.add_keys(writer)
    if file_type.quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(file_type.id)
    return dict(writer.kv_data[0])


def _add_metadata(writer: gguf.GGUFWriter, metadata: gguf.Metadata) -> None:
    """Add what the model card says. YAML reads `version: 1.0` as a number; GGUF wants it as text."""
    try:
        metadata.set_gguf_meta_model(writer)
    except (TypeError, AttributeError, ValueError) as error:
        raise GgufMoeError(f"README.md: a field of the model card has an unexpected type: {error}") from None
    for key, item in writer.kv_data[0].items():
        if item.type == gguf.GGUFValueType.STRING and not isinstance(item.value, str):
            if isinstance(item.value, (dict, list)):
                raise GgufMoeError(f"README.md: {key} would be {item.value!r}, expected text")
            item.value = str(item.value)
        elif item.type == gguf.GGUFValueType.ARRAY:
            item.value = [str(element) for element in item.value]
        try:
            encode_header({key: item}, [])
        except (struct.error, TypeError, ValueError) as error:
            raise GgufMoeError(f"generation_config.json or README.md: {key} is {item.value!r}: {error}") from None


def _fallback_warning(tensors: tuple[TensorPlan, ...]) -> list[str]:
    """One line on all tensors whose rows the wanted type's block does not divide."""
    fallen = [t for t in tensors if t.choice.fell_back]
    if not fallen:
        return []
    elements = sum(t.mapped.elements for t in tensors)
    nominal = sum(t.mapped.elements * FORMATS[t.choice.wanted].bits_per_weight for t in tensors) / elements
    effective = 8 * sum(t.info.nbytes for t in tensors) / elements
    changes = Counter(f"{t.choice.wanted} to {t.choice.type}" for t in fallen)
    listed = ", ".join(f"{change} ({count})" for change, count in changes.items())
    widths = ", ".join(str(w) for w in sorted({t.mapped.shape[-1] for t in fallen}))
    return [
        f"{len(fallen)} tensors have rows of {widths} weights, which their type's block does not divide, and fall "
        f"back as in llama.cpp: {listed}; {effective:.2f} instead of {nominal:.2f} bits per weight"
    ]
