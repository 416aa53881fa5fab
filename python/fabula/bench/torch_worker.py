"""transformers in its own process, with a library that replaces torch's operators on CPUs.

Run by path, not imported: needs torch and transformers, nothing of Fabula. Reads one JSON object a line from stdin and
answers each with one on stdout, `{"error": text}` on failure:

    {"do": "backends"}                                          -> {"backends": [names]} that can be imported
    {"do": "load", "path", "options", "dtype", "threads", "backend"}  -> {"settings": text}; backend "": torch alone
    {"do": "run", "prompt": [ids], "tokens": n}                 -> {"prefill_s", "decode_s", "tokens": [ids]}
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

_PACKAGES = {"zentorch": "zentorch", "ipex": "intel_extension_for_pytorch"}


def _with_zentorch(model: Any, torch: Any) -> Any:
    importlib.import_module("zentorch")  # registers its backend
    model.forward = torch.compile(model.forward, backend="zentorch", dynamic=True)
    return model


def _with_ipex(model: Any, _torch: Any) -> Any:
    return importlib.import_module("intel_extension_for_pytorch").optimize(model, dtype=model.dtype)


_PREPARE: dict[str, Callable[[Any, Any], Any]] = {
    "": lambda model, _: model,
    "zentorch": _with_zentorch,
    "ipex": _with_ipex,
}


class Answers:
    """Handlers of requests, by name."""

    def __init__(self) -> None:
        self._model: Any = None
        self._torch: Any = None

    def __call__(self, do: str, **request: Any) -> dict[str, Any]:
        if do not in ("backends", "load", "run"):
            raise RuntimeError(f"it cannot {do}")
        answer: dict[str, Any] = getattr(self, do)(**request)
        return answer

    def backends(self) -> dict[str, Any]:
        needed = ("torch", "transformers")
        if any(importlib.util.find_spec(module) is None for module in needed):
            return {"backends": []}
        return {"backends": [name for name, module in _PACKAGES.items() if importlib.util.find_spec(module)]}

    def load(self, path: str, options: dict[str, str], dtype: str, threads: int, backend: str) -> dict[str, Any]:
        self._torch = torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, **options
        )
        self._model = _PREPARE[backend](model.eval(), torch)
        extra = [f"{backend} {version(_PACKAGES[backend])}"] if backend else []
        about = [*extra, f"transformers {transformers.__version__}", f"torch {torch.__version__}", f"{threads} threads"]
        return {"settings": ", ".join([*about, dtype])}

    def run(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        with self._torch.inference_mode():
            start = time.perf_counter()
            token, cache = self._step(prompt, None)
            first = time.perf_counter()
            found = [token]
            for _ in range(tokens - 1):
                token, cache = self._step(found[-1:], cache)
                found.append(token)
            return {"prefill_s": first - start, "decode_s": time.perf_counter() - first, "tokens": found}

    def _step(self, tokens: list[int], cache: Any) -> tuple[int, Any]:
        ids = self._torch.tensor([tokens])
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
        return int(out.logits[0, -1].argmax()), out.past_key_values


def main() -> None:
    answers = Answers()
    for line in sys.stdin:
        try:
            answer = answers(**json.loads(line))
        except Exception as error:  # reported to the parent process
            first = next(iter(str(error).splitlines()), "") or type(error).__name__
            answer = {"error": first}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
