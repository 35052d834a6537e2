"""`convert --method gptq` as a user runs it, for the tests of this directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import gguf
import numpy as np
from checkpoints import DATA, MERGE, Parts, bundled, with_experts

from gguf_moe.methods.store import LayerFile

CALIB, EVAL = DATA / "text" / "calib.txt", DATA / "text" / "eval.txt"
DERIVED = f"header and 14 tensors derive from {MERGE} bit for bit"
NEAR = "29 tensors whose codes error feedback chose lie near its weights"
UNPROVEN = "the very codes of 29 tensors, which cannot be derived (method gptq)"
OTHER_DATA = f"data of 14 tensors as {MERGE} gives them"
KINDS = gguf.GGUFValueType
LEVELS = ("Q2_K", "Q4_K_M", "Q8_0")
GPTQ = ("--method", "gptq", "--calib", CALIB, "--calib-chunks", 4)
FEW = ("--method", "gptq", "--calib", CALIB, "--calib-chunks", 2)  # 1024 tokens


def one_layer() -> Parts:
    """The bundled merge's first layer and its two ends."""
    return with_experts(bundled(), 4)


def first_layer(case: str) -> Parts:
    """The first layer of a case of `architectures`, and its ends."""
    parts = architectures.recorded(case)
    config = {**parts.config, "num_hidden_layers": 1}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:1]
    return Parts({n: t for n, t in parts.tensors.items() if ".layers." not in n or ".layers.0." in n}, config)


def kept(target: Path) -> Path:
    """Where layers are kept until `target` is whole."""
    return target.with_name(f"{target.name}.gptq")


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(path: Path) -> dict[str, Any]:
    """All keys of a file, by the gguf package's reader."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def changed(ours: Path, plain: Path) -> set[str]:
    """Names of the tensors whose bytes differ; all else of them must not."""
    first, second = tensors(ours), tensors(plain)
    assert list(first) == list(second)
    for a, b in zip(first.values(), second.values()):
        assert (a.tensor_type, a.shape.tolist()) == (b.tensor_type, b.shape.tolist()), a.name
    return {name for name in first if not np.array_equal(first[name].data, second[name].data)}


def noted(monkeypatch: Any) -> list[dict[str, Any]]:
    """A list that fills with what is noted of each matrix by the runs that follow."""
    notes: list[dict[str, Any]] = []
    finish = LayerFile.finish
    monkeypatch.setattr(LayerFile, "finish", lambda file: (notes.extend(file.notes), finish(file))[1])
    return notes


def decoded(path: Path, name: str) -> np.ndarray:
    tensor = tensors(path)[name]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
