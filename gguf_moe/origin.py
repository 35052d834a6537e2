"""What a GGUF file ought to be if it derives from a model: planned anew from that, and compared with the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gguf
import numpy as np

from gguf_moe.checkpoint import Checkpoint
from gguf_moe.encoding import encode
from gguf_moe.errors import GgufMoeError
from gguf_moe.gguf_file import ALIGNMENT, encode_header
from gguf_moe.gguf_reader import GgufFile, TensorInfo, read_gguf
from gguf_moe.gguf_source import GgufModel, shard_path, shard_place
from gguf_moe.layout import PlannedFile, TensorPlan, place
from gguf_moe.mapping import Slab
from gguf_moe.methods import KEY
from gguf_moe.methods.said import KEYS, Said, read_said
from gguf_moe.methods.store import chosen_tensors, embedding_weighed
from gguf_moe.plan import Plan, make_plan
from gguf_moe.recipe import FILE_TYPES, file_type_name
from gguf_moe.request import Request
from gguf_moe.sharding import COUNT, TENSORS, split_keys

LISTED = 5  # differences that are spelt out
_General = gguf.Keys.General
# The options that set a key; the others are set by --override-kv.
_OPTIONS = {_General.NAME: "--name", _General.SIZE_LABEL: "--size-label", gguf.Keys.Tokenizer.PRE: "--pre"}


@dataclass(frozen=True)
class Expected:
    """A file as it ought to be.

    said: by which method, if not ggml's own. chosen: the tensors whose codes it chose; they cannot be derived.
    """

    keys: Mapping[str, gguf.GGUFValue] = field(repr=False)
    planned: PlannedFile
    said: Said | None = None
    chosen: frozenset[str] = frozenset()

    def comparable(self, file: GgufFile) -> dict[str, TensorPlan]:
        """The tensors that the file has in the planned type and size, by name."""
        kinds = {tensor.name: (tensor.type, tensor.nbytes) for tensor in file.tensors}
        tensors = self.planned.tensors
        return {t.info.name: t for t in tensors if kinds.get(t.info.name) == (t.info.type, t.info.nbytes)}

    def header_differences(self, file: GgufFile) -> list[str]:
        """Where the file's header is another, the first few with found and expected; none if its bytes are the same."""
        header = _header(file)
        found = list(self.said.problems) if self.said else []
        if header != self.planned.header:
            found += [*self._keys(file), *self._tensors(file)] or [_first_byte(header, self.planned.header)]
        more = [f"{len(found) - LISTED} more differences of keys and tensors"] if len(found) > LISTED else []
        return found[:LISTED] + more

    def _keys(self, file: GgufFile) -> list[str]:
        differences = []
        for key in {**file.values, **self.keys}:
            found, expected = file.values.get(key), self.keys.get(key)
            if _packed(key, found) != _packed(key, expected):
                differences.append(f"key {key} {_difference(found, expected)}; {_remedy(key)}")
        return differences or _order("key", list(file.values), list(self.keys))

    def _tensors(self, file: GgufFile) -> list[str]:
        found = {tensor.name: tensor for tensor in file.tensors}
        expected = {tensor.info.name: tensor.info for tensor in self.planned.tensors}
        differences = []
        for name in {**found, **expected}:
            texts = [_tensor_text(tensors.get(name)) for tensors in (found, expected)]
            if texts[0] != texts[1]:
                remedy = "give the options on types that it was made with"
                differences.append(f"tensor {name} is {texts[0]}, expected {texts[1]}; {remedy}")
        return differences or _order("tensor", list(found), list(expected))


class Origin:
    """A model, and the wishes that files were made of it with. How they are split does not matter, it is seen."""

    def __init__(self, source: Checkpoint | GgufModel, request: Request) -> None:
        self._source, self._request = source, replace(request, splitting=None)
        self._plans: dict[Any, list[Plan]] = {}

    @property
    def name(self) -> str:
        """The path of the model."""
        return str(self._source.path if isinstance(self._source, GgufModel) else self._source.directory)

    def expected(self, file: GgufFile) -> Expected:
        """The file, or the shard, that a conversion to the same file type gives, by the method that the file names.

        Raises GgufMoeError when the file does not say what type it is, or names a method that is not known, and what
        `make_plan` raises.
        """
        number, count = shard_place(file)
        first = read_gguf(shard_path(file.path, 0)) if number else file  # which alone has the model's keys
        said = self._said(first)
        plans = self._plans_for(first.keys.get(_General.FILE_TYPE), said)
        candidates = [_expected(plan, file, number, count, said) for plan in plans]
        header = _header(file)
        return next((c for c in candidates if c.planned.header == header), candidates[0])

    def _said(self, file: GgufFile) -> Said | None:
        """What the file says of its method; nothing where it only has that from its source, with the codes."""
        inherited = self._source.keys if isinstance(self._source, GgufModel) else {}
        if KEY in inherited and all(_packed(k, inherited.get(k)) == _packed(k, file.values.get(k)) for k in KEYS):
            return None
        return read_said(file.values)

    def _plans_for(self, number: Any, said: Said | None) -> list[Plan]:
        """What gives files of this general.file_type: a GGUF source of the same may have been quantized or copied."""
        keys = said.keys if said else {}
        made_with = number, encode_header(keys, [])
        if made_with not in self._plans:
            file_types = [t for t in FILE_TYPES.values() if t.id == number]
            if isinstance(self._source, GgufModel) and self._source.kept_file_type.id == number:
                file_types.append(None)
            if not file_types:
                name = file_type_name(number) or "an unknown type"
                found = "is missing" if number is None else f"is {number!r:.80}, {name}"
                raise GgufMoeError(f"general.file_type {found}, expected one that gguf-moe makes of {self.name}")
            plans = self._made(file_types, replace(self._request, keys=keys))
            self._plans[made_with] = [embedding_weighed(plan) for plan in plans] if said else plans
        return self._plans[made_with]

    def _made(self, file_types: list[Any], request: Request) -> list[Plan]:
        plans, errors = [], []
        for file_type in file_types:
            try:
                plans.append(make_plan(self._source, file_type, request))
            except GgufMoeError as error:
                errors.append(error)
        if not plans:
            raise errors[0]
        return plans


