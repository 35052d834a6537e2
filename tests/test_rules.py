"""Types that a user asks for: the whole file is the one that llama.cpp's quantizer makes when asked the same."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import gguf
import pytest
from checkpoints import MERGE, bundled
from neighbours import Llama
from variants import VARIANTS, narrow, save

from gguf_moe.errors import UsageError
from gguf_moe.gguf_reader import read_gguf
from gguf_moe.recipe import FILE_TYPES, RecipeFacts
from gguf_moe.recipe_file import read_recipe
from gguf_moe.rules import Chooser, parse_rules
from quant import FORMATS

# Made by llama.cpp's quantizer: tests/tools/make_quantizer_golden.py.
CASES = json.loads((Path(__file__).parent / "golden" / "quantizer.json").read_text(encoding="utf-8"))
OPTIONS = {"output": "--output-tensor-type", "token_embedding": "--token-embedding-type"}
FLAGS = {"pure": "--pure", "leave_output": "--leave-output-tensor"}


def options(asked: dict) -> list[str]:
    """What is asked of the quantizer, as options of ours."""
    found = [f"--tensor-type={pattern}={kind}" for pattern, kind in asked.get("tensor_types", [])]
    found += [f"{option}={asked[key]}" for key, option in OPTIONS.items() if key in asked]
    found += [flag for key, flag in FLAGS.items() if asked.get(key)]
    for key, kind, value in asked.get("override_kv", []):
        text = str(value).lower() if kind == "bool" else value
        found.append(f"--override-kv={key}={kind}:{text}")
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {variant: save(variant, tmp_path_factory.mktemp("variant")) for variant in VARIANTS}


def test_the_golden_set_is_whole() -> None:
    assert len(CASES) == 36 + 60
    assert {case["variant"] for case in CASES} == VARIANTS.keys()


@pytest.mark.parametrize(
    "case",
    [*CASES[:36], *(pytest.param(case, marks=pytest.mark.long) for case in CASES[36:])],  # those by lot
    ids=lambda c: f"{c['variant']}-{c['file_type']}-{json.dumps(c['asked'])[:60]}".replace(" ", ""),
)
def test_the_file_is_llama_cpps(case: dict, sources: dict[str, Path], run, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    result = run("convert", sources[case["variant"]], "--quant", case["file_type"], *options(case["asked"]), "-o", path)
    assert result.exit_code == 0, result.output
    types: dict[str, int] = {}
    for tensor in read_gguf(path).tensors:
        types[tensor.type] = types.get(tensor.type, 0) + 1
    assert types == case["types"]
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (case["size"], case["sha256"])


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.type for tensor in read_gguf(path).tensors}


def convert(run, target: Path, *arguments: object) -> Path:
    result = run("convert", MERGE, *arguments, "-o", target)
    assert result.exit_code == 0, result.output
    return target


@pytest.mark.parametrize("kind", FORMATS)
def test_a_router_of_any_type_that_fits_runs(kind: str, run, made, tmp_path: Path) -> None:
    path = convert(run, tmp_path / "out.gguf", "--quant", "F32", "--router-type", kind)
    assert {t for name, t in types_of(path).items() if "ffn_gate_inp" in name} == {kind}
    ids = [1, 300, 17, 2400, 5]
    with Llama(made("json", "F32")) as model:
        want = model.logits(ids)
    with Llama(path) as model:
        error = ((model.logits(ids) - want) ** 2).mean() ** 0.5 / want.std()
    assert error < (0.2 if FORMATS[kind].bits_per_weight > 4 else 0.6)


def test_patterns_work_for_16_and_32_bits_too(run, made, tmp_path: Path) -> None:
    """llama-quantize does not look at patterns then; we do what was asked."""
    path = convert(run, tmp_path / "out.gguf", "--quant", "BF16", "--tensor-type", "ffn_.*_exps=q4_k")
    types = types_of(path)
    assert {t for name, t in types.items() if name.endswith("_exps.weight")} == {"Q4_K"}
    assert types["output.weight"] == types["token_embd.weight"] == "BF16"
    quantized = types_of(made("json", "Q4_K_M"))
    assert list(types) == list(quantized), "not in the quantizer's order"
    with Llama(path) as model:
        assert model.logits([1, 2, 3]).shape == (3, 4096)


def test_patterns_are_searched_anywhere_in_any_case_and_layers_restrict_them(run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
        bits = 4
        router-type = "f16"
        token-embedding-type = "Q8_0"

        [[tensor-type]]
        pattern = 'FFN_\\D+_exps'  # llama-quantize would make \\d of it
        layers = "0, 2-3"
        type = "q6_k"
        """
    )
    types = types_of(convert(run, tmp_path / "a.gguf", "--recipe", recipe))
    experts = {name: t for name, t in types.items() if name.endswith("_exps.weight")}
    assert {name for name, t in experts.items() if t == "Q6_K"} == {n for n in experts if not n.startswith("blk.1.")}
    assert (types["token_embd.weight"], types["blk.0.ffn_gate_inp.weight"]) == ("Q8_0", "F16")

    path = convert(
        run,
        tmp_path / "b.gguf",
        *("--recipe", recipe, "--quant", "Q5_K_S", "--token-embedding-type", "Q4_0", "--tensor-type", "ffn_up=Q8_0"),
    )
    types = types_of(path)
    assert gguf.GGUFReader(path).fields["general.file_type"].contents() == 16
    assert (types["token_embd.weight"], types["blk.0.ffn_gate_inp.weight"]) == ("Q4_0", "F16")
    assert (types["blk.0.ffn_up_exps.weight"], types["blk.0.ffn_gate_exps.weight"]) == ("Q8_0", "Q6_K")


