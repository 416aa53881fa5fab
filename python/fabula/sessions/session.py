"""A session: a tree of turns with a head. Going back moves the head; nothing is deleted unless asked.

Turns are shared between a session and its forks: each session lists the turns it made, and reaches older ones by their
parents. K and V of a turn are given back when the last session that lists it, or a turn behind it, is gone.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fabula.engine.generation import Generation, Piece, Timings
from fabula.engine.sampling import SamplingParams
from fabula.errors import EngineError, InvalidArgument, SessionBusy
from fabula.sessions.host import Host
from fabula.sessions.turn import Turn
from fabula.text.continuation import encode_next


class Reply(Iterator[Piece]):
    """An answer in the making: pieces as they come; the turn is in the tree when the last one was given out.

    `cancel()`, leaving a `with` block or forgetting the reply ends it early; what was said so far stays, as a partial
    turn.

    Attributes:
        turn: the finished turn; None while pieces may come, and when an error ended the reply: then the session is as
            it was before.
    """

    def __init__(self, session: Session, generation: Generation, draft: Turn) -> None:
        self.turn: Turn | None = None
        self._done = False
        self._session, self._generation, self._draft = session, generation, draft
        self._texts: list[str] = []

    def __next__(self) -> Piece:
        if self._done:
            raise StopIteration
        try:
            piece = next(self._generation)
        except EngineError:
            self._done = True
            self._session._settle(None)
            raise
        except BaseException:
            self.cancel()
            raise
        self._texts.append(piece.text)
        if piece.finish_reason:
            self._finish()
        return piece

    def text(self) -> str:
        """Runs to the end and returns the whole text."""
        for _ in self:
            pass
        return "".join(self._texts)

    def cancel(self) -> None:
        """Ends the reply; may be called at any time, and twice. A reply without any token leaves no turn."""
        if not self._done:
            self._generation.cancel()
            self._finish()

    @property
    def timings(self) -> Timings:
        return self._generation.timings

    def _finish(self) -> None:
        self._done = True
        g, draft = self._generation, self._draft
        draft.text = "".join(self._texts)
        draft.token_ids = tuple(g.token_ids)
        draft.finish_reason = g.finish_reason
        draft.timings = g.timings
        draft.kv = g.sequence
        self.turn = draft if g.token_ids else None
        self._session._settle(self.turn)

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


class Session:
    """A conversation, or a story, that can be walked.

    Made by `Model.session`. `say` answers messages through the chat template, `tell` continues a text; a session does
    the one or the other. One reply is made at a time.

    Attributes:
        id: its name.
        head: the turn that the next one follows.
        params: sampling settings of turns that bring none.
    """

    def __init__(
        self,
        host: Host,
        *,
        id: str | None = None,
        system: str | None = None,
        params: SamplingParams | None = None,
        base: Turn | None = None,
    ) -> None:
        self.id = uuid.uuid4().hex if id is None else id
        self.params = params or SamplingParams()
        self._host = host
        self._system = system
        self._root = base if base is not None else Turn(parent=None, number=0)
        self._root.forks.add(self)
        self.head = self._root
        self._turns: list[Turn] = []  # made here, oldest first
        self._undone: list[Turn] = []  # heads that rollback left, for redo
        self._running: weakref.ref[Reply] | None = None
        self._lock = threading.RLock()

    # ---- Going on ---------------------------------------------------------------------------------------------------

    def say(self, text: str, params: SamplingParams | None = None) -> Reply:
        """Answers a message.

        Args:
            text: the user's message.
            params: sampling settings of this turn; None takes the session's.

        Returns:
            A stream of pieces; the turn stands in the tree behind the last one.

        Raises:
            SessionBusy: another reply is being made.
            ContextOverflow: the conversation does not fit; carries both numbers, and nothing has changed.
            InvalidArgument: the session tells a story.
            TemplateError: the model has no chat template, or it refuses.
        """
        return self._say(self.head, text, params)

    def tell(
        self, n_tokens: int | None = None, *, prompt: str | None = None, params: SamplingParams | None = None
    ) -> Reply:
        """Continues the story.

        Args:
            n_tokens: tokens at most; None leaves it to `params`.
            prompt: text to add before going on; the beginning needs some.
            params: sampling settings of this turn; None takes the session's.

        Raises:
            SessionBusy, ContextOverflow: as `say`.
            InvalidArgument: the session is a chat, or there is no text to continue.
        """
        return self._tell(self.head, prompt or "", self._limited(params, n_tokens))

    def regenerate(self, params: SamplingParams | None = None) -> Reply:
        """Answers the head's prompt again, as a sibling of the head: with `params`, or the settings of before and a new
        seed."""
        turn = self._made(self.head)
        return self._again(turn, turn.prompt, params or replace(self._params(turn), seed=None))

    def edit(self, turn: int | Turn, text: str, params: SamplingParams | None = None) -> Reply:
        """Says something else in place of a turn's prompt, as its sibling."""
        found = self._made(self._find(turn))
        return self._again(found, text, params or replace(self._params(found), seed=None))

    def replay(self, turn: int | Turn, params: SamplingParams | None = None) -> Reply:
        """Does a turn again from its parent: the same tokens with the same settings, or others with `params`."""
        found = self._made(self._find(turn))
        return self._again(found, found.prompt, params or self._params(found))

    def _again(self, turn: Turn, prompt: str, params: SamplingParams) -> Reply:
        assert turn.parent is not None
        make = self._say if turn.chat else self._tell
        return make(turn.parent, prompt, params)

    # ---- Walking ----------------------------------------------------------------------------------------------------

    def rollback(self, turn: int | Turn = 1, *, prune: bool = False) -> Turn:
        """Makes an earlier turn the head. A reply being made is stopped first and stays as a partial turn.

        Args:
            turn: a turn of this tree, or the number of one on the path to the head; 0 is the empty start.
            prune: also delete the turns behind it, with their K and V.

        Returns:
            The new head. Nothing is computed; the time does not depend on the length.

        Raises:
            InvalidArgument: no such turn.
        """
        with self._lock:
            target = self._find(turn)
            self.stop()
            if target is not self.head:
                self._undone.append(self.head)
            self.head = target
            if prune:
                self._drop([t for t in self._turns if t is not target and target in t.lineage()])
            return target

    def stop(self) -> None:
        """Stops the reply that is being made, if there is one; what was said so far stays as a partial turn."""
        with self._lock:
            reply = self._running() if self._running else None
            if reply is not None:
                reply.cancel()

    def redo(self) -> Turn:
        """Takes the last rollback back.

        Raises:
            InvalidArgument: there was none, or a turn was made since.
        """
        with self._lock:
            if not self._undone:
                raise InvalidArgument("there is nothing to redo: no rollback since the last turn")
            self.head = self._undone.pop()
            return self.head

    @contextmanager
    def at(self, turn: int | Turn) -> Iterator[Session]:
        """Makes a turn the head for a `with` block."""
        with self._lock:
            before, undone = self.head, list(self._undone)
            self.rollback(turn)
        try:
            yield self
        finally:
            with self._lock:
                self.rollback(before)
                self._undone = undone

    def fork(self, turn: int | Turn | None = None, *, id: str | None = None) -> Session:
        """A new session that shares this one's past up to a turn (None: the head) and goes on alone."""
        with self._lock:
            base = self.head if turn is None else self._find(turn)
            return Session(self._host, id=id, system=self._system, params=self.params, base=base)

    def tag(self, turn: int | Turn, name: str) -> None:
        """Gives a turn a name."""
        if not name:
            raise InvalidArgument("the tag is empty")
        self._find(turn).tags.add(name)

    def delete(self) -> int:
        """Forgets every turn made here, but for what forks go on from, and returns the bytes of K and V set free."""
        with self._lock:
            self.stop()
            pool = self._host.engine.runner.pool
            before = pool.n_free
            self._root.forks.discard(self)
            self._drop(self._turns)
            self._root = self.head = Turn(parent=None, number=0)
            self._root.forks.add(self)
            return (pool.n_free - before) * pool.page_bytes

    def _drop(self, turns: list[Turn]) -> None:
        """Takes turns out of the tree and gives back their K and V, but for those that live on in a fork."""
        needed = {past for turn in turns if turn.forks for past in turn.lineage()}
        for turn in turns:
            if turn not in needed and turn.kv is not None:
                turn.kv.close()
        gone = set(turns)
        self._turns = [turn for turn in self._turns if turn not in gone]
        self._undone = []

    # ---- Looking ----------------------------------------------------------------------------------------------------

    @property
    def turns(self) -> list[Turn]:
        """Every turn of the tree: the past that was forked from, then those made here, oldest first."""
        past = [turn for turn in self._root.lineage() if turn.number > 0]
        return [*reversed(past), *self._turns]

    @property
    def path(self) -> list[Turn]:
        """The turns from the first to the head."""
        return [turn for turn in self.head.lineage() if turn.number > 0][::-1]

    def children(self, turn: Turn) -> list[Turn]:
        """The turns that follow a turn, oldest first."""
        return [child for child in self.turns if child.parent is turn]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation on the path, as `Model.chat` takes it."""
        return self._messages(self.head)

    def diff(self, a: int | Turn, b: int | Turn) -> tuple[list[Turn], list[Turn]]:
        """The turns that only lead to `a`, and those that only lead to `b`, in order."""
        first, second = self._find(a), self._find(b)
        in_first, in_second = set(first.lineage()), set(second.lineage())
        return (
            [turn for turn in first.lineage() if turn not in in_second][::-1],
            [turn for turn in second.lineage() if turn not in in_first][::-1],
        )

    # ---- Inside -----------------------------------------------------------------------------------------------------

    def _say(self, parent: Turn, text: str, params: SamplingParams | None) -> Reply:
        if parent.number and not parent.chat:
            raise InvalidArgument("this session tells a story; say() needs a session of its own")
        messages = [*self._messages(parent), {"role": "user", "content": text}]
        with self._lock:
            self._check_free()
            past = parent.ids()
            ids = encode_next(self._host.engine.tokenizer, self._host.template(), messages, past)
            return self._start(parent, past, text, ids, params or self.params, continues=False)

    def _tell(self, parent: Turn, text: str, params: SamplingParams | None) -> Reply:
        if parent.number and parent.chat:
            raise InvalidArgument("this session is a chat; tell() needs a session of its own")
        tokenizer = self._host.engine.tokenizer
        with self._lock:
            self._check_free()
            past = parent.ids()
            ended = bool(past) and past[-1] in tokenizer.eos_ids
            story = past[:-1] if ended else past  # it goes on behind its end
            new = tokenizer.encode(text, add_bos=None if not parent.number else False) if text or not story else []
            if not story and not new:
                raise InvalidArgument("there is no text to continue: give a prompt")
            return self._start(parent, past, text, story + new, params or self.params, continues=True)

    def _start(
        self, parent: Turn, past: list[int], prompt: str, ids: list[int], params: SamplingParams, *, continues: bool
    ) -> Reply:
        """Begins a reply to `ids`, behind as much of the parent's ids `past` as they begin with."""
        kept = next((i for i, (a, b) in enumerate(zip(past, ids, strict=False)) if a != b), min(len(past), len(ids)))
        engine = self._host.engine
        sequence = parent.fork_kv(min(kept, len(ids) - 1), engine.cache) or engine.runner.sequence()
        generation = Generation(engine, ids, params, continues=continues, sequence=sequence)
        draft = Turn(
            parent=parent,
            number=parent.number + 1,
            chat=not continues,
            prompt=prompt,
            kept=kept,
            prompt_ids=tuple(ids[kept:]),
            params=replace(params, seed=generation.seed),
        )
        reply = Reply(self, generation, draft)
        self._running = weakref.ref(reply)
        return reply

    def _settle(self, turn: Turn | None) -> None:
        """A reply has ended: its turn becomes the head."""
        with self._lock:
            self._running = None
            if turn is not None:
                if turn.kv is not None:
                    self._host.engine.cache.keep(turn.kv)
                self._turns.append(turn)
                self.head, self._undone = turn, []

    def _check_free(self) -> None:
        if self._running is not None and self._running() is not None:
            raise SessionBusy(f"session {self.id} is making another reply; stop() ends it")

    def _limited(self, params: SamplingParams | None, n_tokens: int | None) -> SamplingParams:
        chosen = params or self.params
        return chosen if n_tokens is None else replace(chosen, max_tokens=n_tokens)

    def _params(self, turn: Turn) -> SamplingParams:
        return turn.params or self.params

    def _find(self, turn: int | Turn) -> Turn:
        """A turn of this tree: itself, or by its number on the path."""
        if isinstance(turn, Turn):
            if any(turn is known for known in (*self._root.lineage(), *self._turns)):
                return turn
            raise InvalidArgument(f"{turn!r} is no turn of session {self.id}")
        for known in self.head.lineage():
            if known.number == turn:
                return known
        raise InvalidArgument(f"there is no turn {turn} on the path, which has 0 .. {self.head.number}")

    def _made(self, turn: Turn) -> Turn:
        """The turn, if it holds words; the empty start has none to make again."""
        if turn.parent is None:
            raise InvalidArgument("nothing was said yet: turn 0 is the empty start")
        return turn

    def _messages(self, turn: Turn) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for past in [t for t in turn.lineage() if t.number > 0][::-1]:
            messages += [{"role": "user", "content": past.prompt}, {"role": "assistant", "content": past.text}]
        return messages
