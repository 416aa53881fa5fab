"""The form of tool calls is detected from the chat template; answers are constrained to it and parsed by it.

The templates are small ones, written for the tests, and those of llama.cpp's source distribution where
FABULA_TEST_TEMPLATES names their folder (models/templates).
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from fabula import Constraint, InvalidArgument
from fabula.engine.grammar import Guide
from fabula.sessions.tool_call_parser import ToolCall, gathered, parse_tool_calls, parser_of
from fabula.sessions.tool_forms import FORMS, HERMES, style_of
from fabula.sessions.tools import Calling, tool_constraint, with_tools
from fabula.text.template import ChatTemplate
from fabula.text.tokenizer import Tokenizer
from tool_templates import BODIES, END, template_of, tokenizer_of

FOLDER = os.environ.get("FABULA_TEST_TEMPLATES", "")
NAMES = [*BODIES, "harmony"]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "its name"},
        "days": {"type": "integer", "description": "how many"},
        "where": {"type": "object", "description": "the place"},
        "exact": {"type": "boolean", "description": "or about"},
    },
    "required": ["city", "days"],
}


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters, **more}}


TOOLS = [
    tool("get_weather", SCHEMA),
    tool("now", {"type": "object", "properties": {}, "required": [], "additionalProperties": False}),
]
ARGUMENTS: dict[str, Any] = {
    "city": "St. <b> John",
    "days": 3,
    "where": {"at": [1, True, None, "}]"]},
    "exact": False,
}


@lru_cache
def tokenizer(has_marks: bool) -> Tokenizer:
    return tokenizer_of(has_marks=has_marks)


def accepts(constraint: Constraint | None, text: str, vocabulary: Tokenizer) -> bool:
    """Whether an answer may be that text, whole."""
    assert constraint is not None
    try:
        return Guide(
            vocabulary, vocabulary.vocab_size, constraint, vocabulary.encode(text, add_bos=False, special=True)
        ).may_end
    except InvalidArgument as error:
        assert "forbids" in str(error), error
        return False


def call(name: str, arguments: Any, id_: str = "abcde1234") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def rendered(template: ChatTemplate, calls: list[dict[str, Any]]) -> str:
    """What the assistant writes to make the calls, as the template words it."""
    said = [{"role": "user", "content": "the question"}]
    messages, options = with_tools([*said, {"role": "assistant", "content": "", "tool_calls": calls}], TOOLS, template)
    text = template.render(messages, add_generation_prompt=False, **options)
    prompt = template.render(messages[:-1], add_generation_prompt=True, **options)
    common = text[: next(i for i in range(len(text)) if text[i] != (prompt + "\0" * len(text))[i])]
    answer = text[common.rindex("<") if "<" in common and ">" not in common[common.rindex("<") :] else len(common) :]
    answer = re.sub(r"^\s*(</?[^<>]*think[^<>]*>\s*|<\|(START|END)_THINKING\|>)+", "", answer, flags=re.IGNORECASE)
    form = style_of(template).form
    own = "".join("".join(form.literals).split())
    answer = answer.rstrip().removesuffix("[e~[").rstrip()
    while (end := re.search(r"<[^<>]*>$", answer)) is not None and "".join(end[0].split()) not in own:
        answer = answer[: end.start()].rstrip()
    close = form.section[1].strip()  # which one of DeepSeek's templates leaves out
    return answer if close in answer or not form.name.startswith("deepseek") else answer + close


# ---- Which form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_form_is_read_from_the_template(name: str) -> None:
    style = style_of(ChatTemplate(template_of(name)))
    assert (style.form.name, style.writes_calls, style.lists_tools) == (name, True, True)
    assert style.short_ids is (name == "mistral-ids")
    assert {form.name for form in FORMS} == set(NAMES)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}<tool_call>",
        "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls or [] %}"
        "<tool_call>run {{ c.function.name }} with {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
        "{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ tools }}<tool_call>",
    ],
)
def test_an_unknown_form_is_told_in_words(source: str) -> None:
    template = ChatTemplate(source)
    style = style_of(template)
    assert (style.form, style.writes_calls) == (HERMES, False)
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call("now", {})]}]
    messages, options = with_tools(said, TOOLS, template)
    assert options == {}
    assert "<tool_call>\n{" in messages[0]["content"] and "get_weather" in messages[0]["content"]
    assert messages[-1] == {"role": "assistant", "content": HERMES.write([("now", {})])}


def test_a_form_without_a_list_of_tools_is_told_with_an_example() -> None:
    """DeepSeek's templates render calls, but not the definitions."""
    source = template_of("deepseek-v3.1").replace("{{ tools | tojson }}", "")
    template = ChatTemplate(source)
    assert style_of(template).writes_calls and not style_of(template).lists_tools
    messages, options = with_tools([{"role": "user", "content": "x"}], TOOLS, template)
    assert options == {}
    assert '"get_weather"' in messages[0]["content"]
    assert '<｜tool▁call▁begin｜>example_function<｜tool▁sep｜>{"city": "Rome"}' in messages[0]["content"]


