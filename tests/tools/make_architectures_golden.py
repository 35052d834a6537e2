"""What transformers and llama.cpp make of the small models in tests/architectures.py, as golden data for the tests.

usage: PYTHONPATH=tests:LLAMA_CPP:LLAMA_CPP/gguf-py make_architectures_golden.py LIBLLAMA [CASE ...]

LLAMA_CPP is the source of llama.cpp build 11434 (its converter runs here), LIBLLAMA its library (its quantizer does);
`make golden` fetches and builds both. Writes tests/golden/architectures.json (config.json as saved, names and shapes of
the tensors, in both layouts of experts, hashes of llama.cpp's files) and architectures.npz (logits); given cases are
made anew, others stay. Needs torch and transformers.

transformers has no code for the first DeepSeek-MoE, which its authors published as remote code. The model here follows
that code, from the building blocks of transformers' Llama: softmax over the routed experts, the best few unscaled,
beside shared experts of one MLP.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import architectures as cases
import convert_hf_to_gguf
import gguf
import numpy as np
import torch
import transformers
from conversion import qwen
from llama_quantizer import load_quantizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FLOATS = ("F32", "F16", "BF16")
QUANTS = (
    *("Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


class DeepseekMoE(torch.nn.Module):
    """Routed and shared experts of the first DeepSeek-MoE."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.top_k, self.renormalized = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = torch.nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = torch.nn.ModuleList(
            LlamaMLP(_with_width(config, config.moe_intermediate_size)) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = LlamaMLP(_with_width(config, config.moe_intermediate_size * config.n_shared_experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k)
        if self.renormalized and self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        routed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            routed[token] += weights[token, place, None] * expert(flat[token])
        return routed.reshape(hidden.shape) + self.shared_experts(hidden)


def _with_width(config: LlamaConfig, width: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=config.hidden_size, intermediate_size=width)


def make_deepseek(values: dict) -> LlamaForCausalLM:
    """A Llama whose layers behind the first dense ones have experts."""
    model = LlamaForCausalLM(LlamaConfig(**values))
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp = DeepseekMoE(model.config)
    return model


def save_model(name: str, directory: Path) -> torch.nn.Module:
    """The case's model, saved by transformers with the case's weights, and loaded from there."""
    kind, changes = cases.CASES[name]
    values = cases.SHAPE | changes
    if kind == "DeepseekForCausalLM":
        model = make_deepseek(values)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        config = {"architectures": [kind], "model_type": "deepseek", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
        case = cases.parts({**config, "hidden_act": "silu", **values}, shapes)
        model.load_state_dict({key: torch.from_numpy(array) for key, (_, array) in case.tensors.items()})
        cases.save(case, directory)
        return model.eval()
    family = getattr(transformers, kind)
    family(family.config_class(**values)).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    cases.save(cases.parts(config, saved_shapes(directory)), directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def saved_shapes(directory: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in model.safetensors."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in sorted(file.keys())}


def convert(directory: Path, target: Path, kind: str) -> None:
    """llama.cpp's converter. Its mixtures of Qwen look for a BPE tokenizer only; they get the one of the dense models,
    which takes SentencePiece too, so that one tokenizer serves all cases."""
    qwen.Qwen2MoeModel.set_vocab = qwen.Qwen3MoeModel.set_vocab = qwen.Qwen2Model.set_vocab
    sys.argv[1:] = [str(directory), "--outfile", str(target), "--outtype", kind.lower()]
    convert_hf_to_gguf.main()


def describe(path: Path) -> dict:
    """Hashes of the whole file and of what stands before the tensors' data; how many tensors have which type."""
    data, reader = path.read_bytes(), gguf.GGUFReader(path)
    types = [t.tensor_type.name for t in reader.tensors]
    return {
        "file": hashlib.sha256(data).hexdigest(),
        "header": hashlib.sha256(data[: reader.data_offset]).hexdigest(),
        "types": {kind: types.count(kind) for kind in sorted(set(types))},
    }


def main() -> None:
    """Write the golden files."""
    quantize, names = load_quantizer(sys.argv[1]), sys.argv[2:]
    torch.set_grad_enabled(False)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    golden = dict(cases.golden()) if names else {}
    logits = dict(np.load(GOLDEN / "architectures.npz")) if names else {}
    for name in names or cases.CASES:
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / name
            model = save_model(name, directory)
            scores = model(torch.tensor([cases.prompt()])).logits[0].numpy()
            logits[name] = scores[list(cases.KEPT_POSITIONS)][:, cases.KEPT_LOGITS].astype(np.float32)
            files = {}
            for kind in FLOATS:
                target = Path(temporary) / f"{kind}.gguf"
                convert(directory, target, kind)
                files[kind] = describe(target)
            for kind in QUANTS:
                target = Path(temporary) / f"{kind}.gguf"
                quantize(Path(temporary) / "F32.gguf", target, kind)
                files[kind] = describe(target)
            config = json.loads((directory / "config.json").read_text())
            golden[name] = {"config": config, "tensors": saved_shapes(directory), "files": files}
            if type(model).__name__ in ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
                model.save_pretrained(directory, save_original_format=False)
                golden[name]["fused"] = saved_shapes(directory)
        print(name, files["Q4_K_M"]["types"], flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in golden.items())
    (GOLDEN / "architectures.json").write_text(f"{{\n{lines}\n}}\n")
    np.savez_compressed(GOLDEN / "architectures.npz", **logits)


if __name__ == "__main__":
    main()
