"""Builds a program: collects tensors as a family names them, operators and buffers; then the matrices are packed.

Every tensor's shape is checked against what the config promises; a weight that holds NaN or infinity is packed but
warned about, and a turn that meets it fails with NonFinite.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import Op, Weight
from fabula.errors import ModelFileError
from fabula.formats.checkpoint import Checkpoint, DType, TensorInfo
from fabula.models.packing import Packer, Packing, Part
from fabula.models.precision import Precision

F32 = npt.NDArray[np.float32]

EMBED, RMS_NORM, LINEAR, LINEAR_SWIGLU, HEAD_NORM = 1, 2, 3, 4, 5
ROPE, KV_WRITE, ATTENTION, GATHER_OUTPUTS, LOGITS = 6, 7, 8, 9, 10

PANEL_ROWS = 16  # rows of a panel; see fb_weight in fabula.h


class DamagedWeightWarning(UserWarning):
    """A tensor holds NaN or infinity, or numbers that the chosen precision cannot hold."""


class ProgramBuilder:
    """Collects what fb_program_create needs while a family's file reads like the model's description.

    Vectors are read at once; matrices hold nothing before `pack`.

    Args:
        checkpoint: where tensors come from.
        weights: format of each matrix, by its entry in the checkpoint.
        n_threads: threads that pack.
        progress: called with (bytes read so far, bytes in all) as tensors are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Precision,
        n_threads: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._precision = weights
        self.n_threads = n_threads
        self.ops: list[Op] = []
        self.widths: list[int] = []
        self.weights: list[Weight] = []
        self._packings: list[Packing] = []
        self._progress = progress
        self._done = 0
        self._total = sum(info.n_bytes for info in checkpoint.tensors.values())

    # ---- Tensors ----------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def _check(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The tensor's entry, after its shape was compared with the config's."""
        info = self.checkpoint.tensors.get(name)
        path = self.checkpoint.path
        if info is None:
            raise ModelFileError(f"{path}: tensor {name!r} is missing", path=path, field=name)
        if tuple(info.shape) != shape:
            raise ModelFileError(
                f"{path}: tensor {name!r} has shape {list(info.shape)}, the config asks for {list(shape)}",
                path=path,
                field=name,
            )
        block = _native.dtype_block(info.dtype)[0]
        if shape[-1] % block:
            raise ModelFileError(
                f"{path}: tensor {name!r} has rows of {shape[-1]}, not whole blocks of {block}", path=path, field=name
            )
        return info

    def _count(self, n_bytes: int) -> None:
        """So many more bytes were read."""
        self._done += n_bytes
        if self._progress:
            self._progress(self._done, self._total)

    def vector(self, name: str, length: int) -> F32:
        """A tensor [length] as float32."""
        info = self._check(name, (length,))
        vector = _native.dequantize(info.dtype, self.checkpoint.read(name), length)
        self._count(info.n_bytes)
        if not np.isfinite(vector).all():
            self._warn(name, DType.F32)
        return vector

    def joined(self, names: Sequence[str], lengths: Sequence[int]) -> F32:
        """Vectors one behind the other, in the order of `stacked`."""
        return np.concatenate([self.vector(name, n) for name, n in zip(names, lengths, strict=True)])

    def _warn(self, name: str, dtype: DType) -> None:
        warnings.warn(
            f"{self.checkpoint.path}: tensor {name!r} holds NaN, infinity or numbers beyond {dtype.name}",
            DamagedWeightWarning,
            stacklevel=2,
        )

    def pack(self, device: _native.Device | None = None) -> None:
        """Reads and packs the matrices that were asked for, and moves them to a GPU if one is given.

        Raises:
            ModelFileError, OutOfMemory: one cannot be read.
            DeviceOutOfMemory, DeviceError: one cannot be moved.
        """
        packer = Packer(self.checkpoint, self.n_threads, self._count, device)
        for name, weight in packer.pack(self._packings):
            self._warn(name, DType(weight.dtype))

    def matrix(self, name: str, n_rows: int, n_cols: int) -> Weight:
        """A matrix [n_rows, n_cols]."""
        return self.stacked([name], [n_rows], n_cols)[0]

    def stacked(self, names: Sequence[str], rows: Sequence[int], n_cols: int) -> list[Weight]:
        """Matrices [rows[i], n_cols] on top of each other: one weight, or several where neighbours differ in format."""
        # Shapes are checked before memory is taken for sizes that only the config claims.
        infos = [self._check(name, (n_rows, n_cols)) for name, n_rows in zip(names, rows, strict=True)]
        stack: list[Weight] = []
        for dtype, group in groupby(infos, key=self._precision):
            n_rows, parts = 0, []
            for info in group:
                parts.append(Part(info, n_rows))
                n_rows += info.shape[0]
            weight = Weight(dtype, n_rows, n_cols)
            self._packings.append(Packing(weight, parts))
            stack.append(weight)
        self.weights += stack
        return stack

    def woven(self, names: tuple[str, str], n_rows: int, n_cols: int) -> Weight:
        """Two matrices [n_rows, n_cols], panel by panel in turn: gate and up for LINEAR_SWIGLU."""
        infos = [self._check(name, (n_rows, n_cols)) for name in names]
        first, second = (self._precision(info) for info in infos)
        # A weight has one format; f16 holds what the formats in blocks do, and f32 what bf16 does too.
        dtype = first if first is second else DType.F32 if {first, second} & {DType.F32, DType.BF16} else DType.F16
        padded = -(-n_rows // PANEL_ROWS) * PANEL_ROWS
        weight = Weight(dtype, 2 * padded, n_cols)
        parts = [Part(info, i * PANEL_ROWS, PANEL_ROWS, 2) for i, info in enumerate(infos)]
        self._packings.append(Packing(weight, parts))
        self.weights.append(weight)
        return weight

    def woven_bias(self, names: tuple[str, str], length: int) -> F32:
        """Two biases [length] in the order of `woven`."""
        padded = -(-length // PANEL_ROWS) * PANEL_ROWS
        halves = [np.pad(self.vector(name, length), (0, padded - length)) for name in names]
        return np.stack([half.reshape(-1, PANEL_ROWS) for half in halves], axis=1).reshape(-1)

    # ---- Operators --------------------------------------------------------------------------------------------------

    def buffer(self, width: int) -> int:
        """A new buffer of `width` numbers per token."""
        self.widths.append(width)
        return len(self.widths) - 1

    def embed(self, weight: Weight, out: int) -> None:
        self.ops.append(Op(kind=EMBED, weight=weight, out=out))

    def rms_norm(self, x: int, out: int, weight: F32, eps: float) -> None:
        self.ops.append(Op(kind=RMS_NORM, input=x, out=out, vector=weight, eps=eps))

    def linear(
        self, x: int, out: int, weights: Sequence[Weight], *, bias: F32 | None = None, residual: int = -1
    ) -> None:
        """Products with matrices on top of each other; `bias` is as long as all of them."""
        column = 0
        for weight in weights:
            part = None if bias is None else bias[column : column + weight.n_rows]
            self.ops.append(
                Op(kind=LINEAR, input=x, out=out, column=column, weight=weight, vector=part, residual=residual)
            )
            column += weight.n_rows

    def linear_swiglu(self, x: int, out: int, weight: Weight, *, bias: F32 | None = None) -> None:
        self.ops.append(Op(kind=LINEAR_SWIGLU, input=x, out=out, weight=weight, vector=bias))

    def head_norm(self, qkv: int, q_weight: F32, k_weight: F32, eps: float) -> None:
        self.ops.append(Op(kind=HEAD_NORM, input=qkv, vector=q_weight, vector2=k_weight, eps=eps))

    def rope(self, qkv: int) -> None:
        self.ops.append(Op(kind=ROPE, input=qkv))

    def kv_write(self, qkv: int, layer: int) -> None:
        self.ops.append(Op(kind=KV_WRITE, input=qkv, layer=layer))

    def attention(self, qkv: int, out: int, layer: int, *, window: int, scale: float) -> None:
        self.ops.append(Op(kind=ATTENTION, input=qkv, out=out, layer=layer, window=window, scale=scale))

    def gather_outputs(self, x: int, out: int) -> None:
        self.ops.append(Op(kind=GATHER_OUTPUTS, input=x, out=out))

    def logits(self, x: int, weight: Weight) -> None:
        self.ops.append(Op(kind=LOGITS, input=x, weight=weight))