def test_the_dry_run_says_by_which_rule_and_instead_of_what(run) -> None:
    arguments = ("--tensor-type", "attn_v=Q5_0", "--output-tensor-type", "Q8_0", "--router-type", "BF16")
    result = run("convert", MERGE, "--bits", 4, *arguments, "--dry-run")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if ".weight" in line}
    assert lines["blk.2.attn_v.weight"].endswith("  by attn_v=Q5_0, else Q6_K")
    assert lines["blk.0.attn_v.weight"].endswith("  by attn_v=Q5_0, else Q4_K")
    assert lines["output.weight"].endswith("  by output-tensor-type, else Q6_K")
    assert lines["blk.1.ffn_gate_inp.weight"].endswith("  by router-type, else F32")
    assert lines["blk.1.attn_q.weight"].endswith("  Q4_K    36864")


def test_the_dry_run_tells_the_fallback_of_an_override_and_the_shift_of_the_mix(run, tmp_path: Path) -> None:
    path = save("narrow", tmp_path)
    result = run("convert", path, "--bits", 4, "--tensor-type", "attn_q=Q6_K", "--dry-run")
    line = next(line for line in result.stdout.splitlines() if line.startswith("blk.0.attn_q.weight"))
    assert line.endswith("  instead of Q6_K, by attn_q=Q6_K, else Q5_0")
    result = run("convert", save("deep", tmp_path), "--bits", 4, "--tensor-type", "blk.0.attn_v=F16", "--dry-run")
    line = next(line for line in result.stdout.splitlines() if line.startswith("blk.1.attn_v.weight"))
    assert line.endswith("  by place among the tensors left to the mix, else Q4_K")


@pytest.mark.parametrize(
    "arguments",
    [("--tensor-type", "attn_=Q5_0", "--tensor-type", "attn_v=Q8_0"), ("--output-tensor-type", "Q8_0")],
)
def test_a_rule_that_others_overrule_is_warned_of(arguments: tuple, run) -> None:
    last = "attn_v=Q8_0" if len(arguments) == 4 else "^output.weight=Q5_K"
    arguments = arguments if len(arguments) == 4 else (*arguments, "--tensor-type", last)
    result = run("convert", MERGE, "--bits", 4, *arguments, "--dry-run")
    assert result.exit_code == 0
    assert result.stderr == (
        f"gguf-moe: warning: --tensor-type {last}: every tensor it matches is taken by an option or a rule before it\n"
    )


def test_the_dry_run_names_the_keys_too(run) -> None:
    arguments = ("--name", "Deep Tide", "--override-kv", "llama.context_length=int:64")
    lines = run("convert", MERGE, "--bits", 4, *arguments, "--dry-run").stdout.splitlines()
    rows = [re.split(r"  +", line) for line in lines]
    assert ["general.name", "Deep Tide"] in rows
    assert ["general.base_model.3.name", "Mistral 4m Code"] in rows
    assert ["llama.context_length", "64", "by --override-kv"] in rows
    assert lines[-1].endswith("/Deep-Tide-4x4M-Q4_K_M.gguf")


