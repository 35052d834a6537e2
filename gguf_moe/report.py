"""What plans and files look like to a person or to a program: text tables and JSON values. Prints nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf

from gguf_moe import naming
from gguf_moe.gguf_reader import GgufFile, StoredArray
from gguf_moe.plan import Plan
from gguf_moe.recipe import Choice, file_type_name

SHOWN_ELEMENTS = 4  # of an array
SHOWN_CHARACTERS = 100  # of a value
SHOWN_MESSAGE = 2000  # characters of an error or a warning


def size_text(nbytes: int) -> str:
    """Bytes with a decimal unit: 5.84 MB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.2f} {unit}" if unit != "B" else f"{nbytes} B"


def table(rows: Iterable[Sequence[object]], align: str) -> str:
    """Columns separated by two spaces; `align` has `<` or `>` for each column."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ("  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths)).rstrip() for row in cells)
    return "\n".join(lines)


def dimensions(shape: Sequence[int]) -> str:
    """A row-major shape as text: 4 x 512 x 256."""
    return " x ".join(map(str, shape))


def plan_text(plan: Plan, *, tensors: bool = True) -> str:
    """The dry run: every tensor, what the file says of itself and what the user set, shards, then the totals; without
    `tensors` only the last two."""
    parts = _tensors_and_keys(plan) if tensors else []
    if len(plan.files) > 1:
        rows: list[Sequence[object]] = [("shard", "tensors", "bytes")]
        rows += [(file.suffix.removeprefix("-"), len(file.tensors), file.size) for file in plan.files]
        parts.append(table(rows, "<>>"))
    return "\n\n".join([*parts, plan_summary(plan)])


def target_text(plan: Plan, target: Path) -> str:
    """The file that is written; of shards the first, which is the one to load, and how many there are."""
    first, more = plan.files[0].path(target), len(plan.files) - 1
    return f"{first} and {more} more shard{'s' if more > 1 else ''}" if more else str(first)


def _tensors_and_keys(plan: Plan) -> list[str]:
    rows: list[Sequence[object]] = [("tensor", "shape", "type", "bytes", "")]
    for t in plan.tensors:
        rows.append((printable(t.info.name), dimensions(t.info.shape), t.info.type, t.info.nbytes, _why(t.choice)))
    keys = [
        (printable(key), _value_text(item.value), "by --override-kv" if key in plan.overridden else "")
        for key, item in plan.keys.items()
        if key.startswith("general.") or key in plan.overridden
    ]
    return [table(rows, "<<<><"), table(keys, "<<<")]


def _why(choice: Choice) -> str:
    """What a tensor's type has been instead of, and by which rule of the user's."""
    notes = [f"instead of {choice.wanted}"] if choice.fell_back else []
    if choice.asked:
        notes.append(f"by {choice.asked}" + (f", else {choice.usual}" if choice.usual != choice.type else ""))
    return printable(", ".join(notes))


def plan_summary(plan: Plan) -> str:
    """One line: file type, tensors by type, weights, bytes, bits per weight."""
    types = ", ".join(f"{name} ({count})" for name, count in plan.types.items())
    return (
        f"{plan.file_type.name}: {len(plan.tensors)} tensors as {types}; {plan.elements} weights in {plan.size} bytes "
        f"({size_text(plan.size)}), {plan.bits_per_weight:.2f} bits per weight"
    )


def gguf_facts(file: GgufFile) -> dict[str, Any]:
    """What `inspect --json` prints: sizes, experts, histogram of types, keys (long arrays by length), tensors."""
    architecture = file.keys.get(gguf.Keys.General.ARCHITECTURE, "")
    histogram: dict[str, dict[str, int]] = {}
    for tensor in file.tensors:
        entry = histogram.setdefault(tensor.type, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += math.prod(tensor.shape)
        entry["bytes"] += tensor.nbytes
    weights = sum(entry["weights"] for entry in histogram.values())
    nbytes = sum(entry["bytes"] for entry in histogram.values())
    return {
        "file": str(file.path),
        "size_bytes": file.size,
        "file_type": _file_type_name(file.keys.get(gguf.Keys.General.FILE_TYPE)),
        "weights": weights,
        "bits_per_weight": 8 * nbytes / weights if weights else None,
        "experts": _short(file.keys.get(gguf.Keys.LLM.EXPERT_COUNT.format(arch=architecture), 0)),
        "experts_used": _short(file.keys.get(gguf.Keys.LLM.EXPERT_USED_COUNT.format(arch=architecture), 0)),
        "types": dict(sorted(histogram.items(), key=lambda item: -item[1]["bytes"])),
        "keys": {key: _short(value) for key, value in file.keys.items()},
        "tensors": [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes, "offset": t.offset}
            for t in file.tensors
        ],
    }


def gguf_text(facts: dict[str, Any], *, tensors: bool) -> str:
    """`gguf_facts` for a person; the tensors one by one on request."""
    bits = facts["bits_per_weight"]
    parts = [
        printable(f"{facts['file']}: {facts['file_type']}")
        + f", {size_text(facts['size_bytes'])}, {facts['weights']} weights"
        + (f", {bits:.2f} bits per weight" if bits is not None else ""),
        printable(f"experts: {facts['experts']}, of which {facts['experts_used']} are used for a token")
        if facts["experts"]
        else "experts: none",
    ]
    if facts["types"]:
        rows: list[Sequence[object]] = [("type", "tensors", "weights", "bytes", "share")]
        total = sum(entry["bytes"] for entry in facts["types"].values())
        for name, entry in facts["types"].items():
            share = f"{100 * entry['bytes'] / total:.1f} %" if total else "-"
            rows.append((name, entry["tensors"], entry["weights"], entry["bytes"], share))
        parts.append(table(rows, "<>>>>"))
    parts.append(table([(printable(key), _value_text(value)) for key, value in facts["keys"].items()], "<<"))
    if tensors:
        rows = [("tensor", "shape", "type", "bytes")]
        rows += [(printable(t["name"]), dimensions(t["shape"]), t["type"], t["bytes"]) for t in facts["tensors"]]
        parts.append(table(rows, "<<<>"))
    return "\n\n".join(parts)


def name_warnings(facts: dict[str, Any]) -> list[str]:
    """What the Hugging Face Hub would misread in the name of the file of these `gguf_facts`."""
    file_type = facts["file_type"] if facts["file_type"] in map(file_type_name, gguf.LlamaFileType) else None
    return naming.name_warnings(Path(facts["file"]).name, file_type)


def printable(text: str) -> str:
    """Text from a file with everything escaped that a terminal could take for a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """A message as one printable line; of one that quotes something endless the middle is left out."""
    text = printable(text)
    half = SHOWN_MESSAGE // 2
    return text if len(text) <= SHOWN_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def _file_type_name(number: Any) -> str:
    return file_type_name(number) or ("unknown file type" if number is None else f"file type {number}")


def _short(value: Any) -> Any:
    """A key's value for JSON: long arrays by their length, bytes that are no text escaped."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, StoredArray):
        first = [_short(element) for element in value[: 4 * SHOWN_ELEMENTS]]
        return first if len(value) <= len(first) else {"length": len(value), "first": first[:SHOWN_ELEMENTS]}
    return value


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        text = f"{value['length']} elements, the first {', '.join(map(str, value['first']))}"
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = str(value)
    text = printable(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
