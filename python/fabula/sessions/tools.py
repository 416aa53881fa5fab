"""Tools that a model may call: how it is told of them, and how it is held to them.

Pure functions. Definitions are those of OpenAI's API. The model writes a call as text, in the form of the Hermes models
(NousResearch, "Hermes Function Calling") that Qwen's templates use too; `sessions/calls.py` reads it:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Rome"}}
    </tool_call>

Some vocabularies have the tags as tokens of their own. Where those are shown as text they are used like any token;
where they are control tokens, a constraint lets the tags be written in other tokens, and so they are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabula.engine.constraint import WHITESPACE, Constraint
from fabula.errors import InvalidArgument
from fabula.sessions.calls import CLOSE, OPEN, ToolCall, ToolCallReader, parse_tool_calls

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate

__all__ = [
    "MAX_TOOLS",
    "Tool",
    "ToolCall",
    "ToolCallReader",
    "call_text",
    "parse_tool_calls",
    "text_of",
    "tool_constraint",
    "tools_of",
    "with_tools",
]

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called.

    Attributes:
        name: 1 .. 64 of A-Z a-z 0-9 _ -.
        description: what it does.
        parameters: JSON schema of its arguments, an object.
        strict: whether a keyword of the schema that cannot be enforced is an error; else it is passed over.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def to_json(self) -> dict[str, Any]:
        """The definition as templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


# ---- Definitions ----------------------------------------------------------------------------------------------------


def tools_of(definitions: Sequence[Mapping[str, Any]]) -> list[Tool]:
    """Tools from their definitions, `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises:
        InvalidArgument: names the place, such as tools[2].function.name.
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
        raise InvalidArgument(f"{where}.function.name is {name!r:.80}, must be 1 .. 64 of A-Z a-z 0-9 _ -")
    if not isinstance(description, str | None):
        raise InvalidArgument(f"{where}.function.description must be text")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidArgument(f"{where}.function.strict is {strict!r:.40}, must be true or false")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidArgument(f'{where}.function.parameters must be a schema of type "object"')
    try:
        Constraint.json_schema(parameters)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}.function.parameters: {error}") from None
    return Tool(name, description or "", {"type": "object", **parameters}, bool(strict))


# ---- Telling the model ----------------------------------------------------------------------------------------------

_INSTRUCTIONS = """You may call functions to answer the user. They are described as JSON within <tools></tools>:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON within <tool_call></tool_call>:
<tool_call>
{{"name": <name of the function>, "arguments": <object with its arguments>}}
</tool_call>"""


def with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: ChatTemplate
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A conversation with tools, ready to be rendered.

    A template that reads `tools` and words calls with the tags above gets the definitions, and calls and results as
    they are, with arguments as objects. For any other the definitions are put into the system message, calls into the
    assistant's text, and results into messages of the user.

    Args:
        messages: as in OpenAI's API, with `tool_calls` of the assistant and messages of the role "tool".
        tools: definitions; none where only the past holds calls.
        template: of the model.

    Returns:
        The messages and the options for `ChatTemplate.render`.

    Raises:
        InvalidArgument: a definition or a call is malformed; names the place.
    """
    known = tools_of(tools)
    plain = [_with_calls(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if template.reads("tools") and OPEN in template.source:
        return plain, {"tools": [tool.to_json() for tool in known]} if known else {}
    worded = list(_worded(plain))
    if known:
        lines = "\n".join(json.dumps(tool.to_json(), ensure_ascii=False) for tool in known)
        text = _INSTRUCTIONS.format(tools=lines)
        if worded and worded[0].get("role") == "system":
            worded[0]["content"] = f"{text_of(worded[0].get('content'))}\n\n{text}".lstrip()
        else:
            worded.insert(0, {"role": "system", "content": text})
    return worded, {}


def _with_calls(message: Message, where: str) -> dict[str, Any]:
    """A copy whose calls have their arguments as objects, as templates want them."""
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
        raise InvalidArgument(f"{where}.function.name is {name!r:.80}, must be 1 .. 64 of A-Z a-z 0-9 _ -")
    if isinstance(arguments, str):
        arguments = _object(arguments or "{}")
    if not isinstance(arguments, Mapping):
        raise InvalidArgument(f"{where}.function.arguments must be a JSON object")
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _worded(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages with calls and results as text; results that follow each other in one message."""
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
    """A call as the model writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{OPEN}\n{body}\n{CLOSE}"


def text_of(content: object) -> str:
    """A message's content as text: that of its text parts, if it is a list of parts."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


# ---- Holding it to them ---------------------------------------------------------------------------------------------


def tool_constraint(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None = "auto", parallel: bool = True
) -> Constraint | None:
    """What an answer must look like so that its calls can be carried out.

    Args:
        tools: definitions.
        choice: "none"; "auto" for any text, in which a call, once its tag is written, is held to a tool and its
            schema; "required" for calls only; a function by name, as {"type": "function", "function": {"name": ...}}
            or {"type": "function", "name": ...}, for calls of that only. None is "auto".
        parallel: whether there may be several calls. If not, the answer ends with the first.

    Returns:
        The constraint; None where there is nothing to hold the model to.

    Raises:
        InvalidArgument: a definition or the choice is malformed, or no such tool.
    """
    known = tools_of(tools)
    mode, chosen = _chosen(known, "auto" if choice is None else choice)
    if mode == "none" or not chosen:
        return None
    if mode == "auto":
        # Of the two lexemes the lazy one wins as soon as its tag is complete.
        call = f'head WS? body WS? "{CLOSE}"'
        start = f"start: ({call})* text" if parallel else f"start: text | {call}"
        rules = [start, f"head[lazy]: /(?s:.*){OPEN}/", "text: /(?s:.*)/"]
    else:
        rules = ["start: call (WS? call)*" if parallel else "start: call", f'call: "{OPEN}" WS? body WS? "{CLOSE}"']
    rules.append("body: " + " | ".join(f"body_{i}" for i in range(len(chosen))))
    for i, tool in enumerate(chosen):
        head = '{"name": ' + json.dumps(tool.name) + ', "arguments": '
        options = {"whitespace_pattern": WHITESPACE} | ({} if tool.strict else {"lenient": True})
        schema = json.dumps({**tool.parameters, "x-guidance": options}, ensure_ascii=False)
        rules.append(f'body_{i}: {json.dumps(head)} arguments_{i} "}}"\narguments_{i}: %json {schema}')
    return Constraint.lark("\n".join([*rules, r"WS: /[ \n]{1,4}/"]))


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


def _object(text: str) -> dict[str, Any] | None:
    """A JSON object, None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
