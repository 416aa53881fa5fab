"""Encodes messages to token ids: control tokens of the template as control tokens, those in user input as text.

A template renders one string that mixes its scaffolding with user input. Encoded with control tokens parsed, a user who
types "<|im_end|>" would end their own turn. So before rendering, each control token inside a message is marked with a
character that occurs nowhere else. The rendered string is split at the unmarked control tokens, the marks are removed,
and the pieces are encoded as plain text. If no message contains a control token, which is nearly always so, the string
is encoded in one go, exactly as in transformers.

The tokenizer also splits at control tokens first, so the ids are the same, with one exception: a vocabulary that adds a
space only before the very first word (prepend_scheme "first") may get one more space after a control token.
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
    """Trusted text of a message: control tokens in it are control tokens."""


def with_control_tokens(value: Any, depth: int = 0) -> Any:
    """Converts all strings in messages to `ControlText`."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"messages are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return ControlText(value)
    if isinstance(value, Mapping):
        return {key: with_control_tokens(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_control_tokens(item, depth + 1) for item in value]
    return value


# Private-use characters for marks; the first that does not occur in the conversation is used.
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
        continue_final_message: whether the ids end with the text of the last message, for the model to continue it;
            None: if that message is the assistant's. See `text/prefill.py`.
        options: variables of the template.

    Raises:
        TemplateError: the template fails or refuses.
        InvalidArgument: a message is malformed, or holds a control token and every private-use character; or
            continue_final_message is true and the last message is not the assistant's.
    """
    marks = Marks(tokenizer, template, messages, options)
    if is_prefilled(messages, continue_final_message, options.get("add_generation_prompt")):
        return marks.encode(render_prefilled(template, marks.messages, marks.unused(), marks.options[0]))
    return marks.encode(template.render(marks.messages, **marks.options[0]))


class Marks:
    """Marks control tokens in messages before rendering, and encodes the rendered text.

    Args:
        tokenizer, template: of the model.
        messages: of the conversation.
        options: variables of the template; one mapping for each rendering.

    Attributes:
        messages, options: copies with control tokens marked.

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
        """A private-use character that does not occur in messages, options and template; a new one each call.

        Raises:
            InvalidArgument: all of them occur.
        """
        character = _unused(*self._texts)
        self._texts.append(character)
        return character

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text, or of a part of it that is bounded by control tokens or a reply."""
        if self._pattern is None or not self._mark:
            return self._tokenizer.encode(text, add_bos=False, special=True)
        return _encode_marked(self._tokenizer, text, self._pattern, self._mark)


def _unused(*texts: str) -> str:
    """A private-use character that occurs in none of the texts."""
    present: set[str] = set().union(*texts)
    for codes in _MARKS:
        for code in codes:
            if chr(code) not in present:
                return chr(code)
    raise InvalidArgument("the conversation holds a control token's text and every private-use character of Unicode")


def _pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern of all control tokens, longest first; None if there are none."""
    tokens = sorted((token for token in tokenizer.special_tokens if token), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in tokens)) if tokens else None


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    """All strings in nested data, keys included, since a tool's arguments may have keys from user input."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"messages are nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in (*value.keys(), *value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(item, depth + 1)


def _marked(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    """A copy with the mark after the first character of each control token. The rest may contain a shorter token, or
    form one with the mark, so the search repeats until none is left."""
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
    """Ids of a marked text: unmarked control tokens as such, the rest as plain text. Control tokens with lstrip or
    rstrip also absorb the whitespace next to them."""
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
