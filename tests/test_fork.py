"""A process that computed may fork: the child loads models and computes, with as many threads as it likes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import numpy as np
from fabula import EngineError, Model, SamplingParams, ops

params = SamplingParams(max_tokens=8, temperature=0)
x = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)

def work():
    normed = ops.rms_norm(x, np.ones(64, np.float32), threads=4)
    with Model.load(sys.argv[1], threads=2) as model:
        return normed.tobytes(), model.generate("hello there", params).text()

first = work()
model = Model.load(sys.argv[1], threads=2)
again = model.generate("hello there", params).text()
child = os.fork()
if child == 0:
    status = 1
    try:
        try:
            model.generate("hello there", params).text()
        except EngineError as error:
            assert "load it in the child" in str(error), error
        else:
            raise AssertionError("the parent's model answers in the child")
        assert work() == first
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if work() == first else 3)
        status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
    finally:
        os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert work() == first and again == first[1]
assert model.generate("hello there", params).text() == again
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_loads_and_computes(tiny_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, tiny_folder], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr
