"""Parser of tool calls in an answer, complete or streamed, in any form of `tool_forms.py`.

Anything that is not a call is content: unclosed tags, invalid JSON, text between calls, thoughts. A partial tag is held
back until it is decided. Text is a call as soon as its name is complete; a call that breaks off is marked as not
complete. Complete answers go through the streaming parser too, so both give the same result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from fabula.sessions.argument_scan import KeywordScanner, ObjectScanner
from fabula.sessions.call_events import (
    Arguments,
    Blanks,
    CallEnded,
    CallStarted,
    Content,
    Event,
    ToolCall,
    gathered,
    loaded,
)
from fabula.sessions.call_parser import CallParser, State
from fabula.sessions.harmony import HarmonyParser
from fabula.sessions.tool_forms import HERMES, NAME, ToolForm
from fabula.sessions.tool_syntax import Syntax, matched
from fabula.sessions.tool_values import KINDS, json_of, json_of_python, kinds_of
from fabula.text.reasoning import n_half

__all__ = [
    "Arguments",
    "Blanks",
    "CallEnded",
    "CallParser",
    "CallStarted",
    "Content",
    "Event",
    "ToolCall",
    "ToolCallParser",
    "gathered",
    "parse_tool_calls",
    "parser_of",
]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_HEAD = 256  # characters within which the name must be complete for arguments to be streamed
THINK, END_OF_THOUGHT = "<think>", "</think>"
_NAME = re.compile(NAME)
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(.*)", re.DOTALL)

# Whether an answer may start with <think>, starts after it, or may think between control tokens, which leave no text.
Thought = Literal["", "tagged", "open", "tokens"]


class ToolCallParser(CallParser):
    """Parses calls in text that arrives in pieces, which may break anywhere.

    Args:
        form: of the calls.
        schemas: of the arguments, by tool name; they decide which values are strings.
        thought: whether the answer may start with a thought in <think> tags ("tagged"), or starts inside one ("open");
            no calls are searched in it. Thoughts between control tokens ("tokens") are not visible.
        is_exclusive: whether an answer is calls or something else, never both: then an answer that does not start with
            a call is all content.

    Example:
        >>> parser = ToolCallParser()
        >>> parser.feed("Let me see.<tool")
        [Content(text='Let me see.')]
    """

    def __init__(
        self,
        form: ToolForm = HERMES,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        thought: Thought = "",
        *,
        is_exclusive: bool = False,
    ) -> None:
        self._form, self._schemas = form, schemas or {}
        self._syntax = Syntax.of(form)
        self._index = 0
        self._sought = 0  # leading characters of the held text without a closing tag
        self._raw: list[str] = []  # text of the current call
        self._arguments: list[str] = []
        self._object, self._keywords = ObjectScanner(), KeywordScanner()
        self._in_section = False  # the next call is not the first of its section
        self._kinds = KINDS  # JSON types of the current value
        self._has_value, self._has_quote = False, False  # whether the current value, and its quote, have started
        self._is_bad = False
        self._after_call = False  # white space here only separates calls
        after_thought: State = self._start if form.is_first else self._text
        if is_exclusive and not form.is_first:
            thought, after_thought = "", self._either
        super().__init__({"tagged": self._before_thought, "open": self._opened}.get(thought, after_thought))

    def finish(self, *, is_whole: bool = True) -> list[Event]:
        """As `CallParser.finish`."""
        events: list[Event] = []
        held, self._held = self._held, ""
        state = self._state
        if state == self._start and not is_whole:
            self._end_of_head(held, is_whole, events)
        elif state in (self._before_thought, self._thought, self._rest_is_text):
            self._emit(held, events)
        elif state in (self._either, self._opened, self._text, self._start, self._between):
            if is_whole:
                self._emit(held, events)
        elif state in (self._head, self._whole):
            self._end_of_head(held, is_whole, events)
        else:
            if state == self._value:
                self._end_of_value(held, events)
            elif state == self._python:
                self._raw.append(held)
                self._is_bad = True
            else:
                self._raw.append(held)
            self._end(events)
        return events

    # ---- States outside of calls ------------------------------------------------------------------------------------

    def _before_thought(self, _: list[Event]) -> bool:
        """Where a thought may start."""
        text = self._held.lstrip()
        if len(text) < len(THINK) and THINK.startswith(text):
            return False
        self._state = self._thought if text.startswith(THINK) else self._start if self._form.is_first else self._text
        return True

    def _either(self, _: list[Event]) -> bool:
        """At the start of an answer that is calls, or something else."""
        text, opening = self._held.lstrip(), self._syntax.opening
        if len(text) < len(opening) and opening.startswith(text):
            return False
        self._state = self._text if text.startswith(opening) else self._rest_is_text
        return True

    def _opened(self, _: list[Event]) -> bool:
        """Inside a thought that the prompt has started, unless a call comes first."""
        text, opening = self._held.lstrip(), self._syntax.opening
        if len(text) < len(opening) and opening.startswith(text):
            return False
        self._state = self._text if text.startswith(opening) else self._thought
        return True

    def _thought(self, events: list[Event]) -> bool:
        place = self._held.find(END_OF_THOUGHT)
        end = place + len(END_OF_THOUGHT) if place >= 0 else len(self._held) - n_half(self._held, END_OF_THOUGHT)
        self._emit(self._held[:end], events)
        self._held = self._held[end:]
        if place < 0:
            return False
        self._state = self._start if self._form.is_first else self._text
        return True

    def _start(self, events: list[Event]) -> bool:
        """At the start of an answer whose calls have no mark."""
        match = self._syntax.first.match(self._held[:MAX_HEAD])
        if match is not None:
            self._take_head(match, events)
            return True
        if len(self._held) < MAX_HEAD and self._syntax.may_begin(self._held):
            return False
        self._state = self._rest_is_text
        return True

    def _rest_is_text(self, events: list[Event]) -> bool:
        self._emit(self._held, events)
        self._held = ""
        return False

    def _text(self, events: list[Event]) -> bool:
        opening = self._syntax.opening
        start = self._held.find(opening)
        if start >= 0:
            self._emit(self._held[:start], events)
            self._held = self._held[start + len(opening) :]
            self._raw, self._in_section, self._state = [opening], False, self._head
            return True
        n_held = n_half(self._held, opening)
        self._emit(self._held[: len(self._held) - n_held], events)
        self._held = self._held[len(self._held) - n_held :]
        return False

    def _between(self, _: list[Event]) -> bool:
        """After a call of a section: another one, or the section's end."""
        close = matched(self._held, self._form.section[1]) if self._form.section[1] else None
        more = matched(self._held, self._form.separator + self._syntax.mark)
        if close is not None and close >= 0:
            self._held = self._held[close:]
        elif more is not None and more > 0:
            self._held = self._held[matched(self._held, self._form.separator) or 0 :]
            self._raw, self._in_section, self._state = [], True, self._head
            return True
        elif -1 in (close, more):
            return False
        self._state = self._rest_is_text if self._form.is_first else self._text
        return True

    # ---- States inside of calls -------------------------------------------------------------------------------------

    def _head(self, events: list[Event]) -> bool:
        """After the opening tag, up to the arguments."""
        syntax = self._syntax
        match = (syntax.next if self._in_section else syntax.first).match(self._held[:MAX_HEAD])
        if match is not None:
            self._take_head(match, events)
            return True
        if len(self._held) > MAX_HEAD or (syntax.close and syntax.close in self._held):
            if syntax.is_object and syntax.close:
                self._state = self._whole
            else:  # not a call
                self._state = self._text
                self._emit("".join(self._raw), events)
            return True
        return False

    def _take_head(self, match: re.Match[str], events: list[Event]) -> None:
        self._raw.append(match[0])
        self._held = self._held[match.end() :]
        self._begin(match["name"], events)
        self._object, self._keywords = ObjectScanner(), KeywordScanner()
        self._state = {"json": self._body, "tagged": self._parameter, "python": self._python}[self._form.arguments]

    def _body(self, events: list[Event]) -> bool:
        """Inside JSON arguments, up to the closing brace."""
        self._emit_arguments(self._take(self._object.end(self._held)), events)
        if self._object.depth == 0:
            self._object, self._state = ObjectScanner(depth=1), self._tail
        return bool(self._held)

    def _tail(self, events: list[Event]) -> bool:
        """After the arguments, up to the closing tag, which may be missing; other keys are skipped."""
        syntax = self._syntax
        if not syntax.is_object:
            end = matched(self._held, self._form.call[2])
            if end == -1:
                return False
            self._take(end or 0)
        elif syntax.close and not self._held.lstrip().startswith("}"):
            if not self._held.strip():
                return False
            place = self._place_of_close()
            if place < 0:
                return False
            self._take(place + len(syntax.close))
        elif syntax.close:
            end = matched(self._held, self._form.call[2])
            if end == -1:
                return False
            self._take(self._held.index("}") + 1 if end is None else end)
        else:
            self._take(self._object.end(self._held))
            if self._object.depth:
                return False
        self._end(events)
        return bool(self._held)

    def _parameter(self, events: list[Event]) -> bool:
        """Before a tagged argument, or the call's end."""
        form, syntax = self._form, self._syntax
        match = syntax.parameter.match(self._held[:MAX_HEAD])
        if match is not None:
            self._take(match.end())
            schema = self._schemas.get(self._name, {})
            properties = schema.get("properties")
            known = properties.get(match["key"]) if isinstance(properties, Mapping) else None
            self._kinds = kinds_of(known, schema) if known is not None else KINDS
            if form.other_middle is not None:
                self._kinds = frozenset(("string",)) if match["other"] is None else KINDS - {"string"}
            key = json.dumps(match["key"], ensure_ascii=False)
            self._emit_arguments(("{" if not self._arguments else ", ") + key + ": ", events)
            self._state, self._has_value, self._has_quote, self._sought = self._value, False, False, 0
            return True
        begun = matched(self._held, form.parameter[0])
        end = matched(self._held, form.call[2])
        if begun is None and end is not None and end >= 0:
            self._take(end)
            self._emit_arguments("{}" if not self._arguments else "}", events)
            self._end(events)
            return bool(self._held)
        if (begun is not None or end == -1) and len(self._held) <= MAX_HEAD:
            return False
        self._is_bad = True
        self._end(events)
        return bool(self._held)

    def _value(self, events: list[Event]) -> bool:
        """An argument's value, up to its closing tag; strings are emitted as they come."""
        syntax = self._syntax
        if not self._has_value and syntax.is_on_lines:
            if self._held.startswith("\n"):
                self._take(1)
            self._has_value = True
            if not self._held:
                return False
        is_text = self._kinds == {"string"} and not self._form.cdata
        if is_text and not self._has_quote:
            self._emit_arguments('"', events)
            self._has_quote = True
        place = self._held.find(syntax.value_close, 0 if is_text else self._sought)
        if place < 0:
            if is_text:
                n_held = max(n_half(self._held, mark) for mark in syntax.value_ends)
                self._emit_text(self._take(len(self._held) - n_held), events)
            else:
                self._sought = max(0, len(self._held) - len(syntax.value_close))
            return False
        self._sought = 0
        text = self._held[:place]
        text = text[:-1] if syntax.is_on_lines and text.endswith("\n") else text
        if is_text:
            self._emit_text(text, events)
            self._emit_arguments('"', events)
        else:
            if self._form.cdata and text.startswith("<![CDATA[") and text.endswith("]]>"):
                text = text[len("<![CDATA[") : -len("]]>")]
            self._emit_arguments(json_of(text, self._kinds), events)
        self._take(place + len(syntax.value_close))
        self._state = self._parameter
        return bool(self._held)

    def _end_of_value(self, held: str, events: list[Event]) -> None:
        """A value that was cut off."""
        self._raw.append(held)
        text = held[: len(held) - max(n_half(held, mark) for mark in self._syntax.value_ends)]
        if not self._has_value and self._syntax.is_on_lines:
            text = text.removeprefix("\n")
        if self._kinds == {"string"}:  # CDATA is emitted only when complete
            self._emit_arguments("" if self._has_quote else '"', events)
            self._emit_text(text, events)
        elif text.strip():
            self._emit_arguments(text.strip(), events)

    def _python(self, events: list[Event]) -> bool:
        """Python keyword arguments, up to the closing bracket."""
        while (found := self._keywords.end(self._held)) is not None:
            end, sign = found
            self._keyword(self._take(end)[:-1], sign, events)
            if sign != ",":
                self._emit_arguments("{}" if not self._arguments else "}", events)
                self._end(events)
                return bool(self._held)
        return False

    def _keyword(self, text: str, sign: str, events: list[Event]) -> None:
        match = _KEY.fullmatch(text)
        value = json_of_python(match[2]) if match is not None else None
        if match is None or value is None:
            self._is_bad = self._is_bad or bool(text.strip()) or sign == ","
            return
        self._emit_arguments(("{" if not self._arguments else ", ") + json.dumps(match[1]) + ": " + value, events)

    def _whole(self, events: list[Event]) -> bool:
        """A call that cannot be streamed, as its keys have another order; or not a call."""
        end = self._place_of_close()
        if end < 0:
            return False
        close = self._syntax.close
        inner, self._held = self._held[:end], self._held[end + len(close) :]
        self._take_whole(inner, close, events)
        return bool(self._held)

    def _place_of_close(self) -> int:
        """Index of the closing tag in the held text, -1 if it is not there yet."""
        place = self._held.find(self._syntax.close, self._sought)
        self._sought = 0 if place >= 0 else max(0, len(self._held) - len(self._syntax.close))
        return place

    def _end_of_head(self, held: str, is_whole: bool, events: list[Event]) -> None:
        """The text ends before the arguments of a call start."""
        if is_whole:
            self._take_whole(held, "", events)
            return
        call = _call_of(held) if self._syntax.is_object else None
        if call is not None:
            self._take_whole(held, "", events)
            return
        match = (self._syntax.next_name if self._in_section else self._syntax.first_name).match(held)
        if match is not None:
            self._raw.append(held)
            self._begin(match["name"], events)
            self._end(events)

    # ---- Events -----------------------------------------------------------------------------------------------------

    def _take(self, n: int) -> str:
        """Consumes n characters as part of the call."""
        text, self._held = self._held[:n], self._held[n:]
        self._raw.append(text)
        return text

    def _emit(self, text: str, events: list[Event]) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        if text:
            events.append(Content(text))

    def _emit_arguments(self, text: str, events: list[Event]) -> None:
        if text:
            self._arguments.append(text)
            events.append(Arguments(self._index, text))

    def _emit_text(self, text: str, events: list[Event]) -> None:
        self._emit_arguments(json.dumps(text, ensure_ascii=False)[1:-1], events)

    def _begin(self, name: str, events: list[Event]) -> None:
        self._name, self._arguments, self._is_bad = name, [], False
        events.append(CallStarted(self._index, name))

    def _take_whole(self, inner: str, close: str, events: list[Event]) -> None:
        """Emits a complete call, or its text as content."""
        self._state = self._text
        call = _call_of(inner) if self._syntax.is_object else None
        if call is None:
            self._emit("".join(self._raw) + inner + close, events)
            return
        self._raw.append(inner + close)
        self._begin(call.name, events)
        self._emit_arguments(call.arguments, events)
        self._end(events)

    def _end(self, events: list[Event]) -> None:
        valid = not self._is_bad and loaded("".join(self._arguments)) is not None
        events.append(CallEnded(self._index, valid, "".join(self._raw)))
        self._index += 1
        self._raw, self._after_call, self._sought = [], True, 0
        form = self._form
        has_more = bool(form.section[0] or form.section[1] or form.separator)
        self._state = self._between if has_more else self._rest_is_text if form.is_first else self._text


