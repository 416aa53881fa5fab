"""Turns that are made of messages and template options: tools, their results, and what both must never change."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import tiny
from fabula import ContextOverflow, InvalidArgument, Model, SamplingParams, Session, TemplateError, Turn, Workspace
from fabula.engine.constraint import Constraint
from fabula.engine.generation import Generation
from fabula.sessions.tools import with_tools
from fabula.store.schema import turns as turns_table

# Answers are plain ASCII without an end, so that a prompt can be compared as text with what the template renders.
SHORT = SamplingParams(temperature=1.0, max_tokens=9, seed=11, banned_tokens=(0, 1, 2, 3, *range(6, 12)))
TOOLS = [{"type": "function", "function": {"name": "now", "description": "the time", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "now", "arguments": {"zone": "x"}}}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "now", "content": "12:00"}
CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

# As Qwen's: tools in the system message, calls and results in tags.
HERMES = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif not (loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}{{ ' ' ~ m.name if m.name }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if hint %}{{ hint }}{% endif %}{% endif %}"
)
# As Mistral's: strict about whose turn it is, where an answer with calls does not count.
STRICT = (
    "{% set ns = namespace(i=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}" + HERMES
)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tiny.write_model(tmp_path_factory.mktemp("hermes") / "m", template=HERMES)
    with Model.load(folder, threads=1) as model:
        yield model


@pytest.fixture
def model(tiny_model: Model) -> Model:
    return tiny_model


def alone(model: Model, turn: Turn) -> list[int]:
    """The answer of a turn from scratch."""
    assert turn.params is not None
    model.clear_cache()
    generation = Generation(model._engine, prompt_of(turn), turn.params, begun=turn.token_ids[: turn.n_begun])
    generation.text()
    return generation.token_ids


def prompt_of(turn: Turn) -> list[int]:
    return turn.ids()[: turn.n_ids - len(turn.token_ids)]


def say(session: Session, said: Any, **more: Any) -> Turn:
    session.say(said, more.pop("params", SHORT), **more).text()
    return session.head


def rendered(model: Model, messages: list[Any], **options: Any) -> str:
    """The conversation as the template renders it, with tools in the form that it takes."""
    messages, more = with_tools(messages, options.pop("tools", ()), model.template)
    return model.template.render(messages, **options, **more)


def shown(model: Model, turn: Turn) -> str:
    return model.tokenizer.decode(prompt_of(turn), skip_special=False)


def calling(*, ends: bool = True) -> SamplingParams:
    """Settings under which the model can only call the tool; whether it says that this is the end."""
    text = '<tool_call>\n{"name": "now", "arguments": {"zone": "x"}}\n</tool_call>'
    constraint = Constraint.lark(f"start: {json.dumps(text)}" + (' "!"?' if ends else ""))
    return SamplingParams(temperature=1.0, seed=3, constraint=constraint, logit_bias={3: 100.0})


# ---- Plain text is what it was --------------------------------------------------------------------------------------


def test_plain_text_is_kept_as_ever(tmp_path: Path, tiny_folder: Path) -> None:
    with Workspace(tmp_path) as workspace:
        workspace.load(tiny_folder, name="tiny", threads=1)
        session = workspace.session("a", system="s")
        say(session, "hello")
        say(session, [{"role": "user", "content": "more"}])
        exported = session.export()
        assert exported["settings"].keys() == {"system", "params", "policy", "vocabulary"}
        assert all("said" not in row for row in exported["turns"]) and exported["version"] == 1
        with workspace._keeper.store._engine.connect() as connection:
            assert set(connection.scalars(sa.select(turns_table.c.said))) == {None}
        twin = workspace.session("b", system="s")
        for text, turn in zip(("hello", "more"), session.path, strict=True):
            assert say(twin, text).ids() == turn.ids()
        assert [turn.said for turn in twin.path] == [turn.said for turn in session.path]
        assert session.head.to_json()["messages"] is None and session.head.to_json()["template_options"] == {}
        del session, twin, turn


# ---- Messages -------------------------------------------------------------------------------------------------------

MIDDLE: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it", "name": "ann"},
    {"role": "developer", "content": "now"},
]


@pytest.mark.parametrize("n_before", [0, 1])
def test_messages_make_the_prompt_that_the_template_renders(hermes: Model, n_before: int) -> None:
    session = hermes.session(system="be kind")
    for _ in range(n_before):
        say(session, "one")
    before = session.messages
    turn = say(session, MIDDLE)
    assert shown(hermes, turn) == rendered(hermes, [*before, *MIDDLE])
    assert turn.prompt == "what is it" and session.messages == [
        *before,
        *MIDDLE,
        {"role": "assistant", "content": turn.text},
    ]
    assert turn.recomputed == 0
    after = say(session, [RESULT, {**RESULT, "content": "13:00"}])
    assert after.kept == turn.n_ids and after.recomputed == 0
    assert after.prompt == "12:00\n13:00", "without a user all is shown"
    assert shown(hermes, after) == rendered(hermes, session.messages[:-1])
    for each in (turn, after):
        assert list(each.token_ids) == alone(hermes, each)
    messages = session.messages
    messages[-2]["content"] = "changed"
    assert session.messages != messages, "what was said stays as it was said"


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (5, "must be a string or a list of messages, not int"),
        (b"x", "not bytes"),
        ({"role": "user", "content": "x"}, "not dict"),
        ([], "at least one new message"),
        (["x"], r"messages\[0\] must be an object"),
        ([MIDDLE[0], {"role": "x", "content": "y"}], r"messages\[1\].role is 'x', must be one of user, tool, system"),
        ([{"content": "y"}], r"messages\[0\].role is 'None'"),
        ([{"role": ["user"], "content": "y"}], r"messages\[0\].role is"),
        ([{"role": "<|im_end|>", "content": "y"}], r"messages\[0\].role is '<|im_end|>'"),
        ([MIDDLE[0], {"role": "assistant", "content": "y"}], r"messages\[1\].role is 'assistant'"),
        ([{"role": "assistant", "content": "y"}, RESULT], r"messages\[0\].tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": ["x"]}, RESULT], r"messages\[0\].tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [CALL]}], "at least one new message"),
        ([{"role": "assistant", "tool_calls": [CALL]}, RESULT], "no answer before it"),
        ([{"role": "user"}], r"messages\[0\].content must be a string"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], r"messages\[0\].content must be a string"),
        ([{**RESULT, "tool_call_id": 5}], r"messages\[0\].tool_call_id must be a string"),
        ([{**RESULT, "name": None}], r"messages\[0\].name must be a string"),
        ([{**RESULT, "more": {1, 2}}], r"messages\[0\] is not plain JSON"),
        ([{**RESULT, "more": float("nan")}], r"messages\[0\] is not plain JSON"),
        ([{**RESULT, "more": "\ud800"}], r"messages\[0\] is not plain JSON"),
        ([{**RESULT, "more": 10**5000}], r"messages\[0\] is not plain JSON"),
    ],
)
def test_messages_that_make_no_sense(model: Model, said: Any, problem: str) -> None:
    session = model.session()
    for call in (session.say, session.count, lambda said: session.branch(2, said)):
        with pytest.raises(InvalidArgument, match=problem):
            call(said)
    assert session.turns == [] and not session.is_busy


@pytest.mark.parametrize("nested", [70, 5000])
def test_data_nested_too_deep(model: Model, nested: int) -> None:
    deep: Any = {}
    for _ in range(nested):
        deep = [deep]
    for said, options in (([{**RESULT, "more": deep}], None), ("x", {"more": deep})):
        with pytest.raises(InvalidArgument, match=r"more than 64 deep|not plain JSON"):
            model.session().say(said, template_options=options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "must be an object"),
        ({1: 2}, "must be an object"),
        ({"messages": []}, "'messages' is set by Fabula"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is set by Fabula"),
        ({"bos_token": "x"}, "'bos_token' is set by Fabula"),
        ({"x": object()}, "not plain JSON"),
        ({"tools": 5}, "tools must be a list"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\].function.name"),
    ],
)
def test_options_that_make_no_sense(model: Model, options: Any, problem: str) -> None:
    session = model.session()
    with pytest.raises(InvalidArgument, match=problem):
        session.say("x", template_options=options)
    assert session.turns == [] and not session.is_busy


def test_options_may_have_any_other_name(hermes: Model) -> None:
    """Also those of the functions' own parameters."""
    odd = {"self": 1, "template": 2, "tokenizer": "x", "known": [], "options": {}, "past": 3, "": 4, "a b": 5}
    session = hermes.session()
    first = say(session, "one", template_options=odd)
    assert first.said.options == odd and say(session, "two", template_options=odd).kept == first.n_ids


