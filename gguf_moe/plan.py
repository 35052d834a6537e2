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
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_file import TensorInfo, encode_header, padded
from gguf_moe.gguf_keys import ModelKeys, check_vocabulary, converted_keys, cut_at_nul, expert_count, recipe_facts
from gguf_moe.gguf_reader import TENSOR_TYPES
from gguf_moe.gguf_source import GgufModel, map_gguf
from gguf_moe.recipe import KEPT, Choice, FileType, RecipeFacts, choose_type, quantizer_order
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

    directory: Path  # of the checkpoint, or the GGUF file
    file_type: FileType
    keys: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorPlan, ...] = field(repr=False)
    header: bytes = field(repr=False)
    default_name: str
    warnings: tuple[str, ...]
    inputs: tuple[Path, ...] = ()  # GGUF files that are read, so never to be written to

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


def make_plan(
    source: Checkpoint | GgufModel, file_type: FileType | None = None, request: Request | None = None
) -> Plan:
    """Plan the conversion of a checkpoint, or of a GGUF file, to one file type. Without one, the tensors of a GGUF file
    keep their types.

    Raises GgufMoeError for anything about the source that would not give a working file.
    """
    request = request or Request()
    if isinstance(source, GgufModel):
        return _plan_from_gguf(source, file_type or source.kept_file_type, request)
    if file_type is None:
        raise UsageError(f"{source.directory}: a checkpoint needs a file type: give --bits or --quant")
    return _plan_from_checkpoint(source, file_type, request)


def _plan_from_checkpoint(checkpoint: Checkpoint, file_type: FileType, request: Request) -> Plan:
    architecture = find_architecture(checkpoint.config)
    facts = architecture.facts(checkpoint.config)
    mapped = mapping.map_tensors(checkpoint, architecture, facts)
    vocabulary = read_vocabulary(checkpoint.directory, facts.vocabulary)
    if file_type.quantized:
        mapped.sort(key=_quantizer_order)
    tied = not any(tensor.role == "output" for tensor in mapped)
    tensors = _place(mapped, file_type, RecipeFacts(facts.layers, facts.experts, facts.heads, facts.kv_heads, tied))
    metadata = _read_metadata(checkpoint.directory, mapped)
    try:
        keys = _keys(architecture, facts, vocabulary, metadata, file_type)
        if file_type.quantized:
            keys = {key: cut_at_nul(value) for key, value in keys.items()}
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
        _default_name(keys, file_type, None),
        (*vocabulary.notes, *_fallback_warning(tensors)),
    )


def _plan_from_gguf(model: GgufModel, file_type: FileType, request: Request) -> Plan:
    for option, asked in (("--pre", request.pre), ("--chat-template", request.chat_template)):
        if asked is not None:
            raise UsageError(f"{option} is for checkpoints; --override-kv sets the keys of a GGUF file")
    keys = converted_keys(model.keys, file_type)
    model_keys = ModelKeys(model.path, keys)
    experts = expert_count(model_keys)
    mapped = map_gguf(model, experts)
    facts = recipe_facts(model_keys, mapped, experts)
    check_vocabulary(model_keys, mapped)
    if facts.architecture == "falcon" and file_type.quantized and file_type.default != KEPT:
        raise GgufMoeError(f"{model.path}: llama.cpp has types of its own for falcon, which gguf-moe does not know")
    if file_type.quantized:
        mapped.sort(key=_quantizer_order)
    tensors = _place(mapped, file_type, facts)
    _check_decoding(tensors, request)
    return Plan(
        model.path,
        file_type,
        keys,
        tensors,
        encode_header(keys, [t.info for t in tensors]),
        _default_name(keys, file_type, model.stem),
        tuple(_fallback_warning(tensors)),
        tuple(file.path for file in model.files),
    )


