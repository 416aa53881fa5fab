"""The caller of the native library, beside `_operators`: numpy arrays in and out, status codes become exceptions.

Nothing here decides anything. Every function checks only what C cannot see (dtype, contiguity, lifetime) and leaves
ranges and shapes to the library, whose message becomes the exception's text. Handles are wrapped in small classes
that free themselves once, on close() or with the garbage collector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fabula._ffi import ffi, lib
from fabula.errors import (
    DeviceError,
    DeviceOutOfMemory,
    EngineError,
    InvalidArgument,
    NonFinite,
    OutOfMemory,
    Unsupported,
)

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Isa = Literal[
    "auto", "reference", "avx2", "avx512", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_amx",
    "neon", "neon_dotprod", "neon_i8mm",
]  # fmt: skip

PAGE_POSITIONS: int = lib.FB_PAGE_POSITIONS

_ERRORS: dict[int, type[EngineError]] = {
    lib.FB_INVALID_ARGUMENT: InvalidArgument,
    lib.FB_OUT_OF_MEMORY: OutOfMemory,
    lib.FB_UNSUPPORTED: Unsupported,
    lib.FB_NON_FINITE: NonFinite,
    lib.FB_DEVICE_FAILED: DeviceError,
    lib.FB_DEVICE_MEMORY: DeviceOutOfMemory,
}
_ISAS: dict[str, int] = {
    "auto": lib.FB_ISA_AUTO,
    "reference": lib.FB_ISA_REFERENCE,
    "avx2": lib.FB_ISA_AVX2,
    "avx512": lib.FB_ISA_AVX512,
    "avx512_vnni": lib.FB_ISA_AVX512_VNNI,
    "avx_vnni": lib.FB_ISA_AVX_VNNI,
    "avx512_bf16": lib.FB_ISA_AVX512_BF16,
    "neon": lib.FB_ISA_NEON,
    "neon_dotprod": lib.FB_ISA_NEON_DOTPROD,
    "neon_i8mm": lib.FB_ISA_NEON_I8MM,
    "avx512_amx": lib.FB_ISA_AVX512_AMX,
}


def check(status: int) -> None:
    """Raises the exception of a status other than FB_OK."""
    if status != lib.FB_OK:
        message = ffi.string(lib.fb_last_error()).decode("utf-8", "replace")
        raise _ERRORS.get(status, EngineError)(message, status=status)


def isa_number(name: str) -> int:
    try:
        return _ISAS[name]
    except KeyError:
        raise InvalidArgument(f"isa is {name!r}, must be one of {', '.join(_ISAS)}") from None


def _f32(array: npt.ArrayLike) -> F32:
    return np.ascontiguousarray(array, dtype=np.float32)


def _i32(array: npt.ArrayLike) -> I32:
    return np.ascontiguousarray(array, dtype=np.int32)


def floats(array: F32 | None) -> Any:
    return ffi.NULL if array is None else ffi.cast("float *", array.ctypes.data)


def ints(array: I32) -> Any:
    return ffi.cast("int32_t *", array.ctypes.data)


class Flag:
    """A number that a running call of the library looks at between its steps; any thread may set it."""

    def __init__(self) -> None:
        self.memory = ffi.new("int32_t[1]")

    def set(self) -> None:
        self.memory[0] = 1

    def clear(self) -> None:
        self.memory[0] = 0


def isa_available(name: Isa) -> bool:
    """Whether this CPU and build can run the kernels of `name`."""
    return bool(lib.fb_isa_available(isa_number(name)))


def isa_best() -> str:
    """The instruction set that "auto" stands for here."""
    best = lib.fb_isa_best()
    return next(name for name, value in _ISAS.items() if value == best)


# ---- Number formats ----------------------------------------------------------------------------------------


def dtype_block(dtype: int) -> tuple[int, int]:
    """(elements, bytes) of one block of a dtype; (0, 0) for an unknown one."""
    return lib.fb_dtype_block_size(dtype), lib.fb_dtype_block_bytes(dtype)


def join_strings(data: bytearray, start: int, most: int, max_length: int, out: bytearray) -> tuple[int, int, int]:
    """Strings of a GGUF header from byte `start` on, one after the other into `out`, as long as `data`; how many, the
    bytes they take of `data` and of `out`. See fb_join_strings."""
    sizes = ffi.new("size_t[3]")
    with ffi.from_buffer(data) as source, ffi.from_buffer(out, require_writable=True) as target:
        n_bytes = min(len(data), len(out)) - start
        check(lib.fb_join_strings(source + start, n_bytes, most, max_length, target, sizes, sizes + 1, sizes + 2))
    return sizes[0], sizes[1], sizes[2]


def dequantize(dtype: int, raw: npt.NDArray[np.uint8], n_elements: int) -> F32:
    """Turns raw bytes of any dtype into float32 [n_elements]."""
    raw = np.ascontiguousarray(raw, dtype=np.uint8)
    out = np.empty(n_elements, np.float32)
    check(lib.fb_dequantize(dtype, ffi.cast("void *", raw.ctypes.data), raw.nbytes, n_elements, floats(out)))
    return out


def quantize(dtype: int, rows: F32, n_threads: int = 1) -> npt.NDArray[np.uint8]:
    """Turns float32 [n_rows, n_cols] into raw bytes of any dtype, uint8 [n_bytes]; see fb_quantize."""
    rows = _f32(rows)
    n_rows, n_cols = rows.shape
    size, n_bytes = dtype_block(dtype)
    out = np.empty(rows.size // size * n_bytes if size else 0, np.uint8)
    check(
        lib.fb_quantize(dtype, floats(rows), n_rows, n_cols, n_threads, ffi.cast("void *", out.ctypes.data), out.nbytes)
    )
    return out


# ---- Devices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU: number, name, compute capability such as "9.0", memory in bytes; emulated: kernels run on the CPU."""

    index: int
    name: str
    compute: str
    n_processors: int
    memory_bytes: int
    free_bytes: int
    is_emulated: bool


