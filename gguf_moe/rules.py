"""What a user wants of tensor types otherwise than the file type has it: parsed, and applied tensor by tensor."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gguf_moe.errors import UsageError
from gguf_moe.recipe import FIXED_ROLES, KEPT, Choice, FileType, RecipeFacts, choose_type, fit
from quant import FORMATS

NEAR_NAMES = 4  # that an error suggests


@dataclass(frozen=True)
class Override:
    """The type of the tensors in whose name a regular expression is found, in all layers or in some."""

    pattern: re.Pattern[str]
    type: str
    layers: frozenset[int] | None = None
    text: str = ""  # what the user wrote, as the dry run shows it
    origin: str = ""  # where, as errors name it

    def matches(self, name: str, layer: int | None) -> bool:
        """Whether the rule speaks of this tensor."""
        return (self.layers is None or layer in self.layers) and self.pattern.search(name) is not None


@dataclass(frozen=True)
class Rules:
    """The user's rules, each type known to `quant.FORMATS`. Of the overrides the first that matches wins."""

    overrides: tuple[Override, ...] = ()
    output: str | None = None
    token_embedding: str | None = None
    router: str | None = None
    pure: bool = False
    leave_output: bool = False

    @property
    def retype(self) -> bool:
        """Whether a tensor may get a type that llama.cpp's converter, without its quantizer, would not give it."""
        return bool(self.overrides or self.output or self.token_embedding or self.router or self.leave_output)


def parse_type(name: str, origin: str) -> str:
    """A tensor type by its name in any case; UsageError listing them all when there is none."""
    if (upper := name.upper()) not in FORMATS:
        raise UsageError(f"{origin}: unknown tensor type {name!r}, expected one of {', '.join(FORMATS)}")
    return upper


