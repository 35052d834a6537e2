"""Shapes that the rules for types look at: layers, experts, tied embeddings, rows that no block divides."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoints import DATA, MERGE, Parts, bundled, with_experts


def deep(parts: Parts, layers: int) -> Parts:
    """The real layers over and over, rolled by the round so that all differ."""
    tensors = {}
    for name, (dtype, array) in parts.tensors.items():
        if not (layer := re.match(r"model\.layers\.(\d+)\.(.*)", name)):
            tensors[name] = (dtype, array)
            continue
        for i in range(int(layer[1]), layers, parts.config["num_hidden_layers"]):
            tensors[f"model.layers.{i}.{layer[2]}"] = (dtype, np.roll(array, i, axis=-1))
    return Parts(tensors, {**parts.config, "num_hidden_layers": layers})


def narrow(parts: Parts, hidden: int) -> Parts:
    """The first `hidden` of the model's 256 dimensions, with explicit heads of 64."""
    tensors = {}
    for name, (dtype, array) in parts.tensors.items():
        if name.endswith(("down_proj", "o_proj.weight")):
            array = array[..., :hidden, :]
        elif array.shape[-1] == parts.config["hidden_size"]:
            array = array[..., :hidden]
        tensors[name] = (dtype, np.ascontiguousarray(array))
    return Parts(tensors, {**parts.config, "hidden_size": hidden, "head_dim": 64})


def tied(parts: Parts) -> Parts:
    """Without an output matrix."""
    return Parts({n: t for n, t in parts.tensors.items() if n != "lm_head.weight"}, dict(parts.config))


VARIANTS: dict[str, Callable[[], Parts]] = {
    "bundled": bundled,
    "deep": lambda: deep(with_experts(bundled(), 2, layers=4), 12),
    "eight": lambda: with_experts(bundled(), 8, layers=3),
    "narrow": lambda: narrow(with_experts(bundled(), 3, layers=2), 96),
    "tied": lambda: tied(with_experts(bundled(), 2, layers=2)),
    "narrow tied": lambda: tied(narrow(with_experts(bundled(), 2, layers=2), 96)),
}


def save(variant: str, directory: Path) -> Path:
    """Write a variant's checkpoint, with the SentencePiece model, for which the whole file is llama.cpp's."""
    path = VARIANTS[variant]().save(directory / MERGE.name)
    shutil.copy(DATA / "tokenizers" / "tidepool.tokenizer.model", path / "tokenizer.model")
    return path
