"""Constrained answers: whatever the model would say, what it says satisfies the constraint; and hostile grammars."""

from __future__ import annotations

import gc
import json
import random
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from fabula import Constraint, EngineBusy, InvalidArgument, Model, NonFinite, SamplingParams, Session, Turn, Workspace
from fabula._native import page_bytes
from fabula.engine import grammar as grammar_module
from fabula.engine.constraint import MAX_JSON_DEPTH, MAX_RULES, MAX_SOURCE_BYTES
from fabula.engine.decoding import Decoding
from fabula.engine.generation import Generation
from fabula.engine.grammar import MAX_CACHED, MAX_CACHED_BYTES, Guide, Vocabulary, vocabulary_of
from fabula.formats.checkpoint import DType
from fabula.sessions.keeper import params_json, params_of
from fabula.text.tokenizer import Tokenizer
from threaded import in_threads

PROMPT = "the winter was long"
EOS = 1
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


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture(scope="module")
def smollm2_model(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.load(smollm2_gguf, context=1024) as loaded:
        yield loaded


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


# ---- Schemas ----------------------------------------------------------------------------------------------------


def leaves() -> st.SearchStrategy[Any]:
    words = st.text('abc "\\é😀\n', max_size=5)
    numbers = st.integers(-500, 500)
    return st.one_of(
        st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
                  st.integers(0, 3), st.integers(0, 4)),
        st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + abs(more)}, numbers, numbers),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
        st.lists(words | numbers | st.none(), min_size=1, max_size=4).map(lambda items: {"enum": items}),
    )  # fmt: skip


def nodes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text("abcxyz_", min_size=1, max_size=4)
    return st.one_of(
        st.builds(
            lambda known, n: {
                "type": "object",
                "properties": known,
                "required": list(known)[:n],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 3),
        ),
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda items: {"anyOf": items}),
    )


SCHEMAS = st.recursive(leaves(), nodes, max_leaves=5)


@given(SCHEMAS, st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_an_answer_satisfies_its_schema(loaded_tiny: Model, schema: Any, seed: int) -> None:
    few_blanks = {loaded_tiny.tokenizer.encode(blank, add_bos=False)[-1]: -8.0 for blank in (" ", "\n")}
    text, generation = said(loaded_tiny, Constraint.json_schema(schema), seed=seed, logit_bias=few_blanks)
    assert generation.finish_reason == "stop"
    assert satisfies(schema, json.loads(text)), (schema, text)


def test_blanks_do_not_go_on_for_ever(model: Model) -> None:
    blank = {model.tokenizer.encode(character, add_bos=False)[-1]: 50.0 for character in (" ", "\n")}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    text, generation = said(model, Constraint.json_schema(schema | {"additionalProperties": False}), logit_bias=blank)
    assert generation.finish_reason == "stop"
    assert isinstance(json.loads(text)["a"], bool)
    assert max(map(len, re.findall(r"[ \n]+", text))) == 32


def test_a_schema_may_choose_its_own_blanks(model: Model) -> None:
    text, _ = said(model, Constraint.json_schema({**PERSON, "x-guidance": {"whitespace_flexible": False}}))
    outside = re.sub(r'"(\\.|[^"\\])*"', "", text)
    assert satisfies(PERSON, json.loads(text))
    assert not set(outside) & {" ", "\n"}


# ---- Other kinds ------------------------------------------------------------------------------------------------


def test_json_object(model: Model) -> None:
    close = {model.tokenizer.encode(character, add_bos=False)[-1]: 6.0 for character in '}"]'}
    text, generation = said(model, Constraint.json_object(), logit_bias=close)
    assert generation.finish_reason == "stop"
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", ["abc", r"[a-z]{3}-[0-9]{2}/x", "(yes|no)!", r"é+\n?z", r"a b", r"/\*x*\*/"])
@pytest.mark.parametrize("seed", [1, 2])
def test_regex(pattern: str, seed: int, model: Model) -> None:
    end = {EOS: 2.0}
    text, generation = said(model, Constraint.regex(pattern), seed=seed, logit_bias=end)
    assert generation.finish_reason == "stop"
    assert re.fullmatch(pattern, text)


def test_lark(model: Model) -> None:
    sums = 'start: NUMBER ("+" NUMBER){2,4} "=" NUMBER\nNUMBER: /[0-9]{1,3}/ // of three digits at most'
    text, generation = said(model, Constraint.lark(sums))
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){2,4}=\d{1,3}", text)
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= greeting " " [a-c]+ "."\ngreeting ::= "hi" | "ho" # two', "h[io] [abc]+\\."),
        ('root ::= [\\u00e9]{2} "\\x41" "\\U0000007a" "\\\\"', "ééAz\\\\"),
        ('root ::= ("a" | "b" root-2)\nroot-2 ::= "\\"" [^a-z]{1,3} "\\""', 'a|b"[^a-z]{1,3}"'),
    ],
)
def test_gbnf(grammar: str, pattern: str, model: Model) -> None:
    text, generation = said(model, Constraint.gbnf(grammar), logit_bias={EOS: 2.0, 31: 3.0})
    assert generation.finish_reason == "stop"
    assert re.fullmatch(pattern, text)


