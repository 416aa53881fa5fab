"""Nodes of a context-free grammar over characters, and functions over its rules."""

from __future__ import annotations

from collections.abc import Iterator

from fabula.errors import InvalidArgument
from fabula.lean_dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a class.

    Attributes:
        ranges: inclusive ranges of code points, sorted and disjoint, without surrogates; may be empty.
    """

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Token:
    """A token by its id, or any token but that one."""

    token_id: int
    negated: bool


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to a rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Seq:
    """Items in sequence; without items: the empty text."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of several options; without options: no text at all."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`item` from `low` to `high` times; None: without limit."""

    item: Node
    low: int
    high: int | None


Node = Chars | Token | Ref | Seq | Alt | Repeat
EMPTY, NOTHING = Seq(()), Alt(())
LAST = 0x10FFFF


def sequence(items: list[Node]) -> Node:
    """Items in sequence, without needless nesting. A quoted text stays one node."""
    kept = [item for item in items if item != EMPTY]
    if NOTHING in kept:
        return NOTHING
    return kept[0] if len(kept) == 1 else Seq(tuple(kept))


def alternatives(options: list[Node]) -> Node:
    """One of the options, each once."""
    kept = list(dict.fromkeys(option for option in options if option != NOTHING))
    return kept[0] if len(kept) == 1 else Alt(tuple(kept))


def repeated(item: Node, low: int, high: int | None) -> Node:
    """An item from `low` to `high` times, simplified."""
    if high == 0 or item == EMPTY or (item == NOTHING and low == 0):
        return EMPTY
    if item == NOTHING:
        return NOTHING
    return item if (low, high) == (1, 1) else Repeat(item, low, high)


def chars(ranges: list[tuple[int, int]], negated: bool = False) -> Chars:
    """A class from ranges of code points in any order, or of all others; without surrogates."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted([*ranges, (0xD800, 0xDFFF)] if negated else ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if negated:
        edges = [-1, *(edge for pair in merged for edge in pair), LAST + 1]
        return Chars(tuple((a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True) if a + 1 < b))
    split = [part for low, high in merged for part in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high))]
    return Chars(tuple((low, high) for low, high in split if low <= high))


ANY = chars([], negated=True)


def may_be_empty(node: Node) -> bool:
    """Whether a node without references matches the empty text."""
    if isinstance(node, Repeat):
        return node.low == 0
    if isinstance(node, Seq):
        return all(may_be_empty(item) for item in node.items)
    return any(may_be_empty(item) for item in node.options) if isinstance(node, Alt) else False


def lead_bytes(node: Chars) -> int:
    """The first UTF-8 bytes of a class, as a bit set. Ranges of characters have ranges of first bytes."""
    found = 0
    for low, high in node.ranges:
        found |= (2 << chr(high).encode()[0]) - (1 << chr(low).encode()[0])
    return found


# ---- Rules that can be completed ------------------------------------------------------------------------------------


def completed(rules: dict[str, Node]) -> dict[str, Node]:
    """The rules without options that can never be completed, and only those that `root` needs.

    Raises:
        InvalidArgument: no text satisfies `root`.
    """
    ends: set[str] = set()
    users = users_of(rules)
    waiting = list(rules)
    while waiting:
        name = waiting.pop()
        if name not in ends and _ends(rules[name], ends):
            ends.add(name)
            waiting += users.get(name, ())
    if "root" not in ends:
        raise InvalidArgument("gbnf: no text satisfies it: root can never be completed")
    needed: dict[str, Node] = {}
    waiting = ["root"]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = _pruned(rules[name], ends)
            waiting += reversed(list(references(needed[name])))
    return needed


def references(node: Node) -> Iterator[str]:
    """The rules that a part of a grammar refers to."""
    if isinstance(node, Ref):
        yield node.name
    elif isinstance(node, Repeat):
        yield from references(node.item)
    elif isinstance(node, Seq | Alt):
        for item in node.items if isinstance(node, Seq) else node.options:
            yield from references(item)


def users_of(rules: dict[str, Node]) -> dict[str, list[str]]:
    """The rules that refer to a rule."""
    users: dict[str, list[str]] = {}
    for name, node in rules.items():
        for reference in dict.fromkeys(references(node)):
            users.setdefault(reference, []).append(name)
    return users


def _ends(node: Node, ends: set[str]) -> bool:
    """Whether a node can be completed, given the rules that can."""
    if isinstance(node, Ref):
        return node.name in ends
    if isinstance(node, Repeat):
        return node.low == 0 or _ends(node.item, ends)
    if isinstance(node, Seq):
        return all(_ends(item, ends) for item in node.items)
    return any(_ends(option, ends) for option in node.options) if isinstance(node, Alt) else True


def _pruned(node: Node, ends: set[str]) -> Node:
    """The node without options that need other rules than `ends`."""
    if isinstance(node, Ref):
        return node if node.name in ends else NOTHING
    if isinstance(node, Repeat):
        return repeated(_pruned(node.item, ends), node.low, node.high)
    if isinstance(node, Seq):
        return sequence([_pruned(item, ends) for item in node.items])
    return alternatives([_pruned(option, ends) for option in node.options]) if isinstance(node, Alt) else node
