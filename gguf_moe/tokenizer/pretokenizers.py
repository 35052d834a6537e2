"""How a byte-level BPE cuts a text into words before it joins bytes: llama.cpp knows the ways by name only."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable

from tokenizers import Regex, pre_tokenizers

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.tokenizer.pretokenizer_table import CHECK_TEXT, FAMILIES, GPT2, HASHES, IGNORING_MERGES, NAMES
from gguf_moe.tokenizer.tokenizer_json import BpeFile

MAX_PATTERN = 2000  # characters compared; those of known families have at most some 500


def find_pre(file: BpeFile, asked: str | None) -> tuple[str, list[str]]:
    """llama.cpp's name for the tokenizer's splitting of words, with notes; `asked` overrules what is recognised.

    Raises GgufMoeError for one that llama.cpp's converter does not know, naming the nearest, and UsageError for an
    `asked` that llama.cpp would not load.
    """
    if asked is not None and asked not in NAMES:
        near = sorted(difflib.get_close_matches(asked, NAMES)) or ["llama-bpe", "qwen2", "tekken"]
        raise UsageError(f"--pre {asked}: llama.cpp knows no such pre-tokenizer; it knows {', '.join(near)} and others")
    digest = check_hash(file)
    known = HASHES.get(digest)
    if asked is None and known is None:
        name, likeness = nearest(file)
        how = "it splits by the same pattern" if likeness == 1 else f"patterns {int(100 * likeness)} % alike"
        raise GgufMoeError(
            f"{file.path}: llama.cpp's table of pre-tokenizers has none with the hash {digest}; the nearest is {name} "
            f"({how}); where that is right, say --pre {name}"
        )
    name = asked or known
    notes = []
    if asked is not None and known not in (None, asked):
        notes.append(f"{file.path}: --pre {asked}, though llama.cpp's table has {known} for this tokenizer")
    if file.ignore_merges != (name in IGNORING_MERGES):
        doing = ("takes words that are tokens whole", "joins words by merges alone")
        ours, theirs = doing if file.ignore_merges else doing[::-1]
        better, likeness = nearest(file)
        remedy = f"; --pre {better} would be right" if asked is None and likeness == 1 and better != name else ""
        notes.append(f"{file.path}: the tokenizer {ours}, llama.cpp with {name} {theirs}{remedy}")
    return name, notes


def check_hash(file: BpeFile) -> str:
    """The SHA-256 of the ids that the whole tokenizer, special tokens included, gives to the check text."""
    return hashlib.sha256(str(file.tokenizer.encode(CHECK_TEXT).ids).encode()).hexdigest()


def nearest(file: BpeFile) -> tuple[str, float]:
    """The family whose patterns are most like the file's, and how alike they are, up to 1."""
    ours = "\n".join(_patterns(file))[:MAX_PATTERN]

    def likeness(name: str) -> tuple[float, bool]:
        ratio = difflib.SequenceMatcher(None, ours, "\n".join(FAMILIES[name]), autojunk=False).ratio()
        return ratio, file.ignore_merges == (name in IGNORING_MERGES)

    best = max(FAMILIES, key=likeness)
    return best, likeness(best)[0]


def _patterns(file: BpeFile) -> list[str]:
    """The pre-tokenizer's steps as patterns that cut a text at and around each match."""
    patterns = []
    for step in file.steps("pre_tokenizer"):
        kind = step.get("type")
        if kind == "Split":
            pattern = next(iter(step["pattern"].values()))
            patterns.append(pattern if step.get("behavior") == "Isolated" else f"{pattern} {step.get('behavior')}")
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind != "ByteLevel":
            patterns.append(str(kind))
        elif step.get("use_regex", True):
            patterns.append(GPT2)
    return patterns


def word_splitter(patterns: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """A pre-tokenizer that cuts at and around each match of the patterns in turn, then turns bytes to letters."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