def test_characters_of_several_tokens() -> None:
    """A SentencePiece-like vocabulary writes what it has no piece for byte by byte."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "o", "k", "▁ok", "ok"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * 5], np.int32),
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = Tokenizer.from_gguf(metadata, Path("model.gguf"))
    guide = Guide(tokenizer, tokenizer.vocab_size + 8, Constraint.regex("é😀漢 ok"))
    rng, ids = random.Random(4), []
    while not guide.is_complete:
        assert not guide.allowed[tokenizer.vocab_size :].any()
        ids.append(rng.choice(np.flatnonzero(guide.allowed).tolist()))
        guide.advance(ids[-1])
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == "é😀漢 ok"
    assert guide.may_end


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
    "no GBNF": (Constraint.gbnf("root ::= )"), "Expected name"),
    "no root": (Constraint.gbnf('foo ::= "a"'), "root"),
    "bad escape": (Constraint.gbnf('root ::= "\\q"'), "escape"),
    "open string": (Constraint.gbnf('root ::= "a'), "end of input"),
    "two names in one": (Constraint.gbnf('root ::= a-b a_b\na-b ::= "x"\na_b ::= "y"'), "already exists"),
    "most rules": (Constraint.gbnf("\n".join(f"r{i} ::= r{i + 1}" for i in range(MAX_RULES - 2))
                                   + f'\nr{MAX_RULES - 2} ::= "a"\nroot ::= r0'), None),
    "too many rules": (Constraint.gbnf('r ::= "a"\n' * (MAX_RULES + 1)), str(MAX_RULES)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars(name: str, loaded_tiny: Model, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is compiled or refused in time, can be followed for a while or says why not, and nothing is printed."""
    constraint, message = HOSTILE[name]
    tokenizer, rng = loaded_tiny.tokenizer, random.Random(1)
    start = time.monotonic()
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
                before = time.monotonic()
                guide.advance(rng.choice(np.flatnonzero(guide.allowed).tolist()))
                slowest, steps = max(slowest, time.monotonic() - before), steps + 1
        except InvalidArgument as error:
            assert re.search("too complex|dead end|takes more than", str(error))
        assert slowest < 0.3  # 5 ms on a machine that does nothing else
    assert time.monotonic() - start < 4.0
    assert capfd.readouterr() == ("", "")


def test_what_takes_too_long_is_given_up(loaded_tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for thread in threading.enumerate():
        if thread.name == "fabula-grammar":  # of a test before
            thread.join()
    release = threading.Event()
    monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(Vocabulary, "_compile", lambda *_: release.wait(30))
    try:
        with pytest.raises(InvalidArgument, match="takes more than"):
            Guide(loaded_tiny.tokenizer, tiny.VOCAB, Constraint.regex("slow"))
        # Nobody waits for them any more, but they count until they have ended.
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


# ---- Drawing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5, "min_p": 0.1}])
def test_logprobs_are_those_of_the_whole_vocabulary(changes: dict[str, Any], model: Model) -> None:
    settings_ = params(Constraint.regex("[0-9]{5}"), n_logprobs=3, **changes)
    decoding = Decoding(model.tokenizer, tiny.VOCAB, np.array([5], np.int32), settings_, room=50)
    rng = np.random.default_rng(2)
    text, reason = "", None
    while reason is None:
        logits = rng.standard_normal(tiny.VOCAB).astype(np.float32) * 4
        kept = logits.copy()
        piece = decoding.accept(logits)
        exact = logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum())
        assert piece.logprob == pytest.approx(exact[piece.token_id], abs=1e-5)
        assert [token for token, _ in piece.top_logprobs] == np.argsort(-logits)[:3].tolist()
        assert (logits == kept).all()
        text, reason = text + piece.text, piece.finish_reason
    assert re.fullmatch("[0-9]{5}", text)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits(bad: float, model: Model) -> None:
    decoding = Decoding(
        model.tokenizer, tiny.VOCAB, np.array([5], np.int32), params(Constraint.regex("[0-9]+")), room=9
    )
    logits = np.zeros(tiny.VOCAB, np.float32)
    logits[3] = bad  # a token that is not allowed anyway
    with pytest.raises(NonFinite):
        decoding.accept(logits)


