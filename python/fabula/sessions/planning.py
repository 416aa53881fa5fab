"""Planning turns: pure functions from a loaded model, a session's settings and a turn to the next turn.

Nothing here takes a lock, changes a tree or starts a generation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.sessions.model_handle import LoadedModel
from fabula.sessions.policy import Cut
from fabula.sessions.prompts import Prompt, chat_prompt, common_length, parses_special, story_prompt
from fabula.sessions.settings import Settings
from fabula.sessions.turn import WRITTEN, Turn
from fabula.sessions.user_input import UserInput

MAX_BRANCHES = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """A turn to generate.

    Attributes:
        parent: the turn it follows.
        user_input: what it answers.
        chat: whether prompt and answer go through the chat template.
        prompt: ids of the whole prompt.
        params: sampling parameters.
        source: turn in whose path the KV of the prompt is looked for.
        begun: ids the answer begins with.
    """

    parent: Turn
    user_input: UserInput
    chat: bool
    prompt: Prompt
    params: SamplingParams
    source: Turn
    begun: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The prompt and the ids the answer begins with."""
        return [*self.prompt.ids, *self.begun]

    @property
    def n_reusable(self) -> int:
        """Leading ids that `source` has too; at least one id is left to compute, for its logits."""
        ids = self.ids
        return min(common_length(self.source.ids(), ids), len(ids) - 1)

    def with_seed(self, offset: int) -> Plan:
        """The same with `offset` added to the seed, if there is one."""
        seed = self.params.seed
        return self if seed is None else replace(self, params=replace(self.params, seed=(seed + offset) % 2**64))

    def draft(self, params: SamplingParams) -> Turn:
        """The turn before it has an answer; `params` with the seed that is used."""
        kept = self.prompt.kept
        return Turn(
            parent=self.parent,
            number=self.parent.number + 1,
            chat=self.chat,
            said=self.user_input,
            kept=kept,
            prompt_ids=tuple(self.prompt.ids[kept:]),
            n_begun=len(self.begun),
            params=params,
            cut=self.prompt.cut,
        )


Planner = Callable[[LoadedModel], Plan]


# ---- Plans ----------------------------------------------------------------------------------------------------------


def next_turn(
    model: LoadedModel,
    settings: Settings,
    parent: Turn,
    user_input: UserInput,
    params: SamplingParams | None,
    *,
    chat: bool,
) -> Plan:
    """Plans a turn that follows `parent`.

    Raises:
        ContextOverflow: the prompt does not fit, whatever the policy may leave out.
        InvalidArgument, TemplateError: as `prompt_of`.
    """
    chosen = params or settings.params
    prompt = prompt_of(model, settings, parent, user_input, chosen, chat=chat)
    check_room(model, settings, len(prompt.ids))
    return Plan(parent, user_input, chat, prompt, chosen, parent)


def sibling(model: LoadedModel, settings: Settings, turn: Turn, user_input: UserInput, params: SamplingParams) -> Plan:
    """Plans a sibling of `turn` with other user input or other parameters."""
    assert turn.parent is not None
    return next_turn(model, settings, turn.parent, user_input, params, chat=turn.chat)


def story(
    model: LoadedModel,
    settings: Settings,
    head: Turn,
    text: str | None,
    params: SamplingParams,
    parse_special: bool | None,
) -> Plan:
    """Plans the next turn of a story, which appends `text` first; `parse_special` as `Session.tell` takes it."""
    new = UserInput.of(text or "", parse_special=parses_special(parse_special, head))
    return next_turn(model, settings, head, new, params, chat=False)


def branch(
    model: LoadedModel,
    settings: Settings,
    head: Turn,
    user_input: UserInput,
    params: SamplingParams | None,
    options: Mapping[str, Any] | None,
    parse_special: bool | None,
    *,
    is_new: bool,
) -> Plan:
    """Plans the turn of which `Session.branch` makes several.

    Args:
        model, settings, head: of the session.
        user_input: what a new turn answers.
        params, options, parse_special: as `Session.branch` takes them.
        is_new: False for another answer to the head's message, or for a story as it is.
    """
    if head.number and head.chat and not is_new:
        again = head.said.with_options(options)
        return sibling(model, settings, head, again, params or branch_params(settings, head, again=True))
    chat = head.chat if head.number else is_new
    new = user_input if chat else replace(user_input, parse_special=parses_special(parse_special, head))
    return next_turn(model, settings, head, new, params, chat=chat)


def continuation(turn: Turn, begun: tuple[int, ...], params: SamplingParams) -> Plan:
    """Plans a sibling of `turn` with the same prompt whose answer begins with `begun`."""
    assert turn.parent is not None
    prompt = Prompt(prompt_ids_of(turn), turn.kept, turn.cut)
    return Plan(turn.parent, turn.said, turn.chat, prompt, params, turn, begun)


def regenerated(model: LoadedModel, settings: Settings, turn: Turn, params: SamplingParams | None) -> Plan:
    """Plans another answer to the user input of `turn`; `params` None: as `again_params`."""
    return sibling(model, settings, turn, turn.said, params or again_params(settings, turn))


