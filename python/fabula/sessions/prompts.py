"""Prompts of turns, as token ids: the past as it was sampled, and the new input.

With `drop_oldest_turns` a prompt that leaves too little room for an answer is built without the oldest turns, until a
quarter of the context is free, so that the rest is recomputed only once in many turns. The caller checks whether the
prompt fits the context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabula.engine.generation import Engine
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.sessions.policy import ContextPolicy, Cut
from fabula.sessions.tools import with_tools
from fabula.sessions.turn import Turn
from fabula.sessions.user_input import UserInput
from fabula.text.chat import with_control_tokens
from fabula.text.continuation import encode_next
from fabula.text.reasoning import form_of, split_reasoning

if TYPE_CHECKING:
    from fabula.text.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of an answer.

    Attributes:
        ids: all of it, past turns included.
        kept: number of leading ids that are the parent's too.
        cut: the part of the past that was left out; None for nothing.
    """

    ids: list[int]
    kept: int
    cut: Cut | None = None


def messages_of(
    system: str | None,
    turns: Sequence[Turn],
    user_input: UserInput | None = None,
    answer_of: Callable[[Turn], str] = lambda turn: turn.text,
) -> list[dict[str, Any]]:
    """A conversation as chat templates take it; `answer_of` gives what they take for an answer."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        _say(messages, turn.said)
        if not turn.is_unanswered:
            messages.append({"role": "assistant", "content": answer_of(turn)})
    if user_input is not None:
        _say(messages, user_input)
    return messages


def _say(messages: list[dict[str, Any]], user_input: UserInput) -> None:
    if user_input.repeats_answer and messages and messages[-1]["role"] == "assistant":
        messages.pop()  # the user input repeats that answer, with its tool calls
    messages += with_control_tokens(user_input.messages) if user_input.parse_special else user_input.messages


def chat_prompt(
    engine: Engine,
    template: ChatTemplate,
    policy: ContextPolicy,
    params: SamplingParams,
    parent: Turn,
    system: str | None,
    user_input: UserInput,
) -> Prompt:
    """The prompt of the next answer of a chat.

    Raises:
        TemplateError, InvalidArgument: as `encode_chat` and `with_tools`.
    """
    if user_input.repeats_answer and not parent.number:
        raise InvalidArgument("messages[0].role is 'assistant', but there is no answer before it")
    tokenizer, past, seen = engine.tokenizer, parent.ids(), seen_turns(parent)
    form = form_of([template.source, *template.named.values()], tokenizer)

    def answer_of(turn: Turn) -> str:
        """An answer without its thoughts where templates refuse those: in messages with headers of their own."""
        if form is None or not form.is_harmony:
            return turn.text
        ids = turn.token_ids[:-1] if turn.token_ids[-1:] and turn.token_ids[-1] in tokenizer.eos_ids else turn.token_ids
        return split_reasoning(tokenizer.decode(ids, skip_special=False), form)[1]

    def for_template(
        turns: Sequence[Turn], new: UserInput, options: Mapping[str, Any]
    ) -> tuple[list[Any], Mapping[str, Any]]:
        return _for_template(template, messages_of(system, turns, new, answer_of), options)

    def without(n: int) -> list[int]:
        """The conversation without its n oldest turns, rendered like the new prompt; the other answers keep their
        sampled tokens."""
        known: list[int] = []
        turns = seen[n:]
        for i, turn in enumerate(turns):
            if turn.is_unanswered:
                continue
            messages, options = for_template(turns[:i], turn.said, user_input.options)
            known = [*encode_next(tokenizer, template, messages, known, options), *turn.token_ids]
        messages, options = for_template(turns, user_input, user_input.options)
        return encode_next(tokenizer, template, messages, known, options)

    def may_begin(n: int) -> bool:
        """Whether the conversation may start after its n oldest turns: a tool's result stays with its call."""
        return not (seen[n].said if n < len(seen) else user_input).answers_call

    messages, options = for_template(seen, user_input, user_input.options)
    last = next((turn for turn in parent.lineage() if not turn.is_unanswered), parent)  # whose ids the past ends with
    if user_input.options == last.said.options:
        ids = encode_next(tokenizer, template, messages, past, options)
    else:
        earlier = [turn for turn in seen if turn.number < last.number]
        before = for_template(earlier, last.said, last.said.options) if seen else None
        ids = encode_next(tokenizer, template, messages, past, options, before)
        if ids[: len(past)] != past:
            ids = without(0)
    return _fitted(engine, policy, params, parent, past, ids, without, may_begin)


