"""From the tensors of a checkpoint to the tensors of a GGUF file: names, stacks, row order. Reads no weight.

Every target tensor is a list of slabs, each a range of rows of one source matrix. That covers plain copies, experts
stacked from many files, and experts cut out of fused tensors alike; whoever reads rows needs to know nothing else.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from gguf_moe.arch import Architecture, Fused, ModelFacts, Template
from gguf_moe.checkpoint import Checkpoint, ComputedTensor, SourceTensor
from gguf_moe.errors import GgufMoeError
from gguf_moe.recipe import role_of

LISTED_NAMES = 8  # how many absent names an error spells out


@dataclass(frozen=True)
class Slab:
    """`rows` rows of a source matrix, from `first_row`; with `rotary_heads`, in rotary order.

    importance: how much each column matters when the rows are quantized, float32 [columns].
    """

    source: SourceTensor
    first_row: int
    rows: int
    rotary_heads: int | None = None
    importance: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its rows in the source."""
        return self.rows * self.source.row_bytes

    def read(self, matrix: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the slab out of its source's mapped `matrix`: a view, or a copy when reordered.

        Rotary order: the checkpoint holds the two halves of each head one below the other, llama.cpp wants their
        rows in turn: row 2r + s of a head is row s * size/2 + r of it (`LlamaModel.permute` of llama.cpp's converter).
        """
        if self.rotary_heads is None:
            return matrix[self.first_row + start : self.first_row + stop]
        return matrix[[self.source_row(row) for row in range(start, stop)]]

    def source_row(self, row: int) -> int:
        """The row of the source matrix that row `row` of the slab is."""
        if self.rotary_heads is None:
            return self.first_row + row
        size = self.rows // self.rotary_heads
        head, inside = divmod(row, size)
        return self.first_row + head * size + inside % 2 * (size // 2) + inside // 2


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of the output, before its type is chosen. `shape` is row-major: [experts,] rows, columns."""

    name: str
    layer: int | None
    shape: tuple[int, ...]
    slabs: tuple[Slab, ...]

    @property
    def role(self) -> str:
        """What the rules for types take it for."""
        return role_of(self.name, self.shape)

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its rows in the source."""
        return sum(slab.nbytes for slab in self.slabs)


@dataclass(frozen=True)
class _Part:
    """One source under the name that its template has: what llama.cpp's converter sees after unfusing."""

    name: str
    template: Template
    layer: int | None
    expert: int | None
    slab: Slab


def map_tensors(checkpoint: Checkpoint, architecture: Architecture, facts: ModelFacts) -> list[MappedTensor]:
    """The output's tensors in the order in which llama.cpp's converter writes them.

    That is: what is computed, then files by name, names inside a file in code point order (after unfusing), a stack
    of experts where the last of its layer's expert matrices is met. Raises GgufMoeError naming whatever is absent,
    unknown or misshapen.
    """
    by_file = [list(_parts(tensors, architecture, facts, checkpoint)) for tensors in checkpoint.files.values()]
    _check_complete([part for parts in by_file for part in parts], architecture, facts, checkpoint)
    _check_one_layout(checkpoint, architecture)
    if architecture.needs_output:
        _add_output(by_file, architecture)
    stacked = [template for template in architecture.templates if template.stacked]
    stacks: dict[int, dict[tuple[str, int], Slab]] = {}
    mapped = _computed(checkpoint, facts)
    for parts in by_file:
        for part in sorted(parts, key=lambda p: p.name):
            if part.expert is None:
                mapped.append(_mapped(part.template, part.layer, [part.slab]))
                continue
            stack = stacks.setdefault(part.layer, {})
            stack[part.template.source, part.expert] = part.slab
            if len(stack) == len(stacked) * facts.experts:
                for template in stacked:
                    slabs = [stack[template.source, expert] for expert in range(facts.experts)]
                    mapped.append(_mapped(template, part.layer, slabs))
    return mapped


def _computed(checkpoint: Checkpoint, facts: ModelFacts) -> list[MappedTensor]:
    """The tensors that follow from the config alone."""
    divisors = facts.rope.frequency_divisors(facts.head_size)
    if divisors is None:
        return []
    name = "rope_freqs.weight"
    source = ComputedTensor(name, "F32", divisors.shape, checkpoint.config.path, 0, values=divisors)
    return [MappedTensor(name, None, divisors.shape, (Slab(source, 0, 1),))]


def _add_output(by_file: list[list[_Part]], architecture: Architecture) -> None:
    """Where the output is tied to the embedding but llama.cpp wants both: the embedding once more, as the output."""
    embedding, output = (
        next(t for t in architecture.templates if t.target == name) for name in ("token_embd.weight", "output.weight")
    )
    if any(part.template is output for parts in by_file for part in parts):
        return
    for parts in by_file:
        slabs = [part.slab for part in parts if part.template is embedding]
        parts += [_Part(output.source, output, None, None, slab) for slab in slabs]


def _mapped(template: Template, layer: int | None, slabs: list[Slab]) -> MappedTensor:
    source = slabs[0].source
    shape: tuple[int, ...] = (slabs[0].rows, source.columns)
    if template.stacked:
        shape = (len(slabs), *shape)
    elif len(template.shape) == 1:
        shape = (slabs[0].rows * source.columns,)
    return MappedTensor(template.target.format(layer=layer), layer, shape, tuple(slabs))


def _pattern(source: str) -> re.Pattern[str]:
    pattern = re.escape(source).replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d{0,5})")
    return re.compile(pattern.replace(r"\{expert\}", r"(?P<expert>0|[1-9]\d{0,5})"), re.ASCII)


def _parts(
    tensors: list[SourceTensor], architecture: Architecture, facts: ModelFacts, checkpoint: Checkpoint
) -> Iterator[_Part]:
    """The parts that the tensors of one file make, each checked for name, numbers and shape."""
    templates = {t.source: t for t in architecture.templates}
    known: list[tuple[re.Pattern[str], Template | Fused]] = [(_pattern(s), t) for s, t in templates.items()]
    known += [(_pattern(alias), templates[source]) for alias, source in architecture.aliases]
    known += [(_pattern(fused.source), fused) for fused in architecture.fused]
    for tensor in tensors:
        if tensor.name.endswith(architecture.ignored):
            continue
        found = next(((m, kind) for p, kind in known if (m := p.fullmatch(tensor.name))), None)
        if found is None:
            raise GgufMoeError(f"{tensor.file}: tensor {tensor.name} is unknown to architecture {architecture.name}")
        match, kind = found
        numbers = {key: int(value) for key, value in match.groupdict().items()}
        _check_numbers(tensor, numbers, facts, checkpoint)
        if isinstance(kind, Fused):
            yield from _unfuse(tensor, kind, numbers["layer"], templates, facts)
        else:
            _check_layer(tensor, kind, numbers.get("layer"), facts)
            _check_shape(tensor, tuple(facts.size(name) for name in kind.shape))
            if kind.rotary and len(tensor.shape) == 1:  # a bias, whose elements are reordered as rows are
                tensor = replace(tensor, shape=(*tensor.shape, 1))
            slab = Slab(tensor, 0, tensor.shape[0] if len(tensor.shape) > 1 else 1, _heads(kind, facts))
            name = kind.source.format(**numbers)
            yield _Part(name, kind, numbers.get("layer"), numbers.get("expert"), slab)


def _unfuse(
    tensor: SourceTensor, fused: Fused, layer: int, templates: dict[str, Template], facts: ModelFacts
) -> Iterator[_Part]:
    """The expert matrices inside a fused tensor [experts, rows of all parts, columns], as slabs of its rows."""
    _check_layer(tensor, templates[fused.parts[0]], layer, facts)
    shapes = [tuple(facts.size(name) for name in templates[part].shape) for part in fused.parts]
    rows = sum(shape[0] for shape in shapes)
    _check_shape(tensor, (facts.experts, rows, shapes[0][1]))
    for expert in range(facts.experts):
        first = expert * rows
        for part, shape in zip(fused.parts, shapes):
            template = templates[part]
            slab = Slab(tensor, first, shape[0], _heads(template, facts))
            yield _Part(part.format(layer=layer, expert=expert), template, layer, expert, slab)
            first += shape[0]


def _heads(template: Template, facts: ModelFacts) -> int | None:
    return facts.size(template.rotary) if template.rotary else None


def _check_numbers(tensor: SourceTensor, numbers: dict[str, int], facts: ModelFacts, checkpoint: Checkpoint) -> None:
    for kind, key, count in (
        ("layer", "num_hidden_layers", facts.layers),
        ("expert", facts.experts_key, facts.experts),
    ):
        if kind in numbers and numbers[kind] >= count:
            raise GgufMoeError(
                f"{tensor.file}: tensor {tensor.name} is of {kind} {numbers[kind]}, "
                f"but {checkpoint.config.path.name} says {key} = {count}"
            )


def _check_layer(tensor: SourceTensor, template: Template, layer: int | None, facts: ModelFacts) -> None:
    if layer is not None and layer not in template.layers(facts):
        raise GgufMoeError(
            f"{tensor.file}: tensor {tensor.name} does not belong in layer {layer}: config.json says that the first "
            f"{facts.dense_layers} layers are dense and the others have experts"
        )


def _check_shape(tensor: SourceTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise GgufMoeError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)} "
            f"by config.json"
        )


