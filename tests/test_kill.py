"""A day of conversations under kill -9: what was acknowledged stays, and the rest is what it would have been.

FABULA_TEST_KILLS=200 for the full run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from waiting import run_program

FAULTS = Path(__file__).parent / "faults"


@pytest.mark.busy(1e5)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_day_that_is_killed_again_and_again(tiny_folder: Path, tmp_path: Path) -> None:
    n_kills = int(os.environ.get("FABULA_TEST_KILLS", "12"))
    result = run_program(
        [sys.executable, "-W", "error", str(FAULTS / "day.py"), str(tmp_path), str(tiny_folder), str(n_kills), "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-5000:]
    counts = json.loads(result.stdout)
    print(counts)
    assert counts["kills"] >= n_kills and counts["acks"] > 150
    assert n_kills < 100 or counts["partials"] > 0, "some were killed in the middle of an answer"
