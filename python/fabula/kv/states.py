"""Recurrent states: what the recurrent layers of a hybrid model remember of a text, in slots of fixed size.

KV can be truncated at any position, a state cannot: a text goes on only where one was kept. So a sequence has a `Trail`
of states, one after its tokens so far and others on its way there:

    position   0 ............ 512 ............ 700 ...... 731 ...... 760
    state                     fixed            prompt's   passing    after its tokens
                                               end                   so far

A step never writes the slot that it reads: it goes from one slot to another, so the state before it is there as long as
somebody needs it (a draft that was wrong, a stop string, a canceled answer), and keeping one copies nothing.

Where no state was kept, the nearest earlier one is used and the tokens after it are computed again, to the same bits.

Slots have a budget. When none is free, the state of the lowest rank that was used the longest time ago is evicted. A
`State` is a handle: sequences with a common past hold the same one, and its slot is free when the last of them is gone.

Locks: the pool's lock guards everything here but `State.__del__`, which may run at any moment in any thread.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import PAGE_POSITIONS
from fabula.errors import InvalidArgument, OutOfMemory
from fabula.kv.prefix import KEY_BYTES

I32 = npt.NDArray[np.int32]

NO_IDS: I32 = np.empty(0, np.int32)

STATE_EVERY = 512  # positions between two states that are kept within a prompt or an answer
PASSING_GAP = 16  # tokens between two states that are kept only until the reader has passed them
DEFAULT_BYTES = 1 << 30  # budget of a model's states
MIN_SLOTS = 4  # the states before and after a step, of two texts
MAX_SLOTS = 4096  # of a pool: bounds the search for one to evict


class Rank(IntEnum):
    """Why a state is kept; lower ranks are evicted first."""

    PASSING = 0  # a step ended here
    FIXED = 1  # a multiple of STATE_EVERY
    END = 2  # the end of a turn or a prompt, or where texts branched off


class State:
    """The states of all recurrent layers after the first `position` tokens of a text. Does not change once computed.

    Attributes:
        slot: where it is; -1 once it was evicted.
        position: tokens before it; -1 until it is computed.
        rank: why it is kept.
        used: rises with each use.
        name: prefix hash of the last full page before it, and the ids after that page as bytes; None while not public.
        pinned: it must not be evicted.
    """

    __slots__ = ("__weakref__", "_free", "name", "pinned", "position", "rank", "slot", "used")

    def __init__(self, slot: int, free: deque[int]) -> None:
        self.slot, self._free = slot, free
        self.position, self.rank, self.used = -1, Rank.PASSING, 0
        self.name: tuple[bytes, bytes] | None = None
        self.pinned = False

    def __del__(self) -> None:
        if self.slot >= 0:
            self._free.append(self.slot)  # atomic: this waits for no lock


def state_key(page_key: bytes, tail: bytes) -> bytes:
    """The key on disk of a public state; see `State.name`."""
    return blake2b(page_key + tail, digest_size=KEY_BYTES, person=b"fabula state").digest()


def tail_of(ids: I32) -> bytes:
    """Ids after the last full page, as they are part of a name."""
    return ids.astype("<i4").tobytes()


def slots_for(n_bytes: int | None, slot_bytes: int) -> int:
    """Slots of a pool with a budget in bytes; None for the default."""
    return max(MIN_SLOTS, min(MAX_SLOTS, (DEFAULT_BYTES if n_bytes is None else n_bytes) // slot_bytes))


class StateSlots:
    """Memory for a fixed number of states. The caller of its methods holds the pool's lock.

    Args:
        layer_floats: floats of the state of each recurrent layer.
        n_slots: states that fit; only touched ones take memory.

    Attributes:
        n_slots: as given.
        every: positions between two states that are kept on the way.
        slot_bytes: bytes of a state.
        n_evicted: states evicted since the pool was made.
        in_use: returns the states that running requests need.
        on_evict: called with a state right before its slot is used for another one.
    """

    def __init__(self, layer_floats: Sequence[int], n_slots: int) -> None:
        self.native = _native.StatePool(layer_floats, n_slots)
        self.n_slots, self.slot_bytes = n_slots, self.native.slot_bytes
        self.n_evicted, self.every = 0, STATE_EVERY
        self.in_use: Callable[[], Iterable[State]] = tuple
        self.on_evict: Callable[[State], None] | None = None
        self._free = deque(range(n_slots - 1, -1, -1))  # the one used last at the end
        self._live: dict[int, weakref.ref[State]] = {}  # by slot; references may be dead
        self._index: dict[bytes, weakref.WeakValueDictionary[bytes, State]] = {}  # by name
        self._stamp = 0
        self._closed = False

    @property
    def n_used(self) -> int:
        """Slots that hold a state. Waits for no lock."""
        return self.n_slots - len(self._free)

    def n_available(self) -> int:
        """Slots that are free or can be evicted."""
        return self.n_slots - len({id(state) for state in self.in_use()})

    def touch(self, state: State) -> None:
        """Marks a state as used."""
        self._stamp += 1
        state.used = self._stamp

    def take(self, most: Rank = Rank.END) -> State:
        """A slot for a state that will be computed.

        Args:
            most: states of higher ranks are not evicted for it.

        Raises:
            OutOfMemory: none is free, nor can be evicted.
        """
        try:
            slot = self._free.pop()
        except IndexError:
            slot = self._evict(most)
        state = State(slot, self._free)
        self._live[slot] = weakref.ref(state)
        return state

    def _evict(self, most: Rank) -> int:
        in_use = {id(state) for state in self.in_use()}
        victim: State | None = None
        for ref in self._live.values():
            state = ref()
            if state is None or state.slot < 0 or state.pinned or state.rank > most or id(state) in in_use:
                continue
            if victim is None or (state.rank, state.used) < (victim.rank, victim.used):
                victim = state
        if victim is None:
            raise OutOfMemory(
                f"all {self.n_slots} slots for recurrent states are in use; close other generations or load the model"
                " with more state_memory"
            )
        if self.on_evict is not None:
            self.on_evict(victim)
        slot, victim.slot = victim.slot, -1
        self.n_evicted += 1
        return slot

    def read(self, state: State) -> npt.NDArray[np.uint8]:
        """A copy of a state's bytes, uint8 [slot_bytes].

        Raises:
            InvalidArgument: the model was closed.
        """
        self._check_open()
        return self.native.read(state.slot)

    def write(self, state: State, data: npt.NDArray[np.uint8]) -> None:
        """Sets a state's bytes, uint8 [slot_bytes]; errors as `read`."""
        self._check_open()
        self.native.write(state.slot, data)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidArgument("the model is closed")

    def discard_free(self) -> None:
        """Returns the memory of free slots to the system."""
        for slot in list(self._free) if not self._closed else ():
            self.native.discard(slot)

    # ---- Names ------------------------------------------------------------------------------------------------------

    def publish(self, state: State, name: tuple[bytes, bytes]) -> State:
        """Makes a state findable. Returns the one with that name: an earlier one has the same bits."""
        page_key, tail = name
        if page_key not in self._index and len(self._index) > 2 * self.n_slots:
            self._index = {key: tails for key, tails in self._index.items() if tails}
        tails = self._index.setdefault(page_key, weakref.WeakValueDictionary())
        known = tails.get(tail)
        if known is not None and known.slot >= 0:
            known.rank = max(known.rank, state.rank)
            return known
        state.name = name
        tails[tail] = state
        return state

    def find(self, page_key: bytes, ids: I32) -> Iterator[State]:
        """States of a text after a full page, the longest first.

        Args:
            page_key: prefix hash of the page.
            ids: int32 [n], of the text after it.
        """
        tails = self._index.get(page_key)
        for tail in sorted(tails.keys(), key=len, reverse=True) if tails else ():
            state = tails.get(tail) if tails else None
            n = len(tail) // 4
            if state is not None and state.slot >= 0 and n <= len(ids) and tail_of(ids[:n]) == tail:
                yield state

    def check(self, held: Iterable[State]) -> None:
        """Compares the slots with the states that sequences hold; for tests.

        Raises:
            AssertionError: a slot is both free and held, or neither.
        """
        slots = {state.slot for state in held if state.slot >= 0}
        assert sorted([*self._free, *slots]) == list(range(self.n_slots)), "slots are miscounted"

    def close(self) -> None:
        """Frees the memory; may be called twice."""
        self._closed = True
        self.native.close()


