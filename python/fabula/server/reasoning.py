"""Reasoning of one request, for every API that has it: what a client asks for, as options of the chat template and as
a limit in the engine; and the parser that separates thoughts from the answer.

A request to think less than a template can be told is met by the limit: a thought that has used its budget is closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.engine.thinking import Thinking, Thought
from fabula.errors import EngineError
from fabula.model import Model
from fabula.server.failures import refuse
from fabula.sessions.call_events import Blanks, Content, Event
from fabula.sessions.tools import Calling
from fabula.text.reasoning import FORMS, ReasoningParser, form_of
from fabula.text.tokenizer import Tokenizer

# Tokens of thought by effort, for templates that do not know efforts; None for no limit. The figures are those of
# litellm's DEFAULT_REASONING_EFFORT_..._THINKING_BUDGET, where "high" is not limited here.
EFFORTS: Mapping[str, int | None] = {
    "none": 0, "off": 0, "minimal": 128, "low": 1024, "medium": 2048, "high": None, "xhigh": None, "max": None,
}  # fmt: skip
SWITCHES = ("enable_thinking", "thinking", "reasoning")  # variables of templates that turn thinking on and off
KEYS = ("reasoning_content", "reasoning", "thinking")  # of messages, under which templates look for earlier thoughts
TAIL_TOKENS = 64  # at the end of a prompt, where the mark of an open thought stands


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says about thinking.

    Attributes:
        enabled: whether to think; None: as the model does by itself.
        effort: one of EFFORTS; None: not said.
        budget: tokens of thought at most; None: no limit.

    Raises:
        ApiError: 400, a value is unknown or out of its range.
    """

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.effort is not None and self.effort not in EFFORTS:
            raise refuse("reasoning_effort", f"is {self.effort!r:.40}, must be one of {', '.join(EFFORTS)}")
        if self.budget is not None and not 0 <= self.budget < 2**31:
            raise refuse("thinking_budget", f"is {self.budget}, must be in 0 .. {2**31 - 1}")

    @property
    def is_off(self) -> bool:
        """Whether the model is not to think."""
        return self.enabled is False or (self.enabled is None and EFFORTS.get(self.effort or "high") == 0)


class Reasoning:
    """The reasoning of one request's answers.

    Args:
        model: that answers.
        wish: what the request says.
        given: options of the template that the request sets itself; they win.

    Attributes:
        form: marks of the model's thoughts; None if it has none.
        options: of the chat template, with those given.
    """

    def __init__(self, model: Model, wish: Wish | None = None, given: Mapping[str, Any] | None = None) -> None:
        self._model, self._wish = model, wish or Wish()
        template = model.template
        self._sources = [template.source, *template.named.values()]
        self.form = form_of(self._sources, model.tokenizer)
        self.options: dict[str, Any] = {}
        wish = self._wish
        if wish.is_off or wish.enabled:
            self.options |= {name: not wish.is_off for name in SWITCHES if template.reads(name)}
        self._budget = 0 if wish.is_off else wish.budget
        if wish.effort is not None and not wish.is_off:
            if template.reads("reasoning_effort"):
                known = {"minimal": "low", "xhigh": "high", "max": "high"}
                self.options["reasoning_effort"] = known.get(wish.effort, wish.effort)
            elif self._budget is None:
                self._budget = EFFORTS[wish.effort]
        if self._budget is not None and template.reads("thinking_budget"):
            self.options["thinking_budget"] = self._budget
        self.options |= given or {}
        self._is_open = False

    def params(
        self, params: SamplingParams, prompt_ids: Sequence[int], reply: str = "", *, unless: str = ""
    ) -> SamplingParams:
        """The settings with the limit of thoughts.

        Args:
            params: of the request.
            prompt_ids: of the whole prompt.
            reply: text at its end that the answer continues.
            unless: text that starts a tool call, which may come in place of an open thought.
        """
        if self.form is None:
            return params
        marks = (self.form.start, self.form.end)
        if any(mark in reply for mark in marks):
            self._is_open = self.form.is_open_in(reply)
        else:
            n_tail = TAIL_TOKENS + len(reply.encode())
            tail = self._model.tokenizer.decode(prompt_ids[-n_tail:], skip_special=False)
            if reply:
                tail = tail.rstrip().removesuffix(reply.rstrip())
            self._is_open = self.form.is_open(tail)
        return self._limited(params, unless)

    def params_before(self, params: SamplingParams, *, unless: str = "", **options: Any) -> SamplingParams:
        """As `params`, before the prompt is known: whether an answer starts inside a thought is tried out.

        Args:
            params: of the request.
            unless: as for `params`.
            options: of the chat template, besides `options`.
        """
        if self.form is None:
            return params
        try:
            asked = [{"role": "user", "content": "?"}]
            prompt = self._model.template.render(asked, add_generation_prompt=True, **{**options, **self.options})
        except EngineError:  # the template refuses it
            prompt = ""
        self._is_open = self.form.is_open(prompt)
        return self._limited(params, unless)

    def _limited(self, params: SamplingParams, unless: str) -> SamplingParams:
        assert self.form is not None
        return replace(params, thinking=Thinking(self.form.name, self._is_open, self._budget, unless))

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with the thoughts of earlier answers under the keys that the template reads, or without them."""
        keys = [key for key in KEYS if any(f".{key}" in source or f"'{key}'" in source for source in self._sources)]
        found = []
        for message in messages:
            copy = dict(message)
            thought = copy.pop(KEYS[0], None)
            if thought and self.form is not None and self.form.is_harmony and copy.get("tool_calls"):
                # Templates take one of both before a call: what a message says there belongs to the thought.
                thought, copy["content"] = "\n\n".join(filter(None, (thought, copy.get("content")))), ""
            if thought:
                copy |= dict.fromkeys(keys, thought)
            found.append(copy)
        return found


def n_thought_tokens(generation: Generation) -> int:
    """Tokens of thought of an answer, so far."""
    return count_thought(generation.params, generation.read_so_far()[0], generation.engine.tokenizer)


def count_thought(params: SamplingParams, token_ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Tokens of thought among those of an answer."""
    if params.thinking is None:
        return 0
    thought = Thought(params.thinking, tokenizer)
    decoder = tokenizer.stream_decoder(continues=True, shown=thought.shown)
    for token in token_ids:
        with suppress(KeyError):  # an id that only pads the model's vocabulary
            thought.take(token, decoder.push(token))
    return thought.n_used


