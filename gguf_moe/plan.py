"""The output before it exists: every key, every tensor's type, bytes and offset, from headers alone."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf

from gguf_moe import mapping
from gguf_moe.arch import Architecture, ModelFacts, find_architecture
from gguf_moe.checkpoint import Checkpoint
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_file import stored
from gguf_moe.gguf_keys import (
    ModelKeys,
    check_vocabulary,
    converted_keys,
    cut_at_nul,
    expert_count,
    recipe_facts,
    with_asked,
)
from gguf_moe.gguf_reader import TENSOR_TYPES, TensorInfo
from gguf_moe.gguf_source import GgufModel, map_gguf
from gguf_moe.imatrix import Imatrix, read_imatrix
from gguf_moe.layout import PlannedFile, TensorPlan, lay_out
from gguf_moe.metadata import add_metadata, check_asked, read_metadata
from gguf_moe.naming import default_file_name
from gguf_moe.overrides import apply_overrides
from gguf_moe.plan_checks import check_decoding, check_importance, check_one_type, fallback_warning, refuse_fallbacks
from gguf_moe.recipe import KEPT, FileType, RecipeFacts, quantizer_order
from gguf_moe.request import Request
from gguf_moe.rules import Chooser
from gguf_moe.tokenizer import Vocabulary, read_vocabulary


@dataclass(frozen=True)
class Plan:
    """Everything about one output, a file or its shards. Made without reading a weight."""

    directory: Path  # of the checkpoint, or the GGUF file
    file_type: FileType
    by_quantizer: bool  # llama.cpp would need its quantizer for this, with its order of keys and tensors
    keys: dict[str, Any] = field(repr=False)  # of the model; shards have their own beside
    files: tuple[PlannedFile, ...] = field(repr=False)
    default_name: str
    warnings: tuple[str, ...]
    overridden: tuple[str, ...] = ()  # keys that the user set
    inputs: tuple[Path, ...] = ()  # files beside a checkpoint's that are read, so never to be written to
    sources: frozenset[Path] | None = None  # of the model, where rows are read from elsewhere

    @cached_property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """Of all files, in their order."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def source_files(self) -> frozenset[Path]:
        """Files of the model that it is made of."""
        if self.sources is not None:
            return self.sources
        return frozenset(slab.source.file for tensor in self.tensors for slab in tensor.mapped.slabs)

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

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

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
    return make_plans(source, [file_type], request)[0]


def make_plans(
    source: Checkpoint | GgufModel, file_types: Sequence[FileType | None], request: Request | None = None
) -> list[Plan]:
    """A plan for each of the file types, as `make_plan` makes them; a checkpoint is looked through once."""
    request = request or Request()
    imatrix = read_imatrix(request.imatrix) if request.imatrix else None
    if isinstance(source, GgufModel):
        return [_plan_from_gguf(source, kind or source.kept_file_type, request, imatrix) for kind in file_types]
    described = _describe(source, request, imatrix)
    return [_plan_from_checkpoint(described, file_type, request, imatrix) for file_type in file_types]


@dataclass(frozen=True)
class _Described:
    """What a checkpoint says of itself, whatever the file type."""

    directory: Path
    architecture: Architecture
    facts: ModelFacts
    mapped: list[mapping.MappedTensor]
    vocabulary: Vocabulary
    metadata: gguf.Metadata
    metadata_warnings: list[str]

    @cached_property
    def vocabulary_keys(self) -> dict[bool, dict[str, gguf.GGUFValue]]:
        """The tokenizer's keys as the converter writes them (False), and as the quantizer does (True): packed once,
        because that takes longer than all the rest of a plan."""
        writer = gguf.GGUFWriter(None, self.architecture.name)
        own = set(writer.kv_data[0])
        self.vocabulary.add_keys(writer)
        keys = {key: value for key, value in writer.kv_data[0].items() if key not in own}
        cut = {key: cut_at_nul(value) for key, value in keys.items()}
        packed = {key: stored(value) for key, value in keys.items()}
        return {False: packed, True: {k: packed[k] if cut[k] is keys[k] else stored(cut[k]) for k in keys}}