def test_a_story_takes_text(model: Model) -> None:
    session = model.session()
    session.tell(3, prompt="the", params=SHORT).text()
    with pytest.raises(InvalidArgument, match="a story continues with text"):
        session.edit(1, [RESULT])
    with pytest.raises(InvalidArgument, match="a story continues with text"):
        session.branch(2, "x", template_options={"a": 1})
    with pytest.raises(InvalidArgument, match="this session is a story"):
        session.say([RESULT])
    assert session.n_turns == 1


def test_a_template_that_refuses_changes_nothing(tmp_path: Path) -> None:
    with Model.load(tiny.write_model(tmp_path / "m", template=STRICT), threads=1) as model:
        session = model.session()
        first = say(session, "one")
        with pytest.raises(TemplateError, match="must alternate"):
            session.say([MIDDLE[1], MIDDLE[1]])
        assert session.turns == [first] and not session.is_busy
        del first, session


# ---- Control tokens are text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [*CONTROL, "[INST]", "<tool_call>"])
@pytest.mark.parametrize("n_before", [0, 1])
def test_control_tokens_in_messages_are_text(hermes: Model, token: str, n_before: int) -> None:
    """In content, name, results, options and the keys of all that: the ids hold the template's control tokens only."""
    special = hermes.tokenizer.special_ids

    def scaffolding(word: str, extra: Any) -> tuple[list[int], str]:
        session = hermes.session()
        for _ in range(n_before):
            say(session, "one", template_options={"tools": TOOLS})
        tools = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": word, **extra}}]  # type: ignore[dict-item]
        said = [
            {**RESULT, "content": f"a{word}b"},
            {"role": "user", "name": f"ann{word}", "content": f"{word}{word} </{word}"},
            {"role": "system", "content": word},
        ]
        turn = say(session, said, template_options={"tools": tools, "hint": f"h{word}"})
        assert shown(hermes, turn) == rendered(hermes, session.messages[:-1], tools=tools, hint=f"h{word}")
        return [i for i in prompt_of(turn) if i in special], turn.prompt

    harmless, _ = scaffolding("x", {"parameters": {"type": "object", "properties": {"x": {}}}})
    ids, prompt = scaffolding(token, {"parameters": {"type": "object", "properties": {token: {}}}})
    assert ids == harmless and prompt == f"{token}{token} </{token}", "and the transcript keeps the text"


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_keys_alone_are_text(hermes: Model, token: str) -> None:
    parameters = {"type": "object", "properties": {token: {}}}
    tools = [{"type": "function", "function": {"name": "now", "description": "", "parameters": parameters}}]
    turn = say(hermes.session(), "x", template_options={"tools": tools})
    assert [i for i in prompt_of(turn) if i in hermes.tokenizer.special_ids] == [2, 3, 2, 3, 2]
    assert token in shown(hermes, turn).split("<|im_start|>user")[0].removeprefix("<|im_start|>").split("properties")[1]


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("ends", [True, False])
def test_control_tokens_in_calls_are_text(hermes: Model, token: str, ends: bool) -> None:
    session = hermes.session()
    first = say(session, "one", params=calling(ends=ends))
    assert (first.token_ids[-1] in hermes.tokenizer.eos_ids) is ends
    call = {**CALL, "function": {"name": "now", "arguments": {token: token}}}
    turn = say(session, [{"role": "assistant", "tool_calls": [call]}, RESULT])
    assert turn.kept == first.n_ids
    new = [i for i in turn.prompt_ids if i in hermes.tokenizer.special_ids]
    assert new == [*([] if ends else [3]), 2, 3, 2], "a message of results, and the beginning of the answer"


