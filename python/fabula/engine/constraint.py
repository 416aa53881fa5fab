"""What an answer must look like, as a setting: a JSON schema, a regular expression or a grammar, and its text in the
dialect of the `llguidance` library. Compiling it, and following an answer through it, is in `engine/grammar.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from fabula.errors import InvalidArgument

KINDS = ("json_schema", "json_object", "regex", "lark", "gbnf")
MAX_SOURCE_BYTES = 1 << 16
MAX_JSON_DEPTH = 64
MULTIPLE_DIGITS = 5  # of multipleOf: an automaton of as many states, 0.5 s for 99,991 and 7 s for 999,983
MAX_RULES = 1000  # of GBNF, whose converter takes the square of their number: 0.1 s
MAX_MESSAGE = 300  # characters of another library's message that are passed on

# Blanks between the parts of JSON: a weak model would otherwise write them without end.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like, whole: from its first character to its end.

    Made by `json_schema`, `json_object`, `regex`, `lark` or `gbnf`, and given as `SamplingParams.constraint`. Whether
    the grammar can be compiled is found out when an answer begins.

    Attributes:
        kind: one of `KINDS`.
        source: the grammar's text; "" for `json_object`.

    Raises:
        InvalidArgument: no such kind, or a source that is too long or, for a schema, no JSON object or too deep.
    """

    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"constraint kind is {self.kind!r:.40}, must be one of {', '.join(KINDS)}")
        if not isinstance(self.source, str):
            raise InvalidArgument(f"constraint source is a {type(self.source).__name__}, must be text")
        try:
            n_bytes = len(self.source.encode())
        except UnicodeEncodeError:
            raise InvalidArgument(f"{self.kind}: the source holds a lone surrogate") from None
        if n_bytes > MAX_SOURCE_BYTES:
            raise InvalidArgument(f"{self.kind}: the source has {n_bytes} bytes, at most {MAX_SOURCE_BYTES} are read")
        if self.kind == "json_schema":
            _parse_schema(self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | Literal[True] | str) -> Constraint:
        """JSON that satisfies a schema (draft 2020-12 but for what the library refuses, such as `not`).

        Properties come in the order of the schema. Between its parts the JSON may hold up to 32 blanks.

        Args:
            schema: as a mapping, or as JSON text.

        Raises:
            InvalidArgument: no schema, or too large.
        """
        if isinstance(schema, str):
            if len(schema) > MAX_SOURCE_BYTES:  # before it is parsed
                return cls("json_schema", schema)
            schema = _parse_schema(schema)
        _check_schema(schema)
        try:
            source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"json_schema: this is no JSON: {error}") from None
        return cls("json_schema", source)

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that a regular expression matches as a whole; the syntax is that of Rust's regex crate."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """Text of a context-free grammar in the library's dialect of Lark; it begins with the rule `start`."""
        return cls("lark", grammar)

    @classmethod
    def gbnf(cls, grammar: str) -> Constraint:
        """Text of a context-free grammar in GBNF, as llama.cpp reads it; it begins with the rule `root`."""
        return cls("gbnf", grammar)

    def to_lark(self) -> str:
        """The grammar as the library takes it.

        Raises:
            InvalidArgument: it cannot be said in Lark; says why.
        """
        if self.kind in ("json_schema", "json_object"):
            schema = _parse_schema(self.source) if self.source else {"type": "object"}
            return f"start: %json {json.dumps(_with_whitespace(schema), ensure_ascii=False)}"
        if self.kind == "regex":
            from llguidance import regex_to_lark

            return f"start: /{regex_to_lark(self.source)}/" if self.source else 'start: ""'
        return _gbnf_to_lark(self.source) if self.kind == "gbnf" else self.source


# ---- Sources --------------------------------------------------------------------------------------------------------


def _parse_schema(source: str) -> Any:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"json_schema: this is no JSON: {str(error)[:MAX_MESSAGE]}") from None
    _check_schema(schema)
    return schema


def _check_schema(schema: object) -> None:
    """Raises InvalidArgument for what is no schema, nested too deep, or known to take too long to compile."""
    if not isinstance(schema, Mapping) and schema is not True:
        raise InvalidArgument("json_schema: a schema is an object, or true")
    level: list[Any] = [schema]
    for _ in range(MAX_JSON_DEPTH + 1):
        items: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                _check_multiple(value.get("multipleOf"))
                items += value.values()
            elif isinstance(value, list | tuple):
                items += value
        if not items:
            return
        level = items
    raise InvalidArgument(f"json_schema: it is nested more than {MAX_JSON_DEPTH} deep")


def _check_multiple(value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        _, digits, exponent = Decimal(str(value)).as_tuple()
        size = len(digits) + max(0, int(exponent)) if isinstance(exponent, int) else math.inf
        if size > MULTIPLE_DIGITS:
            raise InvalidArgument(f"json_schema: multipleOf is {value!r:.40}, at most {MULTIPLE_DIGITS} digits fit")


def _with_whitespace(schema: Any) -> Any:
    """The schema with our rule for blanks, unless it has its own."""
    schema = {} if schema is True else schema
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict) or options.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        return schema
    return schema | {"x-guidance": options | {"whitespace_pattern": WHITESPACE}}


_GBNF_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def _gbnf_to_lark(source: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if source.count("::=") > MAX_RULES:
        raise InvalidArgument(f"gbnf: the grammar has {source.count('::=')} rules, at most {MAX_RULES} are read")
    try:
        return gbnf_to_lark(_GBNF_ESCAPE.sub(_unescaped, source))
    except RecursionError:
        raise InvalidArgument("gbnf: the grammar is nested too deep") from None
    except Exception as error:  # the converter raises plain Exceptions
        raise InvalidArgument(f"gbnf: {str(error)[:MAX_MESSAGE]}") from None


def _unescaped(match: re.Match[str]) -> str:
    """A code point beyond ASCII as itself: the converter writes escapes of those in a way that Lark does not read."""
    digits = match[1] or match[2] or match[3]
    code = int(digits, 16) if digits else 0
    if 0x80 <= code < 0x110000 and not 0xD800 <= code < 0xE000:
        return chr(code)
    return f"\\x{code:02x}" if digits and code < 0x80 else match[0]