def parser_of(params: SamplingParams | None, *, is_raw: bool = False) -> ReasoningParser:
    """A parser of an answer with these settings, which `Reasoning` made.

    Args:
        params: of the answer, or of a stored turn; without `thinking`, all is text.
        is_raw: as for `ReasoningParser`.
    """
    thinking = params.thinking if params is not None else None
    if thinking is None:
        return ReasoningParser(None)
    form = FORMS[thinking.form]
    return ReasoningParser(form, is_open=thinking.is_open, unless=thinking.unless, is_raw=is_raw)


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """Text of a thought.

    Attributes:
        text: the next part of it.
    """

    text: str


class AnswerParser:
    """Parses one answer into thoughts, content and tool calls, as its text arrives.

    Args:
        params: of the answer; `thinking` says which marks it has.
        calling: how it calls tools; None if it does not.
        separates: whether thoughts are separated from the content.
    """

    def __init__(self, params: SamplingParams, calling: Calling | None, *, separates: bool = True) -> None:
        is_harmony = calling is not None and calling.form.arguments == "harmony"
        self._thoughts = parser_of(params if separates else None, is_raw=is_harmony)
        has_thoughts = params.thinking is None or not separates
        self._calls = calling.parser(has_thoughts=has_thoughts) if calling is not None else None
        self._blanks = Blanks()

    def feed(self, text: str) -> list[Event | ReasoningText]:
        """Parses the next piece of text; returns the events that are certain."""
        return [event for kind, part in self._thoughts.feed(text) for event in self._take(kind, part)]

    def finish(self, *, is_whole: bool) -> list[Event | ReasoningText]:
        """At the end of the text: the remaining events; `is_whole` as for `CallParser.finish`."""
        events = [event for kind, part in self._thoughts.finish() for event in self._take(kind, part)]
        if self._calls is not None:
            events += [*self._blanks.filter(self._calls.finish(is_whole=is_whole)), *self._blanks.finish()]
        return events

    def _take(self, kind: str, text: str) -> list[Event | ReasoningText]:
        if kind == "reasoning":
            return [ReasoningText(text)]
        if self._calls is None:
            return [Content(text)]
        return [*self._blanks.filter(self._calls.feed(text))]