def continued(
    model: LoadedModel, settings: Settings, turn: Turn, n_tokens: int | None, params: SamplingParams | None
) -> Plan:
    """Plans a sibling of `turn` that continues its answer, without the end token if it has one.

    Args:
        n_tokens: max further tokens; None leaves it to the parameters.
        params: None for the turn's.
    """
    if turn.is_unanswered:
        return sibling(model, settings, turn, turn.said, limited(params or settings.params, n_tokens))
    ended = turn.token_ids[-1:] and turn.token_ids[-1] in model.engine.tokenizer.eos_ids
    begun = turn.token_ids[:-1] if ended else turn.token_ids
    return continuation(turn, begun, limited(params or same_params(settings, turn), n_tokens))


def with_token(
    model: LoadedModel, settings: Settings, turn: Turn, position: int, token: int, params: SamplingParams | None
) -> Plan:
    """Plans a sibling of `turn` whose answer has another token at `position` and continues from there.

    Raises:
        InvalidArgument: no such position or token.
    """
    check_position(turn, position)
    check_answered(turn)
    begun = (*turn.token_ids[:position], *model.engine.runner.token_ids([token]).tolist())
    return continuation(turn, begun, params or same_params(settings, turn))


def replayed(model: LoadedModel, settings: Settings, turn: Turn, params: SamplingParams | None) -> Plan:
    """Plans `turn` again from its parent; `params` None: the turn's, with its seed.

    Raises:
        InvalidArgument: it was written by hand.
    """
    if turn.finish_reason == WRITTEN:
        raise InvalidArgument(f"turn {turn.number} was written by hand: there is nothing to generate again")
    chosen = params or same_params(settings, turn)
    if turn.n_begun:
        return continuation(turn, turn.token_ids[: turn.n_begun], chosen)
    return sibling(model, settings, turn, turn.said, chosen)


def prompt_of(
    model: LoadedModel, settings: Settings, parent: Turn, user_input: UserInput, params: SamplingParams, *, chat: bool
) -> Prompt:
    """The prompt of a turn that follows `parent`.

    Raises:
        InvalidArgument: a chat cannot follow a story, or the reverse; or a story is given messages.
        TemplateError: the model has no chat template, or the template refuses.
    """
    check_kind(parent, chat=chat)
    if chat:
        return chat_prompt(model.engine, model.template(), settings.policy, params, parent, settings.system, user_input)
    if user_input.given is not None or user_input.options:
        raise InvalidArgument("a story continues with text; messages and template_options are for a chat")
    return story_prompt(model.engine, settings.policy, params, parent, user_input)


def prompt_ids_of(turn: Turn) -> list[int]:
    """Every id before the turn's answer."""
    return turn.ids()[: turn.n_ids - len(turn.token_ids)]


# ---- Sampling parameters --------------------------------------------------------------------------------------------


def same_params(settings: Settings, turn: Turn) -> SamplingParams:
    """Default parameters of an answer that repeats or continues that of `turn`: the turn's, with its seed."""
    return turn.params or settings.params


def again_params(settings: Settings, turn: Turn) -> SamplingParams:
    """Default parameters of an answer that replaces that of `turn`: the turn's with a new seed, since the old seed
    would give the same answer."""
    return replace(same_params(settings, turn), seed=None)


def branch_params(settings: Settings, head: Turn, *, again: bool) -> SamplingParams:
    """Default parameters of branches: the session's. Where the head's message is answered `again`, with the head's
    constraint and new seeds, since the old seed would give the head's answer."""
    if not (again and head.number and head.chat):
        return settings.params
    return replace(settings.params, constraint=same_params(settings, head).constraint, seed=None)


def limited(params: SamplingParams, n_tokens: int | None) -> SamplingParams:
    """The same with another `max_tokens`; None keeps it."""
    return params if n_tokens is None else replace(params, max_tokens=n_tokens)


# ---- Turns written by hand ------------------------------------------------------------------------------------------


def written(
    model: LoadedModel, settings: Settings, parent: Turn, text: str, *, frozen: bool, parse_special: bool | None
) -> Turn:
    """A handwritten piece of a story that follows `parent`. Its KV is computed with the next answer.

    Raises:
        InvalidArgument: the session is a chat, or the text is empty.
        ContextOverflow: it does not fit.
    """
    if not text:
        raise InvalidArgument("text is empty: write at least one character")
    check_kind(parent, chat=False)
    user_input = UserInput.of(text, parse_special=parses_special(parse_special, parent))
    prompt = story_prompt(model.engine, settings.policy, settings.params, parent, user_input)
    check_room(model, settings, len(prompt.ids))
    return Turn(
        parent=parent,
        number=parent.number + 1,
        said=user_input,
        kept=prompt.kept,
        prompt_ids=tuple(prompt.ids[prompt.kept :]),
        params=settings.params.resolved(model.engine.defaults),
        finish_reason=WRITTEN,
        cut=prompt.cut,
        frozen=frozen,
    )


