"""Answers under a constraint."""

from __future__ import annotations

from typing import Any

from fabula import Constraint, Model, SamplingParams
from fabula.engine.generation import Generation

PROMPT = "the winter was long"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["kind", "tall", "old"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def params(constraint: Constraint, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"seed": 11, "max_tokens": 500, "constraint": constraint} | changes))


def said(model: Model, constraint: Constraint, **changes: Any) -> tuple[str, Generation]:
    generation = model.generate(PROMPT, params(constraint, **changes))
    return generation.text(), generation


def satisfies(schema: Any, value: Any) -> bool:
    """JSON Schema's meaning of the keywords used here."""
    if schema is True or schema == {}:
        return True
    if "enum" in schema:
        return any(value == item and type(value) is type(item) for item in schema["enum"])
    if "anyOf" in schema:
        return any(satisfies(item, value) for item in schema["anyOf"])
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= known.keys()
            and all(satisfies(known[name], item) for name, item in value.items())
        )
    if kind == "array":
        counted = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return counted and all(satisfies(schema["items"], item) for item in value)
    if kind == "string":
        return isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return {"boolean": bool, "null": type(None)}[kind] is type(value)
