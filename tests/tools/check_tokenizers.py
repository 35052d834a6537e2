"""Compare llama.cpp with the tokenizers package on real tokenizers that are too large, or not free, to bundle.

    python tests/tools/check_tokenizers.py DIRECTORY...

Each directory holds tokenizer.json, tokenizer_config.json and config.json of a model with a byte-level BPE. Prints the
pre-tokenizer's name and the texts that differ without a known reason; exits with 1 if there are any.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from neighbours import Llama  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from vocabularies import TEXTS, differing, keys_of, known_limit, vocabulary_file  # noqa: E402


def check(directory: Path) -> bool:
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer else lambda text: text
    plain_end = tokenizer.token_to_id("</s>") not in (None, *tokenizer.get_added_tokens_decoder())
    with tempfile.TemporaryDirectory() as place:
        vocabulary = vocabulary_file(directory, size, Path(place) / "v.gguf")
        pre = keys_of(vocabulary)["pre"]
        texts = [t for t in TEXTS if normal(t) == t and not known_limit(pre, t) and not (plain_end and "</s>" in t)]
        with Llama(Path(place) / "v.gguf", vocabulary_only=True) as model:
            wrong = differing(model, tokenizer, texts)
    print(f"{directory.name}: {pre}, {len(texts) - len(wrong)} of {len(texts)} texts alike (of {len(TEXTS)})")
    for line in (*vocabulary.notes, *map(repr, wrong)):
        print(f"    {line}")
    return not wrong


if __name__ == "__main__":
    alike = [check(Path(directory)) for directory in sys.argv[1:]]
    sys.exit(not all(alike))
