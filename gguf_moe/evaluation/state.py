"""What an interrupted run over a text keeps: what its finished sweeps gave, and of what that is."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gguf_moe import __version__
from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.engines import Settings
from gguf_moe.evaluation.figures import POSITION, Scores
from gguf_moe.evaluation.routing import RoutingScores
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.text import EvaluationText
from gguf_moe.gguf_file import write_whole

_ROUTING = ("layers", "tokens", "load", "sums", "flipped")


class Kept(Protocol):
    """What can be kept in a file between runs."""

    identity: dict[str, Any]  # what it all follows from
    done: int  # windows that are finished

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is known."""

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take up what `arrays` has given. Raises ValueError, or KeyError, where it cannot have."""


@dataclass
class Measured:
    """What is known of a model."""

    scores: Scores
    routing: RoutingScores | None = None


@dataclass
class State:
    """The finished chunks of a validation: for the base, which is the first, and each file, what is known of them."""

    identity: dict[str, Any]  # what it all follows from
    models: list[Measured]
    sweep: int | None = None  # chunks of a sweep

    @property
    def done(self) -> int:
        """How many chunks are finished."""
        return len(self.models[0].scores.chunks)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Kept`."""
        arrays = {"sweep": np.array(self.sweep)}
        for number, model in enumerate(self.models):
            arrays[f"{number}.positions"] = np.stack(model.scores.chunks)
            if model.routing:
                arrays |= {f"{number}.{name}": array for name, array in model.routing.arrays().items()}
        return arrays

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """See `Kept`."""
        models = [_read_model(arrays, n, model.scores.name) for n, model in enumerate(self.models)]
        self.sweep, self.models = int(arrays["sweep"]), models


def _source_key(number: int) -> str:
    return f"file {number}" if number else "base"


def identity(sources: Sequence[ModelSource], text: EvaluationText, settings: Settings) -> dict[str, Any]:
    """All that results follow from, in JSON values: program, engine, text, windows, and the state of all files."""
    return {
        "gguf-moe": __version__,
        "engine": settings.engine,
        "device": settings.device,
        "dtype": settings.dtype,
        "text": text.sha256,
        "ctx": settings.context,
        "chunks": len(text.windows),
        "tokens": hashlib.sha256(text.windows.tobytes()).hexdigest(),
        **{_source_key(n): source_identity(source) for n, source in enumerate(sources)},
    }


def source_identity(source: ModelSource) -> dict[str, Any]:
    """What tells a model from itself after a change: its files with sizes and dates, and its keys."""
    files = {slab.source.file for tensor in source.tensors.values() for slab in tensor.slabs}
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}
    keys = [(key, str(item.value)) for key, item in source.keys.items() if np.isscalar(item.value)]
    return {"name": source.name, "files": stats, "keys": hashlib.sha256(repr(keys).encode()).hexdigest()}


def check_unchanged(state: Kept, sources: Sequence[ModelSource]) -> None:
    """Refuse files that are others than at the start, whose figures would be of two models. Raises GgufMoeError."""
    for number, source in enumerate(sources):
        if source_identity(source) != state.identity[_source_key(number)]:
            raise GgufMoeError(f"{source.path}: changed while it was evaluated; run again when it is whole")


def write_state(path: Path, state: Kept) -> None:
    """Replace a state file, whole or not at all."""
    data = io.BytesIO()
    np.savez(data, identity=np.array(json.dumps(state.identity)), **state.arrays())
    write_whole(path, data.getvalue())


def read_state(path: Path, state: Kept) -> str | None:
    """Take up into a new state what a state file has; where it is of another run, the first difference instead.

    Raises GgufMoeError for a file that is no state file, which is left alone, and where there is no directory for it.
    """
    if not path.absolute().parent.is_dir():
        raise GgufMoeError(f"{path}: no such directory")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = json.loads(str(arrays["identity"]))
            if (different := _first_difference(found, state.identity)) is not None:
                return different
            state.take(arrays)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise GgufMoeError(f"{path}: not readable: {error.strerror or error}") from None
    except Exception:  # zipfile, zlib and NumPy raise a dozen types for what is damaged
        message = "not a whole state file; name another file, or remove this one to begin anew"
        raise GgufMoeError(f"{path}: {message}") from None
    return None


def _first_difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    different = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    return different[0] if different else None


def _read_model(arrays: Mapping[str, np.ndarray], number: int, name: str) -> Measured:
    positions = arrays[f"{number}.positions"]
    if positions.dtype != POSITION or positions.ndim != 2:
        raise ValueError(f"positions of model {number} are {positions.dtype} {positions.shape}")
    routing = {key: arrays[f"{number}.{key}"] for key in _ROUTING} if f"{number}.load" in arrays else None
    return Measured(Scores(name, list(positions)), RoutingScores.from_arrays(routing) if routing else None)