def device_count() -> int:
    """How many GPUs this machine has.

    Raises:
        Unsupported: a build without CUDA.
        DeviceError: no driver, one that is too old, or no GPU.
    """
    n = ffi.new("int32_t *")
    check(lib.fb_device_count(n))
    return int(n[0])


def device_info(index: int) -> DeviceInfo:
    """What a GPU is. Asking wakes it up, which takes some of its memory."""
    info = ffi.new("struct fb_device_info *")
    check(lib.fb_device_describe(index, info))
    name = ffi.string(info.name).decode("utf-8", "replace")
    compute = f"{info.compute_major}.{info.compute_minor}"
    return DeviceInfo(
        index, name, compute, info.n_processors, info.memory_bytes, info.free_bytes, bool(info.is_emulated)
    )


class Device:
    """A GPU to put weights, pages and programs on; see fb_device in fabula.h.

    Args:
        index: its number.
        memory: bytes that all of them may take; None for what is free.
    """

    def __init__(self, index: int, memory: int | None = None) -> None:
        out = ffi.new("fb_device **")
        check(lib.fb_device_open(index, memory or 0, out))
        self.handle: Any = ffi.gc(out[0], lib.fb_device_free)
        self.info = device_info(index)
        self.name = f"cuda:{index}"

    @property
    def members(self) -> tuple[Device, ...]:
        """The GPUs that it is: itself."""
        return (self,)

    def use_library(self, path: str | None) -> None:
        """Lets programs made from now on compute products of many tokens with cuBLASLt; see fb_device_use_library.

        Raises:
            Unsupported: it cannot be loaded, or this build does not know it.
        """
        check(lib.fb_device_use_library(self.handle, ffi.NULL if path is None else path.encode()))

    def memory(self) -> tuple[int, int]:
        """Bytes taken through this handle, and those that may still be taken."""
        used, free = ffi.new("size_t *"), ffi.new("size_t *")
        check(lib.fb_device_memory(self.handle, used, free))
        return int(used[0]), int(free[0])


