"""What a model card shows: the files, the experts, the model, how to run it and how it was made, as Markdown.

Names come from configurations and other people's model cards. So every one of them is escaped where it is put.
"""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import gguf

from gguf_moe.donors import Donor
from gguf_moe.manifest import Level, Manifest
from gguf_moe.naming import is_repo_id
from gguf_moe.report import printable, size_text

HUB = "https://huggingface.co/"
USUAL = "Q4_K_M"  # the level that the commands show, where there is one
WHEN = {
    "Q2_K": "The smallest, with a loss that shows; where nothing larger fits.",
    "Q2_K_S": "Smaller than Q2_K and worse.",
    "Q3_K_S": "For very little memory; the loss shows.",
    "Q3_K_M": "For little memory; better than Q3_K_S, worse than any 4 bits.",
    "Q3_K_L": "The best of the 3 bits, hardly smaller than IQ4_XS.",
    "IQ4_XS": "The smallest of the 4 bits, near Q4_K_S; slower on some processors.",
    "IQ4_NL": "As IQ4_XS, a little larger.",
    "Q4_0": "An old format, fast on ARM; Q4_K_S is better at this size.",
    "Q4_1": "An old format; Q4_K_M is better.",
    "Q4_K_S": "A little smaller than Q4_K_M and a little worse.",
    "Q4_K_M": "The usual choice: good for its size.",
    "Q5_0": "An old format; Q5_K_S is better at this size.",
    "Q5_1": "An old format; Q5_K_M is better.",
    "Q5_K_S": "A little smaller than Q5_K_M and a little worse.",
    "Q5_K_M": "Close to the original; where it fits, better than the 4 bits.",
    "Q6_K": "Very close to the original.",
    "Q8_0": "Nearest to the original of what is quantized, at half of 16 bits.",
    "F16": "Not quantized; for what cannot run BF16.",
    "BF16": "Not quantized; to make other files from.",
    "F32": "Not quantized; larger than 16 bits, better only where the original has 32.",
}


@dataclass(frozen=True)
class _Column:
    """What validation fills in the table of files. path: of the number in its report; shown: its format."""

    title: str
    path: tuple[str, ...]
    shown: str
    meaning: str


_QUALITY = (
    _Column("PPL ratio", ("ppl_ratio",), "{:.4f}", "perplexity over that of the model before quantization"),
    _Column("mean KL", ("kld_mean",), "{:.5f}", "mean Kullback-Leibler divergence from it"),
    _Column("same top token", ("same_top",), "{:.1f}%", "share of tokens with the same most likely next one"),
    _Column("same experts", ("routing", "same_set"), "{:.1%}", "share of tokens that went to the same experts"),
)
# What Markdown could take for its own; : @ and www. since a bare address would become a link.
_MARKUP = re.compile(r"[\\`*{}\[\]()#+!|~$:@]|(?<!\w)_|_(?!\w)|(?<=www)\.", re.IGNORECASE)
_LLM, _Tokenizer = gguf.Keys.LLM, gguf.Keys.Tokenizer


def escaped(text: str) -> str:
    """Text on one line that Markdown and HTML show as it is, in table cells too."""
    return html.escape(_MARKUP.sub(r"\\\g<0>", one_line(text)), quote=False)


