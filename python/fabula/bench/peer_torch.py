"""transformers with libraries that replace torch's operators on CPUs: zentorch (ZenDNN), ipex (oneDNN).

Each runs in a worker process, in the peers' Python, since a library needs a torch of its own version.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.bench.worker import Worker
from fabula.errors import EngineError, Unsupported
from fabula.formats.open import is_gguf
from fabula.model import Model

_WORKER = Path(__file__).with_name("torch_worker.py")
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_MODULES = ("zentorch", "intel_extension_for_pytorch")


class TorchBackend:
    """A model in transformers with one of the libraries, in a worker process.

    Args:
        model: a loaded model in f32, f16 or bf16; its file is read again.
        backend: "zentorch" or "ipex"; "" for torch alone.
        python: interpreter that has them; None for this one.

    Raises:
        Unsupported: transformers cannot load the file, or the library fails; or the weights are quantized.
    """

    def __init__(self, model: Model, backend: str, python: str | None = None) -> None:
        if model.weights not in _DTYPES:
            raise Unsupported(f"it computes in {', '.join(_DTYPES)}, the weights are {model.weights}")
        self.name = f"transformers, {backend}" if backend else "transformers"
        path, options = model.path, {}
        if not path.is_dir():
            path, options = path.parent, {"gguf_file": path.name} if is_gguf(path) else {}
        self._worker = _start(python)
        try:
            settings = self._worker.ask(
                "load",
                path=str(path),
                options=options,
                dtype=_DTYPES[model.weights],
                threads=model.threads,
                backend=backend,
            )["settings"]
        except EngineError as error:
            self._worker.close()
            raise Unsupported(f"{error}") from None
        except BaseException:
            self._worker.close()
            raise
        self.settings = dict.fromkeys(("prefill", "decode"), str(settings))

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        answer = self._worker.ask("run", prompt=list(prompt), tokens=n_tokens)
        return Run(answer["prefill_s"], answer["decode_s"], tuple(answer["tokens"]))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> None:
        """Not measured: batches are padded and share no prefix."""

    def close(self) -> None:
        """Ends the worker. Idempotent."""
        self._worker.close()


def torch_backends(model: Model, status: Status, python: str | None = None) -> list[TorchBackend]:
    """A peer for each library that the peers' Python has and that can run this model; none for quantized weights."""
    if model.weights not in _DTYPES:
        return []
    if python is None and not any(importlib.util.find_spec(module) for module in _MODULES):
        return []
    found = []
    for name in _installed(python):
        status(f"{model.weights}: building transformers' model for {name}")
        try:
            found.append(TorchBackend(model, name, python))
        except EngineError as error:
            status(f"transformers with {name} is not measured: {error}")
    return found


def _installed(python: str | None) -> list[str]:
    """Names of the libraries that an interpreter has; none if it cannot be run."""
    try:
        worker = _start(python)
    except Unsupported:
        return []
    try:
        return [str(name) for name in worker.ask("backends")["backends"]]
    except EngineError:
        return []
    finally:
        worker.close()


def _start(python: str | None) -> Worker:
    return Worker("transformers", [python or sys.executable, str(_WORKER)])