def test_ids_are_cut_to_what_the_template_takes() -> None:
    template = ChatTemplate(template_of("mistral-ids"))
    long = "call_0123456789abcdef_0_0"
    messages, _ = with_tools(
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call("now", "{}", long)]},
            {"role": "tool", "tool_call_id": long, "content": "12"},
        ],
        TOOLS,
        template,
    )
    (made,) = messages[1]["tool_calls"]
    assert re.fullmatch("[A-Za-z0-9]{9}", made["id"]) and messages[2]["tool_call_id"] == made["id"]
    assert made["id"] in template.render(messages)


# ---- Held to schemas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_held_to_the_schema(name: str) -> None:
    form = style_of(ChatTemplate(template_of(name))).form
    vocabulary = tokenizer(True)
    constraint = tool_constraint(TOOLS, "required", True, form=form, tokenizer=vocabulary)
    for wrong in (
        ("get_weather", {"city": "x", "days": "NaN"}),
        ("get_weather", {"city": "x"}),
        ("get_weather", {"days": 3}),
        ("get_rain", {"city": "x", "days": 3}),
        ("now", {"city": "x"}),
    ):
        assert not accepts(constraint, form.write([wrong]), vocabulary), wrong
    assert accepts(constraint, form.write([("get_weather", {"city": "x", "days": 3})]), vocabulary)
    assert not accepts(constraint, "hello", vocabulary)
    named = {"type": "function", "function": {"name": "now"}}
    only = tool_constraint(TOOLS, named, True, form=form, tokenizer=vocabulary)
    assert accepts(only, form.write([("now", {})]), vocabulary)
    assert not accepts(only, form.write([("get_weather", {"city": "x", "days": 3})]), vocabulary)


TEXTS = {
    "type": "object",
    "properties": {
        "plan": {"$ref": "#/$defs/plan"},
        "code": {"type": "string", "pattern": "^[a-z]{2}[0-9]+$"},
        "note": {"type": "string", "minLength": 2, "maxLength": 4},
        "level": {"type": ["integer", "null"]},
        "loose": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "array", "items": {"type": "integer"}}]},
    },
    "required": ["plan"],
    "$defs": {"plan": {"enum": ["a b", "c<d"]}},
}


@pytest.mark.parametrize("name", ["qwen3-coder", "glm", "minimax-m2", "deepseek-v3.2", "lfm2", "hermes"])
@pytest.mark.parametrize(
    ("arguments", "is_right"),
    [
        ({"plan": "a b"}, True),
        ({"plan": "c<d", "code": "ab12", "note": "abc", "level": 5, "loose": "ab"}, True),
        ({"plan": "c<d", "level": None, "loose": [1, 2]}, True),
        ({"plan": "a c"}, False),
        ({"plan": "a b", "code": "ab1x"}, False),
        ({"plan": "a b", "note": "a"}, False),
        ({"plan": "a b", "note": "abcde"}, False),
        ({"plan": "a b", "level": "x"}, False),
    ],
)
def test_values_that_stand_as_text_are_held_too(name: str, arguments: dict[str, Any], is_right: bool) -> None:
    if name == "lfm2" and "code" in arguments:
        arguments = {key: value for key, value in arguments.items() if key != "code"} | {"note": "abcde"}
        is_right = False
    form = style_of(ChatTemplate(template_of(name))).form
    vocabulary, tools = tokenizer(False), [tool("f", TEXTS)]
    constraint = tool_constraint(tools, "required", True, form=form, tokenizer=vocabulary)
    text = form.write([("f", arguments)])
    assert accepts(constraint, text, vocabulary) is is_right
    if is_right:
        assert json.loads(parse_tool_calls(text, form, {"f": TEXTS})[1][0].arguments) == arguments


