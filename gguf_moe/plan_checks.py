"""What speaks against a plan: tensors that cannot become what is asked, or only with a loss that has to be said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_reader import TENSOR_TYPES
from gguf_moe.imatrix import Imatrix
from gguf_moe.layout import TensorPlan
from gguf_moe.mapping import MappedTensor
from gguf_moe.recipe import FileType
from gguf_moe.request import Request
from quant import FORMATS


def refuse_fallbacks(tensors: Sequence[TensorPlan]) -> None:
    """Refuse types whose block does not divide a row, for --strict."""
    fallen = [t for t in tensors if t.choice.fell_back]
    if fallen:
        first, more = fallen[0], f" (and {len(fallen) - 1} more)" if len(fallen) > 1 else ""
        wanted, block = first.choice.wanted, FORMATS[first.choice.wanted].block_length
        raise GgufMoeError(
            f"--strict: {first.info.name}{more} has rows of {first.info.shape[-1]} weights, which {wanted}'s block of "
            f"{block} does not divide; it would fall back to {first.choice.type}"
        )


def check_one_type(tensor: MappedTensor) -> None:
    """Refuse to keep the types of experts that are to be one tensor where they differ."""
    types = sorted({slab.source.type for slab in tensor.slabs})
    if len(types) > 1:
        raise GgufMoeError(
            f"{tensor.slabs[0].source.file}: the experts of {tensor.name} are {' and '.join(types)}; give --bits or "
            "--quant to make them one type"
        )


def check_importance(tensors: Sequence[TensorPlan], file_type: FileType, imatrix: Imatrix | None) -> list[str]:
    """Warn of tensors that the importance matrix says nothing of. Refuse the file type that llama.cpp refuses then."""
    needed = file_type.name == "Q2_K_S"
    if imatrix is None and needed:
        raise UsageError("Q2_K_S needs an importance matrix: give --imatrix, or choose Q2_K")
    unused = ("Q8_0", *(name for name, form in FORMATS.items() if form.block_length == 1))
    bare = [
        t
        for t in tensors
        if t.info.type in FORMATS.keys() - unused
        and t.mapped.role not in ("output", "token_embd")
        and t.mapped.slabs[0].importance is None
    ]
    if imatrix is None or not bare:
        return []
    for tensor in bare:
        if needed and tensor.info.type == "Q2_K":
            raise GgufMoeError(f"{imatrix.path}: has nothing of {tensor.info.name}, which Q2_K_S needs; choose Q2_K")
    return [f"{imatrix.path}: has nothing of {len(bare)} tensors, as {bare[0].info.name}; they are quantized without"]


def check_decoding(tensors: Sequence[TensorPlan], request: Request) -> None:
    """Refuse to decode what is in blocks already, unless asked for, and what cannot be decoded."""
    for tensor in tensors:
        for source in (slab.source for slab in tensor.mapped.slabs):
            if source.stored in (None, tensor.info.type):
                continue
            where = f"{source.file}: tensor {source.name} is {source.stored}"
            if source.stored not in FORMATS:
                raise GgufMoeError(f"{where}, which gguf-moe cannot decode to {tensor.info.type}; convert the original")
            if not request.allow_requantize:
                raise GgufMoeError(
                    f"{where}, so quantized already; as {tensor.info.type} it would be worse than from the original: "
                    "convert that, or give --allow-requantize"
                )


def fallback_warning(tensors: Sequence[TensorPlan]) -> list[str]:
    """One line on all tensors whose rows the wanted type's block does not divide."""
    fallen = [t for t in tensors if t.choice.fell_back]
    if not fallen:
        return []
    elements = sum(t.mapped.elements for t in tensors)
    nominal = sum(t.mapped.elements * TENSOR_TYPES[t.choice.wanted].bits_per_weight for t in tensors) / elements
    effective = 8 * sum(t.info.nbytes for t in tensors) / elements
    changes = Counter(f"{t.choice.wanted} to {t.choice.type}" for t in fallen)
    listed = ", ".join(f"{change} ({count})" for change, count in changes.items())
    widths = ", ".join(str(w) for w in sorted({t.mapped.shape[-1] for t in fallen}))
    return [
        f"{len(fallen)} tensors have rows of {widths} weights, which their type's block does not divide, and fall "
        f"back as in llama.cpp: {listed}; {effective:.2f} instead of {nominal:.2f} bits per weight"
    ]
