"""Requests as clients and other servers write them: one case for each thing that is understood below /v1."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import ValidationError

from fabula import Constraint, SamplingParams
from fabula.errors import InvalidArgument
from fabula.server import Settings
from fabula.server.failures import ApiError
from fabula.server.limits import Limits
from fabula.server.openai import dialects
from fabula.server.openai.messages import plain_messages
from fabula.server.openai.params import chat_params, completion_params, response_params, wish_of
from fabula.server.openai.schemas import ChatCompletionBody, CompletionBody, ResponseBody
from fabula.server.paths import canonical, nearest
from fabula.server.reasoning import Wish
from fabula.sessions.call_events import gathered
from fabula.sessions.tool_call_parser import parse_tool_calls, parser_of
from fabula.sessions.tool_forms import FORMS, MAX_NAME, ToolForm
from fabula.sessions.tools import tools_of

USER = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LENIENT = {**SCHEMA, "x-guidance": {"lenient": True}}
JSON = Constraint.json_schema(LENIENT)
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def chat(**fields: Any) -> ChatCompletionBody:
    return ChatCompletionBody.model_validate({"messages": USER} | fields)


SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"repeat_last_n": 64}, {"penalty_window": 64}),
    ({"n_predict": 5}, {"max_tokens": 5}),
    ({"n_predict": -1}, {}),
    ({"max_new_tokens": 5}, {"max_tokens": 5}),
    ({"max_tokens": -1}, {}),
    ({"max_tokens": 5.0}, {"max_tokens": 5}),
    ({"stop_token_ids": [1, 2.0]}, {"stop_tokens": (1, 2)}),
    ({"seed": "random"}, {}),
    ({"seed": -1}, {}),
    ({"seed": -3}, {"seed": 2**64 - 3}),
    ({"seed": 7.0}, {"seed": 7}),
    ({"top_k": "off"}, {"top_k": 0}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": 40.0}, {"top_k": 40}),
    ({"top_p": 0}, {"top_p": 1e-6}),
    ({"top_p": "off"}, {"top_p": 1.0}),
    ({"min_p": "off", "typical_p": "off"}, {"min_p": 0.0, "typical_p": 1.0}),
    ({"temperature": None, "top_p": None, "stop": None, "logit_bias": None, "seed": None}, {}),
    ({"stop": ""}, {}),
    ({"stop": ["", "a"]}, {"stop": ("a",)}),
    ({"logit_bias": [[5, -1.5], [6, False]]}, {"logit_bias": {5: -1.5, 6: -math.inf}}),
    ({"dry_penalty_last_n": 9, "dry_sequence_breakers": ["x"]}, {"dry_window": 9, "dry_breakers": ("x",)}),
    ({"cache_prompt": True, "id_slot": -1}, {}),
    ({"grammar": 'root ::= "a"'}, {"constraint": Constraint.gbnf('root ::= "a"')}),
    ({"grammar": ""}, {}),
    ({"json_schema": SCHEMA}, {"constraint": JSON}),
    ({"guided_json": SCHEMA}, {"constraint": JSON}),
    ({"guided_json": '{"type": "object", "properties": {"a": {"type": "integer"}}}'}, {"constraint": JSON}),
    ({"guided_regex": "[0-9]"}, {"constraint": Constraint.regex("[0-9]")}),
    ({"guided_choice": ["a.b", "c d"]}, {"constraint": Constraint.regex(r"a\.b|c d")}),
    ({"guided_grammar": 'root ::= "a"'}, {"constraint": Constraint.gbnf('root ::= "a"')}),
    ({"structured_outputs": {"json": SCHEMA}}, {"constraint": JSON}),
    ({"structured_outputs": {"choice": ["a"], "regex": None}}, {"constraint": Constraint.regex("a")}),
    ({"structured_outputs": {"json_object": True}}, {"constraint": Constraint.json_object()}),
    ({"mirostat": 2, "samplers": ["top_k"], "use_beam_search": False}, {}),
]


@pytest.mark.parametrize(("given", "wanted"), SAMPLING, ids=lambda value: ",".join(value))
def test_settings_of_every_route(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert chat_params(chat(**given)) == SamplingParams(**wanted)
    more = {"max_tokens": 16} | wanted
    assert completion_params(CompletionBody.model_validate({"prompt": "x"} | given), 1) == SamplingParams(**more)
    assert response_params(ResponseBody.model_validate({"input": "x"} | given)) == SamplingParams(**wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"max_tokens": 9, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": -1}, {}),
        ({"logprobs": 3}, {"n_logprobs": 3}),
        ({"logprobs": True, "top_logprobs": 2}, {"n_logprobs": 2}),
        ({"logprobs": 0}, {}),
        ({"top_logprobs": 0}, {}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"constraint": JSON}),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"constraint": JSON}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, {"constraint": JSON}),
        ({"response_format": {"type": "json_object", "schema": None}},
         {"constraint": Constraint.json_schema({"type": "object", "x-guidance": {"lenient": True}})}),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "a"'}},
         {"constraint": Constraint.gbnf('root ::= "a"')}),
        ({"response_format": {"type": "text", "extra": 1}, "stream_options": {"include_usage": True, "x": 1}}, {}),
    ],
)  # fmt: skip
def test_settings_of_chats(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert chat_params(chat(**given)) == SamplingParams(**wanted)


@pytest.mark.parametrize(
    ("given", "n", "constraint"),
    [
        ({"logprobs": True}, 1, None),
        ({"logprobs": False}, 0, None),
        ({"response_format": {"type": "json_object"}}, 0, Constraint.json_object()),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, 0, JSON),
    ],
)
def test_settings_of_completions(given: dict[str, Any], n: int, constraint: Constraint | None) -> None:
    params = completion_params(CompletionBody.model_validate({"prompt": "x"} | given), 1)
    assert (params.n_logprobs, params.constraint) == (n, constraint)


@pytest.mark.parametrize(
    ("given", "wish"),
    [
        ({}, Wish()),
        ({"reasoning_effort": "low"}, Wish(effort="low")),
        ({"reasoning_effort": None}, Wish()),
        ({"enable_thinking": False}, Wish(enabled=False)),
        ({"chat_template_kwargs": {"enable_thinking": False}}, Wish(enabled=False)),
        ({"chat_template_kwargs": {"thinking": True, "thinking_budget": 5}}, Wish(enabled=True, budget=5)),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, Wish(effort="high")),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, Wish(enabled=True, budget=1024)),
        ({"thinking": {"type": "disabled"}}, Wish(enabled=False)),
        ({"thinking": {"type": "adaptive"}}, Wish()),
        ({"thinking": False}, Wish(enabled=False)),
        ({"think": "low"}, Wish(effort="low")),
        ({"think": True}, Wish(enabled=True)),
        ({"reasoning": {"effort": "none"}}, Wish(effort="none")),
        ({"reasoning": {"max_tokens": 9, "enabled": True}}, Wish(enabled=True, budget=9)),
        ({"thinking_budget": 7.0}, Wish(budget=7)),
        ({"thinking_budget_tokens": 7}, Wish(budget=7)),
        ({"reasoning_budget": 7}, Wish(budget=7)),
        ({"thinking_token_budget": 7}, Wish(budget=7)),
        ({"reasoning_budget_tokens": -1}, Wish()),
    ],
)
def test_thinking(given: dict[str, Any], wish: Wish) -> None:
    assert wish_of(chat(**given)) == wish
    assert wish_of(ResponseBody.model_validate({"input": "x"} | given)) == wish


@pytest.mark.parametrize("given", [{"reasoning_effort": "a lot"}, {"thinking_budget": 2**31}], ids=["effort", "budget"])
def test_thinking_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=next(iter(given))):
        wish_of(chat(**given))


MESSAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"role": "user", "content": None}, {"role": "user", "content": ""}),
    ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
    ({"role": "assistant"}, {"role": "assistant", "content": ""}),
    ({"role": "user", "content": "x", "id": "m", "created": 1}, {"role": "user", "content": "x"}),
    ({"role": "user", "content": "x", "name": "Ann"}, {"role": "user", "content": "x", "name": "Ann"}),
    ({"role": "user", "content": ["x", {"type": "text", "text": "y"}]}, {"role": "user", "content": "xy"}),
    (
        {"role": "assistant", "content": "x", "reasoning": "why", "refusal": None},
        {"role": "assistant", "content": "x", "reasoning_content": "why"},
    ),
    (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "x"}]},
        {"role": "assistant", "content": "x", "reasoning_content": "why"},
    ),
    ({"role": "function", "name": "f", "content": "1"}, {"role": "tool", "content": "1", "tool_call_id": "f"}),
    (
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "f", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    ),
    (
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "index": 0,
                                              "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted"), MESSAGES)
def test_messages(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    (found,) = plain_messages(chat(messages=[given]).messages, Limits(Settings(), None))  # type: ignore[arg-type]
    assert {name: value for name, value in found.items() if name != "name" or wanted.get(name)} == wanted


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({"tools": [TOOL], "tool_choice": "any"}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, "auto"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
         {"type": "function", "function": {"name": "f"}}),
        ({"tools": [{"name": "f", "parameters": SCHEMA}]}, None),
        ({"tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "description": None}]}, None),
        ({"tools": [{"type": "function", "function": {**TOOL["function"], "strict": None}}]}, None),  # type: ignore[dict-item]
        ({"functions": [TOOL["function"]], "function_call": "auto"}, "auto"),
        ({"functions": [TOOL["function"]], "function_call": {"name": "f"}},
         {"type": "function", "function": {"name": "f"}}),
        ({"tools": [TOOL, {"type": "function", "function": {"name": "g"}}], "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
                {"type": "function", "function": {"name": "f"}}]}}}, "required"),
    ],
)  # fmt: skip
def test_tools(given: dict[str, Any], choice: Any) -> None:
    data = chat(**given)
    assert data.tool_choice == choice
    assert [tool.name for tool in tools_of(data.tools or [])] == ["f"]


@pytest.mark.parametrize("name", ["files.read", "server/tool", "a-b_c.d/e2"])
def test_names_of_tools(name: str) -> None:
    assert tools_of([{"type": "function", "function": {"name": name}}])[0].name == name


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_calls_of_names_with_dots_and_slashes(form: ToolForm) -> None:
    text = form.write([("files.read/v2", {"a": 1})], ["0"])
    content, calls = parse_tool_calls(text, form, {"files.read/v2": SCHEMA})
    assert [(call.name, call.is_whole) for call in calls] == [("files.read/v2", True)] and content == ""


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_calls_of_the_longest_names(form: ToolForm) -> None:
    """Names of MCP servers' tools have more than the 64 characters that OpenAI allows."""
    name = "mcp__" + "server_" * 10 + "t" * 53
    assert len(name) == MAX_NAME
    text = form.write([(name, {"a": 1})], ["0"])
    content, calls = parse_tool_calls(text, form, {name: SCHEMA})
    assert [(call.name, call.is_whole) for call in calls] == [(name, True)] and content == ""
    parser = parser_of(form, {name: SCHEMA})
    events = [event for letter in text for event in parser.feed(letter)]
    content, calls = gathered([*events, *parser.finish(is_whole=True)])
    assert [(call.name, call.is_whole) for call in calls] == [(name, True)] and not content.strip()


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a" * 129, "<f>", 'a"'])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        tools_of([{"type": "function", "function": {"name": name}}])


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"structured_outputs": 5}, "structured_outputs"),
        ({"guided_regex": "a", "grammar": "b"}, "grammar"),
        ({"guided_regex": "a", "constraint": {"regex": "b"}}, "guided_regex"),
    ],
)
def test_dialects_that_make_no_sense(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        chat(**given)
    assert (error.value.status, error.value.param) == (400, param)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "off", "random", "{"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["type", "name", "function", "content", "role", "json", "choice", "schema", "tools", "value", "effort",
             "allowed_tools", "thinking", "arguments", "tool_calls", "text", "mode"]
        ),
        inner | st.sampled_from(["function", "assistant", "thinking", "allowed_tools", "json_schema", "tool"]),
        max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip
