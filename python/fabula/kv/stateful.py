"""What a sequence does with recurrent states. Without recurrent layers it has none, and nothing here does anything."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fabula._native import PAGE_POSITIONS
from fabula.kv.states import State, StateShare, Trail

if TYPE_CHECKING:
    from fabula.kv.pages import PagePool


class Stateful:
    """The part of `kv.pages.Sequence` that is about states; attributes as there."""

    pool: PagePool
    n_tokens: int
    trail: Trail | None
    _pages: list[int]

    @abstractmethod
    def _visible(self, n_tokens: int) -> int:
        """Defined by `kv.pages.Sequence`."""

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def reserve_state(self, n_new: int, also: Iterable[int] = ()) -> StateShare | None:
        """Reserves slots for the states of a step; None without recurrent layers.

        Args:
            n_new: tokens of the step.
            also: positions in it whose states are kept, beside those that always are.

        Raises:
            OutOfMemory: no slot is free, nor can be evicted.
        """
        if self.trail is None:
            return None
        with self.pool.lock:
            return self.trail.reserve(self.n_tokens, n_new, also)

    def advance(self, n_computed: int, n_drafted: int = 0) -> None:
        """Counts the positions that a step has computed; the last `n_drafted` may be wrong and do not count."""
        if self.trail is not None:
            with self.pool.lock:
                self.trail.advance(self.n_tokens, self.n_tokens + n_computed, is_draft=n_drafted > 0)
        self.n_tokens += n_computed - n_drafted

    def drop_passing(self, n_read: int) -> None:
        """Drops states of steps that no reader goes back to, who has read `n_read` tokens."""
        if self.trail is not None:
            with self.pool.lock:
                self.trail.drop_passing(n_read, self.n_tokens)

    def _drop_hidden_states(self) -> None:
        """Drops states after which a token would see pages that were released."""
        if self.trail is not None:
            self.trail.drop([s.position for s in self.trail.states() if self._visible(s.position) < s.position])

    # ---- What is kept -----------------------------------------------------------------------------------------------

    def keep_states(self, *marks: int) -> None:
        """Keeps states at fixed positions from now on, and at `marks`, where a text may go on another time."""
        if self.trail is not None:
            with self.pool.lock:
                self.trail.keep(*marks)

    def publish_states(self, keys: Items[bytes], ids: npt.NDArray[np.int32], *, also_passing: bool) -> None:
        """Makes its states findable; see `Trail.publish`."""
        if self.trail is not None:
            with self.pool.lock:
                self.trail.publish(keys, ids, also_passing=also_passing)

    def add_states(self, states: Iterable[State]) -> None:
        """Adds states of its text that other sequences have."""
        if self.trail is not None:
            with self.pool.lock:
                self.trail.add(*(state for state in states if state.position <= self.n_tokens))

    # ---- What it has ------------------------------------------------------------------------------------------------

    def states(self) -> list[State]:
        """The states that a text can go on from, in order; none without recurrent layers."""
        if self.trail is None:
            return []
        with self.pool.lock:
            return [state for state in self.trail.states() if self._visible(state.position) == state.position]

    def states_in_use(self) -> Iterable[State]:
        """Those that it needs to go on. The caller holds the pool's lock."""
        return self.trail.in_use(self.n_tokens) if self.trail is not None else ()

    def held_states(self) -> list[State]:
        """All whose slots it holds; for tests."""
        return self.trail.held() if self.trail is not None else []

    def has_state(self, state: State) -> bool:
        """Whether it has a state, and all that tokens after it see."""
        return self.trail is not None and self.trail.has(state) and self._visible(state.position) == state.position

    def read_state(self, state: State) -> npt.NDArray[np.uint8]:
        """A copy of a state that it has, as it is written to disk: the page that the state ends in, zeros where that is
        full, and its slot. uint8 [state_record_bytes]. The caller holds the pool's lock."""
        pool = self.pool
        assert pool.states is not None
        data = np.zeros(pool.state_record_bytes, np.uint8)
        if state.position % PAGE_POSITIONS:
            data[: pool.page_bytes] = pool.read(self._pages[state.position // PAGE_POSITIONS])
        data[pool.page_bytes :] = pool.states.read(state)
        return data
