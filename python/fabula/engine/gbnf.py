"""Parser of GBNF, the grammars of llama.cpp.

The notation is that of llama.cpp's `grammars/README.md` and `src/llama-grammar.cpp`: a context-free grammar over
characters. Nothing is greedy: an ambiguous text is parsed in every way. Accepted here although llama.cpp refuses it:
left recursion, `_` in names, more than 2,000 repetitions.

    root  ::= "1. " move (" " move)? "\\n"     a rule; the answer is a text of `root`
    move  ::= [NBKQR]? [a-h] [1-8]            character classes; [^...] is any other character, . is any
    moves ::= move{2,5} | ( move "," )*       * + ? {n} {n,} {n,m}; groups; alternatives; # starts a comment
    deep  ::= <think> !</think>* <[1001]>     tokens of the vocabulary, and any but one

A newline ends a rule, except within parentheses and after ::= or |. Of two rules with the same name the later one
counts. `engine/lexemes.py` translates the grammar for llguidance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from fabula.engine.grammar_nodes import (
    ANY,
    LAST,
    NOTHING,
    Chars,
    Node,
    Ref,
    Token,
    alternatives,
    chars,
    completed,
    repeated,
    sequence,
)
from fabula.errors import InvalidArgument

MAX_RULES = 3000  # chains of rules are compiled recursively; the stack suffices for twice as many
MAX_NESTED = 64  # groups within each other
MAX_STACKED = 8  # repetitions of repetitions without a group, such as "a"+*
MAX_REPEATED = 100_000  # the largest number in braces

_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}


def parse_gbnf(source: str, token_id: Callable[[str], int | None]) -> dict[str, Node]:
    """Parses a grammar and drops the rules that no text uses.

    Args:
        source: GBNF.
        token_id: returns the id of a token that is written as `<think>`, or None if there is no such token. Takes
            an id in decimal too.

    Returns:
        Rules by name, `root` first; each can be reached from `root` and completed.

    Raises:
        InvalidArgument: it is not GBNF, refers to an unknown rule or token (names line and column), or no text
            satisfies it.
    """
    reader = _Reader(source, token_id)
    rules = reader.rules()
    reader.check_names(rules)
    return completed(rules)


class _Reader:
    """A parser's position in a source."""

    def __init__(self, source: str, token_id: Callable[[str], int | None]) -> None:
        self._source = source
        self._token_id = token_id
        self._at = 0
        self._nested = 0
        self._named: dict[str, int] = {}  # where a rule is first referred to

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        n_rules = 0
        self._skip(newlines=True)
        while self._at < len(self._source):
            n_rules += 1
            if n_rules > MAX_RULES:
                self._fail(f"there are more than {MAX_RULES} rules")
            name = self._name("expected the name of a rule")
            self._skip()
            if not self._take("::="):
                self._fail(f"expected ::= after the name {name!r:.80}")
            self._skip(newlines=True)
            body = self._alternatives()
            rules.pop(name, None)
            rules[name] = body
            if self._peek() not in ("", "\r", "\n"):
                self._fail(f"unexpected {self._peek()!r}")
            self._skip(newlines=True)
        return rules

    def check_names(self, rules: dict[str, Node]) -> None:
        if "root" not in rules:
            raise InvalidArgument("gbnf: there is no rule root; every grammar needs one")
        for name, place in self._named.items():
            if name not in rules:
                self._fail(f"there is no rule {name!r:.80}", place)

    # ---- Parts ------------------------------------------------------------------------------------------------------

    def _alternatives(self) -> Node:
        options = [self._sequence()]
        while self._take("|"):
            self._skip(newlines=True)
            options.append(self._sequence())
        return alternatives(options)

    def _sequence(self) -> Node:
        items: list[Node] = []
        n_stacked = 0
        while True:
            place, char = self._at, self._peek()
            n_stacked = n_stacked + 1 if char and char in "*+?{" else 0
            if n_stacked > MAX_STACKED:
                self._fail(f"repetitions are nested more than {MAX_STACKED} deep")
            if char == '"':
                items.append(self._literal())
            elif char == "[":
                items.append(self._class())
            elif char == ".":
                self._at += 1
                items.append(ANY)
            elif char == "(":
                items.append(self._group())
            elif char and char in "<!":
                items.append(self._token())
            elif _is_word(char):
                name = self._name("")
                self._named.setdefault(name, place)
                items.append(Ref(name))
            elif char and char in "*+?{":
                if not items:
                    self._fail(f"there is nothing before {char} to repeat")
                items[-1] = repeated(items[-1], *self._times())
            else:
                return sequence(items)
            self._skip(newlines=self._nested > 0)

    def _literal(self) -> Node:
        start = self._at
        self._at += 1
        items: list[Node] = []
        while not self._take('"'):
            if not self._peek():
                self._fail('unexpected end of input: the text in quotes has no closing "', start)
            place, code = self._at, self._char()
            if 0xD800 <= code < 0xE000:
                self._fail(
                    "a surrogate is no character; write the character itself, or \\U and its eight digits", place
                )
            items.append(Chars(((code, code),)))
        return sequence(items)

    def _class(self) -> Node:
        start = self._at
        self._at += 1
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            if not self._peek():
                self._fail("unexpected end of input: the class has no closing ]", start)
            place = self._at
            low = high = self._char()
            if self._peek() == "-" and self._peek(1) not in ("]", ""):
                self._at += 1
                high = self._char()
            if high < low:
                self._fail("the range goes backwards", place)
            ranges.append((low, high))
        if not ranges:
            self._fail("a class needs a character; any at all is written .", start)
        made = chars(ranges, negated)
        return made if made.ranges else NOTHING

    def _group(self) -> Node:
        start = self._at
        self._at += 1
        self._nested += 1
        if self._nested > MAX_NESTED:
            self._fail(f"groups are nested more than {MAX_NESTED} deep")
        self._skip(newlines=True)
        inner = self._alternatives()
        if not self._take(")"):
            if not self._peek():
                self._fail("unexpected end of input: the group has no closing )", start)
            self._fail(f"unexpected {self._peek()!r} in a group")
        self._nested -= 1
        return inner

    def _token(self) -> Node:
        start = self._at
        negated = self._take("!")
        if self._peek() != "<":
            self._fail("expected a token after !, such as !<think> or !<[1000]>", start)
        end = self._source.find(">", self._at)
        if end < 0 or "\n" in self._source[self._at : end]:
            self._fail("unexpected end of input: the token has no closing >", start)
        text = self._source[self._at : end + 1]
        self._at = end + 1
        if text.startswith("<["):
            digits = text[2:-2]
            if text[-2] != "]" or not _is_number(digits):
                self._fail(f"expected the id of a token, such as <[1000]>, not {text!r:.80}", start)
            text = digits
        found = self._token_id(text)
        if found is None:
            self._fail(f"the vocabulary has no token {text!r:.80}", start)
        return Token(found, negated)

    def _times(self) -> tuple[int, int | None]:
        """The minimum and maximum of a quantifier."""
        sign, start = self._peek(), self._at
        self._at += 1
        if sign != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        low = self._number()
        high: int | None = low
        if self._take(","):
            self._skip(newlines=self._nested > 0)
            high = None if self._peek() == "}" else self._number()
        if not self._take("}"):
            self._fail("expected {n}, {n,} or {n,m}", start)
        if high is not None and high < low:
            self._fail(f"{low} is more than {high}", start)
        if max(low, high or 0) > MAX_REPEATED:
            self._fail(f"at most {MAX_REPEATED} repetitions are allowed", start)
        return low, high

    def _number(self) -> int:
        self._skip(newlines=self._nested > 0)
        start = self._at
        while _is_number(self._peek()):
            self._at += 1
        digits = self._source[start : self._at]
        if not digits:
            self._fail("expected a number")
        self._skip(newlines=self._nested > 0)
        return int(digits) if len(digits) < 10 else MAX_REPEATED + 1

    # ---- Characters -------------------------------------------------------------------------------------------------

    def _char(self) -> int:
        """A character of a text or a class, which may be escaped."""
        start, char = self._at, self._peek()
        self._at += 1
        if char != "\\":
            return ord(char)
        sign = self._peek()
        self._at += 1
        if sign and sign in "xuU":
            n_digits = {"x": 2, "u": 4, "U": 8}[sign]
            digits = self._source[self._at : self._at + n_digits]
            if len(digits) < n_digits or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                self._fail(f"the escape \\{sign} needs {n_digits} hexadecimal digits", start)
            if int(digits, 16) > LAST:
                self._fail(f"the escape \\U{digits} is beyond the last character, \\U0010FFFF", start)
            self._at += n_digits
            return int(digits, 16)
        if sign not in _ESCAPES:
            self._fail(f"unknown escape \\{sign}; a backslash itself is written \\\\", start)
        return ord(_ESCAPES[sign])

    def _name(self, message: str) -> str:
        start = self._at
        while _is_word(self._peek()):
            self._at += 1
        if self._at == start:
            self._fail(f"{message}, not {self._peek()!r}")
        return self._source[start : self._at]

    def _peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._source[at] if at < len(self._source) else ""

    def _take(self, text: str) -> bool:
        found = self._source.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _skip(self, newlines: bool = False) -> None:
        """Passes over blanks and comments."""
        while (char := self._peek()) and (char in " \t#" or (newlines and char in "\r\n")):
            self._at += 1
            if char == "#":
                while self._peek() not in ("", "\r", "\n"):
                    self._at += 1

    def _fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self._at if at is None else at
        before = self._source[:at].replace("\r\n", "\n").replace("\r", "\n")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise InvalidArgument(f"gbnf: line {line}, column {column}: {message}")


def _is_word(char: str) -> bool:
    return char.isascii() and (char.isalnum() or (char != "" and char in "-_"))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()
