"""`Session`: a tree of turns that grows by answers of a model.

A session is a lock, a `TurnTree`, `Settings`, and a queue of replies; its verbs put these together. What a turn
consists of is decided in `planning.py`, what can be seen in `views.py`; neither changes anything. This file is long
because it is the contract of the public class: one short method per verb, most of it docstrings.

Every change of the tree happens under the lock, and after the store has committed it: a store that fails leaves the
session as it was.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fabula.engine.defaults import SamplingDefaults
from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument, SessionBusy, SessionNotFound
from fabula.sessions import planning, views
from fabula.sessions.model_handle import LoadedModel, ModelHandle
from fabula.sessions.names import checked_tags, is_session_id
from fabula.sessions.persistence import Persistence
from fabula.sessions.planning import Plan
from fabula.sessions.policy import ContextPolicy
from fabula.sessions.prompts import common_length, messages_of, parses_special
from fabula.sessions.reply import Reply
from fabula.sessions.reply_queue import ReplyQueue
from fabula.sessions.settings import Settings
from fabula.sessions.turn import START, Turn
from fabula.sessions.turn_kv import free_kv, keep_kv
from fabula.sessions.turn_tree import TurnRef, TurnTree
from fabula.sessions.user_input import Messages, UserInput
from fabula.sessions.views import Alternative, Count, Node

MAX_BRANCHES = 32


class Session:
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
        if id is not None and not is_session_id(id):
            raise InvalidArgument(f"session id {id!r} must be 1 .. 128 of A-Z a-z 0-9 . _ -")
        self.id = uuid.uuid4().hex if id is None else id
        self.tenant = tenant
        self.created_at = time.time() if created_at is None else created_at
        self.vocabulary = handle.vocabulary if vocabulary is None else vocabulary
        self._settings = Settings(
            params or SamplingParams(), system, ContextPolicy.of(policy), title, checked_tags(tags)
        )
        if handle.is_loaded:
            self.policy.visible(handle.engine.runner.context)
        self._handle, self._persistence = handle, persistence
        self._tree = TurnTree(START if base is None else base)
        if base is not None:
            base.forks.add(self)
        self._lock = threading.RLock()
        self._queue = ReplyQueue(self._lock)
        self._deleted = False

    # ---- Settings ---------------------------------------------------------------------------------------------------

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of turns that are given none."""
        return self._settings.params

    @property
    def system(self) -> str | None:
        """System message of a chat."""
        return self._settings.system

    @property
    def policy(self) -> ContextPolicy:
        """What happens when the context is full."""
        return self._settings.policy

    @property
    def title(self) -> str:
        """One line for people to read."""
        return self._settings.title

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the session; turns have their own."""
        return self._settings.tags

    @property
    def model(self) -> str:
        """Name of its model."""
        return self._handle.name

    @property
    def sampling_defaults(self) -> SamplingDefaults | None:
        """What the model recommends for parameters that neither a turn nor the session gives; None while it is not
        loaded."""
        return self._handle.loaded.defaults if self._handle.is_loaded else None

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
            started = bool(self.head.number or self._tree.n_own or self._queue.running)
            if system is not None and system != self.system and started:
                raise InvalidArgument(f"session {self.id} has begun with another system message; begin a new session")
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
                "content" (text), and other keys that the template reads, such as "name" and "tool_call_id". The first
                may have the role assistant: the previous answer, with the "tool_calls" that the template is to render;
                the sampled tokens stay as they are.
            params: sampling parameters of this turn; None takes the session's.
            template_options: for the chat template, such as `tools`; plain JSON data, for this turn only. Giving the
                same ones with every turn keeps the KV of the past valid; with others the template may render the past
                differently, and then it is recomputed.
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

        def plan(model: LoadedModel) -> Plan:
            return planning.next_turn(model, self._settings, self.head, new, params, chat=True)

        return self._start(plan, wait, timeout)[0]

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
        chosen = _with_max(params or self.params, n_tokens)

        def plan(model: LoadedModel) -> Plan:
            new = UserInput.of(prompt or "", parse_special=parses_special(parse_special, self.head))
            return planning.next_turn(model, self._settings, self.head, new, chosen, chat=False)

        return self._start(plan, wait, timeout)[0]

    def regenerate(
        self, params: SamplingParams | None = None, *, wait: bool | float = False, timeout: float | None = None
    ) -> Reply:
        """Answers the head's prompt again, as a sibling of the head: with `params`, or with the head's and a new
        seed."""

        def plan(model: LoadedModel) -> Plan:
            turn = self._exchange()
            return planning.sibling(model, self._settings, turn, turn.said, params or self.again_params(turn))

        return self._start(plan, wait, timeout)[0]

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
        """Replaces a turn's user input and answers it, as a sibling of the turn: with `params`, or with the turn's and
        a new seed. None keeps the turn's `template_options` and `parse_special`."""
        new = UserInput.of(said, template_options, parse_special=bool(parse_special))

        def plan(model: LoadedModel) -> Plan:
            found = self._exchange(turn)
            edited = new.with_options(found.said.options) if template_options is None else new
            if parse_special is None:
                edited = replace(edited, parse_special=found.said.parse_special)
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

        def plan(model: LoadedModel) -> Plan:
            found = self._exchange(turn)
            return planning.replayed(model, self._settings, found, params or self.same_params(found))

        return self._start(plan, wait, timeout)[0]

    def continue_(
        self,
        n_tokens: int | None = None,
        *,
        params: SamplingParams | None = None,
        wait: bool | float = False,
        timeout: float | None = None,
    ) -> Reply:
        """Continues the head's answer, as a sibling of the head that begins with the same tokens.

        With the head's own parameters this gives what would have come next. The head itself does not change.

        Args:
            n_tokens: max further tokens; None leaves it to `params`.
            params: sampling parameters; None takes the head's, with its seed.
            wait, timeout: see the class.
        """

        def plan(model: LoadedModel) -> Plan:
            turn = self._exchange()
            ended = turn.token_ids[-1:] and turn.token_ids[-1] in model.engine.tokenizer.eos_ids
            begun = turn.token_ids[:-1] if ended else turn.token_ids
            return planning.continuation(turn, begun, _with_max(params or self.same_params(turn), n_tokens))

        return self._start(plan, wait, timeout)[0]

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
        """Replaces one token of an answer and continues from there, as a sibling of the turn.

        Args:
            turn: whose answer.
            position: of the token in the answer, from 0; the answer's length appends one.
            token: id to put there, see `alternatives`.
            params: sampling parameters; None takes the turn's, with its seed.
            wait, timeout: see the class.

        Raises:
            InvalidArgument: no such turn, position or token.
        """

        def plan(model: LoadedModel) -> Plan:
            found = self._exchange(turn)
            planning.check_position(found, position)
            begun = (*found.token_ids[:position], *model.engine.runner.token_ids([token]).tolist())
            return planning.continuation(found, begun, params or self.same_params(found))

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
        """Starts n alternatives of the next turn at once; the head stays until one is chosen by `rollback`.

        Args:
            n: 1 .. 32.
            said: what they answer, as `say` takes it, or text to append to a story. None for more answers to the head's
                message, or for the story as it is.
            params: sampling parameters; a seed s stands for s, s + 1, ...; None takes the session's; where the head's
                message is answered again, with the head's constraint and new seeds.
            template_options: as `say`; where the head's message is answered again, None keeps the head's.
            parse_special: as `say` or `tell`; where the head's message is answered again, the head's.
            wait, timeout: see the class.

        Raises:
            as `say`; InvalidArgument: n is out of its range.
        """
        if type(n) is not int or not 1 <= n <= MAX_BRANCHES:
            raise InvalidArgument(f"n is {n!r}, must be a whole number in 1 .. {MAX_BRANCHES}")
        new = UserInput.of("" if said is None else said, template_options, parse_special=bool(parse_special))

        def plan(model: LoadedModel) -> Plan:
            head = self.head
            if head.number and head.chat and said is None:
                again = head.said.with_options(template_options)
                return planning.sibling(model, self._settings, head, again, params or self.branch_params(again=True))
            chat = head.chat if head.number else said is not None
            added = new if chat else replace(new, parse_special=parses_special(parse_special, head))
            return planning.next_turn(model, self._settings, head, added, params, chat=chat)

        return self._start(plan, wait, timeout, n=n, selects=False)

    def again_params(self, turn: TurnRef | None = None) -> SamplingParams:
        """Default parameters of an answer that replaces a turn's (None: the head's): the turn's own with a new seed, as
        the old seed would give the same answer."""
        return replace(self.same_params(turn), seed=None)

    def same_params(self, turn: TurnRef | None = None) -> SamplingParams:
        """Default parameters of an answer that repeats or continues a turn's (None: the head's): the turn's own, with
        its seed."""
        with self._lock:
            return self._find(turn).params or self.params

    def branch_params(self, *, again: bool) -> SamplingParams:
        """Default parameters of branches: the session's. Where the head's message is answered `again`, with the head's
        constraint and new seeds: the old seed would give the head's answer."""
        with self._lock:
            head = self.head
            if not (again and head.number and head.chat):
                return self.params
            return replace(self.params, constraint=self.same_params(head).constraint, seed=None)

    # ---- Turns written by hand --------------------------------------------------------------------------------------

    def write(
        self, text: str, *, frozen: bool = False, parse_special: bool | None = None, wait: bool | float = False
    ) -> Turn:
        """Appends a piece to a story as its author wrote it; the model adds nothing. Its KV is computed with the next
        answer.

        Args:
            text: the piece.
            frozen: whether it is a note: the model reads it where it stands, it is not part of the story, and the
                policy `drop_oldest_turns` never drops it. A note at the start is computed once: all branches share its
                KV.
            parse_special: whether control tokens written in it are control tokens; None as in `tell`.
            wait: see the class.

        Returns:
            The new head.

        Raises:
            InvalidArgument: the session is a chat, or the text is empty.
            ContextOverflow, SessionBusy, StoreError: as `tell`.
        """
        with self._ready(wait) as model:
            return self._add_written(
                planning.written(model, self._settings, self.head, text, frozen=frozen, parse_special=parse_special)
            )

    def rewrite(
        self, turn: TurnRef, text: str, *, parse_special: bool | None = None, wait: bool | float = False
    ) -> Turn:
        """Puts other words in place of a turn's answer, as a sibling of the turn that becomes the head.

        The conversation goes on as if the model had answered so; `continue_` continues the new answer.

        Args:
            turn: whose answer.
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
            new.kv = found.fork_kv(common_length(found.ids(), new.ids()), model.engine.cache)
            return self._add_written(new)

    # ---- Moving the head --------------------------------------------------------------------------------------------

    @property
    def head(self) -> Turn:
        """The current turn: the next one follows it."""
        return self._tree.head

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
            turn: it stays itself.
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
        """Stops the running replies; what was read of them stays, as partial turns."""
        with self._lock:
            self._queue.stop()

    def tag(self, turn: TurnRef, name: str) -> None:
        """Adds a tag to a turn."""
        if not name:
            raise InvalidArgument("the tag is empty")
        with self._lock:
            found = self._exchange(turn)
            self._set_tags(found, {*found.tags, name})

    def untag(self, turn: TurnRef, name: str) -> None:
        """Removes a tag from a turn, if it is there."""
        with self._lock:
            found = self._exchange(turn)
            self._set_tags(found, found.tags - {name})

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
            self._deleted = True
            return free_kv(own)

    def export(self, *, kv: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The whole session as JSON data, for `Workspace.import_` or `Model.import_`.

        Args:
            kv: safetensors file to write the KV in memory to, so that it need not be recomputed.

        Raises:
            SessionBusy: a reply is running.
            StoreError: the file cannot be written.
        """
        from fabula.sessions.archive import export_session  # it imports this module

        return export_session(self, kv=kv)

    # ---- Views ------------------------------------------------------------------------------------------------------

    @property
    def turns(self) -> list[Turn]:
        """Every turn of the tree: the path it was forked from, then those made here, oldest first."""
        with self._lock:
            self._queue.collect()
            return self._tree.turns

    @property
    def path(self) -> list[Turn]:
        """The turns from the first to the head."""
        with self._lock:
            self._queue.collect()
            return self._tree.path

    @property
    def n_turns(self) -> int:
        """Number of turns made here, without the path it was forked from."""
        return self._tree.n_own

    @property
    def tree(self) -> Node:
        """The whole tree, from the empty start."""
        return views.nodes_of(self.turns)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation on the path, as `Model.chat` takes it."""
        return messages_of(self.system, self.path)

    @property
    def is_busy(self) -> bool:
        """Whether a reply is running."""
        with self._lock:
            self._queue.collect()
            return bool(self._queue.running)

    def turn(self, ref: TurnRef) -> Turn:
        """A turn of this tree.

        Raises:
            InvalidArgument: no such turn.
        """
        with self._lock:
            return self._find(ref)

    def children(self, turn: TurnRef) -> list[Turn]:
        """The turns that follow a turn, oldest first."""
        with self._lock:
            return self._tree.children(self._find(turn))

    def diff(self, a: TurnRef, b: TurnRef) -> tuple[list[Turn], list[Turn]]:
        """The turns that only lead to `a`, and those that only lead to `b`, in order."""
        with self._lock:
            first, second = self._find(a), self._find(b)
        return views.diff(first, second)

    def tree_json(self) -> dict[str, Any]:
        """The whole tree as JSON data, for those who draw it.

        Returns:
            The session's `id` and `title`; `head` and `head_id`, a number and an id, 0 and "" for the empty start;
            `can_redo`; and `turns`, parents before children. Each is as `Turn.to_json` without the template options,
            with `parent` and `parent_id`, `chat`, `n_children`, and whether it `is_head`, is `on_path` from the start
            to the head, and `is_own`: made here, not before a fork.
        """
        with self._lock:
            turns, own = self.turns, set(self._tree.own)
            head, can_redo = self.head, self._tree.can_redo
        return {
            "id": self.id,
            "title": self.title,
            "head": head.number,
            "head_id": head.id,
            "can_redo": can_redo,
            "turns": views.turns_json(turns, own, head),
        }

    def tokens(self, turn: TurnRef) -> list[tuple[int, str]]:
        """The tokens of an answer, each with its text: "" where a character needs the next token too.

        Raises:
            InvalidArgument: no such turn.
        """
        with self._lock:
            found = self._exchange(turn)
        return views.tokens_of(found, self._handle.engine.tokenizer)

    def alternatives(self, turn: TurnRef, position: int, n: int = 10) -> list[Alternative]:
        """The likeliest tokens at a position of an answer, best first; the prompt is not computed again.

        Args:
            turn: whose answer.
            position: in the answer, from 0; its length for what could come next.
            n: 1 .. 20.

        Raises:
            InvalidArgument: no such turn or position.
        """
        with self._lock:
            found = self._exchange(turn)
            planning.check_position(found, position)
            params = SamplingParams(temperature=0.0, max_tokens=1, n_logprobs=n)
            model = self._handle.loaded
            generation = self._generation(model, planning.continuation(found, found.token_ids[:position], params))
        chosen = found.token_ids[position] if position < len(found.token_ids) else None
        return views.alternatives_of(generation, model.engine, chosen)

    def count(
        self,
        said: Messages | None = None,
        params: SamplingParams | None = None,
        *,
        chat: bool = True,
        template_options: Mapping[str, Any] | None = None,
        parse_special: bool | None = None,
    ) -> Count:
        """What a next turn would cost, after the head as it is now, also while a reply is running.

        Loads the model if it is not loaded; starts nothing, and waits for no reply.

        Args:
            said: as `say` takes it; for a story, text to append. None for what the session holds up to the head.
            params: sampling parameters; they matter where the oldest turns are dropped to make room for `max_tokens`.
            chat: False for a story.
            template_options: as `say`.
            parse_special: as `say` or `tell`.

        Raises:
            InvalidArgument: `say` would refuse it, whatever its length.
            TemplateError: as `say`.
            SessionNotFound: the session was deleted.
        """
        self._check_exists()
        parent, model = self.head, self._handle.loaded
        self._check_vocabulary(model)
        new = None
        if said is not None:
            special = bool(parse_special) if chat else parses_special(parse_special, parent)
            new = UserInput.of(said, template_options, parse_special=special)
        return views.count(model, self._settings, parent, new, params, chat=chat)

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
                raise SessionBusy(f"session {self.id} is making another reply; stop() ends it, wait=True waits")
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
        self,
        plan: Callable[[LoadedModel], Plan],
        wait: bool | float,
        timeout: float | None,
        *,
        n: int = 1,
        selects: bool = True,
    ) -> list[Reply]:
        """Starts n replies of one plan; `selects`: whether their turns become the head."""
        with self._ready(wait) as model:
            planned = plan(model)
            replies: list[Reply] = []
            try:
                for i in range(n):
                    seeded = planned.with_seed(i)
                    generation = self._generation(model, seeded, timeout)
                    draft = seeded.draft(generation.params)
                    reply = Reply(
                        generation, draft, self._lock, self._ended, self._queue.forgotten.append, selects=selects
                    )
                    replies.append(reply)
                    self._queue.running.add(reply)
                    if self._persistence is not None:
                        self._persistence.watch(reply, self)
            except BaseException:
                for reply in replies:
                    reply.cancel()
                raise
            return replies

    def _generation(self, model: LoadedModel, plan: Plan, timeout: float | None = None) -> Generation:
        """Starts a generation that reuses as much KV as the plan's source has."""
        engine = model.engine
        sequence = plan.source.fork_kv(plan.n_reusable, engine.cache)
        if sequence is None:
            sequence = engine.runner.sequence(self.policy.visible(engine.runner.context))
        return Generation(
            engine,
            plan.prompt.ids,
            plan.params,
            continues=not plan.chat,
            begun=plan.begun,
            sequence=sequence,
            salt=self.tenant,
            timeout=timeout,
        )

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
        try:
            if self._persistence is not None:
                self._persistence.save_turn(turn, self)
        except BaseException:
            if turn.kv is not None:
                turn.kv.close()
            raise
        if turn.kv is not None:
            self._handle.engine.cache.keep(turn.kv)
        self._tree.add(turn, selects=True)
        return turn

    def _find(self, ref: TurnRef | None) -> Turn:
        """A turn of this tree; None: the head."""
        self._check_exists()
        return self._tree.find(self.head if ref is None else ref)

    def _exchange(self, ref: TurnRef | None = None) -> Turn:
        """As `_find`, but not the empty start."""
        found = self._find(ref)
        if found.parent is None:
            raise InvalidArgument("nothing was said yet: turn 0 is the empty start")
        return found

    def _save_head(self) -> None:
        if self._persistence is not None:
            self._persistence.save_head(self)

    def _set_tags(self, turn: Turn, tags: set[str]) -> None:
        if self._persistence is not None:
            self._persistence.save_tags(turn, tags)
        turn.tags = tags

    def _check_exists(self) -> None:
        if self._deleted:
            raise SessionNotFound(f"session {self.id} was deleted")

    def _check_vocabulary(self, model: LoadedModel) -> None:
        """Raises InvalidArgument if the session's token ids belong to another tokenizer than the model's."""
        theirs = model.fingerprint().tokenizer
        if self.vocabulary and theirs and self.vocabulary != theirs:
            raise InvalidArgument(
                f"session {self.id} was written with another tokenizer than that of {self._handle.name}: its token ids "
                f"mean something else there; export its text, or load the model it was made with"
            )
        self.vocabulary = self.vocabulary or theirs


def _with_max(params: SamplingParams, n_tokens: int | None) -> SamplingParams:
    return params if n_tokens is None else replace(params, max_tokens=n_tokens)
