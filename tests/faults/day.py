"""A day of conversations that is killed again and again, and continued from what it left.

    python day.py FOLDER MODEL KILLS SEED

Each child works through the same plan on the same folder: it looks at what the store holds, goes on behind that, and
says what is done as soon as that is certain. What takes something back, or makes again what was taken back, it says
before it begins. After each kill everything that was said to be done must be there. At the end nothing may differ from
the same day without a kill. When a day is over before the kills are, the next begins.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from killing import MAX_OPEN_S, kill_after

from fabula import SamplingParams, Session, Turn, Workspace
from fabula.store.records import TurnRecord
from fabula.store.store import Store

N_WORKERS = 3
MODEL_OPTIONS = {"threads": 1, "context": 512, "kv_memory": 1 << 19}  # pages for a few conversations: others go to disk

SCRIPTS = """
Hello, who are you?|And what can you do?|Tell me more about that.
What is the capital of France?|How many people live there?|Which river runs through it?|Thanks!
I want to cook dinner for four.|Nobody eats meat.|One of us eats no nuts.|How long will it take?
Write a poem about the sea.|Make it shorter.|Now let it rhyme.
My code prints None. Why?|It has a return in the loop.|Ah, I see. And the second loop?|Can I test that?
Translate "good morning" into German.|And into Dutch?|Which of them is older?
你好，你是谁？|你会写诗吗？|请写一首关于月亮的诗。
I cannot sleep.|I think about work all night.|What would you do?|That helps, thank you.
What is a prime number?|Is 91 prime?|Then what are its factors?|And 97?
Plan a weekend in the Alps.|We have no car.|With a child of six.|What if it rains?
今天天气怎么样？|明天呢？|我应该带伞吗？
Tell me a story of a fox.|Where does it live?|Who is its friend?|How does it end?|Tell it to a child.
How do I mend a bicycle tyre?|The hole is very small.|It is flat again.
Explain entropy.|Simpler, please.|With an example from the kitchen.|So why is a room never tidy?
Write a letter to my landlord.|The heating is broken.|More polite.|Add a date.
Who painted the Night Watch?|Where does it hang?|How large is it?
什么是机器学习？|能举个例子吗？|它和统计有什么不同？|谢谢。
I have a job interview tomorrow.|At a bank.|They may ask about my weaknesses.|And about money?
What should I read next?|I liked Le Guin.|Something shorter?|And something sad?
Count from one to ten.|Backwards.|Only the odd ones.
How far is the moon?|And the sun?|How long does light take?|How do we know that?
Summarise this: the cat sat on the mat.|In one word.|As a headline.
我想学做饭。|先从简单的开始。|鸡蛋可以吗？|要多久？
Is it safe to eat raw eggs?|And for a child?|What is the risk?
Make up a name for a cafe.|It sells books too.|In a small harbour town.|Five more, please.|I take the third.
Why is the sky blue?|Why is the evening red?|And on Mars?
Help me with my homework.|It is about the Romans.|What did they eat?|I need three sources.
请用中文解释"缘分"。|英文怎么说？|给我一个例句。
How do I say no to a friend?|She asks for money.|For the third time.|Write it down for me.
What is the fastest animal?|In water?|In the air?|Over a long distance?
Fix the grammar: he go to school.|And: they was late.|Explain the rule.
Good evening.|I had a long day.|Just tell me something nice.|Good night.
""".strip().splitlines()


@dataclass(frozen=True, slots=True)
class Op:
    """Something to do.

    Attributes:
        kind: say, stop, regenerate, edit, continue, fork, tag, prune, delete.
        session: in which.
        turn: number of the turn it makes, 0 for none; it is also that turn's seed.
        at: number of the turn it is about; 0 for the empty start.
        text: words, tag, or the name of a fork.
    """

    kind: str
    session: str
    turn: int
    at: int
    text: str = ""

    @property
    def params(self) -> SamplingParams:
        stops = self.kind == "stop"
        n = 60 if stops else 8 + self.turn % 23
        return SamplingParams(temperature=0.9, seed=self.turn, max_tokens=n, ignore_eos=stops)

    @property
    def n_read(self) -> int:
        """Pieces that are read before a reply is stopped."""
        return 1 + self.turn % 9


def plan(seed: int, number: int) -> list[Op]:
    """What is done in one conversation; everything follows from the seed."""
    rng, name, ops = random.Random(f"{seed} {number}"), f"c{number:02}", []
    last = 1000 * (number + 1)
    heads: dict[str, int] = {name: 0}
    known: dict[str, list[int]] = {name: []}
    parent_of: dict[int, int] = {}

    def grow(kind: str, session: str, at: int, text: str = "") -> None:
        nonlocal last
        last += 1
        ops.append(Op(kind, session, last, at, text))
        parent_of[last] = at if kind in ("say", "stop") else parent_of[at]
        heads[session] = last
        known[session].append(last)

    for text in SCRIPTS[number].split("|"):
        session = rng.choice(list(heads))
        grow("stop" if rng.random() < 0.15 else "say", session, heads[session], text)
        chance, some = rng.random(), rng.choice(known[session])
        if chance < 0.15:
            grow("regenerate", session, some)
        elif chance < 0.3:
            grow("edit", session, some, text.upper())
        elif chance < 0.4:
            grow("continue", session, some)
        elif chance < 0.55:
            ops.append(Op("tag", session, 0, some, rng.choice(["good", "later", "好"])))
        elif chance < 0.65:
            heads[session] = rng.choice([0, *known[session]])  # the next words go behind an earlier turn
        elif chance < 0.8:
            fork = f"{name}-f{last}"
            ops.append(Op("fork", session, 0, some, fork))
            heads[fork], known[fork] = some, [some]
            grow("say", fork, some, "And in other words?")
            if rng.random() < 0.4:
                ops.append(Op("delete", fork, 0, 0))
                del heads[fork], known[fork]
        elif chance < 0.9:
            behind = [t for t in known[session] if t != some and some in lineage(t, parent_of)]
            # Not what a fork goes on from: found there, it would look as if nothing had to be done again here.
            others = {t for other, head in heads.items() if other != session for t in lineage(head, parent_of)}
            if others & set(behind):
                continue
            ops.append(Op("prune", session, 0, some))
            heads[session] = some
            known[session] = [t for t in known[session] if t not in behind]
    return ops


def lineage(turn: int, parent_of: dict[int, int]) -> Iterator[int]:
    while turn:
        yield turn
        turn = parent_of[turn]


# ---- In the child ---------------------------------------------------------------------------------------------------


class Day:
    """Works through the plans, behind what the store holds already."""

    def __init__(self, folder: Path, model: Path, acks: int) -> None:
        began = time.process_time()
        self._workspace = Workspace(folder)
        self._acks, self._model = acks, model
        writer = self._workspace._keeper.store._writer
        writer._checkpoint_s = 0.01  # so that there are partial turns
        self.say("open", time.process_time() - began)

    def say(self, *what: Any) -> None:
        os.write(self._acks, (json.dumps(what) + "\n").encode())

    def work(self, seed: int) -> None:
        self._workspace.load(self._model, name="tiny", **MODEL_OPTIONS)
        failures: list[str] = []

        def some(first: int) -> None:
            try:
                for number in range(first, len(SCRIPTS), N_WORKERS):
                    self.converse(plan(seed, number))
            except BaseException:
                failures.append(traceback.format_exc())

        threads = [threading.Thread(target=some, args=(i,)) for i in range(N_WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        self._workspace.close()
        self.say("over")

    def converse(self, ops: list[Op]) -> None:
        there = {record.record.id for record in self._workspace.sessions()}
        done = {turn for name in {op.session for op in ops} & there for turn in self.turns(self._workspace.open(name))}
        first = max((i + 1 for i, op in enumerate(ops) if op.turn in done), default=0)
        for op in ops[first:]:
            self.do(op)

    def turns(self, session: Session) -> dict[int, Turn]:
        """The turns that are complete, by number. What was being made when the process was killed is not."""
        found = {}
        for turn in session.turns:
            assert turn.params is not None and turn.params.seed is not None
            n_read = 1 + turn.params.seed % 9  # of one that is stopped on purpose
            stopped = turn.finish_reason == "cancelled" and turn.params.ignore_eos and len(turn.token_ids) == n_read
            if stopped or turn.finish_reason not in ("cancelled", "interrupted"):
                found[turn.params.seed] = turn
        return found

    def do(self, op: Op) -> None:
        self.say("using", op.session)  # one that was deleted begins anew, if what led to that is done again
        session = self._workspace.session(op.session, model="tiny", system="Be kind.")
        known: dict[int, Turn | int] = {0: 0, **self.turns(session)}
        at = known[op.at]
        if op.kind == "tag":
            session.tag(at, op.text)
            self.say("tagged", op.session, op.at, op.text)
        elif op.kind == "fork":
            self.say("using", op.text)
            if op.text not in {summary.record.id for summary in self._workspace.sessions()}:
                session.fork(at, id=op.text)
            self.say("forked", op.text)
        elif op.kind == "prune":
            self.say("pruning", op.session, op.at)
            session.rollback(at, prune=True)
            left = self.turns(session)
            self.say("pruned", op.session, [number for number in known if number and number not in left])
        elif op.kind == "delete":
            self.say("deleting", op.session)
            session.delete()
            self.say("deleted", op.session)
        else:
            self.grow(op, session, at)

    def grow(self, op: Op, session: Session, at: Turn | int) -> None:
        if op.kind != "edit":
            session.rollback(at)
        if op.kind in ("say", "stop"):
            reply = session.say(op.text, op.params)
        elif op.kind == "regenerate":
            reply = session.regenerate(op.params)
        elif op.kind == "edit":
            reply = session.edit(at, op.text, op.params)
        else:
            reply = session.continue_(5, params=op.params)
        for i, _ in enumerate(reply, 1):
            time.sleep(0.001)
            if op.kind == "stop" and i == op.n_read:
                reply.cancel()
        assert reply.turn is not None
        self.say("turn", op.session, op.turn, list(reply.turn.token_ids), reply.turn.text)


# ---- In the parent, which opens no model ----------------------------------------------------------------------------


@dataclass
class Ledger:
    """What must be there.

    Attributes:
        turns: acknowledged, by session and number: ids and text.
        tags: acknowledged, of such turns; they go with their turn, as one that is made again has none at first.
        sessions: forks that were acknowledged.
        gone: sessions whose deletion was acknowledged, until it is said that they are about to be made again.
        pruning: sessions of which acknowledged turns may be there or not.
    """

    turns: dict[tuple[str, int], tuple[list[int], str]] = field(default_factory=dict)
    tags: set[tuple[str, int, str]] = field(default_factory=set)
    sessions: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    pruning: set[str] = field(default_factory=set)
    n_acks: int = 0
    over: bool = False

    def note(self, line: str) -> None:
        self.n_acks += 1
        what, *about = json.loads(line)
        if what == "using":
            self.gone.discard(about[0])
        elif what == "open":
            assert about[0] < MAX_OPEN_S, f"opening took {about[0]:.1f} s"
        elif what == "turn":
            self.turns[about[0], about[1]] = (about[2], about[3])
            self.gone.discard(about[0])
            self.pruning.discard(about[0])
        elif what == "tagged":
            self.tags.add(tuple(about))
        elif what == "forked":
            self.sessions.add(about[0])
            self.gone.discard(about[0])
        elif what == "pruning":
            self.pruning.add(about[0])
        elif what == "pruned":
            self.pruning.discard(about[0])
            self.forget(about[0], about[1])
        elif what in ("deleting", "deleted"):
            self.forget(about[0], [number for session, number in self.turns if session == about[0]])
            self.sessions.discard(about[0])
            if what == "deleted":
                self.gone.add(about[0])
        self.over = self.over or what == "over"

    def forget(self, session: str, numbers: list[int]) -> None:
        """Takes out turns that need not be there any more."""
        for number in numbers:
            self.turns.pop((session, number), None)
        self.tags = {tag for tag in self.tags if tag[0] != session or tag[1] not in numbers}

    def verify(self, store: Store, ever: dict[int, tuple[list[int], str]]) -> int:
        """Compares a store with what must be there; how many partial turns it holds."""
        assert store.check() == []
        found = read(store)
        for (session, number), (ids, text) in list(self.turns.items()):
            if session in self.pruning and number not in {number for number, _ in found[session]}:
                self.forget(session, [number])  # pruned, if nobody heard of it
                continue
            assert (number, True) in found[session], f"turn {number} of {session} was acknowledged"
            turn = found[session][number, True]
            assert (list(turn.token_ids), turn.text) == (ids, text)
        for session, number, tag in self.tags:
            if (session, number) in self.turns and session not in self.pruning:
                assert tag in found[session][number, True].tags
        assert self.sessions <= found.keys(), f"forks are missing: {self.sessions - found.keys()}"
        assert not self.gone & found.keys(), f"deleted sessions are there: {self.gone & found.keys()}"
        n_partial = 0
        for turns in found.values():
            for (number, whole), turn in turns.items():
                ids, text = ever[number]
                if whole:
                    assert (list(turn.token_ids), turn.text) == (ids, text), f"turn {number} differs"
                else:
                    n_partial += 1
                    assert turn.finish_reason is None, "what was being made is marked"
                    assert list(turn.token_ids) == ids[: len(turn.token_ids)] and text.startswith(turn.text.rstrip("�"))
        return n_partial


def read(store: Store) -> dict[str, dict[tuple[int, bool], TurnRecord]]:
    """The sessions of a store: turns by number, and whether they are complete."""
    found: dict[str, dict[tuple[int, bool], TurnRecord]] = {}
    for summary in store.sessions():
        name = summary.record.id
        found[name] = {}
        for turn in store.load("", name)[1]:
            number = turn.params["sampling"]["seed"]
            found[name][number, turn.finish_reason is not None] = turn
    return found


def picture(store: Store) -> dict[str, Any]:
    """What must be the same after any number of kills: sessions, turns with their parents, tags and heads."""
    picture: dict[str, Any] = {}
    for name, turns in read(store).items():
        record, _ = store.load("", name)
        numbers: dict[str | None, int] = {turn.id: number for (number, _), turn in turns.items()} | {None: 0}
        picture[name] = {
            "head": numbers[record.head_id],
            "base": numbers[record.base_id],
            "turns": {
                number: (numbers[t.parent_id], t.prompt, t.text, t.prompt_ids, t.token_ids, t.tags, t.finish_reason)
                for (number, whole), t in sorted(turns.items(), key=lambda item: item[0])
                if whole
            },
        }
    return picture


def run(folder: Path, model: Path, seed: int, delay_s: float | None) -> list[str]:
    """What a child said until it was killed, after so much processor time, or until the day was over."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        with suppress(BaseException):
            os.close(reading)
            faulthandler.enable()
            try:
                Day(folder, model, writing).work(seed)
                status = 0
            except BaseException:
                traceback.print_exc()
        os._exit(status)
    os.close(writing)
    heard: list[bytes] = []

    def listen() -> None:
        with os.fdopen(reading, "rb") as lines:
            heard.extend(lines)

    listener = threading.Thread(target=listen)
    listener.start()
    if delay_s is not None:
        kill_after(child, delay_s)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    listener.join()
    assert status in (0, -signal.SIGKILL), status
    return [line.decode() for line in heard if line.endswith(b"\n")]


