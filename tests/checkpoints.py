"""Checkpoints for tests: the bundled merge taken apart, changed and put together again."""

from __future__ import annotations

import json
import re
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
MERGE = DATA / "TidePool-4x4M-v1"
_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass
class Parts:
    """A checkpoint in memory: tensors as (dtype, array), bfloat16 as bits; config; which shard holds what."""

    tensors: dict[str, tuple[str, np.ndarray]]
    config: dict
    shards: dict[str, str] = field(default_factory=dict)  # tensor -> file; empty: one file without index

    def save(self, directory: Path) -> Path:
        """Write it to `directory`, with the bundled merge's tokenizer and card beside."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("README.md", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MERGE / name, directory / name)
        (directory / "config.json").write_text(json.dumps(self.config))
        for file in {self.shards.get(name, "model.safetensors") for name in self.tensors}:
            held = {n: t for n, t in self.tensors.items() if self.shards.get(n, "model.safetensors") == file}
            write_safetensors(directory / file, held)
        if self.shards:
            index = {"metadata": {}, "weight_map": self.shards}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file; by hand, since the package's NumPy interface has no bfloat16."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """All tensors of a bfloat16 file, as bits."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16"
        a, b = entry["data_offsets"]
        tensors[name] = ("BF16", np.frombuffer(data[start + a : start + b], np.uint16).reshape(entry["shape"]))
    return tensors


def bundled() -> Parts:
    """The bundled merge, one file."""
    tensors = {}
    for file in sorted(MERGE.glob("*.safetensors")):
        tensors |= read_safetensors(file)
    return Parts(tensors, json.loads((MERGE / "config.json").read_text()))


def unfused(parts: Parts) -> Parts:
    """One tensor an expert, as older mergekit wrote it."""
    tensors = {}
    for name, (dtype, array) in parts.tensors.items():
        layer = name.rsplit(".mlp.", 1)[0] + ".block_sparse_moe"
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(array):
                gate, up = np.split(both, 2)
                tensors[f"{layer}.experts.{expert}.w1.weight"] = (dtype, gate)
                tensors[f"{layer}.experts.{expert}.w3.weight"] = (dtype, up)
        elif name.endswith("mlp.experts.down_proj"):
            for expert, down in enumerate(array):
                tensors[f"{layer}.experts.{expert}.w2.weight"] = (dtype, down)
        elif name.endswith("mlp.gate.weight"):
            tensors[f"{layer}.gate.weight"] = (dtype, array)
        else:
            tensors[name] = (dtype, array)
    return Parts(tensors, dict(parts.config))


def for_the_converter(directory: Path) -> Path:
    """The bundled merge as llama.cpp's converter takes it: a tensor an expert, and the SentencePiece model beside."""
    path = unfused(bundled()).save(directory / MERGE.name)
    shutil.copy(DATA / "tokenizers" / "tidepool.tokenizer.model", path / "tokenizer.model")
    return path


def with_experts(parts: Parts, count: int, layers: int = 1) -> Parts:
    """`count` experts, the real ones over and over with their rows rolled by the round, so that all differ; and the
    first `layers` layers only."""
    tensors = {}
    for name, (dtype, array) in parts.tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= layers:
            continue
        if ".mlp." in name:
            array = np.stack([np.roll(array[e % 4], e // 4, axis=-1) for e in range(count)])
        tensors[name] = (dtype, array)
    config = {**parts.config, "num_local_experts": count, "num_hidden_layers": layers}
    return Parts(tensors, config)


def as_dtype(parts: Parts, dtype: str) -> Parts:
    """The same values in another dtype, from bfloat16."""
    wide = {n: (a.astype(np.uint32) << 16).view(np.float32) for n, (_, a) in parts.tensors.items()}
    return Parts({n: (dtype, a.astype(_NUMPY[dtype])) for n, a in wide.items()}, dict(parts.config))
