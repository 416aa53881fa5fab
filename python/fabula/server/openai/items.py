"""Items of responses: converts a client's items to messages, and an answer to items, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fabula.engine.sampling import SamplingParams
from fabula.server.failures import refuse
from fabula.server.limits import Limits
from fabula.server.openai.format import Json
from fabula.server.openai.messages import text_of
from fabula.server.reasoning import parser_of as reasoning_parser_of
from fabula.sessions.tool_call_parser import Arguments, CallEnded, CallParser, CallStarted, Content, parser_of
from fabula.sessions.tool_call_parser import Event as Read
from fabula.sessions.tool_forms import HERMES
from fabula.sessions.tools import Calling
from fabula.text.reasoning import Part

ROLES = ("user", "assistant", "system", "developer")

# ---- Input ----------------------------------------------------------------------------------------------------------


def messages_of(given: str | list[Json], limits: Limits) -> list[Json]:
    """Messages from the input of a request.

    Raises:
        ApiError: an item is malformed or too long; names the field.
    """
    if isinstance(given, str):
        limits.check_text(given, "input")
        return [{"role": "user", "content": given}]
    found: list[Json] = []
    thought = ""  # of a reasoning item, which belongs to the assistant's next message
    for i, item in enumerate(given):
        where = f"input[{i}]"
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            found.append(_message(item, where))
        elif kind == "function_call_output":
            output = text_of(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "content": output, "tool_call_id": _text(item, "call_id", where)})
        elif kind == "function_call":
            _add_call(found, item, where)
        elif kind == "reasoning":
            thought += _thought(item)
        else:
            raise refuse(
                f"{where}.type",
                f"is {str(kind)[:40]!r}, must be message, reasoning, function_call or function_call_output",
                "unsupported",
            )
        if thought and found and found[-1]["role"] == "assistant" and kind != "reasoning":
            limits.check_text(thought, where)
            found[-1].setdefault("reasoning_content", thought)
            thought = ""
        if found:
            limits.check_text(found[-1]["content"], where)
    if not found or found[-1]["role"] == "assistant":
        raise refuse("input", "must end with a message of the user or a tool's output")
    return found


def exchanges_of(items: list[Json], limits: Limits) -> list[tuple[list[Json], str]]:
    """Messages and the answers to them, from the items of a conversation; the last answer is "" if there is none yet.

    Raises:
        ApiError: an item is no message, is malformed or too long, or an answer comes first; names the field.
    """
    found: list[tuple[list[Json], str]] = []
    messages: list[Json] = []
    is_answer = False
    for i, item in enumerate(items):
        where = f"items[{i}]"
        kind = item.get("type") or "message"
        if kind == "reasoning":  # no template renders thoughts of the past
            continue
        if kind != "message":
            raise refuse(
                f"{where}.type",
                f"is {str(kind)[:40]!r}: a conversation takes messages; give calls and results to /v1/responses",
                "unsupported",
            )
        message = _message(item, where)
        limits.check_text(message["content"], where)
        if message["role"] != "assistant":
            messages.append(message)
        elif messages:
            found.append((messages, message["content"]))
            messages = []
        elif is_answer:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n\n{message['content']}")
        else:
            raise refuse(where, "is the assistant's; a conversation begins with another message")
        is_answer = message["role"] == "assistant"
    return [*found, (messages, "")] if messages else found


def _message(item: Json, where: str) -> Json:
    role = item.get("role")
    if role not in ROLES:
        raise refuse(f"{where}.role", f"is {str(role)[:40]!r}, must be one of {', '.join(ROLES)}")
    return {
        "role": "system" if role == "developer" else role,
        "content": text_of(item.get("content"), f"{where}.content"),
    }


def _thought(item: Json) -> str:
    """The text of a reasoning item; "" for one that is encrypted."""
    for name in ("content", "summary"):
        parts = item.get(name)
        if isinstance(parts, list) and parts:
            return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
    return ""


def _add_call(found: list[Json], item: Json, where: str) -> None:
    """Adds a call to the assistant's message before it, if there is one."""
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    call = {
        "id": _text(item, "call_id", where),
        "type": "function",
        "function": {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)},
    }
    found[-1].setdefault("tool_calls", []).append(call)


