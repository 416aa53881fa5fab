"""How a session's tree grows: planning a turn, waiting for one's turn, making the reply, taking the turn in."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from weakref import WeakSet

from fabula.engine.defaults import SamplingDefaults
from fabula.engine.generation import Generation
from fabula.engine.sampling import SamplingParams
from fabula.errors import InvalidArgument, SessionBusy, SessionNotFound
from fabula.kv.cache import KvEvictionList
from fabula.kv.pages import Sequence as KvSequence
from fabula.sessions.host import Host
from fabula.sessions.keeper import Keeper
from fabula.sessions.names import checked_tags, checked_title, is_session_id
from fabula.sessions.policy import ContextPolicy, Cut
from fabula.sessions.prompts import Prompt, chat_prompt, common_length, story_prompt
from fabula.sessions.reply import Reply
from fabula.sessions.said import Said
from fabula.sessions.tree import Tree, TurnRef
from fabula.sessions.turn import WRITTEN, Turn

_POLL_S = 0.05  # how often a caller that waits looks for replies that were forgotten


def check_not_mixed(parent: Turn, *, chat: bool) -> None:
    """Raises InvalidArgument where a chat would go on as a story, or the reverse."""
    if parent.number and parent.chat is not chat:
        kind, verb = ("is a chat", "tell()") if parent.chat else ("tells a story", "say()")
        raise InvalidArgument(f"this session {kind}; {verb} needs a session of its own")


@dataclass(frozen=True, slots=True)
class Plan:
    """A turn to be made.

    Attributes:
        parent: it goes behind.
        said: by the user.
        chat: through the template or not.
        prompt: ids it goes on from.
        params: sampling settings.
        source: turn whose K and V hold most of them.
        begun: ids the answer begins with.
    """

    parent: Turn
    said: Said
    chat: bool
    prompt: Prompt
    params: SamplingParams
    source: Turn
    begun: list[int]


class Growing(Tree):
    """A tree that grows by answers of a model; what `Session` is built on.

    Args:
        host: the model.
        id: its name, 1 .. 128 of A-Z a-z 0-9 . _ -; None makes a random one.
        tenant: its owner.
        system: system message of a chat.
        params: sampling settings of turns that bring none.
        policy: what happens when the context is full.
        base: the turn it was forked from; None for an empty start.
        keeper: where it is kept; None for in memory only.
        created_at: seconds since 1970; None for now.
        vocabulary: fingerprint of the tokenizer its ids are of; None for the host's.
        title: what people call it, one line.
        tags: names that it has in common with others.
    """

    def __init__(
        self,
        host: Host,
        *,
        id: str | None = None,
        tenant: str = "",
        system: str | None = None,
        params: SamplingParams | None = None,
        policy: ContextPolicy | str | None = None,
        base: Turn | None = None,
        keeper: Keeper | None = None,
        created_at: float | None = None,
        vocabulary: str | None = None,
        title: str = "",
        tags: Iterable[str] = (),
    ) -> None:
        super().__init__(base)
        if id is not None and not is_session_id(id):
            raise InvalidArgument(f"session id {id!r} must be 1 .. 128 of A-Z a-z 0-9 . _ -")
        self.id = uuid.uuid4().hex if id is None else id
        self.tenant = tenant
        self.params = params or SamplingParams()
        self.system, self.title, self.tags = system, checked_title(title), checked_tags(tags)
        self.policy = ContextPolicy.of(policy)
        if host.is_loaded:
            self.policy.visible(host.engine.runner.context)
        self.created_at = time.time() if created_at is None else created_at
        self.vocabulary = host.vocabulary if vocabulary is None else vocabulary
        self._host, self._keeper = host, keeper
        self._deleted = False
        self._running: WeakSet[Reply] = WeakSet()
        self._free = threading.Condition(self._lock)
        self._line: deque[object] = deque()  # callers that wait, in their order
        self._left: deque[Reply] = deque()  # replies that were forgotten; filled by destructors

    @property
    def model(self) -> str:
        """Name of the model it talks to."""
        return self._host.name

    @property
    def sampling_defaults(self) -> SamplingDefaults | None:
        """What the model recommends for settings that neither a turn nor the session gives; None while it is not
        loaded."""
        return self._host.served.defaults if self._host.is_loaded else None

    # ---- Planning a turn --------------------------------------------------------------------------------------------

    def _next(self, parent: Turn, said: Said, params: SamplingParams | None, *, chat: bool) -> Plan:
        """A turn behind `parent`.

        Raises:
            ContextOverflow: it does not fit, whatever may be left out.
        """
        chosen, runner = params or self.params, self._host.engine.runner
        prompt = self._prompt(parent, said, chosen, chat=chat)
        runner.check_room(len(prompt.ids), self.policy.visible(runner.context))
        return Plan(parent, said, chat, prompt, chosen, parent, [])

    def _prompt(self, parent: Turn, said: Said, params: SamplingParams, *, chat: bool) -> Prompt:
        """What an answer behind `parent` goes on from; changes nothing."""
        check_not_mixed(parent, chat=chat)
        served = self._host.served
        if chat:
            return chat_prompt(served.engine, served.template(), self.policy, params, parent, self.system, said)
        if said.given is not None or said.options:
            raise InvalidArgument("a story goes on with text; messages and template_options are for a chat")
        return story_prompt(served.engine, self.policy, params, parent, said)

    def _again(self, turn: Turn, said: Said, params: SamplingParams) -> Plan:
        """A sibling of a turn."""
        assert turn.parent is not None
        return self._next(turn.parent, said, params, chat=turn.chat)

    def _from_inside(self, turn: Turn, begun: list[int], params: SamplingParams) -> Plan:
        """A sibling of a turn that has its prompt and begins with `begun`."""
        assert turn.parent is not None
        ids = turn.ids()[: turn.n_ids - len(turn.token_ids)]
        prompt = Prompt(ids, turn.kept, turn.cut)
        return Plan(turn.parent, turn.said, turn.chat, prompt, params, turn, begun)

    def _check_place(self, turn: Turn, position: int) -> None:
        if type(position) is not int or not 0 <= position <= len(turn.token_ids):
            raise InvalidArgument(f"position is {position!r}, must be 0 .. {len(turn.token_ids)}")

    def _params(self, turn: Turn) -> SamplingParams:
        return turn.params or self.params

    def again_params(self, turn: TurnRef | None = None) -> SamplingParams:
        """What an answer made in place of a turn's (None: the head's) takes where nothing is given: the turn's settings
        and a new seed, or it would be the same answer again."""
        with self._lock:
            return replace(self._params(self._find(self.head if turn is None else turn)), seed=None)

    def same_params(self, turn: TurnRef | None = None) -> SamplingParams:
        """What goes on inside a turn's answer, or repeats it, takes where nothing is given: the turn's settings, its
        seed too."""
        with self._lock:
            return self._params(self._find(self.head if turn is None else turn))

    def branch_params(self, *, again: bool) -> SamplingParams:
        """What branches take where nothing is given: the session's settings. Where the head's message is answered
        `again`, with the head's constraint and new seeds, or the first would be the head's answer."""
        with self._lock:
            head = self.head
            if not (again and head.number and head.chat):
                return self.params
            return replace(self.params, constraint=self._params(head).constraint, seed=None)

    # ---- Making it --------------------------------------------------------------------------------------------------

    def _go(
        self,
        plan: Callable[[], Plan],
        wait: bool | float,
        timeout: float | None = None,
        *,
        n: int = 1,
        selects: bool = True,
    ) -> list[Reply]:
        """Begins n replies as planned, once it is this caller's turn; whether theirs become the head."""
        _ = self._host.served  # loaded before the lock is taken: whoever unloads it may wait for the lock
        with self._lock:
            self._await_turn(wait)
            self._check_vocabulary()
            planned = plan()
            seed = planned.params.seed
            replies = []
            try:
                for i in range(n):
                    params = planned.params if seed is None else replace(planned.params, seed=(seed + i) % 2**64)
                    replies.append(self._start(planned, params, timeout, selects=selects))
            except BaseException:
                for reply in replies:
                    reply.cancel()
                raise
            return replies

    @contextmanager
    def quiet(self, wait: bool | float = False) -> Iterator[None]:
        """Holds the session still: no reply is being made, and none begins.

        Raises:
            SessionBusy: one is, and takes longer than the caller would wait.
        """
        with self._lock:
            self._await_turn(wait)
            yield

    def _check_vocabulary(self) -> None:
        """Raises InvalidArgument if the model's tokenizer is not the one this session's ids are of."""
        there = self._host.served.fingerprint().tokenizer
        if self.vocabulary and there and self.vocabulary != there:
            raise InvalidArgument(
                f"session {self.id} was written with another tokenizer than that of {self._host.name}: its token ids "
                f"mean something else there; export its text, or load the model it was made with"
            )
        self.vocabulary = self.vocabulary or there

    def _await_turn(self, wait: bool | float) -> None:
        """Returns when no reply is being made and nobody came earlier; the lock is held by the caller.

        Raises:
            SessionBusy: it takes longer than the caller would wait.
            SessionNotFound: the session was deleted, perhaps meanwhile.
        """
        end = None if wait is True else time.monotonic() + float(wait)
        ticket = object()
        self._line.append(ticket)
        try:
            while True:
                self._collect()
                self._check_there()
                if self._line[0] is ticket and not self._running:
                    return
                left = _POLL_S if end is None else min(_POLL_S, end - time.monotonic())
                if left <= 0:
                    raise SessionBusy(f"session {self.id} is making another reply; stop() ends it, wait=True waits")
                self._free.wait(left)
        finally:
            self._line.remove(ticket)
            self._free.notify_all()

    def _start(self, plan: Plan, params: SamplingParams, timeout: float | None, *, selects: bool) -> Reply:
        """Begins a reply behind as much of what is known already as its prompt begins with."""
        engine, ids = self._host.engine, plan.prompt.ids
        known = plan.source.ids()
        reach = min(common_length(known, [*ids, *plan.begun]), len(ids) + len(plan.begun) - 1)
        sequence = plan.source.fork_kv(reach, engine.cache)
        generation = self._generation(ids, params, plan.chat, plan.begun, sequence, timeout)
        draft = Turn(
            parent=plan.parent,
            number=plan.parent.number + 1,
            chat=plan.chat,
            said=plan.said,
            kept=plan.prompt.kept,
            prompt_ids=tuple(ids[plan.prompt.kept :]),
            n_begun=len(plan.begun),
            params=generation.params,
            cut=plan.prompt.cut,
        )
        reply = Reply(generation, draft, self._settle, self._left.append, selects=selects)
        self._running.add(reply)
        if self._keeper is not None:
            self._keeper.begun(reply, draft, self)
        return reply

    def _generation(
        self,
        ids: list[int],
        params: SamplingParams,
        chat: bool,
        begun: Sequence[int],
        sequence: KvSequence | None,
        timeout: float | None = None,
    ) -> Generation:
        engine = self._host.engine
        if sequence is None:
            sequence = engine.runner.sequence(self.policy.visible(engine.runner.context))
        return Generation(
            engine,
            ids,
            params,
            continues=not chat,
            begun=begun,
            sequence=sequence,
            salt=self.tenant,
            timeout=timeout,
        )

    def _settle(self, reply: Reply, turn: Turn | None) -> None:
        """A reply has ended: its turn is in the tree, and the head if nobody is to choose between several.

        Raises:
            StoreError: the turn could not be kept; the session is as it was before.
        """
        with self._lock:
            if reply.is_done:
                return
            taken: Turn | None = None
            try:
                if turn is not None:
                    self._complete(turn, reply.generation)
                if self._keeper is not None:
                    self._keeper.ended(reply, turn, self)
                taken = turn
            finally:
                reply.close(taken)
                self._running.discard(reply)
                if taken is not None:
                    self._take_in(taken, reply)
                self._free.notify_all()

    def _take_in(self, turn: Turn, reply: Reply) -> None:
        self._tree.add(turn, selects=reply.selects)
        if turn.kv is not None:
            reply.generation.engine.cache.keep(turn.kv)
            self._lend(turn, turn.kv, reply.generation.engine.cache)

    def _lend(self, turn: Turn, kv: KvSequence, cache: KvEvictionList) -> None:
        """Turns before it that were written by hand hold K and V too, now that their words were read."""
        kept = turn.kept
        with cache.lock:  # or they are given up between looking and taking
            for past in islice(turn.lineage(), 1, None):
                if past.finish_reason != WRITTEN or kept < past.n_ids or kv.usable(past.n_ids) < past.n_ids:
                    break
                if past.kv is None or past.kv.usable(past.n_ids) < past.n_ids:
                    past.kv = kv.fork(past.n_ids)
                    cache.keep(past.kv)
                kept = min(kept, past.kept)

    def _complete(self, turn: Turn, generation: Generation) -> None:
        """Fills in what is known at the end."""
        turn.kv = generation.sequence
        window = turn.kv.window
        hidden = window.first_visible(turn.n_ids - 1) - window.n_sinks
        if hidden > 0:
            turn.cut = Cut("slide", hidden)
        if turn.recomputed and turn.parent is not None and turn.kept == turn.parent.n_ids:
            cold = self._host.served.why_cold if self._host.is_loaded else ""
            turn.why_recomputed = cold or "K and V of the past were given up for others, or not kept"
        elif turn.recomputed:
            anew, shorter = "the prompt words the past anew", "the oldest turns were left out"
            turn.why_recomputed = anew if turn.cut is None else shorter

    def _collect(self) -> None:
        """Takes in replies that were forgotten before their end."""
        with self._lock:
            while self._left:
                self._left.popleft().cancel()

    def _check_there(self) -> None:
        if self._deleted:
            raise SessionNotFound(f"session {self.id} was deleted")

    def _head_moved(self) -> None:
        if self._keeper is not None:
            self._keeper.head_moved(self)

    def _set_tags(self, turn: Turn, tags: set[str]) -> None:
        if self._keeper is not None:
            self._keeper.tagged(turn, tags)
        super()._set_tags(turn, tags)

    def _drop(self, turns: list[Turn]) -> int:
        if self._keeper is not None and turns:
            self._keeper.dropped(self, turns)
        return super()._drop(turns)
