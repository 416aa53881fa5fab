"""llama.cpp in its own process, which may use another Python environment.

Run by path, not imported: needs llama_cpp and numpy, nothing of Fabula. Reads one JSON object a line from stdin and
answers each with one on stdout, `{"error": text}` on failure:

    {"do": "load", "path": file, "threads": most, "kv": "f16", "positions": n, "sequences": n, "choose": bool}
        -> {"settings": {"prefill": text, "decode": text}}, the fastest, or the default
    {"do": "run", "prompt": [ids], "tokens": n}                  -> {"prefill_s", "decode_s", "tokens": [ids]}
    {"do": "together", "prompts": [[ids]], "shared": n, "tokens": n}  -> {"decode_s", "settings"}
    {"do": "logits", "tokens": [ids], "file": path}              -> {"rows"}, written as f32, one row fewer than ids
    {"do": "first", "path", "threads", "kv", "positions", "prompt": [ids]}  -> {"token", "settings"}, from a new model
    {"do": "hold", "path", "threads", "kv", "positions"}         -> {"settings"}, llama-cpp-python's own class
    {"do": "read", "tokens": [ids]}                              -> {"bytes"} of its state
    {"do": "save_and_load"}                                      -> {"seconds"}

With --as-in-file weights keep the file's layout; else llama.cpp repacks them for the processor.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_TRIAL_PROMPT, _TRIAL_TOKENS, _TRIAL_ROUNDS = 512, 12, 3
_HOPELESS = 1.5  # a setting this many times slower than the fastest in both cases is dropped
_UBATCHES = (512, 2048)  # llama.cpp's default, and one for long prompts
_KV = {"f32": 0, "f16": 1, "q8": 8, "bf16": 30}  # enum ggml_type
_AS_IN_FILE = "--as-in-file" in sys.argv[1:]
_SOME = 40  # tokens that are enough for llama.cpp's products of matrices
_QUIET = llama_cpp.llama_log_callback(lambda *_: None)


@dataclass(frozen=True)
class Setting:
    threads: int
    flash: bool
    ubatch: int
    unified: bool = True

    def __str__(self) -> str:
        flash = "on" if self.flash else "off"
        cache = "" if self.unified else ", a cache per sequence"
        return f"{self.threads} threads, flash attention {flash}, ubatch {self.ubatch}{cache}"


def _is_near_best(setting: Setting, times: dict[Setting, list[float]]) -> bool:
    return min(times[setting]) <= _HOPELESS * min(map(min, times.values()))


def _version() -> str:
    built = "".join(f", {name}" for name in built_with())
    return version("llama-cpp-python") + built + (", weights as in the file" if _AS_IN_FILE else "")


def built_with() -> list[str]:
    """What llama.cpp was built with besides its own kernels: backends such as BLAS or ZENDNN, and the libraries of
    matrix products that are in this process."""
    found = []
    with suppress(Exception):  # internal to llama-cpp-python; without it, the libraries still tell
        ggml = importlib.import_module("llama_cpp._ggml").libggml
        ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
        ggml.ggml_backend_reg_get.argtypes, ggml.ggml_backend_reg_get.restype = [ctypes.c_size_t], ctypes.c_void_p
        ggml.ggml_backend_reg_name.argtypes, ggml.ggml_backend_reg_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        names = [ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i)) for i in range(ggml.ggml_backend_reg_count())]
        found += [name.decode() for name in names if name != b"CPU"]
    with suppress(OSError):
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        found += libraries_of([line.split()[-1] for line in mapped.splitlines() if "/" in line])
    return found


def libraries_of(paths: Sequence[str]) -> list[str]:
    """Names of the libraries of matrix products among files, without numpy's own copy of OpenBLAS."""
    known = re.compile(r"lib(openblas|dnnl|mkl_rt|mkl_core|blis|zendnn|amdblis)[-.\w]*\.so")
    found = [known.match(path.rpartition("/")[2]) for path in paths if "numpy" not in path and "scipy" not in path]
    return sorted({match[1] for match in found if match})


