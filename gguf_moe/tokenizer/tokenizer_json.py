"""`tokenizer.json`: what its two kinds, BPE with byte fallback and byte-level BPE, have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gguf_moe.errors import GgufMoeError
from gguf_moe.tokenizer.special import text_of
from gguf_moe.tokenizer.vocabulary import SPACE, check_text, token_id

DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2}, "gpt2": {"bos": 11, "eos": 11}}  # llama.cpp's, where a file has none
MAX_CROSSING = 256  # characters of an added token that is compared with others


class BpeFile:
    """A tokenizer.json with a BPE model, its parts checked against each other.

    `vocabulary` maps texts to ids, `merges` are pairs of texts in order of rank, `added` the entries of added tokens
    by id, `tokenizer` is the file as the tokenizers package reads it.
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        model = document.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if kind != "BPE" or not isinstance(model.get("vocab"), dict) or not model["vocab"]:
            raise GgufMoeError(f"{path}: tokenizer model is {kind!r}, expected 'BPE' with a vocabulary")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise GgufMoeError(f"{path}: {name} is {model[name]!r}; llama.cpp has nothing like it")
        self.path, self.document = path, document
        self.byte_fallback = bool(model.get("byte_fallback"))
        self.ignore_merges = bool(model.get("ignore_merges"))
        self.vocabulary: dict[str, int] = model["vocab"]
        self.texts = self._texts()
        self.merges = self._merges(model.get("merges") or [])
        self.added = self._added(document.get("added_tokens") or [])
        self.tokenizer = self._load()

    def steps(self, room: str) -> list[dict[str, Any]]:
        """The steps of the "normalizer" or "pre_tokenizer", sequences laid flat."""
        return _flat(self.document.get(room), {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[room])

    @property
    def byte_level(self) -> bool:
        """Whether texts become letters that stand for bytes before they are split."""
        return any(step.get("type") == "ByteLevel" for step in self.steps("normalizer") + self.steps("pre_tokenizer"))

    def _texts(self) -> dict[int, str]:
        texts: dict[int, str] = {}
        for text, value in self.vocabulary.items():
            i = token_id(self.path, value)
            if i in texts:
                raise GgufMoeError(f"{self.path}: tokens {texts[i]!r} and {text!r} have the same id {i}")
            check_text(self.path, i, text)
            texts[i] = text
        return texts

    def _merges(self, merges: list[Any]) -> list[tuple[str, str]]:
        """A merge is a pair, or both parts in one string."""
        pairs = []
        for rank, merge in enumerate(merges):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            problem = None
            if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
                problem = "expected a pair of tokens"
            elif unknown := next((text for text in (*parts, "".join(parts)) if text not in self.vocabulary), None):
                problem = f"but no token has the text {unknown[:80]!r}"
            if problem:
                raise GgufMoeError(f"{self.path}: merge {rank} is {repr(merge)[:80]}, {problem}")
            pairs.append((parts[0], parts[1]))
        return pairs

    def _added(self, entries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        added: dict[int, dict[str, Any]] = {}
        for entry in entries:
            text, i = entry["content"], token_id(self.path, entry["id"])
            other = added[i]["content"] if i in added else self.texts.get(i, text)
            if other != text:
                raise GgufMoeError(f"{self.path}: added token {text!r} has the id {i} of {other!r}")
            if self.vocabulary.get(text, i) != i:
                other_id = self.vocabulary[text]
                raise GgufMoeError(f"{self.path}: tokens {other_id}, {i} have the same text {text!r}")
            check_text(self.path, i, text)
            added[i] = entry
        return dict(sorted(added.items()))

    def _load(self) -> Tokenizer:
        """The tokenizers package's reading; it numbers added tokens itself, so ids have to be compared."""
        _check_post_processor(self.path, self.document)
        try:
            tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises no narrower type
            reason = " ".join(str(error).split())
            raise GgufMoeError(f"{self.path}: the tokenizers package cannot read it: {reason}") from None
        for i, entry in self.added.items():
            text = entry["content"]
            if text and (given := tokenizer.token_to_id(text)) != i:
                raise GgufMoeError(
                    f"{self.path}: added token {text!r} has the id {i}, but the tokenizers package gives it the next "
                    f"free one, {given}; save the tokenizer anew with transformers"
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def named_specials(settings: dict[str, Any]) -> set[str]:
    """Texts that tokenizer_config.json names as special: every `..._token`, and the lists of further ones."""
    named = {text_of(value) for key, value in settings.items() if key.endswith("_token")}
    for key in ("extra_special_tokens", "additional_special_tokens"):
        value = settings.get(key) or []
        named.update(map(text_of, value.values() if isinstance(value, dict) else value))
    return {text for text in named if text}


def unlike_added(file: BpeFile) -> list[str]:
    """Notes on added tokens that llama.cpp finds in other places of a text than the tokenizers package."""
    notes = []
    stripping = [
        e["content"] for e in file.added.values() if any(e.get(k) for k in ("lstrip", "rstrip", "single_word"))
    ]
    if stripping:
        notes.append(
            f"{file.path}: {len(stripping)} added tokens take the spaces beside them or stand as whole words only "
            f"({stripping[0]!r}, ...); llama.cpp does neither"
        )
    if shifted := _shifted(file):
        notes.append(
            f"{file.path}: {len(shifted)} added tokens are found in the normalized text ({shifted[0]!r}, ...), by "
            f"llama.cpp in the text as it is"
        )
    if crossing := _crossing([entry["content"] for entry in file.added.values()]):
        notes.append(
            f"{file.path}: {len(crossing)} added tokens can begin inside shorter ones ({crossing[0]!r}, ...); where "
            f"both fit, the tokenizer takes the first, llama.cpp the longest"
        )
    return notes


def _shifted(file: BpeFile) -> list[str]:
    """Texts of added tokens that are looked for in another form; spaces made visible are the same form."""
    normalizer = file.tokenizer.normalizer
    texts = [entry["content"] for entry in file.added.values() if normalizer and entry.get("normalized")]
    return [text for text in texts if normalizer.normalize_str(text) not in (text, text.replace(" ", SPACE))]


def _crossing(texts: list[str]) -> list[str]:
    """The texts that begin as another one, no longer than they, ends."""
    texts = [text for text in texts if len(text) < MAX_CROSSING]
    shortest: dict[str, str] = {}  # proper ending -> the shortest text with it
    for text in sorted(texts, key=len):
        for i in range(1, len(text)):
            shortest.setdefault(text[i:], text)

    def crosses(text: str) -> bool:
        others = (shortest.get(text[:i], text) for i in range(1, len(text)))
        return any(other != text and len(other) <= len(text) for other in others)

    return [text for text in texts if crosses(text)]


def unlike_ends(file: BpeFile, ids: dict[str, int], added: dict[str, bool]) -> list[str]:
    """A note if the post-processor puts other tokens around a text than the ids and flags make llama.cpp put."""
    known = (DEFAULT_IDS["gpt2"] if file.byte_level else DEFAULT_IDS["llama"]) | ids
    plain = file.tokenizer.encode("a", add_special_tokens=False).ids
    theirs = file.tokenizer.encode("a").ids
    ours = [known["bos"]] * added.get("bos", False) + plain + [known["eos"]] * added.get("eos", False)
    return [] if theirs == ours else [f"{file.path}: the post-processor makes {theirs} of 'a', llama.cpp {ours}"]


def _check_post_processor(path: Path, document: dict[str, Any]) -> None:
    """The tokenizers package panics on a template that names a token without giving its ids."""
    post = document.get("post_processor") or {}
    for processor in post.get("processors", [post]):
        items = [*(processor.get("single") or []), *(processor.get("pair") or [])]
        for item in items if processor.get("type") == "TemplateProcessing" else []:
            name = item.get("SpecialToken", {}).get("id")
            if name is not None and name not in processor["special_tokens"]:
                raise GgufMoeError(f"{path}: the post-processor's template names {name!r} without giving its ids")


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return [one for part in step[inner] for one in _flat(part, inner)] if step.get("type") == "Sequence" else [step]
