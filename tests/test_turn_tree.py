"""The tree of turns as plain data: what is found and removed, and that the time of it does not grow with the tree."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fabula import InvalidArgument
from fabula.sessions.turn import START, Turn
from fabula.sessions.turn_tree import MAX_REDO, TurnTree


def turn_after(parent: Turn) -> Turn:
    return Turn(parent=parent, number=parent.number + 1)


def tree_of(parents: list[int], root: Turn = START) -> tuple[TurnTree, list[Turn]]:
    """A tree whose i-th turn follows the (parents[i] % (i + 1))-th of [root, *turns]."""
    tree, turns = TurnTree(root), [root]
    for i, parent in enumerate(parents):
        turns.append(turn_after(turns[parent % (i + 1)]))
        tree.add(turns[-1], selects=True)
    return tree, turns


def steps_of(work: Callable[[], Any]) -> int:
    """Lines of Python that a call runs."""
    n = 0

    def count(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal n
        n += event == "line"
        return count

    before = sys.gettrace()
    gc.disable()  # or finalizers of other tests' garbage count
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return n


@given(parents=st.lists(st.integers(0, 50), max_size=40), past=st.integers(0, 5), at=st.integers(0, 60))
def test_descendants_are_those_with_it_in_their_lineage(parents: list[int], past: int, at: int) -> None:
    root = START
    for _ in range(past):
        root = turn_after(root)
    tree, turns = tree_of(parents, root)
    everything = [*list(root.lineage())[::-1], *turns[1:]]
    target = everything[at % len(everything)]
    behind = tree.descendants(target)
    assert behind == [turn for turn in tree.own if turn is not target and target in turn.lineage()]
    for turn in everything:
        assert tree.find(turn) is turn and tree.find(turn.id) is turn
        assert tree.children(turn) == [child for child in tree.turns if child.parent is turn]
    assert [tree.find(number) for number in range(tree.head.number + 1)] == list(tree.head.lineage())[::-1]
    if tree.head in behind:
        tree.set_head(target, ())
    tree.remove(behind)
    assert tree.own == [turn for turn in turns[1:] if turn not in behind] and not tree.can_redo


def test_what_is_no_turn_is_refused() -> None:
    tree, _ = tree_of([0, 1])
    for wrong in (3, -3, True, "nothing", turn_after(START), 1.0, None):
        with pytest.raises(InvalidArgument):
            tree.find(wrong)  # type: ignore[arg-type]


def test_redo_is_bounded() -> None:
    tree, turns = tree_of([0, 1])
    for i in range(2 * MAX_REDO):
        tree.move_head(turns[1 + i % 2])
    assert len(tree.redo_stack) == MAX_REDO
    for _ in range(MAX_REDO):
        tree.redo()
    with pytest.raises(InvalidArgument, match="nothing to redo"):
        tree.redo()


def test_steps_do_not_grow_with_the_tree() -> None:
    """Counted, not timed: a rollback by id, a redo and a new turn in chains of 20 and of 10,000 turns."""

    def steps(n: int) -> tuple[int, int, int]:
        tree, turns = tree_of(list(range(n)))
        tree.find("")  # the index of the past is made once
        walk = steps_of(lambda: tree.move_head(tree.find(turns[n // 2].id)))
        return walk, steps_of(tree.redo), steps_of(lambda: tree.add(turn_after(tree.head), selects=True))

    assert steps(20) == steps(10_000)
    tree, turns = tree_of(list(range(10_000)))
    assert steps_of(lambda: tree.descendants(turns[5000])) < 10 * 10_000, "one pass"
