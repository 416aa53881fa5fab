"""Answers that somebody has begun: the last message is the assistant's, and the model writes on behind its words.

transformers and vLLM call it `continue_final_message` and ask for it; Anthropic's API and Ollama do it by themselves
wherever the last message is the assistant's, and so does Fabula: a new turn behind an answer is what nearly nobody
means. `continue_final_message: false`, or `add_generation_prompt: true`, asks for that new turn, and
`add_generation_prompt: false` alone for the conversation as it stands, as in transformers. As with all of them the
answer holds what is new, without the words it was begun with.

Templates know nothing of this. So a mark goes behind the words, the conversation is rendered, and the prompt is what
stands before the mark: no end token, no generation prompt. transformers does the same; where a template takes the
blanks off a message's end, they are taken off here, too. In three cases its prompt would be another than the words
say, or none:

    words that begin with a thought     templates that put a thought before every answer, empty where there is none,
                                        would put one before these
    a template that takes thoughts out  of past answers takes them out of this one: the words are put back
    a template that refuses             a conversation that ends with an answer: the words go behind the generation
                                        prompt, where those of an empty message go, too
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fabula.errors import InvalidArgument, TemplateError

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate

Message = Mapping[str, Any]
_OPEN = "<think>"  # of a thought, in the templates of all models that write theirs as text
_THOUGHT = re.compile(r"(?:<think>\s*)?(?:</think>\s*)?\Z")  # an empty one at the end of a text, or half of it


def is_prefilled(
    messages: Sequence[Message], continue_final_message: bool | None, add_generation_prompt: bool | None = None
) -> bool:
    """Whether the answer goes on behind the words of the last message.

    Args:
        messages: of the conversation.
        continue_final_message: what the caller says of it; None leaves it to the messages.
        add_generation_prompt: the same of a new turn.

    Raises:
        InvalidArgument: it shall, but the last message has no words of the assistant, or a new turn is wanted as well.
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
    """A conversation up to the last of the assistant's words.

    Args:
        template: of the model.
        messages: the last is the assistant's.
        mark: a character that stands nowhere in them, nor in the template.
        options: of the template.

    Raises:
        TemplateError, InvalidArgument: as `ChatTemplate.render`.
    """
    options = {name: value for name, value in options.items() if name != "add_generation_prompt"}
    words = _words(messages[-1]) or ""

    def behind(content: str) -> str | None:
        """What is rendered before the mark; a blank behind it shows whether the template keeps them."""
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
        """The words behind the generation prompt."""
        if len(messages) == 1:
            return None
        return _joined(template.render(messages[:-1], add_generation_prompt=True, **options), words)

    if not words.strip() and (found := opened()) is not None:
        return found
    try:
        found = behind(words)
        if found is not None and _dense(found).endswith(_dense(words)):
            kept = words if found.endswith(words) else words.rstrip()
            return _joined(found.removesuffix(kept), kept) if found.endswith(kept) else found
        start = behind("")
    except TemplateError:
        if (found := opened()) is None:
            raise
        return found
    if start is not None:
        return _joined(start, words)
    if (found := opened()) is None:
        raise TemplateError("the chat template does not show the message that is to be continued", path=template.path)
    return found


def _joined(start: str, words: str) -> str:
    """The words behind a beginning, which loses a thought of its own if they bring one."""
    return (_THOUGHT.sub("", start) if words.lstrip().startswith(_OPEN) else start) + words


def _words(message: Message) -> str | None:
    """The words of a message: its content, or the last of its parts that is text."""
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
    """The text without its blanks: templates put other ones around thoughts."""
    return "".join(text.split())
