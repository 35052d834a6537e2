"""Which type each tensor gets: llama.cpp's file types as tables and one pure function.

The rules are those of `llama_tensor_get_type` in llama.cpp's quantizer, for the architectures in `gguf_moe.arch` and
without an importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from gguf_moe.errors import UsageError
from quant import FORMATS


@dataclass(frozen=True)
class FileType:
    """A level of the ladder: its name, its number in general.file_type, and the type of most tensors."""

    name: str
    id: int
    default: str

    @property
    def quantized(self) -> bool:
        """Whether llama.cpp makes it with its quantizer rather than with its converter."""
        return self.default not in ("F32", "F16", "BF16")


def _file_type(name: str, default: str | None = None) -> FileType:
    member = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    return FileType(name, int(gguf.LlamaFileType[member]), default or name)


FILE_TYPES: dict[str, FileType] = {
    t.name: t
    for t in (
        _file_type("Q2_K"),
        _file_type("Q2_K_S", "Q2_K"),
        _file_type("Q3_K_S", "Q3_K"),
        _file_type("Q3_K_M", "Q3_K"),
        _file_type("Q3_K_L", "Q3_K"),
        _file_type("IQ4_XS"),
        _file_type("IQ4_NL"),
        _file_type("Q4_0"),
        _file_type("Q4_1"),
        _file_type("Q4_K_S", "Q4_K"),
        _file_type("Q4_K_M", "Q4_K"),
        _file_type("Q5_0"),
        _file_type("Q5_1"),
        _file_type("Q5_K_S", "Q5_K"),
        _file_type("Q5_K_M", "Q5_K"),
        _file_type("Q6_K"),
        _file_type("Q8_0"),
        _file_type("F16"),
        _file_type("BF16"),
        _file_type("F32"),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
BITS = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0", 16: "BF16"}

# Roles of tensors that are vectors, or too small and too important to quantize.
FLOAT32_ROLES = ("norm", "bias", "rope_freqs", "router", "shared_gate")

# Where a row is no multiple of the type's block, the type that llama.cpp takes instead; then F16.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


@dataclass(frozen=True)
class Rules:
    """What a user wants otherwise than the file type has it."""

    tensor_types: tuple[str, ...] = ()  # PATTERN=TYPE, the first match wins
    output: str | None = None
    token_embedding: str | None = None
    router: str | None = None
    pure: bool = False
    leave_output: bool = False


@dataclass(frozen=True)
class RecipeFacts:
    """What the rules ask of a model: its layers, experts and grouped-query ratio, and whether embeddings are tied."""

    layers: int
    experts: int
    heads: int
    kv_heads: int
    tied: bool
    architecture: str = "llama"

    @property
    def seventy(self) -> bool:
        """What llama.cpp takes for a 70B or 72B model, whose few attn_v heads it gives more bits."""
        if self.architecture == "llama":
            return self.experts != 8 and self.layers == 80 and self.heads != self.kv_heads
        return self.architecture == "qwen2" and self.layers == 80


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and the one the rules wanted where the row width forbade it."""

    type: str
    wanted: str

    @property
    def fell_back(self) -> bool:
        """Whether `type` is a replacement."""
        return self.type != self.wanted


def find_file_type(name: str) -> FileType:
    """The file type by its name in any case, aliases included; UsageError lists them all when there is none."""
    upper = name.upper()
    if (file_type := FILE_TYPES.get(ALIASES.get(upper, upper))) is None:
        raise UsageError(f"unknown quant {name!r}, expected one of {', '.join(FILE_TYPES)}")
    if file_type.name == "Q2_K_S":
        raise UsageError("Q2_K_S needs an importance matrix, which gguf-moe cannot take yet: choose Q2_K")
    return file_type


def choose_type(file_type: FileType, role: str, index: int, columns: int, facts: RecipeFacts) -> Choice:
    """The type of one tensor of `columns` columns.

    `index` is the position among the tensors of that role in the quantizer's order; for ffn_down of a model of two
    or more experts, the layer number. Norms, biases, routers and the like always stay F32.
    """
    if role in FLOAT32_ROLES:
        return Choice("F32", "F32")
    if not file_type.quantized:
        return Choice(file_type.default, file_type.default)
    wanted = _mixture(file_type, role, index, columns, facts) or file_type.default
    return Choice(_fit(wanted, columns), wanted)


def _fit(wanted: str, columns: int) -> str:
    for candidate in (wanted, FALLBACKS.get(wanted)):
        if candidate and columns % FORMATS[candidate].block_length == 0:
            return candidate
    return "F16"


def _mixture(file_type: FileType, role: str, index: int, columns: int, facts: RecipeFacts) -> str | None:
    """What the mix wants for this tensor where it is not the file type's default."""
    if role == "output" or (role == "token_embd" and facts.tied):
        whole_blocks = columns % FORMATS[file_type.default].block_length == 0
        return "Q6_K" if whole_blocks and file_type.name != "Q8_0" else "Q8_0"
    if role == "attn_v":
        return _attn_v(file_type, index, facts)
    if role == "attn_k":
        return "Q8_0" if facts.experts == 8 else None
    if role == "attn_output":
        eight, other = _ATTN_OUTPUT.get(file_type.name, (None, None))
        return eight if facts.experts == 8 else other
    if role == "ffn_down":
        return _ffn_down(file_type, index, facts.layers)
    return None


# file type -> (with 8 experts, otherwise)
_ATTN_OUTPUT: dict[str, tuple[str | None, str | None]] = {
    "Q2_K": ("Q5_K", "Q3_K"),
    "Q3_K_S": ("Q5_K", None),
    "Q3_K_M": ("Q5_K", "Q4_K"),
    "Q3_K_L": (None, "Q5_K"),
    "Q4_K_S": ("Q5_K", None),
    "Q4_K_M": ("Q5_K", None),
    "IQ4_NL": ("Q5_K", None),
    "IQ4_XS": ("Q5_K", None),
}


def _more_bits(index: int, count: int) -> bool:
    """The layers that the _M mixes spend more on: the first and last eighth, and every third between."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _attn_v(file_type: FileType, index: int, facts: RecipeFacts) -> str | None:
    wanted = None
    name = file_type.name
    if name == "Q2_K":
        wanted = "Q4_K" if facts.heads // facts.kv_heads >= 4 else "Q3_K"
    elif name == "Q2_K_S":
        wanted = "Q4_K" if facts.heads // facts.kv_heads >= 4 else None
    elif name == "Q3_K_M":
        wanted = "Q5_K" if index < 2 else "Q4_K"
    elif name == "Q3_K_L":
        wanted = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M"):
        wanted = "Q6_K" if _more_bits(index, facts.layers) else None
    elif name == "Q4_K_S":
        wanted = "Q5_K" if index < 4 else None
    elif name in ("IQ4_NL", "IQ4_XS"):
        wanted = "Q5_K" if facts.heads // facts.kv_heads >= 4 else None
    if facts.seventy and (wanted or file_type.default) in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    return "Q8_0" if facts.experts == 8 else wanted


def _ffn_down(file_type: FileType, index: int, layers: int) -> str | None:
    name = file_type.name
    if name == "Q2_K":
        return "Q3_K"
    if name == "Q2_K_S":
        return "Q4_K" if index < layers // 8 else None
    if name == "Q3_K_M":
        return "Q5_K" if index < layers // 16 else "Q4_K"
    if name == "Q3_K_L":
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(index, layers) else None
    if name in ("Q4_K_S", "IQ4_NL", "IQ4_XS"):
        return "Q5_K" if index < layers // 8 else None
    return None
