"""llama.cpp in its own process, with its best settings, on a GGUF file with the weights of a loaded model."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.bench.worker import Killed, Worker
from fabula.errors import EngineError, Unsupported
from fabula.export.quantize import quantize_model
from fabula.formats.open import is_gguf, open_checkpoint
from fabula.model import Model
from fabula.models.precision import label_of

_WORKER = Path(__file__).with_name("llama_worker.py")


class LlamaCpp:
    """A model in llama.cpp, in a worker process that is idle while others are measured.

    Args:
        path: a GGUF file.
        threads: at most.
        kv: format of its KV cache, with the names of `Model.load`.
        n_positions: max length of a sequence.
        n_sequences: max number of sequences decoded together.
        python: interpreter with llama_cpp; None for this one.
        choose: whether to search for its fastest settings; else all threads, without flash attention if possible.

    Raises:
        Unsupported: the interpreter, or its llama.cpp, fails on the file.
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
        request = {"path": str(path), "threads": threads, "kv": kv, "positions": n_positions}
        self._worker, answer = _begin(python, "load", **request, sequences=n_sequences, choose=choose)
        self.settings: dict[str, str] = answer["settings"]

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
        """Opens llama.cpp for a loaded model, on the file of `gguf_of`."""
        choose = choose and n_sequences == 1  # with several sequences, `together` chooses
        with gguf_of(model, status) as path:
            if choose:
                status(f"{model.weights}: trying llama.cpp's settings")
            # The memory map outlives the folder.
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
        answer = self._worker.ask("run", prompt=list(prompt), tokens=n_tokens)
        return Run(answer["prefill_s"], answer["decode_s"], tuple(answer["tokens"]))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> float:
        answer = self._worker.ask("together", prompts=[list(ids) for ids in prompts], shared=shared, tokens=n_tokens)
        self.settings["together"] = answer["settings"]
        return len(prompts) * n_tokens / float(answer["decode_s"])

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after each token except the last, starting with an empty cache."""
        with tempfile.TemporaryDirectory(prefix="fabula-bench-") as folder:
            path = Path(folder) / "logits"
            n_rows = self._worker.ask("logits", tokens=list(tokens), file=str(path))["rows"]
            rows = np.fromfile(path, np.float32)
        if n_rows != len(tokens) - 1 or rows.size % n_rows:
            raise EngineError(f"llama.cpp: {n_rows} rows of logits for {len(tokens)} tokens")
        return rows.reshape(n_rows, -1)

    def close(self) -> None:
        """Ends the worker. Idempotent."""
        self._worker.close()


class LlamaStates:
    """A conversation in llama-cpp-python, which rolls back by saving and loading its whole state.

    Args:
        path: a GGUF file.
        kv: format of its KV cache.
        n_positions: of its context.

    Raises:
        Unsupported: the interpreter, or its llama.cpp, fails on the file.
    """

    def __init__(self, path: Path, *, threads: int, kv: str, n_positions: int, python: str | None = None) -> None:
        request = {"path": str(path), "threads": threads, "kv": kv, "positions": n_positions}
        self._worker, answer = _begin(python, "hold", **request)
        self.settings: str = answer["settings"]

    def read(self, tokens: Sequence[int]) -> int:
        """Replaces the conversation by these tokens; returns the bytes of its state."""
        return int(self._worker.ask("read", tokens=list(tokens))["bytes"])

    def save_and_load(self) -> float:
        """Seconds to save and load the state."""
        return float(self._worker.ask("save_and_load")["seconds"])

    def close(self) -> None:
        """Ends the worker. Idempotent."""
        self._worker.close()


def start_worker(python: str | None, *, repack: bool = True) -> Worker:
    """Starts a worker process.

    Args:
        python: its interpreter; None for this one.
        repack: whether llama.cpp may repack weights for the processor. With AMX, 0.3.36 is ended by SIGILL on
            some machines then: it uses tiles that it did not configure.
    """
    words = [python or sys.executable, str(_WORKER), *([] if repack else ["--as-in-file"])]
    return Worker("llama.cpp", words, hint="; is llama_cpp installed there?")


def _begin(python: str | None, what: str, **request: Any) -> tuple[Worker, dict[str, Any]]:
    """Starts a worker and returns it with its first answer. Where repacked weights kill it, it does without.

    Raises:
        Unsupported: the interpreter, or its llama.cpp, fails.
    """
    for repack in (True, False):
        worker = start_worker(python, repack=repack)
        try:
            return worker, worker.ask(what, **request)
        except EngineError as error:
            worker.close()
            if not (repack and isinstance(error, Killed)):
                raise Unsupported(f"{error} ({python or sys.executable})") from None
        except BaseException:
            worker.close()
            raise
    raise AssertionError


@contextmanager
def gguf_of(model: Model, status: Status) -> Iterator[Path]:
    """Yields the model's file if it is GGUF in the loaded precision, else a temporary one, written as by
    `fabula quantize`."""
    with tempfile.TemporaryDirectory(prefix="fabula-bench-") as folder:
        path = model.path.resolve()
        if not is_gguf(path) or _label(path) != model.weights:
            path = Path(folder) / "model.gguf"
            status(f"{model.weights}: writing a GGUF for llama.cpp")
            quantize_model(model.path, path, model.weights, threads=model.threads)
        yield path


def _label(path: Path) -> str:
    checkpoint = open_checkpoint(path)
    try:
        return label_of("auto", checkpoint)
    finally:
        checkpoint.close()