def _some(n_vocab: int) -> list[int]:
    return [i % n_vocab for i in range(_SOME)]


class Worker:
    """A model, and its contexts by setting except threads, created on first use."""

    def __init__(self, path: str, threads: int, kv: str, positions: int, sequences: int) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = not _AS_IN_FILE
        self._model: Any = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError("it cannot load the model")
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads, self._kv, self._positions, self._sequences = threads, kv, positions, sequences
        self._context: Any = None
        self._made: tuple[Any, ...] | None = None
        self._batch = llama_cpp.llama_batch_init(positions * sequences, 0, 1)
        self._best: dict[str, Setting] = {}
        self._filled: tuple[list[list[int]], int] | None = None  # prompts, and length of their shared prefix
        self._begun: list[int] = []  # the first token after each

    def choose(self) -> dict[str, str]:
        """Tries threads, flash attention and ubatch in turns, and keeps the fastest for each case."""
        n_prompt = max(1, min(_TRIAL_PROMPT, self._positions - _TRIAL_TOKENS, self._n_vocab))
        if self._positions > 4 * _TRIAL_PROMPT:  # the fastest for a short prompt may differ
            n_prompt = min(4 * _TRIAL_PROMPT, self._n_vocab)
        prompt = list(range(n_prompt))
        prefill: dict[Setting, list[float]] = {}
        decode: dict[Setting, list[float]] = {}
        settings = self._settings()
        for _ in range(_TRIAL_ROUNDS):
            for setting in settings:
                if self._ready(setting, 1) is None:
                    continue
                start = time.perf_counter()
                self._step(prompt, 0)
                prefill.setdefault(setting, []).append(time.perf_counter() - start)
                start = time.perf_counter()
                for i in range(min(_TRIAL_TOKENS, self._positions - n_prompt)):
                    self._step([0], n_prompt + i)
                decode.setdefault(setting, []).append(time.perf_counter() - start)
            settings = [s for s in prefill if _is_near_best(s, prefill) or _is_near_best(s, decode)]
        return {case: self._keep(case, times) for case, times in (("prefill", prefill), ("decode", decode))}

    def plain(self) -> dict[str, str]:
        """All threads, and flash attention only if the KV cache needs it."""
        for flash in (False, True):
            setting = Setting(self._threads, flash, _UBATCHES[0])
            if self._ready(setting, 1) is not None:
                self._best = {"prefill": setting, "decode": setting}
                return {case: self._told(case) for case in self._best}
        raise RuntimeError("it cannot make a context")

    def warm_up(self) -> None:
        """A prefill, so that what kills the process does so at once."""
        self._step(_some(self._n_vocab)[: self._positions], 0)

    def logits(self, tokens: Sequence[int], path: str) -> int:
        """Writes the logits after each token except the last; returns the number of rows."""
        self._ready(self._best["prefill"], 1)
        n_rows = len(tokens) - 1
        self._decode([(token, i, 0, True) for i, token in enumerate(tokens[:n_rows])])
        rows = llama_cpp.llama_get_logits(self._context)
        np.ctypeslib.as_array(rows, shape=(n_rows * self._n_vocab,)).tofile(path)
        return n_rows

    def run(self, prompt: Sequence[int], n_tokens: int) -> dict[str, Any]:
        """Prefill and greedy decode, each with its best settings."""
        before, after = self._best["prefill"], self._best["decode"]
        self._ready(before, 1)
        start = time.perf_counter()
        tokens = [self._step(prompt, 0)]
        prefill_s = time.perf_counter() - start
        if (before.flash, before.ubatch) != (after.flash, after.ubatch):
            self._ready(after, 1)
            self._step(prompt, 0)
        llama_cpp.llama_set_n_threads(self._context, after.threads, after.threads)
        start = time.perf_counter()
        for i in range(n_tokens - 1):
            tokens.append(self._step(tokens[-1:], len(prompt) + i))
        return {"prefill_s": prefill_s, "decode_s": time.perf_counter() - start, "tokens": tokens}

    def together(self, prompts: list[list[int]], shared: int, n_tokens: int) -> dict[str, Any]:
        """Decodes `n_tokens` for each prompt, one batch a step; the first `shared` ids are computed once.
        Prompts are processed once for all settings of a context, unless it was used otherwise since."""
        if "together" not in self._best:
            times: dict[Setting, list[float]] = {}
            for setting in self._settings(split=True):
                if self._fill(setting, prompts, shared):
                    times[setting] = [self._draw(setting, min(n_tokens, _TRIAL_TOKENS))]
            self._keep("together", times)
        best = self._best["together"]
        self._fill(best, prompts, shared)
        return {"decode_s": self._draw(best, n_tokens), "settings": self._told("together")}

    def _settings(self, split: bool = False) -> list[Setting]:
        counts = {1, self._threads} | {1 << i for i in range(10) if 1 << i < self._threads}
        ubatches = [u for u in _UBATCHES if u == _UBATCHES[0] or (self._positions > _UBATCHES[0] and not split)]
        return [
            Setting(threads, flash, ubatch, unified)
            for flash in (False, True)
            for ubatch in ubatches
            for unified in ((True, False) if split else (True,))
            for threads in sorted(counts)
        ]

    def _keep(self, case: str, times: dict[Setting, list[float]]) -> str:
        if not times:
            raise RuntimeError("it cannot make a context")
        self._best[case] = min(times, key=lambda setting: statistics.median(times[setting]))
        return self._told(case)

    def _told(self, case: str) -> str:
        return f"{_version()}, {self._best[case]}, kv {self._kv}"

    def _context_of(self, setting: Setting, sequences: int) -> tuple[Any, ...]:
        return (setting.flash, setting.ubatch, setting.unified, sequences)

    def _ready(self, setting: Setting, sequences: int) -> Any:
        """An empty context of a setting; None if llama.cpp refuses it (quantized V without flash attention). Only one
        exists at a time, to hold one KV cache in memory."""
        wanted = self._context_of(setting, sequences)
        self._filled = None
        if self._made != wanted:
            if self._context:
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = params.n_batch = self._positions * sequences
            params.n_ubatch = setting.ubatch
            params.n_seq_max = sequences
            params.kv_unified = setting.unified
            params.flash_attn_type = (
                llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if setting.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            )
            k, _, v = self._kv.partition(":")
            params.type_k, params.type_v = _KV[k], _KV[v or k]
            self._context, self._made = llama_cpp.llama_init_from_model(self._model, params) or None, wanted
        if self._context:
            llama_cpp.llama_set_n_threads(self._context, setting.threads, setting.threads)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        return self._context

    def first(self, prompt: Sequence[int]) -> dict[str, Any]:
        """The first token after a prompt, with the default settings."""
        settings = self.plain()
        return {"token": self._step(prompt, 0), "settings": settings["decode"]}

    def _step(self, tokens: Sequence[int], position: int) -> int:
        """Appends tokens to sequence 0 and returns the most likely next one."""
        last = len(tokens) - 1
        self._decode([(token, position + i, 0, i == last) for i, token in enumerate(tokens)])
        return self._likeliest(-1)

    def _fill(self, setting: Setting, prompts: list[list[int]], shared: int) -> bool:
        """Processes the prompts in the context of a setting, unless they are there; False if llama.cpp refuses it."""
        if self._made != self._context_of(setting, len(prompts)) or self._filled != (prompts, shared):
            if self._ready(replace(setting, threads=self._threads), len(prompts)) is None:
                return False
            if shared:
                self._step(prompts[0][:shared], 0)
                for s in range(1, len(prompts)):
                    llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(self._context), 0, s, -1, -1)
            self._begun = []
            for s, prompt in enumerate(prompts):
                own, last = prompt[shared:], len(prompt) - 1
                self._decode([(token, shared + i, s, shared + i == last) for i, token in enumerate(own)])
                self._begun.append(self._likeliest(-1))
            self._filled = (prompts, shared)
        return True

    def _draw(self, setting: Setting, n_tokens: int) -> float:
        """Seconds of n decode steps after the prompts of `_fill`; restores them afterwards."""
        assert self._filled is not None
        prompts, tokens = self._filled[0], self._begun
        llama_cpp.llama_set_n_threads(self._context, setting.threads, setting.threads)
        start = time.perf_counter()
        for i in range(n_tokens):
            self._decode([(tokens[s], len(prompts[s]) + i, s, True) for s in range(len(prompts))])
            tokens = [self._likeliest(s) for s in range(len(prompts))]
        seconds = time.perf_counter() - start
        for s, prompt in enumerate(prompts):
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), s, len(prompt), -1)
        return seconds

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, logits wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("decoding failed")

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._n_vocab,)).argmax())


