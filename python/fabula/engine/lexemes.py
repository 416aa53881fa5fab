"""From a grammar over characters to one over lexemes, which the library follows fast, with the same texts.

The library reads text in two stages: a lexer takes the longest piece that one of the lexemes allowed at a place
matches, an Earley parser goes on with all lexemes that match this piece. Single characters as lexemes are always right,
but then every byte of every token of the vocabulary is a step of the parser: 7 ms for a mask of 49,000 tokens, where a
lexeme of many characters takes 10 us. So a part of the grammar that is regular (no rule in it leads back to itself) is
one lexeme where that changes nothing:

    Let w be a text of lexeme A, and c the first byte of anything that the grammar lets follow A. If no lexeme B has a
    text that begins with wc, then in any text of the grammar every lexeme ends where the lexer ends it: it goes on
    through w, for w is a beginning of A; at c no lexeme is left; the last place where one matched is the end of w, and
    A is among those that match there. What the lexer finds is always a text of the grammar, so both are the same; for
    beginnings of texts too, for what is read of a lexeme is the beginning of one that the parser allows there.

A deterministic automaton of all lexemes together says whether that holds; "first byte" and not "first character"
because characters may share theirs. If not, B is taken apart and all are looked at again; a B that goes wrong has two
characters or more, so this ends, with single characters at the worst. A grammar without recursion is one lexeme, which
nothing follows. An automaton with too many states is taken apart as well, for the library would build it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from fabula.engine.gbnf import Alt, Chars, Node, Ref, Repeat, Seq, Token, alternatives, parse_gbnf, references, repeated

MAX_CHARACTERS = 6000  # places in a lexeme's pattern, with its repetitions written out
MAX_DEPTH = 70  # nodes of a lexeme within each other; the library's regular expressions take 250 levels
MAX_STATES = 10_000  # of the automaton of all lexemes; the library's own is built as far as answers need it
MAX_WORK = 200_000  # transitions looked at in one attempt, about 0.1 s
MAX_ROUNDS = 12  # attempts; then all lexemes are single characters


def gbnf_to_lark(source: str, token_id: Callable[[str], int | None]) -> str:
    """A grammar in the library's dialect of Lark that has the same texts.

    Args:
        source: GBNF.
        token_id: as `parse_gbnf` takes it.

    Raises:
        InvalidArgument: it is no GBNF, or no text satisfies it; names line and column.
    """
    return _Plan(parse_gbnf(source, token_id)).lark()


# ---- Patterns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """A regular part of a grammar, without references; one object for each regular expression.

    Attributes:
        regex: in the library's syntax.
        node: what it is made of.
        is_nullable: whether it matches the empty text.
        is_single: whether it matches single characters only, or nothing.
        first: the bytes that its texts may begin with, as bits.
        n_characters: places in it, with repetitions written out.
        depth: nodes within each other.
    """

    regex: str
    node: Node
    is_nullable: bool
    is_single: bool
    first: int
    n_characters: int
    depth: int


class _Patterns:
    """Makes patterns out of parts of a grammar."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self._made: dict[str, Pattern] = {}
        self._of_node: dict[int, Pattern | None] = {}  # by identity: the rules keep all their nodes
        self._of_rule: dict[str, Pattern | None] = {}
        for name in _inner_first(rules):  # of rules in a circle one comes before another that it refers to: no pattern
            self._of_rule[name] = self.of(rules[name])

    def of(self, node: Node) -> Pattern | None:
        """The pattern of a part; None where it is not regular, or too large to be a lexeme."""
        if isinstance(node, Ref):
            return self._of_rule.get(node.name)
        if id(node) not in self._of_node:
            self._of_node[id(node)] = self._found(node)
        return self._of_node[id(node)]

    def _found(self, node: Node) -> Pattern | None:
        if isinstance(node, Chars):
            return self._kept(Pattern(_class(node), node, False, True, _lead_bytes(node), 1, 1))
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
        regex, made = f"{regex}{_times(low, node.high)}", Repeat(item.node, low, node.high)
        is_single = item.is_single and node.high == 1
        return self._kept(Pattern(regex, made, low == 0, is_single, item.first, n_characters, item.depth + 1))

    def _kept(self, pattern: Pattern) -> Pattern | None:
        if pattern.n_characters > MAX_CHARACTERS or pattern.depth > MAX_DEPTH:
            return None
        return self._made.setdefault(pattern.regex, pattern)


