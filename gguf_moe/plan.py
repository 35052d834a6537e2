"""The output before it exists: every key, every tensor's type, bytes and offset, from headers alone."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Sequence
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
from gguf_moe.metadata import add_metadata, read_metadata
from gguf_moe.naming import default_file_name
from gguf_moe.overrides import apply_overrides
from gguf_moe.recipe import Choice, FileType, RecipeFacts
from gguf_moe.request import Request
from gguf_moe.rules import Chooser
from gguf_moe.tokenizer import Vocabulary, read_vocabulary
from quant import FORMATS


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
    overridden: tuple[str, ...] = ()  # keys that the user set

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
    facts = architecture.facts(checkpoint.config)
    mapped = mapping.map_tensors(checkpoint, architecture, facts)
    vocabulary = read_vocabulary(
        checkpoint.directory, facts.vocabulary, pre=request.pre, chat_template=request.chat_template
    )
    by_quantizer = file_type.quantized or request.rules.retype or bool(request.override_kv)
    if by_quantizer:
        mapped.sort(key=_quantizer_order)
    tensors, rule_warnings = _place(mapped, file_type, facts, request)
    metadata, metadata_warnings = read_metadata(checkpoint.directory, mapped, request)
    try:
        keys = _keys(architecture, facts, vocabulary, metadata, file_type, by_quantizer)
        keys, key_warnings = apply_overrides(keys, request.override_kv, architecture.name, facts.vocabulary)
        header = encode_header(keys, [t.info for t in tensors])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise GgufMoeError(
            f"{checkpoint.directory}: the tokenizer's files or the model card hold what GGUF cannot: {error!r}"
        ) from None
    return Plan(
        checkpoint.directory,
        file_type,
        keys,
        tensors,
        header,
        _default_name(keys, mapped, request, file_type),
        (*vocabulary.notes, *metadata_warnings, *key_warnings, *rule_warnings),
        tuple(text.partition("=")[0] for text in request.override_kv),
    )


def _default_name(
    keys: dict[str, Any], mapped: list[mapping.MappedTensor], request: Request, file_type: FileType
) -> str:
    """By the naming convention; a name that the user gave is taken apart as a directory's is."""
    general = gguf.Keys.General
    parts = (general.NAME, general.BASENAME, general.FINETUNE, general.VERSION, general.SIZE_LABEL)
    name, base, finetune, version, size = (keys[key].value if key in keys else None for key in parts)
    if request.name:
        given = re.sub(r"[\s/]+", "-", request.name.strip())
        total = sum(tensor.elements for tensor in mapped)
        name, _, base, finetune, version, own = gguf.Metadata.get_model_id_components(given, total)
        size = size if request.size_label else own or size
    return default_file_name(name, base, finetune, version, size, file_type.name)


def _quantizer_order(tensor: mapping.MappedTensor) -> tuple[int, bytes]:
    """llama.cpp's quantizer writes what belongs to no layer first, then layer by layer, each by name."""
    return (-1 if tensor.layer is None else tensor.layer, tensor.name.encode())


def _place(
    mapped: list[mapping.MappedTensor], file_type: FileType, facts: ModelFacts, request: Request
) -> tuple[tuple[TensorPlan, ...], list[str]]:
    """Type, bytes and offset of every tensor; and what is to be said of the rules that chose the types."""
    tied = not any(tensor.role == "output" for tensor in mapped)
    recipe_facts = RecipeFacts(facts.layers, facts.experts, facts.heads, facts.kv_heads, tied)
    chooser = Chooser(file_type, recipe_facts, request.rules)
    tensors = []
    offset = 0
    for tensor in mapped:
        columns = tensor.shape[-1]
        choice = chooser.choose(tensor.name, tensor.role, tensor.layer, columns, tensor.slabs[0].source.dtype)
        nbytes = tensor.elements // columns * FORMATS[choice.type].row_bytes(columns)
        tensors.append(TensorPlan(tensor, choice, TensorInfo(tensor.name, choice.type, tensor.shape, nbytes, offset)))
        offset += padded(nbytes)
    warnings = chooser.check()
    if request.strict:
        _refuse_fallbacks(tensors)
    return tuple(tensors), warnings + _fallback_warning(tensors)


def _refuse_fallbacks(tensors: Sequence[TensorPlan]) -> None:
    fallen = [t for t in tensors if t.choice.fell_back]
    if fallen:
        first, more = fallen[0], f" (and {len(fallen) - 1} more)" if len(fallen) > 1 else ""
        wanted, block = first.choice.wanted, FORMATS[first.choice.wanted].block_length
        raise GgufMoeError(
            f"--strict: {first.info.name}{more} has rows of {first.info.shape[-1]} weights, which {wanted}'s block of "
            f"{block} does not divide; it would fall back to {first.choice.type}"
        )


def _keys(
    architecture: Architecture,
    facts: ModelFacts,
    vocabulary: Vocabulary,
    metadata: gguf.Metadata,
    file_type: FileType,
    by_quantizer: bool,
) -> dict[str, Any]:
    """All keys in the order of llama.cpp's converter, or of its quantizer, which sets two of them anew at the end."""
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    add_metadata(writer, metadata)
    architecture.add_keys(writer, facts)
    if not by_quantizer:
        writer.add_file_type(file_type.id)
    writer.add_vocab_size(facts.vocabulary)
    writer.add_rope_dimension_count(facts.head_size)
    if not by_quantizer:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.add_keys(writer)
    if by_quantizer:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(file_type.id)
    return dict(writer.kv_data[0])


def _fallback_warning(tensors: Sequence[TensorPlan]) -> list[str]:
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
