"""Run with the shim preloaded: does some work and keeps a journal of its writes, syncs and acknowledgements.

python record.py FOLDER JOURNAL N_TURNS
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from work import checkpoint_often, steps

from fabula.store.store import Store


def main(folder: Path, journal: Path, n_turns: int) -> None:
    shim = ctypes.CDLL(None)
    shim.journal_start(str(journal).encode(), str(folder).encode())
    done = 0
    while done < n_turns:  # opened again and again, as the log is also moved into the file when a store closes
        with Store.open(folder, checkpoint_s=0.005) as store:
            checkpoint_often(store)
            for number in range(done, min(done + 15, n_turns)):
                for line, do in steps(number):
                    do(store)
                    shim.journal_note(line.encode())
        done += 15


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
