"""A session: a tree of turns that grows by answers.

A turn goes on from its parent's ids as they were drawn, and from its parent's K and V where they still are. Making a
turn again, editing it, taking another token at any place: each is a sibling beside what was there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument
from fabula.sessions.growth import Plan
from fabula.sessions.names import checked_tags, checked_title
from fabula.sessions.prompts import parses_special
from fabula.sessions.reply import Reply
from fabula.sessions.said import Said, Saying
from fabula.sessions.tree import TurnRef
from fabula.sessions.turn import WRITTEN
from fabula.sessions.writing import Writing

MAX_BRANCHES = 32


class Session(Writing):
    """A conversation, or a story, that can be walked.

    Made by `Model.session` and `Workspace.session`. `say` answers messages through the chat template, `tell` continues
    a text; a session does the one or the other. One reply is made at a time, or several of one `branch`. Verbs that
    begin a reply take `wait`: False raises SessionBusy while another reply is being made, True waits for its end, a
    number waits so many seconds. Callers that wait get their turn in the order they came. A turn is named by its number
    on the path to the head, by its id, or by itself.

    Attributes:
        id: its name.
        tenant: its owner; K and V are shared with sessions of the same owner only.
        head: the turn that the next one follows.
        params: sampling settings of turns that bring none.
        system: system message of a chat.
        policy: what happens when the context is full.
        title: what people call it.
        tags: names that it has in common with others.
    """

    # ---- Going on ---------------------------------------------------------------------------------------------------

    def say(
        self,
        said: Saying,
        params: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool = False,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Answers a message, or several.

        Args:
            said: the user's message; or a list of messages, each with "role" (user, tool, system, developer),
                "content" (text), and what else the template reads, such as "name" and "tool_call_id". The first may be
                of the assistant: the answer before, with the "tool_calls" that a template is to read in it; what was
                drawn stays as it was drawn.
            params: sampling settings of this turn; None takes the session's.
            template_options: for the chat template, such as `tools`; plain JSON data. They are this turn's: the same
                ones, given with every turn, keep K and V of the past valid; with others the template may word the past
                anew, and then that is computed again.
            parse_special: whether control tokens written in the messages are control tokens. By default they are text,
                so that a user cannot write another's turn.
            wait: for the end of another reply; see the class.
            timeout: seconds until the answer ends by itself, with reason "timeout".

        Returns:
            A stream of pieces; the turn stands in the tree behind the last one.

        Raises:
            SessionBusy: another reply is being made.
            ContextOverflow: the conversation does not fit; carries both numbers, and nothing has changed.
            InvalidArgument: a message is malformed, names the place; or the session tells a story.
            TemplateError: the model has no chat template, or it refuses.
            EngineBusy: too many requests wait already.
        """
        new = Said.of(said, template_options, parse_special=parse_special)
        return self._go(lambda: self._next(self.head, new, params, chat=True), wait, timeout)[0]

    def tell(
        self,
        n_tokens: int | None = None,
        *,
        prompt: str | None = None,
        params: SamplingParams | None = None,
        parse_special: bool | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Continues the story.

        Args:
            n_tokens: tokens at most; None leaves it to `params`.
            prompt: text to add before going on; the beginning needs some.
            params: sampling settings of this turn; None takes the session's.
            parse_special: whether control tokens written in `prompt` are control tokens; None for as in the turn
                before, and at the beginning of a story for yes.
            wait, timeout: as `say`.

        Raises:
            SessionBusy, ContextOverflow, EngineBusy: as `say`.
            InvalidArgument: the session is a chat, or there is no text to continue.
        """
        chosen = params or self.params
        chosen = chosen if n_tokens is None else replace(chosen, max_tokens=n_tokens)

        def plan() -> Plan:
            special = parses_special(parse_special, self.head)
            return self._next(self.head, Said.of(prompt or "", parse_special=special), chosen, chat=False)

        return self._go(plan, wait, timeout)[0]

    def regenerate(
        self, params: SamplingParams | None = None, *, wait: bool | float = False, timeout: float | None = None
    ) -> Reply:
        """Answers the head's prompt again, as a sibling of the head: with `params`, or the settings of before and a new
        seed."""

        def plan() -> Plan:
            turn = self._made(self.head)
            return self._again(turn, turn.said, params or self.again_params(turn))

        return self._go(plan, wait, timeout)[0]

    def edit(
        self,
        turn: TurnRef,
        said: Saying,
        params: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Says something else in place of a turn's prompt, as its sibling: with `params`, or the turn's settings and a
        new seed. None keeps the turn's `template_options` and `parse_special`."""
        new = Said.of(said, template_options, parse_special=bool(parse_special))

        def plan() -> Plan:
            found = self._made(self._find(turn))
            words = new.with_options(found.said.options) if template_options is None else new
            if parse_special is None:
                words = replace(words, parse_special=found.said.parse_special)
            return self._again(found, words, params or self.again_params(found))

        return self._go(plan, wait, timeout)[0]

    def replay(
        self,
        turn: TurnRef,
        params: SamplingParams | None = None,
        *,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Does a turn again from its parent: the same tokens with the same settings and seed, or others with
        `params`."""

        def plan() -> Plan:
            found = self._made(self._find(turn))
            if found.finish_reason == WRITTEN:
                raise InvalidArgument(f"turn {found.number} was written by hand: there is nothing to make again")
            if found.n_begun:
                return self._from_inside(found, list(found.token_ids[: found.n_begun]), params or self._params(found))
            return self._again(found, found.said, params or self._params(found))

        return self._go(plan, wait, timeout)[0]

    def continue_(
        self,
        n_tokens: int | None = None,
        *,
        params: SamplingParams | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Goes on where the head's answer stopped, as a sibling of it that begins with the same tokens.

        With the settings of before this gives what would have come next. The head stays as it is.

        Args:
            n_tokens: further tokens at most; None leaves it to `params`.
            params: sampling settings; None takes the head's, its seed too.
            wait, timeout: as `say`.
        """

        def plan() -> Plan:
            turn = self._made(self.head)
            chosen = params or self._params(turn)
            ended = turn.token_ids[-1:] and turn.token_ids[-1] in self._host.engine.tokenizer.eos_ids
            begun = list(turn.token_ids[:-1] if ended else turn.token_ids)
            return self._from_inside(turn, begun, chosen if n_tokens is None else replace(chosen, max_tokens=n_tokens))

        return self._go(plan, wait, timeout)[0]

    def fork_at(
        self,
        turn: TurnRef,
        position: int,
        token: int,
        params: SamplingParams | None = None,
        *,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Takes another token at a place of an answer and goes on from there, as a sibling of the turn.

        Args:
            turn: whose answer.
            position: of the token in the answer, from 0; its length appends one.
            token: id to put there, see `alternatives`.
            params: sampling settings; None takes the turn's, its seed too.
            wait, timeout: as `say`.

        Raises:
            InvalidArgument: no such turn, place or token.
        """

        def plan() -> Plan:
            found = self._made(self._find(turn))
            self._check_place(found, position)
            begun = [*found.token_ids[:position], *self._host.engine.runner.token_ids([token]).tolist()]
            return self._from_inside(found, begun, params or self._params(found))

        return self._go(plan, wait, timeout)[0]

    def branch(
        self,
        n: int,
        said: Saying | None = None,
        params: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> list[Reply]:
        """n alternatives of the next turn, made side by side; the head stays where it is until one is chosen by
        `rollback`.

        Args:
            n: 1 .. 32.
            said: what they answer, as `say` takes it, or text a story goes on with. None for more answers to the head's
                message, or for the story as it is.
            params: sampling settings; a seed s stands for s, s + 1, ...; None takes the session's; where the head's
                message is answered again, with the head's constraint and new seeds.
            template_options: as `say`; where the head's message is answered again, None keeps the head's.
            parse_special: as `say` or `tell`; where the head's message is answered again, the head's.
            wait, timeout: as `say`.

        Raises:
            as `say`; InvalidArgument: n is out of its range.
        """
        if type(n) is not int or not 1 <= n <= MAX_BRANCHES:
            raise InvalidArgument(f"n is {n!r}, must be a whole number in 1 .. {MAX_BRANCHES}")

        new = Said.of("" if said is None else said, template_options, parse_special=bool(parse_special))

        def plan() -> Plan:
            head = self.head
            if head.number and head.chat and said is None:
                again = params or self.branch_params(again=True)
                return self._again(head, head.said.with_options(template_options), again)
            chat = head.chat if head.number else said is not None
            words = new if chat else replace(new, parse_special=parses_special(parse_special, head))
            return self._next(head, words, params, chat=chat)

        return self._go(plan, wait, timeout, n=n, selects=False)

    # ---- Walking ----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stops the replies that are being made; what was read of them so far stays, as partial turns."""
        with self._lock:
            self._collect()
            for reply in list(self._running):
                reply.cancel()

    def fork(self, turn: TurnRef | None = None, *, id: str | None = None) -> Session:
        """A new session that shares this one's past up to a turn (None: the head) and goes on alone."""
        with self._lock:
            base = self._find(self.head if turn is None else turn)
            fork = Session(
                self._host,
                id=id,
                tenant=self.tenant,
                system=self.system,
                params=self.params,
                policy=self.policy,
                base=base,
                keeper=self._keeper,
                title=self.title,
                tags=self.tags,
            )
            if self._keeper is not None:
                self._keeper.opened(fork)
            return fork

    def delete(self) -> int:
        """Forgets every turn made here, but for what forks go on from, and returns the bytes of K and V set free."""
        with self._lock:
            self.stop()
            if self._keeper is not None:
                self._keeper.deleted(self, self._tree.own)
                self._keeper = None
            self._tree.root.forks.discard(self)
            n_bytes = self._drop(self._tree.own)
            self._tree.clear()
            self._deleted = True
            return n_bytes

    def configure(
        self,
        *,
        title: str | None = None,
        sampling: SamplingParams | None = None,
        system: str | None = None,
        tags: Iterable[str] | None = None,
    ) -> None:
        """Changes settings; None leaves one as it is. They are kept when this returns.

        Args:
            title: what people call it, one line of at most 200 characters.
            sampling: settings of turns that bring none.
            system: system message, as long as nothing was said.
            tags: at most 16, each of 1 .. 60 characters; they replace those of before.

        Raises:
            InvalidArgument: title or tags are malformed, or the conversation has begun with another system message.
            SessionNotFound: the session was deleted.
            StoreError: they cannot be kept; nothing has changed.
        """
        with self._lock:
            self._check_there()
            self._collect()
            before = (self.title, self.params, self.system, self.tags)
            begun = bool(self.head.number or self._tree.n_own or self._running)
            if system is not None and system != self.system and begun:
                raise InvalidArgument(f"session {self.id} has begun with another system message; begin a new session")
            after = (
                self.title if title is None else checked_title(title),
                self.params if sampling is None else sampling,
                self.system if system is None else system,
                self.tags if tags is None else checked_tags(tags),
            )
            if after == before and after[1].given == before[1].given:
                return
            self.title, self.params, self.system, self.tags = after
            try:
                if self._keeper is not None:
                    self._keeper.changed(self)
            except BaseException:
                self.title, self.params, self.system, self.tags = before
                raise

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