def _handle(device: Device | None) -> Any:
    return ffi.NULL if device is None else device.handle


# ---- Weights -----------------------------------------------------------------------------------------------


class Weight:
    """A packed matrix [n_rows, n_cols]; see fb_weight in fabula.h. Immutable once packed, shared freely."""

    def __init__(self, dtype: int, n_rows: int, n_cols: int) -> None:
        out = ffi.new("fb_weight **")
        check(lib.fb_weight_create(dtype, n_rows, n_cols, out))
        self.handle: Any = ffi.gc(out[0], lib.fb_weight_free, lib.fb_weight_bytes(out[0]))
        self.dtype, self.n_rows, self.n_cols = dtype, n_rows, n_cols

    @property
    def n_bytes(self) -> int:
        return int(lib.fb_weight_bytes(self.handle))

    @property
    def n_non_finite(self) -> int:
        """Elements packed so far that are NaN or infinite in this format."""
        return int(lib.fb_weight_non_finite(self.handle))

    def pack_rows(
        self,
        raw: npt.NDArray[np.uint8],
        dtype: int,
        n_rows: int,
        *,
        first_row: int = 0,
        row_block: int = 1,
        row_step: int = 1,
        n_threads: int = 1,
    ) -> None:
        """Packs rows given as the raw bytes of a row-major matrix of any dtype; see fb_weight_pack_rows."""
        raw = np.ascontiguousarray(raw, dtype=np.uint8)
        check(
            lib.fb_weight_pack_rows(
                self.handle, first_row, row_block, row_step, dtype,
                ffi.cast("void *", raw.ctypes.data), raw.nbytes, n_rows, n_threads,
            )
        )  # fmt: skip

    def move(self, device: Device) -> None:
        """Moves it to a GPU, whose programs alone take it from then on."""
        check(lib.fb_weight_move(self.handle, device.handle))

    def row(self, index: int) -> F32:
        """Row `index` as float32 [n_cols]."""
        out = np.empty(self.n_cols, np.float32)
        check(lib.fb_weight_unpack_row(self.handle, index, floats(out)))
        return out


# ---- KV pages ----------------------------------------------------------------------------------------------


KvDTypes = int | tuple[int, int]  # of K and V, or of each


def of_k_and_v(dtypes: KvDTypes) -> tuple[int, int]:
    return dtypes if isinstance(dtypes, tuple) else (dtypes, dtypes)


class PagePool:
    """Bytes of KV pages; see fb_page_pool in fabula.h. Which page belongs to whom is decided in fabula.kv."""

    def __init__(
        self,
        dtypes: KvDTypes,
        n_pages: int,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        device: Device | None = None,
    ) -> None:
        out = ffi.new("fb_page_pool **")
        check(
            lib.fb_page_pool_create_on(
                _handle(device), *of_k_and_v(dtypes), n_pages, n_layers, n_kv_heads, head_dim, out
            )
        )
        self.handle: Any = ffi.gc(out[0], lib.fb_page_pool_free)
        self.n_pages = n_pages
        self.page_bytes = int(lib.fb_page_bytes(self.handle))

    def copy(self, dst: int, src: int) -> None:
        check(lib.fb_page_copy(self.handle, dst, src))

    def zero(self, page: int) -> None:
        check(lib.fb_page_zero(self.handle, page))

    def read(self, page: int) -> npt.NDArray[np.uint8]:
        out = np.empty(self.page_bytes, np.uint8)
        check(lib.fb_page_read(self.handle, page, ffi.cast("void *", out.ctypes.data), out.nbytes))
        return out

    def write(self, page: int, raw: npt.NDArray[np.uint8]) -> None:
        raw = np.ascontiguousarray(raw, dtype=np.uint8)
        check(lib.fb_page_write(self.handle, page, ffi.cast("void *", raw.ctypes.data), raw.nbytes))

    def close(self) -> None:
        ffi.release(self.handle)


