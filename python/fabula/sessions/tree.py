"""A tree of turns with a head, and how to walk it. Going back moves the head; nothing is deleted unless asked.

Turns are shared between a session and its forks: each session lists the turns it made, and reaches older ones by their
parents. K and V of a turn are given back when the last session that lists it, or a turn behind it, is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from fabula.errors import InvalidArgument
from fabula.sessions.turn import START, Turn


@dataclass(slots=True)
class Node:
    """A turn with those that follow it, oldest first."""

    turn: Turn
    children: list[Node] = field(default_factory=list)


class Tree:
    """What of a session can be walked.

    Args:
        base: the turn it was forked from; None for an empty start.

    Attributes:
        head: the turn that the next one follows.
    """

    def __init__(self, base: Turn | None = None) -> None:
        self._root = base if base is not None else START
        self._root.forks.add(self)
        self.head = self._root
        self._turns: list[Turn] = []  # made here, oldest first
        self._undone: list[Turn] = []  # heads that rollback left, for redo
        self._lock = threading.RLock()

    # ---- Walking ----------------------------------------------------------------------------------------------------

    def rollback(self, turn: int | Turn = 1, *, prune: bool = False) -> Turn:
        """Makes an earlier turn the head. A reply being made is stopped first and stays as a partial turn.

        Args:
            turn: a turn of this tree, or the number of one on the path to the head; 0 is the empty start.
            prune: also delete the turns behind it, with their K and V.

        Returns:
            The new head. Nothing is computed; the time does not depend on the length.

        Raises:
            InvalidArgument: no such turn.
        """
        with self._lock:
            target = self._find(turn)
            self.stop()
            if target is not self.head:
                self._undone.append(self.head)
            self.head = target
            if prune:
                self._undone = []
            self._head_moved()
            if prune:
                self._drop([t for t in self._turns if t is not target and target in t.lineage()])
            return target

    def stop(self) -> None:
        """Stops what is being made."""

    def redo(self) -> Turn:
        """Takes the last rollback back.

        Raises:
            InvalidArgument: there was none, or a turn was made since.
        """
        with self._lock:
            self.stop()  # first: a reply that is being made becomes a turn, and then there is nothing to redo
            if not self._undone:
                raise InvalidArgument("there is nothing to redo: no rollback since the last turn")
            self.head = self._undone.pop()
            self._head_moved()
            return self.head

    @contextmanager
    def at(self, turn: int | Turn) -> Iterator[Self]:
        """Makes a turn the head for a `with` block."""
        with self._lock:
            before, undone = self.head, list(self._undone)
            self.rollback(turn)
        try:
            yield self
        finally:
            with self._lock:
                self.rollback(before)
                self._undone = undone
                self._head_moved()

    def tag(self, turn: int | Turn, name: str) -> None:
        """Gives a turn a name."""
        if not name:
            raise InvalidArgument("the tag is empty")
        with self._lock:
            found = self._made(self._find(turn))
            self._set_tags(found, {*found.tags, name})

    def untag(self, turn: int | Turn, name: str) -> None:
        """Takes a name away; nothing happens if the turn does not have it."""
        with self._lock:
            found = self._made(self._find(turn))
            self._set_tags(found, found.tags - {name})

    # ---- Looking ----------------------------------------------------------------------------------------------------

    @property
    def turns(self) -> list[Turn]:
        """Every turn of the tree: the past that was forked from, then those made here, oldest first."""
        self._collect()
        past = [turn for turn in self._root.lineage() if turn.number > 0]
        return [*reversed(past), *self._turns]

    @property
    def path(self) -> list[Turn]:
        """The turns from the first to the head."""
        self._collect()
        return [turn for turn in self.head.lineage() if turn.number > 0][::-1]

    @property
    def tree(self) -> Node:
        """The whole tree, from the empty start."""
        nodes = {START: Node(START)}
        for turn in self.turns:  # parents come first
            assert turn.parent is not None
            nodes[turn] = Node(turn)
            nodes[turn.parent].children.append(nodes[turn])
        return nodes[START]

    def children(self, turn: Turn) -> list[Turn]:
        """The turns that follow a turn, oldest first."""
        return [child for child in self.turns if child.parent is turn]

    def diff(self, a: int | Turn, b: int | Turn) -> tuple[list[Turn], list[Turn]]:
        """The turns that only lead to `a`, and those that only lead to `b`, in order."""
        first, second = self._find(a), self._find(b)
        in_first, in_second = set(first.lineage()), set(second.lineage())
        return (
            [turn for turn in first.lineage() if turn not in in_second][::-1],
            [turn for turn in second.lineage() if turn not in in_first][::-1],
        )

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _find(self, turn: int | Turn) -> Turn:
        """A turn of this tree: itself, or by its number on the path."""
        if isinstance(turn, Turn):
            if any(turn is known for known in (*self._root.lineage(), *self._turns)):
                return turn
            raise InvalidArgument(f"{turn!r} is no turn of this session")
        for known in self.head.lineage():
            if known.number == turn:
                return known
        raise InvalidArgument(f"there is no turn {turn} on the path, which has 0 .. {self.head.number}")

    def _made(self, turn: Turn) -> Turn:
        """The turn, if it holds words; the empty start has none to make again."""
        if turn.parent is None:
            raise InvalidArgument("nothing was said yet: turn 0 is the empty start")
        return turn

    def _drop(self, turns: list[Turn]) -> None:
        """Takes turns out of the tree and gives back their K and V, but for those that live on in a fork."""
        needed = {past for turn in turns if turn.forks for past in turn.lineage()}
        for turn in turns:
            if turn not in needed and turn.kv is not None:
                turn.kv.close()
        gone = set(turns)
        self._turns = [turn for turn in self._turns if turn not in gone]
        self._undone = []

    def _collect(self) -> None:
        """Takes in what came to its end unseen."""

    def _set_tags(self, turn: Turn, tags: set[str]) -> None:
        turn.tags = tags

    def _head_moved(self) -> None:
        """The head is another turn."""