def parse_pattern(pattern: str, origin: str) -> re.Pattern[str]:
    """A regular expression that is searched anywhere in a name, in any case; UsageError when it is none."""
    if not pattern:
        raise UsageError(f"{origin}: the pattern is empty, expected a regular expression on tensor names")
    try:
        return re.compile(pattern, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{origin}: {pattern!r} is no regular expression: {error}") from None


def parse_override(text: str) -> Override:
    """PATTERN=TYPE as an option has it; the last = separates, since patterns may hold one too."""
    origin = f"--tensor-type {text}"
    pattern, separator, kind = text.rpartition("=")
    if not separator:
        raise UsageError(f"{origin}: expected PATTERN=TYPE, as ffn_down_exps=Q6_K")
    return Override(parse_pattern(pattern, origin), parse_type(kind, origin), text=text, origin=origin)


class Chooser:
    """Gives each tensor its type, by the user's rules over those of the file type.

    Tensors are shown to it in the order in which llama.cpp's quantizer visits them, because its mixes count: which
    attn_v they give more bits, and in dense models which ffn_down, goes by how many they have decided before. What a
    rule has taken over does not count. With `keep`, what the quantizer does not touch keeps its source's type instead
    of being F32: its input may be anything, where the converter's output is known.
    """

    def __init__(self, file_type: FileType, facts: RecipeFacts, rules: Rules, *, keep: bool = False) -> None:
        self._file_type, self._facts, self._rules, self._keep = file_type, facts, rules, keep
        self._decided: Counter[str] = Counter()  # by the mix, of each role
        self._seen: Counter[str] = Counter()  # all, of each role
        self._used: set[Override] = set()
        self._names: dict[str, bool] = {}  # name -> whether its type may be chosen
        self._layers: set[int] = set()
        self._shadowed: set[Override] = set()

    def choose(self, name: str, role: str, layer: int | None, columns: int, source_type: str) -> Choice:
        """The type of one tensor; `source_type` is the one it has now.

        Raises UsageError where a type that has no fallback is wanted for rows that its block does not divide.
        """
        kept = (self._keep and role in FIXED_ROLES) or self._file_type.default == KEPT
        usual = Choice(source_type, source_type) if kept else self._mix(role, layer, columns, self._seen)
        self._seen[role] += 1
        self._names[name] = role not in FIXED_ROLES
        if layer is not None:
            self._layers.add(layer)
        if role in FIXED_ROLES or kept:
            router = self._rules.router if role == "router" else None
            return self._forced(router, "router-type", name, columns, usual) if router else usual
        matching = [override for override in self._rules.overrides if override.matches(name, layer)]
        if role == "output" and self._rules.leave_output:
            self._shadowed.update(matching)
            return Choice(source_type, source_type, "leave-output-tensor", usual.type)
        option, kind = self._option(role)
        if kind:
            self._shadowed.update(matching)
            return self._forced(kind, option, name, columns, usual)
        if matching:
            self._used.add(matching[0])
            self._shadowed.update(matching[1:])
            kind = matching[0].type
            return Choice(fit(kind, columns), kind, matching[0].text, usual.type)
        return self._unmatched(role, layer, columns, usual)

    def _option(self, role: str) -> tuple[str, str | None]:
        """The option that decides this tensor whatever the patterns say, and the type it wants."""
        if role == "output":
            return "output-tensor-type", self._rules.output
        return "token-embedding-type", self._rules.token_embedding if role == "token_embd" else None

    def _unmatched(self, role: str, layer: int | None, columns: int, usual: Choice) -> Choice:
        """The type of a tensor that neither an option of its own nor a pattern decides."""
        rules, default = self._rules, self._file_type.default
        if role == "token_embd" and self._facts.tied and rules.output:
            return Choice(fit(rules.output, columns), rules.output, "output-tensor-type (tied)", usual.type)
        if rules.pure and self._file_type.quantized:
            asked, choice = "pure", Choice(fit(default, columns), default)
        else:
            asked, choice = "place among the tensors left to the mix", self._mix(role, layer, columns, self._decided)
            self._decided[role] += 1
        return choice if choice == usual else replace(choice, asked=asked, usual=usual.type)

    def _mix(self, role: str, layer: int | None, columns: int, before: Counter[str]) -> Choice:
        by_layer = role == "ffn_down" and self._facts.experts > 1 and layer is not None
        index = layer if by_layer else before[role]
        return choose_type(self._file_type, role, index, columns, self._facts)

    def _forced(self, kind: str, option: str, name: str, columns: int, usual: Choice) -> Choice:
        block = FORMATS[kind].block_length
        if columns % block:
            raise UsageError(
                f"--{option}: {name} has rows of {columns} weights, which {kind}'s block of {block} does not divide"
            )
        return Choice(kind, kind, option, usual.type)

    def check(self) -> list[str]:
        """After the last tensor: UsageError for a rule that can do nothing, a warning for each that others overrule."""
        rules = self._rules
        if rules.leave_output and self._facts.tied:
            raise UsageError("--leave-output-tensor: the model has no output.weight, its embeddings are tied")
        if rules.router and not self._seen["router"]:
            raise UsageError("--router-type: the model has no router")
        count = max(self._layers, default=-1) + 1
        warnings = []
        for override in rules.overrides:
            if (last := max(override.layers or (0,))) >= count:
                raise UsageError(f"{override.origin}: layer {last} is named, but the model has {count} layers")
            if override in self._used:
                continue
            if override not in self._shadowed:
                self._refuse(override)
            warnings.append(f"{override.origin}: every tensor it matches is taken by an option or a rule before it")
        return warnings

    def _refuse(self, override: Override) -> None:
        """Say why an override found nothing."""
        found = [name for name in self._names if override.pattern.search(name)]
        if not found:
            raise UsageError(f"{override.origin}: matches no tensor; names are like {self._near(override.pattern)}")
        if not any(self._names[name] for name in found):
            raise UsageError(
                f"{override.origin}: matches only tensors that stay F32, as {found[0]}; routers take --router-type"
            )
        raise UsageError(f"{override.origin}: matches no tensor of these layers, but others, as {found[0]}")

    def _near(self, pattern: re.Pattern[str]) -> str:
        plain = {re.sub(r"^blk\.\d+\.|\.weight$", "", name): None for name in self._names}
        near = difflib.get_close_matches(re.sub(r"\W", "", pattern.pattern).lower(), plain, NEAR_NAMES, cutoff=0.4)
        return ", ".join(near or list(plain)[:NEAR_NAMES])


def merge(first: Rules, second: Rules) -> Rules:
    """Both sets of rules; where both speak of the same, the first wins. UsageError for a contradiction."""
    rules = Rules(
        first.overrides + second.overrides,
        first.output or second.output,
        first.token_embedding or second.token_embedding,
        first.router or second.router,
        first.pure or second.pure,
        first.leave_output or second.leave_output,
    )
    if rules.leave_output and rules.output:
        raise UsageError("--leave-output-tensor and --output-tensor-type contradict each other, give one")
    return rules


def parse_rules(
    tensor_types: Sequence[str] = (),
    output: str | None = None,
    token_embedding: str | None = None,
    router: str | None = None,
    pure: bool = False,
    leave_output: bool = False,
) -> Rules:
    """Rules from the texts of the options."""

    def kind(name: str | None, option: str) -> str | None:
        return None if name is None else parse_type(name, f"--{option}")

    return Rules(
        tuple(parse_override(text) for text in tensor_types),
        kind(output, "output-tensor-type"),
        kind(token_embedding, "token-embedding-type"),
        kind(router, "router-type"),
        pure,
        leave_output,
    )