def parse_tool_calls(
    text: str,
    form: ToolForm = HERMES,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    thought: Thought = "",
    is_whole: bool = True,
) -> tuple[str, list[ToolCall]]:
    """An answer's content and its calls, in order. With calls, the content is stripped.

    Args:
        text: of the answer.
        form, schemas, thought: as `ToolCallParser` takes them.
        is_whole: as `ToolCallParser.finish` takes it.
    """
    parser = parser_of(form, schemas, thought)
    content, calls = gathered([*parser.feed(text), *parser.finish(is_whole=is_whole)])
    return (content.strip() if calls else content), calls


def parser_of(
    form: ToolForm,
    schemas: Mapping[str, Mapping[str, Any]] | None = None,
    thought: Thought = "",
    *,
    is_exclusive: bool = False,
) -> CallParser:
    """The parser of a form; arguments as `ToolCallParser`."""
    if form.arguments == "harmony":
        return HarmonyParser()
    return ToolCallParser(form, schemas, thought, is_exclusive=is_exclusive)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _call_of(inner: str) -> ToolCall | None:
    """The call in the JSON between the tags; arguments may be missing, or be JSON in a string."""
    value = loaded(inner)
    if value is None or not isinstance(value.get("name"), str) or not _NAME.fullmatch(value["name"]):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments = loaded(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
