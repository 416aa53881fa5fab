"""llama.cpp through its C functions, on a GGUF of the same weights as a loaded model, with its best settings."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.bench.timing import interleaved
from fabula.errors import EngineError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.open import is_gguf, open_checkpoint
from fabula.model import Model
from fabula.models.precision import label_of

_TRIAL_PROMPT, _TRIAL_TOKENS, _TRIAL_ROUNDS = 512, 12, 3
_QUIET = llama_cpp.llama_log_callback(lambda *_: None)


@dataclass(frozen=True, slots=True)
class _Setting:
    threads: int
    flash: bool

    def __str__(self) -> str:
        return f"{self.threads} threads, flash attention {'on' if self.flash else 'off'}"


def _precision_of(path: Path) -> str:
    """What a file's matrices are in."""
    checkpoint = open_checkpoint(path)
    try:
        return label_of("auto", checkpoint)
    finally:
        checkpoint.close()


class LlamaCpp:
    """A model in llama.cpp, with contexts for the settings that were fastest for prompts and for decoding.

    Args:
        path: a GGUF file.
        threads: at most this many.
        kv: precision of its cache, "f16" or "f32".
        n_positions: length of a context.
        vocab_size: logits a token has.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, *, threads: int, kv: str, n_positions: int, vocab_size: int) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise Unsupported("it cannot load the model")
        self._threads, self._kv, self._n_positions, self._vocab_size = threads, kv, n_positions, vocab_size
        self._contexts: dict[bool, Any] = {}
        self._batch = llama_cpp.llama_batch_init(n_positions, 0, 1)
        self._best: dict[str, _Setting] = {}
        self.settings: dict[str, str] = {}

    @classmethod
    def of(cls, model: Model, n_positions: int, status: Status) -> LlamaCpp:
        """The engine for a loaded model, its best settings found.

        Raises:
            Unsupported: the model is no GGUF file, or llama.cpp refuses it.
        """
        if not is_gguf(model.path):
            raise Unsupported("the model is not a GGUF file")
        status(f"{model.weights}: writing a GGUF for llama.cpp and trying its settings")
        with tempfile.TemporaryDirectory(prefix="fabula-bench-") as folder:
            path = model.path
            if model.weights != _precision_of(model.path):
                path = Path(folder) / "model.gguf"
                quantize_model(model.path, path, model.weights)
            engine = cls(
                path,
                threads=model.threads,
                kv=model.kv,
                n_positions=n_positions,
                vocab_size=model.config.vocab_size,
            )  # its memory map stays when the folder goes
        try:
            engine.choose()
        except BaseException:
            engine.close()
            raise
        return engine

    def choose(self) -> None:
        """Tries threads and flash attention, and keeps what was fastest for each case."""
        counts = {self._threads} | {1 << i for i in range(10) if 1 << i < self._threads}
        counts |= set(range(1, min(self._threads, 4) + 1))
        prompt = list(range(min(_TRIAL_PROMPT, self._n_positions - _TRIAL_TOKENS, self._vocab_size)))
        settings = {
            str(setting): setting
            for setting in (_Setting(n, flash) for flash in (False, True) for n in sorted(counts))
            if self._context(setting.flash) is not None
        }
        if not settings:
            raise Unsupported("it cannot make a context")
        # They take turns, so that a slow moment of the machine does not decide.
        prefill = {name: partial(self._trial_prefill, s, prompt) for name, s in settings.items()}
        decode = {name: partial(self._trial_decode, s, len(prompt)) for name, s in settings.items()}
        for case, trials in (("prefill", prefill), ("decode", decode)):
            times = interleaved(trials, _TRIAL_ROUNDS)
            self._best[case] = settings[min(times, key=lambda name: times[name].median)]
            self.settings[case] = f"{version('llama-cpp-python')}, {self._best[case]}, kv {self._kv}"

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        before, after = self._best["prefill"], self._best["decode"]
        context = self._ready(before, before.threads)
        start = time.perf_counter()
        tokens = [self._prefill(context, prompt)]
        prefill_s = time.perf_counter() - start
        if after.flash != before.flash:
            context = self._ready(after, before.threads)
            self._prefill(context, prompt)
        llama_cpp.llama_set_n_threads(context, after.threads, before.threads)
        start = time.perf_counter()
        for i in range(n_tokens - 1):
            tokens.append(self._decode(context, tokens[-1:], len(prompt) + i))
        return Run(prefill_s, time.perf_counter() - start, tuple(tokens))

    def close(self) -> None:
        """Frees everything; may be called twice."""
        for context in self._contexts.values():
            if context is not None:
                llama_cpp.llama_free(context)
        self._contexts = {}
        if self._model:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _ready(self, setting: _Setting, batch_threads: int) -> Any:
        context = self._context(setting.flash)
        llama_cpp.llama_set_n_threads(context, setting.threads, batch_threads)
        return context

    def _context(self, flash: bool) -> Any:
        if flash not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = self._n_positions
            params.n_batch = self._n_positions
            params.n_threads = params.n_threads_batch = self._threads
            params.flash_attn_type = (
                llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16 if self._kv == "f16" else llama_cpp.GGML_TYPE_F32
            self._contexts[flash] = llama_cpp.llama_init_from_model(self._model, params) or None
        return self._contexts[flash]

    def _prefill(self, context: Any, prompt: Sequence[int]) -> int:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        return self._decode(context, prompt, 0)

    def _trial_prefill(self, setting: _Setting, prompt: Sequence[int]) -> None:
        self._prefill(self._ready(setting, setting.threads), prompt)

    def _trial_decode(self, setting: _Setting, n_past: int) -> None:
        """Decodes some tokens behind the `n_past` that are there, and forgets them."""
        context = self._ready(setting, setting.threads)
        for i in range(_TRIAL_TOKENS):
            self._decode(context, [0], n_past + i)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), -1, n_past, -1)

    def _decode(self, context: Any, tokens: Sequence[int], position: int) -> int:
        """Appends tokens and returns the likeliest next one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if llama_cpp.llama_decode(context, batch):
            raise EngineError("llama.cpp: decoding failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())
