"""Tools: definitions, their text in the prompt, the constraint of calls, and the parser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from fabula import Constraint, InvalidArgument, Model, SamplingParams
from fabula.engine.grammar import Guide
from fabula.sessions.tool_call_parser import CLOSE, OPEN, Arguments, CallEnded, CallStarted, Content, Event
from fabula.sessions.tools import (
    MAX_TOOLS,
    ToolCall,
    ToolCallParser,
    call_text,
    parse_tool_calls,
    tool_constraint,
    tools_of,
    with_tools,
)
from fabula.text.template import ChatTemplate
from fabula.text.tokenizer import Tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"name": {"type": "string", "minLength": 2, "maxLength": 8}},
        },
    },
}
PICK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "pick-one",
        "parameters": {
            "type": "object",
            "properties": {"color": {"$ref": "#/$defs/name"}},
            "required": ["color"],
            "additionalProperties": False,
            "$defs": {"name": {"enum": ["red", "green"]}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, PICK, TIME]
NAMED = {"type": "function", "function": {"name": "pick-one"}}

# The part of Qwen's templates that matters here.
KNOWING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    '{% for call in m.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}{% endfor %}'
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAST: list[dict[str, Any]] = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function",
         "function": {"name": "get_weather", "arguments": '{"city": "Rome", "days": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": ""}},
    ]},
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "noon"}]},
    {"role": "assistant", "content": "It is sunny.", "tool_calls": None},
    {"role": "user", "content": "Thanks"},
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2_model(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.load(smollm2_gguf, context=1024) as loaded:
        yield loaded


def valid(call: ToolCall) -> bool:
    """Whether a call's arguments satisfy the schema of its tool."""
    value = json.loads(call.arguments)
    if call.name == "get_weather":
        good = isinstance(value["city"], str) and 2 <= len(value["city"]) <= 8
        return good and type(value["days"]) is int and 1 <= value["days"] <= 9 and value.keys() == {"city", "days"}
    if call.name == "pick-one":
        return value in ({"color": "red"}, {"color": "green"})
    return call.name == "now" and value == {}


# ---- Definitions ------------------------------------------------------------------------------------------------


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | changes}


def test_definitions() -> None:
    known = tools_of(TOOLS)
    assert [tool.name for tool in known] == ["get_weather", "pick-one", "now"]
    assert known[0].to_json() == WEATHER
    assert known[2].parameters == {"type": "object", "properties": {}, "additionalProperties": False}
    assert tools_of([function(name="a" * 128, parameters={}, strict=True, description=None)])[0].strict
    assert len(tools_of([function(name=f"f{i}") for i in range(MAX_TOOLS)])) == MAX_TOOLS


