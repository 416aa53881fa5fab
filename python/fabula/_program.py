"""Programs of the native library: operators, batches, and steps that sample; see fb_program in fabula.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fabula._ffi import ffi, lib
from fabula._native import (
    F32,
    I32,
    Device,
    Isa,
    PagePool,
    StatePool,
    Weight,
    check,
    f32,
    floats,
    handle_of,
    i32,
    ints,
    isa_number,
)
from fabula.lean_dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator of a program; fields as in struct fb_op."""

    kind: int
    input: int = -1
    out: int = -1
    residual: int = -1
    factors: int = -1
    width: int = 0
    layer: int = 0
    column: int = 0
    window: int = 0
    heads: int = 0
    activation: int = 0
    flags: int = 0
    weight: Weight | None = None
    vector: F32 | None = None
    vector2: F32 | None = None
    eps: float = 0.0
    scale: float = 1.0
    limit: float = 0.0
    temperature: float = 0.0
    temperature_offset: int = 0
    temperature_length: int = 1
    n_chosen: int = 0
    n_groups: int = 0
    n_top_groups: int = 0
    n_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0


# Numbers of an operator that C takes under the same name.
_OP_FIELDS = (
    *("kind", "out", "residual", "factors", "width", "layer", "column", "window", "heads", "activation", "flags"),
    *("eps", "scale", "limit", "temperature", "temperature_offset", "temperature_length"),
    *("n_chosen", "n_groups", "n_top_groups", "n_heads", "k_dim", "v_dim"),
)


class Heads(NamedTuple):
    """Geometry of attention heads; as in struct fb_heads."""

    n_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    rope: int = 0
    v_in_k: int = 0


class RopeTable(NamedTuple):
    """Angles of rotation; as in struct fb_rope_table: inv_freq float32 [n_pairs], and a factor on cos and sin."""

    inv_freq: F32
    scale: float = 1.0


def conv_floats(width: int, n_taps: int) -> int:
    """Numbers of a state layer of SHORT_CONV: the last n_taps - 1 inputs of each column."""
    return (n_taps - 1) * width