FIELDS = sorted(
    {name for given, _ in SAMPLING for name in given}
    | set(dialects.BUDGETS)
    | {"response_format", "functions", "function_call", "tools", "tool_choice", "messages", "thinking", "reasoning",
       "chat_template_kwargs", "think", "logprobs", "top_logprobs"}
)  # fmt: skip


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_json_is_understood_or_refused(body: dict[str, Any]) -> None:
    for kind, start in ((ChatCompletionBody, {"messages": USER}), (CompletionBody, {"prompt": "x"}),
                        (ResponseBody, {"input": "x"})):  # fmt: skip
        with contextlib.suppress(ApiError, ValidationError):
            kind.model_validate(start | body)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/v1/models", "/v1/models"),
        ("/api/v1/models/x", "/v1/models/x"),
        ("/models/", "/v1/models"),
        ("/v1/health", "/health"),
        ("/sessions/", "/sessions"),
        ("/", "/"),
        ("/chat", "/chat"),
        ("/static/page.js", "/static/page.js"),
        ("/completionsx", "/completionsx"),
        ("//", "//"),
    ],
)
def test_paths(path: str, meant: str) -> None:
    assert canonical(path) == meant


def test_nearest_paths() -> None:
    known = ["/v1/chat/completions", "/chat", "/sessions/<id>", "/tokenize"]
    assert nearest("/api/chat/completion", known) == "/v1/chat/completions"
    assert nearest("/v2/tokenize", known) == "/tokenize"
    assert nearest("/v1/chat/completion", [*known, "/completion"]) == "/v1/chat/completions"
    assert nearest("/xyz", known) is None and nearest("/", known) is None
