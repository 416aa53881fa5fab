"""Regular parts of a grammar as regular expressions in llguidance's syntax."""

from __future__ import annotations

from fabula.engine.grammar_nodes import Alt, Chars, Node, Ref, Repeat, Seq, lead_bytes, references
from fabula.lean_dataclasses import dataclass

MAX_CHARACTERS = 6000  # positions in a lexeme's pattern, with its repetitions written out
MAX_DEPTH = 70  # levels of nodes in a lexeme; the library's regular expressions take 250


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """A regular part of a grammar, without references; one object per regular expression.

    Attributes:
        regex: in the library's syntax.
        node: what it is made of.
        is_nullable: whether it matches the empty text.
        is_single: whether it matches single characters only, or nothing.
        first: bit set of the bytes that its texts may start with.
        n_characters: positions in it, with repetitions written out.
        depth: levels of nodes.
    """

    regex: str
    node: Node
    is_nullable: bool
    is_single: bool
    first: int
    n_characters: int
    depth: int


class Patterns:
    """Patterns of the regular parts of a grammar."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self._made: dict[str, Pattern] = {}
        self._of_node: dict[int, Pattern | None] = {}  # by identity: the rules keep all their nodes
        self._of_rule: dict[str, Pattern | None] = {}
        for name in _inner_first(rules):  # in a cycle some rule precedes one that it refers to: it gets no pattern
            self._of_rule[name] = self.of(rules[name])

    def of(self, node: Node) -> Pattern | None:
        """The pattern of a part; None if it is not regular, or too large for a lexeme."""
        if isinstance(node, Ref):
            return self._of_rule.get(node.name)
        if id(node) not in self._of_node:
            self._of_node[id(node)] = self._found(node)
        return self._of_node[id(node)]

    def _found(self, node: Node) -> Pattern | None:
        if isinstance(node, Chars):
            return self._kept(Pattern(_class(node), node, False, True, lead_bytes(node), 1, 1))
        if isinstance(node, Repeat):
            return self._repeated(node)
        if not isinstance(node, Seq | Alt):
            return None
        inner = [self.of(item) for item in (node.items if isinstance(node, Seq) else node.options)]
        found = [item for item in inner if item is not None]
        if len(found) < len(inner):
            return None
        n_characters = sum(item.n_characters for item in found)
        depth = 1 + max((item.depth for item in found), default=0)
        nodes, is_single = tuple(item.node for item in found), all(item.is_single for item in found)
        first = 0
        if isinstance(node, Seq):
            regex, is_nullable = "".join(item.regex for item in found), True
            for item in found:
                first |= item.first if is_nullable else 0
                is_nullable = is_nullable and item.is_nullable
            is_single = is_single and n_characters <= 1
            return self._kept(Pattern(regex, Seq(nodes), is_nullable, is_single, first, n_characters, depth))
        regex, is_nullable = f"(?:{'|'.join(item.regex for item in found)})", any(item.is_nullable for item in found)
        for item in found:
            first |= item.first
        return self._kept(Pattern(regex, Alt(nodes), is_nullable, is_single, first, n_characters, depth))

    def _repeated(self, node: Repeat) -> Pattern | None:
        item = self.of(node.item)
        if item is None or not item.n_characters:
            return item
        low = 0 if item.is_nullable else node.low
        n_characters = item.n_characters * (max(low, 1) if node.high is None else node.high)
        regex = item.regex if isinstance(item.node, Chars) else f"(?:{item.regex})"
        regex, made = f"{regex}{times(low, node.high)}", Repeat(item.node, low, node.high)
        is_single = item.is_single and node.high == 1
        return self._kept(Pattern(regex, made, low == 0, is_single, item.first, n_characters, item.depth + 1))

    def _kept(self, pattern: Pattern) -> Pattern | None:
        if pattern.n_characters > MAX_CHARACTERS or pattern.depth > MAX_DEPTH:
            return None
        return self._made.setdefault(pattern.regex, pattern)


def times(low: int, high: int | None) -> str:
    """The quantifier of a repetition."""
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?", (low, low): f"{{{low}}}"}
    return signs.get((low, high)) or f"{{{low},{'' if high is None else high}}}"


def _class(node: Chars) -> str:
    parts = [_point(low) if low == high else f"{_point(low)}-{_point(high)}" for low, high in node.ranges]
    return parts[0] if len(parts) == 1 and "-" not in parts[0] else f"[{''.join(parts)}]"


def _point(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"


def _inner_first(rules: dict[str, Node]) -> list[str]:
    """The rules in topological order: each after those it refers to, except in cycles."""
    order: list[str] = []
    seen: set[str] = set()
    for root in rules:
        waiting = [(root, False)]
        while waiting:
            name, is_done = waiting.pop()
            if is_done:
                order.append(name)
            elif name not in seen:
                seen.add(name)
                waiting.append((name, True))
                waiting += ((inner, False) for inner in references(rules[name]))
    return order