def _text(item: Json, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise refuse(f"{where}.{name}", "must be a string")
    return value


def tools_of(given: list[Json] | None) -> list[Json]:
    """Converts the flat definitions of tools of a response to those of chat.

    Raises:
        ApiError: a tool is not a function.
    """
    found = []
    for i, tool in enumerate(given or []):
        if tool.get("type") != "function":
            raise refuse(
                f"tools[{i}].type", f"is {str(tool.get('type'))[:40]!r}: only functions are supported", "unsupported"
            )
        found.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
    return found


def flat_tools(tools: list[Json]) -> list[Json]:
    """Converts definitions of chat to those of a response."""
    return [{"type": "function"} | tool["function"] for tool in tools]


# ---- What was answered ----------------------------------------------------------------------------------------------


# Items of text: prefix of the id, type of their part, name in events.
_TEXT_ITEMS = {
    "message": ("msg", "output_text", "output_text"),
    "reasoning": ("rs", "reasoning_text", "reasoning_text"),
}


class Output:
    """The items of an answer, built from its text as it is generated.

    Args:
        key: prefix of their ids.
        parses_calls: whether to parse tool calls.
        calling: gives the form of the calls; None for Hermes'.
        params: of the answer; `thinking` says which marks its thoughts have.

    Attributes:
        items: so far.
    """

    def __init__(
        self, key: str, parses_calls: bool, calling: Calling | None = None, params: SamplingParams | None = None
    ) -> None:
        self._key = key
        self._parser: CallParser | None = None
        has_thoughts = params is None or params.thinking is None
        if parses_calls:
            self._parser = calling.parser(has_thoughts=has_thoughts) if calling is not None else parser_of(HERMES)
        is_harmony = calling is not None and calling.form.arguments == "harmony"
        self._thoughts = reasoning_parser_of(params, is_raw=is_harmony)
        self._open = ""  # type of the item that text is added to
        self._blanks, self._cut = "", False
        self.items: list[Json] = []

    def feed(self, text: str) -> Iterator[Json]:
        """Adds text; returns the events of the items."""
        yield from self._separate(self._thoughts.feed(text))

    def _separate(self, parts: list[Part]) -> Iterator[Json]:
        """Adds thoughts and the other text."""
        for kind, text in parts:
            if kind == "reasoning":
                yield from self._say(text, "reasoning")
                continue
            for event in self._parser.feed(text) if self._parser is not None else [Content(text)]:
                yield from self._take(event)

    def finish(self, *, is_whole: bool, ended_itself: bool | None = None) -> Iterator[Json]:
        """At the end of the text: the remaining events. There is always an item.

        Args:
            is_whole: whether the answer was not truncated.
            ended_itself: whether the model ended it, not a stop string. None: as `is_whole`.
        """
        ended = is_whole if ended_itself is None else ended_itself
        yield from self._separate(self._thoughts.finish())
        for event in self._parser.finish(is_whole=ended) if self._parser is not None else []:
            yield from self._take(event)
        self._cut = not is_whole
        if not self.items:
            yield from self._say("", "message", waits=False)
        yield from self._close()

    def _take(self, event: Read) -> Iterator[Json]:
        match event:
            case Content(text):
                yield from self._say(text, "message")
            case CallStarted(_, name):
                yield from self._close()
                yield from self._begin_call(name)
            case Arguments(_, text):
                self.items[-1]["arguments"] += text
                yield self._about("response.function_call_arguments.delta", delta=text)
            case CallEnded(_, is_valid, _):
                item = self.items[-1]
                item["status"] = "completed" if is_valid else "incomplete"
                arguments = item["arguments"]
                yield self._about("response.function_call_arguments.done", name=item["name"], arguments=arguments)
                yield self._added("response.output_item.done")

    def _say(self, text: str, kind: str, *, waits: bool = True) -> Iterator[Json]:
        """Adds text to the open item of that type, or to a new one."""
        prefix, part_type, name = _TEXT_ITEMS[kind]
        if self._open != kind:
            yield from self._close()
            text, self._blanks = self._blanks + text, ""
            if waits and self._parser is not None and text.isspace():  # there may be nothing but calls
                self._blanks = text
                return
            self._open = kind
            part: Json = {"type": part_type, "text": ""}
            item: Json = {"id": f"{prefix}_{self._key}_{len(self.items)}", "type": kind}
            if kind == "message":
                part |= {"annotations": [], "logprobs": []}
                item |= {"role": "assistant", "status": "in_progress", "content": []}
            else:
                item |= {"summary": [], "status": "in_progress", "content": []}
            self.items.append(item)
            yield self._added("response.output_item.added")
            item["content"] = [part]
            yield self._about("response.content_part.added", content_index=0, part=dict(part))
        if text:
            self.items[-1]["content"][0]["text"] += text
            more: Json = {"logprobs": []} if kind == "message" else {}
            yield self._about(f"response.{name}.delta", content_index=0, delta=text, **more)

    def _close(self) -> Iterator[Json]:
        """Ends the open item."""
        if not self._open:
            return
        name = _TEXT_ITEMS[self._open][2]
        more: Json = {"logprobs": []} if self._open == "message" else {}
        self._open = ""
        item = self.items[-1]
        item["status"] = "incomplete" if self._cut else "completed"
        part = item["content"][0]
        yield self._about(f"response.{name}.done", content_index=0, text=part["text"], **more)
        yield self._about("response.content_part.done", content_index=0, part=dict(part))
        yield self._added("response.output_item.done")

    def _begin_call(self, name: str) -> Iterator[Json]:
        self._blanks = ""
        n = len(self.items)
        self.items.append(
            {
                "id": f"fc_{self._key}_{n}",
                "type": "function_call",
                "call_id": f"call_{self._key[-16:]}_{n}",
                "name": name,
                "arguments": "",
                "status": "in_progress",
            }
        )
        yield self._added("response.output_item.added")

    def _added(self, kind: str) -> Json:
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def _about(self, kind: str, **details: Any) -> Json:
        index = len(self.items) - 1
        return {"type": kind, "item_id": self.items[index]["id"], "output_index": index, **details}
