"""Constraints on an answer, as a setting: a JSON schema, a regular expression or a grammar, translated to the dialect
of the `llguidance` library. `engine/grammar.py` compiles them and computes the token masks.

The parsers are imported when a constraint needs them: most answers have none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fabula.errors import InvalidArgument
from fabula.lean_dataclasses import dataclass

KINDS = ("json_schema", "json_object", "regex", "lark", "gbnf", "tools")
MAX_SOURCE_BYTES = 1 << 16
MAX_TOOLS_BYTES = 1 << 20  # of a grammar generated from tool definitions


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on the whole answer, from its first character to its last.

    Made by `json_schema`, `json_object`, `regex`, `lark` or `gbnf`, and given as `SamplingParams.constraint`. Whether
    the grammar compiles is checked when a generation starts.

    Attributes:
        kind: one of `KINDS`.
        source: the grammar's text; "" for `json_object`.
        shown: ids of control tokens that are part of the answer's text, since they mark a tool call; others have no
            text.

    Raises:
        InvalidArgument: an unknown kind, or a source that is too long; for a schema: not a JSON object, or too deep.
    """

    kind: str
    source: str = ""
    shown: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"constraint kind is {self.kind!r:.40}, must be one of {', '.join(KINDS)}")
        if not isinstance(self.source, str):
            raise InvalidArgument(f"constraint source is a {type(self.source).__name__}, must be text")
        try:
            n_bytes = len(self.source.encode())
        except UnicodeEncodeError:
            raise InvalidArgument(f"{self.kind}: the source holds a lone surrogate") from None
        most = MAX_TOOLS_BYTES if self.kind == "tools" else MAX_SOURCE_BYTES
        if n_bytes > most:
            raise InvalidArgument(f"{self.kind}: the source has {n_bytes} bytes, at most {most} are allowed")
        object.__setattr__(self, "shown", tuple(self.shown))  # stores have a list
        if self.kind == "json_schema":
            _parse_schema(self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | Literal[True] | str) -> Constraint:
        """JSON that satisfies a schema (draft 2020-12).

        Properties come in the order of the schema. Between its parts the JSON may hold up to 32 blanks. A keyword that
        cannot be enforced, such as `not`, is an error when an answer starts; it is ignored with `"x-guidance":
        {"lenient": true}` at the top of the schema.

        Args:
            schema: as a mapping, or as JSON text.

        Raises:
            InvalidArgument: it is not a schema, or too large.
        """
        if isinstance(schema, str):
            if len(schema) > MAX_SOURCE_BYTES:  # before it is parsed
                return cls("json_schema", schema)
            schema = _parse_schema(schema)
        _check_schema(schema)
        try:
            source = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"json_schema: this is not JSON: {error}") from None
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
        """Text of a context-free grammar in the library's dialect of Lark; the first rule is `start`."""
        return cls("lark", grammar)

    @classmethod
    def gbnf(cls, grammar: str) -> Constraint:
        """Text of a context-free grammar in llama.cpp's GBNF; the first rule is `root`."""
        return cls("gbnf", grammar)

    def to_lark(self, token_id: Callable[[str], int | None] = lambda _: None) -> str:
        """Translates the grammar for llguidance.

        Args:
            token_id: of the vocabulary; as `parse_gbnf` takes it.

        Raises:
            InvalidArgument: it cannot be translated to Lark; says why.
        """
        if self.kind in ("json_schema", "json_object"):
            schema = _parse_schema(self.source) if self.source else {"type": "object"}
            from fabula.engine.json_schema import prepare_schema

            prepared = prepare_schema(schema, strict=True, where=self.kind)
            return f"start: %json {json.dumps(prepared, ensure_ascii=False)}"
        if self.kind == "regex":
            from llguidance import regex_to_lark

            return f"start: /{regex_to_lark(self.source)}/" if self.source else 'start: ""'
        if self.kind != "gbnf":
            return self.source
        from fabula.engine.lexemes import gbnf_to_lark

        return gbnf_to_lark(self.source, token_id)


# ---- Sources --------------------------------------------------------------------------------------------------------


def _parse_schema(source: str) -> Any:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"json_schema: this is not JSON: {str(error)[:300]}") from None
    _check_schema(schema)
    return schema


def _check_schema(schema: Any) -> None:
    from fabula.engine.json_schema import check_limits, is_lenient

    check_limits(schema, "json_schema", strict=not is_lenient(schema))
