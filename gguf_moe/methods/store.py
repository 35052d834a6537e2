"""Encoded matrices on disk until their file is written: a file for each layer, there when the layer is done."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import quant
from gguf_moe.checkpoint import read_json
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import sync_directory, write_whole
from gguf_moe.gguf_source import StoredTensor
from gguf_moe.layout import TensorPlan
from gguf_moe.mapping import MappedTensor, Slab
from gguf_moe.plan import Plan

LOCK = "lock"
EMBEDDING = "token_embd.weight"


def chosen_tensors(plan: Plan) -> list[TensorPlan]:
    """The tensors whose codes are to be chosen: matrices that inputs are multiplied with, in formats with codes."""
    return [
        tensor
        for tensor in plan.tensors
        if tensor.info.type in quant.CODED and len(tensor.mapped.shape) > 1 and tensor.info.name != EMBEDDING
    ]


@dataclass
class Store:
    """The encoded matrices of one planned file. `identity`: what they follow from."""

    directory: Path
    plan: Plan
    identity: dict[str, Any]
    tensors: dict[str, TensorPlan] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {tensor.info.name: tensor for tensor in chosen_tensors(self.plan)}

    def open(self, locks: ExitStack) -> str | None:
        """Make the directory, or take up what is there; where that is of something else, what is different.

        locks: which keeps others out while it is open. Raises GgufMoeError where another run is there already.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise GgufMoeError(f"{self.directory}: another run is at work there; wait for it") from None
        locks.callback(lock.release)
        path, different = self.directory / "identity.json", None
        if path.exists() and (found := read_json(path)) != self.identity:
            different = next(key for key in {**self.identity, **found} if found.get(key) != self.identity.get(key))
            self._clear()
        write_whole(path, json.dumps(self.identity).encode())
        return different

    def _clear(self) -> None:
        for path in self.directory.iterdir():
            if path.suffix in (".json", ".layer", ".partial", ".moments"):
                path.unlink()

    def remove(self) -> None:
        """Remove what is ours in the directory, and the directory if nothing else is in it."""
        self._clear()
        (self.directory / LOCK).unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def missing_bytes(self) -> int:
        """What is still to be written."""
        return sum(t.info.nbytes for t in self.tensors.values() if not self.is_done(t.mapped.layer))

    def path(self, layer: int | None) -> Path:
        """The file of a layer's matrices; None: of those outside layers."""
        return self.directory / f"{'output' if layer is None else layer}.layer"

    def begin(self, layer: int | None) -> LayerFile:
        """A layer's file to fill."""
        return LayerFile(self, layer)

    def of_layer(self, layer: int | None) -> list[TensorPlan]:
        """The layer's tensors in their order in its file."""
        return [tensor for tensor in self.tensors.values() if tensor.mapped.layer == layer]

    def is_done(self, layer: int | None) -> bool:
        """Whether a layer's file is whole."""
        return not self.of_layer(layer) or self.path(layer).exists()

    def mapped(self, layer: int | None) -> Iterator[MappedTensor]:
        """The tensors of a layer that is done, read from its file."""
        offset = 0
        for tensor in self.of_layer(layer):
            mapped, kind = tensor.mapped, tensor.info.type
            source = StoredTensor(mapped.name, "F32", mapped.shape, self.path(layer), offset, kind)
            rows = mapped.slabs[0].rows
            slabs = tuple(Slab(source, number * rows, rows) for number in range(len(mapped.slabs)))
            yield replace(mapped, slabs=slabs)
            offset += tensor.info.nbytes

    def report(self, layer: int | None) -> list[dict[str, Any]]:
        """What was noted of each matrix of a layer that is done."""
        path = self.path(layer).with_suffix(".json")
        return json.loads(path.read_text()) if path.exists() else []

    def planned(self, layers: Sequence[int | None]) -> Plan:
        """The plan with the rows of these layers, all done, in place of those of its source."""
        stored = {tensor.name: tensor for layer in layers for tensor in self.mapped(layer)}
        return replace(_with_mapped(embedding_weighed(self.plan), stored), sources=self.plan.source_files)


def embedding_weighed(plan: Plan) -> Plan:
    """The plan with the embedding's columns weighed: all of a file but `chosen_tensors` is encoded by this."""
    embeddings = [tensor.mapped for tensor in plan.tensors if tensor.info.name == EMBEDDING]
    return _with_mapped(plan, {tensor.name: _evenly_weighed(tensor) for tensor in embeddings})


def _with_mapped(plan: Plan, mapped: dict[str, MappedTensor]) -> Plan:
    """The plan with the rows of other tensors in place of its own, by name."""
    files = tuple(
        replace(file, tensors=tuple(replace(t, mapped=mapped.get(t.info.name, t.mapped)) for t in file.tensors))
        for file in plan.files
    )
    return replace(plan, files=files)


def _evenly_weighed(tensor: MappedTensor) -> MappedTensor:
    """The tensor with all columns alike in importance, if it has none: then the encoder searches for the least square
    error, as it does not without (the error of Q2_K is a fifth smaller)."""
    slabs = (
        replace(slab, importance=np.ones(slab.source.columns, np.float32)) if slab.importance is None else slab
        for slab in tensor.slabs
    )
    return replace(tensor, slabs=tuple(slabs))


class LayerFile:
    """A layer's file while it is filled."""

    def __init__(self, store: Store, layer: int | None) -> None:
        self.store, self.layer = store, layer
        self.final = store.path(layer)
        self.partial = self.final.with_suffix(".partial")
        self.notes: list[dict[str, Any]] = []
        self.offsets, offset = {}, 0
        for tensor in store.of_layer(layer):
            self.offsets[tensor.info.name] = offset
            offset += tensor.info.nbytes
        self.file = self.partial.open("wb")

    def write(self, name: str, expert: int | None, data: np.ndarray, note: dict[str, Any]) -> None:
        """Put the blocks of a matrix, uint8 [rows, row bytes], into their place; note: what is to be said of it."""
        self.file.seek(self.offsets[name] + (expert or 0) * data.nbytes)
        self.file.write(data.data)
        self.notes.append({"tensor": name, "expert": expert, **note})

    def finish(self) -> None:
        """The layer is whole."""
        expected = sum(tensor.info.nbytes for tensor in self.store.of_layer(self.layer))
        self.file.close()
        if self.partial.stat().st_size != expected:
            raise GgufMoeError(f"{self.partial}: {self.partial.stat().st_size} bytes, expected {expected}; run again")
        write_whole(self.final.with_suffix(".json"), json.dumps(self.notes).encode())
        self.partial.rename(self.final)
        sync_directory(self.store.directory)
