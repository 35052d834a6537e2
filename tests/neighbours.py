"""Real neighbours to compare with: llama.cpp, through the library inside the xllamacpp package.

xllamacpp's own interface has neither raw logits nor plain tokenizing, so this calls libllama by ctypes. The structures
are those of the pinned version (pyproject.toml); `Llama` checks two defaults that a shifted layout would not show.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np


class _ModelParams(Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress_callback", "progress_user_data", "kv_overrides")),
        *((n, c_bool) for n in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    )


class _ContextParams(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext", "yarn_attn")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((n, c_bool) for n in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_silent = _LOG(lambda level, text, data: None)


@cache
def libllama() -> ctypes.CDLL:
    """llama.cpp, quiet, with the result types of what is called here."""
    import xllamacpp.xllamacpp as extension

    lib = ctypes.CDLL(extension.__file__)
    results = {
        "llama_model_default_params": _ModelParams,
        "llama_context_default_params": _ContextParams,
        "llama_batch_init": _Batch,
        "llama_model_load_from_file": c_void_p,
        "llama_init_from_model": c_void_p,
        "llama_model_get_vocab": c_void_p,
        "llama_get_memory": c_void_p,
        "llama_get_logits": POINTER(c_float),
    }
    for name, result in results.items():
        getattr(lib, name).restype = result
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    return lib


class Llama:
    """A GGUF file loaded by llama.cpp, on one thread, with exact (F32) caches unless told otherwise."""

    def __init__(self, path: Path, *, context: int = 512, vocabulary_only: bool = False, exact: bool = True) -> None:
        self.lib, self.context_length = libllama(), context
        params = self.lib.llama_model_default_params()
        assert params.use_extra_bufts, "xllamacpp's llama_model_params has another layout"
        params.vocab_only, params.n_gpu_layers = vocabulary_only, 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocabulary = c_void_p(self.lib.llama_model_get_vocab(c_void_p(self.model)))
        self.size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        self.context = None
        if not vocabulary_only:
            settings = self.lib.llama_context_default_params()
            assert settings.n_batch == 2048, "xllamacpp's llama_context_params has another layout"
            settings.n_ctx = settings.n_batch = settings.n_ubatch = context
            settings.n_threads = settings.n_threads_batch = 1  # two would spin for each other on a busy machine
            if exact:
                settings.type_k = settings.type_v = 0  # F32
                settings.flash_attn_type = 0
            self.context = c_void_p(self.lib.llama_init_from_model(c_void_p(self.model), settings))
            assert self.context, f"llama.cpp makes no context for {path}"

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        self.lib.llama_model_free(c_void_p(self.model))

    def tokenize(self, text: str, *, special: bool = True, bos: bool = True) -> list[int]:
        """Token ids; with `special`, texts of control tokens in the text are those tokens."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), c_bool(bos), c_bool(special))
        assert count >= 0
        return list(ids[:count])

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [tokens, vocabulary] of one sequence from an empty cache."""
        assert len(tokens) <= self.context_length
        self.lib.llama_memory_clear(c_void_p(self.lib.llama_get_memory(self.context)), c_bool(True))
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        assert status == 0, f"llama_decode: {status}"
        flat = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(flat, (len(tokens), self.size)).copy()

    def windows(self, text: str) -> Iterator[list[int]]:
        """The windows of llama-perplexity: the text's tokens in pieces of the context, each with BOS in front."""
        ids = self.tokenize(text.removesuffix("\n"), special=False)
        for start in range(0, len(ids) - self.context_length + 1, self.context_length):
            yield [ids[0], *ids[start + 1 : start + self.context_length]]

    def perplexity(self, text: str, chunks: int | None = None) -> float:
        """llama-perplexity's figure: the second half of each window is scored."""
        total, count, first = 0.0, 0, self.context_length // 2
        for i, window in enumerate(self.windows(text)):
            if i == chunks:
                break
            scores = self.logits(window)[first:-1].astype(np.float64)
            scores -= scores.max(axis=1, keepdims=True)
            chosen = scores[np.arange(len(scores)), window[first + 1 :]]
            total += float((np.log(np.exp(scores).sum(axis=1)) - chosen).sum())
            count += len(scores)
        return math.exp(total / count)


__all__ = ["Llama", "libllama"]
