"""What a user asks of an output beside its file type. Values only: each is checked by the room that carries it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf

from gguf_moe.rules import Rules
from gguf_moe.sharding import Splitting


@dataclass(frozen=True)
class Request:
    """Wishes of a conversion; the defaults wish for what llama.cpp would do."""

    rules: Rules = field(default_factory=Rules)  # types of tensors
    strict: bool = False  # refuse fallbacks for the width of rows
    experts_used: int | None = None  # experts of a token, instead of the config's
    pre: str | None = None  # name of the pre-tokenizer, for a byte-level BPE that llama.cpp's table does not know
    chat_template: str | None = None  # path of a file, or "none"
    override_kv: tuple[str, ...] = ()  # KEY=TYPE:VALUE
    metadata: Path | None = None  # JSON of general.* keys
    name: str | None = None
    size_label: str | None = None
    allow_requantize: bool = False
    imatrix: Path | None = None  # importance matrix
    splitting: Splitting | None = None  # into shards
    keys: dict[str, gguf.GGUFValue] = field(default_factory=dict)  # of the method that quantizes