class Holder:
    """A conversation in llama-cpp-python's class, which saves and loads its whole state."""

    def __init__(self, path: str, threads: int, kv: str, positions: int) -> None:
        k, _, v = kv.partition(":")
        if _AS_IN_FILE:  # the class has no argument for it
            defaults = llama_cpp.llama_cpp.llama_model_default_params

            def as_in_file() -> Any:
                params = defaults()
                params.use_extra_bufts = False
                return params

            llama_cpp.llama_cpp.llama_model_default_params = as_in_file
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=positions,
            n_threads=threads,
            type_k=_KV[k],
            type_v=_KV[v or k],
            flash_attn="q8" in (k, v),  # quantized V needs it
            verbose=False,
        )
        self._state: Any = None
        self._llama.eval(_some(self._llama.n_vocab())[:positions])
        self._llama.reset()
        self.settings = f"{_version()}, save_state and load_state, kv {kv}"

    def read(self, tokens: Sequence[int]) -> int:
        self._llama.reset()
        self._llama.eval(tokens)
        self._state = self._llama.save_state()
        return int(self._state.llama_state_size)

    def save_and_load(self) -> float:
        start = time.perf_counter()
        self._state = self._llama.save_state()
        self._llama.load_state(self._state)
        return time.perf_counter() - start


