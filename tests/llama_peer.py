"""llama.cpp as a second opinion, asked in a process of its own, which it may take down with it.

The Python that FABULA_TEST_LLAMA_CPP names must have llama_cpp; without it, this Python, if it has it. Tests that need
it skip with the reason when there is none.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_SERVE = """
import base64, json, os, sys

replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the library prints must not get among them
import llama_cpp, numpy

# Weights as they are in the file: repacked ones run on AMX where the processor says it has it, though a virtual machine
# may not let it.
library = sys.modules["llama_cpp.llama_cpp"]
defaults = library.llama_model_default_params

def plain():
    params = defaults()
    params.use_extra_bufts = False
    return params

library.llama_model_default_params = llama_cpp.llama_model_default_params = plain

def answer(path, ids=None, text=None, special=False, quantize=None, context=512):
    if quantize is not None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = quantize[1], 1
        return {"code": llama_cpp.llama_model_quantize(path.encode(), quantize[0].encode(), params)}
    # K and V in f32 and no flash attention: only the order of sums differs from an exact reader. The binding's own
    # defaults for YaRN would go before those of the file; -1 leaves them to it, as llama.cpp's programs do.
    model = llama_cpp.Llama(path, n_ctx=context, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
                            type_k=0, type_v=0, flash_attn=False, vocab_only=ids is None,
                            yarn_ext_factor=-1.0, yarn_attn_factor=-1.0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0)
    try:
        found = {}
        if text is not None:
            found["ids"] = model.tokenize(text.encode(), add_bos=False, special=special)
            found["with_bos"] = model.tokenize(text.encode(), add_bos=True, special=special)
        if ids is not None:
            model.eval(ids)
            logits = numpy.array(model.scores[: len(ids)], numpy.float32)
            found["shape"], found["logits"] = logits.shape, base64.b64encode(logits.tobytes()).decode()
        return found
    finally:
        model.close()

print("ready", file=replies, flush=True)
for line in sys.stdin:
    try:
        reply = answer(**json.loads(line))
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(reply), file=replies, flush=True)
"""


class LlamaCpp:
    """Starts the process when it is asked, again when it has aborted."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._process: subprocess.Popen[str] | None = None

    def ask(self, path: Path, **what: Any) -> dict[str, Any]:
        """Its answer; {"error": ...} where it refuses the file or aborts."""
        if self._process is None:
            self._process = subprocess.Popen(
                [self._python, "-c", _SERVE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n", "llama_cpp cannot be imported there"
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": str(path), **what}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()
            return {"error": "aborted"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def logits(self, path: Path, ids: Sequence[int], *, context: int = 512) -> np.ndarray | None:
        """float32 [n_ids, vocab_size]; None where it refuses the file."""
        answer = self.ask(path, ids=list(ids), context=context)
        if "error" in answer:
            return None
        return np.frombuffer(base64.b64decode(answer["logits"]), np.float32).reshape(answer["shape"])

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[LlamaCpp]:
    """llama.cpp, or a skip with the reason."""
    python = os.environ.get("FABULA_TEST_LLAMA_CPP")
    if python is None:
        if importlib.util.find_spec("llama_cpp") is None:
            pytest.skip("llama.cpp is not at hand: FABULA_TEST_LLAMA_CPP names no Python that has llama_cpp")
        python = sys.executable
    peer = LlamaCpp(python)
    yield peer
    peer.close()
