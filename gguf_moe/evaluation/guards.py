"""What base and quantized file must have in common, and what makes figures tell less than they seem to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PureWindowsPath
from typing import Any, NoReturn

import gguf

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.text import EvaluationText
from gguf_moe.gguf_keys import ModelKeys
from gguf_moe.imatrix import DATASET, TEXT_HASH
from gguf_moe.mapping import without_outer_ones

CALIBRATION = "gguf_moe.gptq.text_sha256"  # of the text that error feedback went by
_LLM, _Tokenizer = gguf.Keys.LLM, gguf.Keys.Tokenizer
_SHAPE_KEYS = (_LLM.BLOCK_COUNT, _LLM.EXPERT_COUNT, _LLM.EXPERT_USED_COUNT)
_TOKENIZER_KEYS = (_Tokenizer.MODEL, _Tokenizer.PRE, _Tokenizer.BOS_ID, _Tokenizer.ADD_BOS, _Tokenizer.ADD_PREFIX)
_TOKENIZER_ARRAYS = (_Tokenizer.LIST, _Tokenizer.TOKEN_TYPE, _Tokenizer.SCORES, _Tokenizer.MERGES)


def check_alike(base: ModelSource, other: ModelSource) -> None:
    """Refuse a model that is not the base, quantized. Raises GgufMoeError with the first difference of architecture,
    shapes or tokenizer."""
    models = [ModelKeys(source.path, source.keys) for source in (base, other)]
    architecture = gguf.Keys.General.ARCHITECTURE
    _check_values(*models, (architecture,))
    _check_values(*models, tuple(models[0].model(key) for key in _SHAPE_KEYS))
    for name, tensor in base.tensors.items():
        shapes = [without_outer_ones(t.shape) for t in (other.tensors.get(name, tensor), tensor)]
        if shapes[0] != shapes[1]:
            _refuse(other, f"tensor {name} has shape {list(shapes[0])}", str(list(shapes[1])), base)
    _check_values(*models, _TOKENIZER_KEYS)
    for key in _TOKENIZER_ARRAYS:
        _check_arrays(base, other, key)


def _check_values(base: ModelKeys, other: ModelKeys, keys: Sequence[str]) -> None:
    """Of keys that both have."""
    for key in keys:
        expected, found = base.value(key), other.value(key)
        if None not in (expected, found) and expected != found:
            _refuse(other, f"{key} is {found!r:.80}", f"{expected!r:.80}", base)


def _check_arrays(base: ModelSource, other: ModelSource, key: str) -> None:
    if key not in base.keys or key not in other.keys:
        return
    expected, found = (list(source.keys[key].value) for source in (base, other))
    if len(expected) != len(found):
        _refuse(other, f"{key} has {len(found)} elements", str(len(expected)), base)
    for number in (i for i, (a, b) in enumerate(zip(expected, found)) if a != b):
        _refuse(other, f"{key}[{number}] is {found[number]!r:.80}", f"{expected[number]!r:.80}", base)


def _refuse(other: ModelSource | ModelKeys, found: str, expected: str, base: ModelSource | ModelKeys) -> NoReturn:
    raise GgufMoeError(f"{other.path}: {found}, expected {expected} as in the base, {base.path}")


def calibration_warnings(sources: Sequence[ModelSource], text: EvaluationText) -> Iterator[str]:
    """What is to be said of files whose importance matrix was made from the text itself."""
    for source in sources:
        made_from = f"from this very text, {text.name}; its figures are better here than elsewhere, evaluate on another"
        if text.sha256 in _texts(source.keys.get(CALIBRATION)):
            yield f"{source.name}: its codes were chosen {made_from} text"
        if text.sha256 in _texts(source.keys.get(TEXT_HASH)):
            yield f"{source.name}: its importance matrix was made {made_from} text"
        elif text.name in (PureWindowsPath(name).name for name in _texts(source.keys.get(DATASET))):
            yield (
                f"{source.name}: its importance matrix was made from a text called {text.name} too; if it is the same, "
                "evaluate on another one"
            )


def context_warnings(base: ModelSource, context: int) -> Iterator[str]:
    """What is to be said of windows that are longer than the base was made for."""
    model = ModelKeys(base.path, base.keys)
    if (made_for := model.value(model.model(_LLM.CONTEXT_LENGTH))) and context > made_for:
        yield f"{base.name}: is made for {made_for} tokens, windows of {context} tell little; give a smaller --ctx"


def _texts(item: gguf.GGUFValue | None) -> list[str]:
    """A key's text or texts."""
    value: Any = item.value if item else []
    return [
        text for text in (value if item and item.type is gguf.GGUFValueType.ARRAY else [value]) if type(text) is str
    ]
