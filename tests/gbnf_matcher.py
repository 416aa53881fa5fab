"""A reference implementation of GBNF: grammars as trees, written as text, and matched in the simplest way.

It shares no code with the engine. `Matcher` computes where the texts of every rule end, for every position, until a
fixed point is reached; so left recursion and empty rules need no special care.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

ALPHABET = "ab1.\néàü漢"
TOKENS = [*ALPHABET, "ab", "ba", "aab", "1.", "éa", "bé", "\n\n", "à漢", "abab", "b1a"]


@dataclass(frozen=True)
class Literal:
    text: str

    def __str__(self) -> str:
        return '"' + self.text.replace("\n", "\\n") + '"'


@dataclass(frozen=True)
class Class:
    chars: str
    negated: bool

    def __str__(self) -> str:
        return "[" + "^" * self.negated + self.chars.replace("\n", "\\n") + "]"

    def has(self, char: str) -> bool:
        return (char in self.chars) != self.negated


@dataclass(frozen=True)
class AnyChar:
    def __str__(self) -> str:
        return "."


@dataclass(frozen=True)
class Rule:
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Row:
    items: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join(f"({item})" if isinstance(item, Choice) else str(item) for item in self.items) or '""'


@dataclass(frozen=True)
class Choice:
    options: tuple[Any, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.options))


@dataclass(frozen=True)
class Times:
    item: Any
    low: int
    high: int | None
    sign: str

    def __str__(self) -> str:
        return f"({self.item}){self.sign}"


def times(item: Any, low: int, more: int | None, sign: str) -> Times:
    high = None if more is None else low + more
    if sign == "{":
        sign = f"{{{low}}}" if more == 0 else f"{{{low},{'' if high is None else high}}}"
        return Times(item, low, high, sign)
    return Times(item, *{"*": (0, None), "+": (1, None), "?": (0, 1)}[sign], sign)


NAMES = ["root", "start", "Item", "item", "1st", "a-b"]

LEAVES = st.one_of(
    st.text(ALPHABET, min_size=0, max_size=3).map(Literal),
    st.builds(Class, st.text(ALPHABET, min_size=1, max_size=3), st.booleans()),
    st.sampled_from(NAMES).map(Rule),
    st.sampled_from(NAMES).map(Rule),
    st.just(AnyChar()),
)


def _inner(nodes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(nodes, min_size=2, max_size=4).map(lambda items: Row(tuple(items))),
        st.lists(nodes, min_size=2, max_size=3).map(lambda items: Choice(tuple(items))),
        st.builds(times, nodes, st.integers(0, 2), st.none() | st.integers(0, 2), st.sampled_from("*+?{")),
    )


BODIES = st.recursive(LEAVES, _inner, max_leaves=7)
GRAMMARS = st.lists(BODIES, min_size=1, max_size=len(NAMES)).map(
    lambda bodies: {name: bodies[i] if i < len(bodies) else Literal("a") for i, name in enumerate(NAMES)}
)


def written(grammar: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} ::= {body}" for name, body in grammar.items())


def _reached(grammar: Mapping[str, Any]) -> list[str]:
    """The rules that `root` leads to."""
    found, waiting = ["root"], ["root"]
    while waiting:
        nodes = [grammar[waiting.pop()]]
        while nodes:
            node = nodes.pop()
            if isinstance(node, Rule) and node.name not in found:
                found.append(node.name)
                waiting.append(node.name)
            nodes += getattr(node, "items", ()) or getattr(node, "options", ())
            nodes += [node.item] if isinstance(node, Times) else []
    return found


class Matcher:
    """A text beside a grammar."""

    def __init__(self, grammar: Mapping[str, Any], text: str) -> None:
        names = _reached(grammar)
        self._text = text
        self._can_end = dict.fromkeys(names, False)
        self._ends: dict[tuple[str, int], frozenset[int]] = {}
        self._open: dict[tuple[str, int], bool] = {}
        places = [(name, i) for i in range(len(text), -1, -1) for name in names]
        for known, keys, ask in (
            (self._can_end, names, lambda name: self.can_end(grammar[name])),
            (self._ends, places, lambda place: self.ends(grammar[place[0]], place[1])),
            (self._open, places, lambda place: self.is_open(grammar[place[0]], place[1])),
        ):
            is_new = True
            while is_new:
                is_new = False
                for key in keys:
                    answer = ask(key)  # type: ignore[no-untyped-call]
                    is_new |= answer != known.get(key)  # type: ignore[call-overload]
                    known[key] = answer  # type: ignore[index]

    def can_end(self, node: Any) -> bool:
        """Whether some text matches at all."""
        if isinstance(node, Rule):
            return self._can_end[node.name]
        if isinstance(node, Row):
            return all(self.can_end(item) for item in node.items)
        if isinstance(node, Choice):
            return any(self.can_end(item) for item in node.options)
        return not isinstance(node, Times) or node.low == 0 or self.can_end(node.item)

    def ends(self, node: Any, i: int) -> frozenset[int]:
        """Where a match that begins at i may end."""
        if isinstance(node, Rule):
            return self._ends.get((node.name, i), frozenset())
        if isinstance(node, Literal):
            return frozenset({i + len(node.text)}) if self._text.startswith(node.text, i) else frozenset()
        if isinstance(node, Class | AnyChar):
            found = i < len(self._text) and (isinstance(node, AnyChar) or node.has(self._text[i]))
            return frozenset({i + 1}) if found else frozenset()
        if isinstance(node, Choice):
            return frozenset().union(*(self.ends(option, i) for option in node.options))
        if isinstance(node, Row):
            at = frozenset({i})
            for item in node.items:
                at = frozenset().union(*(self.ends(item, j) for j in at))
            return at
        at = frozenset({i})
        for _ in range(node.low):
            at = frozenset().union(*(self.ends(node.item, j) for j in at))
        found_all = at
        for _ in range(len(self._text) + 1 if node.high is None else node.high - node.low):
            at = frozenset().union(*(self.ends(node.item, j) for j in at)) - found_all
            if not at:
                break
            found_all |= at
        return found_all

    def is_open(self, node: Any, i: int) -> bool:
        """Whether the text from i on is the beginning of a match that is not whole yet, but can become so."""
        rest = self._text[i:]
        if isinstance(node, Rule):
            return self._open.get((node.name, i), False)
        if isinstance(node, Literal):
            return len(rest) < len(node.text) and node.text.startswith(rest)
        if isinstance(node, Class | AnyChar):
            return not rest
        if isinstance(node, Choice):
            return any(self.is_open(option, i) for option in node.options)
        if isinstance(node, Row):
            return self._is_open_row(node.items, i)
        n_times = node.low + len(self._text) + 1 if node.high is None else node.high
        return bool(n_times) and self._is_open_row((node.item,) * n_times, i)

    def _is_open_row(self, items: tuple[Any, ...], i: int) -> bool:
        if not all(self.can_end(item) for item in items):
            return False
        at = frozenset({i})
        for item in items:
            if any(self.is_open(item, j) for j in at):
                return True
            at = frozenset().union(*(self.ends(item, j) for j in at))
            if not at:
                break
        return False

    @property
    def is_whole(self) -> bool:
        return len(self._text) in self._ends["root", 0]

    @property
    def is_beginning(self) -> bool:
        """Whether some text of the grammar begins with this one."""
        return self.is_whole or self._open["root", 0]