@pytest.mark.parametrize(
    ("definitions", "where"),
    [
        ("tools", "tools must be a list"),
        ({"type": "function"}, "tools must be a list"),
        ([function(name=f"f{i}") for i in range(MAX_TOOLS + 1)], "129 definitions"),
        ([TIME, 5], r"tools\[1\] must"),
        ([{"type": "retrieval"}], r"tools\[0\].type"),
        ([{"function": {"name": "f"}}], r"tools\[0\].type"),
        ([{"type": "function", "name": "f"}], r"tools\[0\].function must"),
        ([TIME, WEATHER, function(name="")], r"tools\[2\].function.name"),
        ([function(name="a" * 129)], r"tools\[0\].function.name"),
        ([function(name='f"')], r"tools\[0\].function.name"),
        ([function(name="f\n")], r"tools\[0\].function.name"),
        ([function(name=7)], r"tools\[0\].function.name"),
        ([TIME, WEATHER, TIME], r"tools\[2\].function.name is 'now' a second time"),
        ([function(description=5)], r"tools\[0\].function.description"),
        ([function(strict="yes")], r"tools\[0\].function.strict"),
        ([function(parameters=[])], r"tools\[0\].function.parameters"),
        ([function(parameters={"type": "string"})], r"tools\[0\].function.parameters"),
        ([function(parameters={"const": float("inf")})], r"tools\[0\].function.parameters is not JSON"),
    ],
)
def test_bad_definitions(definitions: Any, where: str) -> None:
    with pytest.raises(InvalidArgument, match=where):
        tools_of(definitions)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice is 'any'"),
        (5, "tool_choice is 5"),
        ({"type": "tool"}, "tool_choice"),
        ({"type": "function", "function": {"name": "fly"}}, "'fly', which is none"),
        ({"type": "function", "name": "fly"}, "'fly', which is none"),
        ({"type": "function", "function": 5}, "None, which is none"),
    ],
)
def test_bad_choices(choice: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        tool_constraint(TOOLS, choice)


def test_nothing_to_hold_to() -> None:
    assert tool_constraint(TOOLS, "none") is None
    assert tool_constraint([], "auto") is None
    assert tool_constraint([], None) is None
    with pytest.raises(InvalidArgument, match="there are no tools"):
        tool_constraint([], "required")


# ---- Telling ----------------------------------------------------------------------------------------------------


def test_a_template_that_knows_tools() -> None:
    messages, options = with_tools(PAST, TOOLS, ChatTemplate(KNOWING))
    assert options == {"tools": [tool.to_json() for tool in tools_of(TOOLS)]}
    text = ChatTemplate(KNOWING).render(messages, **options)
    assert json.dumps(options["tools"]) in text
    assert (
        '[assistant]<tool_call>{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>[tool]sunny'
    ) in text
    assert with_tools(PAST, [], ChatTemplate(KNOWING)) == (messages, {})


@pytest.mark.parametrize("source", [tiny.CHATML, "{# tools, <tool_call> #}" + tiny.CHATML,
                                    "{% if tools %}{% endif %}" + tiny.CHATML])  # fmt: skip
def test_a_template_that_does_not(source: str) -> None:
    messages, options = with_tools(PAST, TOOLS, ChatTemplate(source))
    assert options == {}
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    system = messages[0]["content"]
    listed = system.split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line) for line in listed.splitlines()] == [tool.to_json() for tool in tools_of(TOOLS)]
    assert messages[2] == {
        "role": "assistant",
        "content": call_text("get_weather", {"city": "Rome", "days": 1}) + "\n" + call_text("now", {}),
    }
    assert parse_tool_calls(messages[2]["content"])[1][0] == ToolCall("get_weather", '{"city": "Rome", "days": 1}')
    assert messages[3]["content"] == (
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    )
    assert ChatTemplate(source).render(messages)
    assert PAST[1]["content"] is None  # left as it was


def test_a_system_message_is_kept() -> None:
    given_ = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    messages, _ = with_tools(given_, [TIME], ChatTemplate(tiny.CHATML))
    assert messages[0]["content"].startswith("Be brief.\n\nYou may call functions")
    assert with_tools(given_, [], ChatTemplate(tiny.CHATML)) == (given_, {})
    messages, _ = with_tools([{"role": "tool", "content": "5"}], [], ChatTemplate(tiny.CHATML))
    assert messages == [{"role": "user", "content": "<tool_response>\n5\n</tool_response>"}]


@pytest.mark.parametrize(
    ("calls", "where"),
    [
        ("now", r"messages\[0\].tool_calls must"),
        ([5], r"messages\[0\].tool_calls\[0\].function must"),
        ([{"function": {"name": "f g"}}], r"messages\[0\].tool_calls\[0\].function.name"),
        ([{"function": {"name": "f", "arguments": "{"}}], r"messages\[0\].tool_calls\[0\].function.arguments"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], r"messages\[0\].tool_calls\[0\].function.arguments"),
    ],
)
def test_bad_calls(calls: Any, where: str) -> None:
    with pytest.raises(InvalidArgument, match=where):
        with_tools([{"role": "assistant", "content": "", "tool_calls": calls}], [], ChatTemplate(tiny.CHATML))


def test_what_a_template_reads() -> None:
    template = ChatTemplate("{% set a = 1 %}{% for m in messages %}{{ m.tools }}{{ a }}{{ bos_token }}{% endfor %}")
    assert template.reads("messages")
    assert template.reads("bos_token")
    assert not template.reads("tools")
    assert not template.reads("a")


# ---- Holding ----------------------------------------------------------------------------------------------------


def accepted(tokenizer: Tokenizer, constraint: Constraint, text: str) -> Guide | None:
    """The guide after a text; None if the constraint forbids it."""
    try:
        return Guide(tokenizer, tokenizer.vocab_size, constraint, tokenizer.encode(text, add_bos=False))
    except InvalidArgument as error:
        assert "forbids" in str(error)
        return None


ROME = call_text("get_weather", {"city": "Rome", "days": 1})
RED = '<tool_call>{"name": "pick-one", "arguments": {"color":"red"}}</tool_call>'
WRONG = [
    ROME.replace("Rome", "R"), ROME.replace("1", "0"), RED.replace("red", "blue"), RED.replace("pick-one", "fly"),
    ROME.replace(', "days": 1', ""),
]  # fmt: skip


