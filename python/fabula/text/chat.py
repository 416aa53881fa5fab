"""From messages to token ids, with the template's control tokens as control tokens and the user's as text.

A template renders one string in which its scaffolding and the users' words are mixed; encoded with control tokens
parsed, a user who types "<|im_end|>" would end their own turn. So where a message holds the text of a control token,
each such place is marked with a character that occurs nowhere else before rendering; afterwards the string is cut at
the unmarked control tokens, the marks are taken out, and what lies between is encoded as plain text. Where no message
holds any, which is nearly always, the string is encoded in one go, exactly as transformers does it.

Cutting is what the tokenizer itself does first, so the ids are the same; only a vocabulary that puts a space in front
of the very first word alone (prepend_scheme "first") may see one more space behind a control token, in such a
conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fabula.errors import InvalidArgument
from fabula.text.prefill import is_prefilled, render_prefilled
from fabula.text.template import MAX_DEPTH, ChatTemplate

if TYPE_CHECKING:
    from fabula.text.tokenizer import Tokenizer


class ControlText(str):
    """A text of a message whose control tokens are control tokens: its caller vouches for it."""


def with_control_tokens(value: Any, depth: int = 0) -> Any:
    """Messages, or what one holds, with every text as `ControlText`."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"messages are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return ControlText(value)
    if isinstance(value, Mapping):
        return {key: with_control_tokens(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_control_tokens(item, depth + 1) for item in value]
    return value


# Private-use characters to mark with; the first that the conversation does not hold is taken.
_MARKS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    continue_final_message: bool | None = False,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation.

    Args:
        tokenizer, template: of the model.
        messages: of the conversation.
        continue_final_message: whether the ids end with the words of the last message, which is the assistant's; None
            where it is, see `text/prefill.py`.
        options: of the template.

    Raises:
        TemplateError: the template fails or refuses.
        InvalidArgument: a message is malformed, or holds a control token and every private-use character; or the last
            message shall be continued and is not the assistant's.
    """
    marks = Marks(tokenizer, template, messages, options)
    if is_prefilled(messages, continue_final_message, options.get("add_generation_prompt")):
        return marks.encode(render_prefilled(template, marks.messages, marks.unused(), marks.options[0]))
    return marks.encode(template.render(marks.messages, **marks.options[0]))


class Marks:
    """Messages ready to be rendered, and the way back from the rendered text to ids.

    Args:
        tokenizer, template: of the model.
        messages: of the conversation.
        options: for the template; several, if it is to be rendered with each of them.

    Attributes:
        messages, options: those given, with control tokens in them marked.

    Raises:
        InvalidArgument: the messages hold a control token and every private-use character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *options: Mapping[str, Any],
    ) -> None:
        self._tokenizer = tokenizer
        given = [*_texts(messages), *_texts(options)]
        self._texts = [template.source, *template.named.values(), *given]
        self._pattern = _pattern(tokenizer)
        self._mark = ""
        self.messages: Sequence[Mapping[str, Any]] = messages
        self.options: Sequence[Mapping[str, Any]] = options
        typed = (text for text in given if not isinstance(text, ControlText))
        if self._pattern is not None and any(self._pattern.search(text) for text in typed):
            self._mark = self.unused()
            self.messages = _marked(messages, self._pattern, self._mark)
            self.options = _marked(options, self._pattern, self._mark)

    def unused(self) -> str:
        """A private-use character that neither messages, options and template hold nor was given out before.

        Raises:
            InvalidArgument: there is none.
        """
        character = _unused(*self._texts)
        self._texts.append(character)
        return character

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text, or of a part of it that begins and ends beside a control token or an answer."""
        if self._pattern is None or not self._mark:
            return self._tokenizer.encode(text, add_bos=False, special=True)
        return _encode_marked(self._tokenizer, text, self._pattern, self._mark)


def _unused(*texts: str) -> str:
    """A private-use character that none of the texts holds."""
    present: set[str] = set().union(*texts)
    for codes in _MARKS:
        for code in codes:
            if chr(code) not in present:
                return chr(code)
    raise InvalidArgument("the conversation holds a control token's text and every private-use character of Unicode")


def _pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches any control token, the longest first."""
    tokens = sorted((token for token in tokenizer.special_tokens if token), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens)) if tokens else None


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    """Every text in nested plain data, keys too: those of a tool's arguments are its caller's."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"messages are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in (*value.keys(), *value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(item, depth + 1)


def _marked(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """The same value with the mark behind the first character of every control token in it. What remains may hold
    another, shorter token, or one that only arises with the mark; the search goes on until none is left."""
    if isinstance(value, ControlText):
        return value
    if isinstance(value, str):
        while (match := pattern.search(value)) is not None:
            cut = match.start() + 1
            value = value[:cut] + mark + value[cut:]
        return value
    if isinstance(value, Mapping):
        return {_marked(key, pattern, mark): _marked(item, pattern, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, pattern, mark) for item in value]
    return value


def _encode_marked(tokenizer: Tokenizer, text: str, pattern: re.Pattern[str], mark: str) -> list[int]:
    """Ids of a marked text: unmarked control tokens as such, the rest plain. A control token that takes the blanks
    beside it (lstrip, rstrip) takes them here too."""
    ids: list[int] = []
    start, strip_left = 0, False
    for match in pattern.finditer(text):
        token = tokenizer.added_tokens[match[0]]
        ids += _plain(tokenizer, text[start : match.start()], mark, strip_left, token.lstrip)
        ids.append(tokenizer.special_tokens[match[0]])
        start, strip_left = match.end(), token.rstrip
    return ids + _plain(tokenizer, text[start:], mark, strip_left, False)


def _plain(tokenizer: Tokenizer, text: str, mark: str, strip_left: bool, strip_right: bool) -> list[int]:
    text = text.lstrip() if strip_left else text
    text = text.rstrip() if strip_right else text
    return tokenizer.encode(text.replace(mark, ""), add_bos=False) if text else []
