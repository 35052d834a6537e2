"""Encoded matrices on disk until their file is written: a file for each layer, there when the layer is done."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
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
# What a run leaves in its directory, if it is killed while it replaces a small file too.
_OURS = re.compile(
    r"(identity|output|\d+)\.(json|layer|partial|moments)|\.(identity|output|\d+)\.json\.[0-9a-f]+\.partial"
)
_READ_BYTES = 1 << 20


def chosen_tensors(plan: Plan) -> list[TensorPlan]:
    """The tensors whose codes are to be chosen: matrices that inputs are multiplied with, in formats with codes, unless
    a GGUF file has them in that format already."""
    return [
        tensor
        for tensor in plan.tensors
        if tensor.info.type in quant.CODED
        and tensor.searched
        and len(tensor.mapped.shape) > 1
        and tensor.info.name != EMBEDDING
    ]


@dataclass
class Store:
    """The encoded matrices of one planned file. `identity`: what they follow from."""

    directory: Path
    plan: Plan
    identity: dict[str, Any]
    tensors: dict[str, TensorPlan] = field(init=False)
    done: dict[int | None, list[dict[str, Any]]] = field(init=False, default_factory=dict)  # layer -> notes on matrices

    def __post_init__(self) -> None:
        self.tensors = {tensor.info.name: tensor for tensor in chosen_tensors(self.plan)}

    @cached_property
    def layers(self) -> list[int | None]:
        """All layers with tensors to choose codes for, and what is outside of them, the last."""
        layers = {tensor.mapped.layer for tensor in self.tensors.values()}
        return sorted(layers, key=lambda layer: (layer is None, layer or 0))

    def open(self, stack: ExitStack) -> list[str]:
        """Make the directory, or take up what is there; what is to be said of that.

        stack: others are kept out while it is open; when it closes and no layer is done, the directory goes. Raises
        GgufMoeError where another run is there already.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise GgufMoeError(f"{self.directory}: another run is at work there; wait for it") from None
        stack.callback(lock.release)
        stack.callback(self._tidy)
        said, different = [], self._difference()
        if different is not None:
            _clear(self.directory)  # layers whose identity is lost, too
            write_whole(self.directory / "identity.json", json.dumps(self.identity).encode())
        if different:
            said.append(f"{self.directory}: begun anew, the earlier run had another {different}")
        for layer in self.layers:
            if self.path(layer).exists():
                said += self._take_up(layer)
        return said

    def is_whole(self) -> bool:
        """Whether an earlier run of the same has left all layers."""
        return self._difference() is None and self.kept() == len(self.layers)

    def _difference(self) -> str | None:
        """The first thing in which the earlier run's identity is another; "" where there was none."""
        path = self.directory / "identity.json"
        if not path.exists():
            return ""
        try:
            found = read_json(path)
        except GgufMoeError:  # damaged
            return "identity"
        return next((key for key in {**self.identity, **found} if found.get(key) != self.identity.get(key)), None)

    def _take_up(self, layer: int | None) -> list[str]:
        """Take a layer's file for done if it is what was written."""
        path = self.path(layer)
        try:
            noted = read_json(path.with_suffix(".json"))
        except GgufMoeError:
            noted = {}
        if noted.get("sha256") == _digest(path) and "matrices" in noted:
            self.done[layer] = noted["matrices"]
            return []
        path.unlink()
        return [f"{path}: damaged, its layer is quantized anew"]

    def kept(self) -> int:
        """How many layers the next run finds done; a stop may have come before this one knew of the last."""
        return sum(self.path(layer).exists() for layer in self.layers)

    def _tidy(self) -> None:
        if not self.kept():
            self.remove()

    def remove(self) -> None:
        """Remove what is ours in the directory, and the directory if nothing else is in it."""
        if self.directory.exists():
            _remove(self.directory)

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
        """Whether a layer's file is whole, or it needs none."""
        return layer in self.done or layer not in self.layers

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

    def planned(self) -> Plan:
        """The plan with the rows of all layers, which are done, in place of those of its source."""
        stored = {tensor.name: tensor for layer in self.layers for tensor in self.mapped(layer)}
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


def discard(directory: Path) -> None:
    """Remove what a run has left there that was killed when all was written; nothing where another is at work."""
    if not directory.is_dir():
        return
    try:
        with FileLock(directory / LOCK, blocking=False):
            _remove(directory)
    except Timeout:
        return


def _remove(directory: Path) -> None:
    _clear(directory)
    (directory / LOCK).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


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
        with self._told():
            self.file = self.partial.open("wb")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GgufMoeError(f"{self.partial}: not written: {error}; run again to go on") from None

    def write(self, name: str, expert: int | None, row: int, data: np.ndarray) -> None:
        """Put blocks of a matrix, uint8 [rows, row bytes] from that row on, into their place."""
        before = (expert or 0) * self.store.tensors[name].mapped.slabs[0].rows + row
        with self._told():
            self.file.seek(self.offsets[name] + before * data.shape[1])
            self.file.write(data.data)

    def note(self, name: str, expert: int | None, note: dict[str, Any]) -> None:
        """A matrix is whole; what is to be said of it."""
        self.notes.append({"tensor": name, "expert": expert, **note})

    def finish(self) -> None:
        """The layer is whole. Raises GgufMoeError for a matrix that was not written."""
        written = Counter(note["tensor"] for note in self.notes)
        for tensor in self.store.of_layer(self.layer):
            if written[tensor.info.name] != len(tensor.mapped.slabs):
                where = f"{self.store.plan.directory}: tensor {tensor.info.name}"
                raise GgufMoeError(f"{where} is in no product of the forward pass; give it a type without codes")
        with self._told():
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            noted = {"sha256": _digest(self.partial), "matrices": self.notes}
            write_whole(self.final.with_suffix(".json"), json.dumps(noted).encode())
            self.partial.rename(self.final)
            sync_directory(self.store.directory)
        self.store.done[self.layer] = self.notes