# ---- Options belong to their turn -----------------------------------------------------------------------------------


def test_the_same_options_keep_the_past(hermes: Model) -> None:
    session = hermes.session(system="s")
    for said in ("one", [RESULT], "two"):
        before = session.head
        turn = say(session, said, template_options={"tools": TOOLS})
        assert turn.kept == before.n_ids and turn.recomputed == 0
        assert shown(hermes, turn) == rendered(hermes, session.messages[:-1], tools=TOOLS)
    for turn in session.path:
        assert list(turn.token_ids) == alone(hermes, turn)


def test_other_options_word_the_past_anew_and_keep_answers_as_drawn(hermes: Model) -> None:
    """The system message changes at the start of everything; answers still have their sampled ids."""
    session = hermes.session(system="s")
    drawn = replace(SHORT, temperature=3.0)
    turns = [say(session, "one", params=drawn), say(session, "two", params=drawn)]
    for options in ({"tools": TOOLS}, {}, {"tools": TOOLS}):
        turn = say(session, "three", params=drawn, template_options=options)
        prompt, place = prompt_of(turn), 0
        assert shown(hermes, turn) == rendered(hermes, session.messages[:-1], **options)
        for past in turns:
            ids = list(past.token_ids)
            place = next(i for i in range(place, len(prompt)) if prompt[i : i + len(ids)] == ids) + len(ids)
        assert turn.kept < turns[-1].n_ids and list(turn.token_ids) == alone(hermes, turn)
        turns.append(turn)


