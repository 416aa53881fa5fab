"""Calls of the native library: numpy arrays in and out, status codes become exceptions.

Programs, sampling, single operators and groups of GPUs are in `_program`, `_sampling`, `_operators` and `_parallel`.

Functions check only what C cannot see (dtype, contiguity, lifetime). The library checks ranges and shapes; its message
becomes the exception's text. Handles are wrapped in small classes that are freed once, by close() or by the garbage
collector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fabula._ffi import ffi, lib
from fabula.choices import BF16_INPUTS, ISA_NAMES, Bf16Inputs
from fabula.choices import Isa as Isa
from fabula.errors import (
    DeviceError,
    DeviceOutOfMemory,
    EngineError,
    InvalidArgument,
    NonFinite,
    OutOfMemory,
    Unsupported,
)
from fabula.lean_dataclasses import dataclass

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

ABI_VERSION: int = lib.FB_ABI_VERSION
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
_MULTIPLY_BF16 = ("avx512_bf16", "avx512_amx")  # two products of bf16 are one instruction


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


def f32(array: npt.ArrayLike) -> F32:
    return np.ascontiguousarray(array, dtype=np.float32)


def i32(array: npt.ArrayLike) -> I32:
    return np.ascontiguousarray(array, dtype=np.int32)


def floats(array: F32 | None) -> Any:
    return ffi.NULL if array is None else ffi.cast("float *", array.ctypes.data)


def ints(array: I32) -> Any:
    return ffi.cast("int32_t *", array.ctypes.data)


class Flag:
    """A flag that a running call of the library checks between its steps; any thread may set it."""

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
    best = _ISAS["auto"] or lib.fb_isa_best()
    return next(name for name, value in _ISAS.items() if value == best and name != "auto")


def inputs_of_bf16(wanted: Bf16Inputs, isa: Isa = "auto") -> Literal["bf16", "f32"]:
    """The inputs of products with bf16 weights that "auto" stands for with an instruction set, or those wanted.

    Raises:
        InvalidArgument: neither "auto", "bf16" nor "f32".
    """
    if wanted not in BF16_INPUTS:
        raise InvalidArgument(f"bf16_inputs is {wanted!r}, must be one of {', '.join(BF16_INPUTS)}")
    if wanted != "auto":
        return wanted
    return "bf16" if (isa_best() if isa == "auto" else isa) in _MULTIPLY_BF16 else "f32"


@contextmanager
def isa_forced(name: Isa) -> Iterator[None]:
    """Inside, "auto" stands for `name` in the whole process: for measurements of a lesser instruction set.

    Raises:
        Unsupported: this CPU or build lacks it.
    """
    before, number = _ISAS["auto"], isa_number(name)
    if not isa_available(name):
        raise Unsupported(
            f"isa is {name!r}, which this CPU lacks; it has {', '.join(isa for isa in ISA_NAMES if isa_available(isa))}"
        )
    _ISAS["auto"] = number
    try:
        yield
    finally:
        _ISAS["auto"] = before


# ---- Number formats ----------------------------------------------------------------------------------------


def dtype_block(dtype: int) -> tuple[int, int]:
    """(elements, bytes) of one block of a dtype; (0, 0) for an unknown one."""
    return lib.fb_dtype_block_size(dtype), lib.fb_dtype_block_bytes(dtype)


def join_strings(data: bytearray, start: int, most: int, max_length: int, out: bytearray) -> tuple[int, int, int]:
    """Copies strings of a GGUF header, from byte `start` of `data`, into `out`, which is as long as `data`. Returns
    their number, and the bytes read from `data` and written to `out`. See fb_join_strings."""
    sizes = ffi.new("size_t[3]")
    with ffi.from_buffer(data) as source, ffi.from_buffer(out, require_writable=True) as target:
        n_bytes = min(len(data), len(out)) - start
        check(lib.fb_join_strings(source + start, n_bytes, most, max_length, target, sizes, sizes + 1, sizes + 2))
    return sizes[0], sizes[1], sizes[2]


def dequantize(dtype: int, raw: npt.NDArray[np.uint8], n_elements: int) -> F32:
    """Dequantizes raw bytes of any dtype to float32 [n_elements]."""
    raw = np.ascontiguousarray(raw, dtype=np.uint8)
    out = np.empty(n_elements, np.float32)
    check(lib.fb_dequantize(dtype, ffi.cast("void *", raw.ctypes.data), raw.nbytes, n_elements, floats(out)))
    return out


def quantize(dtype: int, rows: F32, n_threads: int = 1) -> npt.NDArray[np.uint8]:
    """Quantizes float32 [n_rows, n_cols] to raw bytes of any dtype, uint8 [n_bytes]; see fb_quantize."""
    rows = f32(rows)
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
    """Describes a GPU. This initializes it, which takes some of its memory."""
    info = ffi.new("struct fb_device_info *")
    check(lib.fb_device_describe(index, info))
    name = ffi.string(info.name).decode("utf-8", "replace")
    compute = f"{info.compute_major}.{info.compute_minor}"
    return DeviceInfo(
        index, name, compute, info.n_processors, info.memory_bytes, info.free_bytes, bool(info.is_emulated)
    )


class Device:
    """A GPU for weights, pages and programs; see fb_device in fabula.h.

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
        """The GPUs of this device: itself; a group has several."""
        return (self,)

    def use_library(self, path: str | None) -> None:
        """Makes later programs multiply matrices with cuBLASLt for many tokens; see fb_device_use_library.

        Raises:
            Unsupported: cuBLASLt cannot be loaded, or this build has no support for it.
        """
        check(lib.fb_device_use_library(self.handle, ffi.NULL if path is None else path.encode()))

    def memory(self) -> tuple[int, int]:
        """Bytes allocated through this handle, and those that may still be allocated."""
        used, free = ffi.new("size_t *"), ffi.new("size_t *")
        check(lib.fb_device_memory(self.handle, used, free))
        return int(used[0]), int(free[0])


