"""The law of sessions: whatever was done, in whatever order, every turn is what it would be from scratch.

A machine does what users do, at random, with a workspace whose pages run out all the time. Beside it walk a naive model
of the trees (`Shadow`) and a second model of the same folder that never shares anything, nor speculates (the oracle).
After every step tokens, trees, and the count of every page are compared. FABULA_TEST_LAWS=20 does twenty times as much.
"""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import tiny
from decoder_families import CASES, make_talking_model
from drafting import cheap_rows
from fabula import ContextOverflow, ContextPolicy, InvalidArgument, Model, SamplingParams, Session, Turn, Workspace
from fabula.engine.generation import Generation
from fabula.kv.pages import Sequence
from shadows import ROOT, Leaf, Live, Shadow
from waiting import wait_until

CONTEXT, N_PAGES = 128, 11  # each text has at most 4 pages, and with a window as many
LONGEST = 400  # ids of a text with a window
TEXTS = [
    "the sea",
    "a",
    "why <|im_end|>?",
    "",
    "in the west, the stone is on the hill and there we",
    "é😀 " * 6,
    "stone " * 8,
]
POLICIES = [ContextPolicy(), ContextPolicy("slide", window=50), ContextPolicy("drop_oldest_turns")]
MORE = int(os.environ.get("FABULA_TEST_LAWS", "1"))

every_sequence: weakref.WeakSet[Sequence] = weakref.WeakSet()


