"""The same model in other files: a GGUF file cut into shards, or shards made one. Nothing is decoded, every byte of
keys and tensors stays; only the keys that say which shard a file is come and go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf

from gguf_moe.convert import published
from gguf_moe.errors import GgufMoeError
from gguf_moe.filling import Progress
from gguf_moe.gguf_file import ALIGNMENT
from gguf_moe.gguf_reader import GgufFile
from gguf_moe.gguf_source import SPLIT_KEYS, GgufModel, open_gguf
from gguf_moe.layout import TensorPlan, lay_out
from gguf_moe.mapping import MappedTensor, Slab
from gguf_moe.plan import Plan
from gguf_moe.recipe import Choice
from gguf_moe.sharding import Splitting

PIECE_BYTES = 1 << 22  # copied at once


def plan_split(path: Path, splitting: Splitting) -> Plan:
    """Plan to cut a GGUF file, or to cut anew the shards whose first is `path`, where llama-gguf-split would.

    Raises GgufMoeError for a file that is no model, for shards that do not belong together, and where one shard is
    enough.
    """
    plan = _plan(open_gguf(path), splitting)
    if len(plan.files) == 1:
        raise GgufMoeError(f"{path}: its {len(plan.tensors)} tensors fit into one shard; nothing to split")
    return plan


def plan_merge(path: Path) -> Plan:
    """Plan to make one file of the shards whose first is `path`.

    Raises GgufMoeError for a file that is no shard, and for shards that are missing or do not belong together.
    """
    model = open_gguf(path)
    if not model.files[0].keys.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT):
        raise GgufMoeError(f"{path}: is a whole file, expected the first of several shards; nothing to merge")
    return _plan(model, None)


def _plan(model: GgufModel, splitting: Splitting | None) -> Plan:
    for file in model.files:
        _check_end(file)
    infos = [tensor for file in model.files for tensor in file.tensors]
    tensors = []
    for info, source in zip(infos, model.tensors):
        whole = Slab(source, 0, math.prod(source.shape[:-1]))
        mapped = MappedTensor(info.name, None, info.shape, (whole,))
        tensors.append(TensorPlan(mapped, Choice(info.type, info.type), info))
    return Plan(
        model.path,
        model.kept_file_type,
        False,
        model.keys,
        lay_out(tensors, _stored_keys(model.files[0]), splitting, by_converter=False),
        f"{model.name}.gguf",
        (),
        inputs=tuple(file.path for file in model.files),
    )


def _stored_keys(first: GgufFile) -> dict[str, gguf.GGUFValue]:
    """The model's keys byte for byte."""
    keys = {}
    with first.path.open("rb") as file:
        for key, value in first.values.items():
            # Files are written with the default alignment, so another is none of theirs.
            if key in SPLIT_KEYS or (key == gguf.Keys.General.ALIGNMENT and value.value != ALIGNMENT):
                continue
            file.seek(first.spans[key].start)
            keys[key] = gguf.GGUFValue(memoryview(file.read(len(first.spans[key]))), value.type)
    return keys


def _alignment(file: GgufFile) -> int:
    return file.keys.get(gguf.Keys.General.ALIGNMENT, ALIGNMENT)


def _check_end(file: GgufFile) -> None:
    """Refuse to lose what stands behind the last tensor and its padding."""
    if not file.tensors:
        return
    last = file.tensors[-1]
    surplus = file.size - (file.data_start + last.offset + last.nbytes)
    if surplus >= _alignment(file):
        raise GgufMoeError(
            f"{file.path}: {surplus} bytes follow the last tensor, {last.name}, expected padding of less than "
            f"{_alignment(file)}; `gguf-moe convert` leaves them out"
        )


def reshard(
    plan: Plan, path: Path, *, force: bool = False, on_progress: Callable[[Progress], None] | None = None
) -> None:
    """Write the planned file to `path`, or its shards to the paths that follow from it: whole, or not at all.

    Raises GgufMoeError before writing when a file exists (without `force`), is one of those that are read, or the disk
    lacks space; and while writing for a source that becomes shorter.
    """
    done = 0
    with published(plan, path, force=force) as sinks:
        for sink in sinks:
            for tensor in sink.planned.tensors:
                at = len(sink.planned.header) + tensor.info.offset
                for piece in _pieces(tensor):
                    sink.write(at, piece)
                    at, done = at + len(piece), done + len(piece)
                    if on_progress:
                        on_progress(Progress(tensor.info.name, done, plan.data_bytes))


def _pieces(tensor: TensorPlan) -> Iterator[bytes]:
    """The tensor's bytes as they stand in its source."""
    source, left = tensor.mapped.slabs[0].source, tensor.info.nbytes
    with source.file.open("rb") as file:
        file.seek(source.offset)
        while left:
            piece = file.read(min(PIECE_BYTES, left))
            if not piece:
                raise GgufMoeError(f"{source.file}: changed since it was opened: tensor {source.name} ends early")
            left -= len(piece)
            yield piece