def _describe(checkpoint: Checkpoint, request: Request, imatrix: Imatrix | None) -> _Described:
    architecture = find_architecture(checkpoint.config)
    facts = architecture.facts(checkpoint.config, request.experts_used)
    mapped = _weighed(mapping.map_tensors(checkpoint, architecture, facts), imatrix)
    directory = checkpoint.directory
    vocabulary = read_vocabulary(directory, facts.vocabulary, pre=request.pre, chat_template=request.chat_template)
    return _Described(directory, architecture, facts, mapped, vocabulary, *read_metadata(directory, mapped, request))


def _weighed(mapped: list[mapping.MappedTensor], imatrix: Imatrix | None) -> list[mapping.MappedTensor]:
    return [imatrix.weigh(tensor) for tensor in mapped] if imatrix else mapped


def _plan_from_checkpoint(
    described: _Described, file_type: FileType | None, request: Request, imatrix: Imatrix | None
) -> Plan:
    directory, facts, architecture = described.directory, described.facts, described.architecture
    if file_type is None:
        raise UsageError(f"{directory}: a checkpoint needs a file type: give --bits or --quant")
    by_quantizer = _by_quantizer(file_type, request)
    tied = not any(tensor.name == "output.weight" for tensor in described.mapped)
    recipe_facts = RecipeFacts(
        facts.layers, facts.experts, facts.heads, facts.kv_heads, tied, architecture.name, imatrix=imatrix is not None
    )
    tensors, rule_warnings = _choose(described.mapped, file_type, recipe_facts, request)
    rule_warnings += check_importance(tensors, file_type, imatrix)
    try:
        keys = _keys(described, file_type, by_quantizer)
        keys, key_warnings = apply_overrides(keys, request.override_kv, architecture.name, facts.vocabulary)
        keys |= _added(request, imatrix) if by_quantizer else {}
        files = lay_out(tensors, keys, request.splitting, by_converter=not by_quantizer)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, struct.error) as error:
        raise GgufMoeError(
            f"{directory}: the tokenizer's files or the model card hold what GGUF cannot: {error!r}"
        ) from None
    return Plan(
        directory,
        file_type,
        by_quantizer,
        keys,
        files,
        _default_name(keys, described.mapped, request, file_type),
        (*facts.notes, *described.vocabulary.notes, *described.metadata_warnings, *key_warnings, *rule_warnings),
        _overridden(request),
        (imatrix.path,) if imatrix else (),
    )


def _plan_from_gguf(model: GgufModel, file_type: FileType, request: Request, imatrix: Imatrix | None) -> Plan:
    asked = {"--pre": request.pre, "--chat-template": request.chat_template, "--metadata": request.metadata}
    for option, value in asked.items():
        if value is not None:
            raise UsageError(f"{option} is for checkpoints; --override-kv sets the keys of a GGUF file")
    if file_type.default == KEPT and (request.rules.retype or request.rules.pure):
        raise UsageError("options for types need --bits or --quant; without, a GGUF file keeps its tensors' types")
    check_asked(request)
    by_quantizer = _by_quantizer(file_type, request)
    keys = converted_keys(model.keys, file_type, by_quantizer)
    keys = with_asked(model.path, keys, request.name, request.size_label, request.experts_used)
    model_keys = ModelKeys(model.path, keys)
    tokens = model_keys.value(gguf.Keys.Tokenizer.LIST)
    vocabulary = len(tokens) if model_keys.is_array(gguf.Keys.Tokenizer.LIST) else 0
    keys, key_warnings = apply_overrides(keys, request.override_kv, model_keys.architecture, vocabulary)
    model_keys = ModelKeys(model.path, keys)
    experts = expert_count(model_keys)
    mapped = _weighed(map_gguf(model, experts), imatrix)
    facts = replace(recipe_facts(model_keys, mapped, experts), imatrix=imatrix is not None)
    check_vocabulary(model_keys, mapped)
    if facts.architecture == "falcon" and file_type.quantized and file_type.default != KEPT:
        raise GgufMoeError(f"{model.path}: llama.cpp has types of its own for falcon, which gguf-moe does not know")
    tensors, rule_warnings = _choose(mapped, file_type, facts, request, keep=True)
    check_decoding(tensors, request)
    rule_warnings += check_importance(tensors, file_type, imatrix)
    keys |= _added(request, imatrix) if by_quantizer else {}
    return Plan(
        model.path,
        file_type,
        by_quantizer,
        keys,
        lay_out(tensors, keys, request.splitting, by_converter=False),
        _default_name(keys, mapped, request, file_type, model.stem),
        (*key_warnings, *rule_warnings),
        _overridden(request),
        (*(file.path for file in model.files), *((imatrix.path,) if imatrix else ())),
    )