def handle_of(device: Device | None) -> Any:
    return ffi.NULL if device is None else device.handle


# ---- Weights -----------------------------------------------------------------------------------------------


class Weight:
    """A packed matrix [n_rows, n_cols], or one for each expert; see fb_weight in fabula.h. Immutable once packed,
    shared freely.

    Args:
        f32_inputs: products take inputs in f32 instead of rounded to bf16; for bf16 alone.
    """

    def __init__(self, dtype: int, n_rows: int, n_cols: int, n_experts: int = 1, *, f32_inputs: bool = False) -> None:
        out = ffi.new("fb_weight **")
        check(lib.fb_weight_create_experts(dtype, n_experts, n_rows, n_cols, out))
        self.handle: Any = ffi.gc(out[0], lib.fb_weight_free, lib.fb_weight_bytes(out[0]))
        if f32_inputs:
            check(lib.fb_weight_use_f32_inputs(self.handle))
        self.dtype, self.n_rows, self.n_cols, self.n_experts = dtype, n_rows, n_cols, n_experts

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
        expert: int = 0,
    ) -> None:
        """Packs rows given as the raw bytes of a row-major matrix of any dtype; see fb_weight_pack_expert."""
        raw = np.ascontiguousarray(raw, dtype=np.uint8)
        check(
            lib.fb_weight_pack_expert(
                self.handle, expert, first_row, row_block, row_step, dtype,
                ffi.cast("void *", raw.ctypes.data), raw.nbytes, n_rows, n_threads,
            )
        )  # fmt: skip

    def move(self, device: Device) -> None:
        """Moves it to a GPU; from then on only that GPU's programs can use it."""
        check(lib.fb_weight_move(self.handle, device.handle))

    def row(self, index: int) -> F32:
        """Row `index` as float32 [n_cols]; rows of expert e begin at e * n_rows."""
        out = np.empty(self.n_cols, np.float32)
        check(lib.fb_weight_unpack_row(self.handle, index, floats(out)))
        return out


class FileRows(NamedTuple):
    """A matrix in a file and its rows in a weight; see struct fb_file_rows in fabula.h."""

    weight: Weight
    file: int
    dtype: int
    offset: int
    n_rows: int
    first_row: int = 0
    row_block: int = 1
    row_step: int = 1


class FilePacking:
    """One call of fb_weights_pack_files, which takes long and needs nothing of Python while it runs.

    Args:
        parts: matrices; see fb_weights_pack_files for what it takes.
        n_threads: threads that read and pack.
        cpus: of each thread, to be bound to; () for none.
    """

    def __init__(self, parts: Sequence[FileRows], n_threads: int, cpus: Sequence[int] = ()) -> None:
        self._weights = [part.weight for part in parts]  # alive as long as this
        self._parts = ffi.new("struct fb_file_rows[]", len(parts))
        for to, part in zip(self._parts, parts, strict=True):
            to.weight, to.file, to.src_dtype, to.offset = part.weight.handle, part.file, part.dtype, part.offset
            to.first_row, to.row_block, to.row_step = part.first_row, part.row_block, part.row_step
            to.n_rows = part.n_rows
        self._n_threads = n_threads
        self._cpus = ffi.new("int32_t[]", list(cpus)) if cpus else ffi.NULL
        self._stop, self._n_read = ffi.new("int32_t *"), ffi.new("int64_t *")

    @property
    def n_read(self) -> int:
        """Bytes read so far."""
        return int(self._n_read[0])

    def stop(self) -> None:
        """Ends a running call early."""
        self._stop[0] = 1

    def run(self) -> None:
        """Reads and packs everything."""
        n = len(self._weights)
        check(lib.fb_weights_pack_files(self._parts, n, self._n_threads, self._cpus, self._stop, self._n_read))

    def results(self) -> list[tuple[int, int]]:
        """Of each part: 0, the errno of a failed read or -1 at the file's end; how many elements are not finite."""
        return [(part.error, part.n_non_finite) for part in self._parts]


def interleave_memory() -> bool:
    """From now on spreads what this thread, and those it starts, touch first over all nodes of memory; False where the
    system refuses."""
    return bool(lib.fb_thread_interleave() == lib.FB_OK)


