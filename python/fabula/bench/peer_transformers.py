"""transformers on the CPU, on the file of a loaded model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.errors import Unsupported
from fabula.formats.open import is_gguf
from fabula.model import Model

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Transformers:
    """A model in transformers.

    Args:
        model: in evaluation mode.
        threads: threads of torch.
    """

    name = "transformers"

    def __init__(self, model: Any, threads: int) -> None:
        self._model = model
        torch.set_num_threads(threads)
        text = f"{transformers.__version__}, torch {torch.__version__}, {threads} threads, {model.dtype}".replace(
            "torch.", ""
        )
        self.settings = dict.fromkeys(("prefill", "decode"), text)

    @classmethod
    def of(cls, model: Model, status: Status) -> Transformers:
        """Opens transformers for a loaded model.

        Raises:
            Unsupported: transformers cannot load its file, or the weights are quantized.
        """
        if model.weights not in _DTYPES:
            raise Unsupported(f"it computes in {', '.join(_DTYPES)}, the weights are {model.weights}")
        status(f"{model.weights}: building transformers' model")
        transformers.utils.logging.disable_progress_bar()
        path, options = model.path, {}
        if not path.is_dir():
            path, options = path.parent, {"gguf_file": path.name} if is_gguf(path) else {}
        try:
            built: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=_DTYPES[model.weights], local_files_only=True, **options
            )
        except Exception as error:  # whatever its families raise
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise Unsupported(f"it cannot load {model.path.name}: {reason}") from error
        return cls(built.eval(), model.threads)

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        with torch.inference_mode():
            start = time.perf_counter()
            token, cache = self._step(list(prompt), None)
            first = time.perf_counter()
            tokens = [token]
            for _ in range(n_tokens - 1):
                token, cache = self._step(tokens[-1:], cache)
                tokens.append(token)
            return Run(first - start, time.perf_counter() - first, tuple(tokens))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> None:
        """Not measured: batches are padded and share no prefix."""

    def close(self) -> None:
        """Frees the weights."""
        self._model = None

    def _step(self, tokens: list[int], cache: Any) -> tuple[int, Any]:
        out = self._model(
            input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        return int(out.logits[0, -1].argmax()), out.past_key_values