def one_line(text: str) -> str:
    """Text without line breaks and what does not print."""
    return printable(" ".join(text.split()))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table; cells are escaped already. align: `<` or `>` for each column."""
    lines = [titles, ["---:" if side == ">" else "---" for side in align], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def introduction(title: str, values: Mapping[str, Any]) -> str:
    """The first sentence."""
    experts = model_number(values, _LLM.EXPERT_COUNT)
    kind = f", a mixture of {experts} experts" if experts else ""
    return f"GGUF files of {escaped(title)}{kind}, for llama.cpp and what is built on it: Ollama, LM Studio and others."


def files_section(levels: Sequence[Level], report: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """The table of files, by size; and warnings. report: what `validate --json` gives, or None."""
    figures, warnings = _figures(levels, report)
    last = {level.quant: level.files[0].name for level in levels}
    warnings += [
        f"{level.files[0].name} and {last[level.quant]} are both {level.quant}; delete one before they are published"
        for level in levels
        if level.files[0].name != last[level.quant]
    ]
    shown = [column for column in _QUALITY if any(column.title in found for found in figures.values())]
    titles = ["File", "Quant", "Size", "Bits per weight", *(column.title for column in shown), "When to choose it"]
    rows = []
    for level in levels:
        found = figures.get(level.files[0].name, {})
        more = f" (first of {len(level.files)} shards)" if len(level.files) > 1 else ""
        cells = [_file_link(level.files[0].name) + more, escaped(level.quant), size_text(level.size)]
        cells += [f"{level.bits_per_weight:.2f}", *(found.get(column.title, "-") for column in shown)]
        rows.append([*cells, WHEN.get(level.quant, "")])
    parts = [table(titles, rows, "<<>>" + ">" * len(shown) + "<")]
    if shown and report:
        parts.append(_measured(shown, report))
    if shards := [file for level in levels if len(level.files) > 1 for file in level.files]:
        parts.append("Of a file in shards all are needed, in one directory; programs are given the first.")
        parts.append(table(["Shard", "Size"], [[_file_link(f.name), size_text(f.size)] for f in shards], "<>"))
    return "\n\n".join(["## Files", *parts]), warnings


def _file_link(name: str) -> str:
    return f"[{escaped(name)}]({quote(name)})"


def _figures(levels: Sequence[Level], report: Mapping[str, Any] | None) -> tuple[dict[str, dict[str, str]], list[str]]:
    """By file name, by title of column, what the report says of these very files."""
    sizes = {level.files[0].name: level.size for level in levels}
    files = (report or {}).get("files")
    figures: dict[str, dict[str, str]] = {}
    warnings = []
    for entry in files if isinstance(files, list) else []:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or name not in sizes:
            continue
        if entry.get("size_bytes") != sizes[name]:
            warnings.append(f"{name}: the report is of a file of another size, so the card has no figures of it")
            continue
        numbers = {column: _number(entry, column.path) for column in _QUALITY}
        figures[name] = {c.title: c.shown.format(number) for c, number in numbers.items() if number is not None}
    return figures, warnings


def _number(value: Any, path: Sequence[str]) -> float | None:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _measured(columns: Sequence[_Column], report: Mapping[str, Any]) -> str:
    """What the figures of quality are, and what they were measured on."""
    text = report.get("text")
    name, digest = (text.get("name"), text.get("sha256")) if isinstance(text, Mapping) else (text, None)
    where = escaped(name) if isinstance(name, str) else "a text"
    if isinstance(digest, str):
        where += f" (SHA-256 {escaped(digest)})"
    tokens, context = _number(report, ["tokens"]), _number(report, ["ctx"])
    where += f", {tokens} tokens" if tokens is not None else ""
    where += f", in windows of {context}" if context is not None else ""
    meanings = "; ".join(f"{column.title}: {column.meaning}" for column in columns)
    engine = f" {escaped(note)}" if isinstance(note := report.get("note"), str) else ""
    return f"{meanings}. Measured with `gguf-moe validate` on {where}.{engine}"


def experts_section(donors: Sequence[Donor]) -> str:
    """The donor of each expert."""
    rows = [[str(n), donor_link(d.name), "-" if d.prompts is None else str(d.prompts)] for n, d in enumerate(donors)]
    note = "Prompts: how many examples in the merge's configuration say what the expert is for."
    return "\n\n".join(["## Experts", table(["Expert", "Donor", "Prompts"], rows, "><>"), note])


def donor_link(name: str) -> str:
    """A model's name, as a link where it is an id of the Hub's."""
    return f"[{escaped(name)}]({HUB}{name})" if is_repo_id(name) else escaped(name)


def model_section(values: Mapping[str, Any], weights: int) -> str:
    """What the architecture is. values: of the model's keys."""
    tokens = values.get(_Tokenizer.LIST)
    experts, used = (model_number(values, key) for key in (_LLM.EXPERT_COUNT, _LLM.EXPERT_USED_COUNT))
    facts = {
        "Architecture": escaped(str(values.get(gguf.Keys.General.ARCHITECTURE))),
        "Weights": weights,
        "Layers": model_number(values, _LLM.BLOCK_COUNT),
        "Experts": f"{experts}, of which a token passes {used}" if experts else None,
        "Context length": model_number(values, _LLM.CONTEXT_LENGTH),
        "Vocabulary": len(tokens) if isinstance(tokens, Sequence) else None,
    }
    rows = [[name, str(fact)] for name, fact in facts.items() if fact is not None]
    return "\n\n".join(["## Model", table(["", ""], rows, "<<")])


def model_number(values: Mapping[str, Any], key: str) -> int | None:
    """A number among the keys of the model's architecture, None where there is none."""
    number = values.get(key.format(arch=values.get(gguf.Keys.General.ARCHITECTURE)))
    return number if type(number) is int else None


