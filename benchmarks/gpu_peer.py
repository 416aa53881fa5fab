"""torch on the same GPU: peak of its bf16 products, and transformers' Llama, compiled."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

_WARM_STEPS = 3  # compile, record a graph, replay it


def is_there() -> bool:
    """Whether this torch has a GPU."""
    return bool(torch.cuda.is_available())


def matrix_peak(size: int, device: str = "cuda", repeats: int = 10) -> float:
    """Operations a second of the product of bf16 matrices [size, size], the fastest of several; a multiply-add is 2."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds[1:])


class Transformers:
    """A random Llama of transformers in bf16.

    Args:
        config: keys of config.json.
        device: of torch.
        is_compiled: whether steps of one token are compiled ("reduce-overhead", which records CUDA graphs).
    """

    name = "transformers"

    def __init__(self, config: dict[str, Any], device: str = "cuda", *, is_compiled: bool = True) -> None:
        self._device, self._config = device, transformers.LlamaConfig(**config)
        with torch.device(device):
            self._model: Any = transformers.LlamaForCausalLM._from_config(self._config, dtype=torch.bfloat16).eval()
        self._step: Callable[..., Any] = self._model.forward
        if is_compiled:
            self._step = torch.compile(self._model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
        parameters = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # the latter until 5.40
        how = "steps torch.compile reduce-overhead, prompts as they are" if is_compiled else "not compiled"
        self.settings = f"{transformers.__version__}, torch {torch.__version__}, bf16, static cache, {how}"

    def run(self, batch: int, prompt: int, n_steps: int) -> tuple[float, float]:
        """Tokens a second of prefill of `batch` prompts together, and of decode steps (median)."""
        with torch.inference_mode():
            cache = transformers.StaticCache(config=self._config, max_cache_len=prompt + _WARM_STEPS + n_steps + 1)
            ids = torch.randint(3, self._config.vocab_size, (batch, prompt), device=self._device)
            seconds = []
            for i in range(2):  # the first one allocates memory and selects kernels
                if i:
                    cache.reset()
                start = self._now()
                token = self._next(self._model.forward, ids, cache)
                seconds.append(self._now() - start)
            prefill = batch * prompt / seconds[-1]
            steps = []
            for _ in range(_WARM_STEPS + n_steps):
                start = self._now()
                token = self._next(self._step, token, cache)
                steps.append(self._now() - start)
            return prefill, batch / statistics.median(steps[_WARM_STEPS:])

    def _next(self, forward: Callable[..., Any], ids: Any, cache: Any) -> Any:
        out = forward(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return out.logits[:, -1].argmax(-1, keepdim=True).clone()  # a replayed graph overwrites its output

    def _now(self) -> float:
        _wait(self._device)
        return time.perf_counter()

    def close(self) -> None:
        """Frees the GPU's memory."""
        self._model = self._step = None  # type: ignore[assignment]
        torch.compiler.reset()  # compiled code holds graphs and their memory
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
