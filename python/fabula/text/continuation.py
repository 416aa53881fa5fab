"""The next prompt of a conversation whose past is known as token ids.

What a model wrote is kept as the ids it drew: reading its text back through the tokenizer, or through a template that
trims answers or takes thoughts out of them, could give other ids, and every K and V behind them would be lost. So the
template is rendered with a placeholder in place of each answer. What it puts behind the last placeholder is the
scaffolding between that answer and the next one, whatever the answers hold, and only that is encoded. An answer whose
tool calls the template words itself has no placeholder: the scaffolding begins at the first end token behind it.

A template that words the past differently once there is more of it (a date, a count of messages), or under other
options (tools in the system message), is noticed, since what it puts before the last answer must be what it rendered
when that answer was made; then the whole conversation is encoded anew, and the caller sees by the ids how much of the
past still fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fabula.text.chat import Marks, encode_chat

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate
    from fabula.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
NOTHING: Mapping[str, Any] = MappingProxyType({})


def encode_next(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    known: Sequence[int],
    options: Mapping[str, Any] = NOTHING,
    past: tuple[Sequence[Message], Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the next answer, that keep the ids of the past where they can be kept.

    Args:
        tokenizer, template: of the model.
        messages: the conversation; `known` ends with its last answer, and what follows that is new.
        known: ids of everything up to that answer, its end token included if it has one; empty if nothing was said.
        options: for the template.
        past: messages and options that the last answer was made with, if they are not those of now.

    Raises:
        TemplateError, InvalidArgument: as `encode_chat`.
    """
    last = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
    if not known or last in (-1, len(messages) - 1):
        return encode_chat(tokenizer, template, messages, **options)
    before, past_options = past if past is not None else (messages[:last], options)
    marks = Marks(tokenizer, template, [*messages, *before], options, past_options)
    hole = marks.unused()
    holed = [_with_hole(message, hole) for message in marks.messages]
    now, then = marks.options
    rendered = template.render(holed[: len(messages)], **now)
    start = template.render(holed[len(messages) :], **then)
    if rendered.startswith(start):
        tail = _behind_answer(tokenizer, rendered[len(start) :], hole if _is_plain(messages[last]) else "", known[-1])
        if tail is not None and hole not in tail:
            return [*known, *marks.encode(tail)]
    return encode_chat(tokenizer, template, messages, **options)


def _is_plain(answer: Message) -> bool:
    return not answer.get("tool_calls")


def _with_hole(message: Message, hole: str) -> Message:
    return {**message, "content": hole} if message.get("role") == "assistant" and _is_plain(message) else message


def _behind_answer(tokenizer: Tokenizer, text: str, hole: str, last: int) -> str | None:
    """What a rendered text that begins with an answer holds behind that, and behind its end token if `last` is one.

    Args:
        text: from where the answer begins.
        hole: stands for the answer; "" if the template worded it.
        last: last id of the answer.

    Returns:
        The rest; None if it is not clear where it begins.
    """
    ends = [token for token, i in tokenizer.special_tokens.items() if i in tokenizer.eos_ids]
    own = next((token for token, i in tokenizer.special_tokens.items() if i == last), None)
    if hole:
        if not text.startswith(hole):
            return None
        tail = text[len(hole) :]
        return tail.removeprefix(own) if own is not None and own in ends else tail
    found = min(((place, end) for end in ends if (place := text.find(end)) >= 0), default=None)
    if found is None:
        return None
    place, end = found
    return text[place + len(end) :] if own in ends else text[place:]