def test_the_recipe_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0])
    recipe = read_recipe(path)
    assert (recipe.file_type, recipe.strict) == (FILE_TYPES["Q4_K_M"], True)
    assert (recipe.rules.output, recipe.rules.token_embedding, recipe.rules.router) == ("Q8_0", "Q6_K", "F16")
    assert [o.text for o in recipe.rules.overrides] == [
        *("ffn_down_exps=Q6_K in layers 0-3, 28-31", "attn_(k|v)=Q8_0"),
    ]
    assert recipe.rules.overrides[0].layers == {0, 1, 2, 3, 28, 29, 30, 31}


# Types of a dense model of 20 layers, by llama.cpp's quantizer: its mix counts ffn_down there.
DENSE = json.loads((Path(__file__).parent / "golden" / "quantizer-dense.json").read_text())


@pytest.mark.parametrize("case", DENSE, ids=lambda c: f"{c['file_type']}-{c['tensor_types']}")
def test_types_of_a_dense_model_are_llama_cpps(case: dict) -> None:
    rules = parse_rules([f"{pattern}={kind}" for pattern, kind in case["tensor_types"]])
    chooser = Chooser(FILE_TYPES[case["file_type"]], RecipeFacts(20, 0, 4, 1, tied=False), rules)
    for name, kind in case["types"].items():
        layer = re.match(r"blk\.(\d+)\.", name)
        role = name.split(".")[2 if layer else 0]
        choice = chooser.choose(name, role, int(layer[1]) if layer else None, 256, "BF16")
        assert choice.type == kind, name
    assert chooser.check() == []


def test_no_router_to_retype() -> None:
    chooser = Chooser(FILE_TYPES["Q4_K_M"], RecipeFacts(1, 0, 4, 1, tied=False), parse_rules(router="F16"))
    chooser.choose("blk.0.attn_q.weight", "attn_q", 0, 256, "BF16")
    with pytest.raises(UsageError, match=r"^--router-type: the model has no router$"):
        chooser.check()


