"""Which type each tensor gets: llama.cpp's file types as tables and one pure function.

The rules are those of `llama_tensor_get_type` in llama.cpp's quantizer, for all architectures but falcon.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

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

KEPT = "kept"  # the role of a tensor that keeps the type that it has; as a file type's default, all do
# Tensors of these roles stay F32, whatever the file type; from a GGUF file, what they are.
FIXED_ROLES = ("router", KEPT)

# Where a row is no multiple of the type's block, the type that llama.cpp takes instead; then F16.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


@dataclass(frozen=True)
class RecipeFacts:
    """What the rules ask of a model: its layers, experts and heads (of the first layer), whether embeddings are tied,
    its architecture, how many attn_v tensors it has where that is not one a layer; and whether there is an importance
    matrix."""

    layers: int
    experts: int
    heads: int
    kv_heads: int
    tied: bool
    architecture: str = "llama"
    attn_v: int | None = None
    imatrix: bool = False

    @property
    def seventy(self) -> bool:
        """The shape of a 70B model, whose few attn_v heads llama.cpp gives more bits (its LLM_TYPE_70B)."""
        if self.architecture in ("llama", "llama-embed"):
            return self.experts != 8 and self.layers == 80 and self.heads != self.kv_heads
        return self.layers == {"qwen2": 80, "qwen2vl": 80, "deci": 80, "jais2": 68}.get(self.architecture)

    @property
    def grouped(self) -> bool:
        """Whether four query heads or more share a key head."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4


@dataclass(frozen=True)
class Choice:
    """The type of a tensor, and the one the rules wanted where the row width forbade it.

    Where the user's rules decided: `asked`, which of them, and `usual`, the type it would have had without.
    """

    type: str
    wanted: str
    asked: str = ""
    usual: str = ""

    @property
    def fell_back(self) -> bool:
        """Whether `type` is a replacement."""
        return self.type != self.wanted


# What llama.cpp's quantizer never touches although it is a matrix: parts of names (`tensor_allows_quantization`).
_KEPT_PARTS = (
    "_norm.weight",
    *("ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *("time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight"),
    *("time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight"),
    *("time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight"),
    *("time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight"),
    *("time_mix_lerp_fused.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos"),
    *(".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
# Categories by the first part of a name that fits (`tensor_get_category`); all attn_v-like tensors share their rules.
_CATEGORY_PARTS = {
    "attn_qkv.weight": "attn_v",
    "attn_kv_b.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}


def quantizer_order(name: str) -> tuple[int, bytes]:
    """Sorts GGUF names as llama.cpp's quantizer writes tensors: what belongs to no layer (-1) first, then layer by
    layer, each by name."""
    match = re.match(r"blk\.(\d+)", name, re.ASCII)
    return int(match[1]) if match else -1, name.encode()


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """What the rules take a tensor for, by its GGUF name and row-major shape: a router, `KEPT`, or its category."""
    if name.endswith("ffn_gate_inp.weight"):
        return "router"
    return KEPT if _is_kept(name, shape) else category_of(name)


def category_of(name: str) -> str:
    """The part that a tensor has in the model, as llama.cpp's quantizer tells it by the name; or "other"."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((category for part, category in _CATEGORY_PARTS.items() if part in name), "other")


def _is_kept(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's quantizer leaves a tensor in the type that it has: what is no matrix, and some that are."""
    if math.prod(shape[:-1]) == 1 or not name.endswith("weight"):  # to it, outer dimensions of 1 are none
        return True
    return name in _KEPT_NAMES or any(part in name for part in _KEPT_PARTS)


def file_type_name(number: Any) -> str | None:
    """llama.cpp's name of a number in general.file_type, whether gguf-moe makes that type or not; None without."""
    try:
        return gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return None


def find_file_type(name: str) -> FileType:
    """The file type by its name in any case, aliases included; UsageError lists them all when there is none."""
    upper = name.upper()
    if (file_type := FILE_TYPES.get(ALIASES.get(upper, upper))) is None:
        raise UsageError(f"unknown quant {name!r}, expected one of {', '.join(FILE_TYPES)}")
    return file_type


def choose_type(file_type: FileType, role: str, index: int, columns: int, facts: RecipeFacts) -> Choice:
    """The type of one tensor of `columns` columns.

    `index` is the position among the tensors of that role in the quantizer's order; for ffn_down of a model of two
    or more experts, the layer number. Norms, biases, routers and the like always stay F32.
    """
    if role in FIXED_ROLES:
        return Choice("F32", "F32")
    if not file_type.quantized:
        return Choice(file_type.default, file_type.default)
    wanted = _mixture(file_type, role, index, columns, facts) or file_type.default
    return Choice(fit(wanted, columns), wanted)


def fit(wanted: str, columns: int) -> str:
    """The wanted type where its block divides a row of `columns` weights, else what llama.cpp takes instead."""
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
        return _ffn_down(file_type, index, facts)
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
        wanted = "Q4_K" if facts.grouped else "Q3_K"
    elif name == "Q2_K_S":
        wanted = "Q4_K" if facts.grouped else None
    elif name == "Q3_K_M":
        wanted = "Q5_K" if index < 2 else "Q4_K"
    elif name == "Q3_K_L":
        wanted = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M"):
        wanted = "Q6_K" if _more_bits(index, facts.layers if facts.attn_v is None else facts.attn_v) else None
    elif name == "Q4_K_S":
        wanted = "Q5_K" if index < 4 else None
    elif name in ("IQ4_NL", "IQ4_XS"):
        wanted = "Q5_K" if facts.grouped else None
    if facts.seventy and (wanted or file_type.default) in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    return "Q8_0" if facts.experts == 8 else wanted


def _ffn_down(file_type: FileType, index: int, facts: RecipeFacts) -> str | None:
    name, layers = file_type.name, facts.layers
    first_eighth = index < layers // 8
    if name == "Q2_K":
        return "Q3_K"
    if name == "Q2_K_S":
        return "Q4_K" if first_eighth else None
    if name == "Q3_K_M":
        return "Q5_K" if index < layers // 16 else "Q4_K"
    if name == "Q3_K_L":
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(index, layers) else None
    if name == "Q4_K_S" or (name in ("IQ4_NL", "IQ4_XS") and not facts.imatrix):
        return "Q5_K" if first_eighth else None
    if name in ("Q4_0", "Q5_0") and facts.imatrix:
        return f"{name[:-1]}1" if first_eighth else None
    return None
