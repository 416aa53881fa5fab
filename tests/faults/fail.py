"""Run with the shim preloaded: makes each write and sync of some work fail in turn.

    python fail.py FOLDER ERRNO once|lasting|short STRIDE

Prints the number of the first call that the work did not come to.
"""

from __future__ import annotations

import ctypes
import errno
import shutil
import sys
from pathlib import Path

from work import Ledger, checkpoint_often, steps

from fabula.errors import StoreError, StoreFull
from fabula.store.store import Store

N_TURNS = 8
MODES = {"once": 0, "lasting": 1, "short": 2}
shim = ctypes.CDLL(None)


def judge(failure: StoreError, error: int, mode: str) -> None:
    """Whether a failure is one to expect; a lasting fault ends here: the disk has room again."""
    assert shim.fault_hits(), f"nothing was made to fail, but {failure!r}"
    assert mode != "short", f"a write may be short: {failure!r}"
    if mode == "lasting":  # the folder cannot be written either, which gives the reason away
        assert isinstance(failure, StoreFull) == (error in (errno.ENOSPC, errno.EDQUOT)), repr(failure)
        shim.fault_clear()


def opened(folder: Path) -> Store:
    store = Store.open(folder, checkpoint_s=0.005)
    try:
        checkpoint_often(store)
    except BaseException:
        store.close()
        raise
    return store


def work(folder: Path, error: int, mode: str) -> None:
    """Does the work; whatever fails is done again, which must succeed once the fault is over."""
    ledger = Ledger()
    try:
        store = opened(folder)
    except StoreError as failure:
        judge(failure, error, mode)
        store = opened(folder)
    for number in range(N_TURNS):
        for line, do in steps(number):
            try:
                do(store)
            except StoreError as failure:
                judge(failure, error, mode)
                ledger.verify(store)
                do(store)
            ledger.note(line)
    shim.fault_clear()
    ledger.verify(store)
    store.close()
    with Store.open(folder) as store:
        ledger.verify(store)


def main(folder: Path, error: int, mode: str, stride: int) -> None:
    nth, hits = 1, 1
    while hits:
        place = folder / f"{mode}-{nth}"
        # A lasting fault is the whole folder's; another one meets only the database's files.
        part = str(place) if mode == "lasting" else f"{place}/sessions.sqlite3"
        shim.fault_arm(part.encode(), ctypes.c_long(nth), error, MODES[mode])
        work(place, error, mode)
        hits = shim.fault_hits()
        shutil.rmtree(place)
        nth += stride
    print(nth)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