def page_bytes(dtypes: KvDTypes, n_layers: int, n_kv_heads: int, head_dim: int) -> int:
    """Bytes of a page of that shape: of a pool of one, which is reserved and never touched."""
    pool = PagePool(dtypes, 1, n_layers, n_kv_heads, head_dim)
    try:
        return pool.page_bytes
    finally:
        pool.close()


# ---- Programs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator of a program; fields as in struct fb_op."""

    kind: int
    input: int = -1
    out: int = -1
    residual: int = -1
    column: int = 0
    layer: int = 0
    window: int = 0
    weight: Weight | None = None
    vector: F32 | None = None
    vector2: F32 | None = None
    eps: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the operators of a program share; fields as in struct fb_program_shape."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    vocab_size: int
    max_tokens: int
    rope_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class BatchSequence:
    """One sequence's share of a batch: pages int32, positions already held, tokens to append; as in fb_sequence."""

    pages: I32
    n_past: int
    tokens: I32
    window: int = 0
    n_sinks: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """What fb_sample takes of one answer: struct fb_sampling, bias and DRY's breakers."""

    settings: Any
    bias_ids: I32
    bias_values: F32
    breakers: I32


@dataclass(frozen=True, slots=True)
class Draw:
    """One sequence that draws up to `n_steps` tokens, none behind one of `ends`; as in struct fb_draw.

    `history` int32 has room for n_history + n_steps tokens, the share's at the end of the first n_history; those drawn
    are written behind them. With n_steps 0 the share is only computed.
    """

    share: BatchSequence
    n_steps: int
    history: I32
    n_history: int
    ends: I32
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """Steps of a program on a GPU: graphs that are held, recordings, steps replayed and steps launched operator by
    operator; why one could not be recorded, or ""."""

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
        inv_freq: npt.ArrayLike,
        ops: Sequence[Op],
        *,
        n_threads: int,
        isa: Isa = "auto",
        device: Device | None = None,
    ) -> None:
        c_shape = ffi.new("struct fb_program_shape *")
        c_shape.struct_size = ffi.sizeof("struct fb_program_shape")
        for field in Shape.__slots__:
            setattr(c_shape, field, getattr(shape, field))
        c_shape.n_buffers = len(buffer_widths)
        c_ops = ffi.new("struct fb_op[]", len(ops))
        keep: list[F32] = []
        for c_op, op in zip(c_ops, ops, strict=True):
            c_op.kind, c_op.out, c_op.residual, c_op.column = op.kind, op.out, op.residual, op.column
            c_op.layer, c_op.window, c_op.eps, c_op.scale = op.layer, op.window, op.eps, op.scale
            setattr(c_op, "in", op.input)
            if op.weight is not None:
                c_op.weight = op.weight.handle
            if op.vector is not None:
                keep.append(_f32(op.vector))
                c_op.vector, c_op.vector_length = floats(keep[-1]), keep[-1].size
            if op.vector2 is not None:
                keep.append(_f32(op.vector2))
                c_op.vector2, c_op.vector2_length = floats(keep[-1]), keep[-1].size
        widths, frequencies = _i32(buffer_widths), _f32(inv_freq)
        needed = shape.rotary_dim // 2
        if frequencies.size != needed:
            raise InvalidArgument(
                f"inv_freq holds {frequencies.size} numbers, rotary_dim {shape.rotary_dim} needs {needed}"
            )
        out = ffi.new("fb_program **")
        check(
            lib.fb_program_create_on(
                _handle(device), c_shape, ints(widths), floats(frequencies), c_ops, len(ops), n_threads,
                isa_number(isa), out,
            )
        )  # fmt: skip
        self.handle: Any = ffi.gc(out[0], lib.fb_program_free, lib.fb_program_scratch_bytes(out[0]))
        self.shape = shape
        self.n_threads = n_threads
        last = ops[-1].weight if ops else None
        self.n_outputs = last.n_rows if last is not None else 0  # numbers of a row that is wanted
        self._draw_logits = np.empty(0, np.float32)
        # Borrowed by C: they must live as long as the program.
        self._weights = [op.weight for op in ops if op.weight is not None]

    @property
    def scratch_bytes(self) -> int:
        return int(lib.fb_program_scratch_bytes(self.handle))

    def run(self, pool: PagePool, sequences: Sequence[BatchSequence], outputs: npt.ArrayLike) -> F32:
        """Runs one batch; `outputs` are the rows whose logits are wanted. Returns float32 [n_rows, self.n_outputs]."""
        tokens = np.concatenate([_i32(s.tokens) for s in sequences]) if sequences else np.empty(0, np.int32)
        wanted = _i32(outputs)
        c_sequences = ffi.new("struct fb_sequence[]", max(len(sequences), 1))
        keep = [_i32(s.pages) for s in sequences]
        for c_sequence, sequence, pages in zip(c_sequences, sequences, keep, strict=False):
            c_sequence.pages, c_sequence.n_pages = ints(pages), pages.size
            c_sequence.n_past, c_sequence.n_tokens = sequence.n_past, len(sequence.tokens)
            c_sequence.window, c_sequence.n_sinks = sequence.window, sequence.n_sinks
        batch = ffi.new("struct fb_batch *")
        batch.struct_size = ffi.sizeof("struct fb_batch")
        batch.n_tokens, batch.tokens = tokens.size, ints(tokens)
        batch.sequences, batch.n_sequences = c_sequences, len(sequences)
        batch.outputs, batch.n_outputs = ints(wanted), wanted.size
        logits = np.empty((wanted.size, self.n_outputs), np.float32)
        check(lib.fb_program_run(self.handle, pool.handle, batch, floats(logits), logits.size))
        return logits

    def draw(
        self, pool: PagePool, draws: Sequence[Draw], n_steps: int, stop: Any
    ) -> tuple[list[tuple[I32, F32]], npt.NDArray[np.float64]]:
        """Up to n_steps steps over sequences that draw; see fb_program_draw. `stop`: int32_t[1] of cffi.

        Returns:
            The tokens and logprobs of each sequence, and when each step was done, in seconds since the call.
        """
        c_draws = ffi.new("struct fb_draw[]", len(draws))
        logprobs = np.empty((len(draws), n_steps), np.float32)
        seconds, n_done = np.empty(n_steps, np.float64), ffi.new("int32_t *")
        for i, (c, draw) in enumerate(zip(c_draws, draws, strict=True)):
            share, sampling, sequence = draw.share, draw.sampling, c.sequence
            sequence.pages, sequence.n_pages = ints(share.pages), share.pages.size
            sequence.n_past, sequence.n_tokens = share.n_past, len(share.tokens)
            sequence.window, sequence.n_sinks = share.window, share.n_sinks
            c.n_steps, c.history, c.n_history = min(draw.n_steps, n_steps), ints(draw.history), draw.n_history
            c.ends, c.n_ends, c.logprobs = ints(draw.ends), draw.ends.size, floats(logprobs[i])
            c.settings, c.breakers, c.n_breakers = sampling.settings, ints(sampling.breakers), sampling.breakers.size
            c.bias_ids, c.n_bias = ints(sampling.bias_ids), sampling.bias_ids.size
            c.bias_values = floats(sampling.bias_values)
        n_logits = len(draws) * self.n_outputs
        if self._draw_logits.size < n_logits:
            self._draw_logits = np.empty(n_logits, np.float32)
        check(
            lib.fb_program_draw(
                self.handle, pool.handle, c_draws, len(draws), n_steps, stop,
                floats(self._draw_logits), n_logits, ffi.cast("double *", seconds.ctypes.data), n_done,
            )
        )  # fmt: skip
        drawn = []
        for c, draw, row in zip(c_draws, draws, logprobs, strict=True):
            n = int(c.n_drawn)
            drawn.append((draw.history[draw.n_history : draw.n_history + n].copy(), row[:n]))
        return drawn, seconds[: n_done[0]]

    def set_graphs(self, is_on: bool) -> None:
        """Whether steps on a GPU are recorded and launched as a whole, as they are from the start; for measurements.

        Raises:
            Unsupported: it runs on the CPU.
        """
        check(lib.fb_program_set_graphs(self.handle, is_on))

    @property
    def graphs(self) -> GraphInfo:
        """What became of recorded steps; Unsupported on the CPU."""
        info = ffi.new("struct fb_graph_info *")
        check(lib.fb_program_graph_info(self.handle, info))
        reason = ffi.string(info.reason).decode("utf-8", "replace")
        return GraphInfo(bool(info.is_on), info.n_graphs, info.n_recorded, info.n_replayed, info.n_launched, reason)

    def close(self) -> None:
        ffi.release(self.handle)