def _default_name(keys: dict[str, Any], file_type: FileType, stem: str | None) -> str:
    """The file name by the GGUF naming convention; `stem` where the keys hold no name."""
    general = gguf.Keys.General
    parts = (general.NAME, general.BASENAME, general.FINETUNE, general.VERSION, general.SIZE_LABEL)
    texts = [keys[key].value if key in keys and isinstance(keys[key].value, str) else None for key in parts]
    texts[0] = texts[0] or stem
    name = gguf.naming_convention(*texts, file_type.name)
    return re.sub(r"[^\w.+-]+", "-", name)[:MAX_NAME] + ".gguf"  # from a model card or a file, so anything


def _quantizer_order(tensor: mapping.MappedTensor) -> tuple[int, bytes]:
    return quantizer_order(tensor.name)


def _place(mapped: list[mapping.MappedTensor], file_type: FileType, facts: RecipeFacts) -> tuple[TensorPlan, ...]:
    """Type and offset of each tensor."""
    tensors = []
    offset = 0
    visited: Counter[str] = Counter()
    for tensor in mapped:
        columns, shape = tensor.shape[-1], tensor.shape
        # llama.cpp counts the tensors of a role as it goes, but takes the layer from the names of experts
        by_name = facts.experts > 1 and tensor.role.startswith("ffn") and tensor.layer is not None
        index = tensor.layer if by_name else visited[tensor.role]
        visited[tensor.role] += 1
        if KEPT in (file_type.default, tensor.role):
            kept = _only_type(tensor)
            choice = Choice(kept, kept)
        else:
            choice = choose_type(file_type, tensor.role, index, columns, facts)
        while file_type.quantized and len(shape) > 1 and shape[0] == 1:  # the quantizer writes no outer 1s
            shape = shape[1:]
        nbytes = tensor.elements // columns * TENSOR_TYPES[choice.type].row_bytes(columns)
        tensors.append(TensorPlan(tensor, choice, TensorInfo(tensor.name, choice.type, shape, nbytes, offset)))
        offset += padded(nbytes)
    return tuple(tensors)


def _only_type(tensor: mapping.MappedTensor) -> str:
    """The type of all sources of a tensor that is to keep it."""
    types = sorted({slab.source.type for slab in tensor.slabs})
    if len(types) > 1:
        raise GgufMoeError(
            f"{tensor.slabs[0].source.file}: the experts of {tensor.name} are {' and '.join(types)}; give --bits or "
            "--quant to make them one type"
        )
    return types[0]


def _check_decoding(tensors: tuple[TensorPlan, ...], request: Request) -> None:
    """Refuse to decode what is in blocks already, unless asked for, and what cannot be decoded."""
    for tensor in tensors:
        for source in (slab.source for slab in tensor.mapped.slabs):
            if source.stored in (None, tensor.info.type):
                continue
            where = f"{source.file}: tensor {source.name} is {source.stored}"
            if source.stored not in FORMATS:
                raise GgufMoeError(f"{where}, which gguf-moe cannot decode to {tensor.info.type}; convert the original")
            if not request.allow_requantize:
                raise GgufMoeError(
                    f"{where}, so quantized already; as {tensor.info.type} it would be worse than from the original: "
                    "convert that, or give --allow-requantize"
                )


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
    writer.add_vocab_size(facts.vocabulary)
    writer.add_rope_dimension_count(facts.head_size)
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
    nominal = sum(t.mapped.elements * TENSOR_TYPES[t.choice.wanted].bits_per_weight for t in tensors) / elements
    effective = 8 * sum(t.info.nbytes for t in tensors) / elements
    changes = Counter(f"{t.choice.wanted} to {t.choice.type}" for t in fallen)
    listed = ", ".join(f"{change} ({count})" for change, count in changes.items())
    widths = ", ".join(str(w) for w in sorted({t.mapped.shape[-1] for t in fallen}))
    return [
        f"{len(fallen)} tensors have rows of {widths} weights, which their type's block does not divide, and fall "
        f"back as in llama.cpp: {listed}; {effective:.2f} instead of {nominal:.2f} bits per weight"
    ]
