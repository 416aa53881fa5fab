"""The forms in which models write tool calls, and which of them a chat template uses.

Each model family was trained on a form of its own, and its chat template renders past calls in that form. So the form
is detected from the template: it renders a probe call, whose name and values occur nowhere else, and the form of the
table that gives the same text, white space aside, is the one. A template that renders no calls, or in a form that the
table lacks, gets Hermes' form, and the prompt explains it to the model.

The layout of one or several calls is

    section[0] call[0] NAME call[1] ARGUMENTS call[2] separator call[0] NAME ... call[2] section[1]

and ARGUMENTS is a JSON object ("json"), one element per argument ("tagged"):

    parameter[0] KEY parameter[1] VALUE parameter[2] parameter[0] KEY ...

or `key=value, key=value` with Python literals ("python"). In tagged arguments a string is plain text, any other value
is JSON.

`tool_grammar.py` builds a grammar from a form, `tool_call_parser.py` parses it.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fabula.errors import EngineError
from fabula.text.template import ChatTemplate

HOLE = "\0"  # placeholder for the id of a call in the literals of a form
MAX_NAME = 128  # characters of a tool's name, as in Anthropic's API; those of MCP servers are often longer than 64
NAME = rf"[A-Za-z0-9_./-]{{1,{MAX_NAME}}}"
ID_PATTERN = "[A-Za-z0-9_.:-]{1,64}"


@dataclass(frozen=True, slots=True)
class ToolForm:
    r"""Syntax of calls.

    A line break in a literal stands for any white space, or none; in `parameter` for one line break that is not part of
    the value.

    Attributes:
        name: of the form.
        call: text before the name, between name and arguments, and after the arguments.
        section: text before the first call and after the last.
        separator: text between calls of a section.
        arguments: syntax of the arguments.
        parameter: of "tagged": text before the key, between key and value, and after the value.
        other_middle: of "tagged": `parameter[1]` for a value that is not a string, if that differs.
        is_first: calls have no mark, and are searched only at the start of an answer.
        prefix: a control token that may come before the calls.
        cdata: a string with markup in it may be in `<![CDATA[...]]>`.
    """

    name: str
    call: tuple[str, str, str]
    section: tuple[str, str] = ("", "")
    separator: str = ""
    arguments: Literal["json", "tagged", "python", "harmony"] = "json"
    parameter: tuple[str, str, str] = ("", "", "")
    other_middle: str | None = None
    is_first: bool = False
    prefix: str = ""
    cdata: bool = False

    @property
    def opening(self) -> str:
        """The text that starts a call, or a section of calls: the first tag."""
        text = self.section[0] + self.call[0]
        found = re.match(r"<[^<>]*>|\[[A-Z_]+\]", text)
        return found[0] if found is not None else text

    @property
    def literals(self) -> tuple[str, ...]:
        """Every fixed text of the form."""
        return (self.prefix, *self.section, *self.call, self.separator, *self.parameter, self.other_middle or "")

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]], ids: Sequence[str] = ()) -> str:
        """Renders calls as a model writes them.

        Args:
            calls: names and arguments.
            ids: of the calls, where the form has them; "0", "1", ... if there are none.
        """
        if self.arguments == "harmony":
            return "".join(
                f" to=functions.{name}<|channel|>commentary json<|message|>{_json(arguments)}"
                for name, arguments in calls
            )
        written = []
        for i, (name, arguments) in enumerate(calls):
            id_ = ids[i] if i < len(ids) else str(i)
            before, middle, after = (text.replace(HOLE, id_) for text in self.call)
            written.append(before + name + middle + self._arguments(arguments) + after)
        if not (self.section[0] or self.separator):
            return "\n".join(written)
        return self.section[0] + self.separator.join(written) + self.section[1]

    def _arguments(self, arguments: Mapping[str, Any]) -> str:
        if self.arguments == "json":
            return _json(arguments)
        if self.arguments == "python":
            return ", ".join(f"{key}={_python(value)}" for key, value in arguments.items())
        before, middle, after = self.parameter
        texts = []
        for key, value in arguments.items():
            is_text = isinstance(value, str) or self.other_middle is None
            text = value if isinstance(value, str) else _json(value)
            texts.append(before + key + (middle if is_text else self.other_middle or "") + text + after)
        return "".join(texts)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _python(value: Any) -> str:
    return repr(value) if isinstance(value, str | bool) or value is None else _json(value)


# ---- The table ------------------------------------------------------------------------------------------------------

_OBJECT = ('{"name": "', '", "arguments": ', "}")
_QWEN_PARAMETER = ("<parameter=", ">\n", "\n</parameter>\n")
_NAMED_PARAMETER = ('<parameter name="', '">', "</parameter>\n")
_ARG_KEY = ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
_DSML_CALL = ('<｜DSML｜invoke name="', '">\n', "</｜DSML｜invoke>\n")
_DSML_PARAMETER = ('<｜DSML｜parameter name="', '" string="true">', "</｜DSML｜parameter>\n")
_DSML_OTHER = '" string="false">'

HERMES = ToolForm("hermes", ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"))

# Sources: the chat templates that the models' makers publish, as collected in llama.cpp's models/templates.
FORMS: tuple[ToolForm, ...] = (
    HERMES,
    ToolForm(
        "qwen3-coder", ("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>"),
        arguments="tagged", parameter=_QWEN_PARAMETER,
    ),
    ToolForm(
        "seed-oss", ("<seed:tool_call>\n<function=", ">\n", "</function>\n</seed:tool_call>"),
        arguments="tagged", parameter=("<parameter=", ">", "</parameter>\n"),
    ),
    ToolForm("glm", ("<tool_call>", "\n", "</tool_call>"), arguments="tagged", parameter=_ARG_KEY),
    ToolForm(
        "hunyuan",
        ("<tool_call:opensource>", "<tool_sep:opensource>\n", "</tool_call:opensource>\n"),
        ("<tool_calls:opensource>\n", "</tool_calls:opensource>"),
        arguments="tagged",
        parameter=(
            "<arg_key:opensource>", "</arg_key:opensource>\n<arg_value:opensource>", "</arg_value:opensource>\n",
        ),
    ),
    ToolForm(
        "minimax-m2", ('<invoke name="', '">\n', "</invoke>\n"), ("<minimax:tool_call>\n", "</minimax:tool_call>"),
        arguments="tagged", parameter=_NAMED_PARAMETER,
    ),
    ToolForm(
        "deepseek-v3.2", _DSML_CALL, ("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
        arguments="tagged", parameter=_DSML_PARAMETER, other_middle=_DSML_OTHER,
    ),
    ToolForm(
        "deepseek-v4", _DSML_CALL, ("<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
        arguments="tagged", parameter=_DSML_PARAMETER, other_middle=_DSML_OTHER,
    ),
    ToolForm(
        "minicpm5", ('<function name="', '">', "</function>"),
        arguments="tagged", parameter=('<param name="', '">', "</param>"),
        cdata=True,
    ),
    ToolForm(
        "mistral-ids", ('{"name": "', '", "arguments": ', f', "id": "{HOLE}"}}'), ("[TOOL_CALLS]\n[", "]"), ", ",
    ),
    ToolForm("mistral", _OBJECT, ("[TOOL_CALLS]\n[", "]"), ", "),
    ToolForm("mistral-args", ("[TOOL_CALLS]", "[ARGS]", "")),
    ToolForm("mistral-call-id", ("[TOOL_CALLS]", f"[CALL_ID]{HOLE}[ARGS]", "")),
    ToolForm(
        "deepseek-v3",
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), "\n",
    ),
    ToolForm(
        "deepseek-v3.1", ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolForm(
        "kimi-k2",
        ("<|tool_call_begin|>functions.", f":{HOLE}<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    ToolForm(
        "solar", (f"<|tool_call:begin|>{HOLE}<|tool_call:name|>", "<|tool_call:args|>", "<|tool_call:end|>"),
        ("<|tool_calls|>", ""), "\n",
    ),
    ToolForm(
        "command-r7b", (f'{{"tool_call_id": "{HOLE}", "tool_name": "', '", "parameters": ', "}"),
        ("<|START_ACTION|>[\n", "\n]<|END_ACTION|>"), ",\n",
    ),
    ToolForm("nemotron", _OBJECT, ("<TOOLCALL>[", "]</TOOLCALL>"), ", "),
    ToolForm("apriel", _OBJECT, ("<tool_calls>[", "]</tool_calls>"), ", "),
    ToolForm("minimax-m1", _OBJECT, ("<tool_calls>\n", "\n</tool_calls>"), "\n"),
    ToolForm("granite", _OBJECT, ("<|tool_call|>[", "]"), ", "),
    ToolForm("apertus", ('{"', '": ', "}"), ("<|tools_prefix|>[", "]<|tools_suffix|>"), ", "),
    ToolForm("gigachat", ('<|function_call|>{"name": "', '", "arguments": ', "}")),
    ToolForm("functionary", ("<function=", ">", "</function>")),
    ToolForm(
        "lfm2", ("", "(", ")"), ("<|tool_call_start|>[", "]<|tool_call_end|>"), ", ", arguments="python",
    ),
    ToolForm("harmony", ("", "", ""), arguments="harmony"),
    ToolForm(
        "llama3", ('{"name": "', '", "parameters": ', "}"), ("", ""), "; ", is_first=True, prefix="<|python_tag|>",
    ),
    ToolForm(
        "pythonic", ("", "(", ")"), ("[", "]"), ", ", arguments="python", is_first=True, prefix="<|python_start|>",
    ),
)  # fmt: skip

# ---- Detecting it from a template -----------------------------------------------------------------------------------

_NAME, _ASKED = "probe_function", "probe question"
_ARGUMENTS: Mapping[str, Any] = {"text": "probe value", "number": 42, "nested": {"k": [1, True]}}
_DESCRIPTION = "probe description"
_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": _DESCRIPTION,
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "a"},
                "number": {"type": "integer", "description": "b"},
                "nested": {"type": "object", "description": "c", "properties": {}},
            },
            "required": ["text", "number", "nested"],
            "additionalProperties": False,
        },
    },
}
PROBE_SECONDS = 10.0  # CPU time of all renders; one takes a few milliseconds, that of a hostile template up to 2 s
_IDS = ("probe1234", f"functions.{_NAME}:0")
_LONG_ID = "call_0123456789abcdef_0_0"
# What a template puts between the start of an answer and its calls if there is no thought.
_THOUGHT = re.compile(r"(?:</?[^<>]*think[^<>]*>|<\|(?:START|END)_THINKING\|>|\[/?THINK\])*", re.IGNORECASE)

ArgumentsAs = Literal["object", "text", "texts"]


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """What a chat template does with tools.

    Attributes:
        form: of its calls; Hermes' if it renders none, or in a form that the table lacks.
        lists_tools: whether it renders the definitions of tools.
        writes_calls: whether it renders calls; otherwise they are put into the text of messages.
        arguments_as: how it takes arguments: as an object, as JSON text, or as an object whose values are strings.
        null_content: whether a message with calls must have no content.
        thinks: whether it knows <think> tags.
        short_ids: whether it takes ids of calls only if they have exactly 9 letters and digits, as Mistral's.
    """

    form: ToolForm = HERMES
    lists_tools: bool = False
    writes_calls: bool = False
    arguments_as: ArgumentsAs = "object"
    null_content: bool = False
    thinks: bool = False
    short_ids: bool = False


_styles: weakref.WeakKeyDictionary[ChatTemplate, ToolStyle] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def style_of(template: ChatTemplate) -> ToolStyle:
    """What a template does with tools; probed once per template, with a few renders."""
    with _lock:
        found = _styles.get(template)
    if found is None:
        found = _probe(template)
        with _lock:
            _styles[template] = found
    return found


def opens_thought(template: ChatTemplate, **options: Any) -> bool:
    """Whether an answer starts inside a thought, as the prompt ends with <think>."""
    prompt = _render(template, [{"role": "user", "content": _ASKED}], add_generation_prompt=True, **options)
    return prompt is not None and prompt.rstrip().endswith("<think>")


def _probe(template: ChatTemplate) -> ToolStyle:
    thinks = "<think>" in template.variant(tools=True).source
    asked = [{"role": "user", "content": _ASKED}]
    prompt = _render(template, asked, add_generation_prompt=True, tools=[_TOOL])
    if prompt is None:
        return ToolStyle(thinks=thinks)
    lists_tools = _NAME in prompt and _DESCRIPTION in prompt

    def rendered(id_: str, null_content: bool, arguments_as: ArgumentsAs) -> str | None:
        call = {"name": _NAME, "arguments": arguments_for(_ARGUMENTS, arguments_as)}
        answer = {
            "role": "assistant",
            "content": None if null_content else "",
            "tool_calls": [{"id": id_, "type": "function", "function": call}],
        }
        return _render(template, [*asked, answer], add_generation_prompt=False, tools=[_TOOL])

    end = time.thread_time() + PROBE_SECONDS
    ways: tuple[ArgumentsAs, ...] = ("object", "text", "texts")
    for id_, null_content, arguments_as in itertools.product(_IDS, (False, True), ways):
        text = rendered(id_, null_content, arguments_as) if time.thread_time() < end else None
        form = None if text is None else _form_in(text, prompt, id_)
        if form is not None:
            short_ids = rendered(_LONG_ID, null_content, arguments_as) is None
            return ToolStyle(form, lists_tools, True, arguments_as, null_content, thinks, short_ids)
    return ToolStyle(thinks=thinks)


def arguments_for(arguments: Mapping[str, Any], arguments_as: ArgumentsAs) -> dict[str, Any] | str:
    """A call's arguments as a template takes them."""
    if arguments_as == "text":
        return _json(arguments)
    if arguments_as == "texts":
        return {key: value if isinstance(value, str) else _json(value) for key, value in arguments.items()}
    return dict(arguments)


def _render(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str | None:
    try:
        return template.render(messages, **options)
    except EngineError:  # the template refuses the probe
        return None


def _form_in(text: str, prompt: str, id_: str) -> ToolForm | None:
    """The form of the probe call in a rendered conversation."""
    answer = _dense(text[_n_common(text, prompt) :])
    for form in FORMS:
        index = id_.rpartition(":")[2]
        written = _dense(form.write([(_NAME, _ARGUMENTS)], [index if form.name == "kimi-k2" else id_]))
        for one in {written, written.removesuffix(_dense(form.section[1]))}:
            place = answer.find(one)
            if place >= 0 and _THOUGHT.fullmatch(answer[:place]):
                return form
        for number in ("0", "1"):  # some templates number the calls
            place = answer.find(_dense(form.write([(_NAME, _ARGUMENTS)], [number])))
            if place >= 0 and _THOUGHT.fullmatch(answer[:place]):
                return form
    return None


def _dense(text: str) -> str:
    return "".join(text.split())


def _n_common(text: str, prompt: str) -> int:
    """Length of the common prefix of a conversation and its prompt, without a partial tag."""
    n = next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt)))
    tag = text.rfind("<", 0, n)
    return tag if tag >= 0 and ">" not in text[tag:n] else n
