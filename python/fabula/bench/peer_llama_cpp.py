"""llama.cpp on a GGUF file of the weights that a loaded model has, with its best settings, in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.bench.worker import Worker
from fabula.errors import EngineError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.open import is_gguf, open_checkpoint
from fabula.model import Model
from fabula.models.precision import label_of

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
        choose: whether it looks for its fastest settings; else all threads and no flash attention, where that works.

    Raises:
        Unsupported: the interpreter, or llama.cpp in it, does not work with the file.
    """

    name = "llama.cpp"

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        kv: str,
        n_positions: int,
        n_sequences: int = 1,
        python: str | None = None,
        choose: bool = True,
    ) -> None:
        self._worker = start_worker(python)
        request = {"path": str(path), "threads": threads, "kv": kv, "positions": n_positions}
        with _closing_on_error(self._worker, python):
            told = self._worker.ask("load", **request, sequences=n_sequences, choose=choose)
            self.settings: dict[str, str] = told["settings"]

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
        choose: bool = True,
    ) -> LlamaCpp:
        """The engine for a loaded model, on the file of `gguf_of`."""
        choose = choose and n_sequences == 1  # for more, `together` chooses
        with gguf_of(model, status) as path:
            if choose:
                status(f"{model.weights}: trying llama.cpp's settings")
            # Its memory map stays when the folder goes.
            return cls(
                path,
                threads=model.threads,
                kv=kv or model.kv,
                n_positions=n_positions,
                n_sequences=n_sequences,
                python=python,
                choose=choose,
            )

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        told = self._worker.ask("run", prompt=list(prompt), tokens=n_tokens)
        return Run(told["prefill_s"], told["decode_s"], tuple(told["tokens"]))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> float:
        told = self._worker.ask("together", prompts=[list(ids) for ids in prompts], shared=shared, tokens=n_tokens)
        self.settings["together"] = told["settings"]
        return len(prompts) * n_tokens / float(told["decode_s"])

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits behind every token but the last, read from an empty cache."""
        with tempfile.TemporaryDirectory(prefix="fabula-bench-") as folder:
            path = Path(folder) / "logits"
            n_rows = self._worker.ask("logits", tokens=list(tokens), file=str(path))["rows"]
            rows = np.fromfile(path, np.float32)
        if n_rows != len(tokens) - 1 or rows.size % n_rows:
            raise EngineError(f"llama.cpp: {n_rows} rows of logits for {len(tokens)} tokens")
        return rows.reshape(n_rows, -1)

    def close(self) -> None:
        """Ends the worker; may be called twice."""
        self._worker.close()


class LlamaStates:
    """A conversation in llama-cpp-python, whose whole state is saved and loaded: how it goes back.

    Args:
        path: a GGUF file.
        kv: format of its cache.
        n_positions: that its context holds.

    Raises:
        Unsupported: the interpreter, or llama.cpp in it, does not work with the file.
    """

    def __init__(self, path: Path, *, threads: int, kv: str, n_positions: int, python: str | None = None) -> None:
        self._worker = start_worker(python)
        request = {"path": str(path), "threads": threads, "kv": kv, "positions": n_positions}
        with _closing_on_error(self._worker, python):
            self.settings: str = self._worker.ask("hold", **request)["settings"]

    def read(self, tokens: Sequence[int]) -> int:
        """Makes a conversation of these tokens the current one; the bytes of its state."""
        return int(self._worker.ask("read", tokens=list(tokens))["bytes"])

    def save_and_load(self) -> float:
        """Seconds that saving the state and loading it take."""
        return float(self._worker.ask("save_and_load")["seconds"])

    def close(self) -> None:
        """Ends the worker; may be called twice."""
        self._worker.close()


def start_worker(python: str | None) -> Worker:
    """A worker process that waits for its first question; None is the interpreter that runs this."""
    return Worker("llama.cpp", [python or sys.executable, str(_WORKER)], hint="; is llama_cpp installed there?")


@contextmanager
def gguf_of(model: Model, status: Status) -> Iterator[Path]:
    """The model's own file where that has the weights' precision, else one that `fabula quantize` would write, which is
    removed at the end."""
    with tempfile.TemporaryDirectory(prefix="fabula-bench-") as folder:
        path = model.path.resolve()
        if not is_gguf(path) or _label(path) != model.weights:
            path = Path(folder) / "model.gguf"
            status(f"{model.weights}: writing a GGUF for llama.cpp")
            quantize_model(model.path, path, model.weights, threads=model.threads)
        yield path


@contextmanager
def _closing_on_error(worker: Worker, python: str | None) -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        worker.close()
        raise Unsupported(f"{error} ({python or sys.executable})") from None
    except BaseException:
        worker.close()
        raise


def _label(path: Path) -> str:
    checkpoint = open_checkpoint(path)
    try:
        return label_of("auto", checkpoint)
    finally:
        checkpoint.close()
