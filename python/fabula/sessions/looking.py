"""What can be seen of a session: its words, its tree, what could stand in it, and what would fit. Nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fabula.engine.sampling import SamplingParams
from fabula.sessions.growth import Growing
from fabula.sessions.policy import Cut
from fabula.sessions.prompts import Prompt, common_length, messages_of, parses_special
from fabula.sessions.said import Said, Saying
from fabula.sessions.tree import TurnRef


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could stand at a place of an answer.

    Attributes:
        token_id: for `fork_at`.
        text: of the token alone.
        logprob: natural log-probability under the plain softmax of the logits.
        chosen: whether it is the one that stands there.
    """

    token_id: int
    text: str
    logprob: float
    chosen: bool


@dataclass(frozen=True, slots=True)
class Count:
    """What a next turn would cost.

    Attributes:
        prompt_tokens: of its whole prompt; if it does not fit, of the least that can be left of it.
        new_tokens: of those, behind the past that stays as it is.
        reused_tokens: of those, whose K and V the session's turns hold just now; the same text elsewhere may hold more.
        context: of the model.
        fits: whether the turn could be begun.
        max_answer: tokens its answer could have.
        cut: what of the past the model would not see; None for nothing.
    """

    prompt_tokens: int
    new_tokens: int
    reused_tokens: int
    context: int
    fits: bool
    max_answer: int
    cut: Cut | None = None


class Looking(Growing):
    """A session as one who only looks at it sees it."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation on the path, as `Model.chat` takes it."""
        return messages_of(self.system, self.path)

    @property
    def is_busy(self) -> bool:
        """Whether a reply is being made."""
        with self._lock:
            self._collect()
            return bool(self._running)

    def tree_json(self) -> dict[str, Any]:
        """The whole tree as JSON data, for those who draw it.

        Returns:
            The session's `id` and `title`; `head` and `head_id`, a number and an id, 0 and "" for the empty start;
            `can_redo`; and `turns`, parents before children. Each is as `Turn.to_json` says, without the template's
            options, with `parent` and `parent_id`, `chat`, `n_children`, and whether it is the `is_head`, `on_path`
            from the start to there, and `is_own`, made here and not before a fork.
        """
        with self._lock:
            turns, own = self.turns, set(self._tree.own)
            path = set(self.head.lineage())
            head, can_redo = self.head, self._tree.can_redo
        n_children = dict.fromkeys([*turns, *path], 0)
        nodes = []
        for turn in turns:
            assert turn.parent is not None
            n_children[turn.parent] = n_children.get(turn.parent, 0) + 1
        for turn in turns:
            assert turn.parent is not None
            node = turn.to_json()
            del node["template_options"]
            nodes.append(
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
        return {
            "id": self.id,
            "title": self.title,
            "head": head.number,
            "head_id": head.id,
            "can_redo": can_redo,
            "turns": nodes,
        }

    def count(
        self,
        said: Saying | None = None,
        params: SamplingParams | None = None,
        *,
        chat: bool = True,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
    ) -> Count:
        """What a next turn would cost, behind the head as it is now, also while a reply is being made.

        Loads the model if it is not loaded; begins nothing, and waits for nobody.

        Args:
            said: as `say` takes it; for a story, text to add. None for nothing: what the session holds up to the head.
            params: sampling settings; of importance where the oldest turns are left out to make room for `max_tokens`.
            chat: False for a story.
            template_options: as `say`.
            parse_special: as `say` or `tell`.

        Raises:
            InvalidArgument: it could not be said, whatever its length.
            TemplateError: as `say`.
            SessionNotFound: the session was deleted.
        """
        self._check_there()
        parent, chosen = self.head, params or self.params
        engine = self._host.engine
        self._check_vocabulary()
        runner, past = engine.runner, parent.ids()
        if said is None:
            prompt = Prompt(past, len(past), parent.cut if self.policy.name == "drop_oldest_turns" else None)
        else:
            special = bool(parse_special) if chat else parses_special(parse_special, parent)
            words = Said.of(said, template_options, parse_special=special)
            prompt = self._prompt(parent, words, chosen, chat=chat)
        n, cut, window = len(prompt.ids), prompt.cut, self.policy.visible(runner.context)
        hidden = window.first_visible(n - 1) - window.n_sinks
        if hidden > 0:
            cut = Cut("slide", hidden)
        reach = min(common_length(past, prompt.ids), max(0, n - 1))
        room = runner.room(n, window)
        return Count(
            prompt_tokens=n,
            new_tokens=n - prompt.kept,
            reused_tokens=parent.n_held(reach, engine.cache),
            context=runner.context,
            fits=room >= 0,
            max_answer=max(1, room) if room >= 0 else 0,  # a prompt as long as the context still gets a token
            cut=cut,
        )

    def tokens(self, turn: TurnRef) -> list[tuple[int, str]]:
        """The tokens of an answer, each with the text that came with it: "" where a letter needs the next one too.

        Raises:
            InvalidArgument: no such turn.
        """
        with self._lock:
            found = self._made(self._find(turn))
        decoder = self._host.served.engine.tokenizer.stream_decoder(continues=not found.chat)
        return [(token, decoder.push(token)) for token in found.token_ids]

    def alternatives(self, turn: TurnRef, position: int, n: int = 10) -> list[Alternative]:
        """The likeliest tokens at a place of an answer, best first; nothing of the prompt is computed again.

        Args:
            turn: whose answer.
            position: in the answer, from 0; its length for what could come next.
            n: 1 .. 20.

        Raises:
            InvalidArgument: no such turn or place.
        """
        with self._lock:
            found = self._made(self._find(turn))
            self._check_place(found, position)
            engine = self._host.engine
            begun = found.token_ids[:position]
            prompt = found.ids()[: found.n_ids - len(found.token_ids)]
            sequence = found.fork_kv(len(prompt) + position - 1, engine.cache)
            one = SamplingParams(temperature=0.0, max_tokens=1, n_logprobs=n)
            generation = self._generation(prompt, one, found.chat, begun, sequence)
        piece = next(generation)
        there = found.token_ids[position] if position < len(found.token_ids) else None
        return [
            Alternative(token, engine.tokenizer.decode([token], skip_special=False), logprob, token == there)
            for token, logprob in piece.top_logprobs
        ]
