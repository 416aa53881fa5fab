"""Windowed layers: which of them a page pool has, and from which page on their KV is still seen.

In Gemma 3 five of six layers attend to a window of 512 or 1,024 positions. Of a long text, their keys and values left
of that window are dead as long as the text only grows: only a rollback asks for them again. So a page has two parts,
the KV of its windowed layers and that of all others, and the first can be dropped alone (`PagePool.drop`). A text whose
windowed KV was dropped can go on at its end; at an earlier position it is recomputed, to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from fabula._native import PAGE_POSITIONS, KvDTypes, KvLayer, page_bytes
from fabula.lean_dataclasses import dataclass

# Positions at the end of a sequence that may be removed again without recomputing anything: 32 pieces that nobody read
# (READ_AHEAD of a request) and 32 steps of one native call (MAX_STEPS of the scheduler).
TAKE_BACK = 64
MOST_IDS = 8  # page numbers of a pool, per page that fits its memory: bounds the address space that is reserved


@dataclass(frozen=True, slots=True)
class WindowedLayers:
    """The layers of a pool whose KV is seen through windows only; none by default.

    Attributes:
        layers: their indices in the pool, ascending.
        size: the widest window, the token's own position included; 0 for none.
        chunks: lengths of the chunks that positions are cut into, in chunked layers.
    """

    layers: tuple[int, ...] = ()
    size: int = 0
    chunks: tuple[int, ...] = ()

    @classmethod
    def of(cls, readers: Iterable[Iterable[tuple[int, bool]]]) -> WindowedLayers:
        """From `ModelConfig.kv_windows`: for each layer of the pool, size and kind of the windows that read it."""
        layers: list[int] = []
        windows: set[tuple[int, bool]] = set()
        for layer, each in enumerate(readers):
            own = set(each)
            if own and all(size for size, _ in own):
                layers.append(layer)
                windows |= own
        sizes = [size for size, chunked in windows if not chunked]
        return cls(tuple(layers), max(sizes, default=0), tuple(sorted(size for size, chunked in windows if chunked)))

    def __bool__(self) -> bool:
        return bool(self.layers)

    def runs(self) -> list[tuple[int, int]]:
        """Consecutive layers as (first, count)."""
        groups = groupby(enumerate(self.layers), lambda pair: pair[1] - pair[0])
        runs = [[layer for _, layer in group] for _, group in groups]
        return [(run[0], len(run)) for run in runs]

    def first_visible(self, position: int) -> int:
        """The lowest position that some windowed layer shows to a token at `position`."""
        lows = [position // chunk * chunk for chunk in self.chunks]
        if self.size:
            lows.append(max(0, position - self.size + 1))
        return min(lows, default=0)

    def first_page(self, n_tokens: int) -> int:
        """The first page of which a token after `n_tokens` others, or any later one, sees windowed KV."""
        return self.first_visible(n_tokens) // PAGE_POSITIONS

    def most_pages(self, n_step: int) -> int:
        """Pages with windowed KV that a sequence needs at most while steps append `n_step` tokens each, if the rest is
        dropped."""
        reach = max(self.size, *self.chunks, 0) + TAKE_BACK + n_step
        return -(-reach // PAGE_POSITIONS) + 1

    def part_bytes(self, dtypes: KvDTypes, layers: Sequence[KvLayer]) -> int:
        """Bytes of the windowed part of a page.

        Args:
            dtypes: of K and V.
            layers: all layers of the pool.
        """
        own = [layers[i] for i in self.layers]
        return page_bytes(dtypes, own) if own else 0

    def text_bytes(self, dtypes: KvDTypes, layers: Sequence[KvLayer], n_pages: int, n_step: int) -> int:
        """Bytes that a text takes at most if its dead windowed KV is dropped.

        Args:
            dtypes, layers: as `part_bytes`.
            n_pages: of the whole text.
            n_step: tokens of a step at most.
        """
        part = self.part_bytes(dtypes, layers)
        return n_pages * (page_bytes(dtypes, layers) - part) + min(n_pages, self.most_pages(n_step)) * part


NONE_WINDOWED = WindowedLayers()