def main(folder: Path, model: Path, n_kills: int, seed: int) -> None:
    rng, kills, days = random.Random(seed), 0, 0
    partials = acks = 0
    slowest = 0.0
    while kills < n_kills:
        days += 1
        day_seed = seed + days
        undisturbed = Ledger()
        ever: dict[int, tuple[list[int], str]] = {}
        for line in run(folder / f"{days}-reference", model, day_seed, None):
            undisturbed.note(line)
            what, *about = json.loads(line)
            if what == "turn":
                ever[about[1]] = (about[2], about[3])
        assert undisturbed.over and len(ever) > 100
        with Store.open(folder / f"{days}-reference") as store:
            assert undisturbed.verify(store, ever) == 0
            expected = picture(store)
        place, ledger = folder / f"{days}", Ledger()
        while not ledger.over:
            # Short ones end while the workspace is opened or the model loaded, long ones in the middle of answers.
            delay_s = rng.choice([rng.uniform(0, 0.1), rng.uniform(0, 0.5)]) if kills < n_kills else None
            for line in run(place, model, day_seed, delay_s):
                ledger.note(line)
            kills += not ledger.over
            began = time.process_time()
            with Store.open(place) as store:
                slowest = max(slowest, time.process_time() - began)
                partials += ledger.verify(store, ever)
        assert slowest < MAX_OPEN_S, f"opening took {slowest:.1f} s"
        with Store.open(place) as store:
            assert picture(store) == expected, "nothing differs from a day without a kill"
        acks += ledger.n_acks
    print(json.dumps({"kills": kills, "days": days, "acks": acks, "partials": partials, "slowest_open_s": slowest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
