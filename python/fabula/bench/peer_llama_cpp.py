"""llama.cpp on a GGUF file of the weights that a loaded model has, with its best settings, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.errors import EngineError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.open import is_gguf, open_checkpoint
from fabula.model import Model
from fabula.models.precision import label_of

_CLOSE_S = 10.0
_WORKER = Path(__file__).with_name("llama_worker.py")


class LlamaCpp:
    """A model in llama.cpp, in a worker process that sleeps while others are measured.

    Args:
        path: a GGUF file.
        threads: at most this many.
        kv: format of its cache, as a model's.
        n_positions: length of a sequence.
        n_sequences: sequences that are decoded together, at most.
        python: interpreter that has llama_cpp; None for this one.

    Raises:
        Unsupported: the interpreter, or llama.cpp in it, does not work with the file.
    """

    name = "llama.cpp"

    def __init__(
        self, path: Path, *, threads: int, kv: str, n_positions: int, n_sequences: int = 1, python: str | None = None
    ) -> None:
        python = python or sys.executable
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise Unsupported(f"{python} cannot be run: {error.strerror or error}") from None
        try:
            request = {"path": str(path), "threads": threads, "kv": kv, "positions": n_positions}
            self.settings: dict[str, str] = self._ask("load", **request, sequences=n_sequences)["settings"]
        except EngineError as error:
            self.close()
            raise Unsupported(f"{error} ({python})") from None
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(
        cls,
        model: Model,
        n_positions: int,
        status: Status,
        *,
        n_sequences: int = 1,
        kv: str | None = None,
        python: str | None = None,
    ) -> LlamaCpp:
        """The engine for a loaded model, its best settings found: on the model's own file where that has the weights'
        precision, else on a file that `fabula quantize` would write."""
        with tempfile.TemporaryDirectory(prefix="fabula-bench-") as folder:
            path = model.path.resolve()
            if not is_gguf(path) or _label(path) != model.weights:
                path = Path(folder) / "model.gguf"
                status(f"{model.weights}: writing a GGUF for llama.cpp")
                quantize_model(model.path, path, model.weights, threads=model.threads)
            status(f"{model.weights}: trying llama.cpp's settings")
            # Its memory map stays when the folder goes.
            return cls(
                path,
                threads=model.threads,
                kv=kv or model.kv,
                n_positions=n_positions,
                n_sequences=n_sequences,
                python=python,
            )

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        told = self._ask("run", prompt=list(prompt), tokens=n_tokens)
        return Run(told["prefill_s"], told["decode_s"], tuple(told["tokens"]))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> float:
        told = self._ask("together", prompts=[list(ids) for ids in prompts], shared=shared, tokens=n_tokens)
        self.settings["together"] = told["settings"]
        return len(prompts) * n_tokens / float(told["decode_s"])

    def close(self) -> None:
        """Ends the worker; may be called twice."""
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it ended before
                self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": what, **request}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise EngineError("llama.cpp's process has ended; is llama_cpp installed there?") from None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError("llama.cpp's process has ended; is llama_cpp installed there?")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"llama.cpp: {answer['error']}")
        return answer


def _label(path: Path) -> str:
    checkpoint = open_checkpoint(path)
    try:
        return label_of("auto", checkpoint)
    finally:
        checkpoint.close()