@pytest.mark.parametrize("parallel", [True, False])
def test_auto(parallel: bool, loaded_tiny: Model) -> None:
    constraint = tool_constraint(TOOLS, "auto", parallel)
    assert constraint is not None
    tokenizer = loaded_tiny.tokenizer
    for text in ("", "hello", "a < b <tool <tool_cal", "</tool_call>", "é"):
        guide = accepted(tokenizer, constraint, text)
        assert guide is not None
        assert guide.may_end
        assert not guide.is_complete
    begun = accepted(tokenizer, constraint, "I look. <tool_call>")
    assert begun is not None
    assert not begun.may_end
    for call in (ROME, RED, "Well. " + ROME):
        guide = accepted(tokenizer, constraint, call)
        assert guide is not None
        assert guide.may_end
        assert guide.is_complete is not parallel
        assert (accepted(tokenizer, constraint, call + "\n" + RED + " bye") is not None) is parallel
    for wrong in WRONG:
        assert accepted(tokenizer, constraint, "x " + wrong) is None


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", NAMED, {"type": "function", "name": "pick-one"}])
def test_required(parallel: bool, choice: Any, loaded_tiny: Model) -> None:
    constraint = tool_constraint(TOOLS, choice, parallel)
    assert constraint is not None
    tokenizer = loaded_tiny.tokenizer
    assert accepted(tokenizer, constraint, "hello") is None
    guide = accepted(tokenizer, constraint, RED)
    assert guide is not None
    assert guide.may_end
    assert guide.is_complete is not parallel
    assert (accepted(tokenizer, constraint, f"{RED}\n{RED}") is not None) is parallel
    assert (accepted(tokenizer, constraint, ROME) is not None) is (choice == "required")
    for wrong in WRONG:
        assert accepted(tokenizer, constraint, wrong) is None


