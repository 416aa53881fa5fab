"""Prepares JSON schemas for llguidance: limits, white space, and keywords that cannot be enforced.

In lenient mode the library ignores unknown keywords, but refuses the whole schema for some known ones: a `pattern` with
look-ahead, bounds beyond 64 bits, overlapping names in `patternProperties`. So each such keyword is first compiled on
its own: with `strict` the error names its path, otherwise it is ignored as well. A trial takes 0.3 ms; equal ones are
made once.

Schemas are untrusted input; the limits below are those of `engine/constraint.py`.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fabula.errors import InvalidArgument

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_JSON_DEPTH = 64
MULTIPLE_DIGITS = 5  # of multipleOf: an automaton of as many states, 0.5 s for 99,991 and 7 s for 999,983
MAX_BLANKS = 32  # characters of white space between two parts: a weak model would write them forever
MAX_SEPARATOR = 4 * MAX_BLANKS  # characters of a separator or white space chosen by the user
LONG_PATTERN = 1000  # characters; longer patterns are not tried together with lengths: 4 s for 10,000 characters
MAX_TRIALS = 500  # of one schema; later faults are found when the whole schema is compiled
MAX_MESSAGE = 300  # characters of another library's message in ours

WHITESPACE = rf"[\x20\x0A\x0D\x09]{{1,{MAX_BLANKS}}}"

# Keywords of the library whose values are schemas: by name, or one or several.
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_INNER = frozenset(("additionalProperties", "items", "additionalItems", "prefixItems", "anyOf", "oneOf", "allOf"))
_DATA = frozenset(("const", "enum", "default", "examples"))
_NOTES = frozenset(("title", "description", "$comment", "$ref", "$anchor", "deprecated", "readOnly", "writeOnly"))
# Keywords that often cannot be enforced; tried first in the search for the one at fault.
_TRIED = (
    "pattern", "patternProperties", "minProperties", "maxProperties", "format", "minLength", "maxLength", "minimum",
    "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "$schema", "$id",
)  # fmt: skip


def prepare_schema(schema: object, *, strict: bool, where: str) -> dict[str, Any]:
    """A copy of a schema that the library accepts, with bounded white space.

    Args:
        schema: JSON schema: a mapping, or true.
        strict: whether a keyword that cannot be enforced is an error; otherwise it is ignored.
        where: path of the schema for messages, such as `tools[1].function.parameters`.

    Returns:
        The schema; its `x-guidance` has the options for the library: those of the caller, with unbounded white space
        and separators bounded.

    Raises:
        InvalidArgument: not a schema, nested too deep, or with `strict` a keyword that cannot be enforced; names its
            path, such as `tools[1].function.parameters.properties.price.pattern`.
    """
    check_limits(schema, where)
    node: dict[str, Any] = {} if schema is True else dict(schema)  # type: ignore[call-overload]
    options = _options(node.pop("x-guidance", None), f"{where}.x-guidance")
    if options.setdefault("lenient", not strict) is False:
        del options["lenient"]
    made = _Preparation(node, strict="lenient" not in options).schema(node, where)
    return {**made, "x-guidance": options}


def check_limits(schema: object, where: str, *, strict: bool = False) -> None:
    """Raises InvalidArgument if it is not a schema, is nested too deep, or with `strict` takes too long to compile."""
    if not isinstance(schema, Mapping) and schema is not True:
        raise InvalidArgument(f"{where}: a schema is an object, or true")
    level: list[Any] = [schema]
    for _ in range(MAX_JSON_DEPTH + 1):
        items: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                fault = _multiple_fault(value.get("multipleOf")) if strict else None
                if fault is not None:
                    raise InvalidArgument(f"{where}: {fault}")
                items += value.values()
            elif isinstance(value, list | tuple):
                items += value
        if not items:
            return
        level = items
    raise InvalidArgument(f"{where}: it is nested more than {MAX_JSON_DEPTH} deep")


def is_lenient(schema: object) -> bool:
    """Whether a schema's own options are lenient: keywords that cannot be enforced are ignored."""
    options = schema.get("x-guidance") if isinstance(schema, Mapping) else None
    return isinstance(options, Mapping) and options.get("lenient") is True


# ---- Walking --------------------------------------------------------------------------------------------------------