def test_options_that_change_nothing_of_the_past_cost_nothing(hermes: Model) -> None:
    session = hermes.session()
    first = say(session, "one", template_options={"unread": 1})
    second = say(session, "two", template_options={"unread": 2})
    third = say(session, "three", template_options={"hint": "<think>"})
    assert (second.kept, third.kept) == (first.n_ids, second.n_ids)
    assert shown(hermes, third).endswith("<|im_start|>assistant\n<think>")
    fourth = say(session, "four")
    assert fourth.kept < third.n_ids, "the template does not repeat the hint"
    assert shown(hermes, fourth) == rendered(hermes, session.messages[:-1])


# ---- Answers that call tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [HERMES, STRICT, tiny.CHATML], ids=["hermes", "strict", "knows no tools"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_conversation_with_tools(tmp_path: Path, template: str, ends: bool) -> None:
    """The answer with a call keeps its sampled ids, although the template formats the call differently."""
    with Model.load(tiny.write_model(tmp_path / "m", template=template), threads=1) as model:
        session = model.session(system="s")
        options = {"tools": TOOLS}
        first = say(session, "what time is it", params=calling(ends=ends), template_options=options)
        assert "<tool_call>" in first.text and first.finish_reason == "stop"
        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        second = say(session, [called, RESULT], template_options=options)
        third = say(session, "and then", template_options=options)
        assert second.kept == first.n_ids and third.kept == second.n_ids
        assert third.recomputed == second.recomputed == 0
        assert [m["role"] for m in session.messages] == [
            "system", "user", "assistant", "tool", "assistant", "user", "assistant",
        ]  # fmt: skip
        assert session.messages[2] == called and session.messages[3] == RESULT
        assert shown(model, third) == rendered(model, session.messages[:-1], tools=TOOLS)
        for turn in (first, second, third):
            assert list(turn.token_ids) == alone(model, turn)
        session.regenerate(SHORT).text()
        assert session.head.ids() == third.ids()
        del first, second, third, turn, session


def test_a_call_that_was_cut_off_or_ends_otherwise(hermes: Model) -> None:
    """Without its end token the template's own comes first; the sampled ids stay."""
    session = hermes.session()
    first = say(session, "one", params=replace(calling(), max_tokens=20))
    assert first.finish_reason == "length"
    second = say(session, [{"role": "assistant", "tool_calls": [CALL]}, RESULT])
    assert second.kept == first.n_ids
    tail = hermes.tokenizer.decode(second.prompt_ids, skip_special=False)
    assert tail.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>\n12:00")