@pytest.mark.parametrize("name", NAMES)
def test_a_call_or_what_the_schema_says(name: str) -> None:
    """`tools` with `response_format`: one grammar for both."""
    form = style_of(ChatTemplate(template_of(name))).form
    city = Constraint.json_schema(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": False,
        }
    )
    right = '{"name": "Rome"}'
    around = "<|channel|>final<|message|>" if name == "harmony" else ""
    for has_marks in (True, False):
        vocabulary = tokenizer(has_marks)
        both = tool_constraint(TOOLS, "auto", True, form=form, tokenizer=vocabulary, other=city)
        assert accepts(both, around + right, vocabulary)
        assert accepts(both, form.write([("get_weather", {"city": "x", "days": 3})]), vocabulary)
        for wrong in ("hello", '{"name": 5}', '{"city": "Rome"}', form.write([("get_rain", {})])):
            assert not accepts(both, around + wrong, vocabulary)
        assert tool_constraint(TOOLS, "none", other=city) == city
        calls = tool_constraint(TOOLS, "required", True, form=form, tokenizer=vocabulary, other=city)
        assert not accepts(calls, around + right, vocabulary)


@pytest.mark.parametrize(
    ("other", "right", "wrong"),
    [
        (Constraint.regex("[0-9a-z<]{3,}"), "ab<9", "ab"),
        (Constraint.regex("(?s:.*)"), "any text", None),
        (Constraint.gbnf('root ::= "yes" | "no" | "<b>"'), "<b>", "maybe"),
        (Constraint.json_object(), '{"a": 1}', "[1]"),
    ],
)
def test_a_call_or_another_constraint(other: Constraint, right: str, wrong: str | None) -> None:
    vocabulary = tokenizer(False)
    both = tool_constraint(TOOLS, "auto", True, tokenizer=vocabulary, other=other)
    text = HERMES.write([("now", {})])
    assert accepts(both, right, vocabulary) and accepts(both, text, vocabulary)
    assert wrong is None or not accepts(both, wrong, vocabulary)
    assert not accepts(both, text.replace("now", "noon"), vocabulary)


@pytest.mark.parametrize("name", ["hermes", "qwen3-coder", "mistral", "functionary"])
def test_json_beside_tools_may_hold_the_marks_of_a_call(name: str) -> None:
    calling = Calling(ChatTemplate(template_of(name)), tokenizer(False), TOOLS)
    constraint = calling.constraint("auto", True, Constraint.json_object())
    text = json.dumps({"a": "x " + calling.form.write([("now", {})])})
    assert accepts(constraint, text, tokenizer(False))
    for size in (1, 4, len(text)):
        parser = calling.parser()
        events = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
        assert gathered([*events, *parser.finish()]) == (text, [])
    parser = calling.parser()
    call_ = calling.form.write([("now", {})])
    assert len(gathered([*parser.feed("\n" + call_), *parser.finish()])[1]) == 1


def test_a_grammar_that_cannot_stand_beside_calls_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="tools and a constraint of the kind lark exclude each other"):
        tool_constraint(TOOLS, "auto", other=Constraint.lark('start: "x"'))
    form = style_of(ChatTemplate(template_of("mistral"))).form
    both = tool_constraint(TOOLS, "auto", form=form, tokenizer=tokenizer(True), other=Constraint.lark('start: "x"'))
    assert accepts(both, "x", tokenizer(True)) and accepts(both, form.write([("now", {})]), tokenizer(True))