class Answers:
    """Handlers of requests, by name."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._holder: Holder | None = None

    def __call__(self, do: str, **request: Any) -> dict[str, Any]:
        if do not in ("load", "run", "together", "logits", "first", "hold", "read", "save_and_load"):
            raise RuntimeError(f"it cannot {do}")
        answer: dict[str, Any] = getattr(self, do)(**request)
        return answer

    def load(self, choose: bool = True, **request: Any) -> dict[str, Any]:
        self._worker = Worker(**request)
        settings = self._worker.choose() if choose else self._worker.plain()
        if not choose:
            self._worker.warm_up()
        return {"settings": settings}

    def run(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        return self._loaded().run(prompt, tokens)

    def together(self, prompts: list[list[int]], shared: int, tokens: int) -> dict[str, Any]:
        return self._loaded().together(prompts, shared, tokens)

    def logits(self, tokens: list[int], file: str) -> dict[str, Any]:
        return {"rows": self._loaded().logits(tokens, file)}

    def first(self, prompt: list[int], **request: Any) -> dict[str, Any]:
        self._worker = Worker(**request, sequences=1)
        return self._worker.first(prompt)

    def hold(self, **request: Any) -> dict[str, Any]:
        self._holder = Holder(**request)
        return {"settings": self._holder.settings}

    def read(self, tokens: list[int]) -> dict[str, Any]:
        return {"bytes": self._held().read(tokens)}

    def save_and_load(self) -> dict[str, Any]:
        return {"seconds": self._held().save_and_load()}

    def _loaded(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("no model is loaded")
        return self._worker

    def _held(self) -> Holder:
        if self._holder is None:
            raise RuntimeError("no conversation is held")
        return self._holder


def main() -> None:
    answers = Answers()
    for line in sys.stdin:
        try:
            answer = answers(**json.loads(line))
        except Exception as error:  # reported to the parent process
            answer = {"error": f"{error or type(error).__name__}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
