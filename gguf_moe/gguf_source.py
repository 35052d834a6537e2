"""A GGUF file, or its shards, as a source: keys, tensors, and what the recipe asks of a model. Reads no weight.

Yields the same mapped tensors as a checkpoint does. Tensors of the early layout, in which each expert has its own, are
stacked here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

import quant
from gguf_moe.checkpoint import SOURCE_DTYPES, SourceTensor, map_file
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_reader import TENSOR_TYPES, GgufFile, read_gguf
from gguf_moe.mapping import MappedTensor, Slab, absent_text
from gguf_moe.recipe import KEPT, FileType, file_type_name, quantizer_order

SPLIT_KEYS = (gguf.Keys.Split.LLM_KV_SPLIT_NO, gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
SPLIT_KEYS += (gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_EXPERT = re.compile(r"(blk\.(?:0|[1-9]\d{0,5})\.)(ffn_(?:gate|down|up))\.(0|[1-9]\d{0,5})\.weight")
_EXPERT_KINDS = ("ffn_gate", "ffn_down", "ffn_up")
_FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}
_GUESSED = int(gguf.LlamaFileType.GUESSED)


class StoredTensor(SourceTensor):
    """A tensor of a GGUF file in a type of blocks, `stored`. Its rows come decoded, or from `raw` as they are."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return TENSOR_TYPES[self.type].row_bytes(self.columns)

    def raw(self) -> np.ndarray:
        """The rows as they stand in the file: mapped, read-only, uint8 [rows, row bytes]."""
        return map_file(self.file, np.dtype(np.uint8), self.offset, (math.prod(self.shape[:-1]), self.row_bytes))

    def matrix(self) -> Any:
        """What gives float32 rows for an index of rows, decoded as they are asked for."""
        return _Decoded(self.raw(), self.type)


@dataclass(frozen=True)
class _Decoded:
    raw: np.ndarray
    kind: str

    def __getitem__(self, rows: Any) -> np.ndarray:
        return quant.dequantize(self.raw[rows], self.kind)


@dataclass(frozen=True)
class GgufModel:
    """A model in one GGUF file or in the shards of one; names of tensors are unique over all of them."""

    files: tuple[GgufFile, ...] = field(repr=False)

    @property
    def path(self) -> Path:
        """The file, or the first shard."""
        return self.files[0].path

    @property
    def name(self) -> str:
        """The file's name without suffix and shard number."""
        return match[1] if (match := _SHARD.fullmatch(self.path.name)) else self.path.stem

    @property
    def stem(self) -> str:
        """The file's name without suffix, shard number and file type."""
        return re.sub(rf"[-.]{re.escape(self.kept_file_type.name)}$", "", self.name, flags=re.IGNORECASE)

    @cached_property
    def keys(self) -> dict[str, gguf.GGUFValue]:
        """The model's keys, without those of the container: shards, alignment (files are written with 32)."""
        container = (*SPLIT_KEYS, gguf.Keys.General.ALIGNMENT)
        return {key: value for key, value in self.files[0].values.items() if key not in container}

    @cached_property
    def tensors(self) -> list[SourceTensor]:
        """All tensors in the files' order; a scalar counts as a row of one."""
        return [
            _source_tensor(file.path, t.name, t.type, t.shape or (1,), file.data_start + t.offset)
            for file in self.files
            for t in file.tensors
        ]

    @cached_property
    def kept_file_type(self) -> FileType:
        """What the file says it is, every tensor kept as it is; the commonest type where it does not say (flagged, as
        llama.cpp does)."""
        value = self.keys.get(gguf.Keys.General.FILE_TYPE)
        said = value is not None and value.type is gguf.GGUFValueType.UINT32
        number = value.value if said else self._guessed_file_type()
        return FileType(file_type_name(number & ~_GUESSED) or f"TYPE{number}", number, KEPT)

    def _guessed_file_type(self) -> int:
        counts: dict[str, int] = defaultdict(int)
        commonest = ""
        for tensor in sorted(self.tensors, key=lambda t: quantizer_order(t.name)):
            counts[tensor.type] += 1
            if counts[tensor.type] > counts[commonest]:
                commonest = tensor.type
        name = _FILE_TYPES.get(commonest, f"MOSTLY_{commonest}")
        return _GUESSED | int(gguf.LlamaFileType.__members__.get(name, gguf.LlamaFileType.ALL_F32))


def open_gguf(path: Path) -> GgufModel:
    """The model in a GGUF file; of a sharded one `path` is the first shard.

    Raises GgufMoeError for a file that is no model, and for a missing or foreign shard, naming it.
    """
    first = read_gguf(path)
    files = (first, *_other_shards(first))
    places: dict[str, Path] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in places:
                raise GgufMoeError(f"{file.path}: tensor {tensor.name} stands in {places[tensor.name].name} too")
            places[tensor.name] = file.path
            if not math.prod(tensor.shape):
                raise GgufMoeError(f"{file.path}: tensor {tensor.name} has shape {list(tensor.shape)}, so no weights")
    if not places:
        raise GgufMoeError(f"{path}: no tensors, expected a model")
    _check_count_of_tensors(files, len(places))
    kind = first.keys.get(gguf.Keys.General.TYPE, gguf.GGUFType.MODEL)
    if kind != gguf.GGUFType.MODEL:
        raise GgufMoeError(f"{path}: general.type is {kind!r}, expected {str(gguf.GGUFType.MODEL)!r}")
    return GgufModel(files)


