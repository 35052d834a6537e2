"""Logits, experts of each token and greedy continuations of the bundled merge by transformers, in float32: golden data.

usage: make_transformers_golden.py     (needs torch and transformers; writes tests/golden/transformers.npz)
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parent.parent
MERGE = TESTS / "data" / "TidePool-4x4M-v1"
PROMPTS = (
    "The old whale-ship rolled heavily in the swell, and",
    "My fellow Americans, the state of our Union is",
    "And it came to pass in those days that the LORD",
    "import os\nimport sys\n\ndef main(",
)
NEW_TOKENS = 24


def main() -> None:
    """Write the golden file."""
    torch.set_grad_enabled(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MERGE / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(MERGE, dtype=torch.float32).eval()
    arrays = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        arrays[f"prompt{i}"] = np.array(ids, np.int32)
        output = model(torch.tensor([ids]), output_router_logits=True)
        arrays[f"logits{i}"] = output.logits[0, -4:].numpy().astype(np.float32)
        chosen = [scores.topk(model.config.num_experts_per_tok).indices for scores in output.router_logits]
        arrays[f"experts{i}"] = torch.stack(chosen).numpy().astype(np.int8)  # [layers, tokens, used experts]
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        arrays[f"greedy{i}"] = np.array(ids, np.int32)
    np.savez_compressed(TESTS / "golden" / "transformers.npz", **arrays)


if __name__ == "__main__":
    main()