def head_floats(n_heads: int, k_dim: int, v_dim: int) -> int:
    """Numbers of a state layer of DELTA_RULE or SSM: [k_dim, v_dim] of each head, v_dim rounded up to whole vectors."""
    return n_heads * k_dim * (-(-v_dim // 16) * 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the operators of a program share; as in struct fb_program_shape."""

    n_layers: int
    vocab_size: int
    max_tokens: int
    heads: Sequence[Heads]
    ropes: Sequence[RopeTable]
    n_state_layers: int = 0


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """One sequence's share of a batch: pages int32, positions already held, tokens to append; as in fb_sequence.

    With recurrent operators also state slots: the one read (-1: zeros), the one written, and (n_tokens, slot) of states
    that are kept on the way.
    """

    pages: I32
    n_past: int
    tokens: I32
    window: int = 0
    n_sinks: int = 0
    state_in: int = -1
    state_out: int = -1
    keeps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings of one answer for fb_sample: struct fb_sampling, bias and DRY's breakers."""

    settings: Any
    bias_ids: I32
    bias_values: F32
    breakers: I32


@dataclass(frozen=True, slots=True)
class DecodeSequence:
    """One sequence of decode steps, as struct fb_decode_request: up to `n_steps` tokens are sampled, none after one of
    `ends`.

    `history` int32 has room for n_history + n_steps tokens. Its first n_history tokens end with the share's; sampled
    ones are written after them. With n_steps 0 the share is computed and nothing is sampled.
    """

    share: BatchSequence
    n_steps: int
    history: I32
    n_history: int
    ends: I32
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """Graph statistics of a program on a GPU: graphs in memory, recordings, steps replayed, steps launched operator by
    operator; why a step could not be recorded, or ""."""

    is_on: bool
    n_graphs: int
    n_recorded: int
    n_replayed: int
    n_launched: int
    reason: str


class Program:
    """A checked and planned list of operators; see fb_program in fabula.h."""

    def __init__(
        self,
        shape: Shape,
        buffer_widths: Sequence[int],
        ops: Sequence[Op],
        *,
        n_threads: int,
        isa: Isa = "auto",
        device: Device | None = None,
    ) -> None:
        c_shape = ffi.new("struct fb_program_shape *")
        c_shape.struct_size = ffi.sizeof("struct fb_program_shape")
        keep: list[Any] = []
        c_shape.n_layers, c_shape.vocab_size, c_shape.max_tokens = shape.n_layers, shape.vocab_size, shape.max_tokens
        c_shape.n_buffers, c_shape.n_state_layers = len(buffer_widths), shape.n_state_layers
        c_shape.n_geometries, c_shape.n_ropes = len(shape.heads), len(shape.ropes)
        c_shape.heads = c_heads = ffi.new("struct fb_heads[]", list(shape.heads))
        c_shape.ropes = c_ropes = ffi.new("struct fb_rope_table[]", len(shape.ropes))
        keep += [c_heads, c_ropes]
        for c_rope, table in zip(c_ropes, shape.ropes, strict=True):
            keep.append(f32(table.inv_freq))
            c_rope.inv_freq, c_rope.n_pairs, c_rope.scale = floats(keep[-1]), keep[-1].size, table.scale
        c_ops = ffi.new("struct fb_op[]", len(ops))
        for c_op, op in zip(c_ops, ops, strict=True):
            for field in _OP_FIELDS:
                setattr(c_op, field, getattr(op, field))
            setattr(c_op, "in", op.input)
            if op.weight is not None:
                c_op.weight = op.weight.handle
            if op.vector is not None:
                keep.append(f32(op.vector))
                c_op.vector, c_op.vector_length = floats(keep[-1]), keep[-1].size
            if op.vector2 is not None:
                keep.append(f32(op.vector2))
                c_op.vector2, c_op.vector2_length = floats(keep[-1]), keep[-1].size
        widths = i32(buffer_widths)
        out = ffi.new("fb_program **")
        check(
            lib.fb_program_create_on(
                handle_of(device), c_shape, ints(widths), c_ops, len(ops), n_threads, isa_number(isa), out,
            )
        )  # fmt: skip
        self.handle: Any = ffi.gc(out[0], lib.fb_program_free, lib.fb_program_scratch_bytes(out[0]))
        self.shape = shape
        self.n_threads = n_threads
        last = ops[-1].weight if ops else None
        self.n_outputs = last.n_rows if last is not None else 0  # floats of an output row
        self._decode_logits = np.empty(0, np.float32)
        # Borrowed by C: they must live as long as the program.
        self._weights = [op.weight for op in ops if op.weight is not None]

    def pin(self, cpus: Sequence[int]) -> None:
        """Binds the threads of later runs, one CPU for each; see fb_program_pin. Thread 0 is the one that runs it."""
        check(lib.fb_program_pin(self.handle, list(cpus), len(cpus)))

    @property
    def scratch_bytes(self) -> int:
        return int(lib.fb_program_scratch_bytes(self.handle))

    def run(
        self,
        pool: PagePool,
        sequences: Sequence[BatchSequence],
        outputs: npt.ArrayLike,
        *,
        states: StatePool | None = None,
    ) -> F32:
        """Runs one batch; `outputs` are the rows whose logits are wanted; `states` only with recurrent operators.
        Returns float32 [n_rows, self.n_outputs]."""
        tokens = np.concatenate([i32(s.tokens) for s in sequences]) if sequences else np.empty(0, np.int32)
        wanted = i32(outputs)
        c_sequences = ffi.new("struct fb_sequence[]", max(len(sequences), 1))
        pages = [i32(s.pages) for s in sequences]
        keeps = [_keeps(s) for s in sequences]
        for c_sequence, sequence, its_pages, its_keeps in zip(c_sequences, sequences, pages, keeps, strict=False):
            _describe(c_sequence, sequence, its_pages, its_keeps)
        batch = ffi.new("struct fb_batch *")
        batch.struct_size = ffi.sizeof("struct fb_batch")
        batch.n_tokens, batch.tokens = tokens.size, ints(tokens)
        batch.sequences, batch.n_sequences = c_sequences, len(sequences)
        batch.outputs, batch.n_outputs = ints(wanted), wanted.size
        batch.states = _states(states)
        logits = np.empty((wanted.size, self.n_outputs), np.float32)
        check(lib.fb_program_run(self.handle, pool.handle, batch, floats(logits), logits.size))
        return logits

    def decode(
        self,
        pool: PagePool,
        sequences: Sequence[DecodeSequence],
        n_steps: int,
        stop: Any,
        *,
        states: StatePool | None = None,
        state_positions: list[int] | None = None,
    ) -> tuple[list[tuple[I32, F32]], npt.NDArray[np.float64]]:
        """Up to n_steps decode steps; see fb_program_decode. `stop`: int32_t[1] of cffi.

        Args:
            states: only with recurrent operators.
            state_positions: receives, of each sequence, how many tokens the state in its slot state_out has seen; -1
                where a step failed after others and left it undefined.

        Returns:
            The tokens and logprobs of each sequence, and when each step was done, in seconds since the call.
        """
        c_sequences = ffi.new("struct fb_decode_request[]", len(sequences))
        logprobs = np.empty((len(sequences), n_steps), np.float32)
        seconds, n_done = np.empty(n_steps, np.float64), ffi.new("int32_t *")
        keeps = [_keeps(s.share) for s in sequences]
        for i, (c, sequence) in enumerate(zip(c_sequences, sequences, strict=True)):
            sampling = sequence.sampling
            _describe(c.sequence, sequence.share, sequence.share.pages, keeps[i])
            c.n_steps = min(sequence.n_steps, n_steps)
            c.history, c.n_history = ints(sequence.history), sequence.n_history
            c.ends, c.n_ends, c.logprobs = ints(sequence.ends), sequence.ends.size, floats(logprobs[i])
            c.settings, c.breakers, c.n_breakers = sampling.settings, ints(sampling.breakers), sampling.breakers.size
            c.bias_ids, c.n_bias = ints(sampling.bias_ids), sampling.bias_ids.size
            c.bias_values = floats(sampling.bias_values)
        n_logits = len(sequences) * self.n_outputs
        if self._decode_logits.size < n_logits:
            self._decode_logits = np.empty(n_logits, np.float32)
        check(
            lib.fb_program_decode(
                self.handle, pool.handle, _states(states), c_sequences, len(sequences), n_steps, stop,
                floats(self._decode_logits), n_logits, ffi.cast("double *", seconds.ctypes.data), n_done,
            )
        )  # fmt: skip
        if state_positions is not None:
            state_positions[:] = [int(c.state_position) for c in c_sequences]
        sampled = []
        for c, sequence, row in zip(c_sequences, sequences, logprobs, strict=True):
            n = int(c.n_sampled)
            sampled.append((sequence.history[sequence.n_history : sequence.n_history + n].copy(), row[:n]))
        return sampled, seconds[: n_done[0]]

    def set_graphs(self, is_on: bool) -> None:
        """Sets whether steps on a GPU are recorded as graphs and replayed, which is the default; for measurements.

        Raises:
            Unsupported: it runs on the CPU.
        """
        check(lib.fb_program_set_graphs(self.handle, is_on))

    @property
    def graphs(self) -> GraphInfo:
        """Statistics of recorded steps; Unsupported on the CPU."""
        info = ffi.new("struct fb_graph_info *")
        check(lib.fb_program_graph_info(self.handle, info))
        reason = ffi.string(info.reason).decode("utf-8", "replace")
        return GraphInfo(bool(info.is_on), info.n_graphs, info.n_recorded, info.n_replayed, info.n_launched, reason)

    def close(self) -> None:
        ffi.release(self.handle)


def _describe(c: Any, share: BatchSequence, pages: I32, keeps: Any) -> None:
    """Fills a struct fb_sequence; `pages` and `keeps` are the share's, and must live as long as it."""
    c.pages, c.n_pages = ints(pages), pages.size
    c.n_past, c.n_tokens, c.window, c.n_sinks = share.n_past, len(share.tokens), share.window, share.n_sinks
    c.state_in, c.state_out, c.keeps, c.n_keeps = share.state_in, share.state_out, keeps, len(share.keeps)


def _keeps(share: BatchSequence) -> Any:
    return ffi.new("struct fb_state_keep[]", list(share.keeps)) if share.keeps else ffi.NULL


def _states(states: StatePool | None) -> Any:
    return ffi.NULL if states is None else states.handle
