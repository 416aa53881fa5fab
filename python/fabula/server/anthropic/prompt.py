"""Converts a request of Anthropic's Messages API to messages, tools and settings of this server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fabula.engine.constraint import Constraint
from fabula.engine.sampling import SamplingParams
from fabula.server.anthropic.schemas import MessageIn, MessagesBody, PromptBody
from fabula.server.borrowed import Json, ignore
from fabula.server.failures import refuse
from fabula.server.limits import Limits
from fabula.server.reasoning import Wish

# What the system prompt of Claude Code starts with, from version 2.1.36 on: bookkeeping whose hash changes with every
# request, so that no prefix of the prompt would ever be found in the KV cache. It says nothing to the model.
_BOOKKEEPING = re.compile(r"x-anthropic-billing-header:(?: *\w+=[^;\n]*;)*\s*")
_UNREADABLE = {"image": "image input is not supported", "document": "only documents with text are supported"}
# Blocks of history that only Anthropic's own servers make.
_FOREIGN = ("redacted_thinking", "server_tool_use", "mcp_tool_use", "container_upload", "compaction")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks the model.

    Attributes:
        messages: as in OpenAI's API, text as content.
        tools: definitions as in OpenAI's API.
        choice, parallel: as `tool_constraint` takes them.
    """

    messages: list[Json]
    tools: list[Json]
    choice: str | Json | None
    parallel: bool


def prompt_of(data: PromptBody, limits: Limits) -> Prompt:
    """The prompt of a request.

    Raises:
        ApiError: a block is malformed, too long, or holds something other than text; names the field.
    """
    limits.check_messages(len(data.messages), "messages")
    messages: list[Json] = []
    system = _system(data.system)
    if system:
        messages.append({"role": "system", "content": system})
    names: dict[str, str] = {}  # of the tools that were called, by the call's id
    for i, message in enumerate(data.messages):
        for one in _converted(message, f"messages[{i}]", names):
            _append(messages, one)
    for i, one in enumerate(messages):
        limits.check_text(one["content"], "system" if i == 0 and system else "messages")
    return Prompt(messages, *_tools(data))


# ---- Messages -------------------------------------------------------------------------------------------------------


def _system(given: object) -> str:
    texts = []
    for text in _texts(given or [], "system"):
        match = _BOOKKEEPING.match(text)
        texts.append(text[match.end() :] if match is not None else text)
    return "\n\n".join(text for text in texts if text)


def _texts(given: object, where: str) -> Iterator[str]:
    """The texts of a content: of itself, or of its blocks."""
    for place, block in _blocks(given, where):
        yield _text_in(block, place)


def _blocks(given: object, where: str) -> Iterator[tuple[str, Json]]:
    """The blocks of a content, each with its path."""
    if isinstance(given, str):
        yield where, {"type": "text", "text": given}
        return
    if not isinstance(given, list):
        raise refuse(where, "must be a string or a list of blocks")
    for i, block in enumerate(given):
        place = f"{where}[{i}]"
        if isinstance(block, str):
            block = {"type": "text", "text": block}
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise refuse(f"{place}.type", "is missing", "missing_field")
        yield place, block


def _text_in(block: Json, where: str) -> str:
    """The text of a block that holds one."""
    kind, source = block["type"], block.get("source")
    if kind == "text":
        return _string(block, "text", where)
    if kind == "search_result":
        parts = [str(block.get("title") or ""), *_texts(block.get("content", ""), f"{where}.content")]
        return "\n".join(part for part in parts if part)
    if kind == "document" and isinstance(source, dict):
        if source.get("type") == "text":
            return _string(source, "data", f"{where}.source")
        if source.get("type") == "content":
            return "".join(_texts(source.get("content", ""), f"{where}.source.content"))
    reason = _UNREADABLE.get(kind, "there is no such block here")
    raise refuse(f"{where}.type", f"is {kind[:40]!r}: {reason}; the model reads text", "unsupported")