def test_patterns_that_cannot_be_enforced() -> None:
    """Passed over where the tool is not strict; else the message names tool and place."""
    schema = {
        "type": "object",
        "properties": {"price": {"type": "string", "pattern": "^(?=a).*$"}},
        "required": ["price"],
        "additionalProperties": False,
    }
    for name in NAMES:
        form = style_of(ChatTemplate(template_of(name))).form
        loose = tool_constraint([TOOLS[1], tool("buy", schema)], "required", form=form, tokenizer=tokenizer(True))
        assert accepts(loose, form.write([("buy", {"price": "b"})]), tokenizer(True))
        with pytest.raises(InvalidArgument, match=r"^tools\[1\]\.function\.parameters\.properties\.price\.pattern: "):
            tool_constraint([TOOLS[1], tool("buy", schema, strict=True)], "auto", form=form, tokenizer=tokenizer(True))


@pytest.mark.parametrize("name", ["hermes", "qwen3-coder", "mistral", "lfm2"])
def test_128_tools_of_100_kilobytes(name: str) -> None:
    tools = []
    for i in range(128):
        properties = {f"field_{i}_{k}": {"type": "string", "description": "words " * 17} for k in range(5)}
        properties["count"] = {"type": "integer"}  # type: ignore[dict-item]
        tools.append(tool(f"function_{i}", {"type": "object", "properties": properties, "required": ["count"]}))
    assert len(json.dumps(tools)) > 100_000
    form = style_of(ChatTemplate(template_of(name))).form
    vocabulary = tokenizer(True)
    constraint = tool_constraint(tools, "auto", form=form, tokenizer=vocabulary)
    text = form.write([("function_99", {"field_99_0": "a", "count": 5})])
    assert accepts(constraint, text, vocabulary)
    assert not accepts(constraint, text.replace("5", "x"), vocabulary)


# ---- Thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hermes", "qwen3-coder", "glm", "llama3"])
@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_no_call_is_looked_for_in_a_thought(name: str, opened: str) -> None:
    if name == "llama3" and opened:
        pytest.skip("a form without marks is not looked for behind a thought that the prompt began")
    source = template_of(name, opened) + "{# <think> #}"
    vocabulary = tokenizer(False)
    calling = Calling(ChatTemplate(source), vocabulary, TOOLS)
    constraint = calling.constraint("auto", True)
    text = calling.form.write([("now", {})])
    mention = "I may write " + calling.form.opening + " now."
    thought = ("" if opened else "<think>") + mention + "</think>"
    for answer, n_calls in ((thought + "\n" + text, 1), (thought, 0), (thought[:-3], 0), (text, 1), ("Hi", 0)):
        assert accepts(constraint, answer, vocabulary), answer
        parser = calling.parser()
        content, calls = gathered([*parser.feed(answer), *parser.finish()])
        assert len(calls) == n_calls
        assert content.rstrip("\n") == (answer.removesuffix(text).rstrip("\n"))
    assert not accepts(constraint, thought + text.replace("now", "noon"), vocabulary) or name == "llama3"


def test_thoughts_between_control_tokens() -> None:
    source = template_of("hermes") + "{# <think> #}"
    vocabulary = tokenizer_of(has_marks=False, more=("<think>", "</think>"))
    calling = Calling(ChatTemplate(source), vocabulary, TOOLS)
    constraint = calling.constraint("auto", True)
    text = HERMES.write([("now", {})])
    for answer in (text, "<think>a <tool_call> b</think>" + text, "well</think>" + text, "hello"):
        assert accepts(constraint, answer, vocabulary), answer
    assert not accepts(constraint, "<think>x</think>" + text.replace("now", "noon"), vocabulary)


# ---- Control tokens -------------------------------------------------------------------------------------------------


