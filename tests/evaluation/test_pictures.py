"""Plots and page of a validation's report: what they show, that nothing in them comes from elsewhere or runs, and how a
browser draws them in light and in dark, where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the pictures need matplotlib, of the extra gguf-moe[eval]")
from matplotlib.image import imread

from gguf_moe.evaluation.figures import KLD_EDGES, Scores, figures, intervals, kld_histogram
from gguf_moe.evaluation.page import write_page
from gguf_moe.evaluation.pareto import pareto
from gguf_moe.evaluation.plots import write_plots
from gguf_moe.evaluation.routing import ExpertLoad, RoutingScores, routing_figures

LEVELS = {"Q2_K": 0.6, "Q3_K_M": 0.3, "Q4_K_S": 0.1, "Q4_K_M": 0.12, "Q8_0": 0.01}  # noise in the logits
BAD_NAME = '</title><script>alert("1")</script>&amp; $x_1$ \u202e\x1b[2J\n id="a.gguf'
MARKS = ("kl-size", "perplexity", "kl-tails", "routing", "expert-load")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VOID = {"meta", "br", "link", "img"}
Report = dict[str, Any]


def scored(noise: float) -> Scores:
    random = np.random.default_rng(0)
    scores = Scores("a.gguf")
    for _ in range(4):
        base = random.normal(scale=3, size=(60, 37)).astype(np.float32)
        logits = (base + random.normal(scale=noise, size=base.shape)).astype(np.float32)
        scores.add(base, logits, random.integers(37, size=60))
    return scores


def routed(noise: float, layers: int, experts: int) -> RoutingScores:
    random = np.random.default_rng(1)
    routing = RoutingScores(ExpertLoad(experts))
    for layer in range(layers):
        base = random.random((240, experts))
        moved = base + random.normal(scale=noise, size=base.shape)
        chosen = [np.argsort(-scores, axis=1)[:, :2] for scores in (base, moved)]
        weights = [np.take_along_axis(s, c, 1).clip(0.01) for s, c in zip((base, moved), chosen)]
        routing.add(layer + 1, chosen[0], weights[0], chosen[1], weights[1])
    return routing


def make(layers: int = 3, experts: int = 4, names: dict[str, str] | None = None) -> Report:
    """A report of invented logits and, unless there are no experts, routing."""
    files = []
    for number, (level, noise) in enumerate(LEVELS.items()):
        scores = scored(noise)
        routing = routed(noise, layers, experts) if experts else None
        facts = {
            "name": f"merge-{level}.gguf",
            "quant": level,
            "size_bytes": 10**7 * (number + 2),
            "bits_per_weight": 4.5,
        }
        files.append(
            facts | figures(scores) | {"intervals": intervals(scores, 20), "kld_histogram": kld_histogram(scores)}
        )
        files[-1]["routing"] = routing and routing_figures(routing, scores.positions["kld"])
    for file in files:
        file["name"] = (names or {}).get(file["quant"], file["name"])
    load = routed(0, layers, experts).load.figures() if experts else None
    base = {"name": "merge", "quant": "BF16", "size_bytes": 10**8, "bits_per_weight": 16.0, "load": load}
    return {
        "program": {"name": "gguf-moe", "version": "0.1.0"},
        "engine": "torch",
        "device": "cpu",
        "dtype": "float32",
        "note": "Other engines <differ>.",
        "warnings": ["calibrated & evaluated on the same text"],
        "base": base | {"ppl": files[0]["ppl_base"], "ppl_error": files[0]["ppl_base_error"]},
        "text": {"name": "eval.txt", "sha256": "0123456789abcdef" * 4},
        "ctx": 122,
        "chunks": 4,
        "tokens": 488,
        "scored": 240,
        "pareto": [file["name"] for file in pareto(files)],
        "files": files,
    }


class Page(HTMLParser):
    """What a page consists of. Fails on tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []  # by row
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "br":
            self.handle_data(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def page(report: Report, directory: Path) -> tuple[Path, Page]:
    path = directory / "report.html"
    write_page(report, path)
    return path, Page(path)


def texts(svg: Path) -> list[str]:
    """The words of a picture, in the order in which they are drawn."""
    return [element.text or "" for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_histograms_count_every_position_once() -> None:
    scores = scored(0.3)
    scores.chunks[0]["kld"][:4] = [-1e-9, 0, 1e-8, 1e9]  # rounding; equal; an edge; beyond the last
    found = kld_histogram(scores)
    counts = [0] * (len(KLD_EDGES) - 1)
    for kld in scores.positions["kld"].tolist():
        counts[max(i for i, edge in enumerate(KLD_EDGES[:-1]) if edge <= kld or i == 0)] += 1
    assert found["counts"] == counts
    assert found["edges"] == pytest.approx([10 ** (i / 8 - 8) for i in range(81)])
    assert sum(counts) == 240


def test_plots_are_whole_and_the_same_every_time(tmp_path: Path) -> None:
    report = make()
    paths = write_plots(report, tmp_path / "a")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in MARKS for kind in ("png", "svg")]
    again = write_plots(report, tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    for path in paths[::2]:
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    for path in paths[1::2]:
        assert set(LEVELS) <= set(texts(path))
        assert not re.search(r'href="(?!#|data:)|url\((?!#)', path.read_text())


def test_plots_show_the_figures_of_the_report(tmp_path: Path) -> None:
    report = make()
    write_plots(report, tmp_path)
    for file in report["files"]:
        more = f"{100 * file['ppl_ratio'] - 100:+.2f} ± {100 * file['ppl_ratio_error']:.2f} %"
        assert more in texts(tmp_path / "perplexity.svg")
    routing = [file["routing"] for file in report["files"]]
    cells = [f"{100 * share:.1f}" for one in routing for share in one["same_set_per_layer"]]
    assert cells == [text for text in texts(tmp_path / "routing.svg") if re.fullmatch(r"\d+\.\d", text)][: len(cells)]
    base = np.array(report["base"]["load"]["tokens"])
    changes = [100 * (np.array(one["load"]["tokens"]) - base) for one in routing]
    shown = [float(text) for text in texts(tmp_path / "expert-load.svg") if re.fullmatch(r"[+-]\d+\.\d", text)]
    assert np.allclose(shown, np.ravel(changes), atol=0.051)


def test_files_of_one_level_are_told_apart_by_name(tmp_path: Path) -> None:
    report = make(experts=0, names={"Q4_K_S": "a-$x_1$.gguf", "Q4_K_M": f"b{'c' * 300}d.gguf"})
    for file in report["files"][2:4]:
        file["quant"] = "Q4_K"
    write_plots(report, tmp_path)
    words = {"Q2_K", "Q3_K_M", "a-$x_1$", f"b{'c' * 11}…{'c' * 11}d", "Q8_0"}
    words |= {"size in MB", "mean KL divergence from the base"}
    found = texts(tmp_path / "kl-size.svg")
    assert words <= set(found)
    assert all(float(text) >= 0 for text in set(found) - words if text)  # at the axes


def test_pages_say_what_was_measured_and_how(tmp_path: Path) -> None:
    report = make()
    _, found = page(report, tmp_path)
    assert found.tags["svg"] == len(MARKS)
    for fact in (
        "eval.txt",
        "0123456789abcdef" * 4,
        "4 windows of 122 tokens",
        "488, of which 240",
        "torch, cpu, float32",
    ):
        assert fact in found.text
    assert report["note"] in found.text
    assert report["warnings"][0] in found.text
    head, *rows = found.cells[: len(LEVELS) + 2]
    assert [row[0] for row in rows] == [
        *(f"{'★ ' * (file['name'] in report['pareto'])}{file['name']}" for file in report["files"]),
        "merge",
    ]
    column = head.index("mean KL")
    for row, file in zip(rows, report["files"]):
        assert row[column] == f"{file['kld_mean']:.6f} ± {file['kld_error']:.6f}"
        p99, low, high = (float(f"{value:.3g}") for value in (file["kld_p99"], *file["intervals"]["kld_p99"]))
        shown = re.fullmatch(r"(\S+) (\S+) to (\S+)", row[head.index("KL at 99\N{NO-BREAK SPACE}%")])
        assert shown
        assert [float(part) for part in shown.groups()] == [p99, low, high]
    assert len(rows[-1]) == 5
    assert head.index("same top token") == column + 1, "before the quantiles, which may have to be scrolled to"
    assert "in nats a token" in found.text
    assert "their 95 % intervals" in found.text
    for file in report["files"]:
        del file["intervals"]
    assert "95 %" not in page(report, tmp_path)[1].text


def test_pages_hold_no_script_and_load_nothing(tmp_path: Path) -> None:
    names = {"Q2_K": BAD_NAME, "Q3_K_M": "a" * 300}
    report = make(names=names)
    for file in report["files"][:2]:
        file["quant"] = "Q2_K"  # two of a level have their names in the pictures
    report["base"]["name"] = report["text"]["name"] = report["note"] = report["warnings"][0] = BAD_NAME
    path, found = page(report, tmp_path)
    assert not found.tags["script"]
    assert found.tags["title"] == 1
    assert not {"src", "onload", "onerror"} & {name for name, _ in found.attributes}
    assert "\x1b" not in path.read_text()
    assert '</title><script>alert("1")</script>&amp; $x_1$ \\u202e\\x1b[2J\\n id="a.gguf' in found.text
    ids, links = found.all("id"), [link for name in ("href", "xlink:href") for link in found.all(name)]
    assert len(ids) == len(set(ids))
    assert {link for link in links if not link.startswith("data:image/png;base64,")} <= {f"#{name}" for name in ids}
    assert set(re.findall(r"url\(#([^)]*)\)", path.read_text())) <= set(ids)


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_without_routing_there_are_no_pictures_of_it(tmp_path: Path, engine: str) -> None:
    report = make(experts=0) | {"engine": engine}
    _, found = page(report, tmp_path)
    assert found.tags["svg"] == 3
    assert found.tags["table"] == 1
    assert "xpert" not in found.text
    assert len(write_plots(report, tmp_path)) == 6


def test_files_that_lost_nothing_are_drawn(tmp_path: Path) -> None:
    report = make()
    for file in report["files"][:2]:
        scores = scored(0)
        file |= figures(scores) | {"kld_histogram": kld_histogram(scores)}
        assert file["kld_max"] <= 1e-8
    _, found = page(report, tmp_path)
    assert found.tags["svg"] == len(MARKS)
    assert "nan" not in found.text


def test_scales_are_logarithmic_only_over_decades(tmp_path: Path) -> None:
    report = make()
    write_plots(report, tmp_path)
    assert "0.001" in texts(tmp_path / "kl-size.svg")
    report["files"] = report["files"][:1]
    write_plots(report, tmp_path)
    numbers = {float(text) for text in texts(tmp_path / "kl-size.svg") if re.fullmatch(r"\d+\.\d+", text)}
    assert 0 in numbers
    assert 0.001 not in numbers


def test_long_labels_have_room_beside_files_of_one_size(tmp_path: Path) -> None:
    report = make()
    report["files"] = report["files"][:2]
    for number, file in enumerate(report["files"]):
        file |= {"quant": "Q4_K_M", "name": f"a-long-name-of-a-file-{number}", "size_bytes": 5_838_336 + 224 * number}
    write_plots(report, tmp_path)
    svg = (tmp_path / "kl-size.svg").read_text()
    ends = {text: float(x) for x, text in re.findall(r'text-anchor: end[^>]* x="([\d.]+)"[^>]*>([^<]+)', svg)}
    axis = max(x for text, x in ends.items() if re.fullmatch(r"[\d.]+", text))
    assert next(x for text, x in ends.items() if text.endswith("file-0")) - axis > 24 * 5, "24 characters' points"
    assert "5.8384" in texts(tmp_path / "kl-size.svg"), "no offset to be added in the head"


PROBE = """<script>addEventListener("load", () => {
  const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] }
  const svgs = [...document.querySelectorAll("svg")].map(svg => ({
    box: box(svg), images: [...svg.querySelectorAll("image")].map(box),
    texts: [...svg.querySelectorAll("text")].map(t => [t.textContent, getComputedStyle(t).fill, box(t)]),
    paper: getComputedStyle(svg.querySelector("path")).fill }))
  const style = getComputedStyle(document.body)
  document.body.textContent = "PROBE" + JSON.stringify(
    {svgs, ink: style.color, paper: style.backgroundColor, wide: document.documentElement.scrollWidth - innerWidth,
     errors: window.errors}) + "PROBE"
})</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(
            "no Chromium or Chrome here: what a browser draws is not seen; the tests of the page's structure ran"
        )
    return found


def dump(browser: str, path: Path, *options: str) -> tuple[str, list[str]]:
    """The page's content after its scripts have run, and what the console says."""
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1200,900",
    ]
    command += [f"--user-data-dir={path.parent / 'profile'}", *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def contrast(one: str, other: str) -> float:
    """Of two colours as CSS writes them, by the WCAG's formula."""

    def luminance(color: str) -> float:
        parts = np.array(re.findall(r"\d+", color)[:3], float) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "layers", "experts"), [("light", 3, 4), ("dark", 3, 4), ("dark", 30, 60)])
