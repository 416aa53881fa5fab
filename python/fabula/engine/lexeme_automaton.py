"""A deterministic automaton of all lexemes of a grammar: shows which lexemes may continue where another one ends."""

from __future__ import annotations

from collections.abc import Iterator

from fabula.engine.grammar_nodes import Alt, Chars, Node, Repeat, Seq, lead_bytes, may_be_empty
from fabula.engine.lexeme_patterns import Pattern

MAX_STATES = 10_000  # of the automaton; the library builds its own as far as answers need it
MAX_WORK = 200_000  # transitions visited in one attempt, about 0.1 s


class TooLargeError(Exception):
    """The automaton has too many states."""


class Automaton:
    """A deterministic automaton of all lexemes together, over classes of characters.

    A position is one character of a pattern, repetitions written out; a state is the set of positions that may match
    the last character (Glushkov's construction, "The abstract theory of automata", 1961).
    """

    def __init__(self, lexemes: list[Pattern]) -> None:
        self._chars: list[Chars] = []  # of each position
        self._owner: list[Pattern] = []
        self._next: list[list[int]] = []  # positions that may follow a position
        self._is_last: list[bool] = []
        self._n_links = 0
        self._start: list[int] = []
        for pattern in lexemes:
            n_before = len(self._chars)
            first, last = self._positions(pattern.node)
            self._owner += [pattern] * (len(self._chars) - n_before)
            for position in last:
                self._is_last[position] = True
            self._start += first
        self._lead = [lead_bytes(each) for each in self._chars]
        self._atoms = _atoms(self._chars)

    def _positions(self, node: Node) -> tuple[list[int], list[int]]:
        """Adds the positions of a pattern; returns those of the first and of the last characters of its texts."""
        if isinstance(node, Chars):
            self._chars.append(node)
            self._next.append([])
            self._is_last.append(False)
            return [len(self._chars) - 1], [len(self._chars) - 1]
        if isinstance(node, Repeat):
            return self._repeated(node)
        firsts: list[int] = []
        lasts: list[int] = []
        if isinstance(node, Alt):
            for option in node.options:
                first, last = self._positions(option)
                firsts += first
                lasts += last
        elif isinstance(node, Seq):
            is_nullable = True
            for item in node.items:
                first, last = self._positions(item)
                self._link(lasts, first)
                is_empty = may_be_empty(item)
                firsts += first if is_nullable else []
                lasts = [*lasts, *last] if is_empty else last
                is_nullable = is_nullable and is_empty
        return firsts, lasts

    def _repeated(self, node: Repeat) -> tuple[list[int], list[int]]:
        """Adds copies in sequence. The minimum of an item that may be empty is 0."""
        n_copies = max(node.low, 1) if node.high is None else node.high
        firsts: list[int] = []
        before: list[int] = []
        lasts: list[int] = []
        for i in range(n_copies):
            first, last = self._positions(node.item)
            firsts = firsts or first
            self._link(before, first)
            before = last
            if i + 1 >= node.low:
                lasts += last
        if node.high is None:
            self._link(before, first)
        return firsts, lasts

    def _link(self, positions: list[int], following: list[int]) -> None:
        self._n_links += len(positions) * len(following)
        if self._n_links > MAX_WORK:
            raise TooLargeError
        for position in positions:
            self._next[position] += following

    def states(self) -> Iterator[tuple[set[Pattern], dict[Pattern, int]]]:
        """For every state except the first: the lexemes that are complete, and those that may continue, each with a
        bit set of the bytes that may come next.

        Raises:
            TooLargeError: there are too many states.
        """
        n_visited = 0
        seen: set[frozenset[int]] = set()
        waiting = [(frozenset[int](), set(self._start))]
        while waiting:
            state, following = waiting.pop()
            by_class: dict[int, list[int]] = {}
            for position in following:
                by_class.setdefault(self._atoms[position], []).append(position)
            if state:
                complete = {self._owner[position] for position in state if self._is_last[position]}
                continued: dict[Pattern, int] = {}
                for position in following if complete else ():
                    owner = self._owner[position]
                    continued[owner] = continued.get(owner, 0) | self._lead[position]
                yield complete, continued
            n_visited += len(by_class) ** 2
            if n_visited > MAX_WORK:
                raise TooLargeError
            for atoms in _cells(list(by_class)):
                reached = frozenset(one for mask, positions in by_class.items() if mask & atoms for one in positions)
                n_visited += len(reached) + len(by_class)
                if reached in seen:
                    continue
                seen.add(reached)
                if len(seen) > MAX_STATES or n_visited > MAX_WORK:
                    raise TooLargeError
                waiting.append((reached, {position for before in reached for position in self._next[before]}))


def _cells(masks: list[int]) -> list[int]:
    """Splits the union of bit sets into disjoint cells, so that each set is a union of cells."""
    cells: list[int] = []
    for mask in masks:
        left, cut = mask, []
        for cell in cells:
            both = cell & mask
            cut += [piece for piece in (both, cell & ~mask) if piece]
            left &= ~both
        cells = [*cut, left] if left else cut
    return cells


def _atoms(classes: list[Chars]) -> list[int]:
    """Character classes as bit sets: one bit per interval between two edges of any class."""
    edges = sorted({edge for each in set(classes) for low, high in each.ranges for edge in (low, high + 1)})
    number = {edge: i for i, edge in enumerate(edges)}
    made: dict[Chars, int] = {}
    for each in classes:
        if each not in made:
            made[each] = sum((1 << number[high + 1]) - (1 << number[low]) for low, high in each.ranges)
    return [made[each] for each in classes]
