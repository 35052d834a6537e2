"""Whatever lies in a directory, `convert` ends soon and in one line: pipes, lost links, YAML's aliases, any JSON."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import architectures as cases
import pytest
from checkpoints import MERGE
from test_bad_input import refusal

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.errors import GgufMoeError
from gguf_moe.metadata import _KINDS
from gguf_moe.plan import make_plan
from gguf_moe.recipe import find_file_type
from gguf_moe.request import Request


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """The bundled merge as links, of which a test replaces some."""
    directory = tmp_path / "in" / MERGE.name
    directory.mkdir(parents=True)
    for file in MERGE.iterdir():
        (directory / file.name).symlink_to(file)
    return directory


def put(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def lost(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.with_name("blob-of-an-interrupted-download"))


UNFOLDING = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "config a pipe": (
        lambda m: pipe(m / "config.json"),
        "config.json: is no regular file, expected one with a JSON object",
    ),
    "config endless": (
        lambda m: (m / "config.json").unlink() or (m / "config.json").symlink_to("/dev/zero"),
        "config.json: is no regular file, expected one with a JSON object",
    ),
    "settings a directory": (
        lambda m: (m / "tokenizer_config.json").unlink() or (m / "tokenizer_config.json").mkdir(),
        "tokenizer_config.json: is no regular file, expected one with a JSON object",
    ),
    "settings lost": (lambda m: lost(m / "tokenizer_config.json"), "tokenizer_config.json: no such file"),
    "SentencePiece model lost": (
        lambda m: lost(m / "tokenizer.model"),
        "tokenizer.model: is no regular file, nor a link to one",
    ),
    "card that unfolds": (
        lambda m: put(m / "README.md", f"---\n{UNFOLDING}tags: *a39\n---\n"),
        "README.md: model card or generation_config.json unreadable: more than 131072 values once aliases are unfolded",
    ),
    "card in itself": (
        lambda m: put(m / "README.md", "---\ntags: &a [x, *a]\n---\n"),
        "README.md: model card or generation_config.json unreadable: more than 131072 values once aliases are unfolded",
    ),
    "temperature beyond 32 bits": (
        lambda m: put(m / "generation_config.json", '{"temperature": 1e308}'),
        f"{MERGE.name}: general.sampling.temp, of README.md, generation_config.json or --metadata, is 1e+308: ",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_files(case: str, run, merge: Path) -> None:
    change, message = ODD[case]
    change(merge)
    assert message in refusal(run, merge)


MERGEKIT = {"slices a number": "slices: 1\n", "in itself": "base_model: &a {model: *a}\n", "unfolding": UNFOLDING}


@pytest.mark.parametrize("case", MERGEKIT)
def test_odd_configurations_of_mergekit_decide_nothing(case: str, run, merge: Path) -> None:
    put(merge / "mergekit_moe_config.yml", MERGEKIT[case])
    result = run("convert", merge, "--bits", 4, "--dry-run")
    assert result.exit_code == 0
    assert "general.base_model.0.name" in result.stdout


def test_pipes_among_templates_and_configurations_are_not_opened(run, merge: Path) -> None:
    put(merge / "tokenizer_config.json", '{"model_max_length": 512}')
    put(merge / "chat_template.jinja", "{{ messages }}")
    (merge / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool.jinja", "mergekit_moe_config.yml", "generation_config.json"):
        pipe(merge / name)
    assert run("convert", merge, "--bits", 4, "--dry-run").exit_code == 0


@pytest.mark.parametrize("option", ["--name", "--size-label"])
def test_names_that_are_no_text(option: str, run, made) -> None:
    for model in (MERGE, made("json", "BF16")):
        result = run("convert", model, "--bits", 4, "--dry-run", option, "4x7B\udcff")
        assert (result.exit_code, result.stderr) == (2, f"gguf-moe: {option} 4x7B\\udcff: not valid UTF-8\n")


def test_more_experts_than_a_gguf_file_has(run, made) -> None:
    path = made("json", "BF16")
    result = run("convert", path, "--bits", 4, "--dry-run", "--experts-used", 5)
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: --experts-used 5: {path} has 4 experts\n")


def test_a_message_quotes_no_more_than_fits(run) -> None:
    result = run("convert", MERGE, "--quant", "x" * 100_000)
    assert result.exit_code == 2
    assert result.stderr.startswith("gguf-moe: unknown quant 'xxx")
    assert result.stderr.endswith(", BF16, F32\n")
    assert len(result.stderr) < 2100


def test_a_link_to_nowhere_is_a_taken_name(run, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.symlink_to(tmp_path / "gone")
    result = run("convert", MERGE, "--bits", 4, "-o", target)
    assert (result.exit_code, result.stderr) == (1, f"gguf-moe: {target}: exists; use --force to replace it\n")


def test_a_directory_that_is_missing_does_not_become_a_file(run, tmp_path: Path) -> None:
    result = run("convert", MERGE, "--bits", 4, "-o", f"{tmp_path}/converted/")
    assert (result.exit_code, result.stderr) == (2, f"gguf-moe: --output {tmp_path}/converted/: no such directory\n")
    assert list(tmp_path.iterdir()) == []


# Files that people edit -> keys that are read from them.
KEYS = {
    "config.json": (
        *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
        *("rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "tie_word_embeddings"),
        *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("shared_expert_intermediate_size", "n_shared_experts", "norm_topk_prob", "scoring_func", "moe_layer_freq"),
        *("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step", "hidden_act", "quantization_config"),
        *("text_config", "bos_token_id", "eos_token_id", "partial_rotary_factor", "_name_or_path"),
    ),
    "tokenizer_config.json": (
        *("bos_token", "eos_token", "pad_token", "add_bos_token", "add_prefix_space", "added_tokens_decoder"),
        *("chat_template", "additional_special_tokens", "extra_special_tokens"),
    ),
    "tokenizer.json": (
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
        "truncation",
    ),
    "added_tokens.json": ("<a>", "", "<s>"),
    "generation_config.json": ("temperature", "top_k", "top_p", "sequence", "mirostat"),
    "README.md": (
        *("base_model", "base_models", "datasets", "tags", "license", "language", "name", "model_name", "version"),
        *("author", "basename", "size_label", "url", "doi"),
    ),
    "mergekit_moe_config.yml": ("base_model", "experts", "shared_experts", "models", "slices"),
    "metadata.json": tuple(_KINDS),
}
VALUES = (
    *(None, True, False, 0, -1, 2, 1.5, float("inf"), float("nan"), 1e-46, 1e308, 1 << 31, 1 << 64, 10**400),
    *(
        "",
        "x",
        "1",
        "silu",
        "\0",
        "é\ud800",
        [],
        [1],
        [None],
        [[]],
        ["x", 1],
        [{}],
        {},
        {"a": 1},
        {"0": {"content": "a"}},
    ),
    *({"rope_type": "yarn"}, {"rope_type": 5}, {"type": "linear"}, {"content": 1}, {"model": [], "sources": 1}),
    *([{"source_model": {"model": 1}}], [{"sources": [{"model": []}]}], [{"name": "a", "template": "b"}]),
    *({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, [{"id": 1, "content": 2}]),
)


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_any_value_of_any_key_is_taken_or_refused(rounds: int, saved: cases.Saved, tmp_path: Path) -> None:
    """Whatever is raised, it is a GgufMoeError of one line."""
    rng = random.Random(rounds)
    names = ("mixtral-head-dim-3", "qwen2moe-6", "qwen3moe-tied-8", "deepseek-5", "llama-rope3", "qwen2-yarn", "qwen3")
    outcomes: Counter[str] = Counter()
    for file, keys in KEYS.items():
        for number, key in enumerate(keys * rounds):
            source = saved(rng.choice(names))
            directory = tmp_path / f"{file}-{number}"
            directory.mkdir()
            for path in source.iterdir():
                if path.name != file and not (file == "tokenizer.json" and path.name == "tokenizer.model"):
                    (directory / path.name).symlink_to(path)
            content = json.loads((source / file).read_text()) if (source / file).exists() else {}
            content[key] = rng.choice(VALUES)
            text = json.dumps(content)
            (directory / file).write_text(f"---\n{text}\n---\n" if file == "README.md" else text)
            request = Request(metadata=directory / file if file == "metadata.json" else None)
            try:
                make_plan(open_checkpoint(directory), find_file_type(rng.choice(("Q4_K_M", "F16"))), request)
                outcomes["taken"] += 1
            except GgufMoeError as error:
                outcomes["refused" if len(str(error).splitlines()) == 1 else "told at length"] += 1
    assert outcomes.keys() == {"taken", "refused"}
    assert min(outcomes.values()) > 20
