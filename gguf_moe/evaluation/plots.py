"""The pictures of a validation's report: what each level lost, and where its tokens went. Needs matplotlib.

Words stand at the lines, whose colours are those that colour-blind people can tell apart (Okabe and Ito's, cividis,
PuOr). An SVG is drawn on white, and a style sheet in it changes ink and paper for those who prefer dark.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator

from gguf_moe.errors import GgufMoeError
from gguf_moe.evaluation.pareto import by_size
from gguf_moe.gguf_file import write_whole
from gguf_moe.report import printable

PAPER, INK, FAINT, LINES = "#ffffff", "#1f2328", "#8b929a", ("#0072b2", "#d55e00", "#009e73")
_DARK = {PAPER: "#15181c", INK: "#e6e9ec", FAINT: "#79818a"} | dict(zip(LINES, ("#56b4e9", "#f0a35e", "#35c79a")))
_ON_DARK, _ON_LIGHT = "#fffffe", "#000001"  # numbers in cells, whose colours stay: near to no other, so left alone
_DARK_RULES = "".join(
    f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
    for light, dark in _DARK.items()
    for what in ("fill", "stroke")
)
_DARK_STYLE = f"@media (prefers-color-scheme: dark) {{{_DARK_RULES}}}</style>".encode()
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_STYLE = {
    "svg.hashsalt": "gguf-moe",  # so that the same report gives the same bytes
    "svg.fonttype": "none",
    "text.parse_math": False,  # a file may be named $x$
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "image.interpolation": "none",
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
_WIDTH = 8.0  # inches
_NUMBERED = 16  # layers or experts at most that have numbers in their cells
_LABEL = 24  # characters at most
_CHARACTER = 0.0125  # of the width of axes
_SMALLEST_KLD = 1e-8  # drawn; less is rounding

Report = Mapping[str, Any]
_Draw = Callable[[Report], Figure]


def write_plots(report: Report, directory: Path) -> list[Path]:
    """Write the pictures of what `validate --json` gives into a directory, made if missing, as PNG and SVG; the paths.

    Raises GgufMoeError where they cannot be written.
    """
    return _write(render(report, "png", "svg"), directory)


def write_coverage(report: Report, directory: Path) -> list[Path]:
    """Write the picture of a `coverage.coverage_report` into a directory, as `write_plots` does; a dense model has
    none."""
    pictures = {"imatrix-coverage": _coverage} if report["experts"] else {}
    return _write(_render(pictures, report, "png", "svg"), directory)


def _write(pictures: Mapping[str, bytes], directory: Path) -> list[Path]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgufMoeError(f"{directory}: not made: {error}") from None
    for name, data in pictures.items():
        write_whole(directory / name, data)
    return [directory / name for name in pictures]


def render(report: Report, *kinds: str) -> dict[str, bytes]:
    """The pictures by file name, kl-size.svg for one, in the order in which a page shows them; without those of the
    routing where the report has none."""
    moe = all(file["routing"] for file in report["files"])
    return _render(_PICTURES | (_ROUTING_PICTURES if moe else {}), report, *kinds)


def _render(drawers: Mapping[str, _Draw], report: Report, *kinds: str) -> dict[str, bytes]:
    pictures = {}
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a file's name, which the SVG has in full
        for name, draw in drawers.items():
            figure = draw(report)
            for kind in kinds:
                data = io.BytesIO()
                figure.savefig(data, format=kind, dpi=150, metadata=_NO_METADATA if kind == "svg" else None)
                end = int(kind == "svg")  # of the style sheet
                pictures[f"{name}.{kind}"] = data.getvalue().replace(b"</style>", _DARK_STYLE, end)
    return pictures


def _labelled(report: Report) -> tuple[list[Any], list[str]]:
    """The files, the smallest first, and their labels, the middle left out of what is long."""
    files, labels = by_size(report)
    half = _LABEL // 2
    return files, [t if len(t) <= _LABEL else f"{t[:half]}…{t[-half:]}" for t in map(printable, labels)]


def _kld_size(report: Report) -> Figure:
    files, labels = _labelled(report)
    figure, axes = _panel(4.6)
    unit, name = (1e9, "GB") if files[-1]["size_bytes"] >= 1e9 else (1e6, "MB")
    sizes = [file["size_bytes"] / unit for file in files]
    klds = [max(file["kld_mean"], _SMALLEST_KLD) for file in files]
    best = [file["name"] in report["pareto"] for file in files]
    axes.plot(*np.array([sizes, klds])[:, best], color=LINES[0], linewidth=1)
    steps = np.diff(np.log(sizes), prepend=-np.inf, append=np.inf)
    for i, (size, kld, good) in enumerate(zip(sizes, klds, best)):
        color = LINES[0] if good else FAINT
        axes.errorbar(size, kld, files[i]["kld_error"], fmt="o", color=color, mfc=color if good else PAPER, zorder=3)
        # The curve falls. A label stands above it, or below where the next file is nearer than the one before.
        side = -1 if steps[i + 1] < steps[i] else 1
        align = {"ha": "left", "va": "bottom"} if side > 0 else {"ha": "right", "va": "top"}
        axes.annotate(labels[i], (size, kld), (5 * side, 4 * side), textcoords="offset points", **align)
    longest = _CHARACTER * max(map(len, labels))
    axes.margins(max(0.12, longest / (1 - 2 * longest)), 0.1)  # room for the outermost labels on both sides
    _scale(axes.xaxis, sizes)
    axes.set_xlim(left=max(axes.get_xlim()[0], 0))
    _scale(axes.yaxis, klds)
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, 1.2 * max(klds))
    axes.set(xlabel=f"size in {name}", ylabel="mean KL divergence from the base")
    return figure


def _ppl(report: Report) -> Figure:
    files, labels = _labelled(report)
    figure, grid = _panels(1, 2, 1.0 + 0.28 * (len(files) + 1), sharey=True, width_ratios=(3, 2))
    left, right = grid[0]
    rows, base = np.arange(len(files)), report["base"]
    values, errors = (np.array([model[key] for model in (*files, base)]) for key in ("ppl", "ppl_error"))
    left.errorbar(values[:-1], rows, xerr=errors[:-1], fmt="o", color=LINES[0])
    left.errorbar(values[-1], len(files), xerr=errors[-1], fmt="D", color=INK)
    left.axvline(values[-1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    left.set_ylim(-0.6, len(files) + 0.6)
    left.set_yticks([*rows, len(files)], [*labels, "base"])
    _scale(left.xaxis, values)
    left.set(xlabel="perplexity ± its error")
    more, errors = 100 * np.array([(file["ppl_ratio"] - 1, file["ppl_ratio_error"]) for file in files]).T
    right.errorbar(more, rows, xerr=errors, fmt="o", markersize=4, color=LINES[1])
    right.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for row in rows:
        _beside(right, row, f"{more[row]:+.2f} ± {errors[row]:.2f} %")
    right.grid(True, axis="x")
    right.set(xlabel="% above the base's ± paired error")
    return figure


def _kld_tails(report: Report) -> Figure:
    """Of each file, by how much the share of positions that lose most differs from the base."""
    files, labels = _labelled(report)
    figure, axes = _panel(4.8)
    ends = []
    for i, file in enumerate(files):
        edges, counts = (np.array(file["kld_histogram"][key]) for key in ("edges", "counts"))
        above = counts[::-1].cumsum()[::-1]
        shown = above > 1  # the last position is at the maximum itself
        shares = 100 * np.append(above[shown], 1) / above[0]
        klds = np.append(edges[:-1][shown], max(file["kld_max"], _SMALLEST_KLD))
        axes.plot(shares, klds, color=LINES[i % len(LINES)], linewidth=1.2)
        ends.append(klds[-1])
    axes.set_xlim(100, 100 / report["scored"])
    axes.set_ylim(bottom=max(_SMALLEST_KLD / 2, min(ends) / 1e4))
    _log(axes.yaxis)
    _log(axes.xaxis)
    low, high = np.log(axes.get_ylim())
    places = (np.log(ends) - low) / (high - low)
    for i, (place, text) in enumerate(zip(places, _apart(places, 0.042))):
        _leader(axes, labels[i], place, text, LINES[i % len(LINES)])
    axes.set(xlabel="% of the positions that lose at least as much", ylabel="KL divergence of a position")
    return figure


def _leader(axes: Axes, label: str, place: float, text: float, color: str) -> None:
    """Write a label beside the axes at height `text`, with a line to the end of its curve at `place`."""
    arrow = {"arrowstyle": "-", "color": color, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
    axes.annotate(label, (1, place), (1.05, text), "axes fraction", va="center", arrowprops=arrow)


def _apart(places: Sequence[float], gap: float) -> np.ndarray:
    """The places moved up, or down from the top at 1, until each is at least `gap` from the next."""
    order = np.argsort(places)
    steps = np.arange(len(order)) * gap
    moved = np.maximum.accumulate(np.asarray(places)[order] - steps).clip(None, 1 - steps[-1]) + steps
    return moved[np.argsort(order)]


def _agreement(report: Report) -> Figure:
    files, labels = _labelled(report)
    routings = [file["routing"] for file in files]
    shares = 100 * np.array([routing["same_set_per_layer"] for routing in routings])
    figure, axes = _panel(1.1 + 0.28 * len(files))
    image = _heat(axes, shares, "cividis", Normalize(min(shares.min(), 99), 100), ".1f")
    axes.set_xticks(*_thinned(routings[0]["load"]["layers"]))
    axes.set_yticks(range(len(files)), labels)
    axes.set(xlabel="layer")
    axes.text(1.01, 1.03, "all layers", transform=axes.transAxes)
    for row, routing in enumerate(routings):
        _beside(axes, row, f"{100 * routing['same_set']:.1f}")
    _bar(figure, image, axes, "% with the same experts")
    return figure


def _load(report: Report) -> Figure:
    """The base's load, and how much each level's differs from it: a panel each."""
    files, labels = _labelled(report)
    base = 100 * np.array(report["base"]["load"]["tokens"])
    changes = [100 * np.array(file["routing"]["load"]["tokens"]) - base for file in files]
    most = max(max(np.abs(change).max() for change in changes), 0.1)
    layers, experts = base.shape
    wide, high = (0.36 * n if max(base.shape) <= _NUMBERED else min(max(1.8, 0.09 * n), 4) for n in (experts, layers))
    rows = -(-(len(files) + 1) // max(1, int(9 / (wide + 0.4))))
    columns = -(-(len(files) + 1) // rows)
    figure, grid = _panels(rows, columns, 0.9 + rows * (high + 0.45), columns * (wide + 0.4) + 1.6)
    panels = grid.ravel()
    image = _heat(panels[0], base, "cividis", Normalize(0, base.max()), ".0f")
    for axes, change in zip(panels[1:], changes):
        changed = _heat(axes, change, "PuOr", Normalize(-most, most), "+.1f")
    for axes, title in zip(panels, ["base", *labels]):
        axes.set_title(title)
        axes.set_xticks(*_thinned(range(experts)))
        axes.set_yticks(*_thinned(report["base"]["load"]["layers"]))
    for axes in panels[len(files) + 1 :]:
        axes.remove()
    figure.supxlabel("expert", size="medium")
    figure.supylabel("layer", size="medium")
    _bar(figure, changed, list(panels[: len(files) + 1]), "change in points")
    _bar(figure, image, list(panels[: len(files) + 1]), "% of tokens, base")
    return figure


def _coverage(report: Report) -> Figure:
    """Tokens that reached each expert, by layer."""
    rows = report["experts"]
    layers, experts = (sorted({row[key] for row in rows}) for key in ("layer", "expert"))
    tokens = np.zeros((len(layers), len(experts)))
    for row in rows:
        tokens[layers.index(row["layer"]), row["expert"]] = row["tokens"]
    figure, axes = _panel(1.2 + 0.28 * min(len(layers), 2 * _NUMBERED))
    image = _heat(axes, tokens, "cividis", Normalize(0, max(tokens.max(), 1)), ".0f")
    axes.set_xticks(*_thinned(experts))
    axes.set_yticks(*_thinned(layers))
    cold = np.argwhere(tokens < report["min_tokens"])
    axes.plot(*cold.T[::-1], "s", markersize=9, mfc="none", color=LINES[1])
    axes.set(xlabel="expert", ylabel="layer")
    _bar(figure, image, axes, "tokens seen")
    return figure


_PICTURES: dict[str, _Draw] = {"kl-size": _kld_size, "perplexity": _ppl, "kl-tails": _kld_tails}
_ROUTING_PICTURES: dict[str, _Draw] = {"routing": _agreement, "expert-load": _load}


def _panels(rows: int, columns: int, height: float, width: float = _WIDTH, **options: Any) -> tuple[Figure, Any]:
    figure = Figure((width, max(height, 2.4)), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _panel(height: float) -> tuple[Figure, Axes]:
    figure, grid = _panels(1, 1, height)
    return figure, grid[0, 0]


def _scale(axis: Axis, values: Sequence[float]) -> None:
    """Logarithmic where values differ by more than a decade."""
    if max(values) > 10 * min(values):
        _log(axis, (1, 2, 5) if max(values) < 1000 * min(values) else (1,))
    else:
        axis.get_major_formatter().set_useOffset(False)
    axis.grid(True)


def _log(axis: Axis, steps: Sequence[int] = (1,)) -> None:
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
    axis.grid(True)


def _heat(axes: Axes, values: np.ndarray, colors: str, norm: Normalize, number: str) -> AxesImage:
    """Cells [rows, columns], with numbers in them where they have room."""
    image = axes.imshow(values, colors, norm=norm, aspect="auto")
    axes.spines[:].set_visible(False)
    if max(values.shape) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(norm(value))
            color = _ON_LIGHT if 0.3 * red + 0.59 * green + 0.11 * blue > 0.46 else _ON_DARK
            text = f"{round(value, 1) + 0:{number}}"  # no -0.0
            axes.text(column, row, text, ha="center", va="center", size="small", color=color)
    return image


def _beside(axes: Axes, row: int, text: str) -> None:
    """Write to the right of a row."""
    axes.annotate(text, (1.01, row), xycoords=axes.get_yaxis_transform(), va="center")


def _thinned(names: Sequence[int]) -> tuple[list[int], list[str]]:
    """Places and texts of ticks, no more than have room."""
    places = list(range(0, len(names), -(-len(names) // _NUMBERED)))
    return places, [str(names[place]) for place in places]


def _bar(figure: Figure, image: AxesImage, axes: Any, label: str) -> None:
    shrink = min(1.0, 3 / figure.get_figheight())
    bar = figure.colorbar(image, ax=axes, label=label, shrink=shrink, anchor=(0, 1), ticks=MaxNLocator(5))
    bar.outline.set_visible(False)
