"""How a session's tree of turns is walked. Rollback moves the head; nothing is deleted unless asked.

The turns themselves are plain data in `turn_tree.py`. The KV pages of a turn are released when the last session that
owns it, or a turn that follows it, is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from fabula.errors import InvalidArgument
from fabula.sessions.turn import START, Turn
from fabula.sessions.turn_tree import TurnRef, TurnTree

__all__ = ["Node", "Tree", "TurnRef"]


@dataclass(slots=True)
class Node:
    """A turn with those that follow it, oldest first."""

    turn: Turn
    children: list[Node] = field(default_factory=list)


class Tree:
    """What of a session can be walked.

    Args:
        base: the turn it was forked from; None for an empty start.
    """

    def __init__(self, base: Turn | None = None) -> None:
        self._tree = TurnTree(base if base is not None else START)
        self._tree.root.forks.add(self)
        self._lock = threading.RLock()

    @property
    def head(self) -> Turn:
        """The turn that the next one follows."""
        return self._tree.head

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
            self._tree.move_head(target)
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
            behind = self._tree.descendants(target)
            self._tree.set_head(target if target in self.head.lineage() else self.head, ())
            self._head_moved()
            return self._drop(behind)

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
            self._tree.redo()
            self._head_moved()
            return self.head

    @contextmanager
    def at(self, turn: TurnRef) -> Iterator[Self]:
        """Makes a turn the head for a `with` block."""
        with self._lock:
            before, redo_stack = self.head, self._tree.redo_stack
            self.rollback(turn)
        try:
            yield self
        finally:
            with self._lock:
                self.rollback(before)
                self._tree.set_head(self.head, redo_stack)
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
        return self._tree.turns

    @property
    def path(self) -> list[Turn]:
        """The turns from the first to the head."""
        self._collect()
        return self._tree.path

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
        return self._tree.n_own

    def children(self, turn: TurnRef) -> list[Turn]:
        """The turns that follow a turn, oldest first."""
        return self._tree.children(self._find(turn))

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
        return self._tree.find(turn)

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
        self._tree.remove(turns)
        return n_bytes

    def _collect(self) -> None:
        """Takes in what came to its end unseen."""

    def _set_tags(self, turn: Turn, tags: set[str]) -> None:
        turn.tags = tags

    def _head_moved(self) -> None:
        """The head is another turn."""
