"""The model card of an export: read by the Hub's own libraries, true of the files, and careful of people's text."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from checkpoints import MERGE
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from gguf_moe.card import BESIDE, CARD, write_card
from gguf_moe.card_body import WHEN, escaped
from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.donors import Donor, expert_donors
from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.gguf_source import open_gguf
from gguf_moe.manifest import ExportedFile, Level, Manifest, recipe_values
from gguf_moe.naming import is_repo_id
from gguf_moe.plan import Plan, make_plans
from gguf_moe.recipe import FILE_TYPES, find_file_type
from gguf_moe.report import size_text
from gguf_moe.request import Request
from gguf_moe.sharding import Splitting

LADDER = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0"]
DOCS = Path(__file__).parent.parent / "docs" / "export.md"
TOP, END = "<!-- yours, top: begin -->\n", "<!-- yours, end: begin -->\n"
REPORT = {
    "text": {"name": "eval|<b>.txt", "sha256": "ab" * 32},
    "ctx": 512,
    "tokens": 49368,
    "note": "By <one> engine.",
    "files": [
        {
            "name": "TidePool-4x4M-v1-Q4_K_M.gguf",
            "size_bytes": 5838336,
            "ppl": 29.0,
            "ppl_ratio": 1.00742,
            "kld_mean": 0.006589,
            "same_top": 93.772,
            "routing": {"same_set": 0.9857},
        },
        {"name": "TidePool-4x4M-v1-Q8_0.gguf", "size_bytes": 1, "ppl_ratio": 1.5},
        {"name": "TidePool-4x4M-v1-Q2_K.gguf", "size_bytes": 3899392, "kld_mean": float("nan"), "same_top": "all"},
        {"name": "other.gguf", "size_bytes": 3},
        "no file",
    ],
}


def manifest_of(plans: list[Plan], request: Request | None = None) -> Manifest:
    """What an export of these plans records; hashes and times are not what is tested here."""
    levels = []
    for plan in plans:
        names = [file.path(Path(plan.default_name)).name for file in plan.files]
        files = tuple(ExportedFile(name, file.size, "0" * 64, "f", 1) for name, file in zip(names, plan.files))
        asked, source = recipe_values(request or Request()), plan.directory.name
        levels.append(Level(plan.file_type.name, files, plan.bits_per_weight, plan.types, source, asked))
    return Manifest(tuple(levels))


class Export:
    """Plans of a checkpoint and the card that is written of them: its text, warnings and front matter."""

    def __init__(self, out: Path, source: Path = MERGE, quants: list[str] | None = None, **asked: Any) -> None:
        request = Request(**asked)
        file_types = [find_file_type(name) for name in quants or ["Q2_K", "Q4_K_M", "Q8_0"]]
        self.plans = make_plans(open_checkpoint(source), file_types, request)
        self.manifest = manifest_of(self.plans, request)
        self.out = out

    def write(self, name: str = CARD, **options: Any) -> str:
        self.warnings = write_card(self.out, self.plans[0], self.manifest, **options)
        self.text = (self.out / name).read_bytes().decode()
        self.fields = ModelCard(self.text).data.to_dict()  # checks what it can without the network
        return self.text


def tables(text: str) -> list[list[list[str]]]:
    """Cells of all tables, by GitHub's rule: a pipe parts cells unless it is escaped, and all rows are of one width."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    parsed = [
        [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in t.strip().split("\n")] for t in found
    ]
    for rows in parsed:
        assert all(re.fullmatch(r"---:?", cell) for cell in rows[1])
        assert {len(row) for row in rows} == {len(rows[0])}
    return parsed