class _Preparation:
    """Prepares one schema."""

    def __init__(self, root: Mapping[str, Any], *, strict: bool) -> None:
        self._strict = strict
        self._n_trials = 0
        references = list(_references(root))
        # The value of any keyword in the path of a `$ref` is a schema; with anchors, that of every keyword.
        self._referred = {step for reference in references for step in re.split(r"[/#]", reference)}
        self._anywhere = any("#" in reference and "#/" not in reference[:-1] for reference in references)

    def schema(self, node: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A deep copy of a schema without keywords that cannot be enforced."""
        made: dict[str, Any] = {}
        for key, value in node.items():
            place = f"{where}{_step(key)}"
            if key in _NAMED and isinstance(value, Mapping) and (self._is_followed(key)):
                made[key] = {name: self._value(item, f"{place}{_step(name)}") for name, item in value.items()}
            elif key in _INNER or self._is_followed(key):
                made[key] = self._value(value, place)
            else:
                made[key] = value
        return self._enforceable(made, where)

    def _is_followed(self, key: str) -> bool:
        return key in ("properties", "patternProperties") or self._anywhere or key in self._referred

    def _value(self, value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return self.schema(value, where)
        if isinstance(value, list | tuple):
            return [self._value(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return value

    # ---- What can be enforced ---------------------------------------------------------------------------------------

    def _enforceable(self, node: dict[str, Any], where: str) -> dict[str, Any]:
        """A schema without its own keywords that cannot be enforced; its subschemas are done already."""
        node = {key: _whole_number(value) if key[:3] in ("min", "max") else value for key, value in node.items()}
        message = _multiple_fault(node.get("multipleOf"))
        if message is not None:
            self._pass_over(f"{where}.multipleOf", message)
            del node["multipleOf"]
        fault = self._fault(node)
        if fault is None:
            return node
        culprit = self._culprit(node, fault)
        place = where if culprit is None else f"{where}{_step(culprit)}"
        if re.search("Expected|must be a|invalid multiple|Invalid type", fault):
            raise InvalidArgument(f"{place}: {in_words(fault)}")
        if culprit == "patternProperties" and isinstance(node[culprit], Mapping):
            return self._with_names(node, where)
        self._pass_over(place, fault)
        if culprit is None:  # several together
            return {key: value for key, value in node.items() if key not in _TRIED}
        return self._enforceable(_without(node, culprit), where)

    def _culprit(self, node: Mapping[str, Any], fault: str) -> str | None:
        """The keyword whose removal removes or changes a schema's fault; None if there is none."""
        listed = re.search(r"Unimplemented keys: (\[.*\])", fault)
        if listed is not None:
            return str(json.loads(listed[1])[0])
        keys = sorted(node, key=lambda key: _TRIED.index(key) if key in _TRIED else len(_TRIED))
        return next((key for key in keys if self._fault(_without(node, key)) != fault), None)

    def _with_names(self, node: dict[str, Any], where: str) -> dict[str, Any]:
        """A schema without those of its `patternProperties` that cannot be enforced. If one is ignored, additional
        properties must be allowed, since its properties are among them."""
        kept: dict[str, Any] = {}
        for name, schema in node["patternProperties"].items():
            fault = self._fault({**node, "patternProperties": {**kept, name: schema}})
            if fault is None:
                kept[name] = schema
            else:
                self._pass_over(f"{where}.patternProperties{_step(name)}", fault)
        made = _without(node, "patternProperties") | {"additionalProperties": True}
        return made | {"patternProperties": kept} if kept else made

    def _pass_over(self, where: str, fault: str) -> None:
        if self._strict:
            raise InvalidArgument(
                f"{where}: {in_words(fault)}; change it, or let it be ignored (strict false, lenient true)"
            )

    def _fault(self, node: Mapping[str, Any]) -> str | None:
        """Why the library refuses a schema, whatever its contents; None if it does not."""
        text = _shallow(node)
        if text is None or self._n_trials >= MAX_TRIALS:
            return None
        before = _trial.cache_info().misses
        fault = _trial(text, not self._strict)
        self._n_trials += _trial.cache_info().misses != before
        return fault


def _step(key: object) -> str:
    """A key as part of a path."""
    text = str(key)
    return f".{text}" if re.fullmatch(r"[\w$-]+", text) else f"[{json.dumps(text, ensure_ascii=False)}]"


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        reference = value.get("$ref")
        if isinstance(reference, str):
            yield reference
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)


def _without(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != key}


def _multiple_fault(value: object) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        _, digits, exponent = Decimal(str(value)).as_tuple()
        size = len(digits) + max(0, int(exponent)) if isinstance(exponent, int) else math.inf
        if size > MULTIPLE_DIGITS:
            return f"multipleOf is {value!r:.40}, at most {MULTIPLE_DIGITS} digits fit"
    return None


def _whole_number(value: object) -> object:
    """3.0 is an integer in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shallow(node: Mapping[str, Any]) -> str | None:
    """A schema as JSON with its subschemas replaced by `true`; None if it is not JSON."""
    made: dict[str, Any] = {}
    counted = bool(node.keys() & {"minProperties", "maxProperties", "patternProperties"})
    for key, value in node.items():
        if key in _NOTES or (key in _DATA and isinstance(value, list if key == "enum" else object)):
            continue
        if key == "patternProperties" or (key == "properties" and counted):
            made[key] = dict.fromkeys(value, True) if isinstance(value, Mapping) else value
        elif key in _NAMED and isinstance(value, Mapping):
            continue
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems", "required") and isinstance(value, list | tuple):
            if key == "required" and counted:
                made[key] = value
        elif key in _NAMED or key in _INNER or not isinstance(value, Mapping | list | tuple) or key == "type":
            made[key] = True if key in ("items", "additionalItems", "additionalProperties") else value
        else:
            made[key] = True  # an unimplemented keyword is refused whatever its value
    pattern = made.get("pattern")
    if isinstance(pattern, str) and len(pattern) > LONG_PATTERN:
        made = {"type": "string", "pattern": pattern}
    try:
        return json.dumps(made, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return None  # reported when the whole schema is converted to JSON


@lru_cache(maxsize=4096)
def _trial(schema: str, lenient: bool) -> str | None:
    from llguidance import LLMatcher

    whole = {**json.loads(schema), "x-guidance": {"lenient": lenient}}
    source = json.dumps({"grammars": [{"json_schema": whole}]})
    matcher = LLMatcher(_bytes_alone(), source, log_level=0)
    message = matcher.get_error() if matcher.is_error() else ""
    if "Unable" not in message and re.search("nsatisfiable|is empty:", message):
        return None  # unsatisfiable, which is not a keyword's fault
    return message or None


class _Bytes:
    """A vocabulary of all bytes and an end token, for trials."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"</s>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_tokenizer_lock = threading.Lock()