KNOWN = ", ".join(FORMATS)
REFUSALS = {
    "no separator": (["--tensor-type", "ffn"], "--tensor-type ffn: expected PATTERN=TYPE, as ffn_down_exps=Q6_K"),
    "unknown type": (
        ["--tensor-type", "ffn=Q9"],
        f"--tensor-type ffn=Q9: unknown tensor type 'Q9', expected one of {KNOWN}",
    ),
    "empty pattern": (
        ["--tensor-type", "=Q8_0"],
        "--tensor-type =Q8_0: the pattern is empty, expected a regular expression on tensor names",
    ),
    "no regular expression": (
        ["--tensor-type", "ffn(=Q8_0"],
        "--tensor-type ffn(=Q8_0: 'ffn(' is no regular expression: missing ), unterminated subpattern at position 3",
    ),
    "unknown output type": (
        ["--output-tensor-type", "Q4_K_M"],
        f"--output-tensor-type: unknown tensor type 'Q4_K_M', expected one of {KNOWN}",
    ),
    "no match": (
        ["--tensor-type", "ffn_dwon_exps=Q8_0"],
        "--tensor-type ffn_dwon_exps=Q8_0: matches no tensor; names are like ffn_down_exps, ffn_up_exps, "
        "ffn_gate_exps, ffn_gate_inp",
    ),
    "nothing near": (
        ["--tensor-type", "zzz=Q8_0"],
        "--tensor-type zzz=Q8_0: matches no tensor; names are like output, output_norm, token_embd, attn_k",
    ),
    "router by pattern": (
        ["--tensor-type", "ffn_gate_inp=F16"],
        "--tensor-type ffn_gate_inp=F16: matches only tensors that stay F32, as blk.0.ffn_gate_inp.weight; "
        "routers take --router-type",
    ),
    "output twice": (
        ["--leave-output-tensor", "--output-tensor-type", "Q8_0"],
        "--leave-output-tensor and --output-tensor-type contradict each other, give one",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_rules_that_cannot_be_followed(case: str, run, tmp_path: Path) -> None:
    arguments, message = REFUSALS[case]
    result = run("convert", MERGE, "--bits", 4, *arguments, "-o", tmp_path)
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_no_output_matrix_to_leave(run, tmp_path: Path) -> None:
    result = run("convert", save("tied", tmp_path), "--bits", 4, "--leave-output-tensor")
    message = "--leave-output-tensor: the model has no output.weight, its embeddings are tied"
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: {message}\n")


@pytest.mark.parametrize("option", ["output-tensor-type", "token-embedding-type", "router-type"])
def test_forced_types_have_no_fallback(option: str, run, tmp_path: Path) -> None:
    name = {"o": "output.weight", "t": "token_embd.weight", "r": "blk.0.ffn_gate_inp.weight"}[option[0]]
    result = run("convert", narrow(bundled(), 96).save(tmp_path / "in"), "--bits", 4, f"--{option}", "Q6_K")
    message = f"--{option}: {name} has rows of 96 weights, which Q6_K's block of 256 does not divide"
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: {message}\n")


def test_strict_refuses_fallbacks(run, tmp_path: Path) -> None:
    path = narrow(bundled(), 96).save(tmp_path / "in")
    result = run("convert", path, "--bits", 4, "--strict", "-o", tmp_path / "out.gguf")
    message = (
        "--strict: token_embd.weight (and 20 more) has rows of 96 weights, which Q4_K's block of 256 does not divide; "
        "it would fall back to Q5_0"
    )
    assert (result.exit_code, result.stderr) == (1, f"gguf-moe: {message}\n")
    assert not (tmp_path / "out.gguf").exists()
    arguments = ("--quant", "Q8_0", "--strict", "-o", tmp_path / "out.gguf")
    assert run("convert", path, *arguments).exit_code == 0


RECIPES = {
    "missing": (None, "--recipe {path}: No such file or directory"),
    "no TOML": ("bits =", "--recipe {path}: not readable as TOML: Invalid value (at end of document)"),
    "unknown key": (
        "bit = 4",
        "{path}: unknown key 'bit', expected one of bits, quant, output-tensor-type, token-embedding-type, "
        "router-type, pure, leave-output-tensor, strict, tensor-type",
    ),
    "number for text": ("router-type = 16", "{path}: router-type is 16, expected a string"),
    "number for a flag": ("pure = 1", "{path}: pure is 1, expected true or false"),
    "flag for bits": ("bits = true", "{path}: bits is True, expected an integer"),
    "both": ('bits = 4\nquant = "Q4_0"', "{path}: give either bits or quant"),
    "odd bits": ("bits = 7", "{path}: bits is 7, expected one of 2, 3, 4, 5, 6, 8, 16"),
    "one table": (
        "[tensor-type]\npattern = 'a'",
        "{path}: tensor-type is {{'pattern': 'a'}}, expected [[tensor-type]] tables",
    ),
    "rule no table": ("tensor-type = [1]", "{path}: tensor-type 1 is 1, expected a table with pattern and type"),
    "rule without type": ("[[tensor-type]]\npattern = 'a'", "{path}: tensor-type 1: type is missing"),
    "unknown key in a rule": (
        "[[tensor-type]]\nlayer = '1'",
        "{path}: tensor-type 1: unknown key 'layer', expected one of pattern, type, layers",
    ),
    "layers upside down": (
        "[[tensor-type]]\npattern = 'ffn'\ntype = 'F16'\nlayers = '3-1'",
        "{path}: tensor-type 1: layers is '3-1', expected numbers and ranges as '0-3, 28-31'",
    ),
    "layers of another model": (
        "[[tensor-type]]\npattern = 'ffn'\ntype = 'F16'\nlayers = '28-31'",
        "{path}: tensor-type 1, ffn=F16 in layers 28-31: layer 31 is named, but the model has 4 layers",
    ),
    "some layers of another model": (
        "[[tensor-type]]\npattern = 'ffn'\ntype = 'F16'\nlayers = '2-4'",
        "{path}: tensor-type 1, ffn=F16 in layers 2-4: layer 4 is named, but the model has 4 layers",
    ),
    "pattern of another layer": (
        "[[tensor-type]]\npattern = 'blk.0.ffn'\ntype = 'F16'\nlayers = '1'",
        "{path}: tensor-type 1, blk.0.ffn=F16 in layers 1: matches no tensor of these layers, but others, as "
        "blk.0.ffn_down_exps.weight",
    ),
    "unknown quant": ("quant = 'Q9'", "{path}: unknown quant 'Q9', expected one of Q2_K, "),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_cannot_be_followed(case: str, run, tmp_path: Path) -> None:
    content, message = RECIPES[case]
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_text(content)
    arguments = () if content and ("quant" in content) else ("--bits", 4)
    result = run("convert", MERGE, *arguments, "--recipe", path, "-o", tmp_path / "out.gguf")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"gguf-moe: {message.format(path=path)}")
    assert not (tmp_path / "out.gguf").exists()