@pytest.fixture(autouse=True)
def _watched_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists every sequence, so that the reference count of each page can be checked."""
    begin = Sequence.__init__

    def watched(self: Sequence, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        every_sequence.add(self)

    monkeypatch.setattr(Sequence, "__init__", watched)


@pytest.fixture(autouse=True)
def _drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_rows(monkeypatch, row=0.02)


# ---- The machine ----------------------------------------------------------------------------------------------------


class Laws(RuleBasedStateMachine):
    """Everything that can be done with sessions, at random."""

    folder: Path
    oracle: Model
    options: dict[str, Any]
    place: Path
    policies: list[ContextPolicy]
    context: int
    every: int
    n_days = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).n_days += 1
        self.data = self.place / str(self.n_days)
        self.sessions: dict[str, Session] = {}
        self.shadows: list[Shadow] = []
        self.n = 0
        self.judged: set[str] = set()
        self.open()
        for policy, chat in ((0, True), (1, False), (2, True)):
            self.begin(policy, chat)

    def open(self) -> None:
        self.workspace = Workspace(self.data)
        self.load()

    def load(self) -> None:
        self.model = self.workspace.load(self.folder, name="tiny", **self.options)
        if self.pool.states is not None:
            self.pool.states.every = self.every

    @property
    def pool(self) -> Any:
        return self.model._runner.pool

    # ---- Helpers ----------------------------------------------------------------------------------------------------

    def pick(self, i: int) -> tuple[Session, Shadow]:
        shadow = self.shadows[i % len(self.shadows)]
        if shadow.id not in self.sessions:
            self.sessions[shadow.id] = self.workspace.open(shadow.id)
        return self.sessions[shadow.id], shadow

    def params(self, n: int, hot: bool) -> SamplingParams:
        self.n += 1
        return SamplingParams(temperature=1.0 if hot else 0.0, seed=self.n, max_tokens=n, ignore_eos=self.n % 3 == 0)

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Deleted turns release their pages at once, even if they are still referenced."""
        before = {turn for session in self.sessions.values() for turn in session.turns}
        yield
        for turn in before - {turn for session in self.sessions.values() for turn in session.turns}:
            assert turn.kv is None or not turn.kv.pages

    def turn(self, session: Session, leaf: Leaf) -> Turn | int:
        return next((turn for turn in session.turns if turn.id == leaf.id), 0)

    def leaf_of(self, turn: Turn, live: Live) -> Leaf:
        return Leaf(turn.id, live.parent, live.prompt, "".join(live.texts), turn.ids(), list(live.ids), None)

    def fits(self, shadow: Shadow) -> bool:
        return len(shadow.head.ids) < (LONGEST if shadow.policy.name == "slide" else 10**9)

    def begin_reply(self, session: Session, shadow: Shadow, text: str, params: SamplingParams) -> Live | None:
        """Calls `say` or `tell`; None if the context is full, which must change nothing."""
        parent = shadow.head
        if not shadow.chat and not text and parent is ROOT:
            text = "the"
        try:
            reply = session.say(text, params) if shadow.chat else session.tell(prompt=text, params=params)
        except ContextOverflow as error:
            assert error.n_tokens > error.context == self.context and shadow.policy.name != "slide"
            return None
        return Live(reply, shadow, parent, text, [reply.begun_text])

    def read(self, live: Live, n: int = 10**6) -> None:
        """Reads n pieces of a reply, or to its end; the shadow takes in what became of it."""
        for _ in range(n):
            piece = next(live.reply, None)
            if piece is None:
                break
            live.texts.append(piece.text)
            if piece.finish_reason:
                self.ended(live, piece.finish_reason)
                break

    def ended(self, live: Live, reason: str, *, selects: bool = True) -> None:
        turn = live.reply.turn
        if turn is None:
            assert len(live.texts) == 1 and reason == "cancelled", "only a reply without a word leaves no turn"
            return
        assert turn.finish_reason == reason
        leaf = self.leaf_of(turn, live)
        leaf.finish_reason = reason
        live.shadow.take_in(leaf, selects)
        self.judge(turn, live.shadow.policy)

    def judge(self, turn: Turn, policy: ContextPolicy) -> None:
        """The answer must be that of a model which knows nothing but the prompt."""
        assert turn.params is not None and turn.id not in self.judged
        self.judged.add(turn.id)
        ids = turn.ids()
        n_drawn = len(turn.token_ids) - turn.n_begun
        self.oracle.clear_cache()
        with Generation(
            self.oracle._engine,
            ids[: turn.n_ids - len(turn.token_ids)],
            turn.params,
            continues=not turn.chat,
            begun=turn.token_ids[: turn.n_begun],
            window=policy.visible(self.context),
        ) as alone:
            drawn = [piece.token_id for _, piece in zip(range(n_drawn), alone, strict=False)]
        assert list(turn.token_ids[turn.n_begun :]) == drawn
        assert turn.finish_reason in ("cancelled", alone.finish_reason)

    def settled(self) -> None:
        """Waits until the engine is idle; replies that are read slowly pause."""
        scheduler = self.model._engine.scheduler
        wait_until(
            lambda: not (scheduler.load.n_waiting or any(not request.paused for request in list(scheduler._running))),
            lambda: f"requests do not come to rest: {scheduler.load}",
        )
        passed = threading.Event()
        if scheduler._thread is not None:
            scheduler._inbox.put(("settled", passed))
            # it may have ended for lack of work meanwhile
            wait_until(lambda: passed.is_set() or scheduler._thread is None, "the scheduler takes nothing in")

    # ---- What is done -----------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.shadows) < 6)
    @rule(policy=st.integers(0, 2), chat=st.booleans())
    def begin(self, policy: int, chat: bool) -> None:
        self.n += 1
        name = f"s{self.n}"
        system = "s" if chat else None
        self.sessions[name] = self.workspace.session(
            name, system=system, context_policy=self.policies[policy % len(self.policies)]
        )
        self.shadows.append(Shadow(name, self.policies[policy % len(self.policies)], chat, ROOT, ROOT))

    @rule(i=st.integers(0, 9), text=st.sampled_from(TEXTS), n=st.integers(1, 14), hot=st.booleans())
    def go_on(self, i: int, text: str, n: int, hot: bool) -> None:
        session, shadow = self.pick(i)
        if self.fits(shadow):
            live = self.begin_reply(session, shadow, text, self.params(n, hot))
            if live is not None:
                self.read(live)

    @rule(i=st.integers(0, 9), n=st.integers(2, 5), text=st.sampled_from(TEXTS))
    def go_on_for_long(self, i: int, n: int, text: str) -> None:
        for _ in range(n):
            self.go_on(i, text, 14, True)

    @rule(i=st.integers(0, 9), n=st.integers(0, 6), length=st.sampled_from([8, 60]), how=st.integers(0, 3))
    def stop_early(self, i: int, n: int, length: int, how: int) -> None:
        session, shadow = self.pick(i)
        if not self.fits(shadow):
            return
        live = self.begin_reply(session, shadow, "stop", replace(self.params(length, True), ignore_eos=True))
        if live is None:
            return
        self.read(live, n)
        if live.reply.is_done:  # the context is full
            return
        if how == 0:
            live.reply.cancel()
        elif how == 1:
            session.stop()
        elif how == 2:
            live.reply._left(live.reply)  # as its destructor does
        else:
            target = shadow.head
            session.rollback(self.turn(session, target))
            self.ended(live, "cancelled")
            shadow.go_to(target, False)
            return
        assert not session.is_busy
        self.ended(live, "cancelled")

    @rule(i=st.integers(0, 9), n=st.integers(0, 30), prune=st.booleans())
    def rollback_along_the_path(self, i: int, n: int, prune: bool) -> None:
        session, shadow = self.pick(i)
        number = n % (shadow.head.number + 1)
        target = next(leaf for leaf in shadow.head.lineage() if leaf.number == number)
        with self.dropping():
            assert session.rollback(number, prune=prune).id == target.id
        shadow.go_to(target, prune)

    @rule(i=st.integers(0, 9), n=st.integers(0, 30), prune=st.booleans())
    def rollback_anywhere(self, i: int, n: int, prune: bool) -> None:
        session, shadow = self.pick(i)
        if shadow.known():
            target = shadow.known()[n % len(shadow.known())]
            with self.dropping():
                session.rollback(self.turn(session, target), prune=prune)
            shadow.go_to(target, prune)

    @rule(i=st.integers(0, 9))
    def redo(self, i: int) -> None:
        session, shadow = self.pick(i)
        if shadow.undone:
            assert session.redo().id == shadow.undone[-1].id
            shadow.head = shadow.undone.pop()
        else:
            with pytest.raises(InvalidArgument, match="nothing to redo"):
                session.redo()

    @rule(i=st.integers(0, 9), k=st.integers(0, 30), text=st.sampled_from(TEXTS[:4]), what=st.integers(0, 2))
    def another_answer(self, i: int, k: int, text: str, what: int) -> None:
        """Regenerates the head, or edits or replays any turn."""
        session, shadow = self.pick(i)
        leaves = [shadow.head] if what == 0 else shadow.known()
        if not leaves or leaves == [ROOT] or not self.fits(shadow):
            return
        leaf = leaves[k % len(leaves)]
        turn = self.turn(session, leaf)
        assert isinstance(turn, Turn)
        if what == 1 and not shadow.chat and leaf.parent is ROOT:
            text = text or "the"
        params = self.params(7, True)
        try:
            if what == 0:
                reply = session.regenerate(params)
            else:
                reply = session.edit(turn, text, params) if what == 1 else session.replay(turn)
        except ContextOverflow:
            return
        live = Live(reply, shadow, leaf.parent or ROOT, text if what == 1 else leaf.prompt, [reply.begun_text])
        self.read(live)
        if what == 2 and leaf.finish_reason != "cancelled" and reply.turn is not None:
            assert list(reply.turn.token_ids) == leaf.answer

    @rule(i=st.integers(0, 9), n=st.integers(1, 9))
    def continue_the_head(self, i: int, n: int) -> None:
        session, shadow = self.pick(i)
        if shadow.head is ROOT or not self.fits(shadow):
            return
        leaf = shadow.head
        try:
            reply = session.continue_(n)
        except ContextOverflow:
            return
        live = Live(reply, shadow, leaf.parent or ROOT, leaf.prompt, [reply.begun_text])
        self.read(live)
        ended = leaf.answer[-1] in self.model.tokenizer.eos_ids
        assert reply.turn is not None and list(reply.turn.token_ids[: reply.turn.n_begun]) == (
            leaf.answer[:-1] if ended else leaf.answer
        )

    @rule(i=st.integers(0, 9), k=st.integers(0, 30), place=st.integers(0, 30), token=st.integers(4, tiny.VOCAB - 1))
    def take_another_token(self, i: int, k: int, place: int, token: int) -> None:
        session, shadow = self.pick(i)
        if not shadow.known() or not self.fits(shadow):
            return
        leaf = shadow.known()[k % len(shadow.known())]
        place %= len(leaf.answer) + 1
        turn = self.turn(session, leaf)
        try:
            likely = session.alternatives(turn, place, 5)
            reply = session.fork_at(turn, place, token, self.params(6, True))
        except ContextOverflow:
            return
        assert [a.chosen for a in likely] == [[a.token_id] == leaf.answer[place : place + 1] for a in likely]
        live = Live(reply, shadow, leaf.parent or ROOT, leaf.prompt, [reply.begun_text])
        self.read(live)
        assert reply.turn is not None and list(reply.turn.token_ids[: place + 1]) == [*leaf.answer[:place], token]

    @rule(i=st.integers(0, 9), n=st.integers(2, 4), order=st.randoms(use_true_random=False), cut=st.booleans())
    def branch(self, i: int, n: int, order: Any, cut: bool) -> None:
        session, shadow = self.pick(i)
        if not self.fits(shadow):
            return
        head, text = shadow.head, "which"
        try:
            replies = session.branch(n, text, self.params(8, True))
        except InvalidArgument as error:
            assert isinstance(error, ContextOverflow) or not shadow.chat
            return
        if head is ROOT and not shadow.chat:  # words make a chat of an empty session
            shadow.chat = True
        lives = [Live(reply, shadow, head, text, [reply.begun_text]) for reply in replies]
        self.read_in_turns(lives, order, cut, selects=False)
        assert session.head.id == head.id

    @rule(order=st.randoms(use_true_random=False), cut=st.booleans(), length=st.sampled_from([12, 60]))
    def several_at_once(self, order: Any, cut: bool, length: int) -> None:
        """Replies of several sessions, piece by piece in any order; some are cancelled on the way."""
        lives = []
        for i in range(len(self.shadows)):
            session, shadow = self.pick(i)
            if self.fits(shadow):
                live = self.begin_reply(session, shadow, "all", self.params(length, True))
                lives += [] if live is None else [live]
        self.read_in_turns(lives, order, cut)

    def read_in_turns(self, lives: list[Live], order: Any, cut: bool, *, selects: bool = True) -> None:
        while lives:
            live = order.choice(lives)
            if cut and order.random() < 0.05:
                live.reply.cancel()
                reason: str | None = "cancelled"
            else:
                piece = next(live.reply)
                live.texts.append(piece.text)
                reason = piece.finish_reason
            if reason:
                self.ended(live, reason, selects=selects)
                lives.remove(live)

    @rule(i=st.integers(0, 9), k=st.integers(0, 30), name=st.sampled_from(["x", "good", "日本"]), off=st.booleans())
    def tag(self, i: int, k: int, name: str, off: bool) -> None:
        session, shadow = self.pick(i)
        if shadow.known():
            leaf = shadow.known()[k % len(shadow.known())]
            turn = self.turn(session, leaf)
            if off:
                session.untag(turn, name)
                leaf.tags.discard(name)
            else:
                session.tag(turn, name)
                leaf.tags.add(name)

    @precondition(lambda self: len(self.shadows) < 7)
    @rule(i=st.integers(0, 9), k=st.integers(0, 30))
    def fork(self, i: int, k: int) -> None:
        session, shadow = self.pick(i)
        leaves = [ROOT, *shadow.known()]
        leaf = leaves[k % len(leaves)]
        if leaf is ROOT and shadow.head is not ROOT:
            leaf = shadow.head
        self.n += 1
        name = f"s{self.n}"
        self.sessions[name] = session.fork(self.turn(session, leaf), id=name)
        self.shadows.append(Shadow(name, shadow.policy, shadow.chat, leaf, leaf))

    @precondition(lambda self: len(self.shadows) > 2)
    @rule(i=st.integers(0, 9))
    def delete(self, i: int) -> None:
        _, shadow = self.pick(i)
        with self.dropping():
            assert self.workspace.delete(shadow.id) >= 0
            del self.sessions[shadow.id]
        self.shadows.remove(shadow)

    @rule(i=st.integers(0, 9), with_kv=st.booleans())
    def carry(self, i: int, with_kv: bool) -> None:
        """Exports a session, deletes it and takes it in again."""
        session, shadow = self.pick(i)
        if any(other is not shadow and set(other.base.lineage()) & set(shadow.own) for other in self.shadows):
            return  # forks know its turns by their ids, which change
        file = self.data / "kv.safetensors" if with_kv else None
        exported = session.export(kv=file)
        self.workspace.delete(shadow.id)
        carried = self.sessions[shadow.id] = self.workspace.import_(exported, kv=file)
        named = {"": ROOT}
        for old, turn in zip(exported["turns"], carried.turns, strict=True):
            leaf = next(leaf for leaf in shadow.known() if leaf.id == old["id"])
            copy = named[leaf.id] = replace(leaf, id=turn.id, parent=named[(leaf.parent or ROOT).id], tags={*leaf.tags})
            self.judged.add(copy.id)
        shadow.own = [named[leaf.id] for leaf in shadow.known()]
        shadow.head, shadow.undone = named[shadow.head.id], [named[leaf.id] for leaf in shadow.undone]
        shadow.base = ROOT

    @rule(n=st.integers(1, N_PAGES))
    def evict(self, n: int) -> None:
        with self.pool.lock:
            self.model._engine.cache._reclaim(self.pool.n_free + n)

    @rule()
    def clear_cache(self) -> None:
        self.model.clear_cache()

    @rule(clean=st.booleans())
    def load_again(self, clean: bool) -> None:
        """Unloads the model, which writes its KV to disk, or loses that too."""
        self.workspace.unload("tiny")
        if clean:
            shutil.rmtree(self.data / "pages")
        self.load()

    @rule(i=st.integers(0, 9), k=st.integers(0, 30))
    def forget_and_open(self, i: int, k: int) -> None:
        """The last change must be stored even if the session has no references any more."""
        session, shadow = self.pick(i)
        number = k % (shadow.head.number + 1)
        shadow.go_to(next(leaf for leaf in shadow.head.lineage() if leaf.number == number), False)
        session.rollback(number)
        del session, self.sessions[shadow.id]
        gc.collect()
        self.compare(*self.pick(i))

    @rule(busy=st.booleans())
    def reopen(self, busy: bool) -> None:
        live = None
        if busy:
            session, shadow = self.pick(0)
            if self.fits(shadow):
                live = self.begin_reply(session, shadow, "end", replace(self.params(60, True), ignore_eos=True))
            if live is not None:
                self.read(live, 2)
        going = live is not None and not live.reply.is_done
        self.workspace.close()
        if going:
            self.ended(live, "cancelled")
        self.sessions.clear()
        gc.collect()
        self.open()
        for i in range(len(self.shadows)):
            self.pick(i)
        assert self.workspace._keeper.store.check() == []

    # ---- What must be so --------------------------------------------------------------------------------------------

    def compare(self, session: Session, shadow: Shadow) -> None:
        known = {turn.id: turn for turn in session.turns}
        assert known.keys() == {leaf.id for leaf in shadow.known()}
        for leaf in shadow.known():
            turn = known[leaf.id]
            assert turn.parent is not None and leaf.parent is not None
            assert (turn.parent.id, turn.number) == (leaf.parent.id, leaf.number)
            assert (turn.prompt, turn.text, turn.tags) == (leaf.prompt, leaf.text, leaf.tags)
            assert (turn.ids(), list(turn.token_ids)) == (leaf.ids, leaf.answer)
            assert turn.finish_reason == leaf.finish_reason
        assert session.head.id == shadow.head.id
        assert [turn.id for turn in session.path] == [leaf.id for leaf in shadow.head.lineage()][:-1][::-1]
        assert [turn.id for turn in session._tree.redo_stack] == [leaf.id for leaf in shadow.undone]

    @invariant()
    def trees_are_as_they_ought_to_be(self) -> None:
        for i in range(len(self.shadows)):
            self.compare(*self.pick(i))

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.settled()
        gc.collect(0)
        held = [sequence for sequence in every_sequence if sequence.pool is self.pool and sequence.pages]
        self.pool.check([sequence.pages for sequence in held], [sequence.n_dropped for sequence in held])
        turns = {turn for session in self.sessions.values() for turn in session.turns}
        owned = {id(turn.kv) for turn in turns} | {id(s) for s in self.model._engine.cache._anonymous.values()}
        strangers = [s for s in held if id(s) not in owned]
        if strangers:  # a turn that was dropped may live on in a cycle
            gc.collect()
            held = [sequence for sequence in every_sequence if sequence.pool is self.pool and sequence.pages]
            strangers = [s for s in held if id(s) not in owned]
        assert not strangers, "pages are held for nobody"
        for sequence in held:
            assert len(sequence.pages) == -(-sequence.n_tokens // 32)
        for turn in turns:
            assert turn.kv is None or turn.kv.n_tokens <= turn.n_ids, "what nobody read is taken back"
        usage = self.model.kv_usage
        assert usage.n_used == usage.n_pages - self.pool.n_free == usage.n_cached
        assert usage.used_bytes == usage.n_used * self.pool.page_bytes
        states = {state.slot for sequence in held for state in sequence.held_states() if state.slot >= 0}
        assert usage.n_slots_used == len(states), "a slot is held for nobody"

    def teardown(self) -> None:
        for shadow in list(self.shadows):
            self.workspace.delete(shadow.id)
        self.sessions.clear()
        gc.collect()
        self.model.clear_cache()
        assert self.model.kv_usage.n_used == self.model.kv_usage.used_bytes == 0
        assert self.model.kv_usage.n_slots_used == 0
        assert self.workspace.sessions() == [] and self.workspace._keeper.store.check() == []
        self.workspace.close()
        shutil.rmtree(self.data)


def walk(
    folder: Path,
    place: Path,
    kv: Any,
    threads: int,
    *,
    policies: list[ContextPolicy] = POLICIES,
    context: int = CONTEXT,
    window_kv: Any = "keep",
    n_days: int = 5,
    n_slots: int = 0,
    every: int = 64,
) -> None:
    """Lets the machine run over a model that has room for N_PAGES pages; a hybrid for so many states."""
    with Model.load(folder, kv=kv, threads=1, context=context, speculation="off") as oracle:
        n_bytes = N_PAGES * oracle._runner.pool.page_bytes
        options = {"kv": kv, "threads": threads, "context": context, "kv_memory": n_bytes, "window_kv": window_kv}
        if n_slots:
            options["state_memory"] = n_slots * oracle.kv_usage.slot_bytes
        attributes = {"folder": folder, "oracle": oracle, "options": options, "place": place, "policies": policies}
        machine = type("Machine", (Laws,), attributes | {"context": context, "every": every})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=n_days * MORE,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )


