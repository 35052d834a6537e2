"""Every family and odd shape: transformers' logits out of llama.cpp, and llama.cpp's bytes out of us.

Golden data are transformers' and llama.cpp's (tests/tools/make_architectures_golden.py); the checkpoints are made here
from names and shapes alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import architectures as cases
import gguf
import numpy as np
import pytest
from checkpoints import Parts
from neighbours import Llama
from test_golden import GOLDEN

from gguf_moe.checkpoint import open_checkpoint
from gguf_moe.plan import make_plan
from gguf_moe.recipe import FILE_TYPES, find_file_type

RECORDED = cases.golden()
LOGITS = np.load(GOLDEN / "architectures.npz")
QUANTS = [name for name in FILE_TYPES if name != "Q2_K_S"]
PLANNED = ("Q2_K", "Q3_K_S", "Q3_K_L", "Q4_K_S", "Q5_K_M", "IQ4_XS", "BF16")  # with ENCODED, all rules on types
ENCODED = ("Q3_K_M", "Q4_K_M", "F16")  # converted whole by default; all others in the long tests
ONE_A_FAMILY = (  # whose routers are not on the edge between two experts
    *("llama", "mistral-head-dim", "mixtral-head-dim-3", "qwen2", "qwen3", "qwen2moe-6", "qwen3moe-tied-8"),
    "deepseek-5",
)


def convert(run, directory: Path, quant: str, *options: object) -> Path:
    path = directory.parent / f"{directory.name}-{quant}.gguf"
    result = run("convert", directory, "--quant", quant, "--force", "-o", path, *options)
    assert result.exit_code == 0, result.output
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_golden_set_is_whole() -> None:
    assert set(RECORDED) == set(cases.CASES) == set(LOGITS)
    assert all(set(case["files"]) == set(QUANTS) for case in RECORDED.values())


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_are_transformers(name: str, run, saved: cases.Saved) -> None:
    path = convert(run, saved(name), "F32")
    assert logits_error(path, name) < 1e-5


def logits_error(path: Path, name: str) -> float:
    """Root mean square of the difference from transformers' logits over their spread."""
    want = LOGITS[name]
    with Llama(path) as model:
        have = model.logits(cases.prompt())[list(cases.KEPT_POSITIONS)][:, cases.KEPT_LOGITS]
    return float(np.sqrt(np.mean((have - want) ** 2)) / want.std())


@pytest.mark.parametrize("name", cases.CASES)
def test_keys_types_and_order_are_llama_cpps(name: str, saved: cases.Saved) -> None:
    checkpoint = open_checkpoint(saved(name))
    for quant in PLANNED:
        plan = make_plan(checkpoint, find_file_type(quant))
        want = RECORDED[name]["files"][quant]
        assert dict(sorted(plan.types.items())) == want["types"], quant
        assert sha256(plan.files[0].header) == want["header"], quant


@pytest.mark.parametrize("quant", ENCODED)
@pytest.mark.parametrize("name", cases.CASES)
def test_whole_files_are_llama_cpps(name: str, quant: str, run, saved: cases.Saved) -> None:
    data = convert(run, saved(name), quant).read_bytes()
    assert sha256(data) == RECORDED[name]["files"][quant]["file"]


@pytest.mark.long
@pytest.mark.parametrize("quant", [q for q in QUANTS if q not in ENCODED])
@pytest.mark.parametrize("name", cases.CASES)
def test_whole_files_of_the_other_types_are_llama_cpps(name: str, quant: str, run, saved: cases.Saved) -> None:
    data = convert(run, saved(name), quant).read_bytes()
    assert sha256(data) == RECORDED[name]["files"][quant]["file"]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_eight_bits_predict_closely(name: str, run, saved: cases.Saved) -> None:
    assert logits_error(convert(run, saved(name), "Q8_0"), name) < 0.06


