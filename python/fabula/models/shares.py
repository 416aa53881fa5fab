"""Tensor parallelism: which rows and columns of each matrix a device holds.

    q, k, v     rows, by heads; with fewer KV heads than devices, adjacent devices hold the same head
    o           columns, matching the heads
    gate, up    rows;  down: columns, matching these rows
    head        rows of the vocabulary
    others      replicated, the embedding included

So a layer needs two all-reduces, after o and after down. Quantized matrices are split at block boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fabula._native import KvLayer
from fabula._program import Heads
from fabula.errors import InvalidArgument, Unsupported
from fabula.models.description import ModelConfig


class Axis(NamedTuple):
    """The rows or columns of a matrix: their number, and the range of each device."""

    size: int
    shares: tuple[range, ...]


def widths(axes: Sequence[Axis]) -> list[int]:
    """Each device's total share of several axes."""
    return [sum(map(len, ranges)) for ranges in zip(*(axis.shares for axis in axes), strict=True)]


def whole(size: int, n: int) -> Axis:
    """An axis replicated on n devices."""
    return Axis(size, (range(size),) * n)


def alike(size: int, n: int) -> Axis:
    """Shares of equal length, as fb_program_join needs; if n does not divide the size, the last ones overlap."""
    share = -(-size // n)
    return Axis(size, tuple(range(first, first + share) for first in (min(i * share, size - share) for i in range(n))))


class Shares:
    """The axes of a model's matrices.

    Args:
        config: of the model.
        n: number of devices.
        block: `down` is split at multiples of this many columns.

    Attributes:
        n_heads, n_kv_heads: per device.
        hidden, vocabulary: axes.

    Raises:
        InvalidArgument: heads, KV heads or blocks cannot be split over n devices.
        Unsupported: several devices, and a model other than Llama's decoder.
    """

    def __init__(self, config: ModelConfig, n: int = 1, block: int = 1) -> None:
        self.n = n
        self.hidden = whole(config.hidden_size, n)
        self.vocabulary = alike(config.vocab_size, n)
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        if n == 1:
            return
        if config.differences:
            raise Unsupported(
                f"tensor_parallel is {n}: not offered for a {config.model_type} with {config.differences}"
            )
        if config.n_heads % n:
            raise _misfit(n, f"{config.n_heads} heads cannot be divided by {n}")
        if config.n_kv_heads % n and n % config.n_kv_heads:
            raise _misfit(n, f"{config.n_kv_heads} KV heads are neither a multiple of {n} nor a divisor of it")
        if config.intermediate_size // block < n:
            raise _misfit(n, f"{config.intermediate_size} columns of down_proj in blocks of {block} are too few")
        self.n_heads, self.n_kv_heads = config.n_heads // n, max(1, config.n_kv_heads // n)
        self._block = block

    def heads(self, n_all: int, dim: int) -> Axis:
        """The axis of query or KV heads of width `dim`."""
        if self.n == 1:
            return whole(n_all * dim, 1)
        n_each = max(1, n_all // self.n)
        firsts = [i * n_all // self.n for i in range(self.n)]
        return Axis(n_all * dim, tuple(range(f * dim, (f + n_each) * dim) for f in firsts))

    def geometries(self, config: ModelConfig) -> tuple[Heads, ...]:
        """A device's head geometries, in the order of the model's."""
        if self.n == 1:
            return config.geometries
        return tuple(heads._replace(n_heads=self.n_heads, n_kv_heads=self.n_kv_heads) for heads in config.geometries)

    def kv_layers(self, config: ModelConfig) -> tuple[KvLayer, ...]:
        """What a device's share of a KV page holds."""
        if self.n == 1:
            return config.kv_layers
        return tuple(layer._replace(n_kv_heads=self.n_kv_heads) for layer in config.kv_layers)

    def inner(self, size: int) -> Axis:
        """The axis between the two matrices of an MLP of that size."""
        if self.n == 1:
            return whole(size, 1)
        n_blocks = size // self._block
        cuts = [i * n_blocks // self.n * self._block for i in range(self.n)] + [size]
        return Axis(size, tuple(range(cuts[i], cuts[i + 1]) for i in range(self.n)))


def _misfit(n: int, problem: str) -> InvalidArgument:
    return InvalidArgument(f"tensor_parallel is {n}: the model's {problem}")


def check_columns(name: str, columns: Axis, block: int) -> None:
    """Raises InvalidArgument unless every device gets whole blocks of the matrix `name`."""
    n = len(columns.shares)
    for share in columns.shares:
        if (share.start % block or share.stop % block) and len(share) < columns.size:
            raise _misfit(
                n, f"tensor {name!r} would be cut at columns {share.start} and {share.stop}, in blocks of {block}"
            )
