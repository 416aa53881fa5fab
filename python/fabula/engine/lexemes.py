"""Translates a grammar over characters to one over lexemes, which llguidance parses fast, with the same texts.

llguidance has two stages: a lexer takes the longest piece that one of the allowed lexemes matches, then an Earley
parser advances by all lexemes that match this piece. Single characters as lexemes are always right, but then every byte
of every token of the vocabulary is a parser step: 7 ms for a mask of 49,000 tokens, where a lexeme of many characters
takes 10 us. So a regular part of the grammar (no rule in it refers back to itself) becomes one lexeme where that
changes nothing:

    Let w be a text of lexeme A, and c the first byte of anything that may follow A in the grammar. Assume that no
    lexeme B has a text that starts with wc. Then in any text of the grammar the lexer ends every lexeme where the
    grammar does: it continues through w, a prefix of A; at c no lexeme matches any more; the last match ended with w,
    and A is among the lexemes that match there. What the lexer finds is always a text of the grammar, so both accept
    the same texts; and the same prefixes of texts, since a partial lexeme is a prefix of one that the parser allows.

A deterministic automaton of all lexemes (`lexeme_automaton.py`) decides whether the assumption holds; it looks at
first bytes, not characters, because characters may share their first byte. If the assumption fails, B is split and all
lexemes are checked again. A B that fails has two characters or more, so this ends, at worst with single characters. A
grammar without recursion is one lexeme, which nothing follows. If the automaton has too many states, the largest
lexemes are split as well, since llguidance would have to build it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from fabula.engine.gbnf import parse_gbnf
from fabula.engine.grammar_nodes import Alt, Node, Ref, Repeat, Seq, Token, alternatives, repeated
from fabula.engine.lexeme_automaton import Automaton, TooLargeError
from fabula.engine.lexeme_patterns import Pattern, Patterns, times
from fabula.lean_dataclasses import dataclass

MAX_ROUNDS = 12  # rounds of checking and splitting; after that all lexemes are single characters


def gbnf_to_lark(source: str, token_id: Callable[[str], int | None]) -> str:
    """Translates a grammar to llguidance's dialect of Lark; both have the same texts.

    Args:
        source: GBNF.
        token_id: as `parse_gbnf` takes it.

    Raises:
        InvalidArgument: as `parse_gbnf`.
    """
    return _Plan(parse_gbnf(source, token_id)).lark()


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Parts that the parser combines."""

    kind: Literal["sequence", "alternatives", "repeat"]
    parts: tuple[Part, ...]
    low: int = 1
    high: int | None = 1


Part = Pattern | Token | Ref | Group


class _Plan:
    """Decides which parts of a grammar are lexemes."""

    def __init__(self, rules: dict[str, Node]) -> None:
        self._nodes = rules
        self._patterns = Patterns(rules)
        self._split: set[Pattern] = set()
        self._all_split = False
        self._gathered: dict[int, Node | None] = {}  # by the identity of a repetition
        self._rules = self._planned()
        for _ in range(MAX_ROUNDS):
            culprits = self._culprits()
            if not culprits:
                return
            self._split |= culprits
            self._rules = self._planned()
        self._all_split = True
        self._rules = self._planned()

    def _planned(self) -> dict[str, Part]:
        """The rules that are not part of a lexeme, `root` first."""
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
        if pattern is not None and (pattern.is_single or not (self._all_split or pattern in self._split)):
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
        """A repetition of regular and other options, rewritten so that a run of regular ones can be one lexeme. With R
        for (A | B)+, (A | B | X)* has the texts of (R? X)* R?, and (A | B | X)+ those of R | (R? X)+ R?."""
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

    # ---- Checking the assumption ------------------------------------------------------------------------------------

    def _culprits(self) -> set[Pattern]:
        """Lexemes that may continue where another one ends."""
        lexemes = self._lexemes()
        long = [pattern for pattern in lexemes if not pattern.is_single]
        if not long:
            return set()
        following = self._following()
        found: set[Pattern] = set()
        try:
            for complete, continued in Automaton(lexemes).states():
                after = 0
                for pattern in complete:
                    after |= following[pattern]
                found |= {pattern for pattern, first in continued.items() if first & after}
        except TooLargeError:
            largest = max(pattern.n_characters for pattern in long)
            return {pattern for pattern in long if 2 * pattern.n_characters > largest}
        return found

    def _following(self) -> dict[Pattern, int]:
        """For each lexeme, a bit set of the bytes that may follow it."""
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
    """A bit set of the bytes that a part may start with, none for a token, and whether it may be empty."""
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
    """Propagates the bytes that may follow a part to its rules and lexemes."""
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


def _lark(part: Part, names: dict[str | Pattern, str]) -> str:
    if isinstance(part, Pattern):
        return f"{names[part]}{'?' * part.is_nullable}" if part.n_characters else '""'
    if isinstance(part, Token):
        return f"<[{'^' * part.negated}{part.token_id}]>"
    if isinstance(part, Ref):
        return names[part.name]
    inner = [_lark(each, names) for each in part.parts]
    if part.kind == "repeat":
        return f"({inner[0]}){times(part.low, part.high)}"
    return " ".join(inner) if part.kind == "sequence" else f"({' | '.join(inner)})"


def _terminal(pattern: Pattern) -> str:
    """The definition of a lexeme, which must not be empty; rules mark it as optional."""
    return f"/{pattern.regex}/" + r" & /(?s:.+)/" * pattern.is_nullable
