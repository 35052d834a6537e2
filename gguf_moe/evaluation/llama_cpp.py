"""The second engine: llama.cpp itself, through the library inside the xllamacpp package (the extra `llama-cpp`).

xllamacpp's own interface has neither raw logits nor plain tokenizing, so this calls libllama by ctypes. The structures
are those of the version that the extra pins; `Llama` checks defaults that a shifted layout would not show.

Its figures differ from our forward pass by design: on the processor llama.cpp rounds activations to 8 bits for
quantized weights, and its caches are F16. It does not tell which experts tokens went to.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np

from gguf_moe.errors import GgufMoeError, UsageError
from gguf_moe.evaluation.engines import Loaded, Settings
from gguf_moe.evaluation.events import Progress, Scored
from gguf_moe.evaluation.source import ModelSource
from gguf_moe.evaluation.text import TextTokenizer

_INSTALL = "pip install 'gguf-moe[llama-cpp]'"
_ERROR, _F32 = 4, 0  # llama.cpp's level of log lines, and type of a cache
_SWEEP = 8  # chunks after which what is done is kept
_MICRO_BATCH = 512  # tokens computed at once; llama.cpp's default


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


_errors: list[bytes] = []  # of llama.cpp's log, since a model began to load


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _keep_errors(level: int, text: bytes, data: int | None) -> None:
    if level == _ERROR:
        _errors.append(text)


@cache
def libllama() -> ctypes.CDLL:
    """llama.cpp, quiet, with the result types of what is called here. Raises UsageError where it is not installed."""
    try:
        import xllamacpp.xllamacpp as extension
    except ImportError as error:
        raise UsageError(f"--engine llama.cpp needs the xllamacpp package ({error}): {_INSTALL}") from None
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
        "llama_vocab_get_add_bos": c_bool,
        "llama_vocab_get_add_eos": c_bool,
    }
    for name, result in results.items():
        getattr(lib, name).restype = result
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    if not model.use_extra_bufts or (context.n_batch, context.type_k, context.type_v) != (2048, 1, 1):
        raise UsageError(f"--engine llama.cpp does not know this version of xllamacpp: {_INSTALL}")
    lib.llama_log_set(_keep_errors, None)
    lib.llama_backend_init()
    return lib


class Llama:
    """A GGUF file loaded by llama.cpp, on the processor. `size` is the number of tokens in its vocabulary.

    exact: F32 caches and no flash attention, which is not what llama.cpp does unless told so.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 512,
        vocabulary_only: bool = False,
        exact: bool = True,
        threads: int = 1,
    ) -> None:
        if path.is_dir():
            raise UsageError(f"{path}: --engine llama.cpp takes GGUF files only; make one: gguf-moe convert --bits 16")
        self.path, self.lib, self.context_length, self.context = path, libllama(), context, None
        _errors.clear()
        params = self.lib.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocabulary_only, 0
        self.model = c_void_p(self.lib.llama_model_load_from_file(os.fsencode(path), params))
        if not self.model:
            self._fail("llama.cpp does not load it")
        self.vocabulary = c_void_p(self.lib.llama_model_get_vocab(self.model))
        self.size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        if not vocabulary_only:
            self.context = self._make_context(exact, threads)

    def _make_context(self, exact: bool, threads: int) -> c_void_p:
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self.context_length
        settings.n_ubatch = min(self.context_length, _MICRO_BATCH)
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = _F32
            settings.flash_attn_type = 0
        context = c_void_p(self.lib.llama_init_from_model(self.model, settings))
        if not context:
            self.lib.llama_model_free(self.model)
            self._fail(f"llama.cpp makes no context of {self.context_length} tokens")
        return context

    def _fail(self, what: str) -> NoReturn:
        reason = " ".join(b"".join(_errors[:1]).decode(errors="replace").split())
        raise GgufMoeError(f"{self.path}: {what}: {reason}")

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str, *, special: bool = True, bos: bool = True) -> list[int]:
        """Token ids; with `special`, texts of control tokens in the text are those tokens; with `bos`, what the
        vocabulary puts around a text."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), c_bool(bos), c_bool(special))
        assert count >= 0, "a text has no more tokens than bytes"
        return list(ids[:count])

    def text_tokenizer(self) -> TextTokenizer:
        """Its tokenizer for plain text, while it is loaded. Raises GgufMoeError for one that puts EOS after a text."""
        if self.lib.llama_vocab_get_add_eos(self.vocabulary):
            raise GgufMoeError(f"{self.path}: its tokenizer puts EOS after a text; one cut into windows has no end")
        adds_bos = self.lib.llama_vocab_get_add_bos(self.vocabulary)
        bos = self.lib.llama_vocab_bos(self.vocabulary) if adds_bos else None
        return TextTokenizer(bos, lambda text: self.tokenize(text, special=False, bos=False))

    def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """Logits, float32 [tokens - first, vocabulary], of one sequence from an empty cache, from position `first` on.

        Raises GgufMoeError when llama.cpp fails to compute them.
        """
        assert len(tokens) <= self.context_length
        self.lib.llama_memory_clear(c_void_p(self.lib.llama_get_memory(self.context)), c_bool(True))
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, i >= first
            batch.seq_id[i][0] = 0
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if status:
            self._fail(f"llama.cpp does not evaluate it (status {status})")
        flat = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(flat, (len(tokens) - first, self.size)).copy()


@contextmanager
def load(files: Sequence[Path], context: int, threads: int | None = None) -> Iterator[list[Llama]]:
    """GGUF files as llama-perplexity runs them, with llama.cpp's defaults; all at once, mapped. threads: all cores by
    default. Raises UsageError where xllamacpp is not installed, GgufMoeError for a file that llama.cpp does not load.
    """
    settings = {"context": context, "exact": False, "threads": threads or os.cpu_count() or 1}
    with ExitStack() as stack:
        yield [stack.enter_context(Llama(path, **settings)) for path in files]


def sweep(
    models: Sequence[Llama], windows: np.ndarray, on_progress: Callable[[Progress], None] = lambda progress: None
) -> Iterator[Scored]:
    """Run the base, which is the first, and other models through windows of token ids [chunks, context]. No routing
    comes out of it. Raises GgufMoeError for a model that llama.cpp does not run."""
    chunks, context = windows.shape
    first, done = context // 2, 0
    for chunk, window in enumerate(windows):
        base = None
        for number, model in enumerate(models):
            logits = model.logits(window, first)[:-1]
            base = logits if base is None else base
            yield Scored(number, chunk, base, logits, window[first + 1 :])
            on_progress(Progress(done := done + 1, chunks * len(models)))


class Engine:
    """See `engines.Engine`."""

    NOTE = (
        "By llama.cpp on the processor, which rounds activations to 8 bits beside the weights, most of the KL "
        "divergence at 6 and 8 bits; --engine torch measures without that, and the routing."
    )

    def __init__(self, settings: Settings) -> None:
        if settings.memory is not None or (settings.device, settings.dtype) != (Settings.device, Settings.dtype):
            raise UsageError("--memory, --device and --dtype are for --engine torch; llama.cpp maps whole files")
        libllama()
        self.context = settings.context

    @contextmanager
    def tokenizer(self, base: ModelSource) -> Iterator[TextTokenizer]:
        with Llama(base.path, vocabulary_only=True) as model:
            yield model.text_tokenizer()

    @contextmanager
    def load(self, sources: Sequence[ModelSource], chunks: int, most: int | None) -> Iterator[Loaded]:
        with load([source.path for source in sources], self.context) as models:
            yield Loaded(min(chunks, most or _SWEEP), None, lambda windows, show: sweep(models, windows, show))


__all__ = ["Engine", "Llama", "libllama", "load", "sweep"]
