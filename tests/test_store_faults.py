"""The store when disks fail, power is lost and processes are killed: acknowledged writes are still there.

Each comes twice, the second time heavy. More of that: FABULA_TEST_KILLS, rounds of kill -9; FABULA_TEST_FAULT_STRIDE=1,
every single write and sync made to fail instead of one in so many; FABULA_TEST_POWER, moments at which power is lost.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from fabula.store.store import Store
from waiting import run_program

FAULTS = Path(__file__).parent / "faults"
sys.path.insert(0, str(FAULTS))

from power import Disk, events  # noqa: E402
from work import Ledger  # noqa: E402


def few_or(many: str, default: int, few: int) -> pytest.MarkDecorator:
    """Runs a test with `n` as few, and, heavy, as the variable `many` says."""
    heavy = pytest.param(int(os.environ.get(many, default)), marks=pytest.mark.heavy, id="many")
    return pytest.mark.parametrize("n", [pytest.param(few, id="few"), heavy])


def run(program: str, *arguments: object, shim: Path | None = None) -> str:
    """Runs a program of faults/ and returns what it says."""
    result = run_program(
        [sys.executable, "-W", "error", str(FAULTS / program), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | ({"LD_PRELOAD": str(shim)} if shim else {}),
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stderr == ""
    return result.stdout


@pytest.mark.busy(1e5)
@few_or("FABULA_TEST_FAULT_STRIDE", 17, few=53)
@pytest.mark.parametrize(
    ("error", "mode"),
    [
        (errno.ENOSPC, "once"),
        (errno.EIO, "once"),
        (errno.ENOSPC, "lasting"),
        (errno.EDQUOT, "lasting"),
        (errno.EIO, "lasting"),
        (0, "short"),
    ],
)
def test_failing_writes_and_syncs(shim: Path, tmp_path: Path, error: int, mode: str, n: int) -> None:
    """One in n of them."""
    n_calls = int(run("fail.py", tmp_path, error, mode, n, shim=shim))
    assert n_calls > 100, "the work came to its end, and the fault to many of its writes"


@few_or("FABULA_TEST_POWER", 80, few=30)
def test_loss_of_power(shim: Path, tmp_path: Path, n: int) -> None:
    run("record.py", tmp_path / "live", tmp_path / "journal", 40, shim=shim)
    recorded = list(events((tmp_path / "journal").read_bytes()))
    assert {event.what for event in recorded} >= set("WTSUN")
    rng = random.Random(5)
    cuts = set(rng.sample(range(len(recorded)), n))
    disk, ledger = Disk(), Ledger()
    for at, event in enumerate(recorded):
        if at in cuts:
            folder = tmp_path / str(at)
            folder.mkdir()
            disk.restore(folder, rng)
            with Store.open(folder) as store:
                ledger.verify(store)
            shutil.rmtree(folder)
        disk.apply(event)
        if event.what == "N":
            ledger.note(event.data.decode())
    assert len(ledger.kept) == 40 and ledger.gone


@pytest.mark.busy(1e5)
@few_or("FABULA_TEST_KILLS", 30, few=10)
def test_kill_9(tmp_path: Path, n: int) -> None:
    assert int(run("kill.py", tmp_path, n, 3)) > n, "what was acknowledged was looked for"