def links(text: str) -> list[str]:
    return [unquote(target) for target in re.findall(r"\]\(([^)]*)\)", text)]


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A copy of the bundled merge to change."""
    return Path(shutil.copytree(MERGE, tmp_path / MERGE.name))


@pytest.fixture
def export(tmp_path: Path) -> Export:
    out = tmp_path / "out"
    out.mkdir()
    return Export(out)


def test_front_matter(export: Export) -> None:
    export.write(quantized_by="me: <b>\nand | you")
    assert export.warnings == []
    expected = {
        "base_model": [f"tidepool/mistral-4m-{topic}" for topic in ("fiction", "speech", "verse", "code")],
        "base_model_relation": "quantized",
        "license": "mit",
        "language": ["en"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "moe", "merge", "mergekit", "mixtral"],
        "quantized_by": "me: <b> and | you",
    }
    assert export.fields == expected
    assert yaml.safe_load(export.text.split("---\n")[1]) == expected
    for name in export.fields["base_model"]:
        validate_repo_id(name)


def test_the_tables_are_of_the_files_and_the_model(export: Export) -> None:
    files, experts, model = tables(export.write())
    rows = [[f"[{p.default_name}]({p.default_name})", p.file_type.name, size_text(p.size)] for p in export.plans]
    assert [row[:3] for row in files[2:]] == rows
    assert [row[3] for row in files[2:]] == ["3.32", "5.00", "8.52"]
    assert [row[4] for row in files[2:]] == [WHEN[plan.file_type.name] for plan in export.plans]
    assert [row[0] for row in experts[2:]] == ["0", "1", "2", "3"]
    hub = "https://huggingface.co/tidepool/mistral-4m-"
    assert links(str(experts)) == [f"{hub}{topic}" for topic in ("fiction", "speech", "verse", "code")]
    assert {row[2] for row in experts[2:]} == {"3"}
    assert ["Experts", "4, of which a token passes 2"] in model
    assert ["Context length", "512"] in model
    assert ["Vocabulary", "4096"] in model


def test_every_file_type_has_a_reason_to_be_chosen() -> None:
    assert WHEN.keys() == FILE_TYPES.keys()


def test_the_hub_reads_the_names(export: Export, hub) -> None:
    split = Export(export.out, splitting=Splitting(max_bytes=2_000_000))
    for each in (export, split):
        names = [name for name in dict.fromkeys(links(each.write())) if name.endswith(".gguf")]
        labels = {name: read["label"] for name, read in zip(names, hub(names, [])["names"])}
        assert labels == {file.name: level.quant for level in each.manifest.levels for file in level.files}


def test_shards_are_all_listed_and_the_first_is_run(export: Export) -> None:
    split = Export(export.out, splitting=Splitting(max_bytes=2_000_000))
    files, shards, *_ = tables(split.write(repo="me/mine-GGUF"))
    assert files[3][0].endswith("Q4_K_M-00001-of-00004.gguf) (first of 4 shards)")
    listed = [(links(row[0])[0], row[1]) for row in shards[2:]]
    assert listed == [(f.name, size_text(f.size)) for level in split.manifest.levels for f in level.files]
    assert len(listed) == 12
    assert "llama-cli -hf me/mine-GGUF:Q4_K_M\nllama-cli -m TidePool-4x4M-v1-Q4_K_M-00001-of-00004.gguf\n" in split.text
    whole = "TidePool-4x4M-v1-Q4_K_M.gguf"  # Ollama takes no shards
    assert f"--merge TidePool-4x4M-v1-Q4_K_M-00001-of-00004.gguf {whole}\necho 'FROM ./{whole}'" in split.text
    assert "ollama run hf.co" not in split.text
    assert '"max_bytes": 2000000' in split.text


def test_how_to_run_it(export: Export) -> None:
    text = export.write(repo="me/mine-GGUF")
    assert "llama-cli -hf me/mine-GGUF:Q4_K_M\nllama-cli -m TidePool-4x4M-v1-Q4_K_M.gguf\n" in text
    assert "ollama run hf.co/me/mine-GGUF:Q4_K_M\n" in text
    assert "echo 'FROM ./TidePool-4x4M-v1-Q4_K_M.gguf' > Modelfile\n" in text
    assert "search for `me/mine-GGUF`" in text
    assert "YOUR-NAME" not in text
    assert "sha256sum -c SHA256SUMS" in text
    assert "Asked for" not in text
    without = Export(export.out, quants=["Q5_K_S", "Q6_K", "Q8_0"]).write()
    assert "llama-cli -hf YOUR-NAME/TidePool-4x4M-v1-GGUF:Q6_K\n" in without


@pytest.mark.parametrize("repo", ["name-alone", "a/b/c", "a--b/c", "", "a/b\n", "a/b;ls", "-a/b"])
def test_an_impossible_repo(repo: str, export: Export) -> None:
    with pytest.raises(UsageError, match=r"no id of a repository on the Hub, expected ORGANIZATION/NAME$"):
        export.write(repo=repo)
    assert list(export.out.iterdir()) == []


@given(st.from_regex(r"[\w.-]{0,98}/?[\w.-]{0,98}(/a)?(\.git)?", fullmatch=True))
@example("a/" + "b" * 96)
@example("a/" + "b" * 97)
@example("a/b.git")
@example("a/.b")
@example("a/b-")
@example("é/b")
@example("a/b\n")
def test_ids_are_those_that_the_hub_takes(text: str) -> None:
    try:
        validate_repo_id(text)
        taken = "/" in text  # an owner is wanted here
    except HFValidationError:
        taken = False
    assert is_repo_id(text) == taken


def test_figures_of_validation(export: Export) -> None:
    plain = export.write()
    files = tables(export.write(report=REPORT))[0]
    assert export.warnings == [
        "TidePool-4x4M-v1-Q8_0.gguf: the report is of a file of another size, so the card has no figures of it"
    ]
    assert files[0][4:] == ["PPL ratio", "mean KL", "same top token", "same experts", "When to choose it"]
    assert [row[4:8] for row in files[2:]] == [["-"] * 4, ["1.0074", "0.00659", "93.8%", "98.6%"], ["-"] * 4]
    text = f"eval\\|&lt;b&gt;.txt (SHA-256 {'ab' * 32}), 49368 tokens, in windows of 512. By &lt;one&gt; engine."
    assert f"Measured with `gguf-moe validate` on {text}\n" in export.text
    dense = {**REPORT, "files": [{**REPORT["files"][0], "routing": {}}]}
    assert tables(export.write(report=dense))[0][0][4:7] == ["PPL ratio", "mean KL", "same top token"]
    assert "same experts" not in export.text
    for nothing in ({}, {"files": []}, {"files": {"a": 1}}, {"files": [{"name": ["x"]}]}):
        assert export.write(report=nothing) == plain


MINE = {
    "text": ("Hello\n", "Bye\n"),
    "no new line needed": ("", "\n\n"),
    "unicode": ("Größe 混合专家 🌊 \u2028 \x85 \x0c\n", "a\tb  \n"),
    "markup": ("---\nlicense: none\n---\n```\n| a | b |\n<!-- a comment -->\n", "<script>1</script>\n# Title\n"),
    "nearly a mark": (" <!-- yours, top: end -->\n<!-- yours: end -->\n", "x <!-- yours, end: end -->\n"),
}


@pytest.mark.parametrize("case", MINE)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("behind", ["", "\nBehind the end.\n", "no line end"])
def test_a_persons_text_stays(case: str, newline: str, behind: str, export: Export) -> None:
    top, end = MINE[case]
    text = export.write().replace(TOP, TOP + top).replace(END, END + end) + behind
    written = text.replace("\n", newline).encode()
    (export.out / CARD).write_bytes(written)
    export.write()
    assert export.warnings == []
    assert (export.out / CARD).read_bytes() == written
    # Whatever else is new, these bytes are the same.
    Export(export.out, quants=["Q6_K"]).write(repo="a/b")
    changed = (export.out / CARD).read_bytes()
    assert changed != written
    assert (TOP + top).replace("\n", newline).encode() in changed
    assert (END + end).replace("\n", newline).encode() in changed
    assert changed.endswith(behind.replace("\n", newline).encode())


def with_fields(text: str, **fields: Any) -> str:
    """The card as a person leaves it who sets these keys of the front matter."""
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return f"---\n{yaml.safe_dump({**yaml.safe_load(front), **fields}, allow_unicode=True)}---\n{body}"


def test_a_persons_front_matter_stays(export: Export) -> None:
    text = export.write()
    ours = export.fields
    added = {
        "datasets": ["größe"],
        "widget": [{"text": "two\nlines\n---\n"}],
        "thumbnail": "no",
        "date": datetime.date(2026, 1, 2),
        "odd": "\ud800",
        "quantized_by": "me",
        "model-index": [
            {
                "name": "m",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "d", "type": "d"},
                        "metrics": [{"type": "acc", "value": 1}],
                    }
                ],
            }
        ],
    }
    joined = {"tags": ["mine", "gguf"], "base_model": "me/merge"}
    (export.out / CARD).write_text(with_fields(text, **added, **joined, license="apache-2.0"))
    first = export.write()
    assert export.warnings == [
        f"{export.out / CARD}: license was 'apache-2.0' and is 'mit' again, as the source has it"
    ]
    assert yaml.safe_load(re.split(r"^---\n", first, flags=re.MULTILINE)[1]) == {
        **ours,
        **added,
        "tags": [*ours["tags"], "mine"],
        "base_model": [*ours["base_model"], "me/merge"],
    }
    assert export.write() == first
    assert export.warnings == []


MARKS = "does not have each of the four lines <!-- yours, ... --> once and in order"
FRONT = "does not begin with keys and values between lines ---"


def spoiled(text: str) -> Iterator[tuple[str, bytes]]:
    """Cards that are not ours or no longer whole, and how what is wrong with them is named."""
    text = text.replace(TOP, TOP + "mine\n")
    for mark in re.findall(r"^<!-- yours.*\n", text, re.MULTILINE):
        yield MARKS, text.replace(mark, "").encode()
        yield MARKS, text.replace(mark, mark.rstrip(">\n") + "\n").encode()
    yield MARKS, (text + TOP).encode()
    yield MARKS, text.replace(TOP, "@").replace(END, TOP).replace("@", END).encode()
    yield MARKS, b"---\nlicense: mit\n---\n# Mine\n"
    yield FRONT, text.split("---\n", 2)[2].encode()
    yield FRONT, text.replace("\n---\n", "\n", 1).encode()
    yield FRONT, f"---\n- a\n---\n{text.split('---', 2)[2]}".encode()
    yield FRONT, b"# Mine\n"
    yield FRONT, b""
    yield "while parsing", text.replace("license: mit", "license: [").encode()
    yield "string index out of range", text.replace("license: mit", "license: !!int ''").encode()
    pairs = zip("abcdef", "bcdefg")
    bomb = "a: &a [1]\n" + "".join(f"{y}: &{y} [{','.join(['*' + x] * 10)}]\n" for x, y in pairs)
    yield "more than 131072 values once aliases are unfolded", text.replace("license: mit\n", bomb).encode()
    yield "is not UTF-8", text.encode("utf-16")


def test_what_is_not_a_whole_card_of_ours_is_left_alone(export: Export) -> None:
    text = export.write()
    stays = "not a whole card of gguf-moe's, so it stays as it is: "
    for reason, content in spoiled(text):
        (export.out / CARD).write_bytes(content)
        assert export.write(BESIDE) == text
        left, beside = export.warnings
        assert left.startswith(f"{export.out / CARD}: {stays}{reason}")
        assert beside == f"{export.out / BESIDE}: holds the model card"
        assert (export.out / CARD).read_bytes() == content
        # The file beside is as careful of people's text.
        (export.out / BESIDE).write_bytes(content)
        assert write_card(export.out, export.plans[0], export.manifest)[-1] == (
            f"{export.out}: no model card is written; move one of {CARD} and {BESIDE} away"
        )
        assert (export.out / CARD).read_bytes() == (export.out / BESIDE).read_bytes() == content
        (export.out / BESIDE).unlink()


def test_a_directory_in_the_way(export: Export) -> None:
    (export.out / CARD).mkdir()
    export.write(BESIDE)
    assert export.warnings[0].endswith("so it stays as it is: is no regular file")


NASTY = (
    "</td><script>alert(1)</script> | a | `b` [c](javascript:d) ![e](f) *g* _h_ www.evil.com \x1b[2J\u202e\n---\n# i"
)


def test_what_models_are_called_does_not_become_markup(merge: Path, export: Export) -> None:
    fields = {"license": NASTY, "tags": [NASTY, "<!-- yours, top: begin -->"], "pipeline_tag": NASTY}
    (merge / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n")
    experts = [{"source_model": f"a/<b>|\n{n} | *b* <!--", "positive_prompts": NASTY} for n in range(4)]
    (merge / "mergekit_moe_config.yml").write_text(yaml.safe_dump({"experts": experts}))
    hostile = Export(export.out, merge, name=f"{NASTY}\n{TOP}")
    text = hostile.write(quantized_by=f"---\n{TOP}")
    body = text.split("\n---\n", 1)[1]
    assert not re.search(r"<(?!!-- )", re.sub(r"```.*?```", "", body, flags=re.DOTALL))
    assert text.count(TOP) == 1
    assert all(line.isprintable() for line in text.split("\n"))
    assert [row[1:] for row in tables(body)[1][2:]] == [
        [rf"a/&lt;b&gt;\| {n} \| \*b\* &lt;\!--", "-"] for n in range(4)
    ]
    heading = next(line for line in body.split("\n") if line.startswith("# "))
    assert heading.startswith(
        r"# &lt;/td&gt;&lt;script&gt;alert\(1\)&lt;/script&gt; \| a \| \`b\` \[c\]\(javascript\:d\) "
    )
    assert hostile.fields["license"] == hostile.fields["pipeline_tag"] != NASTY
    assert "\n" not in hostile.fields["license"]
    assert hostile.fields["quantized_by"] == "--- <!-- yours, top: begin -->"
    again = hostile.write(quantized_by=f"---\n{TOP}")
    assert again == text
    assert len(hostile.warnings) == 4  # of the donors, none of the card that was there


@given(st.text())
def test_escaped_text_stays_one_cell_of_one_line(text: str) -> None:
    shown = escaped(text)
    assert shown.isprintable()
    assert not re.search(r"[<>]|(?<!\\)(?:\\\\)*[|`\[\]]", shown)


def test_donors_without_an_id_are_named_and_left_out(merge: Path, export: Export) -> None:
    (merge / "README.md").unlink()
    names = ["a/first", "/home/me/second-7B", "b--c/third", "a/first"]
    experts = [{"source_model": name, "positive_prompts": ["x"] * n} for n, name in enumerate(names)]
    (merge / "mergekit_moe_config.yml").write_text(yaml.safe_dump({"experts": experts}))
    local = Export(export.out, merge)
    text = local.write()
    assert local.fields["base_model"] == ["a/first"]
    assert local.warnings == [
        "README.md: base_model lacks Second 7B, which has no id on the Hub",
        "README.md: base_model lacks Third, which has no id on the Hub",
    ]
    assert [row[1:] for row in tables(text)[1][2:]] == [
        ["[a/first](https://huggingface.co/a/first)", "0"],
        ["second-7B", "1"],
        ["b--c/third", "2"],
        ["[a/first](https://huggingface.co/a/first)", "3"],
    ]
    assert "/home" not in text
    assert not {"license", "language", "pipeline_tag"} & local.fields.keys()


def test_the_merge_itself_comes_first_where_its_id_is_known(merge: Path, export: Export, tmp_path: Path) -> None:
    fields = {"license": "other", "license_name": "tide", "license_link": "LICENSE", "base_model": ["a/b"]}
    (merge / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}---\n")
    (tmp_path / "m.json").write_text(
        '{"general.source.repo_url": "https://huggingface.co/me/TidePool", "general.quantized_by": "me"}'
    )
    named = Export(export.out, merge, metadata=tmp_path / "m.json")
    named.write()
    assert named.fields["base_model"][:2] == ["me/TidePool", "tidepool/mistral-4m-fiction"]
    assert named.fields["base_model"][-1] == "a/b"
    kept = {key: named.fields[key] for key in ("license", "license_name", "license_link", "quantized_by")}
    assert kept == {"license": "other", "license_name": "tide", "license_link": "LICENSE", "quantized_by": "me"}


def test_a_configuration_of_another_merge(merge: Path, export: Export) -> None:
    (merge / "mergekit_moe_config.yml").write_text(yaml.safe_dump({"experts": [{"source_model": "a/b"}] * 3}))
    other = Export(export.out, merge)
    text = other.write()
    assert f"{merge}: mergekit's configuration has 3 experts, the model 4" in other.warnings
    assert "## Experts" not in text


@pytest.mark.parametrize(
    ("content", "donors"),
    [
        ({"experts": [{"source_model": "a/b@main"}, {"source_model": {"path": "c"}}]}, [("a/b", None), ("c", None)]),
        ({"experts": [{"source_model": "a/b"}, {"positive_prompts": ["x"]}]}, []),
        ({"experts": [{"source_model": "a/b"}, "c"]}, []),
        ({"experts": {"source_model": "a/b"}}, []),
        ({"models": [{"model": "a/b"}]}, []),
        ("experts: [", []),
        ([1], []),
        (None, []),
    ],
)
def test_donors_of_experts(content: Any, donors: list[tuple], tmp_path: Path) -> None:
    if content is not None:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "mergekit_moe_config.yml").write_text(text)
    assert expert_donors(tmp_path) == [Donor(*donor) for donor in donors]


def test_a_gguf_file_as_source(export: Export, made) -> None:
    plans = make_plans(open_gguf(made("json", "BF16")), [find_file_type("Q4_K_M")])
    assert write_card(export.out, plans[0], manifest_of(plans)) == []
    text = (export.out / CARD).read_text()
    fields = ModelCard(text).data.to_dict()
    assert fields["base_model"][0] == "tidepool/mistral-4m-fiction"
    assert fields["tags"] == ["gguf", "moe", "merge", "mergekit", "mixtral", "text-generation"]
    assert "## Experts" not in text
    assert ["Vocabulary", "4096"] in tables(text)[1]


def test_a_source_card_that_has_become_unreadable(merge: Path, export: Export) -> None:
    broken = Export(export.out, merge)
    (merge / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(GgufMoeError, match=r"README\.md: model card .* unreadable"):
        broken.write()


def test_the_card_in_the_documentation(export: Export) -> None:
    shown = re.search(r"^````markdown\n(.*?)^\.\.\.\n````$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    text = Export(export.out, quants=LADDER).write(quantized_by="me", repo="me/TidePool-4x4M-v1-GGUF")
    assert text.startswith(shown[1])
    assert shown[1].endswith("## How these files were made\n\n")