_tokenizer: list[LLTokenizer] = []


def _bytes_alone() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    with _tokenizer_lock:
        if not _tokenizer:
            _tokenizer.append(LLTokenizer(TokenizerWrapper(_Bytes())))
        return _tokenizer[0]


_LOOK_AROUND = r"look-around (look-ahead, look-behind, \b, ^ and $ in the middle) cannot be enforced"
_WORDS = (
    ("look-around|lookarounds", _LOOK_AROUND),
    ("Too many items", "there are too many ways to parse the same text; let neighbors start with different characters"),
    ("backreferences", "backreferences cannot be enforced"),
    ("Unimplemented keys", "this keyword cannot be enforced"),
    ("oneOf constraints", "oneOf can be enforced only where its schemas exclude each other; anyOf always can"),
    ("Unknown format", "this format cannot be enforced"),
    ("are not disjoint", "names that fit two of patternProperties cannot be enforced"),
    ("min/maxProperties", "this can be enforced only where all keys of properties are required"),
    (r"Failed to generate regex for \w+ range|decimal literal invalid", "numbers this large cannot be enforced"),
    ("Unable to determine if regex is empty", "together with the other keywords here the pattern is too complex"),
    ("invalid multiple of", "must be more than 0"),
    ("retrieving it failed", "a reference must point into the schema itself; nothing is retrieved"),
    ("circular references with sibling keys", "keywords next to a circular $ref cannot be enforced"),
)


def in_words(message: str) -> str:
    """The library's message about a schema or a pattern, in terms of the schema."""
    for pattern, words in _WORDS:
        if re.search(pattern, message):
            return words
    found = re.search("^error: (.*)", message, re.MULTILINE)  # of a regular expression, after its excerpt
    text = " ".join((found[1] if found else message).split())[:MAX_MESSAGE]
    text = re.sub(r"Expected f64 for '\w+'", "must be a number", text)
    return re.sub(r"Expected (.*) for '\w+'", r"must be a \1", text)


# ---- White space ----------------------------------------------------------------------------------------------------


def _options(options: object, where: str) -> dict[str, Any]:
    """The user's options for the library, with bounded white space and separators."""
    if options is None:
        return {"whitespace_pattern": WHITESPACE}
    if not isinstance(options, Mapping):
        raise InvalidArgument(f"{where}: it must be an object")
    made = dict(options)
    for key in ("whitespace_pattern", "item_separator", "key_separator"):
        if isinstance(made.get(key), str):
            made[key] = _bounded(made[key], f"{where}.{key}")
    if made.get("whitespace_pattern") is None and made.get("whitespace_flexible", True):
        made["whitespace_pattern"] = WHITESPACE
    return made


def _bounded(pattern: str, where: str) -> str:
    """A regular expression whose unbounded repetitions are bounded by MAX_BLANKS.

    Raises:
        InvalidArgument: it still matches more than MAX_SEPARATOR characters.
    """
    made = re.sub(
        r"(?P<kept>\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\])|(?P<many>[*+])|\{(?P<low>\d+),\}",
        lambda match: match["kept"] or _bounded_repetition(match),
        pattern,
        flags=re.DOTALL,
    )
    fault = _trial_of_length(made)
    if fault is not None:
        raise InvalidArgument(f"{where}: {fault}")
    return made


def _bounded_repetition(match: re.Match[str]) -> str:
    low = {"*": 0, "+": 1}.get(match["many"]) if match["many"] else int(match["low"])
    return f"{{{low},{max(MAX_BLANKS, low or 0)}}}"


@lru_cache(maxsize=256)
def _trial_of_length(pattern: str) -> str | None:
    from llguidance import LLMatcher

    written = f"(?:{pattern})".replace("/", r"\/").replace("\n", r"\n")
    for lark in (f"start: /{written}/", f"start: LONG\nLONG: /{written}/ & /(?s:.{{{MAX_SEPARATOR + 1},}})/"):
        matcher = LLMatcher(_bytes_alone(), json.dumps({"grammars": [{"lark_grammar": lark}]}), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if "LONG" in lark:
            return None if matcher.is_error() else f"it matches more than {MAX_SEPARATOR} characters; bound it"
        if matcher.is_error() and "NoExtension" not in matcher.get_error():
            return in_words(matcher.get_error())
    return None