def test_browsers_draw_the_page(browser: str, tmp_path: Path, scheme: str, layers: int, experts: int) -> None:
    path, _ = page(make(layers, experts), tmp_path)
    option = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    assert dump(browser, path, option)[1] == []
    probe = tmp_path / "probe.html"
    probe.write_text(path.read_text().replace("default-src 'none'", "script-src 'unsafe-inline'") + PROBE)
    content, console = dump(browser, probe, option)
    assert console == []
    seen = json.loads(content.split("PROBE")[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (contrast(seen["paper"], "rgb(0, 0, 0)") > 10) == (scheme == "light")
    assert contrast(seen["paper"], seen["ink"]) > 7
    assert seen["wide"] <= 0
    assert len(seen["svgs"]) == len(MARKS)
    for svg in seen["svgs"]:
        left, top, right, bottom = svg["box"]
        assert right - left > 300
        assert bottom - top > 100
        assert svg["paper"] == seen["paper"]
        for box in svg["images"]:
            assert min(box[2] - box[0], box[3] - box[1]) > 5, box
        for text, fill, box in svg["texts"]:
            assert left - 1 <= box[0] < box[2] <= right + 1, text
            assert top - 1 <= box[1] < box[3] <= bottom + 1, text
            cell = re.fullmatch(r"[+-]?\d+(\.\d)?", text)  # on a colour of its own, or a number at an axis
            assert cell or contrast(fill, svg["paper"]) > 7, text
    assert sum(len(svg["images"]) for svg in seen["svgs"]) >= 1 + 1 + len(LEVELS)


def test_browsers_refuse_what_the_page_does_not_hold(browser: str, tmp_path: Path) -> None:
    path, _ = page(make(experts=0), tmp_path)
    path.write_text(
        path.read_text() + '<img src="https://example.invalid/a.png"><script>document.title = "ran"</script>'
    )
    content, console = dump(browser, path)
    assert "<title>ran" not in content
    assert len(console) >= 2
