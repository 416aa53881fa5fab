"""The next prompt of a conversation whose past is known as token ids.

What a model wrote is kept as the ids it drew: reading its text back through the tokenizer, or through a template that
trims answers or takes thoughts out of them, could give other ids, and every K and V behind them would be lost. So the
template is rendered with a placeholder in place of each answer. What it puts behind the last placeholder is the
scaffolding between that answer and the next one, whatever the answers hold, and only that is encoded.

A template that words the past differently once there is more of it (a date, a count of messages) is noticed, since what
it puts before the last placeholder must be what it rendered when that answer was made; then the whole conversation is
encoded anew, and the caller sees by the ids how much of the past still fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fabula.text.chat import Marks, encode_chat

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate
    from fabula.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


def encode_next(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], known: Sequence[int], **options: Any
) -> list[int]:
    """Token ids of a conversation, ready for the next answer, that keep the ids of the past where they can be kept.

    Args:
        tokenizer, template: of the model.
        messages: the conversation; the last one is new, the one before it is the answer that `known` ends with.
        known: ids of everything up to that answer, its end token included if it has one; empty if nothing was said.
        options: for the template.

    Raises:
        TemplateError, InvalidArgument: as `encode_chat`.
    """
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not known or not answers or answers[-1] != len(messages) - 2:
        return encode_chat(tokenizer, template, messages, **options)
    marks = Marks(tokenizer, template, messages, options)
    hole = marks.unused()
    holed = [dict(m, content=hole) if m.get("role") == "assistant" else m for m in marks.messages]
    rendered = template.render(holed, **options)
    before, found, tail = rendered.rpartition(hole)
    if not found or before != template.render(holed[:-2], **options):
        return encode_chat(tokenizer, template, messages, **options)
    end = next((token for token, i in tokenizer.special_tokens.items() if i == known[-1]), None)
    if end is not None and known[-1] in tokenizer.eos_ids and tail.startswith(end):
        tail = tail[len(end) :]
    return [*known, *marks.encode(tail)]