def run_section(levels: Sequence[Level], repo: str | None, stem: str) -> str:
    """Commands for one of the levels. repo: the id of these files' repository; stem: a name for what has none yet."""
    level = next((level for level in levels if level.quant == USUAL), levels[len(levels) // 2])
    sharded = len(level.files) > 1
    repo_id = repo or f"YOUR-NAME/{stem}-GGUF"
    first, remote = shlex.quote(level.files[0].name), shlex.quote(f"{repo_id}:{level.quant}")
    parts = [
        "## How to run it",
        "" if repo else "`YOUR-NAME` stands for whoever has these files on the Hub.",
        "**llama.cpp**, from the Hub or from a local file"
        + (" (the first shard finds the others):" if sharded else ":"),
        _commands(f"llama-cli -hf {remote}", f"llama-cli -m {first}"),
        *_ollama(level, f"hf.co/{repo_id}:{level.quant}", stem),
        f"**LM Studio**: search for `{repo_id}` in its model search, or choose it under *Use this model* on the Hub. ",
    ]
    if sharded:
        parts[-1] += "Local shards belong together into a directory `~/.lmstudio/models/YOUR-NAME/MODEL/`."
    else:
        parts[-1] += f"A local file is taken in with:\n\n{_commands(f'lms import {first}')}"
    return "\n\n".join(part for part in parts if part)


def _ollama(level: Level, remote: str, stem: str) -> list[str]:
    """Ollama takes no shards, neither from the Hub nor from files (its issue 5245)."""
    first, model = level.files[0].name, stem.lower()
    whole = re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", first)
    create = [f"echo {shlex.quote(f'FROM ./{whole}')} > Modelfile", f"ollama create {model}", f"ollama run {model}"]
    if whole != first:
        merge = f"llama-gguf-split --merge {shlex.quote(first)} {shlex.quote(whole)}"
        return ["**Ollama** takes no shards; with llama.cpp's tool they become one file:", _commands(merge, *create)]
    run = _commands(f"ollama run {shlex.quote(remote)}")
    return ["**Ollama**, from the Hub:", run, "or from a local file:", _commands(*create)]


def _commands(*lines: str) -> str:
    return "\n".join(["```sh", *lines, "```"])


def _codes(levels: Sequence[Level]) -> str:
    """How the codes of quantized tensors were chosen."""
    chosen: dict[str, list[str]] = {}  # by the text that error feedback went by
    for level in levels:
        keys = level.recipe.get("keys")
        if isinstance(keys, Mapping) and keys.get("gguf_moe.method") == "gptq":
            digests = keys.get("gguf_moe.gptq.text_sha256")
            digest = str(digests[0]) if isinstance(digests, list) and digests else "not known"
            name = level.recipe.get("calib", "a text")
            chosen.setdefault(f"{escaped(str(name))} (SHA-256 {escaped(digest)})", []).append(level.quant)
    plain = "Quantized tensors{} are byte for byte what llama.cpp's converter and quantizer make of them."
    parts = [
        f"The codes of {escaped(', '.join(quants))} were chosen with error feedback (GPTQ) on {text}: ordinary files, "
        "nearer to the original than llama.cpp's own of these types."
        for text, quants in chosen.items()
    ]
    if not chosen:
        return plain.format("")
    if sum(map(len, chosen.values())) < len(levels):
        parts.append(plain.format(" of the others"))
    return " ".join(parts)


def making_section(manifest: Manifest) -> str:
    """By what the files were made, of what, and how to check them."""
    program = manifest.program
    versions = ", ".join(f"{name} {program[name]}" for name in ("codecs", "numpy", "gguf", "python") if name in program)
    made_by = f"{program.get('name', 'gguf-moe')} {program.get('version', '')} ({versions})"
    parts = [
        "## How these files were made",
        f"By {escaped(made_by)} from {escaped(manifest.levels[0].source)}. {_codes(manifest.levels)} `manifest.json` "
        "has the details.",
    ]
    recipes: dict[str, list[str]] = {}
    for level in manifest.levels:
        recipes.setdefault(json.dumps(level.recipe, indent=1), []).append(level.quant)
    for recipe, quants in recipes.items():
        if recipe != "{}":
            of = f" for {', '.join(quants)}" if len(recipes) > 1 else ""
            parts += [f"Asked{of}, beside the file type:", f"```json\n{recipe}\n```"]
    parts += ["To check what you downloaded:", _commands("sha256sum -c SHA256SUMS --ignore-missing")]
    return "\n\n".join(parts)