def _string(block: Json, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise refuse(f"{where}.{name}", "must be a string")
    return value


def _converted(message: MessageIn, where: str, names: dict[str, str]) -> list[Json]:
    """A message as one or several of OpenAI's API: each result of a tool is a message of its own, before the text."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    results: list[Json] = []
    for place, block in _blocks(message.content, f"{where}.content"):
        kind = block["type"]
        if kind == "tool_use" and message.role == "assistant":
            calls.append(_call(block, place, names))
        elif kind == "thinking" and message.role == "assistant":
            thoughts.append(_string(block, "thinking", place))
        elif kind == "tool_result" and message.role == "user":
            results.append(_result(block, place, names))
        elif kind in _FOREIGN or (kind.endswith("_tool_result") and kind != "tool_result"):
            ignore(place)
        else:
            texts.append(_text_in(block, place))
    plain: Json = {"role": message.role, "content": "".join(texts)}
    if thoughts:
        plain["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        plain["tool_calls"] = calls
    return results if results and not plain["content"] else [*results, plain]


def _call(block: Json, where: str, names: dict[str, str]) -> Json:
    id, name = _string(block, "id", where), _string(block, "name", where)
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise refuse(f"{where}.input", "must be an object")
    names[id] = name
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(block: Json, where: str, names: dict[str, str]) -> Json:
    id = _string(block, "tool_use_id", where)
    content = block.get("content")
    text = "" if content is None else "".join(_texts(content, f"{where}.content"))
    if block.get("is_error") is True and "error" not in text[:64].lower():
        text = f"Error: {text}"
    named = {"name": names[id]} if id in names else {}
    return {"role": "tool", "content": text, "tool_call_id": id} | named


def _append(messages: list[Json], message: Json) -> None:
    """Adds a message; turns of one role in a row are one turn, as in Anthropic's API and in most templates."""
    last = messages[-1] if messages else {}
    if message["role"] != last.get("role") or message["role"] == "tool":
        messages.append(message)
        return
    joint = "" if message["role"] == "assistant" else "\n\n"
    for name, between in (("content", joint), ("reasoning_content", "\n\n")):
        if name in message or name in last:
            last[name] = between.join(text for text in (last.get(name), message.get(name)) if text)
    if "tool_calls" in message:
        last["tool_calls"] = last.get("tool_calls", []) + message["tool_calls"]


# ---- Tools ----------------------------------------------------------------------------------------------------------


def _tools(data: PromptBody) -> tuple[list[Json], str | Json | None, bool]:
    """Definitions, choice, and whether there may be several calls."""
    tools = []
    for i, tool in enumerate(data.tools or []):
        if "input_schema" not in tool:
            if tool.get("type") in (None, "custom"):
                raise refuse(f"tools[{i}].input_schema", "is missing", "missing_field")
            ignore(f"tools[{i}]")  # it runs on Anthropic's servers
            continue
        function = {"parameters" if key == "input_schema" else key: tool.get(key) for key in _TOOL_KEYS}
        tools.append({"type": "function", "function": function})
    choice = data.tool_choice
    if choice is None:
        return tools, None, True
    if choice.type in ("any", "tool") and not tools:
        raise refuse("tool_choice", "needs tools")
    if choice.type == "tool" and not choice.name:
        raise refuse("tool_choice.name", "is missing", "missing_field")
    word: str | Json = "required" if choice.type == "any" else choice.type
    if choice.type == "tool":
        word = {"type": "function", "function": {"name": choice.name}}
    return ([] if word == "none" else tools), word, choice.disable_parallel_tool_use is not True


_TOOL_KEYS = ("name", "description", "input_schema", "strict")

# ---- Settings -------------------------------------------------------------------------------------------------------


def params_of(data: MessagesBody) -> SamplingParams:
    """Sampling settings of a request, without the constraint of tools.

    Raises:
        ApiError, InvalidArgument: a setting is out of its range, or two exclude each other.
    """
    params = data.params(SamplingParams())
    if data.stop_sequences:
        params = replace(params, stop=(*params.stop, *data.stop_sequences))
    wanted = schema_of(data)
    if wanted is None:
        return params
    if params.constraint is not None:
        raise refuse("constraint", "and output_config.format exclude each other")
    schema = wanted if "x-guidance" in wanted else {**wanted, "x-guidance": {"lenient": True}}
    return replace(params, constraint=Constraint.json_schema(schema))


def schema_of(data: PromptBody) -> Json | None:
    """The JSON schema of the answer, under whichever name it was given."""
    config = data.output_config
    wanted = config.format if config is not None and config.format is not None else data.output_format
    return None if wanted is None else wanted.schema_


def thoughts_of(data: PromptBody) -> str:
    """What the answer tells of its thoughts, as `Blocks` takes it."""
    if data.thinking is None or data.thinking.type == "disabled":
        return ""
    return "omitted" if data.thinking.display == "omitted" else "shown"


def wish_of(data: PromptBody) -> Wish:
    """What a request says about thinking: without `thinking` there is none, as in Anthropic's API."""
    if data.thinking is None or not thoughts_of(data):
        return Wish(False)
    effort = data.output_config.effort if data.output_config is not None else None
    return Wish(True, effort, data.thinking.budget_tokens)
