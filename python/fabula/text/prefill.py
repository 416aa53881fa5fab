"""Prefilled replies: the last message is the assistant's, and the model continues its text.

In transformers and vLLM this is `continue_final_message` and must be requested. Anthropic's API and Ollama do it
whenever the last message is the assistant's, and so does Fabula. `continue_final_message: false` or
`add_generation_prompt: true` asks for a new turn instead, and `add_generation_prompt: false` alone for the conversation
as it is, as in transformers. As everywhere, the reply holds only the new text.

Templates do not support this. So a mark is appended to the text, the conversation is rendered, and everything before
the mark is the prompt: no end token, no generation prompt. transformers does the same; if a template strips trailing
whitespace of a message, so do we. Three cases need more:

    text that starts with reasoning     some templates put a reasoning block, empty if there is none, before every
                                        reply: it is removed, so that there are not two
    a template that removes reasoning   from past replies also removes it here: the text is put back
    a template that refuses             conversations that end with a reply: the text is put after the generation
                                        prompt, as for an empty message
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fabula.errors import InvalidArgument, TemplateError

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate

Message = Mapping[str, Any]
_OPEN = "<think>"  # starts reasoning, in the templates of all models that write it as text
_THOUGHT = re.compile(r"(?:<think>\s*)?(?:</think>\s*)?\Z")  # an empty or open reasoning block at the end of a text


def is_prefilled(
    messages: Sequence[Message], continue_final_message: bool | None, add_generation_prompt: bool | None = None
) -> bool:
    """Whether the reply continues the text of the last message.

    Args:
        messages: of the conversation.
        continue_final_message: the caller's choice; None: decided by the messages.
        add_generation_prompt: the caller's choice of a new turn; None: no choice.

    Raises:
        InvalidArgument: continue_final_message is true, but the last message is not text of the assistant, or
            add_generation_prompt is true as well.
    """
    for name, value in (
        ("continue_final_message", continue_final_message),
        ("add_generation_prompt", add_generation_prompt),
    ):
        if not isinstance(value, bool | None):
            raise InvalidArgument(f"{name} is {value!r:.40}, must be true or false")
    last = messages[-1] if messages and isinstance(messages[-1], Mapping) else {}
    may = last.get("role") == "assistant" and not last.get("tool_calls") and _words(last) is not None
    if not continue_final_message:
        return may and continue_final_message is None and add_generation_prompt is None
    if add_generation_prompt:
        raise InvalidArgument("continue_final_message and add_generation_prompt exclude each other; give one of them")
    if not may:
        raise InvalidArgument(
            "continue_final_message needs a last message of the assistant with text as content and no tool_calls"
        )
    return True


def render_prefilled(template: ChatTemplate, messages: Sequence[Message], mark: str, options: Mapping[str, Any]) -> str:
    """Renders a conversation up to the end of the assistant's text.

    Args:
        template: of the model.
        messages: the last is the assistant's.
        mark: a character that occurs neither in them nor in the template.
        options: variables of the template.

    Raises:
        TemplateError, InvalidArgument: as `ChatTemplate.render`.
    """
    options = {name: value for name, value in options.items() if name != "add_generation_prompt"}
    words = _words(messages[-1]) or ""

    def rendered_up_to(content: str) -> str | None:
        """The rendered text before the mark; a space after the mark shows whether the template keeps whitespace."""
        whole = [*messages[:-1], _with_words(messages[-1], content + mark + " ")]
        rendered = template.render(whole, add_generation_prompt=False, **options)
        place = rendered.rfind(mark)
        if place < 0:
            return None
        before = rendered[:place]
        if not content.strip():
            return before
        blanks = content[len(content.rstrip()) :] if rendered[place + 1 : place + 2] == " " else ""
        return before.rstrip() + blanks

    def opened() -> str | None:
        """The text after the generation prompt."""
        if len(messages) == 1:
            return None
        return _joined(template.render(messages[:-1], add_generation_prompt=True, **options), words)

    if not words.strip() and (found := opened()) is not None:
        return found
    try:
        found = rendered_up_to(words)
        if found is not None and _dense(found).endswith(_dense(words)):
            kept = words if found.endswith(words) else words.rstrip()
            return _joined(found.removesuffix(kept), kept) if found.endswith(kept) else found
        start = rendered_up_to("")
    except TemplateError:
        if (found := opened()) is None:
            raise
        return found
    if start is not None:
        return _joined(start, words)
    if (found := opened()) is None:
        raise TemplateError("the chat template does not render the message to continue", path=template.path)
    return found


def _joined(start: str, words: str) -> str:
    """Appends the text to a rendered prompt, without the prompt's reasoning block if the text has its own."""
    return (_THOUGHT.sub("", start) if words.lstrip().startswith(_OPEN) else start) + words


def _words(message: Message) -> str | None:
    """The text of a message: its content, or the last text part of it."""
    content = message.get("content")
    if isinstance(content, list | tuple):
        texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        return texts[-1] if texts else None
    return content if isinstance(content, str) else None


def _with_words(message: Message, words: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": words}
    parts = list(content)
    last = max(i for i, part in enumerate(parts) if isinstance(part, Mapping) and isinstance(part.get("text"), str))
    parts[last] = {**parts[last], "text": words}
    return {**message, "content": parts}


def _dense(text: str) -> str:
    """The text without whitespace: templates change it around reasoning."""
    return "".join(text.split())
