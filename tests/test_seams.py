"""Where parts meet: families by wishes on types and keys, by tokenizers, as checkpoints and as GGUF files."""

from __future__ import annotations

from pathlib import Path

import architectures as cases
import numpy as np
import pytest
from neighbours import Llama
from test_byte_level import trained
from test_gguf_input import convert
from tokenizers import Tokenizer
from vocabularies import TEXTS, differing, known_limit, save_tokenizer

from gguf_moe.gguf_reader import read_gguf

FAMILIES = (
    *("mixtral-1", "mixtral-head-dim-3", "qwen2moe-6", "qwen3moe-tied-8", "deepseek-5", "llama-rope3"),
    *("llama-tied-biases", "mistral-head-dim", "qwen2", "qwen3"),
)
WISHES = {
    "none": ("--quant", "Q4_K_M"),
    "patterns": ("--quant", "Q3_K_M", "--tensor-type", "ffn_down=Q8_0", "--tensor-type", r"blk\.[02]\.attn_v=F16"),
    "pure": ("--quant", "Q5_K_S", "--pure", "--token-embedding-type", "Q4_0"),
    "names": ("--quant", "Q8_0", "--name", "Some Name", "--size-label", "2x2B", "--override-kv", "x.y=bool:true"),
    "16 bits": ("--quant", "F16", "--name", "Some Name"),
    "16 bits by the quantizer": ("--quant", "F16", "--tensor-type", "attn_q=Q5_K"),
}


@pytest.fixture(scope="module")
def floats(run, saved: cases.Saved, tmp_path_factory: pytest.TempPathFactory):
    """floats("qwen3"): that case as an F32 GGUF file."""
    directory = tmp_path_factory.mktemp("floats")

    def make(name: str) -> Path:
        path = directory / f"{name}.gguf"
        if not path.exists():
            convert(run, saved(name), path, "--quant", "F32")
        return path

    return make


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_gives_what_its_checkpoint_gives(
    name: str, wishes: str, run, saved: cases.Saved, floats, tmp_path: Path
) -> None:
    want = convert(run, saved(name), tmp_path / "want.gguf", *WISHES[wishes])
    assert convert(run, floats(name), tmp_path / "have.gguf", *WISHES[wishes]) == want


@pytest.mark.parametrize("name", ["mixtral-head-dim-3", "qwen2moe-6", "qwen3moe-5", "deepseek-5"])
def test_routers_and_used_experts_too(name: str, run, saved: cases.Saved, floats, tmp_path: Path) -> None:
    wishes = ("--quant", "Q4_0", "--router-type", "F16", "--experts-used", 1, "--leave-output-tensor")
    want = convert(run, saved(name), tmp_path / "want.gguf", *wishes)
    assert convert(run, floats(name), tmp_path / "have.gguf", *wishes) == want
    with Llama(tmp_path / "have.gguf") as model:
        assert np.isfinite(model.logits(cases.prompt())).all()


@pytest.mark.parametrize("name", ["qwen2", "qwen3moe-tied-8"])
def test_the_outputs_type_is_a_tied_embeddings_beside_pure_too(
    name: str, run, saved: cases.Saved, tmp_path: Path
) -> None:
    """llama-quantize leaves the output's type out then, without a word."""
    path = tmp_path / "out.gguf"
    convert(run, saved(name), path, "--quant", "Q4_K_M", "--pure", "--output-tensor-type", "Q8_0")
    types = {tensor.name: tensor.type for tensor in read_gguf(path).tensors}
    assert types.pop("token_embd.weight") == "Q8_0"
    assert "Q8_0" not in types.values()


BYTE_LEVEL = {
    "qwen2moe-6": "qwen2",
    "qwen3moe-5": "qwen2",
    "deepseek-5": "deepseek-llm",
    "llama": "llama-bpe",
    "mistral-head-dim": "tekken",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_every_family_with_a_byte_level_tokenizer(name: str, run, tmp_path: Path) -> None:
    pre = BYTE_LEVEL[name]
    directory = cases.save(cases.recorded(name), tmp_path / "merge")
    (directory / "tokenizer.model").unlink()
    save_tokenizer(directory, trained(pre), {"add_prefix_space": False, "eos_token": "<|im_end|>"})
    path = tmp_path / "out.gguf"
    convert(run, directory, path, "--quant", "Q8_0", "--pre", pre)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    with Llama(path) as model:
        assert model.size == 4096
        wrong = differing(model, tokenizer, TEXTS)
        assert np.isfinite(model.logits(tokenizer.encode("Call me Ishmael.").ids)).all()
    assert [text for text in wrong if not known_limit(pre, text)] == []
