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

TurnRef = int | str | Turn  # a turn by its number on the path to the head (0 is the empty start), by its id, or itself


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

    def rollback(self, turn: TurnRef = 1, *, prune: bool = False) -> Turn:
        """Makes an earlier turn the head. A reply being made is stopped first and stays as a partial turn.

        Args:
            turn: a turn of this tree, its id, or the number of one on the path to the head; 0 is the empty start.
            prune: also delete the turns behind it, as `prune` does.

        Returns:
            The new head. Nothing is computed; the time does not depend on the length.

        Raises:
            InvalidArgument: no such turn.
            SessionNotFound: the session was deleted.
        """
        with self._lock:
            target = self._find(turn)
            self.stop()
            if target is not self.head:
                self._undone.append(self.head)
            self.head = target
            if prune:
                self.prune(target)
            else:
                self._head_moved()
            return target

    def prune(self, turn: TurnRef) -> int:
        """Deletes the turns behind one, with their K and V, but for what forks go on from. A reply being made is
        stopped first; a head that stood behind the turn moves to it. There is nothing to redo afterwards.

        Args:
            turn: as `rollback`; it stays itself.

        Returns:
            Bytes of K and V set free.

        Raises:
            InvalidArgument, SessionNotFound: as `rollback`.
        """
        with self._lock:
            target = self._find(turn)
            self.stop()
            if target in self.head.lineage():
                self.head = target
            self._undone = []
            self._head_moved()
            return self._drop([t for t in self._turns if t is not target and target in t.lineage()])

    def stop(self) -> None:
        """Stops what is being made."""

    def redo(self) -> Turn:
        """Takes the last rollback back.

        Raises:
            InvalidArgument: there was none, or a turn was made since.
        """
        with self._lock:
            self._check_there()
            self.stop()  # first: a reply that is being made becomes a turn, and then there is nothing to redo
            if not self._undone:
                raise InvalidArgument("there is nothing to redo: no rollback since the last turn")
            self.head = self._undone.pop()
            self._head_moved()
            return self.head

    @contextmanager
    def at(self, turn: TurnRef) -> Iterator[Self]:
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

    def tag(self, turn: TurnRef, name: str) -> None:
        """Gives a turn a name."""
        if not name:
            raise InvalidArgument("the tag is empty")
        with self._lock:
            found = self._made(self._find(turn))
            self._set_tags(found, {*found.tags, name})

    def untag(self, turn: TurnRef, name: str) -> None:
        """Takes a name away; nothing happens if the turn does not have it."""
        with self._lock:
            found = self._made(self._find(turn))
            self._set_tags(found, found.tags - {name})

    def turn(self, ref: TurnRef) -> Turn:
        """A turn of this tree, by its number on the path or by its id.

        Raises:
            InvalidArgument: there is none.
        """
        with self._lock:
            return self._find(ref)

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

    @property
    def n_turns(self) -> int:
        """How many turns were made here, without the past that was forked from."""
        return len(self._turns)

    def children(self, turn: TurnRef) -> list[Turn]:
        """The turns that follow a turn, oldest first."""
        parent = self._find(turn)
        return [child for child in self.turns if child.parent is parent]

    def diff(self, a: TurnRef, b: TurnRef) -> tuple[list[Turn], list[Turn]]:
        """The turns that only lead to `a`, and those that only lead to `b`, in order."""
        first, second = self._find(a), self._find(b)
        in_first, in_second = set(first.lineage()), set(second.lineage())
        return (
            [turn for turn in first.lineage() if turn not in in_second][::-1],
            [turn for turn in second.lineage() if turn not in in_first][::-1],
        )

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _find(self, turn: TurnRef) -> Turn:
        """A turn of this tree: itself, by its id, or by its number on the path."""
        self._check_there()
        if isinstance(turn, Turn | str):
            for known in (*self._root.lineage(), *self._turns):
                if turn is known or turn == known.id:
                    return known
            if isinstance(turn, str):
                raise InvalidArgument(f"there is no turn with the id {turn!r:.80} in this session")
            raise InvalidArgument(f"{turn!r} is no turn of this session")
        if isinstance(turn, bool) or not isinstance(turn, int):
            raise InvalidArgument(f"a turn is named by its number or its id, not by {turn!r:.80}")
        for known in self.head.lineage():
            if known.number == turn:
                return known
        raise InvalidArgument(f"there is no turn {turn} on the path, which has 0 .. {self.head.number}")

    def _check_there(self) -> None:
        """Raises SessionNotFound if the tree was deleted."""

    def _made(self, turn: Turn) -> Turn:
        """The turn, if it holds words; the empty start has none to make again."""
        if turn.parent is None:
            raise InvalidArgument("nothing was said yet: turn 0 is the empty start")
        return turn

    def _drop(self, turns: list[Turn]) -> int:
        """Takes turns out of the tree and gives back their K and V, but for those that live on in a fork; returns the
        bytes set free."""
        needed = {past for turn in turns if turn.forks for past in turn.lineage()}
        n_bytes = 0
        for turn in turns:
            if turn not in needed and turn.kv is not None:
                pool = turn.kv.pool
                with pool.lock:  # or what others take or give meanwhile would count
                    n_free = pool.n_free
                    turn.kv.close()
                    n_bytes += (pool.n_free - n_free) * pool.page_bytes
        gone = set(turns)
        self._turns = [turn for turn in self._turns if turn not in gone]
        self._undone = []
        return n_bytes

    def _collect(self) -> None:
        """Takes in what came to its end unseen."""

    def _set_tags(self, turn: Turn, tags: set[str]) -> None:
        turn.tags = tags

    def _head_moved(self) -> None:
        """The head is another turn."""
