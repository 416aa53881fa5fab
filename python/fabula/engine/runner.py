"""A loaded model for the engine: a program, its page pool, and steps over sequences.

A lock lets one step run at a time. Several callers may have sequences; the scheduler decides which requests a step has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fabula import _native, _program
from fabula.engine.device import CPU, Placement
from fabula.engine.memory import check_memory
from fabula.engine.programs import Programs
from fabula.engine.threads import placing_of
from fabula.errors import ContextOverflow, DeviceOutOfMemory, EngineError, InvalidArgument, Unsupported
from fabula.formats.checkpoint import Checkpoint, DType
from fabula.kv.pages import PagePool, Sequence
from fabula.kv.prefix import EVERYTHING, Window
from fabula.kv.windowed import WindowedLayers
from fabula.models.builder import ProgramBuilder
from fabula.models.decoder import has_head
from fabula.models.description import ModelConfig
from fabula.models.families import family_of
from fabula.models.opening import lay_out, packed_bytes
from fabula.models.precision import Precision, block_of, everywhere
from fabula.models.shares import Shares
from fabula.models.views import viewed

if TYPE_CHECKING:
    from fabula._native import Isa
    from fabula.choices import Bf16Inputs

I32 = npt.NDArray[np.int32]

MAX_POSITIONS = 1 << 24  # of any text: above it f32 cannot represent every integer
PREFILL_CHUNK = 512  # tokens of a step: enough for the matrix kernels, short enough to cancel between steps
DEVICE_CHUNK = 2048  # on a GPU, where each step reads all weights (cuBLASLt: dequantizes them); an estimate
SEQUENCES_AT_FULL_LENGTH = 4  # sequences of full context length that the page pool can hold
SHARE_OF_KV = 0.9  # of a GPU's free memory for pages; the rest is for batches and logits


class Part(NamedTuple):
    """One sequence's share of a step, its pages reserved. The last `n_drafted` of its tokens may be wrong: they do not
    count as positions of the sequence."""

    sequence: Sequence
    share: _program.BatchSequence
    n_tokens: int
    n_drafted: int = 0


class Runner:
    """Program + pages of one model.

    Args:
        checkpoint: an open model; fully read by the constructor.
        weights: format of the packed matrices: one for all, or by each one's entry in the checkpoint.
        kv: formats of K and of V.
        n_threads: threads of every step.
        context: positions a sequence may have; None takes the model's own length.
        kv_memory: bytes of the page pool; None for SEQUENCES_AT_FULL_LENGTH.
        state_memory: bytes of recurrent states; None for `kv.states.DEFAULT_BYTES`.
        drops_windowed: whether KV that no window shows any more is dropped at once, not only when pages run out.
        bf16_inputs: inputs of products with bf16 weights, on the CPU.
        isa: instruction set, for tests.
        placement: where it may run.
        ignore_memory: whether weights are loaded that do not fit the available memory.
        progress: called with (bytes read, bytes in all) while tensors are packed.
        meanwhile: called once while other threads read and pack, which takes most of the time.
        pins: whether each thread is bound to a CPU of its own.

    Attributes:
        bf16_inputs: "bf16" or "f32"; None without bf16 weights and on a GPU.

    Raises:
        ModelFileError, Unsupported: the checkpoint is damaged or of an unknown kind.
        OutOfMemory: the weights do not fit the available memory; nothing was read.
        DeviceOutOfMemory: it does not fit the requested GPU; all of its memory was freed.
        Unsupported: also for `drops_windowed`, and `bf16_inputs` other than "auto", on a GPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        weights: DType | Precision,
        kv: tuple[DType, DType],
        n_threads: int,
        context: int | None = None,
        kv_memory: int | None = None,
        state_memory: int | None = None,
        drops_windowed: bool = False,
        bf16_inputs: Bf16Inputs = "auto",
        isa: Isa = "auto",
        progress: Callable[[int, int], None] | None = None,
        placement: Placement = CPU,
        meanwhile: Callable[[], None] | None = None,
        pins: bool = False,
        ignore_memory: bool = False,
    ) -> None:
        family = family_of(checkpoint.config, checkpoint.path)
        self.config: ModelConfig = family.read(checkpoint.config, checkpoint.path)
        config = self.config
        checkpoint = viewed(checkpoint, config)
        if context is not None and not 1 <= context <= 1 << 24:
            raise InvalidArgument(f"context is {context}, must be 1 .. 2^24")
        self.context = context or config.context_length
        precision = everywhere(weights) if isinstance(weights, DType) else weights
        shares = Shares(config, placement.n_devices, block_of(checkpoint, precision, "mlp.down_proj.weight"))
        if placement.is_cpu and not ignore_memory:
            check_memory(packed_bytes(checkpoint, precision, config, shares), checkpoint.path.name)
        inputs = _native.inputs_of_bf16(bf16_inputs, isa)
        places = placing_of(n_threads, pins)
        builder = ProgramBuilder(checkpoint, precision, n_threads, shares, progress, places, f32_inputs=inputs == "f32")
        ropes = lay_out(builder, config, self.context)
        self._headless = "" if has_head(checkpoint, config) else checkpoint.path.name
        self.weight_bytes = sum(weight.n_bytes for weight in builder.weights)
        page_bytes = _native.page_bytes(kv, config.kv_layers)
        text_pages = -(-self.context // _native.PAGE_POSITIONS)
        buffer_bytes = 4 * min(DEVICE_CHUNK, self.context) * sum(map(sum, builder.widths))
        self.device = placement.choose(self.weight_bytes + buffer_bytes + (kv_memory or text_pages * page_bytes))
        if self.device is None and not (placement.is_cpu or ignore_memory):
            check_memory(self.weight_bytes, checkpoint.path.name)
        if self.device is not None and any(weight.dtype == DType.MXFP4 for weight in builder.weights):
            raise Unsupported("weights in MXFP4 run on the CPU only: load the model with --weights q4, or on the CPU")
        if drops_windowed and self.device is not None:
            raise Unsupported(
                'window_kv="drop" needs the CPU: a GPU holds the KV of all layers of a page, so load it with "keep"'
            )
        if bf16_inputs != "auto" and self.device is not None:
            raise Unsupported(
                f'bf16_inputs="{bf16_inputs}" needs the CPU: a GPU rounds in its own way, so leave "auto"'
            )
        has_bf16 = any(weight.dtype == DType.BF16 for weight in builder.weights)
        self.bf16_inputs = inputs if has_bf16 and self.device is None else None
        self.max_tokens = min(PREFILL_CHUNK if self.device is None else DEVICE_CHUNK, self.context)
        self.products = "own" if self.device is None else placement.products
        shape = _program.Shape(
            n_layers=len(config.kv_layers),
            vocab_size=config.vocab_size,
            max_tokens=self.max_tokens,
            heads=shares.geometries(config),
            ropes=ropes,
            n_state_layers=len(config.state_layers),
        )
        try:
            builder.pack(self.device.members if self.device else (), meanwhile)
            self._programs = Programs(builder, config, shape, isa, self.device)
            self.program = self._programs.program()
            windowed = WindowedLayers.of(config.kv_windows)
            text_bytes = text_pages * page_bytes
            if drops_windowed:
                text_bytes = windowed.text_bytes(kv, config.kv_layers, text_pages, self.max_tokens)
            n_pages = -(-SEQUENCES_AT_FULL_LENGTH * text_bytes // page_bytes)
            if kv_memory is not None:
                n_pages = max(1, kv_memory // page_bytes)
            elif self.device is not None:
                part_bytes = _native.page_bytes(kv, shares.kv_layers(config))
                free = min(member.memory()[1] for member in self.device.members)
                n_pages = min(n_pages, max(1, int(SHARE_OF_KV * free) // part_bytes))
            self.pool = PagePool(
                kv,
                n_pages,
                config.kv_layers,
                self.device,
                windowed=windowed,
                drops=drops_windowed,
                state_floats=config.state_layers,
                state_memory=state_memory,
            )
            self._states = self.pool.states.native if self.pool.states is not None else None
        except DeviceOutOfMemory as error:
            raise DeviceOutOfMemory(
                f"{error}; load it with smaller weights, a shorter context or less kv_memory, or on the CPU",
                status=error.status,
            ) from None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    def check_head(self) -> None:
        """Raises Unsupported if the model has no output head, so no logits."""
        if self._headless:
            raise Unsupported(
                f"{self._headless} was saved without a head (it has no lm_head.weight and is not tied): it gives"
                " embeddings and cannot continue a text"
            )

    def token_ids(self, ids: object) -> I32:
        """Converts token ids of user input to int32 [n].

        Raises:
            InvalidArgument: not a sequence of whole numbers, empty, or an id outside the vocabulary.
        """
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise InvalidArgument(f"token ids must be a sequence of whole numbers, not {type(ids).__name__}")
        values = list(ids)
        if not values:
            raise InvalidArgument("the prompt is empty: give at least one token")
        for kind in {type(value) for value in values}:
            if kind is bool or not issubclass(kind, int | np.integer):
                raise InvalidArgument(f"token ids must be whole numbers, not {kind.__name__}")
        low, high = min(values), max(values)
        if low < 0 or high >= self.config.vocab_size:
            outside = low if low < 0 else high
            raise InvalidArgument(f"token id {outside} is outside the vocabulary of {self.config.vocab_size}")
        return np.asarray(values, np.int32)

    def sequence(self, window: Window = EVERYTHING) -> Sequence:
        """A new, empty sequence in this model's pool."""
        return Sequence(self.pool, window)

    def room(self, n_tokens: int, window: Window = EVERYTHING) -> int:
        """Tokens that fit after `n_tokens` others: up to the context length, or MAX_POSITIONS where a window slides."""
        slides = window.slides and not self.config.n_positions  # learned positions end with their table
        return (MAX_POSITIONS if slides else self.context) - n_tokens

    def check_room(self, n_tokens: int, window: Window = EVERYTHING) -> None:
        """Raises ContextOverflow unless a text of `n_tokens` fits."""
        if self.room(n_tokens, window) < 0:
            raise ContextOverflow(
                f"{n_tokens} tokens do not fit the context of {self.context}", n_tokens=n_tokens, context=self.context
            )

    def step(
        self, parts: list[tuple[Sequence, npt.NDArray[np.int32]]], outputs: npt.ArrayLike
    ) -> npt.NDArray[np.float32]:
        """One batch: appends tokens to sequences and returns logits, float32 [n_outputs, vocab_size].

        Args:
            parts: sequences, each with token ids to append, int32 [n]; at most `max_tokens` in all.
            outputs: rows of the batch to return logits of, ascending.

        Raises:
            ContextOverflow: a sequence would grow beyond the context; nothing was changed.
            OutOfMemory: no free pages; nothing was changed.
            NonFinite: the logits are not finite; the sequences keep their length.
            InvalidArgument: the model was closed.
        """
        return self.run([self.prepare(sequence, tokens) for sequence, tokens in parts], outputs)

    def prepare(
        self, sequence: Sequence, tokens: I32, n_more: int = 0, n_drafted: int = 0, keeps: Iterable[int] = ()
    ) -> Part:
        """Reserves pages for the tokens of the next step, the last ones perhaps drafted, and for `n_more` after them;
        with recurrent layers, states too, also those at the positions `keeps`.

        Raises:
            ContextOverflow: the sequence would grow beyond the context; nothing was changed.
            OutOfMemory: no free pages; nothing was changed.
        """
        end = sequence.n_tokens + len(tokens) + n_more
        self.check_room(end, sequence.window)
        pages = sequence.reserve(end)
        window = sequence.window
        states = sequence.reserve_state(len(tokens), keeps)
        share = _program.BatchSequence(
            pages, sequence.n_tokens, tokens, window.size, window.n_sinks, *(states if states is not None else ())
        )
        return Part(sequence, share, len(tokens), n_drafted)

    def run(
        self, parts: list[Part], outputs: npt.ArrayLike, program: _program.Program | None = None
    ) -> npt.NDArray[np.float32]:
        """One batch of prepared parts; arguments, results and errors as `step`.

        Args:
            program: None for the model's own.
        """
        with self._in_use():
            shares = [part.share for part in parts]
            logits = (program or self.program).run(self.pool.native, shares, outputs, states=self._states)
        for part in parts:
            part.sequence.advance(part.n_tokens, part.n_drafted)
        return logits

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Guards a native call: one at a time, and none after `close`."""
        if os.getpid() != self._pid:  # fork copies neither threads nor the state of their locks
            raise EngineError("the process was forked after the model was loaded: load it in the child, or use spawn")
        with self._lock:
            if self._closed:  # the native memory was freed
                raise InvalidArgument("the model is closed")
            yield

    def decode(
        self, inputs: list[tuple[Sequence, _program.DecodeSequence]], n_steps: int, stop: _native.Flag
    ) -> tuple[list[tuple[I32, npt.NDArray[np.float32]]], npt.NDArray[np.float64]]:
        """Up to `n_steps` steps that compute the sequences' pending tokens and sample their next ones.

        Args:
            inputs: sequences with their pages reserved (`prepare`), and the input for each.
            n_steps: 1 or more.
            stop: ends the call after a step when it is set.

        Returns:
            Tokens and logprobs of each sequence, and the end of each step, in seconds since the call. The length of a
            sequence is what it computed: all but the last sampled token. One that could not sample is unchanged, and so
            is the length of one with recurrent layers where a later step failed.

        Raises:
            NonFinite, InvalidArgument: as `run`; nothing was sampled.
        """
        with self._in_use():
            positions: list[int] = []
            sampled, seconds = self.program.decode(
                self.pool.native,
                [one for _, one in inputs],
                n_steps,
                stop.memory,
                states=self._states,
                state_positions=positions,
            )
        for (sequence, given), (tokens, _), position in zip(inputs, sampled, positions, strict=True):
            if position < 0 and self._states is not None:
                continue  # a later step failed: what was sampled before it is computed again
            if given.n_steps == 0:
                sequence.advance(len(given.share.tokens))
            elif len(tokens):
                sequence.advance(len(given.share.tokens) - 1 + len(tokens))
        return sampled, seconds

    def another_program(self) -> _program.Program:
        """Another program with the current settings of the device; it shares the weights and has its own buffers."""
        return self._programs.program()

    def hidden_program(self, max_tokens: int) -> _program.Program:
        """A program with hidden states as output rows, float32 [hidden_size], for up to `max_tokens` tokens."""
        return self._programs.hidden_program(max_tokens)

    def prefill(self, sequence: Sequence, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Appends a prompt in prefill chunks and returns the last token's logits, float32 [vocab_size].

        Raises:
            ContextOverflow: before anything is computed.
        """
        self.check_room(sequence.n_tokens + len(tokens), sequence.window)
        logits = np.empty((0, 0), np.float32)
        for start, chunk in self._chunks(tokens):
            last = start + len(chunk) == len(tokens)
            logits = self.step([(sequence, chunk)], [len(chunk) - 1] if last else [])
        scores: npt.NDArray[np.float32] = logits[0]
        return scores

    def all_logits(self, tokens: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.float32]]:
        """Yields the logits of every token of a text, chunk by chunk, float32 [<= max_tokens, vocab_size]."""
        with self.sequence() as sequence:
            self.check_room(len(tokens))
            for _, chunk in self._chunks(tokens):
                yield self.step([(sequence, chunk)], np.arange(len(chunk)))

    def _chunks(self, tokens: npt.NDArray[np.int32]) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        for start in range(0, len(tokens), self.max_tokens):
            yield start, tokens[start : start + self.max_tokens]

    def close(self) -> None:
        """Waits for the running step, then frees program, weights and pages; may be called twice."""
        with self._lock:
            self._closed = True
            self.program.close()
            self.pool.close()
