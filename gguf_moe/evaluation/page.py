"""The report of a validation as one page that needs nothing else: no network, no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from gguf_moe.evaluation.pareto import by_size
from gguf_moe.evaluation.plots import render
from gguf_moe.gguf_file import write_whole
from gguf_moe.report import printable, size_text

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --best: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e9ec; --faint: #9aa3ac; --line: #343a41; --best: #56b4e9 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 74rem; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 0.5rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem } dd { margin: 0 }
dt, .note, figcaption { color: var(--faint) } .warning { border-left: 4px solid #d55e00; padding-left: 0.75rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 0.875rem }
tr { border-bottom: 1px solid var(--line) } thead th { vertical-align: bottom; overflow-wrap: normal }
th, td { padding: 0.25rem 0.5rem; text-align: right; vertical-align: top } td { white-space: nowrap }
th:first-child { text-align: left; min-width: 9rem } .best th { color: var(--best) }
figure { margin: 0 } svg { max-width: 100%; height: auto }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_TITLES = {
    "kl-size": (
        "What each byte buys",
        "Mean KL divergence from the base, in nats a token, against size. Filled and joined: no other file is as small "
        "and as near to the base. Lower is better.",
    ),
    "perplexity": (
        "Perplexity",
        "On the left the error says how well this text tells a model's perplexity, mostly the same for all files. On "
        "the right that part cancels out: ratio to the base's, position by position. Bars are one standard error.",
    ),
    "kl-tails": (
        "The worst positions",
        "KL divergence that a share of the positions reaches or exceeds, up to the single worst at the right end.",
    ),
    "routing": (
        "Same experts, by layer",
        "Scored tokens that go to the same experts as in the base, by layer. Mind where the scale begins.",
    ),
    "expert-load": (
        "Load of the experts",
        "Share of the scored tokens that each expert sees: in the base, and how many percentage points more or fewer "
        "in each file. A token counts for each of its experts.",
    ),
}
_FIGURES_NOTE = (
    "★ No other file is as small and as near to the base. ± is one standard error, of the ratio with base and file "
    "taken as pairs. KL is the divergence of the predictions from the base's, in nats a token, at 99 % what one token "
    "in a hundred exceeds; Δp the difference in the probability of the text's own next token."
)
_INTERVALS_NOTE = " Below the quantiles are their 95 % intervals."
_ROUTING_NOTE = (
    "Means over layers, against the base. Imbalance is the coefficient of variation of the experts' loads; an expert "
    "starves with less than a tenth of an even share. Tokens sent elsewhere are those that any layer gave to other "
    "experts; the more their share of the KL divergence exceeds theirs of tokens, the more the loss gathers there."
)

File = Mapping[str, Any]
Column = tuple[str, Callable[[File], str]]


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write what `validate --json` gives as an HTML page. Raises GgufMoeError where it cannot be written."""
    title = f"What quantizing {_text(report['base']['name'])} lost"
    write_whole(
        path,
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_facts(report)}
{_sections(report)}
</body>
</html>
""".encode(),
    )


def _text(value: object) -> str:
    """Anything from a file, harmless in a page."""
    return escape(printable(str(value)))


def _facts(report: Mapping[str, Any]) -> str:
    text, program = report["text"], report["program"]
    computed = [report["engine"]] + [report[key] for key in ("device", "dtype") if report["engine"] == "torch"]
    facts = {
        "base": f"{report['base']['name']} ({report['base']['quant']}, {size_text(report['base']['size_bytes'])})",
        "text": text["name"],
        "its SHA-256": text["sha256"],
        "context": f"{report['chunks']} windows of {report['ctx']} tokens",
        "tokens": f"{report['tokens']}, of which {report['scored']} are scored: the second half of each window",
        "engine": ", ".join(computed),
        "made by": f"{program['name']} {program['version']}",
    }
    rows = "\n".join(f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts.items())
    warnings = "".join(f'\n<p class="warning">{_text(warning)}</p>' for warning in report["warnings"])
    return f"<dl>\n{rows}\n</dl>\n{_note(_text(report['note']))}{warnings}"


def _table(report: Mapping[str, Any], own: Sequence[Column], compared: Sequence[Column]) -> str:
    """The files, the smallest first, and last the base, which has no columns that compare."""
    head = "".join(f'<th scope="col">{title}</th>' for title, _ in (*own, *compared))
    best = report["pareto"]
    rows = [_row(file, (*own, *compared), file["name"] in best) for file in by_size(report)[0]]
    rows.append(_row(report["base"], own, False))
    body = "\n".join(rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(file: File, columns: Sequence[Column], best: bool) -> str:
    first, *others = [cell(file) for _, cell in columns]
    cells = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr class="{"best" if best else ""}"><th scope="row">{"★ " if best else ""}{first}</th>{cells}</tr>'


def _with_error(name: str, error: str, digits: int) -> Callable[[File], str]:
    return lambda file: f"{file[name]:.{digits}f}<br><small>± {file[error]:.{digits}f}</small>"


def _quantile(name: str) -> Callable[[File], str]:
    """With its interval, where the report has one."""

    def cell(file: File) -> str:
        value, *ends = map(_short, [file[name], *file.get("intervals", {}).get(name, ())])
        return value + (f"<br><small>{' to<br>'.join(ends)}</small>" if ends else "")

    return cell


def _short(value: float) -> str:
    return f"{Decimal(f'{value:.2e}'):f}"  # three digits, without an exponent


def _routing(name: str, digits: int = 4) -> Callable[[File], str]:
    return lambda file: f"{file['routing'][name]:.{digits}f}"


def _percent(name: str) -> Callable[[File], str]:
    return lambda file: f"{100 * file['routing'][name]:.2f} %"


def _loads(file: File) -> Mapping[str, Any]:
    return file["load"] if "load" in file else file["routing"]["load"]  # the base's, a file's


_NAME: Column = ("file", lambda file: _text(file["name"]))
_OWN: tuple[Column, ...] = (
    _NAME,
    ("level", lambda file: _text(file["quant"])),
    ("size", lambda file: size_text(file["size_bytes"])),
    ("bits per weight", lambda file: f"{file['bits_per_weight']:.2f}"),
    ("perplexity", _with_error("ppl", "ppl_error", 4)),
)
_COMPARED: tuple[Column, ...] = (
    ("ratio to the base's", _with_error("ppl_ratio", "ppl_ratio_error", 5)),
    ("mean KL", _with_error("kld_mean", "kld_error", 6)),
    ("same top token", lambda file: f"{file['same_top']:.2f} %"),
    ("median KL", _quantile("kld_median")),
    ("KL at 99&nbsp;%", _quantile("kld_p99")),
    ("KL at 99.9&nbsp;%", _quantile("kld_p999")),
    ("greatest KL", _quantile("kld_max")),
    ("RMS Δp", lambda file: f"{file['dp_rms']:.3f} %"),
)
_OWN_LOAD: tuple[Column, ...] = (
    _NAME,
    ("imbalance", lambda file: f"{fmean(_loads(file)['variation']):.3f}"),
    ("starving experts", lambda file: str(len(_loads(file)["starving"]))),
)
_ROUTED: tuple[Column, ...] = (
    ("same experts", _percent("same_set")),
    ("same first expert", _percent("same_first")),
    ("Jaccard", _routing("jaccard")),
    ("distance of weights", _routing("weight_l1")),
    ("tokens sent elsewhere", _percent("flipped")),
    ("their share of KL", _percent("kld_on_flipped")),
)


def _sections(report: Mapping[str, Any]) -> str:
    """The tables and the pictures."""
    note = _FIGURES_NOTE + (_INTERVALS_NOTE if "intervals" in report["files"][0] else "")
    parts = ["<h2>Figures</h2>", _table(report, _OWN, _COMPARED), _note(note)]
    for name, data in render(report, "svg").items():
        stem = Path(name).stem
        title, caption = _TITLES[stem]
        if stem == "routing":
            parts += ["<h2>Routing</h2>", _table(report, _OWN_LOAD, _ROUTED), _note(_ROUTING_NOTE)]
        svg = data.decode()
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
        svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{stem}-", svg)  # an id is the page's only one
        parts.append(f"<h2>{title}</h2>\n<figure>\n{svg}<figcaption>{caption}</figcaption>\n</figure>")
    return "\n".join(parts)


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'