# ---- Sampling ----------------------------------------------------------------------------------------------


def sampling_struct(*, chain: Sequence[int] | None = None, **fields: Any) -> Any:
    """A struct fb_sampling with the library's defaults and `fields` set over them."""
    settings = ffi.new("struct fb_sampling *")
    lib.fb_sampling_default(settings)
    for name, value in fields.items():
        setattr(settings, name, value)
    if chain is not None:
        if len(chain) > lib.FB_MAX_CHAIN:
            raise InvalidArgument(f"chain has {len(chain)} steps, at most {lib.FB_MAX_CHAIN} fit")
        settings.n_chain = len(chain)
        for i, step in enumerate(chain):
            settings.chain[i] = step
    return settings


def sample_work(vocab_size: int) -> npt.NDArray[np.float64]:
    """Scratch for sample(), 16-byte aligned, as complex128 guarantees."""
    n_bytes = int(lib.fb_sample_work_bytes(vocab_size))
    return np.empty(-(-n_bytes // 16) * 2, np.float64)


def _sample_arguments(
    logits: F32, settings: Any, position: int, history: I32, bias_ids: I32, bias_values: F32, breakers: I32, work: Any
) -> tuple[Any, ...]:
    return (
        floats(logits), logits.size, settings, position, ints(history), history.size,
        ints(bias_ids), floats(bias_values), bias_ids.size, ints(breakers), breakers.size,
        ffi.cast("void *", work.ctypes.data),
    )  # fmt: skip


def sample(
    logits: F32, settings: Any, position: int, history: I32, bias_ids: I32, bias_values: F32, breakers: I32, work: Any
) -> tuple[int, float]:
    """Draws one token; see fb_sample. Returns (token id, natural log-probability under the plain softmax)."""
    token, logprob = ffi.new("int32_t *"), ffi.new("float *")
    arguments = _sample_arguments(logits, settings, position, history, bias_ids, bias_values, breakers, work)
    check(lib.fb_sample(*arguments, token, logprob))
    return int(token[0]), float(logprob[0])


def sample_probabilities(
    logits: F32, settings: Any, position: int, history: I32, bias_ids: I32, bias_values: F32, breakers: I32, work: Any
) -> F32:
    """The probabilities the chain leaves, float32 [vocab_size]; see fb_sample_probabilities."""
    out = np.empty(logits.size, np.float32)
    arguments = _sample_arguments(logits, settings, position, history, bias_ids, bias_values, breakers, work)
    check(lib.fb_sample_probabilities(*arguments, floats(out)))
    return out


def random_words(seed: int, position: int, stream: int) -> tuple[int, int, int, int]:
    """Four 32-bit words of Philox 4x32-10 for (seed, position, stream)."""
    words = ffi.new("uint32_t[4]")
    lib.fb_random(seed, position, stream, words)
    return words[0], words[1], words[2], words[3]
