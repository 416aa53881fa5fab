"""Read-only views of a session: its tree, its tokens, alternatives, and what a next turn would cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fabula.engine.generation import Engine, Generation
from fabula.engine.sampling import SamplingParams
from fabula.sessions.model_handle import LoadedModel
from fabula.sessions.planning import prompt_of
from fabula.sessions.policy import Cut
from fabula.sessions.prompts import Prompt, common_length
from fabula.sessions.settings import Settings
from fabula.sessions.turn import START, Turn
from fabula.sessions.user_input import UserInput
from fabula.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Node:
    """A turn with the turns that follow it, oldest first."""

    turn: Turn
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A candidate token for one position of an answer.

    Attributes:
        token_id: for `fork_at`.
        text: of the token alone.
        logprob: natural log-probability under the plain softmax of the logits.
        chosen: whether the answer has this token there.
    """

    token_id: int
    text: str
    logprob: float
    chosen: bool


@dataclass(frozen=True, slots=True)
class Count:
    """What a next turn would cost.

    Attributes:
        prompt_tokens: of the whole prompt; if it does not fit, of the shortest one that the policy allows.
        new_tokens: of those, tokens after the unchanged past.
        reused_tokens: of those, tokens whose KV the session's turns hold now; other sessions may hold more.
        context: context length of the model.
        fits: whether the turn could start.
        max_answer: tokens its answer could have.
        cut: the part of the past that the model would not see; None for nothing.
    """

    prompt_tokens: int
    new_tokens: int
    reused_tokens: int
    context: int
    fits: bool
    max_answer: int
    cut: Cut | None = None


# ---- The tree -------------------------------------------------------------------------------------------------------


def nodes_of(turns: Iterable[Turn]) -> Node:
    """The tree from the empty start; `turns` has parents before children."""
    nodes = {START: Node(START)}
    for turn in turns:
        assert turn.parent is not None
        nodes[turn] = Node(turn)
        nodes[turn.parent].children.append(nodes[turn])
    return nodes[START]


def turns_json(turns: list[Turn], own: set[Turn], head: Turn) -> list[dict[str, Any]]:
    """The turns of a tree as `Session.tree_json` has them.

    Args:
        turns: all of them, parents before children.
        own: those made in this session, not before a fork.
        head: the current turn.
    """
    path = set(head.lineage())
    n_children = dict.fromkeys(turns, 0)
    for turn in turns:
        if turn.parent in n_children:
            n_children[turn.parent] += 1
    found = []
    for turn in turns:
        assert turn.parent is not None
        node = turn.to_json()
        del node["template_options"]
        found.append(
            node
            | {
                "parent": turn.parent.number,
                "parent_id": turn.parent.id,
                "chat": turn.chat,
                "n_children": n_children[turn],
                "is_head": turn is head,
                "on_path": turn in path,
                "is_own": turn in own,
            }
        )
    return found


def diff(a: Turn, b: Turn) -> tuple[list[Turn], list[Turn]]:
    """The turns only on the path to `a`, and those only on the path to `b`, in order."""
    in_a, in_b = set(a.lineage()), set(b.lineage())
    return (
        [turn for turn in a.lineage() if turn not in in_b][::-1],
        [turn for turn in b.lineage() if turn not in in_a][::-1],
    )


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def tokens_of(turn: Turn, tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """The tokens of an answer, each with the text that it completes."""
    decoder = tokenizer.stream_decoder(continues=not turn.chat)
    return [(token, decoder.push(token)) for token in turn.token_ids]


def alternatives_of(generation: Generation, engine: Engine, chosen: int | None) -> list[Alternative]:
    """The candidates of a generation's first token, best first.

    Args:
        generation: with `n_logprobs`.
        chosen: the token that the answer has there; None for none.
    """
    decode = engine.tokenizer.decode
    return [
        Alternative(token, decode([token], skip_special=False), logprob, token == chosen)
        for token, logprob in next(generation).top_logprobs
    ]


def count(
    model: LoadedModel,
    settings: Settings,
    parent: Turn,
    user_input: UserInput | None,
    params: SamplingParams | None,
    *,
    chat: bool,
) -> Count:
    """What a turn that follows `parent` would cost; `user_input` None: nothing new.

    Raises:
        InvalidArgument, TemplateError: as `prompt_of`.
    """
    runner, past, policy = model.engine.runner, parent.ids(), settings.policy
    if user_input is None:
        prompt = Prompt(past, len(past), parent.cut if policy.name == "drop_oldest_turns" else None)
    else:
        prompt = prompt_of(model, settings, parent, user_input, params or settings.params, chat=chat)
    n, cut, window = len(prompt.ids), prompt.cut, policy.visible_in(runner)
    n_hidden = window.first_visible(n - 1) - window.n_sinks
    if n_hidden > 0:
        cut = Cut("slide", n_hidden)
    n_shared = min(common_length(past, prompt.ids), max(0, n - 1))
    room = runner.room(n, window)
    return Count(
        prompt_tokens=n,
        new_tokens=n - prompt.kept,
        reused_tokens=parent.n_held(n_shared, model.engine.cache),
        context=runner.context,
        fits=room >= 0,
        max_answer=max(1, room) if room >= 0 else 0,  # a prompt as long as the context still gets a token
        cut=cut,
    )
