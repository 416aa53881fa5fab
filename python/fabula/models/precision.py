"""The formats of a model's matrices in memory: those of the checkpoint, or others chosen by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from fabula.choices import WEIGHTS_ALIASES, WEIGHTS_NAMES
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import Checkpoint, DType, TensorInfo
from fabula.formats.gguf import BLOCKS
from fabula.formats.gguf_names import gguf_name
from fabula.models.description import ModelConfig
from fabula.models.recipe import KINDS, Shape, dtype_for

Precision = Callable[[TensorInfo], DType]
_EXPERT = re.compile(r"\.mlp\.(experts(\.\d+)?|shared_experts?)\.")


def everywhere(dtype: DType) -> Precision:
    """Every matrix in `dtype`; f16 if its rows are not whole blocks."""
    size = BLOCKS[dtype][0]
    return lambda info: dtype if info.shape[-1] % size == 0 else DType.F16


def precision_of(name: str, config: ModelConfig) -> Precision:
    """The precision that `--weights NAME` selects.

    Args:
        name: one of `choices.WEIGHTS_NAMES`. "auto" keeps each matrix as in the checkpoint; the others choose a format
            by the role of the matrix, as `fabula quantize` does.
        config: of the model.

    Raises:
        InvalidArgument: unknown name.
    """
    if name == "auto":
        return lambda info: info.dtype
    kind = KINDS.get(WEIGHTS_ALIASES.get(name, name))
    if kind is None:
        raise InvalidArgument(f"weights is {name!r}, must be one of {', '.join(WEIGHTS_NAMES)}")
    if BLOCKS[kind.dtype][0] == 1:
        return everywhere(kind.dtype)
    shape = Shape(config.n_layers, config.n_heads // config.n_kv_heads, config.tied)

    def choose(info: TensorInfo) -> DType:
        if len(info.shape) < 2:
            return dtype_for(kind, info.name, info.shape, shape)
        name = _EXPERT.sub(".mlp.", info.name)  # an expert's matrix has the role of an MLP's
        name = name.replace("gate_up_proj", "gate_proj").removesuffix(".weight") + ".weight"
        # A name of none of the roles: matrices that only some families have.
        return dtype_for(kind, gguf_name(name) or "blk.0.other.weight", info.shape, shape)

    return choose


def block_of(checkpoint: Checkpoint, precision: Precision, ending: str) -> int:
    """Columns per block, in the file and in memory, over all matrices whose names end with `ending`."""
    infos = [info for name, info in checkpoint.tensors.items() if name.endswith(ending) and len(info.shape) == 2]
    return max((BLOCKS[dtype][0] for info in infos for dtype in (info.dtype, precision(info))), default=1)


def label_of(name: str, checkpoint: Checkpoint) -> str:
    """Display name of the weights: for "auto" the format of most bytes, else the full name."""
    if name != "auto":
        return WEIGHTS_ALIASES.get(name, name)
    totals = dict.fromkeys(DType, 0)
    for info in checkpoint.tensors.values():
        if len(info.shape) >= 2:
            totals[info.dtype] += info.n_bytes
    return max(totals, key=lambda dtype: totals[dtype]).name.lower()


def identity_of(name: str, checkpoint: Checkpoint) -> str:
    """Part of the fingerprint: distinguishes results of one checkpoint with different weights."""
    dtypes = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) >= 2}
    is_plain = len(dtypes) == 1 and all(BLOCKS[dtype][0] == 1 for dtype in dtypes)
    return label_of(name, checkpoint) if name != "auto" or is_plain else "auto"