def test_strict(loaded_tiny: Model) -> None:
    """A keyword that cannot be enforced is ignored, unless the tool is strict."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    loose = tool_constraint([function(parameters=schema)], "required")
    assert loose is not None
    assert accepted(loaded_tiny.tokenizer, loose, '<tool_call>{"name": "f", "arguments": {"a": [1, 1]}}</tool_call>')
    with pytest.raises(InvalidArgument, match=r"^tools\[1\]\.function\.parameters\.properties\.a.*uniqueItems"):
        tool_constraint([TIME, function(parameters=schema, strict=True)], "required")


def test_many_tools(loaded_tiny: Model) -> None:
    many = [function(name=f"f{i}", parameters={"type": "object", "properties": {"x": {"type": "integer"}},
                                               "required": ["x"]}) for i in range(MAX_TOOLS)]  # fmt: skip
    constraint = tool_constraint(many, "required", False)
    assert constraint is not None
    guide = accepted(loaded_tiny.tokenizer, constraint, call_text("f101", {"x": 5}))
    assert guide is not None
    assert guide.is_complete


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_random_weights_call_tools(seed: int, choice: Any, tiny_model: Model) -> None:
    constraint = tool_constraint(TOOLS, choice, False)
    generation = tiny_model.generate("hello", SamplingParams(constraint=constraint, seed=seed, max_tokens=500))
    content, calls = parse_tool_calls(generation.text())
    assert (content, len(calls), generation.finish_reason) == ("", 1, "stop")
    assert valid(calls[0])


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_real_model_calls_tools(choice: Any, temperature: float, smollm2_model: Model) -> None:
    template = smollm2_model.tokenizer.make_template(smollm2_model.tokenizer.chat_template or "")
    said = [{"role": "user", "content": "What is the weather in Rome for the next 3 days?"}]
    messages, options = with_tools(said, TOOLS, template)
    prompt = smollm2_model.tokenizer.encode_chat(template, messages, **options)
    settings = SamplingParams(
        constraint=tool_constraint(TOOLS, choice, False), temperature=temperature, seed=4, max_tokens=100
    )
    generation = smollm2_model.generate(prompt, settings)
    content, calls = parse_tool_calls(generation.text())
    if choice == "auto":
        assert content or calls
    else:
        assert (content, len(calls), generation.finish_reason) == ("", 1, "stop")
        assert choice == "required" or calls[0].name == "pick-one"
    assert all(valid(call) for call in calls)


# ---- Reading ----------------------------------------------------------------------------------------------------


def read(pieces: list[str]) -> list[Event]:
    """Events of a streamed text, consecutive ones of a kind joined."""
    parser = ToolCallParser()
    events: list[Event] = []
    for event in [*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()]:
        last = events[-1] if events else None
        if isinstance(event, Content) and isinstance(last, Content):
            events[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            events[-1] = Arguments(event.index, last.text + event.text)
        else:
            events.append(event)
    return events


def test_reading() -> None:
    other = '<tool_call>{"arguments": "{\\"color\\": \\"red\\"}", "name": "pick-one"}</tool_call>'
    text = f"Let me see. {ROME}\n{RED} So.\n{other}\n"
    content, calls = parse_tool_calls(text)
    assert content == "Let me see. So."
    assert calls == [
        ToolCall("get_weather", '{"city": "Rome", "days": 1}'),
        ToolCall("pick-one", '{"color":"red"}'),
        ToolCall("pick-one", '{"color": "red"}'),
    ]
    assert read([text])[:5] == [
        Content("Let me see. "),
        CallStarted(0, "get_weather"),
        Arguments(0, '{"city": "Rome", "days": 1}'),
        CallEnded(0, True, ROME),
        CallStarted(1, "pick-one"),
    ]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("hello", 0),
        ("", 0),
        (" \n", 0),
        (OPEN, 0),
        (CLOSE, 0),
        ("a <tool_cal", 0),
        (OPEN + CLOSE, 0),
        (OPEN + "hello" + CLOSE, 0),
        (OPEN + '{"name": "f"' + CLOSE, 0),
        (OPEN + '{"name": "f g", "arguments": {}}' + CLOSE, 0),
        (OPEN + '{"name": 5, "arguments": {}}' + CLOSE, 0),
        (OPEN + '{"name": "f", "arguments": [1]}' + CLOSE, 0),
        (OPEN + '{"name": "f", "arguments": ' + "[" * 100_000 + CLOSE, 0),
        (OPEN + " " * 500 + "x", 0),
        (OPEN + '{"name": "f"}' + CLOSE, 1),
        (OPEN + '{"name": "f", "arguments": {}}', 1),
        (OPEN + '{"name": "f", "arguments": {}}</tool_c', 1),
        (OPEN + '{"name": "f", "arguments": {}, "id": 7}' + CLOSE, 1),
        (OPEN + '{"name": "f", "arguments": {"x": "</tool_call>{\\"}"}}' + CLOSE, 1),
        (OPEN + '{"name": "f", "arguments": {"x": "\\\\"}}' + CLOSE, 1),
        (OPEN + " " * 500 + '{"name": "f", "arguments": {}}' + CLOSE, 1),
        (OPEN + OPEN + '{"name": "f", "arguments": {}}' + CLOSE, 0),
        (RED + RED, 2),
        (RED + OPEN + "x" + CLOSE + RED, 2),
    ],
)
def test_malformed_calls_are_content(text: str, calls: int) -> None:
    content, found = parse_tool_calls(text)
    assert len(found) == calls
    if not calls:
        assert content == text
    for size in (1, 3, 7):  # however it arrives
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert read(pieces) == read([text])


@pytest.mark.parametrize(
    "arguments", ["{x: 1}}" + CLOSE, '{"x": 1' + CLOSE, '{"x": "' + CLOSE, '{"a": 1', '{"a":{"a":' * 3000]
)
def test_a_call_that_has_said_its_name_is_a_call(arguments: str) -> None:
    """The stream has emitted it already, and the whole answer has the same."""
    content, calls = parse_tool_calls("a " + OPEN + '{"name": "f", "arguments": ' + arguments)
    assert content == "a"
    assert [(call.name, call.is_whole) for call in calls] == [("f", False)]
    assert arguments.startswith(calls[0].arguments)


PARTS = st.sampled_from(
    [ROME, RED, OPEN, CLOSE, "<", "<tool", "call>", "\n", " ", "x", "{", "}", '"', "\\", '{"name": "f", "arguments": {']
)


@given(st.lists(PARTS, max_size=8).map("".join), st.lists(st.integers(1, 30), min_size=1, max_size=30))
def test_pieces_may_break_anywhere(text: str, sizes: list[int]) -> None:
    pieces, start = [], 0
    while start < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[start : start + size])
        start += size
    assert read(pieces) == read([text])
    content, calls = parse_tool_calls(text)
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls if call.is_whole)
    assert calls or content == text


@given(st.lists(st.sampled_from(["<", "<tool", "_call", "x", " "]), max_size=12).map("".join))
def test_no_half_tag_is_content(text: str) -> None:
    """What is given out is everything but the longest end that may still become a tag."""
    parser, out = ToolCallParser(), ""
    for i, character in enumerate(text):
        out += "".join(event.text for event in parser.feed(character) if isinstance(event, Content))
        so_far = text[: i + 1]
        n_held = max(n for n in range(len(OPEN)) if so_far.endswith(OPEN[:n]))
        assert out == so_far[: len(so_far) - n_held]
