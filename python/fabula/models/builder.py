"""Builds a program: collects a model's tensors, operators and buffers, then packs the matrices.

A tensor-parallel model is described once. Values with one item per device are lists in the order of the devices, and
each device has its own list of operators.

Each tensor's shape is checked against the config. A weight with NaN or infinity is packed with a warning; a step that
uses it fails with NonFinite.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula._native import Weight
from fabula._program import Op
from fabula.errors import ModelFileError, ModelFileWarning, Unsupported
from fabula.formats.checkpoint import Checkpoint, DType, TensorInfo, TensorTable
from fabula.formats.tensor_names import is_leftover, of_further_tokens
from fabula.formats.text_part import is_of_another_part
from fabula.models.description import Activation, Attention, Experts, HeadNorm, Norm, Router, Temperature
from fabula.models.packing import ANYWHERE, Packer, Packing, Part, Place, Placing
from fabula.models.precision import Precision
from fabula.models.shares import Axis, Shares, check_columns, widths

F32 = npt.NDArray[np.float32]
Weights = list[Weight]  # one matrix: each device's share

EMBED, RMS_NORM, LINEAR, LINEAR_GATED, HEAD_NORM = 1, 2, 3, 4, 5
ROPE, KV_WRITE, ATTENTION, GATHER_OUTPUTS, LOGITS, SUM = 6, 7, 8, 9, 10, 11
LAYER_NORM, EMBED_POSITION, SCALE, MULTIPLY, ADD, MIX, MATCH_RMS, SPARSIFY = 12, 13, 14, 15, 16, 17, 18, 19
ROUTER, EXPERTS = 20, 21
SHORT_CONV, DELTA_RULE, SSM, GATED_NORM, HEAD_LINEAR = 22, 23, 24, 25, 26
ACTIVATIONS: Mapping[Activation | None, int] = {
    None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "relu2": 5, "clamp": 6, "xielu": 7, "sigmoid": 8,
    "tanh": 9, "clamped_silu": 10,
}  # fmt: skip
# Flags of struct fb_op.
HEADS_LAYER_NORM, HEADS_WHOLE, HEADS_VALUES, ATTEND_CHUNK, HEADS_BIASED, ALIBI_BF16 = 1, 2, 4, 16, 32, 64
ROUTE_SIGMOID, ROUTE_CHOSEN, ROUTE_NORM, ROUTE_TOP, ROUTE_MIXER = 128, 256, 512, 1024, 262144
EXPERTS_GATED, EXPERTS_SUM, EXPERTS_WEIGH = 2048, 4096, 8192
CONV_GATED, HEADS_TILED, DELTA_NEGATIVE, GATE_FIRST, HEADS_LATENT = 16384, 32768, 65536, 131072, 524288

PANEL_ROWS = 16  # rows of a panel; see fb_weight in fabula.h
_SHOWN = 8  # unused tensors named in a warning


class DamagedWeightWarning(UserWarning):
    """A tensor holds NaN, infinity, or numbers beyond the range of the chosen format."""


class ProgramBuilder:
    """Collects the arguments of fb_program_create.

    Vectors are read immediately; matrices are empty until `pack`.

    Args:
        checkpoint: source of the tensors.
        weights: chooses each matrix's format.
        n_threads: threads that pack.
        shares: the rows and columns of each device.
        progress: callback (bytes read, total bytes).
        placing: where threads run, and where memory comes from.
        f32_inputs: whether products with bf16 weights take inputs in f32, not rounded to bf16.

    Attributes:
        ops, widths: operators and buffer widths, per device.
        weights: all weights of all devices.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Precision,
        n_threads: int,
        shares: Shares,
        progress: Callable[[int, int], None] | None = None,
        placing: Placing = ANYWHERE,
        *,
        f32_inputs: bool = False,
    ) -> None:
        self.placing = placing
        self.checkpoint = checkpoint
        self._precision, self._f32_inputs = weights, f32_inputs
        self.n_threads = n_threads
        self.shares = shares
        self.ops: list[list[Op]] = [[] for _ in range(shares.n)]
        self.widths: list[list[int]] = [[] for _ in range(shares.n)]
        self.weights: list[Weight] = []
        self._sums: int | None = None  # buffer of partial sums, with several devices
        self._packings: list[Packing] = []
        self._progress = progress
        self._done = 0
        self._total = sum(info.n_bytes for info in checkpoint.tensors.values())
        self._asked_for: set[str] = set()

    # ---- Tensors ----------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def _check(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Checks a tensor's shape and returns its entry."""
        info = self.checkpoint.tensors.get(name)
        path = self.checkpoint.path
        if info is None:
            raise ModelFileError(f"{path}: tensor {name!r} is missing", path=path, field=name)
        if tuple(info.shape) != shape:
            raise ModelFileError(
                f"{path}: tensor {name!r} has shape {list(info.shape)}, the config needs {list(shape)}",
                path=path,
                field=name,
            )
        block = _native.dtype_block(info.dtype)[0]
        if shape and shape[-1] % block:
            raise ModelFileError(
                f"{path}: tensor {name!r} has rows of {shape[-1]}, not whole blocks of {block}", path=path, field=name
            )
        if name in self._asked_for:  # it is read again
            self._total += info.n_bytes
        self._asked_for.add(name)
        return info

    def _count(self, n_bytes: int) -> None:
        """Adds to the bytes read and calls `progress`."""
        self._done += n_bytes
        if self._progress:
            self._progress(self._done, self._total)

    def vector(self, name: str, length: int) -> F32:
        """Reads a tensor [length] as float32."""
        info = self._check(name, (length,))
        vector = _native.dequantize(info.dtype, self.checkpoint.read(name), length)
        self._count(info.n_bytes)
        if not np.isfinite(vector).all():
            self._warn(name, DType.F32)
        return vector

    def table(self, name: str, n_rows: int, n_columns: int) -> F32:
        """Reads a small tensor [n_rows, n_columns] as float32: biases of experts."""
        info = self._check(name, (n_rows, n_columns))
        numbers = _native.dequantize(info.dtype, self.checkpoint.read(name), n_rows * n_columns)
        self._count(info.n_bytes)
        if not np.isfinite(numbers).all():
            self._warn(name, DType.F32)
        return numbers.reshape(n_rows, n_columns)

    def taps(self, name: str, width: int, n_taps: int) -> F32:
        """Reads the weights of a convolution of each column, [width, 1, n_taps] or [width, n_taps], as float32
        [n_taps, width]."""
        info = self._check_taps(name, width, n_taps)
        numbers = _native.dequantize(info.dtype, self.checkpoint.read(name), width * n_taps)
        self._count(info.n_bytes)
        if not np.isfinite(numbers).all():
            self._warn(name, DType.F32)
        return np.ascontiguousarray(numbers.reshape(width, n_taps).T)

    def _check_taps(self, name: str, width: int, n_taps: int) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        return self._check(name, (width, 1, n_taps) if info is not None and len(info.shape) == 3 else (width, n_taps))

    def scalar(self, name: str) -> float:
        """Reads a tensor of one number, [] or [1]."""
        info = self._check_scalar(name)
        self._count(info.n_bytes)
        return float(_native.dequantize(info.dtype, self.checkpoint.read(name), 1)[0])

    def _check_scalar(self, name: str) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        return self._check(name, () if info is not None and info.shape == () else (1,))

    def joined(self, names: Sequence[str], axes: Sequence[Axis]) -> list[F32]:
        """Reads vectors and concatenates each device's shares, in the order of `stacked`."""
        vectors = [self.vector(name, axis.size) for name, axis in zip(names, axes, strict=True)]
        shares = zip(*(axis.shares for axis in axes), strict=True)
        return [
            np.concatenate([v[r.start : r.stop] for v, r in zip(vectors, ranges, strict=True)]) for ranges in shares
        ]

    def _warn(self, name: str, dtype: DType) -> None:
        warnings.warn(
            f"{self.checkpoint.path}: tensor {name!r} holds NaN, infinity or numbers beyond {dtype.name}",
            DamagedWeightWarning,
            stacklevel=2,
        )

    def warn_of_unused(self, spare: Collection[str] = ()) -> None:
        """Warns about tensors that no operator uses.

        Args:
            spare: tensors that are known to be redundant.
        """
        tensors = self.checkpoint.tensors
        names = tensors.all_names if isinstance(tensors, TensorTable) else tensors.keys()
        expected = {name for name in names if name in spare or is_leftover(name) or is_of_another_part(name)}
        unused = sorted(names - self._asked_for - expected - of_further_tokens(names))
        if unused:
            shown = ", ".join(name[:80] for name in unused[:_SHOWN]) + (", ..." if len(unused) > _SHOWN else "")
            warnings.warn(
                f"{self.checkpoint.path}: {len(unused)} tensors are not part of the model in its config and"
                f" are not used: {shown}",
                ModelFileWarning,
                stacklevel=2,
            )

    def pack(self, devices: Sequence[_native.Device] = (), meanwhile: Callable[[], None] | None = None) -> None:
        """Reads and packs the collected matrices, and moves each device's share to it. No devices: the CPU.

        Args:
            devices: GPUs.
            meanwhile: called once, by this thread, while others read and pack.

        Raises:
            ModelFileError, OutOfMemory: a tensor cannot be read.
            DeviceOutOfMemory, DeviceError: a weight cannot be moved.
        """
        packer = Packer(self.checkpoint, self.n_threads, self._count, devices, self.placing)
        try:
            damaged = packer.pack(self._packings, meanwhile)
        except BaseException:
            # The exception may keep frames alive that hold this builder; their memory may be most of the machine's.
            for held in (self.weights, self._packings, self.ops):
                held.clear()
            raise
        for name, weight in damaged:
            self._warn(name, DType(weight.dtype))

    def _weights(self, dtype: DType, n_rows: Sequence[int], columns: Axis, parts: Sequence[Part]) -> Weights:
        """Creates one weight per device, with n_rows[i] rows, to be packed from `parts`."""
        for part in parts:
            for held in (dtype, part.info.dtype):
                check_columns(part.info.name, columns, _native.dtype_block(held)[0])
        takes_f32 = self._f32_inputs and dtype == DType.BF16
        sizes = zip(n_rows, columns.shares, strict=True)
        weights = [Weight(dtype, n, len(share), f32_inputs=takes_f32) for n, share in sizes]
        self._packings.append(Packing(weights, parts))
        self.weights += weights
        return weights

    def matrix(self, name: str, rows: Axis, columns: Axis) -> Weights:
        """A matrix [rows, columns]."""
        return self.stacked([name], [rows], columns)[0]

    def stacked(self, names: Sequence[str], rows: Sequence[Axis], columns: Axis) -> list[Weights]:
        """Stacks matrices [rows[i], columns]; returns one weight for each run of matrices with the same format."""
        # Check shapes before allocating: until then the sizes are only the config's claim.
        entries = [(self._check(name, (axis.size, columns.size)), axis) for name, axis in zip(names, rows, strict=True)]
        stack: list[Weights] = []
        for dtype, group in groupby(entries, key=lambda entry: self._precision(entry[0])):
            first_rows, parts = [0] * self.shares.n, []
            for info, axis in group:
                shares = zip(first_rows, axis.shares, columns.shares, strict=True)
                parts.append(Part(info, [Place(first, taken, across) for first, taken, across in shares]))
                first_rows = [first + len(taken) for first, taken in zip(first_rows, axis.shares, strict=True)]
            stack.append(self._weights(dtype, first_rows, columns, parts))
        return stack

    def interleaved(self, names: tuple[str, str], rows: Axis, columns: Axis) -> Weights:
        """Interleaves two matrices [rows, columns] by panels of PANEL_ROWS rows: gate and up for LINEAR_GATED."""
        infos = [self._check(name, (rows.size, columns.size)) for name in names]
        dtype = self._common(infos)
        shares = list(zip(rows.shares, columns.shares, strict=True))
        parts = [
            Part(info, [Place(i * PANEL_ROWS, taken, across, PANEL_ROWS, 2) for taken, across in shares])
            for i, info in enumerate(infos)
        ]
        return self._weights(dtype, [2 * _padded(len(taken)) for taken in rows.shares], columns, parts)

    def experts(self, prefix: str, parts: Sequence[str], n: int, n_rows: int, n_columns: int) -> Weights:
        """The matrices [n_rows, n_columns] of n experts as one weight; two of each are interleaved as by `interleaved`.

        A part of all experts is one tensor [n, n_rows, n_columns] named `prefix` + part, or one matrix for each, with
        the expert's number between them. Gate and up may also be one, gate_up_proj [n, 2 n_rows, n_columns].

        Raises:
            Unsupported: the model is shared by several devices.
        """
        if self.shares.n > 1:
            raise Unsupported(f"{self.checkpoint.path}: a mixture of experts does not run on several GPUs")
        fused = self._found(f"{prefix}gate_up_proj")
        infos: list[tuple[TensorInfo, list[Place]]] = []
        step, columns = len(parts), range(n_columns)

        def place(i: int, expert: int, first: int) -> Place:
            rows = range(first, first + n_rows)
            return Place(i * PANEL_ROWS, rows, columns, PANEL_ROWS, step, expert)

        if step == 2 and fused:
            info = self._check(fused, (n, 2 * n_rows, n_columns))
            infos = [(info, [place(i, e, (2 * e + i) * n_rows) for e in range(n) for i in range(2)])]
        for i, part in enumerate(parts) if not infos else ():
            if whole := self._found(prefix + part):
                info = self._check(whole, (n, n_rows, n_columns))
                infos.append((info, [place(i, e, e * n_rows) for e in range(n)]))
                continue
            for e in range(n):
                infos.append((self._check(f"{prefix}{e}.{part}.weight", (n_rows, n_columns)), [place(i, e, 0)]))
        dtype = self._common([info for info, _ in infos])
        rows = n_rows if step == 1 else step * _padded(n_rows)
        return self._expert_weights(dtype, rows, n_columns, n, [Part(info, places) for info, places in infos])

    def _expert_weights(self, dtype: DType, n_rows: int, n_columns: int, n: int, parts: Sequence[Part]) -> Weights:
        """Creates the weight of n experts, each [n_rows, n_columns], to be packed from `parts`."""
        weight = Weight(dtype, n_rows, n_columns, n, f32_inputs=self._f32_inputs and dtype == DType.BF16)
        self._packings.append(Packing([weight], parts))
        self.weights.append(weight)
        return [weight]

    def expert_gate_biases(self, prefix: str, n: int, size: int) -> F32:
        """Biases of the gate and up matrices of n experts, interleaved as those, [n * 2 * size padded]."""
        halves = self.expert_biases(prefix + "gate_proj", n, size), self.expert_biases(prefix + "up_proj", n, size)
        return np.concatenate([_interleave(pair) for pair in zip(*halves, strict=True)])

    def expert_biases(self, name: str, n: int, size: int) -> F32:
        """Biases of one matrix of each of n experts, [n, size]."""
        return self.table(name + (".bias" if self.has(name + ".bias") else "_bias"), n, size)

    def _found(self, name: str) -> str:
        """The name of a tensor with or without ".weight"; "" if there is none."""
        return next((found for found in (name, name + ".weight") if self.has(found)), "")

    def _common(self, infos: Sequence[TensorInfo]) -> DType:
        """The format of a weight made of several tensors: theirs, or one that represents all of theirs."""
        dtypes = {self._precision(info) for info in infos}
        if len(dtypes) == 1:
            return dtypes.pop()
        return DType.F32 if dtypes & {DType.F32, DType.BF16} else DType.F16  # f16 represents all block formats

    def plain_matrix(self, name: str, rows: Axis, columns: Axis) -> Weights:
        """A matrix in f32, whatever the others are in: a small one that decides."""
        shares = zip(rows.shares, columns.shares, strict=True)
        part = Part(self._check(name, (rows.size, columns.size)), [Place(0, taken, across) for taken, across in shares])
        return self._weights(DType.F32, [len(share) for share in rows.shares], columns, [part])

    def interleaved_bias(self, names: tuple[str, str], axis: Axis) -> list[F32]:
        """Interleaves two biases like `interleaved`."""
        halves = [self.vector(name, axis.size) for name in names]
        return [_interleave([half[share.start : share.stop] for half in halves]) for share in axis.shares]

    # ---- Operators --------------------------------------------------------------------------------------------------

    def buffer(self, *axes: Axis) -> int:
        """Adds a buffer; its width per token is the device's share of all axes. Returns its index."""
        for of_device, width in zip(self.widths, widths(axes), strict=True):
            of_device.append(width)
        return len(self.widths[0]) - 1

    def _add(
        self, kind: int, *, weights: Weights | None = None, vectors: Sequence[F32] | None = None, **rest: Any
    ) -> None:
        """Adds an operator on each device, with that device's item of `weights` and `vectors`."""
        for i, ops in enumerate(self.ops):
            weight = None if weights is None else weights[i]
            vector = None if vectors is None else vectors[i]
            ops.append(Op(kind=kind, weight=weight, vector=vector, **rest))

    def embed(self, weights: Weights, out: int, *, scale: float = 1.0) -> None:
        self._add(EMBED, weights=weights, out=out, scale=scale)

    def embed_position(self, weights: Weights, out: int) -> None:
        """out = the row of each token's position."""
        self._add(EMBED_POSITION, weights=weights, out=out)

    def norm(self, x: int, out: int, norm: Norm, weight: F32, bias: F32 | None = None, *, residual: int = -1) -> None:
        """out = (residual +) norm(x). With a residual `x` must not be read again."""
        n = self.shares.n
        if norm.kind == "rms":
            self._add(RMS_NORM, input=x, out=out, residual=residual, vectors=[weight] * n, eps=norm.eps)
        else:
            bias = np.zeros_like(weight) if bias is None else bias
            self._add(LAYER_NORM, input=x, out=out, residual=residual, vectors=[weight] * n, vector2=bias, eps=norm.eps)

    def linear(
        self,
        x: int,
        out: int,
        stack: Sequence[Weights],
        *,
        bias: Sequence[F32] | None = None,
        activation: Activation | None = None,
        numbers: F32 | None = None,
        scale: float = 1.0,
        limit: float = 0.0,
    ) -> None:
        """Products with stacked matrices; each device's `bias` covers all its rows.

        Args:
            activation: of the results;  numbers: those of "xielu";  limit: that of "clamp".
        """
        columns = [0] * self.shares.n
        for weights in stack:
            for i, weight in enumerate(weights):
                part = None if bias is None else bias[i][columns[i] : columns[i] + weight.n_rows]
                self.ops[i].append(
                    Op(
                        kind=LINEAR, input=x, out=out, column=columns[i], weight=weight, vector=part,
                        activation=ACTIVATIONS[activation], vector2=numbers, scale=scale, limit=limit,
                    )
                )  # fmt: skip
                columns[i] += weight.n_rows

    def linear_add(self, x: int, out: int, weights: Weights, *, bias: F32 | None = None, scale: float = 1.0) -> None:
        """out += scale * (weights @ x (+ bias)), where each device has a share of the columns and of `x`."""
        n = self.shares.n
        if n == 1:
            vectors = None if bias is None else [bias]
            self._add(LINEAR, input=x, out=out, weights=weights, vectors=vectors, residual=out, scale=scale)
            return
        if self._sums is None:
            self._sums = self.buffer(self.shares.hidden)
        for i, ops in enumerate(self.ops):  # only the first adds the bias
            ops.append(Op(kind=LINEAR, input=x, out=self._sums, weight=weights[i], vector=bias if i == 0 else None))
        self._add(SUM, input=self._sums, out=out, residual=out)

    def linear_gated(
        self, x: int, out: int, weights: Weights, *, activation: Activation = "silu", bias: Sequence[F32] | None = None
    ) -> None:
        """out = activation(gate) * up, of interleaved matrices."""
        self._add(LINEAR_GATED, input=x, out=out, weights=weights, vectors=bias, activation=ACTIVATIONS[activation])

    def head_norm(self, qkv: int, heads: int, norm: HeadNorm, q_weight: F32, k_weight: F32 | None) -> None:
        """Norms of q and k heads in place; k_weight None in a layer without k. Biases follow weights."""
        flags = HEADS_LAYER_NORM * (norm.kind == "layer") | HEADS_WHOLE * (norm.weights == "row")
        flags |= HEADS_VALUES * (norm.values and k_weight is not None) | HEADS_BIASED * norm.biased
        vectors = [q_weight] * self.shares.n
        self._add(HEAD_NORM, input=qkv, heads=heads, vectors=vectors, vector2=k_weight, eps=norm.eps, flags=flags)

    def rope(self, qkv: int, heads: int) -> None:
        self._add(ROPE, input=qkv, heads=heads)

    def kv_write(self, qkv: int, heads: int, layer: int) -> None:
        self._add(KV_WRITE, input=qkv, heads=heads, layer=layer)

    def attention(
        self, qkv: int, out: int, heads: int, attention: Attention, *, sinks: Sequence[F32] | None = None
    ) -> None:
        """Attention over the pages of layer `attention.kv`; masks and scales as described."""
        beta = attention.temperature or Temperature(0.0, 1)
        self._add(
            ATTENTION,
            input=qkv,
            out=out,
            heads=heads,
            layer=attention.kv,
            window=attention.window,
            scale=attention.scale,
            limit=attention.cap,
            vectors=sinks,
            flags=ATTEND_CHUNK * attention.chunked | ALIBI_BF16 * attention.rounds_biases,
            vector2=np.array(attention.slopes, np.float32) if attention.slopes else None,
            temperature=beta.beta,
            temperature_offset=beta.offset,
            temperature_length=beta.length,
        )

    def scale(self, x: int, out: int, factor: float) -> None:
        self._add(SCALE, input=x, out=out, scale=factor)

    def multiply(self, x: int, out: int, other: int, *, column: int = 0) -> None:
        """out = x * as many columns of `other` from `column` on."""
        self._add(MULTIPLY, input=x, out=out, residual=other, column=column)

    def multiply_by(self, x: int, out: int, vector: F32) -> None:
        """out = x * vector."""
        self._add(MULTIPLY, input=x, out=out, vectors=[vector] * self.shares.n)

    def add(self, x: int, out: int, other: int, *, scale: float = 1.0) -> None:
        """out = scale * (x + other)."""
        self._add(ADD, input=x, out=out, residual=other, scale=scale)

    def mix(self, x: int, out: int, width: int, factors: int | F32, *, residual: int = -1) -> None:
        """Streams [width] side by side: out_i = (residual_i +) sum over j of factors[i][j] x_j.

        Args:
            factors: the buffer that holds them, or constants.
        """
        if isinstance(factors, int):
            self._add(MIX, input=x, out=out, width=width, factors=factors, residual=residual)
        else:
            vectors = [factors.reshape(-1)] * self.shares.n
            self._add(MIX, input=x, out=out, width=width, vectors=vectors, residual=residual)

    def match_rms(self, x: int, out: int, other: int, *, eps: float) -> None:
        """out = x scaled to the root mean square of the first columns of `other`; eps is the least square of x."""
        self._add(MATCH_RMS, input=x, out=out, residual=other, eps=eps)

    def sparsify(self, x: int, out: int, *, cutoff: float, activation: Activation | None = None) -> None:
        """out = activation(max(x - mean(x) - cutoff * deviation(x), 0))."""
        self._add(SPARSIFY, input=x, out=out, scale=cutoff, activation=ACTIVATIONS[activation])

    def router(
        self, logits: int, out: int, router: Router, correction: F32 | None = None, factors: F32 | None = None
    ) -> None:
        """out [2 n_chosen] = the experts of each row and their weights.

        Args:
            correction: added to scores for choosing;  factors: on the weights. Both [n_experts].
        """
        kinds = {"softmax": 0, "sigmoid": ROUTE_SIGMOID, "chosen": ROUTE_CHOSEN, "mixer": ROUTE_MIXER}
        flags = kinds[router.scores] | ROUTE_NORM * router.renormalized | ROUTE_TOP * router.rated_by_best
        self._add(
            ROUTER,
            input=logits,
            out=out,
            n_chosen=router.n_chosen,
            n_groups=router.n_groups,
            n_top_groups=router.n_top_groups,
            vectors=None if correction is None else [correction],
            vector2=factors,
            limit=router.tolerance,
            scale=router.scale,
            eps=router.eps,
            flags=flags,
        )

    def expert_gates(
        self, x: int, out: int, routes: int, weights: Weights, experts: Experts, *, bias: F32 | None = None
    ) -> None:
        """out = activation(gate) * up of each of a row's experts, side by side."""
        self._add(
            EXPERTS,
            input=x,
            out=out,
            factors=routes,
            weights=weights,
            vectors=None if bias is None else [bias],
            n_chosen=experts.router.n_chosen,
            activation=ACTIVATIONS[experts.activation],
            limit=experts.limit,
            flags=EXPERTS_GATED | EXPERTS_WEIGH * experts.weighs_input,
        )

    def expert_sum(
        self,
        x: int,
        out: int,
        routes: int,
        weights: Weights,
        experts: Experts,
        *,
        bias: F32 | None = None,
        residual: int = -1,
        scale: float = 1.0,
    ) -> None:
        """out = (residual +) scale * sum over a row's experts of weight * (weights @ its part of x + bias)."""
        self._add(
            EXPERTS,
            input=x,
            out=out,
            factors=routes,
            weights=weights,
            vectors=None if bias is None else [bias],
            n_chosen=experts.router.n_chosen,
            residual=residual,
            scale=scale,
            flags=EXPERTS_SUM | EXPERTS_WEIGH * experts.weighs_input,
        )

    def linear_into(self, x: int, out: int, weights: Weights, *, column: int = 0, bias: F32 | None = None) -> None:
        """Columns of `out` from `column` on = weights @ x (+ bias); one device."""
        self._add(LINEAR, input=x, out=out, weights=weights, column=column, vectors=None if bias is None else [bias])

    def head_linear(self, x: int, out: int, weights: Weights) -> None:
        """Each head of `out` = the first numbers of its head of `x`, then its matrix times the rest of them."""
        self._add(HEAD_LINEAR, input=x, out=out, weights=weights)

    def latent_norm(self, rows: int, heads: int, norm: Norm, weight: F32) -> None:
        """RMS norm of the values in k heads, in place."""
        self._add(HEAD_NORM, input=rows, heads=heads, vector2=weight, eps=norm.eps, flags=HEADS_LATENT)

    def _add_recurrent(self, kind: int, **rest: Any) -> None:
        if self.shares.n > 1:
            raise Unsupported(f"{self.checkpoint.path}: recurrent layers do not run on several GPUs")
        self._add(kind, **rest)

    def short_conv(
        self,
        x: int,
        out: int,
        layer: int,
        weights: F32,
        *,
        bias: F32 | None = None,
        activation: Activation | None = None,
        column: int = 0,
        gated: bool = False,
    ) -> None:
        """out = activation(causal convolution of columns of `x`, from `column` on).

        Args:
            layer: of the state pool, conv_floats(width, n_taps) numbers.
            weights: [n_taps, width], those of the oldest input first.
            gated: the columns are b, c and u, side by side; the convolution of b * u is multiplied by c.
        """
        self._add_recurrent(
            SHORT_CONV,
            input=x,
            out=out,
            layer=layer,
            width=weights.shape[1],
            vectors=[weights.reshape(-1)],
            vector2=bias,
            activation=ACTIVATIONS[activation],
            column=column,
            flags=CONV_GATED * gated,
        )

    def delta_rule(
        self,
        qkv: int,
        out: int,
        layer: int,
        gates: int,
        *,
        n_heads: int,
        n_groups: int,
        k_dim: int,
        v_dim: int,
        decay: F32,
        bias: F32,
        scale: float,
        eps: float = 1e-6,
        column: int = 0,
        tiled: bool = False,
        negative: bool = False,
    ) -> None:
        """Gated delta rule of n_heads value heads, whose q and k are those of n_groups heads.

        Args:
            qkv: buffer of q heads, k heads and v heads; q and k are normed here.
            layer: of the state pool, head_floats(n_heads, k_dim, v_dim) numbers.
            gates: buffer of n_heads inputs of the update's factor, then n_heads inputs of the decay, from `column` on.
            decay, bias: [n_heads], the decay is exp(decay * softplus(input + bias)): -exp(A_log) and dt_bias.
            scale: factor on q, usually 1 / sqrt(k_dim).
            tiled: head h has q and k of head h % n_groups; else n_heads / n_groups neighbors share them.
            negative: the update's factor is 2 sigmoid(input), not sigmoid(input).
        """
        self._add_recurrent(
            DELTA_RULE,
            input=qkv,
            out=out,
            layer=layer,
            factors=gates,
            column=column,
            n_heads=n_heads,
            n_groups=n_groups,
            k_dim=k_dim,
            v_dim=v_dim,
            vectors=[decay],
            vector2=bias,
            scale=scale,
            eps=eps,
            flags=HEADS_TILED * tiled | DELTA_NEGATIVE * negative,
        )

    def ssm(
        self,
        xbc: int,
        out: int,
        layer: int,
        gates: int,
        *,
        n_heads: int,
        n_groups: int,
        head_dim: int,
        state_dim: int,
        decay: F32,
        skip: F32,
        bias: F32,
        limits: tuple[float, float] = (0.0, 0.0),
        column: int = 0,
    ) -> None:
        """State space model (Mamba-2) of n_heads heads, which share B and C in n_groups groups of neighbors.

        Args:
            xbc: buffer of x heads [head_dim], B [n_groups, state_dim] and C, side by side.
            layer: of the state pool, head_floats(n_heads, state_dim, head_dim) numbers.
            gates: buffer of n_heads numbers dt, from `column` on.
            decay, skip, bias: A = -exp(A_log), D and dt_bias, [n_heads] each.
            limits: least and largest dt after softplus; 0 for no largest.
        """
        self._add_recurrent(
            SSM,
            input=xbc,
            out=out,
            layer=layer,
            factors=gates,
            column=column,
            n_heads=n_heads,
            n_groups=n_groups,
            k_dim=state_dim,
            v_dim=head_dim,
            vectors=[np.concatenate([decay, skip])],
            vector2=bias,
            eps=limits[0],
            limit=limits[1],
        )

    def gated_norm(
        self,
        x: int,
        out: int,
        gate: int,
        weight: F32 | None,
        *,
        eps: float = 0.0,
        n_groups: int = 1,
        column: int = 0,
        gate_first: bool = False,
        activation: Activation = "silu",
    ) -> None:
        """RMS norm of n_groups groups of columns, times activation(columns of `gate` from `column` on).

        Args:
            weight: of all columns, or of each group's; None for no norm.
            gate_first: norm(x * gate) instead of norm(x) * gate.
        """
        self._add(
            GATED_NORM,
            input=x,
            out=out,
            residual=gate,
            column=column,
            vectors=None if weight is None else [weight] * self.shares.n,
            eps=eps,
            n_groups=n_groups,
            activation=ACTIVATIONS[activation],
            flags=GATE_FIRST * gate_first,
        )

    def gather_outputs(self, x: int, out: int) -> None:
        self._add(GATHER_OUTPUTS, input=x, out=out)

    def logits(
        self, x: int, weights: Weights, *, bias: Sequence[F32] | None = None, scale: float = 1.0, cap: float = 0.0
    ) -> None:
        self._add(LOGITS, input=x, weights=weights, vectors=bias, scale=scale, limit=cap)


def _padded(n_rows: int) -> int:
    return -(-n_rows // PANEL_ROWS) * PANEL_ROWS


def _interleave(halves: Sequence[F32]) -> F32:
    length = len(halves[0])
    padded = [np.pad(half, (0, _padded(length) - length)).reshape(-1, PANEL_ROWS) for half in halves]
    return np.stack(padded, axis=1).reshape(-1)
