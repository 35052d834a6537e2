"""What the keys of a GGUF model say: checked when it is converted, and as its conversion has them.

A file may hold anything and still be shown; to be a model its keys have to agree with each other and with the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gguf

from gguf_moe.arch.reading import MAX_EXPERTS, MAX_LAYERS
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.mapping import MappedTensor
from gguf_moe.recipe import KEPT, FileType, RecipeFacts, category_of

_STACK = re.compile(r"blk\.\d+\.ffn_(gate|down|up|gate_up)_exps\.weight")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_General, _Tokenizer, _LLM = gguf.Keys.General, gguf.Keys.Tokenizer, gguf.Keys.LLM
_Type = gguf.GGUFValueType
# What `methods` says of the choice of codes, but for the text that they were fitted to, as their decoded weights are.
_OF_CODES = ("gguf_moe.method", *(f"gguf_moe.gptq.{name}" for name in ("chunks", "damping", "calibrated_on")))

Keys = Mapping[str, gguf.GGUFValue]


def converted_keys(keys: Keys, file_type: FileType, by_quantizer: bool) -> dict[str, gguf.GGUFValue]:
    """The keys of a conversion of a GGUF file to `file_type`.

    llama.cpp's quantizer sets two keys anew, which puts them at the end, and cuts texts at a NUL. Not so where its
    converter could make the file (16 and 32 bit types): there every key keeps its place, and the file stays what its
    checkpoint gives. What the source says of the choice of its codes is not so of others.
    """
    anew = {
        _General.QUANTIZATION_VERSION: gguf.GGUFValue(gguf.GGML_QUANT_VERSION, _Type.UINT32),
        _General.FILE_TYPE: gguf.GGUFValue(file_type.id, _Type.UINT32),
    }
    if file_type.default != KEPT:
        keys = {key: value for key, value in keys.items() if key not in _OF_CODES}
    if not by_quantizer:
        return {**keys, **anew}
    return {key: cut_at_nul(value) for key, value in keys.items() if key not in anew} | anew


def with_asked(
    path: Path, keys: Keys, name: str | None, size_label: str | None, experts_used: int | None
) -> dict[str, gguf.GGUFValue]:
    """The keys with what options of their own set, each in its place if it is there already."""
    asked = {_General.NAME: (name, _Type.STRING), _General.SIZE_LABEL: (size_label, _Type.STRING)}
    if experts_used is not None:
        model = ModelKeys(path, keys)
        if not (experts := expert_count(model)):
            raise UsageError(f"--experts-used {experts_used}: {path} is a dense model, it has no experts")
        if experts_used > experts:
            raise UsageError(f"--experts-used {experts_used}: {path} has {experts} experts")
        asked[model.model(_LLM.EXPERT_USED_COUNT)] = (experts_used, _Type.UINT32)
    return {**keys, **{key: gguf.GGUFValue(value, kind) for key, (value, kind) in asked.items() if value is not None}}


def cut_at_nul(value: gguf.GGUFValue) -> gguf.GGUFValue:
    """A key's value as llama.cpp's quantizer copies it: texts end at their first NUL."""
    if value.type is _Type.STRING:
        return gguf.GGUFValue(_cut(value.value), value.type)
    if value.type is _Type.ARRAY and value.sub_type in (None, _Type.STRING):
        elements = list(value.value)
        cut = [_cut(element) for element in elements]
        if any(new is not old for new, old in zip(cut, elements)):
            return gguf.GGUFValue(cut, value.type, value.sub_type)
    return value


def _cut(text: Any) -> Any:
    nul: Any = b"\0" if isinstance(text, bytes) else "\0"
    return text.split(nul, 1)[0] if isinstance(text, (str, bytes)) and nul in text else text


@dataclass(frozen=True)
class ModelKeys:
    """The keys of a file as a model's, with checked access; errors name file and key."""

    path: Path
    keys: Keys

    @property
    def architecture(self) -> str:
        """general.architecture, the prefix of the model's keys."""
        value = self.value(_General.ARCHITECTURE)
        if not isinstance(value, str) or not value:
            self.fail(_General.ARCHITECTURE, "the name of a model family")
        return value

    def value(self, key: str) -> Any:
        """The value, or None when the key is absent."""
        return self.keys[key].value if key in self.keys else None

    def model(self, template: str) -> str:
        """The name of one of the model's keys."""
        return template.format(arch=self.architecture)

    def fail(self, key: str, expected: str, remedy: str = "") -> NoReturn:
        """Raise GgufMoeError on the value of a key."""
        value = self.value(key)
        found = f"is an array of {len(value)}" if self.is_array(key) else f"is {value!r:.80}"
        found = found if key in self.keys else "is missing"
        raise GgufMoeError(f"{self.path}: {key} {found}, expected {expected}{remedy}")

    def is_array(self, key: str) -> bool:
        """Whether the key is there and has several values."""
        return key in self.keys and self.keys[key].type is _Type.ARRAY

    def integer(self, key: str, least: int, most: int, default: int | None = None, remedy: str = "") -> int:
        """An integer in [least, most]."""
        value = self.value(key) if key in self.keys else default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.fail(key, f"an integer from {least} to {most}", remedy)
        return value

    def per_layer(self, key: str, layers: int, default: list[int] | None = None) -> list[int]:
        """An integer for each layer: one for all of them, or an array."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        values = list(value) if self.is_array(key) and len(value) == layers else [value] * layers
        if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 31 for n in values):
            self.fail(key, f"an integer, or {layers} of them")
        return values


def recipe_facts(model: ModelKeys, mapped: list[MappedTensor], experts: int) -> RecipeFacts:
    """What the recipe asks of the model, after checking what keys and tensors say of each other."""
    layers = model.integer(model.model(_LLM.BLOCK_COUNT), 1, MAX_LAYERS)
    kinds = [category_of(tensor.name) for tensor in mapped]
    heads_key, kv_key = (
        model.model(key) for key in (gguf.Keys.Attention.HEAD_COUNT, gguf.Keys.Attention.HEAD_COUNT_KV)
    )
    heads = model.per_layer(heads_key, layers, [0] * layers)
    kv_heads = model.per_layer(kv_key, layers, heads)
    if "attn_v" in kinds and not any(heads):  # models without attention have no heads
        model.fail(heads_key, "a positive integer")
    for count, kv_count in zip(heads, kv_heads):
        if (count and kv_count and count % kv_count) or (kv_count == 0 and "attn_v" in kinds and not any(kv_heads)):
            model.fail(kv_key, f"a divisor of head_count, {count}")
    _check_numbers(model, experts)
    _check_stacks(model, mapped, experts)
    _check_layers(model, mapped, layers)
    return RecipeFacts(
        layers, experts, heads[0], kv_heads[0], "output" not in kinds, model.architecture, kinds.count("attn_v")
    )


def expert_count(model: ModelKeys) -> int:
    """How many experts the model has, 0 for a dense one."""
    return model.integer(model.model(_LLM.EXPERT_COUNT), 0, MAX_EXPERTS, default=0)


def _check_numbers(model: ModelKeys, experts: int) -> None:
    if experts:
        model.integer(model.model(_LLM.EXPERT_USED_COUNT), 1, experts, remedy="; --experts-used sets it")
    rope = model.model(gguf.Keys.Rope.DIMENSION_COUNT)
    if isinstance(model.value(rope), int) and model.value(rope) % 2:
        model.fail(rope, "an even integer")
    for key in (gguf.Keys.Attention.LAYERNORM_EPS, gguf.Keys.Attention.LAYERNORM_RMS_EPS):
        epsilon = model.value(model.model(key))
        if epsilon is not None and not (isinstance(epsilon, float) and 0 < epsilon < math.inf):
            model.fail(model.model(key), "a positive number", "; --override-kv sets it")


def _check_stacks(model: ModelKeys, mapped: list[MappedTensor], experts: int) -> None:
    for tensor in mapped:
        if _STACK.fullmatch(tensor.name) and (tensor.shape[0] if len(tensor.shape) > 2 else 1) != experts:
            key = model.model(_LLM.EXPERT_COUNT)
            model.fail(key, f"that of {tensor.name} of shape {list(tensor.shape)}")


def _check_layers(model: ModelKeys, mapped: list[MappedTensor], layers: int) -> None:
    for tensor in mapped:
        if tensor.layer is not None and tensor.layer >= layers:
            model.fail(model.model(_LLM.BLOCK_COUNT), f"more than the layer of tensor {tensor.name}")


def check_vocabulary(model: ModelKeys, mapped: list[MappedTensor]) -> None:
    """Refuse a vocabulary whose arrays, ids and embedding do not agree; llama.cpp would not run the file."""
    tokens = model.value(_Tokenizer.LIST)
    if tokens is None:
        return
    if not model.is_array(_Tokenizer.LIST) or model.keys[_Tokenizer.LIST].sub_type is not _Type.STRING:
        model.fail(_Tokenizer.LIST, "an array of texts")
    for key in (_Tokenizer.SCORES, _Tokenizer.TOKEN_TYPE):
        value = model.value(key)
        if value is not None and not (model.is_array(key) and len(value) == len(tokens)):
            model.fail(key, f"an array of {len(tokens)}, one for each token")
    kinds = model.value(_Tokenizer.TOKEN_TYPE)
    for number, (kind, token) in enumerate(zip(kinds or (), tokens)):
        if kind == gguf.TokenType.BYTE and not (isinstance(token, str) and _BYTE.fullmatch(token)):
            raise GgufMoeError(
                f"{model.path}: token {number} is of type byte, but {token!r:.80}; expected <0x00> to <0xFF>"
            )
    for key in model.keys:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            model.integer(key, 0, len(tokens) - 1, remedy="; --override-kv sets it")
    for tensor in mapped:
        if tensor.name == "token_embd.weight" and tensor.shape[0] != len(tokens):
            model.fail(_Tokenizer.LIST, f"{tensor.shape[0]}, a token for each row of {tensor.name}")