def _times(low: int, high: int | None) -> str:
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?", (low, low): f"{{{low}}}"}
    return signs.get((low, high)) or f"{{{low},{'' if high is None else high}}}"


def _class(node: Chars) -> str:
    parts = [_point(low) if low == high else f"{_point(low)}-{_point(high)}" for low, high in node.ranges]
    return parts[0] if len(parts) == 1 and "-" not in parts[0] else f"[{''.join(parts)}]"


def _point(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and char.isalnum() else f"\\x{{{code:X}}}"


def _inner_first(rules: dict[str, Node]) -> list[str]:
    """Rules in an order in which those that a rule refers to come before it, but where they go round in a circle."""
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


# ---- The plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Parts that the parser puts together."""

    kind: Literal["sequence", "alternatives", "repeat"]
    parts: tuple[Part, ...]
    low: int = 1
    high: int | None = 1


Part = Pattern | Token | Ref | Group


class _Plan:
    """Which parts of a grammar are lexemes."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self._nodes = rules
        self._patterns = _Patterns(rules)
        self._apart: set[Pattern] = set()
        self._all_apart = False
        self._gathered: dict[int, Node | None] = {}  # by the identity of a repetition
        self._rules = self._planned()
        for _ in range(MAX_ROUNDS):
            culprits = self._culprits()
            if not culprits:
                return
            self._apart |= culprits
            self._rules = self._planned()
        self._all_apart = True
        self._rules = self._planned()

    def _planned(self) -> dict[str, Part]:
        """The rules that are left, `root` first."""
        made: dict[str, Part] = {}
        waiting = ["root"]
        while waiting:
            name = waiting.pop()
            if name not in made:
                made[name] = self._part(self._nodes[name])
                waiting += [part.name for part in _leaves(made[name]) if isinstance(part, Ref)][::-1]
        return made

    def _part(self, node: Node) -> Part:
        if isinstance(node, Token):
            return node
        pattern = self._patterns.of(node)
        if pattern is not None and (pattern.is_single or not (self._all_apart or pattern in self._apart)):
            return pattern
        if isinstance(node, Repeat):
            runs = self._runs(node)
            return self._part(runs) if runs else Group("repeat", (self._part(node.item),), node.low, node.high)
        if isinstance(node, Seq):
            return Group("sequence", tuple(self._part(item) for item in node.items))
        if isinstance(node, Alt):
            return Group("alternatives", tuple(self._part(item) for item in node.options))
        return node if isinstance(node, Ref) else Group("sequence", ())

    def _runs(self, node: Repeat) -> Node | None:
        """A repetition of regular and other options with the regular ones gathered, so that a run of them can be one
        lexeme: with R for (A | B)+, (A | B | X)* has the texts of (R? X)* R?, and with + those of R | (R? X)+ R?."""
        if id(node) not in self._gathered:
            options = node.item.options if isinstance(node.item, Alt) and node.high is None and node.low < 2 else ()
            regular = [option for option in options if self._patterns.of(option) is not None]
            made: Node | None = None
            if 0 < len(regular) < len(options):
                run = repeated(alternatives(regular), 1, None)
                others = alternatives([option for option in options if option not in regular])
                made = Seq((repeated(Seq((repeated(run, 0, 1), others)), node.low, None), repeated(run, 0, 1)))
                made = made if node.low == 0 else Alt((run, made))
            self._gathered[id(node)] = made
        return self._gathered[id(node)]

    def _lexemes(self) -> list[Pattern]:
        found = {part: None for rule in self._rules.values() for part in _leaves(rule) if isinstance(part, Pattern)}
        return [pattern for pattern in found if pattern.n_characters]

    # ---- Whether the lexer finds every lexeme -----------------------------------------------------------------------

    def _culprits(self) -> set[Pattern]:
        """Lexemes that might go on where another one ends."""
        lexemes = self._lexemes()
        long = [pattern for pattern in lexemes if not pattern.is_single]
        if not long:
            return set()
        following = self._following()
        found: set[Pattern] = set()
        try:
            for complete, continued in _Automaton(lexemes).states():
                after = 0
                for pattern in complete:
                    after |= following[pattern]
                found |= {pattern for pattern, first in continued.items() if first & after}
        except _TooLargeError:
            largest = max(pattern.n_characters for pattern in long)
            return {pattern for pattern in long if 2 * pattern.n_characters > largest}
        return found

    def _following(self) -> dict[Pattern, int]:
        """The bytes with which may begin what follows a lexeme."""
        firsts: dict[str, tuple[int, bool]] = dict.fromkeys(self._rules, (0, False))
        is_new = True
        while is_new:
            is_new = False
            for name, part in reversed(self._rules.items()):
                found = _first(part, firsts)
                is_new |= found != firsts[name]
                firsts[name] = found
        after: dict[str | Pattern, int] = dict.fromkeys(self._rules, 0)
        is_new = True
        while is_new:
            before = dict(after)
            for name, part in self._rules.items():
                _follow(part, after[name], firsts, after)
            is_new = after != before
        return {key: value for key, value in after.items() if isinstance(key, Pattern)}

    # ---- Writing ----------------------------------------------------------------------------------------------------

    def lark(self) -> str:
        """The grammar in Lark: rules r0, r1 ..., lexemes T0, T1 ..."""
        names: dict[str | Pattern, str] = {name: f"r{i}" for i, name in enumerate(self._rules)}
        lexemes = self._lexemes()
        names |= {pattern: f"T{i}" for i, pattern in enumerate(lexemes)}
        lines = ["start: r0", *(f"{names[name]}: {_lark(part, names)}" for name, part in self._rules.items())]
        return "\n".join([*lines, *(f"{names[pattern]}: {_terminal(pattern)}" for pattern in lexemes)])


def _leaves(part: Part) -> Iterator[Part]:
    if isinstance(part, Group):
        for inner in part.parts:
            yield from _leaves(inner)
    else:
        yield part


def _first(part: Part, firsts: dict[str, tuple[int, bool]]) -> tuple[int, bool]:
    """The bytes that a part may begin with, and whether it may be empty. A token has none."""
    if isinstance(part, Pattern):
        return part.first, part.is_nullable
    if isinstance(part, Token):
        return 0, False
    if isinstance(part, Ref):
        return firsts[part.name]
    first, is_nullable = 0, part.kind != "alternatives"
    for inner in part.parts:
        more, may_be_empty = _first(inner, firsts)
        if part.kind == "alternatives":
            first, is_nullable = first | more, is_nullable or may_be_empty
        else:
            first, is_nullable = first | (more if is_nullable else 0), is_nullable and may_be_empty
    return first, is_nullable or part.low == 0


def _follow(part: Part, after: int, firsts: dict[str, tuple[int, bool]], found: dict[str | Pattern, int]) -> None:
    """Adds what follows a part to what follows its rules and lexemes."""
    if isinstance(part, Pattern):
        found[part] = found.get(part, 0) | after
    elif isinstance(part, Ref):
        found[part.name] |= after
    elif isinstance(part, Group):
        if part.kind == "repeat" and part.high != 1:
            after |= _first(part.parts[0], firsts)[0]
        for inner in reversed(part.parts):
            _follow(inner, after, firsts, found)
            if part.kind == "sequence":
                first, is_nullable = _first(inner, firsts)
                after = first | (after if is_nullable else 0)


def _may_be_empty(node: Node) -> bool:
    if isinstance(node, Repeat):
        return node.low == 0
    if isinstance(node, Seq):
        return all(_may_be_empty(item) for item in node.items)
    return any(_may_be_empty(item) for item in node.options) if isinstance(node, Alt) else False


def _lead_bytes(node: Chars) -> int:
    """The first bytes of characters in UTF-8, as bits; their order is that of the characters."""
    found = 0
    for low, high in node.ranges:
        found |= (2 << chr(high).encode()[0]) - (1 << chr(low).encode()[0])
    return found


def _lark(part: Part, names: dict[str | Pattern, str]) -> str:
    if isinstance(part, Pattern):
        return f"{names[part]}{'?' * part.is_nullable}" if part.n_characters else '""'
    if isinstance(part, Token):
        return f"<[{'^' * part.negated}{part.token_id}]>"
    if isinstance(part, Ref):
        return names[part.name]
    inner = [_lark(each, names) for each in part.parts]
    if part.kind == "repeat":
        return f"({inner[0]}){_times(part.low, part.high)}"
    return " ".join(inner) if part.kind == "sequence" else f"({' | '.join(inner)})"


def _terminal(pattern: Pattern) -> str:
    """A lexeme, which must not be empty; that it may be missing says the rule."""
    return f"/{pattern.regex}/" + r" & /(?s:.+)/" * pattern.is_nullable


# ---- The automaton --------------------------------------------------------------------------------------------------


class _TooLargeError(Exception):
    """The automaton has too many states."""


class _Automaton:
    """A deterministic automaton of all lexemes together, over classes of characters.

    A place is a character of a pattern; a state is the set of places that the last character read may stand at
    (Glushkov's construction, "The abstract theory of automata", 1961).
    """

    def __init__(self, lexemes: list[Pattern]) -> None:
        self._chars: list[Chars] = []  # of each place
        self._owner: list[Pattern] = []
        self._next: list[list[int]] = []  # places that may follow a place
        self._is_last: list[bool] = []
        self._n_links = 0
        self._start: list[int] = []
        for pattern in lexemes:
            n_before = len(self._chars)
            first, last = self._places(pattern.node)
            self._owner += [pattern] * (len(self._chars) - n_before)
            for place in last:
                self._is_last[place] = True
            self._start += first
        self._lead = [_lead_bytes(each) for each in self._chars]
        self._atoms = _atoms(self._chars)

    def _places(self, node: Node) -> tuple[list[int], list[int]]:
        """Adds the places of a pattern; the first and the last of its texts that are not empty."""
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
                first, last = self._places(option)
                firsts += first
                lasts += last
        elif isinstance(node, Seq):
            is_nullable = True
            for item in node.items:
                first, last = self._places(item)
                self._link(lasts, first)
                may_be_empty = _may_be_empty(item)
                firsts += first if is_nullable else []
                lasts = [*lasts, *last] if may_be_empty else last
                is_nullable = is_nullable and may_be_empty
        return firsts, lasts

    def _repeated(self, node: Repeat) -> tuple[list[int], list[int]]:
        """Copies in sequence. An item that may be empty is left out instead."""
        n_copies = max(node.low, 1) if node.high is None else node.high
        firsts: list[int] = []
        before: list[int] = []
        lasts: list[int] = []
        for i in range(n_copies):
            first, last = self._places(node.item)
            firsts = firsts or first
            self._link(before, first)
            before = last
            if i + 1 >= node.low:
                lasts += last
        if node.high is None:
            self._link(before, first)
        return firsts, lasts

    def _link(self, places: list[int], following: list[int]) -> None:
        self._n_links += len(places) * len(following)
        if self._n_links > MAX_WORK:
            raise _TooLargeError
        for place in places:
            self._next[place] += following

    def states(self) -> Iterator[tuple[set[Pattern], dict[Pattern, int]]]:
        """For every state but the first: the lexemes that are complete there, and those that may go on, with the bytes
        that they may go on with.

        Raises:
            _TooLargeError: there are too many states.
        """
        n_looked = 0
        seen: set[frozenset[int]] = set()
        waiting = [(frozenset[int](), set(self._start))]
        while waiting:
            state, following = waiting.pop()
            by_class: dict[int, list[int]] = {}
            for place in following:
                by_class.setdefault(self._atoms[place], []).append(place)
            if state:
                complete = {self._owner[place] for place in state if self._is_last[place]}
                continued: dict[Pattern, int] = {}
                for place in following if complete else ():
                    owner = self._owner[place]
                    continued[owner] = continued.get(owner, 0) | self._lead[place]
                yield complete, continued
            n_looked += len(by_class) ** 2
            if n_looked > MAX_WORK:
                raise _TooLargeError
            for atoms in _cells(list(by_class)):
                reached = frozenset(place for mask, places in by_class.items() if mask & atoms for place in places)
                n_looked += len(reached) + len(by_class)
                if reached in seen:
                    continue
                seen.add(reached)
                if len(seen) > MAX_STATES or n_looked > MAX_WORK:
                    raise _TooLargeError
                waiting.append((reached, {place for before in reached for place in self._next[before]}))


def _cells(masks: list[int]) -> list[int]:
    """The union of sets of bits split into pieces that each set contains whole or not at all."""
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
    """Classes of characters as sets of bits: one for each piece between two edges of any class."""
    edges = sorted({edge for each in set(classes) for low, high in each.ranges for edge in (low, high + 1)})
    number = {edge: i for i, edge in enumerate(edges)}
    made: dict[Chars, int] = {}
    for each in classes:
        if each not in made:
            made[each] = sum((1 << number[high + 1]) - (1 << number[low]) for low, high in each.ranges)
    return [made[each] for each in classes]