def _for_template(
    template: ChatTemplate, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> tuple[list[Any], Mapping[str, Any]]:
    """Messages and options for the template, which may not support tools."""
    tools = options.get("tools")
    if not tools and not any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        return messages, options
    found, more = with_tools(messages, tools or (), template)
    return found, {name: value for name, value in options.items() if name != "tools"} | more


def parses_special(parse_special: bool | None, parent: Turn) -> bool:
    """Whether control tokens written in the next piece of a story are control tokens. None: as in the previous turn,
    and yes at the start, as a story is the caller's own text."""
    if parse_special is None:
        return parent.said.parse_special if parent.number and not parent.chat else True
    return parse_special


def story_prompt(
    engine: Engine, policy: ContextPolicy, params: SamplingParams, parent: Turn, user_input: UserInput
) -> Prompt:
    """The prompt of the next piece of a story.

    Raises:
        InvalidArgument: there is no text to continue.
    """
    tokenizer, text = engine.tokenizer, user_input.text
    new: list[int] = []
    if text or not parent.number:
        new = tokenizer.encode(text, add_bos=False if parent.number else None, special=user_input.parse_special)
    past, seen = parent.ids(), seen_turns(parent)
    notes = [turn for turn in parent.lineage() if turn.frozen][::-1]

    def unended(ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids  # the story continues after an end token

    def without(n: int) -> list[int]:
        """The story without its n oldest turns, except notes; without any turn, the longest suffix of the last one that
        fits."""
        left = seen[n:] or seen[-1:]
        kept = sorted({*notes, *left}, key=lambda turn: turn.number)
        front = next((i for i, turn in enumerate(kept) if not turn.frozen), len(kept))
        front_words, story = words_of(kept[:front], []), words_of(kept[front:], new)
        start = tokenizer.encode("")
        if start and [*front_words, *story][: len(start)] == start:  # the text brings its own start token
            start = []
        start += front_words
        room = max(1, goal(engine.runner.context, params) - len(start))
        return [*start, *(story[-room:] if n == len(seen) else story)]

    def words_of(turns: Sequence[Turn], new: list[int]) -> list[int]:
        ids: list[int] = []
        for turn in turns:
            special = turn.said.parse_special
            words = tokenizer.encode(turn.prompt, add_bos=False, special=special) if turn.prompt else []
            ids = [*unended(ids), *words, *turn.token_ids]
        return [*unended(ids), *new]

    ids = [*unended(past), *new]
    if not ids:
        raise InvalidArgument("there is no text to continue: give a prompt")
    return _fitted(engine, policy, params, parent, past, ids, without)


def seen_turns(parent: Turn) -> list[Turn]:
    """The turns up to `parent` that are in its prompt, from the first; without notes, which are always in it."""
    first = parent.cut.n_turns if parent.cut is not None else 0
    return [turn for turn in parent.lineage() if turn.number > first and not turn.frozen][::-1]


def goal(context: int, params: SamplingParams) -> int:
    """Maximum length of a prompt in tokens after turns were dropped."""
    answer = context // 4 if params.max_tokens is None else min(params.max_tokens, context // 2)
    return context - max(answer, context // 4)


def _fitted(
    engine: Engine,
    policy: ContextPolicy,
    params: SamplingParams,
    parent: Turn,
    past: list[int],
    ids: list[int],
    without: Callable[[int], list[int]],
    may_begin: Callable[[int], bool] = lambda _: True,
) -> Prompt:
    """The prompt `ids`, or under the policy `drop_oldest_turns` one without some of the oldest turns."""
    context, seen = engine.runner.context, seen_turns(parent)
    drops = policy.name == "drop_oldest_turns"
    cut = parent.cut if drops else None
    answer = min(params.max_tokens or 1, context // 4)
    if drops and len(ids) + answer > context:
        n_before, n_all = (cut.n_tokens if cut is not None else 0), len(ids)
        for n in filter(may_begin, range(1, len(seen) + 1)):
            ids = without(n)
            cut = Cut(policy.name, n_before + max(0, n_all - len(ids)), seen[n - 1].number)
            if len(ids) <= goal(context, params):
                break
    return Prompt(ids, common_length(past, ids), cut)


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two lists."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