@pytest.mark.busy(1e5)
@pytest.mark.parametrize(("kv", "threads"), [("f32", 1), ("f16", 2), ("q8:bf16", 2)])
def test_whatever_is_done_every_turn_is_what_it_is_from_scratch(
    tiny_folder: Path, tmp_path: Path, kv: Any, threads: int
) -> None:
    walk(tiny_folder, tmp_path, kv, threads)


# One model of each structure: sandwich norms with two ropes and windows; heads of two widths, layers that reuse keys
# and values, embeddings of each layer; several residual streams; ALiBi; chunks and layers without rotation; parallel
# blocks; norms over whole rows; learned positions.
@pytest.mark.busy(1e5)
@pytest.mark.parametrize(
    ("name", "kv"),
    [
        ("gemma3", "f16"),
        ("gemma4", "q8:bf16"),
        ("gemma3n", "f16"),
        pytest.param("bloom", "q8", marks=pytest.mark.heavy),
        ("llama4", "f32"),
        ("cohere2", "bf16"),
        ("olmo2", "f16"),
        ("gpt2", "q8"),
    ],
)
def test_whatever_is_done_holds_for_every_structure(tmp_path: Path, name: str, kv: Any) -> None:
    case = CASES[name]
    folder = make_talking_model(case, tmp_path / "model")
    policies = [p for p in POLICIES if p.name != "slide"] if name == "gpt2" else POLICIES
    walk(folder, tmp_path, kv, 2, policies=policies)