def _added(request: Request, imatrix: Imatrix | None) -> dict[str, gguf.GGUFValue]:
    """Keys of how a file is quantized, the last."""
    return {**(imatrix.keys() if imatrix else {}), **request.keys}


def _by_quantizer(file_type: FileType, request: Request) -> bool:
    """Whether llama.cpp would need its quantizer for what is asked."""
    return file_type.quantized or request.rules.retype or bool(request.override_kv)


def _overridden(request: Request) -> tuple[str, ...]:
    return tuple(text.partition("=")[0] for text in request.override_kv)


def _default_name(
    keys: dict[str, Any],
    mapped: list[mapping.MappedTensor],
    request: Request,
    file_type: FileType,
    stem: str | None = None,
) -> str:
    """By the naming convention; a name that the user gave is taken apart as a directory's is. `stem` where the keys
    hold no name."""
    general = gguf.Keys.General
    parts = (general.NAME, general.BASENAME, general.FINETUNE, general.VERSION, general.SIZE_LABEL)
    texts = [keys[key].value if key in keys and isinstance(keys[key].value, str) else None for key in parts]
    name, base, finetune, version, size = texts
    if request.name:
        given = re.sub(r"[\s/]+", "-", request.name.strip())
        total = sum(tensor.elements for tensor in mapped)
        name, _, base, finetune, version, own = gguf.Metadata.get_model_id_components(given, total)
        size = size if request.size_label else own or size
    return default_file_name(name or stem, base, finetune, version, size, file_type.name)


def _choose(
    mapped: list[mapping.MappedTensor], file_type: FileType, facts: RecipeFacts, request: Request, *, keep: bool = False
) -> tuple[list[TensorPlan], list[str]]:
    """Order and type of every tensor, not yet its place; and what is to be said of the rules that chose the types.

    keep: what the quantizer does not touch keeps its source's type, instead of being F32.
    """
    by_quantizer = _by_quantizer(file_type, request)
    if by_quantizer:
        mapped = sorted(mapped, key=lambda tensor: quantizer_order(tensor.name))
    chooser = Chooser(file_type, facts, request.rules, keep=keep)
    tensors = []
    for tensor in mapped:
        columns = tensor.shape[-1]
        shape = mapping.without_outer_ones(tensor.shape) if by_quantizer else tensor.shape
        choice = chooser.choose(tensor.name, tensor.role, tensor.layer, columns, tensor.slabs[0].source.type)
        if file_type.default == KEPT:
            check_one_type(tensor)
        nbytes = tensor.elements // columns * TENSOR_TYPES[choice.type].row_bytes(columns)
        tensors.append(TensorPlan(tensor, choice, TensorInfo(tensor.name, choice.type, shape, nbytes, 0)))
    warnings = chooser.check()
    if request.strict:
        refuse_fallbacks(tensors)
    return tensors, warnings + fallback_warning(tensors)


def _keys(described: _Described, file_type: FileType, by_quantizer: bool) -> dict[str, Any]:
    """All keys in the order of llama.cpp's converter, or of its quantizer, which sets two of them anew at the end."""
    architecture, facts = described.architecture, described.facts
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    add_metadata(writer, described.metadata, described.directory)
    architecture.add_keys(writer, facts)
    if not by_quantizer:
        writer.add_file_type(file_type.id)
    architecture.add_last_keys(writer, facts)
    if not by_quantizer:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    keys = writer.kv_data[0]
    if by_quantizer:
        keys.update({key: cut_at_nul(value) for key, value in keys.items()})
    keys.update(described.vocabulary_keys[by_quantizer])
    if by_quantizer:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(file_type.id)
    return dict(keys)