# ---- KV pages ----------------------------------------------------------------------------------------------


KvDTypes = int | tuple[int, int]  # of K and V, or of each


def of_k_and_v(dtypes: KvDTypes) -> tuple[int, int]:
    return dtypes if isinstance(dtypes, tuple) else (dtypes, dtypes)


class KvLayer(NamedTuple):
    """What a KV page holds of one layer; as in struct fb_kv_layer: v_dim 0 where values are a part of K. Layers that
    reuse another layer's KV have none."""

    n_kv_heads: int
    k_dim: int
    v_dim: int


def kv_layers(n_layers: int, n_kv_heads: int, head_dim: int) -> tuple[KvLayer, ...]:
    """Layers that are all alike."""
    return (KvLayer(n_kv_heads, head_dim, head_dim),) * n_layers


class PagePool:
    """Bytes of KV pages; see fb_page_pool in fabula.h. Page tables and reference counts are in fabula.kv.

    Args:
        dtypes: formats of K and of V.
        n_pages: pages in all.
        layers: the layout of a page.
        device: GPU they lie on; None for the CPU.
    """

    def __init__(self, dtypes: KvDTypes, n_pages: int, layers: Sequence[KvLayer], device: Device | None = None) -> None:
        out = ffi.new("fb_page_pool **")
        c_layers = ffi.new("struct fb_kv_layer[]", list(layers))
        check(lib.fb_page_pool_create_on(handle_of(device), *of_k_and_v(dtypes), n_pages, c_layers, len(layers), out))
        self.handle: Any = ffi.gc(out[0], lib.fb_page_pool_free)
        self.n_pages = n_pages
        self.page_bytes = int(lib.fb_page_bytes(self.handle))

    def copy(self, dst: int, src: int) -> None:
        check(lib.fb_page_copy(self.handle, dst, src))

    def zero(self, page: int) -> None:
        check(lib.fb_page_zero(self.handle, page))

    def discard(self, page: int, first_layer: int, n_layers: int) -> None:
        check(lib.fb_page_discard(self.handle, page, first_layer, n_layers))

    def read(self, page: int) -> npt.NDArray[np.uint8]:
        out = np.empty(self.page_bytes, np.uint8)
        check(lib.fb_page_read(self.handle, page, ffi.cast("void *", out.ctypes.data), out.nbytes))
        return out

    def write(self, page: int, raw: npt.NDArray[np.uint8]) -> None:
        raw = np.ascontiguousarray(raw, dtype=np.uint8)
        check(lib.fb_page_write(self.handle, page, ffi.cast("void *", raw.ctypes.data), raw.nbytes))

    def close(self) -> None:
        ffi.release(self.handle)


class StatePool:
    """Bytes of state slots, for programs with recurrent operators; see fb_state_pool in fabula.h. Which slot belongs to
    whom is in fabula.kv.

    Args:
        layer_floats: numbers of each layer, in the order of the operators' `layer`.
        n_slots: slots in all; only touched ones take memory.
    """

    def __init__(self, layer_floats: Sequence[int], n_slots: int) -> None:
        out = ffi.new("fb_state_pool **")
        c_floats = ffi.new("int64_t[]", list(layer_floats))
        check(lib.fb_state_pool_create(c_floats, len(layer_floats), n_slots, out))
        self.handle: Any = ffi.gc(out[0], lib.fb_state_pool_free)
        self.n_slots = n_slots
        self.slot_bytes = int(lib.fb_state_bytes(self.handle))

    def copy(self, dst: int, src: int) -> None:
        check(lib.fb_state_copy(self.handle, dst, src))

    def zero(self, slot: int) -> None:
        check(lib.fb_state_zero(self.handle, slot))

    def discard(self, slot: int) -> None:
        """Returns its memory to the system; what it held is undefined until it is written again."""
        check(lib.fb_state_discard(self.handle, slot))

    def read(self, slot: int) -> npt.NDArray[np.uint8]:
        out = np.empty(self.slot_bytes, np.uint8)
        check(lib.fb_state_read(self.handle, slot, ffi.cast("void *", out.ctypes.data), out.nbytes))
        return out

    def write(self, slot: int, raw: npt.NDArray[np.uint8]) -> None:
        raw = np.ascontiguousarray(raw, dtype=np.uint8)
        check(lib.fb_state_write(self.handle, slot, ffi.cast("void *", raw.ctypes.data), raw.nbytes))

    def close(self) -> None:
        ffi.release(self.handle)


def state_bytes(layer_floats: Sequence[int]) -> int:
    """Bytes of a slot with these layers; reserves a pool of one slot and never touches it."""
    pool = StatePool(layer_floats, 1)
    try:
        return pool.slot_bytes
    finally:
        pool.close()


def page_bytes(dtypes: KvDTypes, layers: Sequence[KvLayer]) -> int:
    """Bytes of a page with that layout; reserves a pool of one page and never touches it."""
    pool = PagePool(dtypes, 1, layers)
    try:
        return pool.page_bytes
    finally:
        pool.close()
