#!/usr/bin/env python3
"""What llama.cpp's quantizer makes of our BF16 files, asked for types, outputs and keys: tests/golden/quantizer.json.

And the types that it gives the tensors of a dense model, whose mix counts otherwise: quantizer-dense.json.

usage: make_quantizer_golden.py LIBLLAMA, the library that `make golden` builds.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from llama_quantizer import load_quantizer  # noqa: E402
from variants import VARIANTS, save  # noqa: E402

from gguf_moe.checkpoint import open_checkpoint  # noqa: E402
from gguf_moe.convert import convert  # noqa: E402
from gguf_moe.plan import make_plan  # noqa: E402
from gguf_moe.recipe import FILE_TYPES  # noqa: E402
from quant import FORMATS  # noqa: E402

DOWN, ATTENTION = ["ffn_down_exps", "Q6_K"], ["attn_(q|k)", "Q8_0"]
# variant, file type, what is asked; one line a case
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("bundled", "Q4_K_M", {"tensor_types": [DOWN]}),
    ("bundled", "Q4_K_M", {"tensor_types": [ATTENTION, DOWN]}),
    ("bundled", "Q4_K_M", {"tensor_types": [["blk\\.[02]\\..*exps", "Q3_K"], ["ffn_", "Q5_K"]]}),
    ("bundled", "Q2_K", {"tensor_types": [["ffn_gate", "IQ4_XS"], ["output", "Q5_K"]]}),
    ("bundled", "Q5_K_S", {"tensor_types": [["weight", "Q4_0"]]}),
    ("bundled", "Q3_K_L", {"tensor_types": [["token_embd", "BF16"], ["attn_output", "F16"], ["attn_v", "F32"]]}),
    ("bundled", "IQ4_NL", {"tensor_types": [["ffn_up_exps", "IQ4_NL"], ["^output\\.weight$", "Q8_0"]]}),
    ("bundled", "Q4_K_M", {"output": "Q8_0"}),
    ("bundled", "Q4_K_M", {"output": "F16", "token_embedding": "Q8_0"}),
    ("bundled", "Q2_K", {"output": "Q4_K", "tensor_types": [["output", "Q8_0"]]}),
    ("bundled", "Q6_K", {"token_embedding": "Q2_K", "tensor_types": [["token_embd", "Q8_0"], ["attn_v", "Q8_0"]]}),
    ("bundled", "Q3_K_M", {"pure": True}),
    ("bundled", "Q2_K", {"pure": True, "output": "Q6_K", "tensor_types": [["attn_v", "Q4_K"]]}),
    ("bundled", "Q8_0", {"leave_output": True}),
    ("bundled", "Q4_K_M", {"leave_output": True, "pure": True}),
    ("bundled", "BF16", {"output": "Q8_0"}),
    ("bundled", "F16", {"token_embedding": "Q6_K", "output": "F32"}),
    ("deep", "Q4_K_M", {}),
    ("deep", "Q4_K_M", {"tensor_types": [["blk\\.[0-3]\\.attn_v", "Q8_0"]]}),
    ("deep", "Q4_K_S", {"tensor_types": [["blk\\.(0|2|4)\\.attn_v", "Q4_K"]]}),
    ("deep", "Q3_K_M", {"tensor_types": [["blk\\.1\\.", "Q6_K"]]}),
    ("deep", "Q5_K_M", {"tensor_types": [["blk\\.10\\.attn_v", "Q5_0"], ["ffn_down", "Q5_1"]]}),
    ("eight", "Q4_K_M", {"tensor_types": [["attn_k", "Q5_K"]]}),
    ("eight", "Q2_K", {"pure": True}),
    ("narrow", "Q4_K_M", {"tensor_types": [["ffn_down", "Q3_K"], ["ffn_up", "Q6_K"], ["attn_q", "IQ4_XS"]]}),
    ("narrow", "Q2_K", {"pure": True, "output": "Q5_0"}),
    ("narrow", "Q5_K_M", {"token_embedding": "Q5_1", "leave_output": True}),
    ("tied", "Q4_K_M", {"output": "Q5_K"}),
    ("tied", "Q4_K_M", {"output": "Q8_0", "token_embedding": "Q3_K"}),
    ("tied", "Q4_K_M", {"output": "Q8_0", "tensor_types": [["token_embd", "Q4_1"]]}),
    ("tied", "Q4_K_M", {"pure": True}),
    ("narrow tied", "Q4_K_M", {"output": "Q5_K"}),
    ("bundled", "Q4_K_M", {"override_kv": [["llama.context_length", "int", 2048]]}),
    (
        "bundled",
        "Q8_0",
        {
            "override_kv": [
                ["general.author", "str", "Ann é"],
                ["llama.rope.freq_base", "float", 123456.789],
                ["tokenizer.ggml.add_bos_token", "bool", False],
                ["my.own", "int", 7],
            ]
        },
    ),
    ("bundled", "BF16", {"override_kv": [["general.name", "str", "Other"]]}),
    ("bundled", "F16", {"override_kv": [["tokenizer.ggml.bos_token_id", "int", 3]], "output": "Q8_0"}),
]


RANDOM_CASES = 60


def wishes(seed: int, sources: dict[str, Path]) -> tuple[str, str, dict[str, Any]]:
    """A case by lot: patterns that may overlap, with the options that may stand beside them."""
    lots = random.Random(seed)
    variant = lots.choice(list(VARIANTS))
    names = [t.name for t in gguf.GGUFReader(sources[variant]).tensors if t.tensor_type.name != "F32"]
    types = [kind for kind in FORMATS if kind != "F32"]
    asked: dict[str, Any] = {"tensor_types": []}
    for name in lots.sample(names, lots.randrange(4)):
        pattern = lots.choice([name, name.split(".", 2)[-1], f"^{name[:6]}", name.removesuffix(".weight")])
        asked["tensor_types"].append([pattern.replace(".", "\\."), lots.choice(types)])
    if lots.random() < 0.3:
        asked["pure"] = True
    elif lots.random() < 0.3:
        asked["leave_output"] = "tied" not in variant
    for key in ("output", "token_embedding"):
        if lots.random() < 0.3 and not asked.get("leave_output") and not ("tied" in variant and asked.get("pure")):
            asked[key] = lots.choice(["Q8_0", "Q4_0", "Q5_1", "F16"])
    file_type = lots.choice([name for name, t in FILE_TYPES.items() if t.quantized and name != "Q2_K_S"])
    return variant, file_type, asked


def describe(path: Path) -> dict[str, Any]:
    """Size, SHA-256 and types: enough to say equal, and where to look first when not."""
    data = path.read_bytes()
    types = Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "types": dict(types)}


DENSE_CASES = [
    *(
        (file_type, [["blk\\.[0-4]\\.ffn_down", "Q8_0"]])
        for file_type in ("Q4_K_M", "Q4_K_S", "Q3_K_M", "Q5_K_M", "IQ4_XS")
    ),
    ("Q4_K_M", [["blk\\.(2|5|19)\\.attn_v", "F16"], ["blk\\.1\\.", "Q5_0"]]),
    ("Q3_K_M", [["attn_v", "Q6_K"]]),
    ("Q2_K", [["blk\\.0\\.", "Q4_0"]]),
    ("Q4_K_M", []),
]


def dense(path: Path) -> None:
    """A dense llama of 20 layers without a tokenizer, which the quantizer does not ask for."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(20)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    shapes = {"token_embd": (8, 256), "output": (8, 256), "output_norm": (256,)}
    for i in range(20):
        shapes |= {f"blk.{i}.{n}": (256, 256) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}
        shapes |= {f"blk.{i}.{n}": (64, 256) for n in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{n}": (256,) for n in ("attn_norm", "ffn_norm")}
    values = np.random.default_rng(1).normal(0, 0.02, 256 * 256).astype(np.float32)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.resize(values, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(name: str, results: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    (TESTS / "golden" / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    results, dense_results, quantize = [], [], load_quantizer(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        sources = {}
        for variant in VARIANTS:
            checkpoint = open_checkpoint(save(variant, Path(scratch) / variant))
            sources[variant] = Path(scratch) / f"{variant}.gguf"
            convert(make_plan(checkpoint, FILE_TYPES["BF16"]), sources[variant])
        for variant, file_type, asked in (*CASES, *(wishes(seed, sources) for seed in range(RANDOM_CASES))):
            target = Path(scratch) / "out.gguf"
            quantize(sources[variant], target, file_type, **asked)
            results.append({"variant": variant, "file_type": file_type, "asked": asked, **describe(target)})
        dense(source := Path(scratch) / "dense.gguf")
        for file_type, tensor_types in DENSE_CASES:
            quantize(source, target, file_type, tensor_types=tensor_types)
            types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
            types = {name: kind for name, kind in types.items() if not name.endswith("_norm.weight")}
            dense_results.append({"file_type": file_type, "tensor_types": tensor_types, "types": types})
    write("quantizer.json", results)
    write("quantizer-dense.json", dense_results)


if __name__ == "__main__":
    main()