def exchange(
    model: LoadedModel, settings: Settings, parent: Turn, user_input: UserInput, text: str, *, parse_special: bool
) -> Turn:
    """A turn of a chat that follows `parent`, with a handwritten answer, or with none ("").

    Its KV is computed with the next answer.

    Raises:
        ContextOverflow: it does not fit.
        InvalidArgument, TemplateError: as `prompt_of`.
    """
    prompt = prompt_of(model, settings, parent, user_input, settings.params, chat=True)
    answer = model.engine.tokenizer.encode(text, add_bos=False, special=parse_special) if text else []
    check_room(model, settings, len(prompt.ids) + len(answer))
    kept = prompt.kept if answer else parent.n_ids
    return Turn(
        parent=parent,
        number=parent.number + 1,
        chat=True,
        said=user_input,
        text=text,
        kept=kept,
        prompt_ids=tuple(prompt.ids[kept:]) if answer else (),
        token_ids=tuple(answer),
        n_begun=len(answer),
        params=settings.params.resolved(model.engine.defaults),
        finish_reason=WRITTEN,
        cut=prompt.cut if answer else parent.cut,
        prompt_unread=True,
    )


def rewritten(model: LoadedModel, settings: Settings, turn: Turn, text: str, *, parse_special: bool | None) -> Turn:
    """A sibling of `turn` with a handwritten answer, without KV.

    Raises:
        InvalidArgument: the text is empty.
        ContextOverflow: it does not fit.
    """
    if not text:
        raise InvalidArgument("text is empty: an answer needs at least one character")
    if turn.is_unanswered:
        assert turn.parent is not None
        return exchange(model, settings, turn.parent, turn.said, text, parse_special=bool(parse_special))
    special = not turn.chat and turn.said.parse_special if parse_special is None else parse_special
    answer = model.engine.tokenizer.encode(text, add_bos=False, special=special)
    check_room(model, settings, turn.n_ids - len(turn.token_ids) + len(answer))
    return Turn(
        parent=turn.parent,
        number=turn.number,
        chat=turn.chat,
        said=turn.said,
        text=text,
        kept=turn.kept,
        prompt_ids=turn.prompt_ids,
        token_ids=tuple(answer),
        n_begun=len(answer),
        params=turn.params,
        finish_reason=WRITTEN,
        cut=turn.cut,
        frozen=turn.frozen,
        prompt_unread=turn.prompt_unread,
    )


# ---- Ends -----------------------------------------------------------------------------------------------------------


def complete(turn: Turn, generation: Generation, why_cold: str) -> None:
    """Sets the fields of a turn that are known when its generation has ended: `kv`, `cut` and `why_recomputed`.

    Args:
        why_cold: see `LoadedModel.why_cold`; "" too for a model that is not loaded any more.
    """
    turn.kv = generation.sequence
    window = turn.kv.window
    n_hidden = window.first_visible(turn.n_ids - 1) - window.n_sinks
    if n_hidden > 0:
        turn.cut = Cut("slide", n_hidden)
    if turn.recomputed and turn.parent is not None and turn.kept == turn.parent.n_ids:
        evicted = "the KV of the past was evicted, or never kept"
        dropped = "the KV of the past was evicted or never kept, or that of its windowed layers was dropped"
        if turn.kv.pool.states is not None:
            evicted = "the recurrent state where its past ends was evicted, or never kept"
        turn.why_recomputed = why_cold or (dropped if turn.kv.pool.n_dropped_ever else evicted)
    elif turn.recomputed:
        reworded, shorter = "the chat template rendered the past differently", "the oldest turns were left out"
        turn.why_recomputed = reworded if turn.cut is None else shorter


# ---- Checks ---------------------------------------------------------------------------------------------------------


def check_kind(parent: Turn, *, chat: bool) -> None:
    """Raises InvalidArgument if a chat would continue as a story, or the reverse."""
    if parent.number and parent.chat is not chat:
        kind, verb = ("chat", "tell()") if parent.chat else ("story", "say()")
        raise InvalidArgument(f"this session is a {kind}; {verb} needs another session")


def check_branches(n: object) -> None:
    """Raises InvalidArgument if `n` is not a possible number of branches."""
    if type(n) is not int or not 1 <= n <= MAX_BRANCHES:
        raise InvalidArgument(f"n is {n!r}, must be a whole number in 1 .. {MAX_BRANCHES}")


def check_position(turn: Turn, position: int) -> None:
    """Raises InvalidArgument if `position` is neither that of a token of the answer nor the one after the last."""
    if type(position) is not int or not 0 <= position <= len(turn.token_ids):
        raise InvalidArgument(f"position is {position!r}, must be 0 .. {len(turn.token_ids)}")


def check_answered(turn: Turn) -> None:
    """Raises InvalidArgument if a turn is a message without an answer."""
    if turn.is_unanswered:
        raise InvalidArgument(f"turn {turn.number} is a message without an answer; regenerate() answers it")


def check_room(model: LoadedModel, settings: Settings, n_ids: int) -> None:
    """Raises ContextOverflow if `n_ids` do not fit the context under the session's policy."""
    runner = model.engine.runner
    runner.check_room(n_ids, settings.policy.visible_in(runner))
