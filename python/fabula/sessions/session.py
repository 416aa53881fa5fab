"""A session: a tree of turns that grows by answers.

A turn goes on from its parent's ids as they were drawn, and from its parent's K and V where they still are. Making a
turn again, editing it, taking another token at any place: each is a sibling beside what was there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.sessions.growth import Growing, Plan
from fabula.sessions.prompts import messages_of
from fabula.sessions.reply import Reply
from fabula.sessions.turn import START, Turn

MAX_BRANCHES = 32


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


class Session(Growing):
    """A conversation, or a story, that can be walked.

    Made by `Model.session` and `Workspace.session`. `say` answers messages through the chat template, `tell` continues
    a text; a session does the one or the other. One reply is made at a time, or several of one `branch`. Verbs that
    begin a reply take `wait`: False raises SessionBusy while another reply is being made, True waits for its end, a
    number waits so many seconds. Callers that wait get their turn in the order they came.

    Attributes:
        id: its name.
        tenant: its owner; K and V are shared with sessions of the same owner only.
        head: the turn that the next one follows.
        params: sampling settings of turns that bring none.
        system: system message of a chat.
        policy: what happens when the context is full.
    """

    # ---- Going on ---------------------------------------------------------------------------------------------------

    def say(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Answers a message.

        Args:
            text: the user's message.
            params: sampling settings of this turn; None takes the session's.
            wait: for the end of another reply; see the class.
            timeout: seconds until the answer ends by itself, with reason "timeout".

        Returns:
            A stream of pieces; the turn stands in the tree behind the last one.

        Raises:
            SessionBusy: another reply is being made.
            ContextOverflow: the conversation does not fit; carries both numbers, and nothing has changed.
            InvalidArgument: the session tells a story.
            TemplateError: the model has no chat template, or it refuses.
            EngineBusy: too many requests wait already.
        """
        return self._go(lambda: self._next(self.head, text, params, chat=True), wait, timeout)[0]

    def tell(
        self,
        n_tokens: int | None = None,
        *,
        prompt: str | None = None,
        params: SamplingParams | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Continues the story.

        Args:
            n_tokens: tokens at most; None leaves it to `params`.
            prompt: text to add before going on; the beginning needs some.
            params: sampling settings of this turn; None takes the session's.
            wait, timeout: as `say`.

        Raises:
            SessionBusy, ContextOverflow, EngineBusy: as `say`.
            InvalidArgument: the session is a chat, or there is no text to continue.
        """
        chosen = params or self.params
        chosen = chosen if n_tokens is None else replace(chosen, max_tokens=n_tokens)
        return self._go(lambda: self._next(self.head, prompt or "", chosen, chat=False), wait, timeout)[0]

    def regenerate(self, params: SamplingParams | None = None, *, wait: bool | float = False) -> Reply:
        """Answers the head's prompt again, as a sibling of the head: with `params`, or the settings of before and a new
        seed."""

        def plan() -> Plan:
            turn = self._made(self.head)
            return self._again(turn, turn.prompt, params or replace(self._params(turn), seed=None))

        return self._go(plan, wait)[0]

    def edit(
        self, turn: int | Turn, text: str, params: SamplingParams | None = None, *, wait: bool | float = False
    ) -> Reply:
        """Says something else in place of a turn's prompt, as its sibling."""

        def plan() -> Plan:
            found = self._made(self._find(turn))
            return self._again(found, text, params or replace(self._params(found), seed=None))

        return self._go(plan, wait)[0]

    def replay(self, turn: int | Turn, params: SamplingParams | None = None, *, wait: bool | float = False) -> Reply:
        """Does a turn again from its parent: the same tokens with the same settings, or others with `params`."""

        def plan() -> Plan:
            found = self._made(self._find(turn))
            if found.n_begun:
                return self._from_inside(found, list(found.token_ids[: found.n_begun]), params or self._params(found))
            return self._again(found, found.prompt, params or self._params(found))

        return self._go(plan, wait)[0]

    def continue_(
        self, n_tokens: int | None = None, *, params: SamplingParams | None = None, wait: bool | float = False
    ) -> Reply:
        """Goes on where the head's answer stopped, as a sibling of it that begins with the same tokens.

        With the settings of before this gives what would have come next. The head stays as it is.

        Args:
            n_tokens: further tokens at most; None leaves it to `params`.
            params: sampling settings; None takes the head's.
            wait: as `say`.
        """

        def plan() -> Plan:
            turn = self._made(self.head)
            chosen = params or self._params(turn)
            ended = turn.token_ids[-1] in self._host.engine.tokenizer.eos_ids
            begun = list(turn.token_ids[:-1] if ended else turn.token_ids)
            return self._from_inside(turn, begun, chosen if n_tokens is None else replace(chosen, max_tokens=n_tokens))

        return self._go(plan, wait)[0]

    def fork_at(
        self,
        turn: int | Turn,
        position: int,
        token: int,
        params: SamplingParams | None = None,
        *,
        wait: bool | float = False,
    ) -> Reply:
        """Takes another token at a place of an answer and goes on from there, as a sibling of the turn.

        Args:
            turn: whose answer.
            position: of the token in the answer, from 0; its length appends one.
            token: id to put there, see `alternatives`.
            params: sampling settings; None takes the turn's.
            wait: as `say`.

        Raises:
            InvalidArgument: no such turn, place or token.
        """

        def plan() -> Plan:
            found = self._made(self._find(turn))
            self._check_place(found, position)
            begun = [*found.token_ids[:position], *self._host.engine.runner.token_ids([token]).tolist()]
            return self._from_inside(found, begun, params or self._params(found))

        return self._go(plan, wait)[0]

    def branch(
        self, n: int, text: str | None = None, params: SamplingParams | None = None, *, wait: bool | float = False
    ) -> list[Reply]:
        """n alternatives of the next turn, made side by side; the head stays where it is until one is chosen by
        `rollback`.

        Args:
            n: 1 .. 32.
            text: the message they answer, or text a story goes on with. None for more answers to the head's message,
                or for the story as it is.
            params: sampling settings; a seed s stands for s, s + 1, ...; None takes the session's, with the head's
                constraint where its message is answered again.
            wait: as `say`.

        Raises:
            as `say`; InvalidArgument: n is out of its range.
        """
        if type(n) is not int or not 1 <= n <= MAX_BRANCHES:
            raise InvalidArgument(f"n is {n!r}, must be a whole number in 1 .. {MAX_BRANCHES}")

        def plan() -> Plan:
            head, chosen = self.head, params or self.params
            if head.number and head.chat and text is None:
                kept = replace(self.params, constraint=self._params(head).constraint)
                return self._again(head, head.prompt, params or kept)
            return self._next(head, text or "", chosen, chat=head.chat if head.number else text is not None)

        return self._go(plan, wait, n=n, selects=False)

    def alternatives(self, turn: int | Turn, position: int, n: int = 10) -> list[Alternative]:
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

    # ---- Walking ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stops the replies that are being made; what was read of them so far stays, as partial turns."""
        with self._lock:
            self._collect()
            for reply in list(self._running):
                reply.cancel()

    def fork(self, turn: int | Turn | None = None, *, id: str | None = None) -> Session:
        """A new session that shares this one's past up to a turn (None: the head) and goes on alone."""
        with self._lock:
            base = self.head if turn is None else self._find(turn)
            fork = Session(
                self._host,
                id=id,
                tenant=self.tenant,
                system=self.system,
                params=self.params,
                policy=self.policy,
                base=base,
                keeper=self._keeper,
            )
            if self._keeper is not None:
                self._keeper.opened(fork)
            return fork

    def delete(self) -> int:
        """Forgets every turn made here, but for what forks go on from, and returns the bytes of K and V set free."""
        with self._lock:
            self.stop()
            pool = self._host.engine.runner.pool if self._host.is_loaded else None
            before = pool.n_free if pool is not None else 0
            self._root.forks.discard(self)
            if self._keeper is not None:
                self._keeper.deleted(self, self._turns)
                self._keeper = None
            self._drop(self._turns)
            self._root = self.head = START
            self._deleted = True
            return (pool.n_free - before) * pool.page_bytes if pool is not None else 0

    def export(self, *, kv: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The whole session as JSON data, for `Workspace.import_` or `Model.import_`.

        Args:
            kv: safetensors file to write K and V to, as far as they are in memory, so that they need not be computed
                again.

        Raises:
            SessionBusy: a reply is being made.
            StoreError: the file cannot be written.
        """
        from fabula.sessions.archive import export_session  # which makes sessions

        return export_session(self, kv=kv)

    # ---- Looking ----------------------------------------------------------------------------------------------------

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation on the path, as `Model.chat` takes it."""
        return messages_of(self.system, self.path)

    @property
    def is_busy(self) -> bool:
        """Whether a reply is being made."""
        with self._lock:
            self._collect()
            return bool(self._running)
