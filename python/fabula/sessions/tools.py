"""Tools that a model may call: their definitions in the prompt, and the constraint on its answers.

Pure functions. Definitions are those of OpenAI's API. The form of calls is detected from the chat template
(`tool_forms.py`); `tool_grammar.py` constrains an answer to that form and `tool_call_parser.py` parses it.
`Calling` puts them together for one request.

Tags of calls that are control tokens of the vocabulary are generated as such, and stay in the answer's text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabula.engine.constraint import Constraint
from fabula.engine.json_schema import check_limits
from fabula.errors import InvalidArgument
from fabula.sessions.call_events import loaded
from fabula.sessions.call_parser import CallParser
from fabula.sessions.tool_call_parser import (
    END_OF_THOUGHT,
    THINK,
    Thought,
    ToolCall,
    ToolCallParser,
    parse_tool_calls,
    parser_of,
)
from fabula.sessions.tool_forms import (
    HERMES,
    MAX_NAME,
    NAME,
    ToolForm,
    ToolStyle,
    arguments_for,
    opens_thought,
    style_of,
)
from fabula.sessions.tool_grammar import CallableTool, tool_grammar
from fabula.text.reasoning import form_of
from fabula.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate

__all__ = [
    "MAX_TOOLS",
    "Calling",
    "Tool",
    "ToolCall",
    "ToolCallParser",
    "call_text",
    "parse_tool_calls",
    "text_of",
    "tool_constraint",
    "tools_of",
    "with_tools",
]

MAX_TOOLS = 128
_NAME = re.compile(NAME)

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called.

    Attributes:
        name: 1 .. MAX_NAME of A-Z a-z 0-9 _ - . /.
        description: what it does.
        parameters: JSON schema of its arguments, an object.
        strict: whether a keyword of the schema that cannot be enforced is an error; otherwise it is ignored.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def to_json(self) -> dict[str, Any]:
        """The definition as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


# ---- Definitions ----------------------------------------------------------------------------------------------------