def test_marks_that_are_control_tokens() -> None:
    """They are generated as such, plain text cannot replace them, and they stay in the answer's text."""
    form = style_of(ChatTemplate(template_of("mistral"))).form
    vocabulary = tokenizer(True)
    constraint = tool_constraint(TOOLS, "required", form=form, tokenizer=vocabulary)
    assert constraint is not None
    assert [vocabulary.token_text(i) for i in constraint.shown] == ["[TOOL_CALLS]"]
    text = form.write([("now", {})])
    typed = vocabulary.encode(text, add_bos=False, special=False)
    with pytest.raises(InvalidArgument, match="forbids"):
        Guide(vocabulary, vocabulary.vocab_size, constraint, typed)
    ids = vocabulary.encode(text + END, add_bos=False, special=True)
    decoder = vocabulary.stream_decoder(shown=constraint.shown)
    assert "".join(decoder.push(i) for i in ids) == text
    assert Constraint(constraint.kind, constraint.source, list(constraint.shown)) == constraint  # type: ignore[arg-type]


# ---- Cut off --------------------------------------------------------------------------------------------------------


def streamed(text: str, size: int, name: str, is_whole: bool) -> tuple[str, list[ToolCall]]:
    form = next(form for form in FORMS if form.name == name)
    parser = parser_of(form, {"get_weather": SCHEMA})
    events = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
    return gathered([*events, *parser.finish(is_whole=is_whole)])


@pytest.mark.parametrize("name", NAMES)
def test_wherever_an_answer_is_cut_stream_and_whole_say_the_same(name: str) -> None:
    form = next(form for form in FORMS if form.name == name)
    given: dict[str, Any] = {"city": "a <b>\nc", "days": 3, "where": {"k": "}]"}}
    calls = [("get_weather", given), ("now", {})][: 1 if name == "harmony" else 2]
    text = form.write(calls, ["abcde1234", "abcde1235"])
    if name == "harmony":
        text = "<|channel|>analysis<|message|>so<|end|><|start|>assistant" + text
    wanted = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    seen: set[int] = set()
    for cut in range(len(text) + 1):
        whole = streamed(text[:cut], len(text), name, False)
        assert streamed(text[:cut], 1 + cut % 3, name, False) == whole, cut
        content, found = whole
        assert content == "", cut  # no markup
        for one, (its_name, arguments) in zip(found, wanted, strict=False):
            assert one.name == its_name
            assert arguments.startswith(one.arguments) or one.is_whole or "where" in arguments[: len(one.arguments)]
            assert not one.is_whole or json.loads(one.arguments) == json.loads(arguments)
        assert all(one.is_whole for one in found[:-1])
        seen.add(len(found))
        assert streamed(text[:cut], 1 + cut % 4, name, True) == streamed(text[:cut], len(text), name, True)
    assert seen == set(range(len(calls) + 1))
    assert [(one.name, json.loads(one.arguments), one.is_whole) for one in found] == [
        (its_name, arguments, True) for its_name, arguments in calls
    ]


# ---- There and back -------------------------------------------------------------------------------------------------


def check_there_and_back(template: ChatTemplate) -> None:
    """The rendered text is parsed as the calls, and the grammar accepts exactly that text."""
    form = style_of(template).form
    is_single = form.name in ("harmony", "llama3", "gigachat")  # templates that render one call of a message
    for calls in (
        [call("get_weather", ARGUMENTS)],
        [call("now", {})],
        [call("get_weather", ARGUMENTS), call("now", {}, "abcde1235")],
    )[: 2 if is_single else 3]:
        try:
            answer = rendered(template, calls)
        except Exception as error:
            assert len(calls) > 1 and "single" in str(error), error  # one call is all that this template renders
            continue
        expected = [(one["function"]["name"], one["function"]["arguments"]) for one in calls]
        for vocabulary in (tokenizer(True), tokenizer(False)):
            calling = Calling(template, vocabulary, TOOLS)
            parser = calling.parser()
            content, found = gathered([*parser.feed(answer), *parser.finish()])
            assert content.strip() == "", (answer, content)
            assert [(one.name, json.loads(one.arguments), one.is_whole) for one in found] == [
                (name, arguments, True) for name, arguments in expected
            ], answer
            for choice in ("required", "auto"):
                for other in (None, Constraint.json_schema({"type": "array"}) if form.name != "pythonic" else None):
                    constraint = calling.constraint(choice, True, other)
                    assert accepts(constraint, answer, vocabulary), (choice, other, answer)
            single = calling.constraint("required", False)
            assert accepts(single, answer, vocabulary) is (len(calls) == 1), answer


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str) -> None:
    check_there_and_back(ChatTemplate(template_of(name)))