def _check_complete(parts: list[_Part], architecture: Architecture, facts: ModelFacts, checkpoint: Checkpoint) -> None:
    """Every required tensor once, others in all layers or in none; the error lists what is absent."""
    counts = Counter(part.name for part in parts)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice:
        holders = sorted(p.slab.source.name for p in parts if p.name == twice)
        raise GgufMoeError(f"{checkpoint.directory}: tensor {twice} is there twice, as {' and '.join(holders)}")
    absent = []
    for template in architecture.templates:
        layers = template.layers(facts) if "{layer}" in template.source else [None]
        experts = range(facts.experts) if template.stacked else [None]
        names = [template.source.format(layer=layer, expert=expert) for layer in layers for expert in experts]
        missing = [name for name in names if name not in counts]
        if template.required or len(missing) < len(names):
            absent += missing
    if absent:
        raise GgufMoeError(
            f"{checkpoint.directory}: {absent_text(absent)} (config.json says "
            f"{facts.layers} layers{f' of {facts.experts} experts' if facts.experts else ''})"
        )


def absent_text(names: list[str]) -> str:
    """How an error tells of absent tensors: their number and the first of them."""
    listed = ", ".join(sorted(names)[:LISTED_NAMES])
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"{len(names)} tensors are absent: {listed}{more}"


def _check_one_layout(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Fused experts or one tensor an expert, not some of each: such a checkpoint was put together by accident."""
    names = [tensor.name for tensors in checkpoint.files.values() for tensor in tensors]

    def first(sources: list[str]) -> str | None:
        patterns = [_pattern(source) for source in sources]
        return next((name for name in names if any(p.fullmatch(name) for p in patterns)), None)

    fused = first([f.source for f in architecture.fused])
    single = first([t.source for t in architecture.templates if t.stacked])
    if fused and single:
        raise GgufMoeError(
            f"{checkpoint.directory}: two expert layouts are mixed, {fused} (fused) and {single} (one an expert)"
        )


def without_outer_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as llama.cpp's quantizer writes it."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