class StateShare(NamedTuple):
    """Slots of one sequence's share of a step; as in struct fb_sequence."""

    state_in: int
    state_out: int
    keeps: tuple[tuple[int, int], ...]


class Trail:
    """The states of one sequence: after its tokens so far, and at earlier positions.

    Args:
        slots: of the pool.
    """

    __slots__ = ("_at", "_every", "_keeps", "_marks", "_next", "_slots", "_unnamed", "_verified")

    def __init__(self, slots: StateSlots) -> None:
        self._slots = slots
        self._at: dict[int, State] = {}  # by position, ascending
        self._next: State | None = None  # that the next step computes
        self._keeps: list[tuple[int, State]] = []  # that it computes on its way
        self._verified: list[State] = []  # of a step with a draft, until it is known which of them are right
        self._marks: set[int] = set()
        self._unnamed: list[int] = []
        self._every = 0  # 0: no fixed positions

    def add(self, *states: State) -> None:
        """Adds states that were computed."""
        more = {state.position: state for state in states if state.position not in self._at}
        self._at = dict(sorted((self._at | more).items()))

    def keep(self, *marks: int) -> None:
        """Keeps states at fixed positions from now on, and at `marks`, also one that was computed."""
        self._every = self._slots.every
        self._marks.update(marks)
        for position in marks:
            if position in self._at:
                self._at[position].rank = Rank.END

    def states(self) -> list[State]:
        """Those that were not evicted, in order."""
        return [state for state in self._at.values() if state.slot >= 0]

    def held(self) -> list[State]:
        """All whose slots it holds, also those of the next step."""
        return [*self._at.values(), *([self._next] if self._next else ()), *(state for _, state in self._keeps)]

    def has(self, state: State) -> bool:
        return self._at.get(state.position) is state

    def positions(self, most: int) -> Iterator[int]:
        """Positions, at most `most`, of states that were not evicted, the highest first."""
        return (position for position in reversed(self._at) if position <= most and self._at[position].slot >= 0)

    def in_use(self, n_tokens: int) -> Iterator[State]:
        """States that a running request needs, which has computed so many tokens."""
        if n_tokens in self._at:
            yield self._at[n_tokens]
        if self._next is not None:
            yield self._next
        yield from self._verified
        for _, state in self._keeps:
            yield state

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def reserve(self, n_past: int, n_new: int, also: Iterable[int] = ()) -> StateShare:
        """Reserves slots for a step of `n_new` tokens after `n_past` others.

        Args:
            n_past, n_new: of the step.
            also: further positions in it to keep the states of.

        Raises:
            OutOfMemory: no slot for the result. Those on the way are left out instead.
        """
        start = self._at.get(n_past)
        if n_past and (start is None or start.slot < 0):
            raise OutOfMemory(f"the recurrent state after {n_past} tokens was evicted")
        end = n_past + n_new
        self._keeps, self._verified = [], []
        if self._next is None:
            self._next = self._slots.take()
        every = range((n_past // self._every + 1) * self._every, end, self._every) if self._every else ()
        for position in sorted({p for p in (*self._marks, *every, *also) if n_past < p < end}):
            try:
                self._keeps.append((position, self._slots.take(self._rank(position))))
            except OutOfMemory:
                continue
        keeps = tuple((position - n_past, state.slot) for position, state in self._keeps)
        return StateShare(start.slot if start else -1, self._next.slot, keeps)

    def _rank(self, position: int) -> Rank:
        if position in self._marks:
            return Rank.END
        return Rank.FIXED if self._every and position % self._every == 0 else Rank.PASSING

    def advance(self, n_past: int, end: int, *, is_draft: bool) -> None:
        """The step has computed the tokens up to `end`; with a draft, some of them may be wrong."""
        assert self._next is not None
        if not self._every:  # nobody asked for states on the way
            self._at = {position: state for position, state in self._at.items() if position == n_past}
        for position, state in (*self._keeps, (end, self._next)):
            if position > end:  # the call ended before
                continue
            state.position, state.rank = position, self._rank(position)
            self._slots.touch(state)
            self._at[position] = state
            if state.rank:
                self._unnamed.append(position)
        self._keeps, self._next = [], None
        self._verified = [self._at[p] for p in self._at if p >= n_past] if is_draft else []

    def steps_to_fixed(self, n_tokens: int) -> int | None:
        """Steps of one token until a fixed position; None for no limit."""
        return self._every - n_tokens % self._every if self._every else None

    def drop_passing(self, n_read: int, n_tokens: int) -> None:
        """Drops passing states that no text goes back to: those before the last one at or before `n_read`, and those
        that are close to another one. That after `n_tokens` stays."""
        passing = [p for p, state in self._at.items() if not state.rank and p != n_tokens]
        if not passing:
            return
        first = last = next(self.positions(n_read), 0)
        for position in passing:
            if position < first or first < position < last + PASSING_GAP:
                del self._at[position]
            else:
                last = position

    def drop(self, positions: Iterable[int]) -> None:
        """Drops the states at some positions."""
        for position in positions:
            del self._at[position]

    # ---- Forks, rollbacks and ends ----------------------------------------------------------------------------------

    def fork(self, n_tokens: int) -> Trail:
        """Another trail of the first `n_tokens` tokens; passing states are left out."""
        other = Trail(self._slots)
        for position, state in self._at.items():
            if position <= n_tokens and state.slot >= 0 and (state.rank or position == n_tokens):
                other._at[position] = state
        if n_tokens in other._at:
            self._slots.touch(other._at[n_tokens])
        return other

    def truncate(self, n_tokens: int) -> None:
        """Drops the states after `n_tokens`, and those of the next step."""
        for position in [p for p in self._at if p > n_tokens]:
            del self._at[position]
        self._next, self._keeps, self._verified = None, [], []
        self._unnamed = [p for p in self._unnamed if p <= n_tokens]

    def end(self, n_tokens: int) -> None:
        """A turn ends here: its state is kept."""
        state = self._at.get(n_tokens)
        if state is not None:
            state.rank = Rank.END
            self._slots.touch(state)

    def drop_all_passing(self) -> None:
        """Drops passing states but the last one, which is evicted first."""
        passing = [p for p, state in self._at.items() if not state.rank]
        for position in passing[:-1]:
            del self._at[position]

    def publish(self, keys: Sequence[bytes], ids: I32, *, also_passing: bool = False) -> None:
        """Makes states findable by the text before them.

        Args:
            keys: prefix hashes of the text's full pages.
            ids: of the text.
            also_passing: also those of the lowest rank.
        """
        positions = list(self._at) if also_passing else self._unnamed
        for position in positions:
            state, n_pages = self._at.get(position), position // PAGE_POSITIONS
            if state is None or state.name is not None or state.slot < 0 or not 0 < n_pages <= len(keys):
                continue
            name = keys[n_pages - 1], tail_of(ids[n_pages * PAGE_POSITIONS : position])
            self._at[position] = self._slots.publish(state, name)
        self._unnamed = []
