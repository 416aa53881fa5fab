"""The scheduler: one thread that computes all requests of all models of the process.

Each step is one batch of one model. It holds the next token of every request that decodes and prefill chunks of others,
so that no request waits for the whole prompt of another:

    admit     waiting requests in order of arrival, while there are pages; KV of a known prefix is taken from the
              cache, or from a running request with the same prefix. While other threads read KV from disk for a
              request, it waits (State.LOADING), and those after it are admitted
    plan      one token for each decoding request, then prefill chunks within what is left of the budget
    step      one call into the native library; other Python threads run meanwhile
    emit      each reader gets its piece; ends, errors and deadlines are settled

What is decided, and by which rule, is in `policy.py`; this file has the thread, its inbox and the side effects.
While requests decode, the budget for prefill is measured in time: see `step_cost.py`. When pages run out, the youngest
request is preempted: it waits and is recomputed later, with the same tokens.

Results do not depend on any of this: a token's logits have the same bits in every batch.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import PAGE_POSITIONS
from fabula.engine.decoding import FinishReason, Piece
from fabula.engine.policy import (
    Budget,
    Prefix,
    admits,
    common_length,
    decode_steps,
    fits,
    kept_of_draft,
    plan,
    preempted,
    shares_prefix,
)
from fabula.engine.request import Item, Request, State
from fabula.engine.runner import Part, Runner
from fabula.engine.step_cost import StepCost
from fabula.errors import EngineBusy, EngineError, InvalidArgument, NonFinite, OutOfMemory
from fabula.lean_dataclasses import dataclass

MAX_RUNNING = 64  # requests in one batch
MAX_WAITING = 128
IDLE_S = 1.0  # then the thread ends; the next request starts a new one
PAUSE_S = 0.05  # how often paused and abandoned requests are looked at when nothing else happens
EMIT_S = 0.016  # longest time between pieces when one call makes several decode steps: a frame of a screen
MAX_STEPS = PAGE_POSITIONS  # decode steps in one call: at most one more page for each request
SLOTS_NEEDED = 2  # of recurrent states, by a request: before and after a step
MAX_MEASURED = 256  # tokens of a step that StepCost learns from; in longer ones attention dominates


@dataclass(frozen=True, slots=True)
class Load:
    """Requests at one moment.

    Attributes:
        n_running, n_waiting: counts.
    """

    n_running: int
    n_waiting: int


class Scheduler:
    """Runs requests. Its thread starts with the first one and ends when there has been nothing to do for a while.

    Args:
        max_running: requests in one batch, of one model.
        max_waiting: requests that may wait; further ones are refused.
    """

    def __init__(self, *, max_running: int = MAX_RUNNING, max_waiting: int = MAX_WAITING) -> None:
        self._max_running, self._max_waiting = max_running, max_waiting
        self._inbox: queue.SimpleQueue[tuple[str, Request | Runner | threading.Event | None]] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in order of admission
        self._interrupt = _native.Flag()  # set when the inbox has a command: ends a call of several decode steps
        self._costs: weakref.WeakKeyDictionary[Runner, StepCost] = weakref.WeakKeyDictionary()
        self._room = False  # a request ended since the last admission
        self._turn = 0
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._n_outstanding = 0  # requests submitted and not done
        self._pid = os.getpid()
        _schedulers.add(self)

    # ---- For every thread -------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request and starts the thread if there is none.

        Raises:
            EngineBusy: the maximum number of requests waits already.
            EngineError: the process was forked since.
        """
        if os.getpid() != self._pid:
            raise EngineError("the process was forked after the model was loaded: load it in the child, or use spawn")
        with self._start_lock:
            if self._n_outstanding >= self._max_running + self._max_waiting:
                raise EngineBusy(
                    f"{self._n_outstanding} requests run or wait already; try again later",
                    n_waiting=len(self._waiting),
                )
            self._n_outstanding += 1
            self._post(("submit", request))
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="fabula-engine", daemon=True)
                self._thread.start()

    def cancel(self, request: Request) -> None:
        """Ends a request and waits until the scheduler released it: one step at most. May be called twice."""
        request.abandoned = True
        if threading.current_thread() is self._thread or os.getpid() != self._pid:
            return  # this thread releases it after the step; or, in a forked child, there is no thread to wait for
        self.wake()
        request.done.wait()

    def wake(self) -> None:
        """Makes the thread look at its requests again. Safe in a destructor."""
        self._post(("wake", None))

    def _post(self, command: tuple[str, Request | Runner | threading.Event | None]) -> None:
        self._inbox.put(command)
        self._interrupt.set()

    def drop(self, runner: Runner) -> None:
        """Ends every request of a model with an error, and waits until they have ended."""
        if os.getpid() != self._pid:  # a forked child has no thread, and locks may be held for ever
            return
        settled = threading.Event()
        with self._start_lock:
            if self._thread is None or self._thread is threading.current_thread():
                return
            self._post(("drop", runner))
            self._post(("settled", settled))
        settled.wait()

    @property
    def load(self) -> Load:
        """Running and waiting requests."""
        n_running = len(self._running)
        return Load(n_running, max(0, self._n_outstanding - n_running))

    def stop(self) -> None:
        """Ends all requests and the thread; for the end of the process."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and os.getpid() == self._pid:
            self._post(("stop", None))
            thread.join()

    # ---- The thread -------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._take_commands():
                self._settle_ends()
                self._admit()
                runner = self._next_runner()
                if runner is not None:
                    self._step(runner)
        except BaseException as error:  # each reader gets it; the next request starts a new thread
            self._end(EngineError(f"the engine failed: {error!r}"))
            raise

    def _take_commands(self) -> bool:
        """Reads the inbox, and waits for it if there is nothing to compute. False when the thread should end."""
        busy = any(not request.paused for request in self._running) or (self._waiting and self._room)
        pause = None if busy else PAUSE_S if self._running or self._waiting else IDLE_S
        self._interrupt.clear()  # before reading: a later command sets it again
        while True:
            try:
                command, about = self._inbox.get(timeout=pause) if pause is not None else self._inbox.get_nowait()
            except queue.Empty:
                return not (pause == IDLE_S and self._end_thread())
            pause = None
            if isinstance(about, Request):
                self._waiting.append(about)
            elif isinstance(about, Runner):
                self._drop(about)
            elif isinstance(about, threading.Event):
                about.set()
            elif command == "stop":
                self._end(None)
                return False

    def _end(self, error: EngineError | None) -> None:
        """Ends all requests, also those in the inbox; the next one starts a new thread."""
        with self._start_lock:
            self._thread = None
            left = []
            while not self._inbox.empty():
                left.append(self._inbox.get()[1])
        self._waiting += [about for about in left if isinstance(about, Request)]
        for request in [*self._running, *self._waiting]:
            self._finish(request, None if error else "cancelled", error)
        for about in left:
            if isinstance(about, threading.Event):
                about.set()

    def _end_thread(self) -> bool:
        """Whether the thread may end: the inbox is still empty."""
        with self._start_lock:
            if not self._inbox.empty():
                return False
            self._thread = None
            return True

    def _drop(self, runner: Runner) -> None:
        for request in [r for r in (*self._running, *self._waiting) if r.runner is runner]:
            self._finish(request, error=InvalidArgument("the model is closed"))

    def _settle_ends(self) -> None:
        """Ends requests that were abandoned or whose deadline has passed."""
        for request in [r for r in (*self._running, *self._waiting) if r.abandoned or r.deadline is not None]:
            if request.abandoned:
                self._finish(request, "cancelled")
            elif request.deadline is not None and time.monotonic() >= request.deadline:
                self._finish(request, "timeout")

    def _finish(self, request: Request, reason: FinishReason | None = None, error: BaseException | None = None) -> None:
        """Releases a request and emits the reason or error, unless the last piece has it."""
        if request.state is State.RUNNING:
            self._running.remove(request)
        elif request.state is not State.DONE and request in self._waiting:
            self._waiting.remove(request)
        request.stop_loading()
        request.stop_drafts()
        request.state = State.DONE
        request.publish_states(all_of_them=True)
        request.cache.keep(request.sequence)  # not computed with any more: it may be evicted
        self._room = True
        with self._start_lock:
            self._n_outstanding -= 1
        request.done.set()
        if reason is not None or error is not None:
            request.emit(Item(None, time.perf_counter(), reason, error))

    # ---- Admission --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        self._room = False
        full: set[Runner] = set()  # models of which a request waits for pages
        for request in list(self._waiting):
            n_running, blocked = len(self._running_of(request.runner)), request.runner in full
            if not admits(request, n_running, self._max_running, blocked=blocked):
                continue
            try:
                if not self._find_prefix(request):
                    continue  # it is being read from disk, or a running request is computing it
                if not self._fits(request):
                    full.add(request.runner)
                    continue
            except Exception as error:
                self._finish(request, error=error)
                continue
            self._waiting.remove(request)
            request.keep_branch()
            request.state = State.RUNNING
            if not request.clock.started:
                request.clock.started = time.perf_counter()
                request.n_reused = request.sequence.n_tokens
            self._running.append(request)

    def _find_prefix(self, request: Request) -> bool:
        """Adopts KV that is there already. False: it waits for more of the prefix, from disk or a running request."""
        if request.read is not None:
            if not request.read.is_done:
                return False
            request.loaded()
        if request.n_findable > request.sequence.n_tokens:
            found = request.find_in_memory()
            if found is not None:
                request.adopt_longer(found)
            if self._loads(request, request.keys()):
                return False
        return self._share_with_running(request)

    def _loads(self, request: Request, keys: list[bytes]) -> bool:
        """Whether more of a request's prefix is being read from disk; starts that if there are pages for the request.
        Where another request reads the same pages, this one shares them afterwards."""
        have = request.sequence.n_tokens
        if request.has_read or request.cache.spill is None or request.n_stored() <= have:
            return False
        first = keys[min(have // PAGE_POSITIONS, len(keys) - 1)]  # a state may be after all pages
        for other in self._waiting:
            read = other.read
            if read is not None and not read.is_done and request.may_share(other) and first in read.keys:
                return True
        if not self._fits(request):
            return False
        request.load(self.wake)
        return True

    def _share_with_running(self, request: Request) -> bool:
        """Adopts what a running request has of the prefix. False: one is computing more of it just now."""
        have = request.sequence.n_tokens
        history = request.decoding.history.ids[:-1]  # the last token must be computed for its logits
        for other in self._running:
            if not request.may_share(other):
                continue
            n_common = common_length(history, other.decoding.history.ids)
            sequence = other.sequence
            shares = shares_prefix(Prefix(n_common, sequence.n_tokens, other.n_pending > 1), have)
            if shares is None:
                sequence.keep_states(n_common)
                return False
            if shares and sequence.usable(n_common) > have:
                have = sequence.usable(n_common)
                request.adopt(sequence.fork(have))
        return True

    def _fits(self, request: Request) -> bool:
        """Whether there are pages for all its tokens and one more, also by preempting requests whose readers are slow
        and may be waiting for this one."""
        while not self._fits_now(request):
            running = self._running_of(request.runner)
            paused = next((r for r in reversed(running) if r.paused), None)
            if paused is None:
                return False
            self._preempt(paused)
        return True

    def _fits_now(self, request: Request) -> bool:
        pool, n_running = request.runner.pool, len(self._running_of(request.runner))
        needed = request.sequence.pages_needed(len(request.decoding.history) + 1, request.runner.max_tokens)
        if not fits(needed, pool.n_available(needed), n_running):
            return False
        n_slots = pool.n_slots_available()
        return n_slots is None or fits(SLOTS_NEEDED + n_running, n_slots, n_running)  # each running one takes another

    def _running_of(self, runner: Runner) -> list[Request]:
        return [r for r in self._running if r.runner is runner]

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def _next_runner(self) -> Runner | None:
        """The next model, in rotation, that has something to compute."""
        runners = list(dict.fromkeys(r.runner for r in self._running if not r.paused))
        if not runners:
            return None
        self._turn += 1
        return runners[self._turn % len(runners)]

    def _plan(self, runner: Runner) -> list[tuple[Request, int]]:
        """Which requests the next step holds, and how many tokens of each."""
        running = self._running_of(runner)
        n_decoding = sum(request.n_pending == 1 and not request.paused for request in running)
        for request in running:
            request.propose(n_decoding)
        return plan(running, Budget(runner.max_tokens, self.cost(runner)))

    def cost(self, runner: Runner) -> StepCost:
        """Measured cost of a model's steps."""
        return self._costs.setdefault(runner, StepCost())

    def _step(self, runner: Runner) -> None:
        """Computes one batch of a model and emits the results."""
        began = time.perf_counter()
        planned = self._plan(runner)
        n_steps = self._native_steps(runner, planned)
        if n_steps:
            if self._decode_natively(runner, planned, n_steps, began):
                return
            began, planned = time.perf_counter(), self._plan(runner)  # some may have made progress
        batch: list[tuple[Request, Part]] = []
        for request, n in planned:
            if request.state is State.RUNNING:  # or it was preempted for one before it
                part = self._prepare(request, n, batch)
                if part is not None:
                    batch.append((request, part))
        if not batch:
            return
        # Requests whose next token is sampled: rows of the last known token and of the draft behind it.
        wanted = [(request, part.n_tokens - request.n_pending + 1) for request, part in batch]
        ends = np.cumsum([part.n_tokens for _, part in batch]).tolist()
        rows = [row for end, (_, n) in zip(ends, wanted, strict=True) for row in range(end - max(n, 0), end)]
        is_decode = len(rows) == ends[-1]
        start = time.perf_counter()
        try:
            logits = runner.run([part for _, part in batch], rows)
        except NonFinite as error:
            self._find_damaged(batch, error)
            return
        except Exception as error:
            for request, _ in batch:
                self._finish(request, error=error)
            return
        computed = time.perf_counter()
        if ends[-1] <= MAX_MEASURED:
            self.cost(runner).measured(ends[-1], computed - start)
        for request, n in wanted:
            if n <= 1:  # with a draft it is done when that is verified
                request.publish_pages()
        n_sampled = first = 0
        for request, n in wanted:
            if n > 0:
                n_sampled += self._sample(request, logits[first : first + n])
                first += n
        if is_decode:  # a token's sampling is paid with or without a draft
            sampling = (time.perf_counter() - computed) * len(batch) / max(n_sampled, len(batch))
            self.cost(runner).measured_rows(len(rows), computed - began + sampling)

    def _native_steps(self, runner: Runner, batch: list[tuple[Request, int]]) -> int:
        """Number of decode steps to run in one native call; 0: run one step from Python.

        Constraints, logprobs and drafts need the logits in Python. On a device every other step is native, since
        sampling runs where the logits are; on the CPU that is worth it for several steps, while no request prefills.
        """
        if not all(
            n < request.n_pending or (n == request.n_pending and request.decoding.samples_natively)
            for request, n in batch
        ):
            return 0
        least = 0 if runner.device is None else 1
        if not all(request.n_pending == 1 for request, _ in batch):
            return least
        requests = [request for request, _ in batch]
        most = decode_steps(
            self.cost(runner),
            (r.read_ahead for r in requests),
            (PAGE_POSITIONS - r.sequence.n_tokens % PAGE_POSITIONS for r in requests),
            n_free=runner.pool.n_free,
            emit_seconds=EMIT_S,
            max_steps=min([MAX_STEPS, *(r.blind_steps for r in requests)]),
        )
        return most if most > 1 else least

    def _decode_natively(self, runner: Runner, batch: list[tuple[Request, int]], n_steps: int, began: float) -> bool:
        """Runs several steps in one native call, planned since `began`. False if a request made no progress, for lack
        of pages or because of an error that a step from Python will find."""
        inputs = []
        try:
            for request, n in batch:
                samples_now = n == request.n_pending  # also with no tokens left: then this one ends the answer
                n_sampled = max(1, min(n_steps, request.decoding.n_left)) if samples_now else 0
                request.release_passed()
                part = runner.prepare(request.sequence, request.next_tokens(n), max(n_sampled - 1, 0))
                inputs.append((request.sequence, request.decoding.decode_sequence(part.share, n_sampled)))
            start = time.perf_counter()
            sampled, seconds = runner.decode(inputs, n_steps, self._interrupt)
        except EngineError:
            return False
        except Exception as error:
            for request, _ in batch:
                self._finish(request, error=error)
            return True
        n_tokens = sum(n for _, n in batch)
        if n_tokens <= max(MAX_MEASURED, len(batch)):
            self.cost(runner).measured(n_tokens, seconds[-1] / len(seconds))
        progressed = True
        for (request, _), (_, given), (tokens, logprobs) in zip(batch, inputs, sampled, strict=True):
            if given.n_steps:
                self._take(request, tokens.tolist(), logprobs.tolist(), start + seconds)
                progressed = progressed and len(tokens) > 0
            else:
                request.publish_pages()
        if n_tokens == len(batch):
            n_done = len(seconds)
            self.cost(runner).measured_rows(n_tokens, (time.perf_counter() - began) / n_done, n_done)
        return progressed

    def _take(self, request: Request, tokens: list[int], logprobs: list[float], times: npt.NDArray[np.float64]) -> None:
        """Emits sampled tokens, without those after the end of the answer."""
        if tokens:
            request.clock.prompt_done = request.clock.prompt_done or float(times[0])
        pieces: list[Piece] = []
        for token, logprob in zip(tokens, logprobs, strict=True):
            pieces.append(request.decoding.take(token, logprob))
            if pieces[-1].finish_reason:
                break
        request.sequence.take_back(len(request.decoding.history) - 1)
        request.publish_pages(len(pieces))
        if pieces and pieces[-1].finish_reason:
            self._catch_up(request)
            self._finish(request)
        for piece, at in zip(pieces, times.tolist(), strict=False):
            request.emit(Item(piece, at, piece.finish_reason))

    def _catch_up(self, request: Request) -> None:
        """Computes the last tokens of an answer again where the step that ended it went beyond them and no state was
        kept there. So the next turn has nothing to recompute."""
        n = request.n_behind
        if n:
            with suppress(EngineError):  # no pages or no slot: the next turn recomputes them
                request.runner.step([(request.sequence, request.next_tokens(n))], [])
                request.publish_pages()

    def _prepare(self, request: Request, n: int, batch: list[tuple[Request, Part]]) -> Part | None:
        """Reserves pages for a request's next tokens, preempting others if there are none. None: this request was
        preempted, or ended with an error."""
        while True:
            try:
                request.release_passed()
                n_drafted = max(0, n - request.n_pending)
                tokens, keeps = request.next_tokens(n), self._kept_of_draft(request, n_drafted)
                return request.runner.prepare(request.sequence, tokens, 0, n_drafted, keeps)
            except OutOfMemory as error:
                if n > request.n_pending:
                    n = request.n_pending  # nobody releases pages for a draft
                    continue
                if self._evict_waiting(request.runner):
                    continue
                running = self._running_of(request.runner)
                holding = {r for r in running if r.sequence.pages}
                victim = preempted(running, request, {other for other, _ in batch}, holding)
                # Requests in the inbox may hold the pages: then this one waits until they can be evicted, too.
                n_unseen = self._n_outstanding - len(self._running) - len(self._waiting)
                if victim is None and len(running) == 1 and not n_unseen:
                    self._finish(request, error=error)
                    return None
                self._preempt(victim or request)
                if victim is None:
                    return None
            except EngineError as error:
                self._finish(request, error=error)
                return None

    def _kept_of_draft(self, request: Request, n_drafted: int) -> list[int]:
        """Positions within a draft at which keeping the recurrent state costs less than computing tokens again."""
        states, runner = request.runner.pool.states, request.runner
        if states is None or not n_drafted:
            return []
        share = 2 * states.slot_bytes / runner.weight_bytes  # of the memory a step reads: a copy reads and writes
        kept = kept_of_draft(request.chances[:n_drafted], *self.cost(runner).row_and_base(), share)
        return [request.sequence.n_tokens + 1 + i for i in kept]

    def _evict_waiting(self, runner: Runner) -> bool:
        """Evicts the KV of the youngest waiting request that has any; False if none has."""
        owner = next((r for r in reversed(self._waiting) if r.runner is runner and r.holds_pages), None)
        if owner is not None:
            owner.release()
        return owner is not None

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        request.state = State.WAITING
        request.n_preempted += 1
        request.release()
        self._waiting.appendleft(request)

    def _sample(self, request: Request, logits: npt.NDArray[np.float32]) -> int:
        """Samples a request's next token, and those of its draft that are right, and emits them. Returns how many."""
        now = time.perf_counter()
        request.clock.prompt_done = request.clock.prompt_done or now
        pieces, error = request.sample(logits)
        at, reason = time.perf_counter(), pieces[-1].finish_reason if pieces else None
        if reason:
            self._catch_up(request)
            self._finish(request)
        for piece in pieces:
            request.emit(Item(piece, at, piece.finish_reason))
        if error is not None:
            self._finish(request, error=error)
        return len(pieces)

    def _find_damaged(self, batch: list[tuple[Request, Part]], error: NonFinite) -> None:
        """Finds whose logits are not finite: computes each request alone and ends those that fail again. A draft may be
        at fault, of a token that would never be sampled: then its request goes on without."""
        drafting = [request for request, part in batch if part.n_tokens > request.n_pending]
        for request in drafting:
            request.stop_drafts()
            request.sequence.roll_back(request.sequence.n_tokens)
        if drafting:
            return
        if len(batch) == 1:
            self._finish(batch[0][0], error=error)
            return
        for request, part in batch:
            outputs = [part.n_tokens - 1] if part.n_tokens == request.n_pending else []
            try:
                logits = request.runner.run([part], outputs)
            except EngineError as own:
                self._finish(request, error=own)
                continue
            request.publish_pages()
            if outputs:
                self._sample(request, logits)


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Otherwise a thread inside the library would return into an interpreter that is gone."""
    for scheduler in list(_schedulers):
        scheduler.stop()
