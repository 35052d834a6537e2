"""Model families, one a file. A new one is its file and its line in `ARCHITECTURES`."""

from __future__ import annotations

from gguf_moe.arch import deepseek, llama, qwen2, qwen2moe, qwen3, qwen3moe
from gguf_moe.arch.base import Architecture, Fused, ModelFacts, Template
from gguf_moe.checkpoint import Config
from gguf_moe.errors import GgufMoeError

__all__ = ["ARCHITECTURES", "FAMILIES", "Architecture", "Fused", "ModelFacts", "Template", "find_architecture"]

FAMILIES = (
    llama.MIXTRAL,
    llama.MISTRAL,
    llama.LLAMA,
    qwen2moe.ARCHITECTURE,
    qwen3moe.ARCHITECTURE,
    deepseek.ARCHITECTURE,
    qwen2.ARCHITECTURE,
    qwen3.ARCHITECTURE,
)
ARCHITECTURES: dict[str, Architecture] = {name: family for family in FAMILIES for name in family.hf_names}


def find_architecture(config: Config) -> Architecture:
    """The family of the checkpoint; GgufMoeError with the supported ones when there is none."""
    names = config.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise GgufMoeError(
            f"{config.path}: architecture {name!r} is not supported, expected one of {', '.join(ARCHITECTURES)}"
        )
    if config.values.get("quantization_config"):
        method = config.values["quantization_config"]
        method = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise GgufMoeError(
            f"{config.path}: the checkpoint is already quantized ({method}); convert the bf16, f16 or f32 original"
        )
    return ARCHITECTURES[name]