# ---- Ends -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"min_tokens": 60}, {"ignore_eos": True}, {"stop": ("b", "c")}])
def test_a_complete_answer_stops_by_itself(changes: dict[str, Any], model: Model) -> None:
    text, generation = said(model, Constraint.regex("abc"), **changes)
    assert (text, generation.finish_reason) == ("abc", "stop")
    assert EOS not in generation.token_ids


def test_nothing_to_say(model: Model) -> None:
    text, generation = said(model, Constraint.regex(""), min_tokens=5, ignore_eos=True)
    assert (text, generation.finish_reason, generation.token_ids) == ("", "stop", [EOS])


def test_end_tokens_come_where_they_may(model: Model) -> None:
    eager = {"logit_bias": {EOS: 90.0}}
    text, generation = said(model, Constraint.regex("[a-z]{4}x*"), **eager)
    assert re.fullmatch("[a-z]{4}", text)
    assert generation.token_ids[-1] == EOS
    text, generation = said(model, Constraint.regex("x*"), min_tokens=7, **eager)
    assert len(generation.token_ids) == 8
    text, generation = said(model, Constraint.regex("x*"), ignore_eos=True, max_tokens=20, **eager)
    assert (text, generation.finish_reason) == ("x" * 20, "length")


def test_stop_strings_count_where_the_answer_may_end(model: Model) -> None:
    b = model.tokenizer.encode("b", add_bos=False)[0]
    text, generation = said(model, Constraint.regex('"b{3}"b*'), stop=("b",), logit_bias={b: 30.0})
    assert (text, generation.finish_reason) == ('"bbb"', "stop")
    text, generation = said(model, Constraint.regex('"b{3}"b*'), stop_tokens=(b,), logit_bias={b: 30.0})
    assert (text, generation.finish_reason) == ('"bbb"', "stop")


def test_everything_allowed_is_banned(model: Model) -> None:
    a = model.tokenizer.encode("a", add_bos=False)[0]
    with pytest.raises(InvalidArgument, match="banned"):
        said(model, Constraint.regex("a+"), banned_tokens=(a,))


def test_cut_by_length(model: Model) -> None:
    text, generation = said(model, Constraint.json_schema(PERSON), max_tokens=6)
    assert generation.finish_reason == "length"
    assert len(generation.token_ids) == 6
    assert text.startswith("{")


def test_a_model_without_end_tokens(tiny_folder: Path) -> None:
    read = Tokenizer.from_folder(tiny_folder)
    tokenizer = Tokenizer(read._backend, path=read.path, bos_id=0)
    guide = Guide(tokenizer, tiny.VOCAB + 5, Constraint.regex("ab*"))
    guide.advance(tokenizer.encode("a")[0])
    assert guide.may_end
    assert not guide.is_complete
    assert np.flatnonzero(guide.allowed).tolist() == [tokenizer.encode("b")[0]]
    with pytest.raises(InvalidArgument, match="complete already"):
        Guide(tokenizer, tiny.VOCAB + 5, Constraint.regex("ab"), tokenizer.encode("ab"))


# ---- Sessions ---------------------------------------------------------------------------------------------------


