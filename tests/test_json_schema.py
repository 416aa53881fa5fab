"""Preparation of schemas for llguidance: ignored keywords, refused keywords and their paths, white space."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import tiny
from constrained import said
from fabula import Constraint, InvalidArgument, Model
from fabula.engine.grammar import Guide, vocabulary_of
from fabula.engine.json_schema import MAX_JSON_DEPTH, WHITESPACE, prepare_schema


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


STRING: dict[str, Any] = {"type": "string"}
DATA = {"pattern": "(?=a)", "multipleOf": 999_983, "not": 5}
AHEAD = {"type": "string", "pattern": "^(?=a)[a-z]+$"}


def lenient(schema: Any) -> dict[str, Any]:
    made = prepare_schema(schema, strict=False, where="tools[1].function.parameters")
    assert made.pop("x-guidance") == {"lenient": True, "whitespace_pattern": WHITESPACE}
    return made


def refusal(schema: Any, *, strict: bool = True) -> str:
    with pytest.raises(InvalidArgument) as caught:
        prepare_schema(schema, strict=strict, where="T")
    return str(caught.value)


# ---- Keywords that cannot be enforced -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    ["^(?=a).*$", "(?!a)", "(?<=a)b", "(?<!a)b", r"(a)\1", r"(?P<n>a)(?P=n)", "(?>a)", r"\bfoo\b", "a^b", "(a", "*",
     r"\cA", "(" * 300 + "a" + ")" * 300, "[]", "(?#comment)a", "(?(1)a|b)"],
)  # fmt: skip
def test_a_pattern_is_passed_over_or_named(pattern: str, model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"price": {"type": "string", "pattern": pattern, "maxLength": 3}, "n": {"enum": [1]}},
        "required": ["price", "n"],
        "additionalProperties": False,
    }
    assert lenient(schema)["properties"]["price"] == {"type": "string", "maxLength": 3}
    assert refusal(schema).startswith("T.properties.price.pattern: ")
    with pytest.raises(InvalidArgument, match=r"^json_schema\.properties\.price\.pattern: "):
        Guide(model.tokenizer, tiny.VOCAB, Constraint.json_schema(schema))
    text, generation = said(model, Constraint.json_schema({**schema, "x-guidance": {"lenient": True}}))
    assert generation.finish_reason == "stop"
    assert len(json.loads(text)["price"]) <= 3


@pytest.mark.parametrize(
    ("schema", "left", "place"),
    [
        ({"items": AHEAD}, {"items": STRING}, ".items.pattern"),
        ({"anyOf": [STRING, AHEAD]}, {"anyOf": [STRING, STRING]}, ".anyOf[1].pattern"),
        ({"prefixItems": [{"items": AHEAD}]}, {"prefixItems": [{"items": STRING}]}, ".prefixItems[0].items.pattern"),
        ({"additionalProperties": AHEAD}, {"additionalProperties": STRING}, ".additionalProperties.pattern"),
        ({"properties": {"a b": AHEAD}}, {"properties": {"a b": STRING}}, '.properties["a b"].pattern'),
        (
            {"$ref": "#/$defs/x", "$defs": {"x": AHEAD}},
            {"$ref": "#/$defs/x", "$defs": {"x": STRING}},
            ".$defs.x.pattern",
        ),
        (
            {"$ref": "#/components/schemas/x", "components": {"schemas": {"x": AHEAD}}},
            {"$ref": "#/components/schemas/x", "components": {"schemas": {"x": STRING}}},
            ".components.schemas.x.pattern",
        ),
        ({"$ref": "#/default", "default": AHEAD}, {"$ref": "#/default", "default": STRING}, ".default.pattern"),
        (
            {"type": "object", "patternProperties": {"^(?=a)": STRING, "^b": STRING}, "additionalProperties": False},
            {"type": "object", "patternProperties": {"^b": STRING}, "additionalProperties": True},
            '.patternProperties["^(?=a)"]',
        ),
        (
            {"type": "object", "patternProperties": {"^a": STRING, "b$": {"type": "null"}}},
            {"type": "object", "patternProperties": {"^a": STRING}, "additionalProperties": True},
            ".patternProperties.b$",
        ),
        ({"type": "integer", "multipleOf": 999_983}, {"type": "integer"}, ".multipleOf"),
        ({"type": "integer", "minimum": -(2**63)}, {"type": "integer"}, ".minimum"),
        ({"type": "string", "maxLength": 2**40}, STRING, ".maxLength"),
        ({"$schema": "https://example.org/mine", "type": "string"}, STRING, ".$schema"),
        ({"type": "string", "minLength": 2.0}, {"type": "string", "minLength": 2}, None),
    ],
)
def test_what_is_passed_over(schema: Any, left: Any, place: str | None, model: Model) -> None:
    kept = json.dumps(schema)
    assert lenient(schema) == left
    assert json.dumps(schema) == kept
    assert place is None or refusal(schema).startswith(f"T{place}: ")
    made = prepare_schema(schema, strict=False, where="T")
    assert prepare_schema(made, strict=True, where="T") == made  # its own options say lenient
    Guide(model.tokenizer, tiny.VOCAB, Constraint.json_schema(made))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"not": STRING}}}, ".properties.a.not"),
        ({"if": {}, "then": {}, "else": {}}, ".else"),
        ({"items": {"type": "array", "uniqueItems": True}}, ".items.uniqueItems"),
        ({"properties": {"a": STRING, "b": STRING}, "minProperties": 1, "maxProperties": 1}, ""),
        ({"type": "string", "format": "color"}, ".format"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, ".dependentRequired"),
    ],
)
def test_what_the_library_passes_over_by_itself(schema: Any, place: str) -> None:
    assert lenient(schema) == schema
    assert refusal({"type": "object", **schema} if "properties" in schema else schema).startswith(f"T{place}")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "T.type: "),
        ({"properties": {"a": {"type": 5}}}, "T.properties.a.type: "),
        ({"items": {"minimum": "3"}}, 'T.items.minimum: must be a number, got "3"'),
        ({"minLength": -1}, "T.minLength: must be a positive integer, got -1"),
        ({"multipleOf": 0}, "T.multipleOf: must be more than 0"),
        ({"pattern": 5}, "T.pattern: must be a string, got 5"),
        (5, "T: a schema is an object, or true"),
        ({"x-guidance": 5}, "T.x-guidance: it must be an object"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_schema_is_named(schema: Any, message: str, strict: bool) -> None:
    assert refusal(schema, strict=strict).startswith(message)


@pytest.mark.parametrize(
    "schema",
    [
        *({key: DATA} for key in ("const", "default", "title", "x-mine")),
        {"enum": [DATA]},
        {"examples": [DATA]},
        {"properties": {"pattern": STRING, "not": STRING}},
        {"discriminator": {"pattern": "(?=a)"}},
    ],
)
def test_data_is_no_schema(schema: Any) -> None:
    assert lenient(schema) == schema
    made = prepare_schema(schema, strict=True, where="T")
    assert made == {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def test_true_and_depth() -> None:
    assert lenient(True) == {}
    deep: Any = {}
    for _ in range(MAX_JSON_DEPTH + 1):
        deep = {"items": deep}
    assert "nested more than" in refusal(deep, strict=False)


# ---- Many -----------------------------------------------------------------------------------------------------------


def test_many_schemas_together(model: Model) -> None:
    """128 of 100 KB are compiled once, and kept."""
    rules, n_bytes = [], 0
    for i in range(128):
        properties = {
            f"field_{i}_{j}": {
                "type": "string",
                "description": "what it is good for " * 4,
                "pattern": f"^(?!x)a{{{j}}}$",
            }
            for j in range(6)
        }
        schema = prepare_schema({"type": "object", "properties": properties}, strict=False, where=f"tools[{i}]")
        n_bytes += len(json.dumps(properties))
        rules.append(f'a{i}: "{i}:" %json {json.dumps(schema)}')
    assert n_bytes > 100_000
    start = "start: " + " | ".join(f"a{i}" for i in range(128))
    constraint = Constraint("tools", "\n".join([start, *rules]))
    guide = Guide(model.tokenizer, tiny.VOCAB, constraint)
    for character in '127:{"field_127_5"':
        guide.advance(model.tokenizer.encode(character, add_bos=False)[-1])
    assert guide.allowed.any()
    vocabulary = vocabulary_of(model.tokenizer)
    assert vocabulary.grammar(constraint) is vocabulary.grammar(constraint)


# ---- White space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "longest"),
    [
        ({}, 32),
        ({"whitespace_flexible": True}, 32),
        ({"whitespace_pattern": None}, 32),
        ({"whitespace_pattern": r"[ \n]*"}, 32),
        ({"whitespace_pattern": r"\s+"}, 32),
        ({"whitespace_pattern": r"( |\n){2,}"}, 32),
        ({"whitespace_pattern": r"[ \n]{0,3}"}, 3),
        ({"whitespace_flexible": False}, 0),
        ({"whitespace_flexible": False, "item_separator": r" *,[ \n]*", "key_separator": r":\s*"}, 32),
        ({"lenient": True}, 32),
    ],
)
def test_white_space_is_bounded(options: dict[str, Any], longest: int, model: Model) -> None:
    blank = {model.tokenizer.encode(character, add_bos=False)[-1]: 60.0 for character in (" ", "\n")}
    schema = {"const": {"a": [1, 2], "b": None}, "x-guidance": options}
    text, generation = said(model, Constraint.json_schema(schema), logit_bias=blank)
    assert generation.finish_reason == "stop"
    assert json.loads(text) == {"a": [1, 2], "b": None}
    assert max(map(len, re.findall(r"[ \n]*", text))) <= longest
    assert longest == 0 or re.search(r"[ \n]{2}", text)


def test_any_object_has_bounded_white_space(model: Model) -> None:
    bias = {model.tokenizer.encode(character, add_bos=False)[-1]: 60.0 for character in (" ", "\n")}
    bias |= {model.tokenizer.encode("}", add_bos=False)[-1]: 50.0}
    text, generation = said(model, Constraint.json_object(), logit_bias=bias)
    assert (json.loads(text), generation.finish_reason) == ({}, "stop")
    assert len(text) <= 34


@pytest.mark.parametrize("key", ["whitespace_pattern", "item_separator", "key_separator"])
def test_white_space_that_cannot_be_bounded(key: str) -> None:
    for pattern, message in (
        ("( *\n)*", "more than 128 characters"),
        (" {0,900}", "more than 128"),
        ("(a", "unclosed"),
    ):
        assert refusal({"x-guidance": {key: pattern}}).startswith(f"T.x-guidance.{key}: ")
        assert message in refusal({"x-guidance": {key: pattern}})


# ---- Messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.regex(r"\bfoo/"), "regex: look-around"),
        (Constraint.regex("a^b"), "regex: look-around"),
        (Constraint.regex("(a"), "regex: unclosed group"),
        (Constraint.lark('start: a\n\na: "b" foo'), 'lark: line 3, column 4: unknown name: "foo"'),
        (Constraint.lark('start: "a" ('), "lark: at the end: Expected token ')'"),
        (Constraint.lark("start: /(?=a)/"), "lark: line 1, column 8: look-around"),
        (Constraint.json_schema({"oneOf": [STRING, STRING]}), "json_schema: oneOf can be enforced only where"),
        (
            Constraint.json_schema({"$ref": "http://x.y/z"}),
            "json_schema: a reference must point into the schema itself",
        ),
    ],
)
def test_messages_speak_of_the_user_s_text(constraint: Constraint, message: str, model: Model) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Guide(model.tokenizer, tiny.VOCAB, constraint)
    assert str(caught.value).startswith(message)
    assert not re.search(r"\d+\(\d+\)|llguidance|no_forcing", str(caught.value))