def test_a_result_stays_with_its_call_when_turns_are_left_out(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m", template=STRICT)
    with Model.load(folder, threads=1, context=300) as model:
        session = model.session(system="s", context_policy="drop_oldest_turns")
        called = {"role": "assistant", "tool_calls": [CALL]}
        n_cuts = 0
        for i in range(8):
            for said in (f"word{i}", [called, {**RESULT, "content": f"result{i}"}]):
                turn = say(session, said, params=calling() if isinstance(said, str) else SHORT)
                n_left = turn.cut.n_turns if turn.cut else 0
                seen, n_seen = shown(model, turn), turn.number - n_left
                n_cuts += turn.cut is not None
                assert n_left % 2 == 0 and n_seen > 0, "two by two"
                assert ("result" in seen) <= ("<tool_call>" in seen)
                assert [f"word{k}" in seen for k in range(i + 1)] == [2 * k >= n_left for k in range(i + 1)]
                assert list(turn.token_ids) == alone(model, turn)
                for past in session.path[n_left:-1]:
                    ids, prompt = list(past.token_ids), prompt_of(turn)
                    assert any(prompt[k : k + len(ids)] == ids for k in range(len(prompt))), "as it was drawn"
        assert n_cuts > 4
        head = session.head
        say(session, "go", params=calling())
        with pytest.raises(ContextOverflow):
            session.say([called, {**RESULT, "content": "long " * 40}])
        assert session.head.parent is head
        del session, turn, head, past


# ---- It is kept -----------------------------------------------------------------------------------------------------


def spoken(session: Session) -> list[Any]:
    return [(t.number, t.said, t.prompt, t.text, t.ids(), t.to_json()["messages"], t.tags) for t in session.turns]


def test_messages_survive_a_restart_and_a_journey(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m", template=HERMES)
    options = {"tools": TOOLS, "deep": {"b": [1, None, True, 2.5], "a": "ä\0"}}
    with Workspace(tmp_path / "data") as workspace:
        workspace.load(folder, name="tiny", threads=1)
        session = workspace.session("a", system="s", title="Letters")
        first = say(session, [*MIDDLE, RESULT], template_options=options)
        second = say(session, "two", template_options=options)
        session.regenerate(SHORT).text()
        assert session.head.said == second.said
        session.edit(2, [RESULT], SHORT).text()
        assert session.head.said.options == options and session.head.said.given == (RESULT,)
        session.edit(2, "x", SHORT, template_options={}).text()
        assert session.head.said.to_json() is None
        session.replay(second).text()
        assert session.head.ids() == second.ids() and session.head.said == second.said
        for reply in session.branch(2):
            reply.text()
        assert session.turns[-1].said == second.said
        for reply in session.branch(2, [RESULT], SHORT, template_options=options):
            reply.text()
        assert session.turns[-1].parent is session.head and session.turns[-1].said.options == options
        session.continue_(3).text()
        session.fork_at(first, 2, 40, SHORT).text()
        assert session.head.said == first.said
        session.say("cut", replace(SHORT, max_tokens=300), template_options=options).cancel()
        before, exported = spoken(session), json.loads(json.dumps(session.export()))
        fork = session.fork(first, id="f")
        assert fork.messages[-1] == {"role": "assistant", "content": first.text} and fork.title == "Letters"
        del session, fork, first, second, reply
    gc.collect()
    with Workspace(tmp_path / "data") as workspace:
        workspace.load(folder, name="tiny", threads=1)
        back, travelled = workspace.open("a"), workspace.import_(exported, id="b")
        assert spoken(back) == spoken(travelled) == before and back.title == travelled.title == "Letters"
        assert workspace.open("f").head.said.options == options
        assert workspace._keeper.store.check() == []
        for session in (back, travelled):
            first, second, *_ = session.turns
            session.rollback(first)
            turn = say(session, "two", template_options=options)
            assert turn.kept == first.n_ids and turn.token_ids == second.token_ids
        del back, travelled, session, turn, first, second


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"other": 1},
        {"messages": []},
        {"messages": [{"role": "x", "content": "y"}]},
        {"messages": [{"role": "tool", "content": "another text"}]},
        {"options": {"messages": 1}},
        {"options": []},
        [],
    ],
)
def test_exports_that_say_nonsense(model: Model, said: Any) -> None:
    session = model.session()
    say(session, [RESULT])
    data = session.export()
    assert data["turns"][0]["said"] == {"messages": [RESULT]}
    data["turns"][0]["said"] = said
    if said == {}:  # says nothing else
        assert model.import_(data, id="x").head.said.to_json() is None
    else:
        with pytest.raises(InvalidArgument, match="turn 0 of the exported session"):
            model.import_(data, id="x")