# Short convolutions, gated delta rules and Mamba-2. They have few slots, so that states are evicted all the time, or
# many.
@pytest.mark.busy(1e5)
@pytest.mark.parametrize(
    ("name", "n_slots", "every"),
    [
        ("lfm2", 9, 32),
        ("qwen3_next", 40, 64),
        pytest.param("lfm2", 30, 64, marks=pytest.mark.heavy),
        pytest.param("qwen3_5", 9, 32, marks=pytest.mark.heavy),
        pytest.param("granitemoehybrid", 12, 32, marks=pytest.mark.heavy),
        pytest.param("falcon_h1", 9, 64, marks=pytest.mark.heavy),
        pytest.param("nemotron_h", 40, 32, marks=pytest.mark.heavy),
    ],
)
def test_whatever_is_done_holds_for_hybrids(tmp_path: Path, name: str, n_slots: int, every: int) -> None:
    folder = make_talking_model(CASES[name], tmp_path / "model")
    walk(folder, tmp_path, "f16", 2, n_slots=n_slots, every=every, n_days=2)


# A text of 256 positions has dead KV in windowed layers. It is dropped under pressure, or always.
@pytest.mark.busy(1e5)
@pytest.mark.parametrize(
    ("name", "kv", "window_kv"),
    [("gemma3", "q8:f16", "drop"), pytest.param("cohere2", "f16", "keep", marks=pytest.mark.heavy)],
)
def test_whatever_is_done_holds_without_dead_windows(tmp_path: Path, name: str, kv: Any, window_kv: Any) -> None:
    folder = make_talking_model(CASES[name], tmp_path / "model")
    walk(folder, tmp_path, kv, 2, context=256, window_kv=window_kv, n_days=2)


def test_learned_positions_do_not_slide(tmp_path: Path) -> None:
    with Model.load(make_talking_model(CASES["gpt2"], tmp_path / "model"), threads=1) as model:
        with pytest.raises(InvalidArgument, match="700 learned positions only"):
            model.session(context_policy="slide")
        assert model.session(context_policy="drop_oldest_turns").policy.name == "drop_oldest_turns"