def fused(name: str) -> Parts:
    """A case with the experts of each layer in two tensors: gate above up of every expert, and down."""
    single = cases.recorded(name)
    parts = Parts({}, single.config)
    stacks: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for source, (dtype, array) in single.tensors.items():
        source = source.replace("block_sparse_moe", "mlp")
        for mixtral, others in (("w1.", "gate_proj."), ("w2.", "down_proj."), ("w3.", "up_proj.")):
            source = source.replace(mixtral, others)
        if found := re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)\.weight", source):
            target = found[1] + ("down_proj" if found[3] == "down_proj" else "gate_up_proj")
            stacks.setdefault(target, {})[int(found[2]), found[3]] = array
        else:
            parts.tensors[source] = (dtype, array)
    for target, matrices in stacks.items():
        experts = sorted({expert for expert, _ in matrices})
        kinds = ("gate_proj", "up_proj") if target.endswith("gate_up_proj") else ("down_proj",)
        stack = np.stack([np.concatenate([matrices[expert, kind] for kind in kinds]) for expert in experts])
        parts.tensors[target] = ("F32", stack)
    return parts


@pytest.mark.parametrize("name", [*(n for n, case in RECORDED.items() if "fused" in case), "deepseek-5"])
def test_fused_experts_give_the_same_file(name: str, run, tmp_path: Path) -> None:
    parts = fused(name)
    shapes = {key: list(array.shape) for key, (_, array) in parts.tensors.items()}
    assert shapes == RECORDED[name].get("fused", shapes)  # as transformers saves them
    data = convert(run, cases.save(parts, tmp_path / name), "Q4_K_M").read_bytes()
    assert sha256(data) == RECORDED[name]["files"]["Q4_K_M"]["file"]


def variant(source: Path, directory: Path, **changes: object) -> Path:
    """The same checkpoint with another config.json."""
    directory.mkdir(parents=True)
    for file in source.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    return directory


def test_one_expert_of_a_wish_for_two(run, saved: cases.Saved, tmp_path: Path) -> None:
    directory = variant(saved("mixtral-1"), tmp_path / "mixtral-1", num_experts_per_tok=2)
    result = run("convert", directory, "--quant", "Q4_K_M", "-o", tmp_path / "out.gguf")
    assert result.exit_code == 1
    assert (
        "num_experts_per_tok is 2, but there are 1 experts (num_local_experts); llama.cpp aborts on such a file: "
        in (result.stderr)
    )
    assert result.stderr.endswith("use --experts-used 1\n")
    data = convert(run, directory, "Q4_K_M", "--experts-used", 1).read_bytes()
    assert sha256(data) == RECORDED["mixtral-1"]["files"]["Q4_K_M"]["file"]


@pytest.mark.parametrize("name", ["mixtral-head-dim-3", "qwen2moe-6", "qwen3moe-5", "deepseek-5"])
def test_the_number_of_used_experts_is_the_users(name: str, run, saved: cases.Saved, tmp_path: Path) -> None:
    path = convert(run, variant(saved(name), tmp_path / name), "F32", "--experts-used", 3)
    keys = gguf.GGUFReader(path).fields
    assert [f.contents() for key, f in keys.items() if key.endswith(".expert_used_count")] == [3]
    assert logits_error(path, name) > 0.05  # two in the golden logits


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q6_K", "Q8_0"])  # of two types; of one, so that it is encoded once
def test_qwen2_mixtures_with_tied_embeddings_get_an_output(quant: str, run, tmp_path: Path) -> None:
    """llama.cpp's code for them does not load without; its converter leaves the output out."""
    parts = cases.recorded("qwen2moe-6")
    parts.tensors["lm_head.weight"] = parts.tensors["model.embed_tokens.weight"]
    untied = convert(run, cases.save(parts, tmp_path / "untied" / "merge"), quant).read_bytes()
    del parts.tensors["lm_head.weight"]
    path = convert(run, cases.save(parts, tmp_path / "tied" / "merge"), quant)
    assert path.read_bytes() == untied
    with Llama(path) as model:
        assert np.isfinite(model.logits(cases.prompt())).all()