def tools_of(definitions: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Tools from their definitions, `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises:
        InvalidArgument: names the key, such as tools[2].function.name.
    """
    if isinstance(definitions, str | Mapping) or not isinstance(definitions, Sequence):
        raise InvalidArgument("tools must be a list of definitions")
    if len(definitions) > MAX_TOOLS:
        raise InvalidArgument(f"tools holds {len(definitions)} definitions, at most {MAX_TOOLS} are allowed")
    tools = [_tool(definition, f"tools[{i}]") for i, definition in enumerate(definitions)]
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidArgument(f"tools[{i}].function.name is {name!r} a second time")
    return tools


def _tool(definition: object, where: str) -> Tool:
    if not isinstance(definition, Mapping):
        raise InvalidArgument(f"{where} must be an object")
    if definition.get("type") != "function":
        raise InvalidArgument(f'{where}.type is {definition.get("type")!r:.40}, must be "function"')
    function = definition.get("function")
    if not isinstance(function, Mapping):
        raise InvalidArgument(f"{where}.function must be an object")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(f"{where}.function.name is {name!r:.80}, must be 1 .. {MAX_NAME} of A-Z a-z 0-9 _ - . /")
    if not isinstance(description, str | None):
        raise InvalidArgument(f"{where}.function.description must be a string")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidArgument(f"{where}.function.strict is {strict!r:.40}, must be true or false")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidArgument(f'{where}.function.parameters must be a schema of type "object"')
    try:
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{where}.function.parameters is not JSON: {error}") from None
    check_limits(parameters, f"{where}.function.parameters", strict=bool(strict))
    return Tool(name, description or "", {"type": "object", **parameters}, bool(strict))


# ---- Tools in the prompt --------------------------------------------------------------------------------------------

_TOOLS = """You may call functions to answer the user. They are described as JSON within <tools></tools>:
<tools>
{tools}
</tools>
"""
_IN_HERMES = """To call a function, write its name and its arguments as JSON within <tool_call></tool_call>:
<tool_call>
{"name": <name of the function>, "arguments": <object with its arguments>}
</tool_call>"""
_IN_FORM = "To call a function, here named example_function with the argument city, write:\n"


def with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: ChatTemplate
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A conversation with tools, ready to be rendered.

    A template that renders calls gets calls and results as they are, with arguments as it takes them; for any other,
    calls are put into the assistant's text, and results into messages of the user. A template that renders both calls
    and definitions gets the definitions; for any other they are put into the system message.

    Args:
        messages: as in OpenAI's API, with `tool_calls` of the assistant and messages of the role "tool".
        tools: definitions; none if only past messages have calls.
        template: of the model.

    Returns:
        The messages and the options for `ChatTemplate.render`.

    Raises:
        InvalidArgument: a definition or a call is malformed; names the key.
    """
    known = tools_of(tools)
    plain = [_with_calls(message, f"messages[{i}]") for i, message in enumerate(messages)]
    style = style_of(template)
    prepared = [_styled(message, style) for message in plain] if style.writes_calls else list(_as_text(plain))
    if style.writes_calls and style.lists_tools:
        return prepared, {"tools": [tool.to_json() for tool in known]} if known else {}
    if known:
        lines = "\n".join(json.dumps(tool.to_json(), ensure_ascii=False) for tool in known)
        text = _TOOLS.format(tools=lines) + _instruction(style.form)
        if prepared and prepared[0].get("role") == "system":
            prepared[0]["content"] = f"{text_of(prepared[0].get('content'))}\n\n{text}".lstrip()
        else:
            prepared.insert(0, {"role": "system", "content": text})
    return prepared, {}


def _instruction(form: ToolForm) -> str:
    """The instruction how to write calls."""
    return _IN_HERMES if form is HERMES else _IN_FORM + form.write([("example_function", {"city": "Rome"})])


def _styled(message: dict[str, Any], style: ToolStyle) -> dict[str, Any]:
    """A message with its calls, or the id of one, as the template takes them."""
    if style.short_ids and isinstance(message.get("tool_call_id"), str):
        message["tool_call_id"] = _short(message["tool_call_id"])
    calls = message.get("tool_calls")
    if not calls:
        return message
    made = []
    for call in calls:
        function = call["function"]
        arguments = arguments_for(function["arguments"], style.arguments_as)
        more = {"id": _short(str(call.get("id", "")))} if style.short_ids else {}
        made.append({**call, **more, "function": {**function, "arguments": arguments}})
    content = message["content"] or None if style.null_content else message["content"]
    return {**message, "content": content, "tool_calls": made}


def _short(id_: str) -> str:
    """An id of 9 letters and digits, the same each time for the same id."""
    return id_ if re.fullmatch("[A-Za-z0-9]{9}", id_) else hashlib.sha256(id_.encode()).hexdigest()[:9]


def _with_calls(message: Message, where: str) -> dict[str, Any]:
    """A copy whose calls have their arguments as objects, as templates expect."""
    if not isinstance(message, Mapping):
        raise InvalidArgument(f"{where} must be an object with role and content")
    copy, calls = dict(message), message.get("tool_calls")
    if calls is None:
        copy.pop("tool_calls", None)
        return copy
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise InvalidArgument(f"{where}.tool_calls must be a list")
    copy["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    copy["content"] = text_of(copy.get("content"))
    return copy


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidArgument(f"{where}.function must be an object")
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(f"{where}.function.name is {name!r:.80}, must be 1 .. {MAX_NAME} of A-Z a-z 0-9 _ - . /")
    if isinstance(arguments, str):
        arguments = loaded(arguments or "{}")
    if not isinstance(arguments, Mapping):
        raise InvalidArgument(f"{where}.function.arguments must be a JSON object")
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _as_text(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages with calls and results as text; consecutive results become one message."""
    results: list[str] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(f"<tool_response>\n{text_of(message.get('content'))}\n</tool_response>")
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        calls = message.pop("tool_calls", None)
        if calls:
            texts = [message["content"]] if message["content"] else []
            texts += [call_text(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            message["content"] = "\n".join(texts)
        yield message
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call in Hermes' form, which is used if a template renders no calls."""
    return HERMES.write([(name, arguments)])


def text_of(content: object) -> str:
    """A message's content as text; the text parts of a list of parts."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


# ---- The constraint on answers --------------------------------------------------------------------------------------


def tool_constraint(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None = "auto",
    parallel: bool = True,
    *,
    form: ToolForm = HERMES,
    tokenizer: Tokenizer | None = None,
    thought: Thought = "",
    marks: tuple[str, str] = (THINK, END_OF_THOUGHT),
    other: Constraint | None = None,
) -> Constraint | None:
    """The constraint that makes the calls of an answer valid.

    Args:
        tools: definitions.
        choice: "none"; "auto" for any text, in which a call must match a tool and its schema once its opening tag is
            generated; "required" for calls only; a function by name, as {"type": "function", "function": {"name": ...}}
            or {"type": "function", "name": ...}, for calls of that only. None is "auto".
        parallel: whether there may be several calls. If not, the answer ends with the first.
        form: of the calls.
        tokenizer: of the model; needed if tags of the form are control tokens.
        thought: as `ToolCallParser` takes it.
        marks: control tokens around a thought, of "tokens".
        other: constraint of an answer without calls; None for any text. With "required" or a name, it has no effect.

    Returns:
        The constraint; `other` if there is nothing to call.

    Raises:
        InvalidArgument: a definition or the choice is malformed, no such tool, or a kind of `other` that cannot be
            combined with calls.
    """
    known = tools_of(tools)
    mode, chosen = _chosen(known, "auto" if choice is None else choice)
    if mode == "none" or not chosen:
        return other
    callables = [
        CallableTool(tool.name, tool.parameters, tool.strict, f"tools[{known.index(tool)}].function.parameters")
        for tool in chosen
    ]
    return tool_grammar(
        form,
        callables,
        tokenizer,
        is_required=mode == "required",
        is_parallel=parallel,
        thought=thought,
        marks=marks,
        other=other,
    )


class Calling:
    """Tool calling of one request, in the form of its chat template.

    Args:
        template: of the model.
        tokenizer: of the model.
        tools: definitions.
        options: of the template, besides the tools.

    Attributes:
        form: of the calls.
        thought: whether answers start with a thought, as `ToolCallParser` takes it.
        is_exclusive: whether an answer is calls or something else, never both; `constraint` sets it.

    Raises:
        InvalidArgument: a definition is malformed.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        style = style_of(template)
        self.form, self._tokenizer, self._tools = style.form, tokenizer, tools
        self._schemas = {tool.name: tool.parameters for tool in tools_of(tools)}
        self.is_exclusive = False
        self.thought: Thought = ""
        self._marks = (THINK, END_OF_THOUGHT)
        form = form_of([template.source, *template.named.values()], tokenizer)
        if form is not None and not form.leads and {form.start, form.end} <= tokenizer.special_tokens.keys():
            self.thought, self._marks = "tokens", (form.start, form.end)
        elif style.thinks and self.form.opening not in tokenizer.special_tokens:
            is_open = opens_thought(template, **{"tools": list(tools), **(options or {})})
            self.thought = "open" if is_open and not self.form.is_first else "tagged"

    def constraint(
        self, choice: str | Mapping[str, Any] | None, parallel: bool, other: Constraint | None = None
    ) -> Constraint | None:
        """As `tool_constraint`."""
        self.is_exclusive = other is not None
        return tool_constraint(
            self._tools,
            choice,
            parallel,
            form=self.form,
            tokenizer=self._tokenizer,
            thought=self.thought,
            marks=self._marks,
            other=other,
        )

    def parser(self, *, has_thoughts: bool = True) -> CallParser:
        """A parser of one answer.

        Args:
            has_thoughts: whether thoughts are still part of the text; False after a `ReasoningParser`.
        """
        thought: Thought = self.thought if has_thoughts else ""
        return parser_of(self.form, self._schemas, thought, is_exclusive=self.is_exclusive)


def _chosen(tools: list[Tool], choice: object) -> tuple[str, list[Tool]]:
    """The mode and the tools that may be called."""
    if choice in ("none", "auto"):
        return str(choice), tools
    if choice == "required":
        if not tools:
            raise InvalidArgument('tool_choice is "required", but there are no tools')
        return "required", tools
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        raise InvalidArgument(
            f'tool_choice is {choice!r:.80}, must be "none", "auto", "required" or a function by its name'
        )
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    found = [tool for tool in tools if tool.name == name]
    if not found:
        raise InvalidArgument(f"tool_choice names {name!r:.80}, which is none of the tools")
    return "required", found