def _expected(plan: Plan, file: GgufFile, number: int, count: int, said: Said | None) -> Expected:
    """The whole plan, or the shard of it that begins with the file's first tensor and has as many."""
    chosen = frozenset(tensor.info.name for tensor in chosen_tensors(plan)) if said else frozenset()
    if count == 1:
        return Expected(plan.keys, plan.files[0], said, chosen)
    places = {tensor.info.name: i for i, tensor in enumerate(plan.tensors)}
    start = next((max(0, places[t.name] - i) for i, t in enumerate(file.tensors) if t.name in places), 0)
    # llama.cpp's tools order these two keys in either way.
    by_converter = [key for key in file.values if key in (COUNT, TENSORS)] == [COUNT, TENSORS]
    labels = split_keys(number, count, len(plan.tensors), by_converter=by_converter)
    keys = {**(plan.keys if number == 0 else {}), **labels}
    return Expected(keys, place(plan.tensors[start : start + len(file.tensors)], keys), said, chosen)


def data_difference(data: np.ndarray, slab: Slab, start: int, stop: int, kind: str) -> tuple[int, int] | None:
    """Compare bytes of a file with rows [start, stop) of a slab in the type `kind`: the number of the first byte that
    differs, and what it ought to be. None when all are the same.

    Raises GgufMoeError for rows that cannot be encoded.
    """
    expected = encode(slab, start, stop, (kind,))[kind].reshape(-1).view(np.uint8)
    different = expected != data
    if not different.any():
        return None
    first = int(np.argmax(different))
    return first, int(expected[first])


def _header(file: GgufFile) -> bytes:
    """With its padding, of which there is no more than this where the alignment is the planned one."""
    with file.path.open("rb") as opened:
        return opened.read(min(file.data_start, file.header_end + ALIGNMENT))


def _first_byte(found: bytes, expected: bytes) -> str:
    """For what no key and no tensor shows: the version, padding, a true that is no 1."""
    at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
    texts = [header[at : at + 1].hex() or "missing" for header in (found, expected)]
    return f"byte {at} of the header is {texts[0]}, expected {texts[1]}"


def _order(what: str, found: list[str], expected: list[str]) -> list[str]:
    wrong = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), None)
    return [] if wrong is None else [f"{what} {wrong} is {found[wrong]}, expected {expected[wrong]}: another order"]


def _remedy(key: str) -> str:
    if key.startswith(gguf.Keys.Tokenizer.CHAT_TEMPLATE):
        option = "--chat-template"
    elif key.endswith(".expert_used_count"):
        option = "--experts-used"
    else:
        option = _OPTIONS.get(key, "--metadata or --override-kv" if key.startswith("general.") else "--override-kv")
    return f"give {option} as it was made with"


def _packed(key: str, value: gguf.GGUFValue | None) -> bytes:
    """A key with its value as a file has them; no bytes where it is missing."""
    return encode_header({key: value}, []) if value is not None else b""


def _difference(found: gguf.GGUFValue | None, expected: gguf.GGUFValue | None) -> str:
    if found is not None and expected is not None and found.type is expected.type is gguf.GGUFValueType.ARRAY:
        values, wanted = list(map(_plain, found.value)), list(map(_plain, expected.value))
        if len(values) == len(wanted):
            for i, (a, b) in enumerate(zip(values, wanted)):
                if a != b:
                    return f"has element {i} {a!r:.60}, expected {b!r:.60}"
    return f"is {_value_text(found)}, expected {_value_text(expected)}"


def _value_text(value: gguf.GGUFValue | None) -> str:
    if value is None:
        return "missing"
    text = f"{len(value.value)} elements" if value.type is gguf.GGUFValueType.ARRAY else f"{_plain(value.value)!r:.60}"
    return f"{text} ({value.type.name})"


def _plain(value: Any) -> Any:
    """A value as a file gives it back: floats of 32 bits, text."""
    if isinstance(value, float):
        return float(np.float32(value))
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def _tensor_text(tensor: TensorInfo | None) -> str:
    return f"{tensor.type} {list(tensor.shape)}" if tensor else "missing"
