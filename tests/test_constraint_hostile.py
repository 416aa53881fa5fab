"""Invalid and hostile constraints: limits, and grammars made to take time or memory."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from constrained import PERSON, params, said, satisfies
from fabula import Constraint, EngineBusy, InvalidArgument, Model, SamplingParams
from fabula.engine import grammar as grammar_module
from fabula.engine.constraint import MAX_SOURCE_BYTES
from fabula.engine.gbnf import MAX_RULES
from fabula.engine.grammar import MAX_CACHED, MAX_CACHED_BYTES, Guide, Vocabulary, vocabulary_of
from fabula.engine.json_schema import MAX_JSON_DEPTH
from fabula.sessions.persistence import params_json, params_of
from fabula.text.tokenizer import Tokenizer
from threaded import in_threads
from waiting import run_program


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


# ---- Limits of the source ---------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_size_and_depth() -> None:
    assert Constraint.regex("a" * MAX_SOURCE_BYTES)
    assert Constraint.json_schema(nested(MAX_JSON_DEPTH))
    assert Constraint.json_schema(json.dumps(nested(MAX_JSON_DEPTH)))
    for make, source in (
        (Constraint.regex, "a" * (MAX_SOURCE_BYTES + 1)),
        (Constraint.gbnf, "é" * (MAX_SOURCE_BYTES // 2 + 1)),
        (Constraint.json_schema, nested(MAX_JSON_DEPTH + 1)),
        (Constraint.json_schema, json.dumps(nested(MAX_JSON_DEPTH + 1))),
        (Constraint.json_schema, '{"items":' * 100_000),
        (Constraint.json_schema, "[" * 60_000),
        (Constraint.json_schema, {"enum": ["x" * 100] * 100_000}),
        (Constraint.json_schema, {"multipleOf": 100_000}),
        (Constraint.json_schema, {"items": {"multipleOf": 1e300}}),
    ):
        with pytest.raises(InvalidArgument):
            make(source)
    assert Constraint.json_schema({"multipleOf": 99_999})


@pytest.mark.parametrize(
    "source", ["", "{", "[1]", "5", '"x"', "false", "null", "NaN", '{"a": 1e999}', '{"const": "\\ud800"}', "1" * 5000]
)
def test_what_is_no_schema(source: str) -> None:
    with pytest.raises(InvalidArgument, match="json_schema"):
        Constraint.json_schema(source)


@pytest.mark.parametrize(
    "schema", [{"const": float("nan")}, {"const": {1, 2}}, {"const": "\ud800"}, {"const": b"x"}, False, None, 3]
)
def test_what_is_no_json(schema: Any) -> None:
    with pytest.raises(InvalidArgument, match="json_schema"):
        Constraint.json_schema(schema)


@pytest.mark.parametrize(("kind", "source"), [("xml", "a"), ("regex", 5), ("regex", "\ud800"), ("json_schema", "")])
def test_no_constraint(kind: Any, source: Any) -> None:
    with pytest.raises(InvalidArgument):
        Constraint(kind, source)


def test_constraints_are_values() -> None:
    assert Constraint.json_schema(PERSON) == Constraint.json_schema(json.dumps(PERSON, indent=3))
    assert len({Constraint.regex("a"), Constraint.regex("a"), Constraint.lark("a")}) == 2
    with pytest.raises(InvalidArgument, match="must be a Constraint"):
        SamplingParams(constraint={"type": "object"})  # type: ignore[arg-type]


def test_in_json() -> None:
    for constraint in (Constraint.json_schema(PERSON), Constraint.json_object(), Constraint.regex("é\n")):
        settings_ = params(constraint, logit_bias={3: -np.inf})
        data = json.loads(json.dumps(params_json(settings_)))
        assert data["constraint"] == {"kind": constraint.kind, "source": constraint.source}
        assert params_of(data) == settings_
    assert "constraint" not in params_json(SamplingParams())
    for damaged in ({"kind": "xml", "source": ""}, {"kind": "regex"} | {"x": 1}, 5):
        with pytest.raises((InvalidArgument, TypeError)):
            params_of({"constraint": damaged})


# ---- Hostile grammars -------------------------------------------------------------------------------------------


def words(n: int) -> list[str]:
    return [f"word{i}" for i in range(n)]


# What is wrong and how the message says it; None for what must just be survived.
HOSTILE: dict[str, tuple[Constraint, str | None]] = {
    "nested groups": (Constraint.regex("(" * 30_000 + ")" * 30_000), "250"),
    "nested at the library's limit": (Constraint.regex("(" * 250 + "a" + ")" * 250), None),
    "explosive for backtracking": (Constraint.regex("(a+)+b"), None),
    "a million letters": (Constraint.regex("x(a{1000}){1000}"), None),
    "a thousand million": (Constraint.regex("xa{1000000000}"), None),
    "exponential states": (Constraint.regex("(.*a.{40}b){5}"), None),
    "long words": (Constraint.regex("the cat sat " * 5400), None),
    "look-ahead": (Constraint.regex("(?=a)b"), "look-around"),
    "back reference": (Constraint.regex(r"(a)\1"), "backreferences"),
    "open group": (Constraint.regex("(a"), "unclosed group"),
    "no text": (Constraint.regex(r"[^\s\S]"), "no text satisfies it"),
    "a line break": (Constraint.regex("a\nb/"), None),
    "$ref to itself": (Constraint.json_schema({"$ref": "#"}), "no text satisfies it"),
    "$ref in a ring": (
        Constraint.json_schema(
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
        ),
        "no text satisfies it",
    ),
    "recursive $ref": (Constraint.json_schema({"type": "object", "properties": {"a": {"$ref": "#"}}}), None),
    "$ref to nowhere": (Constraint.json_schema({"$ref": "#/$defs/x"}), "x"),
    "$ref to the network": (Constraint.json_schema({"$ref": "http://127.0.0.1/x"}), "retriev"),
    "$ref to a file": (Constraint.json_schema({"$ref": "file:///etc/passwd"}), "retriev"),
    "chain of $ref": (
        Constraint.json_schema(
            {"$ref": "#/$defs/0", "$defs": {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1400)}}
            | {"x": True}
        ),
        "1400",
    ),
    "doubling $ref": (
        Constraint.json_schema(
            {"$ref": "#/$defs/0", "$defs": {"30": {"type": "null"}} | {
                f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(30)}}
        ),
        None,
    ),
    "product of alternatives": (
        Constraint.json_schema(
            {"allOf": [{"anyOf": [{"type": "object", "required": [f"{i}{j}"]} for j in "ab"]} for i in range(30)]}
        ),
        "too large",
    ),
    "keyword it cannot hold to": (Constraint.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "no type": (Constraint.json_schema({"type": "strin"}), "strin"),
    "type 5": (Constraint.json_schema({"type": 5}), "type must be"),
    "contradiction": (Constraint.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "nsatisfiable"),
    "many words": (Constraint.json_schema({"enum": words(4800)}), None),
    "many properties": (Constraint.json_schema({"properties": dict.fromkeys(words(3000), True)}), None),
    "large remainder": (Constraint.json_schema({"type": "integer", "multipleOf": 99_991}), None),
    "larger remainder": (
        Constraint.json_schema({"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), None),
    "no rule": (Constraint.lark("start: foo"), "foo"),
    "no start": (Constraint.lark('foo: "a"'), "start"),
    "rule of itself": (Constraint.lark("start: start"), "no text satisfies it"),
    "left recursion": (Constraint.lark('start: start start | "a" | ""'), None),
    "nested Lark": (Constraint.lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
    "chain of rules": (
        Constraint.lark("start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(3000)) + 'r3000: "a"'),
        None,
    ),
    "chain of terminals": (
        Constraint.lark("start: R0\n" + "".join(f'R{i}: "x" R{i + 1}\n' for i in range(3000)) + 'R3000: "a"'), None),
    "chain of rules in definitions of tools": (
        Constraint("tools", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(15_000)) + 'r15000: "a"'), None),
    "doubling terminals": (
        Constraint.lark("start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(60)) + 'R60: "a"'),
        "too big",
    ),
    "negations": (Constraint.lark("start: A\nA: ~(/.*a.{15}b.*/ & ~/.*c.{15}d.*/)"), None),
    "library's own JSON": (Constraint.lark('{"grammars":[{"lark_grammar":"start: \\"a\\""}],"test_trace":true}'), "1"),
    "deep JSON in Lark": (Constraint.lark("start: %json " + '{"items":' * 200 + "{}" + "}" * 200), "recursion"),
    "no such token": (Constraint.lark("start: <nope>"), "nope"),
    "a comment at the end": (Constraint.lark('start: "a" // b'), None),
    "nested GBNF": (Constraint.gbnf("root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    "no GBNF": (Constraint.gbnf("root ::= )"), "line 1, column 10: unexpected '\\)'"),
    "no root": (Constraint.gbnf('foo ::= "a"'), "root"),
    "bad escape": (Constraint.gbnf('root ::= "\\q"'), "escape"),
    "open string": (Constraint.gbnf('root ::= "a'), "end of input"),
    "much alike names": (Constraint.gbnf('root ::= a-b a_b A_B\na-b ::= "x"\na_b ::= "y"\nA_B ::= "z"'), None),
    "most rules": (Constraint.gbnf("\n".join(f"r{i} ::= r{i + 1}" for i in range(MAX_RULES - 2))
                                   + f'\nr{MAX_RULES - 2} ::= "a"\nroot ::= r0'), None),
    "too many rules": (Constraint.gbnf('r ::= "a"\n' * (MAX_RULES + 1)), str(MAX_RULES)),
    "doubling rules": (Constraint.gbnf("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(60))
                                       + 'r60 ::= "a"'), None),
    "doubling to nothing": (Constraint.gbnf('root ::= "x" | ((""{9}){99999}){99999}'), None),
    "a million characters": (Constraint.gbnf('root ::= ("a"{1000}){1000}'), None),
    "exponential GBNF": (Constraint.gbnf('root ::= ([^b]* "a" .{40} "b"){5}'), None),
    "deep repeats": (Constraint.gbnf('root ::= "a"' + "*?+" * 2000), "nested"),
    "many classes": (Constraint.gbnf("root ::= x* root?\nx ::= " + " | ".join(
        f"[{chr(0x4E00 + i)}-{chr(0x4E40 + 3 * i)}]+" for i in range(1500))), None),
    "many ways": (Constraint.gbnf('root ::= root root | root root root | "a"* | [a-z]+ | ""'), None),
    "alternatives of words": (Constraint.gbnf("root ::= (w root)?\nw ::= " + " | ".join(
        f'"word{i}"' for i in range(4000))), None),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars(
    name: str, loaded_tiny: Model, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is compiled or refused in time, can be followed for a while or says why not, and nothing is printed."""
    constraint, message = HOSTILE[name]
    if message is not None:  # which must not depend on how busy the machine is
        monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 60.0)
    tokenizer, rng = loaded_tiny.tokenizer, random.Random(1)
    start = time.process_time()
    if message is not None:
        with pytest.raises(InvalidArgument, match=message) as caught:
            Guide(tokenizer, tiny.VOCAB, constraint)
        assert str(caught.value).startswith(constraint.kind)
        assert len(str(caught.value)) < 400
    else:
        steps, slowest = 0, 0.0
        try:
            guide = Guide(tokenizer, tiny.VOCAB, constraint)
            while not guide.is_complete and steps < 60:
                before = time.process_time()
                guide.advance(rng.choice(np.flatnonzero(guide.allowed).tolist()))
                slowest, steps = max(slowest, time.process_time() - before), steps + 1
        except InvalidArgument as error:
            assert re.search("too complex|dead end|takes more than", str(error))
        assert slowest < 0.3  # 5 ms on a machine that does nothing else
    assert time.process_time() - start < 12.0  # 4 s on a machine that does nothing else
    assert capfd.readouterr() == ("", "")