def test_identical_experts(run, tmp_path: Path) -> None:
    parts = cases.recorded("qwen3moe-5")
    for name in list(parts.tensors):
        if ".experts." in name:
            head, _, tail = name.partition(".experts.")
            parts.tensors[name] = parts.tensors[f"{head}.experts.0.{tail.partition('.')[2]}"]
    path = convert(run, cases.save(parts, tmp_path / "alike"), "Q6_K")
    stack = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "blk.4.ffn_up_exps.weight")
    assert all(np.array_equal(stack[0], expert) for expert in stack)
    with Llama(path) as model:
        assert np.isfinite(model.logits(cases.prompt())).all()


OLD_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_the_rotary_base_in_its_old_place(run, saved: cases.Saved, tmp_path: Path) -> None:
    old = {"rope_theta": 500000.0, "rope_scaling": {**OLD_ROPE, "original_max_position_embeddings": 32}}
    old["architectures"] = ["LLaMAForCausalLM"]  # and the family's old name
    directory = variant(saved("llama-rope3"), tmp_path / "llama-rope3", rope_parameters="absent", **old)
    data = convert(run, directory, "F16").read_bytes()
    assert sha256(data) == RECORDED["llama-rope3"]["files"]["F16"]["file"]


WINDOW = "in this architecture llama.cpp attends to the whole text; beyond 64 tokens its answers differ"
NOTES = {
    "mistral window": ("mistral-head-dim", {"sliding_window": 64}, WINDOW),
    "window of a mixture": ("mixtral-head-dim-3", {"sliding_window": 64}, WINDOW),
    "qwen window": ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, WINDOW),
    "qwen window not in use": ("qwen2", {"sliding_window": 64}, None),
    "window as long as the context": ("mistral-head-dim", {"sliding_window": 512}, None),
    "window that llama has not": ("llama", {"sliding_window": 64}, None),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "llama.cpp has no dynamic rope scaling; texts beyond 512 tokens are read without",
    ),
    "longrope": (
        "llama",
        {"rope_parameters": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "llama.cpp has no factors for rope_type 'longrope' in this architecture; positions are read without scaling",
    ),
    "yarn as usual": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}}, None),
    "yarn with its own numbers": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.5}},
        "llama.cpp does not heed attention_factor = 1.5, beta_fast = 16 of YaRN in this architecture",
    ),
    "renormalized": (
        "qwen2moe-6",
        {"norm_topk_prob": True},
        "norm_topk_prob is true, but in this architecture llama.cpp leaves the used experts' weights as the router "
        "gives them; its answers differ from transformers' unless all experts are used (--experts-used 6)",
    ),
    "not renormalized": (
        "qwen3moe-5",
        {"norm_topk_prob": "absent"},
        "norm_topk_prob is false, but in this architecture llama.cpp scales the used experts' weights to a sum of 1; ",
    ),
    "renormalized shared": ("deepseek-5", {"norm_topk_prob": True}, "llama.cpp leaves the used experts' weights as"),
    "renormalized single": ("deepseek-5", {"norm_topk_prob": True, "num_experts_per_tok": 1}, None),
    "renormalized all": ("qwen2moe-6", {"norm_topk_prob": True, "num_experts_per_tok": 6}, None),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_llama_cpp_computes_otherwise_is_told(case: str, run, saved: cases.Saved, tmp_path: Path) -> None:
    name, changes, message = NOTES[case]
    directory = variant(saved(name), tmp_path / "in", **changes)
    result = run("convert", directory, "--quant", "F32", "--dry-run")
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("gguf-moe: warning: ")]
    assert len(warnings) == (message is not None), warnings
    if message:
        assert message in warnings[0]
        assert str(directory / "config.json") in warnings[0]
