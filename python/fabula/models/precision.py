"""The formats that a model's matrices are held in: those of the checkpoint, or others chosen by name."""

from __future__ import annotations

from collections.abc import Callable

from fabula.choices import WEIGHTS_ALIASES, WEIGHTS_NAMES
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import Checkpoint, DType, TensorInfo
from fabula.formats.gguf import BLOCKS
from fabula.formats.gguf_names import gguf_name
from fabula.models.config import ModelConfig
from fabula.models.recipe import KINDS, Shape, dtype_for

Precision = Callable[[TensorInfo], DType]


def everywhere(dtype: DType) -> Precision:
    """Every matrix in `dtype`, in f16 where its rows are not whole blocks."""
    size = BLOCKS[dtype][0]
    return lambda info: dtype if info.shape[-1] % size == 0 else DType.F16


def precision_of(name: str, config: ModelConfig) -> Precision:
    """What `--weights NAME` stands for.

    Args:
        name: one of `choices.WEIGHTS_NAMES`. "auto" keeps each matrix as in the checkpoint; the others choose a format
            by the role of the matrix, as `fabula quantize` does.
        config: of the model.

    Raises:
        InvalidArgument: a name that is none.
    """
    if name == "auto":
        return lambda info: info.dtype
    kind = KINDS.get(WEIGHTS_ALIASES.get(name, name))
    if kind is None:
        raise InvalidArgument(f"weights is {name!r}, must be one of {', '.join(WEIGHTS_NAMES)}")
    if BLOCKS[kind.dtype][0] == 1:
        return everywhere(kind.dtype)
    shape = Shape(config.n_layers, config.n_heads // config.n_kv_heads, config.tied)
    return lambda info: dtype_for(kind, gguf_name(info.name) or info.name, info.shape, shape)


def block_of(checkpoint: Checkpoint, precision: Precision, ending: str) -> int:
    """Columns that stay together, in the file and in memory, in all matrices whose names end so."""
    infos = [info for name, info in checkpoint.tensors.items() if name.endswith(ending) and len(info.shape) == 2]
    return max((BLOCKS[dtype][0] for info in infos for dtype in (info.dtype, precision(info))), default=1)


def label_of(name: str, checkpoint: Checkpoint) -> str:
    """How the weights are called: the format of most bytes for "auto", else the full name."""
    if name != "auto":
        return WEIGHTS_ALIASES.get(name, name)
    totals = dict.fromkeys(DType, 0)
    for info in checkpoint.tensors.values():
        if len(info.shape) == 2:
            totals[info.dtype] += info.n_bytes
    return max(totals, key=lambda dtype: totals[dtype]).name.lower()


def identity_of(name: str, checkpoint: Checkpoint) -> str:
    """What tells the numbers computed with these weights from those of the same checkpoint under another name."""
    dtypes = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2}
    is_plain = len(dtypes) == 1 and all(BLOCKS[dtype][0] == 1 for dtype in dtypes)
    return label_of(name, checkpoint) if name != "auto" or is_plain else "auto"
