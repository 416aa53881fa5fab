"""Writes any supported model as a GGUF file of another precision, tensor by tensor.

From a Hugging Face folder, config, tokenizer and chat template become key-values (metadata.py, vocabulary.py), tensors
get GGUF's names and forms (tensors.py), and what the keys cannot say is refused (losses.py). A GGUF file keeps its
key-values and rows. Memory use is one tensor's bytes, and a piece of it in f32.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula.engine.defaults import read_defaults
from fabula.engine.threads import default_threads
from fabula.errors import InvalidArgument, NonFinite, Unsupported, shown
from fabula.export.factors import folded
from fabula.export.losses import refuse_losses
from fabula.export.metadata import (
    architecture_of,
    config_keys,
    has_sinks,
    numbers_of_xielu,
    rope_tensors,
    sampling_keys,
)
from fabula.export.peer_notes import llama_cpp_notes
from fabula.export.tensors import laid_out
from fabula.export.vocabulary import vocabulary_keys
from fabula.formats.checkpoint import Checkpoint, DType
from fabula.formats.gguf import BLOCKS, GgufFile
from fabula.formats.gguf_config import QUANTIZATION_VERSION
from fabula.formats.gguf_names import NO_SINK
from fabula.formats.gguf_split import GgufParts, open_gguf_file
from fabula.formats.gguf_write import GgufWriter, NewTensor, Value
from fabula.formats.open import open_checkpoint
from fabula.models.decoder import has_head
from fabula.models.description import ModelConfig
from fabula.models.families import family_of
from fabula.models.recipe import KINDS, Shape, dtype_for, role_of
from fabula.models.views import viewed
from fabula.text.tokenizer import Tokenizer

__all__ = ["Report", "Role", "quantize_model"]

_PIECE = 1 << 22  # elements in f32 at a time: 16 MiB


@dataclass(slots=True)
class Role:
    """Statistics of all tensors with one role, e.g. ffn_down.

    Attributes:
        name: see `role_of`.
        n_parameters: number of their elements.
        bytes_before, bytes_after: size of their data.
        dtypes: number of tensors in each format written.
        missed, total: sums of squares of errors and of elements.
    """

    name: str
    n_parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    missed: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        """Relative RMS error: sqrt(sum of squared errors / sum of squared elements)."""
        return math.sqrt(self.missed / self.total) if self.total > 0 else 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / self.n_parameters


@dataclass(frozen=True, slots=True)
class Report:
    """Result of `quantize_model`.

    Attributes:
        path: the file.
        kind: quantization type, a key of `KINDS`.
        file_bytes: size of the file.
        roles: statistics by role of the tensors.
        fallbacks: number of tensors whose rows are not whole blocks of the format.
        requantized: whether the source was quantized already, so that errors add up.
        notes: what other readers do not read, or read differently; one sentence each.
    """

    path: Path
    kind: str
    file_bytes: int
    roles: tuple[Role, ...]
    fallbacks: int
    requantized: bool
    notes: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        return sum(role.n_parameters for role in self.roles)

    @property
    def bytes_before(self) -> int:
        return sum(role.bytes_before for role in self.roles)

    @property
    def bytes_after(self) -> int:
        return sum(role.bytes_after for role in self.roles)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / self.n_parameters

    @property
    def error(self) -> float:
        """Relative RMS error over all tensors."""
        total = sum(role.total for role in self.roles)
        return math.sqrt(sum(role.missed for role in self.roles) / total) if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A source tensor with its GGUF name; `read` returns uint8 [n_bytes] with rows in GGUF's order."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    n_bytes: int
    read: Callable[[], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class _Source:
    metadata: Mapping[str, Value]
    tensors: list[_Tensor]
    shape: Shape
    notes: list[str]


def quantize_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    kind: str,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Writes the model at `source` to the GGUF file `target`.

    Args:
        source: Hugging Face folder, .safetensors or .gguf file.
        target: file to write; it appears only when complete.
        kind: a key of `fabula.models.recipe.KINDS`, e.g. "q4_k_m".
        threads: None for as many as the process may use.
        overwrite: whether to replace an existing `target`.
        progress: callback (bytes done, total bytes) of the source's tensors.

    Raises:
        InvalidArgument: an unknown kind, or `target` exists.
        ModelFileError: the source is damaged or incomplete.
        NonFinite: a tensor holds NaN, infinity or a number too large for its format; names tensor and position.
        Unsupported: a family, vocabulary or setting that GGUF cannot express.
        StoreFull, StoreReadOnly, StoreError: the target cannot be written.
    """
    if kind not in KINDS:
        raise InvalidArgument(f"type is {shown(kind)}, must be one of {', '.join(KINDS)}")
    n_threads = default_threads() if threads is None else threads
    path = Path(source)
    with _opened(path) as model:
        chosen = [dtype_for(KINDS[kind], t.name, t.shape, model.shape) for t in model.tensors]
        new = [NewTensor(t.name, dtype, t.shape) for t, dtype in zip(model.tensors, chosen, strict=True)]
        metadata = {
            **model.metadata,
            "general.file_type": KINDS[kind].file_type,
            "general.quantization_version": QUANTIZATION_VERSION,
        }
        roles: dict[str, Role] = {}
        done, total = 0, sum(tensor.n_bytes for tensor in model.tensors)
        with GgufWriter(target, metadata, new, overwrite=overwrite) as writer:
            for tensor, result in zip(model.tensors, new, strict=True):
                role = roles.setdefault(role_of(tensor.name), Role(role_of(tensor.name)))
                raw = tensor.read()
                n_rows = math.prod(tensor.shape[:-1])
                for first, piece in _pieces(tensor, raw, n_rows):
                    _write_piece(writer, path, tensor, result, first, piece, role, n_threads)
                    if progress is not None:
                        progress(done + (first + len(piece)) * tensor.n_bytes // n_rows, total)
                done += tensor.n_bytes
                role.n_parameters += math.prod(tensor.shape)
                role.bytes_before += tensor.n_bytes
                role.bytes_after += result.n_bytes
                role.dtypes[result.dtype.name] = role.dtypes.get(result.dtype.name, 0) + 1
        whole_blocks = [t.shape[-1] % BLOCKS[KINDS[kind].dtype][0] == 0 for t in model.tensors if len(t.shape) > 1]
    return Report(
        path=Path(target),
        kind=kind,
        file_bytes=writer.n_bytes,
        roles=tuple(sorted(roles.values(), key=lambda role: -role.n_parameters)),
        fallbacks=whole_blocks.count(False),
        requantized=any(
            BLOCKS[t.dtype][0] > 1 and t.dtype is not d for t, d in zip(model.tensors, chosen, strict=True)
        ),
        notes=tuple(model.notes),
    )


def _pieces(tensor: _Tensor, raw: npt.NDArray[np.uint8], n_rows: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Splits a tensor into runs of rows: (first row, uint8 [rows, row_bytes])."""
    rows = raw.reshape(n_rows, -1)
    step = max(1, _PIECE // tensor.shape[-1])
    for first in range(0, n_rows, step):
        yield first, rows[first : first + step]


def _write_piece(
    writer: GgufWriter,
    path: Path,
    tensor: _Tensor,
    result: NewTensor,
    first: int,
    piece: npt.NDArray[np.uint8],
    role: Role,
    n_threads: int,
) -> None:
    n_cols = tensor.shape[-1]
    values = _native.dequantize(tensor.dtype, piece.reshape(-1), len(piece) * n_cols)
    try:
        out = _native.quantize(result.dtype, values.reshape(-1, n_cols), n_threads)
    except NonFinite as error:
        start = f", rows counted from {first}" if first else ""
        raise NonFinite(f"{path}: tensor {shown(tensor.name)}{start}: {error}", status=error.status) from None
    if result.dtype is tensor.dtype:
        out = piece.reshape(-1)  # unchanged: quantizing again would only add error
    else:
        back = _native.dequantize(result.dtype, out, values.size)
        role.missed += float(np.square(back - values, dtype=np.float64).sum())
    role.total += float(np.square(values, dtype=np.float64).sum())
    writer.write(result.name, out)


# ---- Sources --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    checkpoint = open_checkpoint(path)
    try:
        family = family_of(checkpoint.config, checkpoint.path)
        config = family.read(checkpoint.config, checkpoint.path)
        if not has_head(checkpoint, config):
            raise Unsupported(
                f"{path}: has no head (lm_head.weight); in a GGUF file its embedding would be taken for one"
            )
        shape = Shape(config.n_layers, config.n_heads // config.n_kv_heads, config.tied)
        if checkpoint.format == "gguf":
            with open_gguf_file(checkpoint.path) as file:
                source = _from_gguf(file, config, shape)
                yield replace(source, metadata={**sampling_keys(read_defaults(checkpoint)), **source.metadata})
        else:
            source = _from_folder(checkpoint, config, shape)
            yield replace(source, metadata={**source.metadata, **sampling_keys(read_defaults(checkpoint))})
    finally:
        checkpoint.close()


def _from_gguf(file: GgufFile | GgufParts, config: ModelConfig, shape: Shape) -> _Source:
    metadata: dict[str, Value] = {}
    for key, value in file.metadata.items():
        if not key.startswith(("split.", "quantize.")):  # properties of the source file, not of the model
            metadata[key] = cast("Value", value)
    tensors = [
        _Tensor(t.name, t.dtype, t.shape, t.n_bytes, lambda name=t.name: file.read(name))  # type: ignore[misc]
        for t in file.tensors.values()
    ]
    return _Source(metadata, tensors, shape, list(llama_cpp_notes(config, metadata, file.tensors)))


def _from_folder(checkpoint: Checkpoint, config: ModelConfig, shape: Shape) -> _Source:
    path = checkpoint.path
    folder = path if path.is_dir() else path.parent
    source, config = folded(viewed(checkpoint, config), config)
    arch = architecture_of(config, path)
    metadata = config_keys(config, folder.resolve().name or "model", path)
    vocabulary, notes = vocabulary_keys(Tokenizer.from_folder(folder), config.vocab_size)
    metadata |= vocabulary | numbers_of_xielu(checkpoint, config)
    source, shapes = laid_out(source, config, arch)
    tensors: list[_Tensor] = []
    for name, factors in rope_tensors(config, path).items():
        raw = factors.view(np.uint8)
        tensors.append(_Tensor(name, DType.F32, factors.shape, factors.nbytes, lambda raw=raw: raw))  # type: ignore[misc]
    for name, tensor_shape in shapes.items():
        info = source.tensors[name]
        tensors.append(_Tensor(name, info.dtype, tensor_shape, info.n_bytes, lambda name=name: source.read(name)))  # type: ignore[misc]
    if has_sinks(arch):
        none = np.full(config.n_heads, NO_SINK).view(np.uint8)
        names = [f"blk.{layer}.attn_sinks.weight" for layer in range(config.n_layers)]
        tensors += [_Tensor(name, DType.F32, (config.n_heads,), none.nbytes, lambda: none) for name in names]
    refuse_losses(path, config, metadata, {tensor.name: tensor for tensor in tensors})
    notes += llama_cpp_notes(config, metadata, {tensor.name for tensor in tensors})
    return _Source(metadata, tensors, shape, notes)
