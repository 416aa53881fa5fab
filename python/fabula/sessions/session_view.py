"""`SessionView`: what can be read of a session, and the state that it is read from.

Nothing here changes the tree, the settings or the store; `Session` does, in `session.py`. What a property shows beyond
plain state is computed by the pure functions of `views.py`.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fabula.engine.defaults import SamplingDefaults
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument, SessionNotFound
from fabula.sessions import planning, texts, views
from fabula.sessions.model_handle import LoadedModel, ModelHandle
from fabula.sessions.names import is_session_id
from fabula.sessions.policy import ContextPolicy
from fabula.sessions.prompts import messages_of, parses_special
from fabula.sessions.reply import start_generation
from fabula.sessions.reply_queue import ReplyQueue
from fabula.sessions.settings import Settings
from fabula.sessions.tree_html import tree_html
from fabula.sessions.turn import START, Turn
from fabula.sessions.turn_tree import TurnRef, TurnTree
from fabula.sessions.user_input import Messages, UserInput
from fabula.sessions.views import Alternative, Count, Node


class SessionView:
    """The read side of a session: its settings, tree and tokens, and what a next turn would cost.

    A turn is given by its number on the path to the head (-1 is one before the head), by its id or one of its tags, or
    as a `Turn`. Methods may be called from any thread, also while a reply is running.

    Args:
        handle: the model.
        settings: see `Settings`.
        id: 1 .. 128 of A-Z a-z 0-9 . _ -; None makes a random one.
        tenant: its owner.
        base: the turn it is forked from; None for an empty start.
        created_at: seconds since 1970; None for now.
        vocabulary: fingerprint of the tokenizer that its token ids belong to; None for the model's.

    Raises:
        InvalidArgument: the id is malformed, or the policy does not fit the model's context.
    """

    def __init__(
        self,
        handle: ModelHandle,
        settings: Settings,
        *,
        id: str | None,
        tenant: str,
        base: Turn | None,
        created_at: float | None,
        vocabulary: str | None,
    ) -> None:
        if id is not None and not is_session_id(id):
            raise InvalidArgument(f"session id {id!r} must be 1 .. 128 of A-Z a-z 0-9 . _ -")
        self.id = uuid.uuid4().hex if id is None else id
        self.tenant = tenant
        self.created_at = time.time() if created_at is None else created_at
        self.vocabulary = handle.vocabulary if vocabulary is None else vocabulary
        self._handle, self._settings = handle, settings
        if handle.is_loaded:
            self.policy.visible_in(handle.engine.runner)
        self._tree = TurnTree(START if base is None else base)
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

    def same_params(self, turn: TurnRef | None = None) -> SamplingParams:
        """Default parameters of an answer that repeats or continues a turn's (None: the head's): the turn's own, with
        its seed."""
        with self._lock:
            return planning.same_params(self._settings, self._find(turn))

    def again_params(self, turn: TurnRef | None = None) -> SamplingParams:
        """Default parameters of an answer that replaces a turn's (None: the head's): the turn's own with a new seed, as
        the old seed would give the same answer."""
        with self._lock:
            return planning.again_params(self._settings, self._find(turn))

    def branch_params(self, *, again: bool) -> SamplingParams:
        """Default parameters of branches: the session's. Where the head's message is answered `again`, with the head's
        constraint and new seeds: the old seed would give the head's answer."""
        with self._lock:
            return planning.branch_params(self._settings, self.head, again=again)

    # ---- The tree ---------------------------------------------------------------------------------------------------

    @property
    def head(self) -> Turn:
        """The current turn: the next one follows it."""
        return self._tree.head

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

    def to_markdown(self) -> str:
        """The path as a document: the title, and each message under its role's name, or a story's text."""
        return texts.markdown(self.title, self.messages, self.path)

    def to_text(self) -> str:
        """The path as plain text; a story as it reads."""
        return texts.plain(self.title, self.messages, self.path)

    def _repr_html_(self) -> str:
        """The tree, as notebooks show a session: its head, the path to it, and the other branches."""
        with self._lock:
            turns, head, is_busy = self.turns, self.head, self.is_busy
        return tree_html(self.title or self.id, self.model, turns, head, is_busy=is_busy)

    @property
    def can_redo(self) -> bool:
        """Whether `redo` has a rollback to undo."""
        return self._tree.can_redo

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
        """The whole tree as JSON data, for display.

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

    # ---- Tokens -----------------------------------------------------------------------------------------------------

    def tokens(self, turn: TurnRef) -> list[tuple[int, str]]:
        """The tokens of an answer, each with its text: "" where a character needs the next token too.

        Raises:
            InvalidArgument: no such turn.
        """
        with self._lock:
            found = self._exchange(turn)
        return views.tokens_of(found, self._handle.engine.tokenizer)

    def alternatives(self, turn: TurnRef, position: int, n: int = 10) -> list[Alternative]:
        """The likeliest tokens at a position of an answer, best first; cached KV of the prompt is not recomputed.

        Args:
            turn: turn of the answer.
            position: in the answer, from 0; its length for what could come next.
            n: 1 .. 20.

        Raises:
            InvalidArgument: no such turn or position.
        """
        with self._lock:
            found = self._exchange(turn)
            planning.check_answered(found)
            planning.check_position(found, position)
            params = SamplingParams(temperature=0.0, max_tokens=1, n_logprobs=n)
            model = self._handle.loaded
            plan = planning.continuation(found, found.token_ids[:position], params)
            generation = start_generation(model, plan, self.policy, self.tenant)
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
        at: TurnRef | None = None,
    ) -> Count:
        """What a next turn would cost, after the head as it is now, also while a reply is running.

        Loads the model if it is not loaded; starts nothing, and waits for no reply.

        Args:
            said: as `say` takes it; for a story, text to append. None for what the session holds up to the head.
            params: sampling parameters; they matter where the oldest turns are dropped to make room for `max_tokens`.
            chat: False for a story.
            template_options: as `say`.
            parse_special: as `say` or `tell`.
            at: another turn that it would follow.

        Raises:
            InvalidArgument: there is no such turn, or `say` would refuse it, whatever its length.
            TemplateError: as `say`.
            SessionNotFound: the session was deleted.
        """
        self._check_exists()
        parent, model = self._find(at), self._handle.loaded
        self._check_vocabulary(model)
        new = None
        if said is not None:
            special = bool(parse_special) if chat else parses_special(parse_special, parent)
            new = UserInput.of(said, template_options, parse_special=special)
        return views.count(model, self._settings, parent, new, params, chat=chat)

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _find(self, ref: TurnRef | None) -> Turn:
        """A turn of this tree; None: the head."""
        self._check_exists()
        return self._tree.find(self.head if ref is None else ref)

    @property
    def _is_started(self) -> bool:
        """Whether there is a turn, or a reply that may become one."""
        return bool(self.head.number or self._tree.n_own or self._queue.running)

    def _exchange(self, ref: TurnRef | None = None) -> Turn:
        """As `_find`, but not the empty start."""
        found = self._find(ref)
        if found.parent is None:
            raise InvalidArgument("turn 0 is the empty start: it has no prompt and no answer")
        return found

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
