"""Kills a process that uses a store at random moments, and looks at what it leaves.

    python kill.py FOLDER ROUNDS SEED

The process is forked from this one, which has no store open then and saves it the imports.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import sqlalchemy as sa
from killing import MAX_OPEN_S, kill_after
from work import SIDE, Ledger, checkpoint_often, session_of, steps, turn_of

from fabula.store.location import connect, find_location, make_engine
from fabula.store.migrate import migrate
from fabula.store.records import session_row, turn_row
from fabula.store.schema import sessions, turns
from fabula.store.store import Store

ROUNDS_OF_A_FOLDER = 5
N_OLD = SIDE - 1  # turns of a store of the first schema version


def write_old_store(folder: Path, ledger: Ledger) -> None:
    """A store of the first schema version, which opening migrates."""
    folder.mkdir()
    place = find_location(folder)
    engine = make_engine(place)
    with connect(engine, write=True) as connection:
        migrate(connection, place.name, revision="0001")
        with connection.begin():
            for number in (N_OLD - 2, N_OLD - 1):
                connection.execute(sa.insert(sessions), session_row(session_of(number)))
            for number in range(N_OLD):
                row = turn_row(turn_of(number), "t")
                del row["cut"], row["said"]
                connection.execute(sa.insert(turns), row)
                ledger.note(f"kept {number}")
    engine.dispose()


def work(folder: Path, first: int, acks: int) -> None:
    """In the child: works without end, and says what is done."""
    store = Store.open(folder, checkpoint_s=0.005)
    checkpoint_often(store)
    number = first
    while True:
        for line, do in steps(number):
            do(store)
            os.write(acks, f"{line}\n".encode())
        number += 1


def run_and_kill(folder: Path, first: int, delay_s: float) -> list[str]:
    """What a child said before it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            faulthandler.enable()
            work(folder, first, write)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(write)
    kill_after(child, delay_s)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(read, encoding="ascii") as lines:
        return lines.read().splitlines()


def main(folder: Path, n_rounds: int, seed: int) -> None:
    rng, ledger, place, done = random.Random(seed), Ledger(), folder, 0
    for round in range(n_rounds):
        if round % ROUNDS_OF_A_FOLDER == 0:
            ledger, place = Ledger(), folder / str(round)
            if rng.random() < 0.5:
                write_old_store(place, ledger)
        # Short ones end while the store is opened or migrated, long ones among writes, deletions and checkpoints.
        delay_s = rng.choice([rng.uniform(0, 0.04), rng.uniform(0, 0.6)])
        first = max(ledger.kept, default=-1) + 1
        lines = run_and_kill(place, first, delay_s)
        for line in lines:
            ledger.note(line)
        done += len(lines)
        began = time.process_time()
        with Store.open(place) as store:
            took = time.process_time() - began
            assert took < MAX_OPEN_S, f"opening took {took:.1f} s"
            ledger.verify(store)
    print(done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
