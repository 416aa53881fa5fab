"""`Session`: a tree of turns that grows by answers of a model.

A session is a lock, a `TurnTree`, `Settings` and a queue of replies. `SessionView` reads them; the verbs here change
them. What a turn consists of is decided by the pure functions of `planning.py`.

Every change of the tree happens under the lock, after the store has committed it: a store that fails changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from fabula.engine.drafts import DraftTexts
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument, SessionBusy
from fabula.sessions import planning
from fabula.sessions.draft_texts import with_turns
from fabula.sessions.model_handle import LoadedModel, ModelHandle
from fabula.sessions.names import checked_tags
from fabula.sessions.persistence import Persistence
from fabula.sessions.planning import Plan, Planner
from fabula.sessions.policy import ContextPolicy
from fabula.sessions.reply import Reply, start_generation
from fabula.sessions.session_view import SessionView
from fabula.sessions.settings import Settings
from fabula.sessions.turn import Turn
from fabula.sessions.turn_kv import free_kv, keep_kv, share_kv
from fabula.sessions.turn_tree import TurnRef
from fabula.sessions.user_input import Messages, UserInput


class Session(SessionView):
    """A conversation, or a story, as a tree of turns.

    Made by `Model.session` and `Workspace.session`. `say` answers messages through the chat template, `tell` continues
    a text; a session does one or the other. Methods may be called from any thread.

    One reply runs at a time, or the several of one `branch`. Methods that start a reply take `wait`: False raises
    SessionBusy while another reply runs, True waits for its end, a number waits that many seconds. Callers that wait
    are served in order. They also take `timeout`: seconds until the answer ends by itself, with reason "timeout".

    A turn is given by its number on the path to the head, by its id, or as a `Turn`.

    Args:
        handle: the model.
        id: 1 .. 128 of A-Z a-z 0-9 . _ -; None makes a random one.
        tenant: its owner.
        system, params, policy, title, tags: see `Settings`.
        base: the turn it is forked from; None for an empty start.
        persistence: where it is stored; None for in memory only.
        created_at: seconds since 1970; None for now.
        vocabulary: fingerprint of the tokenizer that its token ids belong to; None for the model's.

    Attributes:
        id: its id.
        tenant: its owner; KV is shared with sessions of the same owner only.
        created_at: seconds since 1970.
        vocabulary: as given; "" while it is not known.
    """

    def __init__(
        self,
        handle: ModelHandle,
        *,
        id: str | None = None,
        tenant: str = "",
        system: str | None = None,
        params: SamplingParams | None = None,
        policy: ContextPolicy | str | None = None,
        base: Turn | None = None,
        persistence: Persistence | None = None,
        created_at: float | None = None,
        vocabulary: str | None = None,
        title: str = "",
        tags: Iterable[str] = (),
    ) -> None:
        settings = Settings(params or SamplingParams(), system, ContextPolicy.of(policy), title, checked_tags(tags))
        super().__init__(
            handle, settings, id=id, tenant=tenant, base=base, created_at=created_at, vocabulary=vocabulary
        )
        self._persistence = persistence
        self._texts = DraftTexts()  # of the tree, added when a reply starts
        if base is not None:
            base.forks.add(self)

    # ---- Settings ---------------------------------------------------------------------------------------------------

    def configure(
        self,
        *,
        title: str | None = None,
        sampling: SamplingParams | None = None,
        system: str | None = None,
        tags: Iterable[str] | None = None,
    ) -> None:
        """Changes settings; None keeps one as it is. They are stored when this returns.

        Args:
            title: one line of at most 200 characters.
            sampling: parameters of turns that are given none.
            system: system message, as long as there is no turn.
            tags: at most 16, each of 1 .. 60 characters; they replace the old ones.

        Raises:
            InvalidArgument: title or tags are malformed, or there are turns with another system message.
            SessionNotFound: the session was deleted.
            StoreError: the store failed; nothing has changed.
        """
        with self._lock:
            self._check_exists()
            self._queue.collect()
            if system is not None and system != self.system and self._is_started:
                raise InvalidArgument(f"session {self.id} has turns with another system message; start a new session")
            changed = self._settings.updated(params=sampling, system=system, title=title, tags=tags)
            if changed.is_same(self._settings):
                return
            if self._persistence is not None:
                self._persistence.save_settings(self, changed)
            self._settings = changed

    # ---- Verbs that start a reply -----------------------------------------------------------------------------------

    def say(
        self,
        said: Messages,
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
                "content" (text), and other keys of the template, such as "name" and "tool_call_id". The first may have
                the role assistant: the previous answer with its "tool_calls", whose sampled tokens stay as they are.
            params: sampling parameters of this turn; None takes the session's.
            template_options: for the chat template, such as `tools`; plain JSON data, for this turn only. Give the same
                ones with every turn: with others the template may render the past differently, which recomputes its KV.
            parse_special: whether control tokens written in the messages are control tokens. By default they are text,
                so that a user cannot forge another's turn.
            wait, timeout: see the class.

        Returns:
            A stream of pieces; the turn is in the tree after the last one.

        Raises:
            SessionBusy: another reply is running.
            ContextOverflow: the conversation does not fit; has both numbers, and nothing has changed.
            InvalidArgument: a message is malformed (the error names it), or the session is a story.
            TemplateError: the model has no chat template, or the template refuses.
            EngineBusy: too many requests are waiting.
        """
        new = UserInput.of(said, template_options, parse_special=parse_special)
        return self._start(
            lambda model: planning.next_turn(model, self._settings, self.head, new, params, chat=True), wait, timeout
        )[0]

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
            n_tokens: max tokens; None leaves it to `params`.
            prompt: text to append first; the first turn needs some.
            params: sampling parameters of this turn; None takes the session's.
            parse_special: whether control tokens written in `prompt` are control tokens; None: as in the previous turn,
                and yes in the first turn of a story.
            wait, timeout: see the class.

        Raises:
            SessionBusy, ContextOverflow, EngineBusy: as `say`.
            InvalidArgument: the session is a chat, or there is no text to continue.
        """
        chosen = planning.limited(params or self.params, n_tokens)
        return self._start(
            lambda model: planning.story(model, self._settings, self.head, prompt, chosen, parse_special), wait, timeout
        )[0]

    def regenerate(
        self, params: SamplingParams | None = None, *, wait: bool | float = False, timeout: float | None = None
    ) -> Reply:
        """Answers the head's prompt again, in a sibling of the head. `params` None: the head's with a new seed."""
        return self._start(
            lambda model: planning.regenerated(model, self._settings, self._exchange(), params), wait, timeout
        )[0]

    def edit(
        self,
        turn: TurnRef,
        said: Messages,
        params: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Answers other user input in place of a turn's, in a sibling of the turn. `params` None: the turn's with a new
        seed; None also keeps its `template_options` and `parse_special`."""
        new = UserInput.of(said, template_options, parse_special=bool(parse_special))

        def plan(model: LoadedModel) -> Plan:
            found = self._exchange(turn)
            edited = new.inheriting(found.said, options=template_options is None, parse_special=parse_special is None)
            return planning.sibling(model, self._settings, found, edited, params or self.again_params(found))

        return self._start(plan, wait, timeout)[0]

    def replay(
        self,
        turn: TurnRef,
        params: SamplingParams | None = None,
        *,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Generates a turn again from its parent: the same tokens with its own parameters and seed, or others with
        `params`.

        Raises:
            InvalidArgument: no such turn, or it was written by hand.
        """
        return self._start(
            lambda model: planning.replayed(model, self._settings, self._exchange(turn), params), wait, timeout
        )[0]

    def continue_(
        self,
        n_tokens: int | None = None,
        *,
        params: SamplingParams | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Continues the head's answer, in a sibling of the head that begins with the same tokens.

        With the head's own parameters this gives the tokens that would have come next. The head does not change.

        Args:
            n_tokens: max further tokens; None leaves it to `params`.
            params: sampling parameters; None takes the head's, with its seed.
            wait, timeout: see the class.
        """
        return self._start(
            lambda model: planning.continued(model, self._settings, self._exchange(), n_tokens, params), wait, timeout
        )[0]

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
        """Replaces one token of an answer and continues from there, in a sibling of the turn.

        Args:
            turn: turn of the answer.
            position: of the token in the answer, from 0; the answer's length appends one.
            token: its new id, see `alternatives`.
            params: sampling parameters; None takes the turn's, with its seed.
            wait, timeout: see the class.

        Raises:
            InvalidArgument: no such turn, position or token.
        """

        def plan(model: LoadedModel) -> Plan:
            return planning.with_token(model, self._settings, self._exchange(turn), position, token, params)

        return self._start(plan, wait, timeout)[0]

    def branch(
        self,
        n: int,
        said: Messages | None = None,
        params: SamplingParams | None = None,
        *,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> list[Reply]:
        """Starts n alternatives of the next turn at once; the head stays until `rollback` moves it to one.

        Args:
            n: 1 .. 32.
            said: what they answer, as `say` takes it, or text to append to a story. None answers the head's message
                again, or continues the story as it is.
            params: sampling parameters; a seed s stands for s, s + 1, ...; None as `branch_params`.
            template_options: as `say`; None keeps the head's where its message is answered again.
            parse_special: as `say` or `tell`; not used where the head's message is answered again.
            wait, timeout: see the class.

        Raises:
            as `say`; InvalidArgument: n is out of its range.
        """
        planning.check_branches(n)
        new = UserInput.of("" if said is None else said, template_options, parse_special=bool(parse_special))

        def plan(model: LoadedModel) -> Plan:
            options, is_new = template_options, said is not None
            return planning.branch(model, self._settings, self.head, new, params, options, parse_special, is_new=is_new)

        return self._start(plan, wait, timeout, n=n, selects=False)

    # ---- Turns written by hand --------------------------------------------------------------------------------------

    def write(
        self,
        text: str,
        *,
        said: Messages | None = None,
        frozen: bool = False,
        parse_special: bool | None = None,
        wait: bool | float = False,
    ) -> Turn:
        """Appends handwritten text: a piece of a story, or an exchange of a chat.

        Its KV is computed with the next answer.

        Args:
            text: the piece; in a chat the answer to `said`, or "" to leave that to the next `say`.
            said: in a chat, the message or the messages, as `say` takes them.
            frozen: whether it is a note: part of the prompt, but not of the story, and never dropped by the policy
                `drop_oldest_turns`. A note at the start is computed once: all branches share its KV.
            parse_special: whether control tokens written in it are control tokens; None as in `tell`, and no in a chat.
            wait: see the class.

        Returns:
            The new head.

        Raises:
            InvalidArgument: the session is a chat and `said` is not given, or the reverse; or the text is empty.
            ContextOverflow, SessionBusy, StoreError: as `tell`.
        """
        if said is not None:
            if frozen:
                raise InvalidArgument("frozen is for a story; in a chat, write a message of the role system")
            new = UserInput.of(said, parse_special=bool(parse_special))
            with self._ready(wait) as model:
                return self._add_written(
                    planning.exchange(model, self._settings, self.head, new, text, parse_special=new.parse_special)
                )
        with self._ready(wait) as model:
            return self._add_written(
                planning.written(model, self._settings, self.head, text, frozen=frozen, parse_special=parse_special)
            )

    def rewrite(
        self, turn: TurnRef, text: str, *, parse_special: bool | None = None, wait: bool | float = False
    ) -> Turn:
        """Replaces a turn's answer by a handwritten one, in a sibling of the turn that becomes the head.

        `continue_` continues the new answer.

        Args:
            turn: turn of the answer.
            text: the new answer.
            parse_special: whether control tokens written in it are control tokens; None: as in the turn's prompt in a
                story, and no in a chat.
            wait: see the class.

        Returns:
            The new head.

        Raises:
            InvalidArgument: no such turn, or the text is empty.
            ContextOverflow, SessionBusy, StoreError: as `say`.
        """
        with self._ready(wait) as model:
            found = self._exchange(turn)
            new = planning.rewritten(model, self._settings, found, text, parse_special=parse_special)
            self._add_written(new)
            share_kv(found, new, model.engine)
            return new

    # ---- Moving the head --------------------------------------------------------------------------------------------

    def rollback(self, turn: TurnRef = 1, *, prune: bool = False) -> Turn:
        """Makes an earlier turn the head. A running reply is stopped first and stays as a partial turn.

        Args:
            turn: the new head; 0 is the empty start.
            prune: also delete the turns after it, in the same step, as `prune` does.

        Returns:
            The new head. Nothing is computed; the time does not depend on the length.

        Raises:
            InvalidArgument: no such turn.
            SessionNotFound: the session was deleted.
            StoreError: the store failed; the turns are as they were.
        """
        with self._lock:
            target = self._find(turn)
            if prune:
                self.prune(target, select=True)
            else:
                self.stop()
                self._tree.move_head(target)
                self._save_head()
            return target

    def prune(self, turn: TurnRef, *, select: bool = False) -> int:
        """Deletes the turns after one, with their KV, except those on the path to a fork. A running reply is stopped
        first. There is nothing to redo afterwards.

        Args:
            turn: it is not deleted.
            select: also make it the head, in the same step. By default only a head among the deleted turns moves to it.

        Returns:
            Bytes of KV freed.

        Raises:
            InvalidArgument, SessionNotFound, StoreError: as `rollback`.
        """
        with self._lock:
            target = self._find(turn)
            self.stop()
            gone = self._tree.descendants(target)
            head = target if select or target in self.head.lineage() else self.head
            if self._persistence is not None and gone:
                self._persistence.delete_turns(self, gone, head)
            self._tree.set_head(head, ())
            self._tree.remove(gone)
            self._texts.forget()
            if not gone:
                self._save_head()
            return free_kv(gone)

    def redo(self) -> Turn:
        """Undoes the last rollback.

        Raises:
            InvalidArgument: there was none, or a turn was added since.
        """
        with self._lock:
            self._check_exists()
            self.stop()  # first: a running reply becomes a turn, and then there is nothing to redo
            self._tree.redo()
            self._save_head()
            return self.head

    @contextmanager
    def at(self, turn: TurnRef) -> Iterator[Session]:
        """Makes a turn the head for a `with` block."""
        with self._lock:
            before, redo_stack = self.head, self._tree.redo_stack
            self.rollback(turn)
        try:
            yield self
        finally:
            with self._lock:
                self.rollback(before)
                self._tree.set_head(self.head, redo_stack)
                self._save_head()

    def stop(self) -> None:
        """Stops the running replies. The pieces that were read stay as partial turns."""
        with self._lock:
            self._queue.stop()

    def tag(self, turn: TurnRef, name: str) -> None:
        """Adds a tag to a turn."""
        if not name:
            raise InvalidArgument("the tag is empty")
        self._set_tags(turn, {name})

    def untag(self, turn: TurnRef, name: str) -> None:
        """Removes a tag from a turn, if it is there."""
        self._set_tags(turn, remove={name})

    # ---- The whole session ------------------------------------------------------------------------------------------

    def fork(self, turn: TurnRef | None = None, *, id: str | None = None) -> Session:
        """A new session that shares this one's path up to a turn (None: the head)."""
        with self._lock:
            base, persistence = self._find(turn), self._persistence
            fork = Session(
                self._handle,
                id=id,
                tenant=self.tenant,
                system=self.system,
                params=self.params,
                policy=self.policy,
                base=base,
                persistence=persistence,
                title=self.title,
                tags=self.tags,
            )
        if persistence is not None:  # without the lock: nobody waits for the commit of another session
            try:
                persistence.register(fork)
                persistence.create(fork)
            except BaseException:
                base.forks.discard(fork)
                raise
        return fork

    def delete(self) -> int:
        """Deletes every turn made here, except those on the path to a fork, and returns the bytes of KV freed."""
        with self._lock:
            self.stop()
            own = self._tree.own
            if self._persistence is not None:
                self._persistence.delete(self, own)
                self._persistence = None
            self._tree.root.forks.discard(self)
            self._tree.clear()
            self._texts.forget()
            self._deleted = True
            return free_kv(own)

    def export(self, *, kv: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Returns the session as JSON data, for `Workspace.import_` or `Model.import_`.

        Args:
            kv: safetensors file to write the KV in memory to; an import that gets it recomputes nothing.

        Raises:
            SessionBusy: a reply is running.
            StoreError: the file cannot be written.
        """
        from fabula.sessions.archive import export_session  # it imports this module

        return export_session(self, kv=kv)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def quiet(self, wait: bool | float = False) -> Iterator[None]:
        """Holds the session's lock while no reply is running, and none can start.

        Raises:
            SessionBusy: a reply is running, and takes longer than the caller would wait.
            SessionNotFound: the session was deleted, perhaps meanwhile.
        """
        with self._lock:
            if not self._queue.acquire(wait, self._check_exists):
                raise SessionBusy(f"session {self.id} is running another reply; stop() ends it, wait=True waits")
            yield

    @contextmanager
    def _ready(self, wait: bool | float) -> Iterator[LoadedModel]:
        """`quiet` with the model loaded, and its tokenizer checked."""
        _ = self._handle.loaded  # before the lock is taken: a thread that unloads a model may wait for the lock
        with self.quiet(wait):
            model = self._handle.loaded
            self._check_vocabulary(model)
            yield model

    def _start(
        self, plan: Planner, wait: bool | float, timeout: float | None, *, n: int = 1, selects: bool = True
    ) -> list[Reply]:
        """Starts n replies of one plan; `selects`: whether their turns become the head. If one cannot start, none
        does."""
        with self._ready(wait) as model, ExitStack() as started:
            planned = plan(model)
            texts = with_turns(self._texts, self._tree)
            replies: list[Reply] = []
            for i in range(n):
                seeded = planned.with_seed(i)
                generation = start_generation(model, seeded, self.policy, self.tenant, timeout, texts)
                draft = seeded.draft(generation.params)
                reply = Reply(generation, draft, self._lock, self._ended, self._queue.forgotten.append, selects=selects)
                replies.append(started.enter_context(reply))
                self._queue.running.add(reply)
                if self._persistence is not None:
                    self._persistence.watch(reply, self)
            started.pop_all()
            return replies

    def _ended(self, reply: Reply, turn: Turn | None) -> None:
        """End callback of every reply; the lock is held. Adds its turn to the tree once that is stored.

        Raises:
            StoreError: the turn could not be stored; the session is as it was before.
        """
        try:
            if turn is not None:
                why_cold = self._handle.loaded.why_cold if self._handle.is_loaded else ""
                planning.complete(turn, reply.generation, why_cold)
            if self._persistence is not None:
                self._persistence.save_reply(reply, turn, self)
            if turn is not None:
                self._tree.add(turn, selects=reply.selects)
                keep_kv(turn, reply.generation.engine)
        finally:
            self._queue.discard(reply)

    def _add_written(self, turn: Turn) -> Turn:
        """Adds a handwritten turn as the head once it is stored."""
        if self._persistence is not None:
            self._persistence.save_turn(turn, self)
        self._tree.add(turn, selects=True)
        return turn

    def _save_head(self) -> None:
        if self._persistence is not None:
            self._persistence.save_head(self)

    def _set_tags(self, ref: TurnRef, add: Set[str] = frozenset(), remove: Set[str] = frozenset()) -> None:
        with self._lock:
            turn = self._exchange(ref)
            tags = (turn.tags | add) - remove
            if self._persistence is not None:
                self._persistence.save_tags(turn, tags)
            turn.tags = tags
