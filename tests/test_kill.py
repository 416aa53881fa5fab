"""A day of conversations under kill -9: acknowledged turns stay, and later ones are the same as without kills.

Heavy with more kills: FABULA_TEST_KILLS=200 for the full run.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabula.store.store import Store
from waiting import run_program

FAULTS = Path(__file__).parent / "faults"


@pytest.mark.busy(1e5)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "n_kills", [5, pytest.param(int(os.environ.get("FABULA_TEST_KILLS", "12")), marks=pytest.mark.heavy, id="many")]
)
def test_a_day_that_is_killed_again_and_again(tiny_folder: Path, tmp_path: Path, n_kills: int) -> None:
    result = run_program(
        [sys.executable, "-W", "error", str(FAULTS / "day.py"), str(tmp_path), str(tiny_folder), str(n_kills), "1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-5000:]
    counts = json.loads(result.stdout)
    print(counts)
    assert counts["kills"] >= n_kills and counts["acks"] > 150
    assert n_kills < 100 or counts["partials"] > 0, "some were killed in the middle of an answer"


class Stop(BaseException):
    """Stands for the kill."""


def test_the_ledger_holds_before_and_behind_each_word(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child may be killed between what it does and what it says of it; what the next one does again must be expected.
    Here one stops behind each word that turns do not tell, and the next is looked at before and behind each word."""
    monkeypatch.syspath_prepend(str(FAULTS))
    day: Any = importlib.import_module("day")
    monkeypatch.setattr(day.time, "sleep", lambda _: None)
    monkeypatch.setattr(Store, "check", lambda _: [])  # of the file, which nobody damages
    ops = [
        day.Op(*fields)
        for fields in (
            ("say", "c", 1, 0, "Hello."),
            ("fork", "c", 0, 1, "f"),
            ("say", "f", 2, 1, "And in other words?"),
            ("delete", "f", 0, 0),
            ("say", "c", 3, 1, "Tell me more."),
            ("tag", "c", 0, 3, "good"),
            ("prune", "c", 0, 1),
            ("say", "c", 4, 1, "Good night."),
        )
    ]

    def work(folder: Path, ledger: Any, stop: Callable[[list[str]], bool]) -> None:
        """Goes through the plan on a folder until it is done, or `stop` says so of the last word."""

        class Told(day.Day):  # type: ignore[misc]
            def say(self, *what: Any) -> None:
                store = self._workspace._keeper.store
                store.flush()
                ledger.verify(store, ever)
                ledger.note(json.dumps(what))
                ledger.verify(store, ever)
                if stop(list(what)):
                    raise Stop

        child = Told(folder, tiny_folder, -1)
        try:
            child._workspace.load(tiny_folder, name="tiny", **day.MODEL_OPTIONS)
            child.converse(ops)
        finally:
            child._workspace.close()

    ever: dict[int, tuple[list[int], str]] = {}
    words: list[list[str]] = []

    def hear(what: list[Any]) -> bool:
        if what[0] == "turn":
            ever[what[2]] = (what[3], what[4])
        words.append(what)
        return False

    undisturbed = day.Ledger()
    undisturbed.verify = lambda *_: 0  # nothing is known of turns to come
    work(tmp_path / "reference", undisturbed, hear)
    with Store.open(tmp_path / "reference") as store:
        expected = day.picture(store)
    last = [i for i, what in enumerate(words) if what[0] not in ("open", "using", "turn")]
    assert [words[i][0] for i in last] == ["forked", "deleting", "deleted", "tagged", "pruning", "pruned"]
    for i in last:
        ledger, n = day.Ledger(), iter(range(len(words)))
        with pytest.raises(Stop):
            work(tmp_path / str(i), ledger, lambda _, n=n, i=i: next(n) == i)
        work(tmp_path / str(i), ledger, lambda _: False)
        with Store.open(tmp_path / str(i)) as store:
            assert day.picture(store) == expected