def _source_tensor(path: Path, name: str, kind: str, shape: tuple[int, ...], offset: int) -> SourceTensor:
    if kind in SOURCE_DTYPES:
        return SourceTensor(name, kind, shape, path, offset)
    return StoredTensor(name, "F32", shape, path, offset, kind)


def _other_shards(first: GgufFile) -> list[GgufFile]:
    """The shards after the first, found by its name; none when the file is whole."""
    number, count = shard_place(first)
    if number:
        _fail(first.path, f"is shard {number + 1} of {count}; give the first, {shard_path(first.path, 0).name}")
    others = []
    for i in range(1, count):
        path = shard_path(first.path, i)
        if not path.exists():
            _fail(first.path, f"is the first of {count} shards, but {path.name} is missing")
        other = read_gguf(path)
        found = tuple(_split_value(other, key, -1) for key in SPLIT_KEYS[:2])
        if found != (i, count):
            _fail(other.path, f"split.no and split.count are {found[0]} and {found[1]}, expected {i} and {count}")
        others.append(other)
    return others


def shard_place(file: GgufFile) -> tuple[int, int]:
    """Which shard of how many a file is, counted from 0; (0, 1) for a whole model.

    Raises GgufMoeError when its name does not say the same as its keys.
    """
    number, count = (_split_value(file, key, 0) for key in SPLIT_KEYS[:2])
    if count < 2 and number == 0:
        return 0, 1
    match = _SHARD.fullmatch(file.path.name)
    if match is None or int(match[3]) != count or int(match[2]) != number + 1:
        name = f"-{number + 1:05d}-of-{count:05d}.gguf"
        _fail(file.path, f"is shard {number + 1} of {count} by its keys, expected a name that ends in {name}")
    return number, count


def shard_path(path: Path, number: int) -> Path:
    """Path of the shard `number`, counted from 0, of the set that the shard `path` belongs to."""
    return path.with_name(re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", rf"-{number + 1:05d}\1", path.name))


def _check_count_of_tensors(files: tuple[GgufFile, ...], count: int) -> None:
    for file in files:
        said = _split_value(file, SPLIT_KEYS[2], count)
        if said != count and len(files) > 1:
            _fail(file.path, f"split.tensors.count is {said}, but the {len(files)} shards have {count} tensors")


def _split_value(file: GgufFile, key: str, default: int) -> int:
    value = file.keys.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(file.path, f"{key} is {value!r}, expected an integer")
    return value


def _fail(path: Path, reason: str) -> NoReturn:
    raise GgufMoeError(f"{path}: {reason}")


def map_gguf(model: GgufModel, experts: int) -> list[MappedTensor]:
    """The output's tensors in the files' order, a stack of split experts where its last expert stands.

    Raises GgufMoeError naming experts that are absent, surplus or of another shape.
    """
    stacks: dict[tuple[str, str], dict[int, SourceTensor]] = defaultdict(dict)
    members = {t.name: match for t in model.tensors if (match := _EXPERT.fullmatch(t.name))}
    for tensor in model.tensors:
        if match := members.get(tensor.name):
            stacks[match[1], match[2]][int(match[3])] = tensor
    _check_stacks(model, stacks, experts)
    left = {key: len(stack) for key, stack in stacks.items()}
    mapped = []
    for tensor in model.tensors:
        if (match := members.get(tensor.name)) is None:
            mapped.append(_mapped(tensor.name, tensor.shape, [tensor]))
            continue
        key = match[1], match[2]
        left[key] -= 1
        if not left[key]:
            sources = [stacks[key][expert] for expert in range(experts)]
            mapped.append(_mapped(f"{key[0]}{key[1]}_exps.weight", (experts, *sources[0].shape), sources))
    return mapped


def _mapped(name: str, shape: tuple[int, ...], sources: list[SourceTensor]) -> MappedTensor:
    """A slab an expert, whether the source stacks them or not; else one for the whole tensor."""
    rows = shape[-2] if name.endswith("_exps.weight") and len(shape) > 1 else math.prod(shape[:-1])
    slabs = [Slab(source, first, rows) for source in sources for first in range(0, math.prod(source.shape[:-1]), rows)]
    layer = quantizer_order(name)[0]
    return MappedTensor(name, layer if layer >= 0 else None, shape, tuple(slabs))


def _check_stacks(model: GgufModel, stacks: dict[tuple[str, str], dict[int, SourceTensor]], experts: int) -> None:
    names = {tensor.name for tensor in model.tensors}
    absent = []
    for prefix in dict.fromkeys(prefix for prefix, _ in stacks):
        for kind in _EXPERT_KINDS:
            if f"{prefix}{kind}_exps.weight" in names:
                _fail(model.path, f"experts are there twice, as {prefix}{kind}_exps.weight and one by one")
            stack = stacks.get((prefix, kind), {})
            absent += [f"{prefix}{kind}.{expert}.weight" for expert in range(experts) if expert not in stack]
            if surplus := sorted(expert for expert in stack if expert >= experts):
                name = f"{prefix}{kind}.{surplus[0]}.weight"
                _fail(model.path, f"tensor {name} is of expert {surplus[0]}, but expert_count is {experts}")
            first = next(iter(stack.values()), None)
            for tensor in stack.values():
                if len(tensor.shape) != 2 or tensor.shape != first.shape:
                    found = f"{list(tensor.shape)}, expected that of {first.name}, {list(first.shape)}"
                    _fail(tensor.file, f"tensor {tensor.name} has shape {found}")
    if absent:
        _fail(model.path, f"{absent_text(absent)} (expert_count is {experts})")