def choice_in(session: Session, turn: Turn) -> tuple[int, list[int], int]:
    """A place in the middle of an answer where the grammar leaves a choice: which, and a token it forbids there."""
    assert turn.params is not None
    assert turn.params.constraint is not None
    engine = session._host.engine
    guide = Guide(engine.tokenizer, engine.runner.config.vocab_size, turn.params.constraint)
    places = []
    for n, token in enumerate(turn.token_ids[:-1]):
        allowed = np.flatnonzero(guide.allowed).tolist()
        if n > 3 and len(allowed) > 1:
            places.append((n, allowed, np.flatnonzero(~guide.allowed)[-1].item()))
        guide.advance(token)
    return places[len(places) // 2]


def check_verbs(session: Session, schema: dict[str, Any], settings_: SamplingParams) -> None:
    """A turn cut in the middle of its JSON goes on, forks and is made again within its grammar."""
    whole = session.say("Describe a person in JSON.", settings_)
    whole.text()
    turn = session.head
    assert satisfies(schema, json.loads(turn.text))
    n_cut, others, forbidden = choice_in(session, turn)
    again = session.replay(turn)
    again.text()
    assert session.head.token_ids == turn.token_ids

    session.rollback(turn)
    cut = session.edit(turn, turn.prompt, params_with(turn.params, max_tokens=n_cut))
    cut.text()
    assert session.head.finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(session.head.text)
    session.continue_(400).text()
    assert session.head.text == turn.text
    assert session.head.finish_reason == "stop"
    assert session.head.n_begun == n_cut
    session.continue_(5).text()  # complete already: only an end token may follow
    assert session.head.text == turn.text

    other = next(i for i in others if i != turn.token_ids[n_cut])
    session.fork_at(turn, n_cut, other, params_with(turn.params, max_tokens=400)).text()
    assert satisfies(schema, json.loads(session.head.text))
    assert session.head.token_ids[: n_cut + 1] == (*turn.token_ids[:n_cut], other)
    kept = session.head
    with pytest.raises(InvalidArgument, match=f"forbids what the answer begins with, at token {n_cut}"):
        session.fork_at(turn, n_cut, forbidden)
    assert session.head is kept
    session.replay(kept).text()
    assert session.head.token_ids == kept.token_ids

    session.rollback(turn)
    session.regenerate().text()
    assert satisfies(schema, json.loads(session.head.text))
    session.edit(session.head, "Another one, in JSON.").text()
    assert satisfies(schema, json.loads(session.head.text))
    for reply in session.branch(2):
        assert satisfies(schema, json.loads(reply.text()))


def params_with(settings_: SamplingParams | None, **changes: Any) -> SamplingParams:
    assert settings_ is not None
    return params_of(params_json(settings_) | changes)


def test_verbs_of_a_session(model: Model) -> None:
    session = model.session()
    check_verbs(session, PERSON, params(Constraint.json_schema(PERSON), max_tokens=300))
    session.delete()


def test_verbs_of_a_session_on_a_real_model(smollm2_model: Model) -> None:
    session = smollm2_model.session(sampling=SamplingParams(max_tokens=150, seed=3))
    check_verbs(session, PERSON, params(Constraint.json_schema(PERSON), max_tokens=150, temperature=0.7))


def test_kept_in_the_store(tmp_path: Path, tiny_folder: Path) -> None:
    settings_ = params(Constraint.json_schema(PERSON), max_tokens=6)
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        session = workspace.session("kept", model="tiny", sampling=settings_)
        session.say("hello").text()
        begun = session.head.text
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        session = workspace.session("kept")
        assert session.params.constraint == Constraint.json_schema(PERSON)
        assert session.head.params is not None
        assert session.head.params.constraint == Constraint.json_schema(PERSON)
        session.continue_(400).text()
        assert session.head.text.startswith(begun)
        assert satisfies(PERSON, json.loads(session.head.text))


def test_answers_that_gave_way_go_on_in_their_place(tiny_folder: Path) -> None:
    """K and V given up for others and computed again do not move the grammar a second time."""
    n_bytes = 8 * page_bytes(DType.F16, 2, 2, 6)
    schema = {**PERSON, "properties": PERSON["properties"] | {"name": {"type": "string", "minLength": 60,
                                                                      "maxLength": 70}}}  # fmt: skip
    settings_ = [params(Constraint.json_schema(schema), seed=i) for i in range(6)]
    with Model.load(tiny_folder, threads=1) as roomy:
        alone = [roomy.generate(PROMPT, each).text() for each in settings_]
    with Model.load(tiny_folder, threads=1, kv_memory=n_bytes) as small:
        running = [small.generate(PROMPT, each) for each in settings_]
        together = in_threads(*[generation.text for generation in running])
        assert any(generation._request.n_preempted for generation in running)
    assert together == alone
    for text in alone:
        assert 60 <= len(json.loads(text)["name"]) <= 70


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_real_model(temperature: float, smollm2_model: Model) -> None:
    constraint = Constraint.json_schema(PERSON)
    prompt = [{"role": "user", "content": "Describe a person as JSON with name, age and tags."}]
    generation = smollm2_model.chat(prompt, params(constraint, max_tokens=200, temperature=temperature))
    assert satisfies(PERSON, json.loads(generation.text()))
    assert generation.finish_reason == "stop"
