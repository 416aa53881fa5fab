"""Constrained answers: whatever the model would say, what it says satisfies the constraint."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from constrained import PERSON, PROMPT, params, said, satisfies
from fabula import Constraint, InvalidArgument, Model, NonFinite, SamplingParams, Session, Turn, Workspace
from fabula._native import kv_layers, page_bytes
from fabula.engine.decoding import Decoding
from fabula.engine.grammar import Guide
from fabula.formats.checkpoint import DType
from fabula.sessions.persistence import params_json, params_of
from fabula.text.tokenizer import Tokenizer
from threaded import in_threads

EOS = 1


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


@pytest.fixture(scope="module")
def smollm2_model(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.load(smollm2_gguf, context=1024) as loaded:
        yield loaded


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


@pytest.mark.parametrize("changes", [{}, {"min_tokens": 60}, {"ignore_eos": True}, {"stop": ("x", "cb")}])
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


@pytest.mark.parametrize(
    ("stop", "before"), [(("b",), '"'), (("bbb",), '"'), (('b"', "ab"), '"bb'), (("zz", '"'), ""), (('"bb',), "")]
)
def test_stop_strings_end_a_constrained_answer(stop: tuple[str, ...], before: str, model: Model) -> None:
    """Wherever they come, whether the constraint is satisfied there or not."""
    text, generation = said(model, Constraint.regex('"b{3}"b*'), stop=stop)
    assert (text, generation.finish_reason) == (before, "stop")


def test_stop_strings_in_json(model: Model) -> None:
    schema = {"const": {"first": "a", "second": "b"}}
    compact = {**schema, "x-guidance": {"whitespace_flexible": False}}
    text, generation = said(model, Constraint.json_schema(compact), stop=('"second"',))
    assert (text, generation.finish_reason) == ('{"first":"a",', "stop")
    text, generation = said(model, Constraint.json_schema(compact), stop=('"second"',), min_tokens=30)
    assert (json.loads(text), generation.finish_reason) == (schema["const"], "stop")


def test_stop_tokens_end_a_constrained_answer(model: Model) -> None:
    b = model.tokenizer.encode("b", add_bos=False)[0]
    text, generation = said(model, Constraint.regex('"b{3}"b*'), stop_tokens=(b,))
    assert (text, generation.finish_reason) == ('"', "stop")


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
    engine = session._handle.engine
    guide = Guide(engine.tokenizer, engine.runner.config.vocab_size, turn.params.constraint)
    places = []
    for n, token in enumerate(turn.token_ids[:-1]):
        allowed = np.flatnonzero(guide.allowed).tolist()
        if n > 3 and len(allowed) > 1:
            places.append((n, allowed, np.flatnonzero(~guide.allowed)[-1].item()))
        guide.advance(token)
    return places[len(places) // 2]


def check_verbs(session: Session, schema: dict[str, Any], settings_: SamplingParams) -> None:
    """A turn that was cancelled in the middle of its JSON is continued, forked and replayed within its grammar."""
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
    with pytest.raises(InvalidArgument, match=f"forbids the start of the answer, at token {n_cut}"):
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
    """Recomputing evicted KV does not advance the grammar a second time."""
    n_bytes = 8 * page_bytes(DType.F16, kv_layers(2, 2, 6))
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