def test_what_takes_too_long_is_given_up(loaded_tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for thread in threading.enumerate():
        if thread.name == "fabula-grammar":  # of a test before
            thread.join()
    release = threading.Event()
    monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(Vocabulary, "_compile", lambda *_: release.wait())
    try:
        with pytest.raises(InvalidArgument, match="takes more than"):
            Guide(loaded_tiny.tokenizer, tiny.VOCAB, Constraint.regex("slow"))
        # No caller waits for them any more, but they count until they have ended.
        for _ in range(grammar_module.MAX_COMPILING - 1):
            with pytest.raises(InvalidArgument, match="takes more than"):
                Guide(loaded_tiny.tokenizer, tiny.VOCAB, Constraint.regex("slow"))
        with pytest.raises(EngineBusy, match="being compiled"):
            Guide(loaded_tiny.tokenizer, tiny.VOCAB, Constraint.regex("slow"))
    finally:
        release.set()
    monkeypatch.undo()
    assert Guide(loaded_tiny.tokenizer, tiny.VOCAB, Constraint.regex("slow")).allowed.any()


def test_the_cache_is_bounded(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary_of(tokenizer) is vocabulary
    for i in range(3 * MAX_CACHED):
        vocabulary.grammar(Constraint.regex(f"a{i}"))
        assert vocabulary.n_cached <= MAX_CACHED
    latest = vocabulary.grammar(Constraint.regex(f"a{i}"))
    assert vocabulary.grammar(Constraint.regex(f"a{i}")) is latest
    latest.worked(1.0)  # its lexer has grown a lot
    assert vocabulary.grammar(Constraint.regex(f"a{i}")) is not latest
    for i in range(8):
        vocabulary.grammar(Constraint.regex(f"b{i}")).n_bytes = 15 << 20
        vocabulary.grammar(Constraint.regex("c"))
        assert vocabulary.n_cached_bytes <= MAX_CACHED_BYTES
    assert 1 < vocabulary.n_cached < 8


def test_a_spent_lexer_is_made_anew(model: Model) -> None:
    constraint = Constraint.regex("(.*a.{40}b){5}")
    vocabulary = vocabulary_of(model.tokenizer)
    first = vocabulary.grammar(constraint)
    first.is_spent = True
    assert vocabulary.grammar(constraint) is not first


def test_the_tokenizer_can_go(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    Guide(tokenizer, tiny.VOCAB, Constraint.regex("a"))
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_many_at_once(model: Model) -> None:
    """Answers share a lexer, from whatever threads they are begun."""

    def one(i: int) -> str:
        return said(model, Constraint.json_schema(PERSON), seed=i)[0]

    alone = [one(i) for i in range(8)]
    assert in_threads(*[lambda i=i: one(i) for i in range(8)]) == alone
    assert all(satisfies(PERSON, json.loads(text)) for text in alone)


def test_nothing_is_loaded_without_one() -> None:
    code = "import sys, fabula.engine.decoding, fabula.model; print('llguidance' in sys.modules)"
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
