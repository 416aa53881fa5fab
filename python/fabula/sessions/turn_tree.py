"""`TurnTree`: the turns of one session as plain data. No locks, no model, no store: `Session` adds those.

A session owns the turns that were made in it. A fork starts at a turn of another session, its root, and reaches the
path before that by parents, so a fork copies nothing. Finding a turn by its id, moving the head and adding a turn take
the same time in a tree of ten turns and of ten thousand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fabula.errors import InvalidArgument
from fabula.sessions.turn import START, Turn

# A turn by its number on the path to the head (0 is the empty start; -1 is one before the head), by its id or one of
# its tags, or itself.
TurnRef = int | str | Turn

MAX_REDO = 256  # rollbacks that can be undone


class TurnTree:
    """Turns, a head, and the heads that rollback left.

    Args:
        root: the turn that the first one follows: the empty start, or the turn of another session at which this one was
            forked.

    Attributes:
        root: as given.
        head: the current turn, which the next one follows.
    """

    def __init__(self, root: Turn = START) -> None:
        self.root = root
        self.head = root
        self._own: dict[str, Turn] = {}  # by id, parents before children
        self._past: dict[str, Turn] | None = None  # the root and its path, by id; built on first use
        self._redo: deque[Turn] = deque(maxlen=MAX_REDO)

    # ---- What there is ----------------------------------------------------------------------------------------------

    @property
    def own(self) -> list[Turn]:
        """The turns made in this session, oldest first."""
        return list(self._own.values())

    @property
    def n_own(self) -> int:
        return len(self._own)

    @property
    def redo_stack(self) -> list[Turn]:
        """Heads that rollback left, the next to redo last."""
        return list(self._redo)

    @property
    def can_redo(self) -> bool:
        return bool(self._redo)

    @property
    def path(self) -> list[Turn]:
        """The turns from the first to the head."""
        return [turn for turn in self.head.lineage() if turn.number > 0][::-1]

    @property
    def turns(self) -> list[Turn]:
        """Every turn: the path it was forked from, then those made here; parents before children."""
        past = [turn for turn in self.root.lineage() if turn.number > 0]
        return [*reversed(past), *self._own.values()]

    def owns(self, turn: Turn) -> bool:
        """Whether a turn was made in this session."""
        return self._own.get(turn.id) is turn

    def children(self, turn: Turn) -> list[Turn]:
        """The turns that follow a turn, oldest first."""
        return [child for child in self.turns if child.parent is turn]

    def descendants(self, turn: Turn) -> list[Turn]:
        """The turns made here that descend from a turn, parents before children; one pass over the tree."""
        below = {turn}
        for past in list(self.root.lineage())[::-1]:
            if past.parent in below:
                below.add(past)
        found = []
        for own in self._own.values():
            if own.parent in below:
                below.add(own)
                found.append(own)
        return found

    def find(self, ref: TurnRef) -> Turn:
        """A turn of this tree.

        Args:
            ref: the turn itself, its id, or its number on the path to the head; a negative number counts back from the
                head. Or a tag: of several turns that have it, the one nearest to the head on its path, else the last
                one made.

        Raises:
            InvalidArgument: there is none.
        """
        if isinstance(ref, str):
            found = self._by_id(ref) or self._tagged(ref)
            if found is None:
                raise InvalidArgument(f"there is no turn with the id or tag {ref!r:.80} in this session")
            return found
        if isinstance(ref, Turn):
            if self._by_id(ref.id) is not ref:
                raise InvalidArgument(f"there is no turn {ref!r} in this session")
            return ref
        if isinstance(ref, bool) or not isinstance(ref, int):
            raise InvalidArgument(f"a turn must be given by its number, its id or a tag, not by {ref!r:.80}")
        if not -self.head.number <= ref <= self.head.number:
            raise InvalidArgument(f"there is no turn {ref} on the path, which has 0 .. {self.head.number}")
        n_back = -ref if ref < 0 else self.head.number - ref
        turn = self.head
        for _ in range(n_back):  # numbers decrease by one along the lineage
            turn = turn.parent or START
        return turn

    def _tagged(self, tag: str) -> Turn | None:
        for turn in self.head.lineage():
            if tag in turn.tags:
                return turn
        return next((turn for turn in reversed(self._own.values()) if tag in turn.tags), None)

    def _by_id(self, id: str) -> Turn | None:
        if id in self._own:
            return self._own[id]
        if self._past is None:
            self._past = {turn.id: turn for turn in self.root.lineage()}
        return self._past.get(id)

    # ---- Changing it ------------------------------------------------------------------------------------------------

    def add(self, turn: Turn, *, selects: bool) -> None:
        """Adds a turn made here. `selects`: it becomes the head, and there is nothing to redo any more."""
        self._own[turn.id] = turn
        if selects:
            self.head = turn
            self._redo.clear()

    def move_head(self, turn: Turn) -> None:
        """Makes a turn of this tree the head; `redo` undoes that."""
        if turn is not self.head:
            self._redo.append(self.head)
        self.head = turn

    def redo(self) -> None:
        """Makes the head what it was before the last `move_head`.

        Raises:
            InvalidArgument: there was none, or a turn was added as the head since.
        """
        if not self._redo:
            raise InvalidArgument("there is nothing to redo: no rollback since the last turn")
        self.head = self._redo.pop()

    def remove(self, turns: Iterable[Turn]) -> None:
        """Removes turns, which include all their descendants and not the head. Empties the redo stack."""
        for turn in turns:
            del self._own[turn.id]
        self._redo.clear()

    def restore(self, own: Iterable[Turn], head: Turn, redo_stack: Iterable[Turn]) -> None:
        """Fills the tree with stored turns; parents before children."""
        self._own = {turn.id: turn for turn in own}
        self.head = head
        self._redo = deque(redo_stack, MAX_REDO)

    def set_head(self, head: Turn, redo_stack: Iterable[Turn]) -> None:
        """Sets the head and the redo stack."""
        self.head = head
        self._redo = deque(redo_stack, MAX_REDO)

    def clear(self) -> None:
        """Removes all turns; the root becomes the empty start."""
        self.root, self._past = START, None
        self.restore((), START, ())