EXPECTED = {
    "Apertus-8B-Instruct": "apertus",
    "Apriel-1.6-15b-Thinker-fixed": "apriel",
    "Bielik-11B-v3.0-Instruct": "hermes",
    "ByteDance-Seed-OSS": "seed-oss",
    "Cohere2MoE": "command-r7b",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command-r7b",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "GigaChat3.1-10B-A1.8B": "gigachat",
    "LFM2.5-8B-A1B": "lfm2",
    "MiMo-VL": "hermes",
    "MiniMax-M1": "minimax-m1",
    "MiniMax-M2": "minimax-m2",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral-call-id",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3-coder",
    "NVIDIA-Nemotron-Nano-v2": "nemotron",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen3-coder",
    "Qwen3.5-4B": "qwen3-coder",
    "Reka-Edge": "hermes",
    "Spark2.5": "glm",
    "StepFun3.5-Flash": "qwen3-coder",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek-v3",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek-v3",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "deepseek-ai-DeepSeek-V3.2": "deepseek-v3.2",
    "deepseek-ai-DeepSeek-V4": "deepseek-v4",
    "deepseek-ai-DeepSeek-V4-Flash-0731": "deepseek-v4",
    "ibm-granite-granite-4.0": "hermes",
    "ibm-granite-granite-4.1": "hermes",
    "inclusionai-ling-3.0-flash": "glm",
    "meetkai-functionary-medium-v3.1": "functionary",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral-args",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral-ids",
    "moonshotai-Kimi-K2": "kimi-k2",
    "openai-gpt-oss-120b": "harmony",
    "openbmb-MiniCPM5-1B": "minicpm5",
    "poolside-Laguna-S-2.1": "glm",
    "poolside-Laguna-XS-2.1": "glm",
    "poolside-Laguna-XS.2": "glm",
    "tencent-Hy3": "hunyuan",
    "unsloth-Apriel-1.5": "apriel",
    "unsloth-mistral-Devstral-Small-2507": "mistral-args",
    "upstage-Solar-Open-100B": "solar",
}


@pytest.mark.skipif(not FOLDER, reason="FABULA_TEST_TEMPLATES names no folder of templates")
@pytest.mark.parametrize("path", sorted(Path(FOLDER).glob("*.jinja")) if FOLDER else [], ids=lambda path: path.stem)
def test_templates_that_are_published(path: Path) -> None:
    template = ChatTemplate(
        path.read_text(encoding="utf-8"), special_tokens={"bos_token": "<BOS>", "eos_token": "<EOS>"}
    )
    style = style_of(template)
    assert (style.form.name if style.writes_calls else None) == EXPECTED.get(path.stem)
    if style.writes_calls:
        check_there_and_back(template)


@pytest.mark.parametrize("has_marks", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_with_dots_and_slashes(name: str, has_marks: bool) -> None:
    """The grammar allows them and holds to them, and the parser finds them wherever a stream breaks."""
    template, vocabulary = ChatTemplate(template_of(name)), tokenizer(has_marks)
    form, schema = style_of(template).form, {"type": "object", "properties": {"a": {"type": "integer"}}}
    for wanted in ("files.read/v2", "/a/b.c", "mcp.server/read_file-1.0"):
        calling = Calling(template, vocabulary, [tool(wanted, schema)])
        text = form.write([(wanted, {"a": 1})], ["0"])
        constraint = calling.constraint("required", False)
        assert accepts(constraint, text, vocabulary), text
        assert not accepts(constraint, form.write([(wanted.replace(".", "x"), {"a": 1})], ["0"]), vocabulary)
        parser = calling.parser()
        events = [event for letter in text for event in parser.feed(letter)]
        content, calls = gathered([*events, *parser.finish(is_whole=True)])
        assert [(one.name, one.arguments) for one in calls] == [(wanted, '{"a": 1}')] and not content.strip()
