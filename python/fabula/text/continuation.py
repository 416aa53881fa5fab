"""Encodes the next prompt of a conversation while keeping the token ids of its past.

A reply is kept as the ids that were sampled. Encoding its text again, possibly through a template that trims replies or
removes reasoning, could give other ids and invalidate the KV cache after them. So the template is rendered with a
placeholder for each reply. What follows the last placeholder is the scaffolding up to the next reply, whatever the
replies contain, and only that is encoded. A reply whose tool calls the template formats itself has no placeholder;
there the scaffolding begins at the first end token. A template may also write marks before a reply that the model wrote
itself (harmony's channel); they are not encoded again.

Some templates render the past differently when it grows (a date, a count of messages) or under other options (tools in
the system message). To detect that, the text before the last reply is compared with what was rendered when the reply
was made. If it differs, the whole conversation is encoded again, and the caller sees from the ids what still matches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fabula.text.chat import Marks, encode_chat

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate
    from fabula.text.tokenizer import Tokenizer

_END, _RETURN = "<|end|>", "<|return|>"  # of a message, of an answer, in the harmony format
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
    """Token ids of the prompt for the next reply; keeps the ids of the past where possible.

    Args:
        tokenizer, template: of the model.
        messages: the conversation; those after the last reply are new.
        known: ids up to the end of the last reply, with its end token if it has one; empty for a new conversation.
        options: variables of the template.
        past: messages and options of the last reply's prompt, if they differ from the current ones.

    Raises:
        TemplateError, InvalidArgument: as `encode_chat`.
    """
    last = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
    if not known or last in (-1, len(messages) - 1):
        return encode_chat(tokenizer, template, messages, **options)
    before, past_options = past if past is not None else (messages[:last], options)
    marks = Marks(tokenizer, template, [*messages, *before], options, past_options)
    placeholder = marks.unused()
    masked = [_with_placeholder(message, placeholder) for message in marks.messages]
    now, then = marks.options
    rendered = template.render(masked[: len(messages)], **now)
    start = template.render(masked[len(messages) :], **then)
    if rendered.startswith(start):
        is_plain = _is_plain(messages[last])
        reply = rendered[len(start) :]
        if is_plain:
            reply = _without_header(tokenizer, reply, placeholder, known)
        tail = _after_reply(tokenizer, reply, placeholder if is_plain else "", known[-1])
        if tail is not None and placeholder not in tail:
            if tail.startswith(_END) and tokenizer.special_tokens.get(_RETURN) == known[-1]:
                known = known[:-1]  # a message of the past ends otherwise than an answer does
            return [*known, *marks.encode(tail)]
    return encode_chat(tokenizer, template, messages, **options)


def _without_header(tokenizer: Tokenizer, reply: str, placeholder: str, known: Sequence[int]) -> str:
    """A rendered reply from its placeholder on, if all before it is what the model wrote."""
    header = reply.partition(placeholder)[0]
    if not header or header not in tokenizer.decode(known, skip_special=False):
        return reply
    return reply[len(header) :]


def _is_plain(reply: Message) -> bool:
    return not reply.get("tool_calls")


def _with_placeholder(message: Message, placeholder: str) -> Message:
    if message.get("role") != "assistant" or not _is_plain(message):
        return message
    return {**message, "content": placeholder}


def _after_reply(tokenizer: Tokenizer, text: str, placeholder: str, last: int) -> str | None:
    """The rendered text after a reply, and after its end token if `last` is one.

    Args:
        text: rendered text from the start of the reply.
        placeholder: of the reply; "" if the template formatted it.
        last: last id of the reply.

    Returns:
        The rest; None if its start cannot be determined.
    """
    ends = [token for token, i in tokenizer.special_tokens.items() if i in tokenizer.eos_ids]
    own = next((token for token, i in tokenizer.special_tokens.items() if i == last), None)
    if placeholder:
        if not text.startswith(placeholder):
            return None
        tail = text[len(placeholder) :]
        return tail.removeprefix(own) if own is not None and own in ends else tail
    found = min(((place, end) for end in ends if (place := text.find(end)) >= 0), default=None)
    if found is None:
        return None
    place, end = found
    return text[place + len(end) :] if own in ends else text[place:]
