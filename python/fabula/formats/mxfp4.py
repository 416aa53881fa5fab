"""MXFP4 tensors of safetensors files: two tensors of bytes, as gpt-oss has them.

    NAME_blocks  U8 [..., rows, n, 16]    n blocks of 32 columns; byte i holds column 2 i in its low nibble, 2 i + 1 in
                                          its high one
    NAME_scales  U8 [..., rows, n]        exponents, biased by 127

They become one tensor NAME [..., rows, 32 n] in the blocks that GGUF has, which hold the same bits in another order:
the scale first, then bytes with columns j and j + 16.

Source: OCP Microscaling Formats 1.0; `convert_moe_packed_tensors` of transformers 5.24 for the order of nibbles.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError
from fabula.formats.checkpoint import DType, TensorInfo

BLOCKS, SCALES = "_blocks", "_scales"
_COLUMNS, _HELD, _BYTES = 32, 16, 17  # of a block: columns, bytes of codes, bytes with the scale
_AT_A_TIME = 1 << 16  # blocks converted at a time: temporary arrays of 4 MB


def joined(name: str, blocks: tuple[int, ...], scales: tuple[int, ...], path: Path) -> TensorInfo:
    """The tensor that two tensors of bytes stand for.

    Args:
        name: of the tensor.
        blocks, scales: their shapes.
        path: for error messages.

    Raises:
        ModelFileError: the shapes do not belong together.
    """
    if len(blocks) < 3 or blocks[-1] != _HELD or scales != blocks[:-1]:
        raise ModelFileError(
            f"{path}: tensor {name + BLOCKS!r} has shape {list(blocks)} and {name + SCALES!r} {list(scales)}, must be"
            f" [..., rows, n, {_HELD}] and [..., rows, n] for MXFP4",
            path=path,
            field=name + BLOCKS,
        )
    return TensorInfo(name, DType.MXFP4, (*blocks[:-2], _COLUMNS * blocks[-2]), prod(scales) * _BYTES)


def ggml_blocks(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Joins codes uint8 [16 n] and scales uint8 [n] to blocks uint8 [17 n]."""
    codes, out = blocks.reshape(-1, _HELD), np.empty((scales.size, _BYTES), np.uint8)
    out[:, 0] = scales.reshape(-1)
    for first in range(0, len(codes), _AT_A_TIME):
        part = codes[first : first + _AT_A_TIME]
        columns = np.stack([part & 15, part >> 4], axis=2).reshape(-1, _COLUMNS)
        out[first : first + _AT_A_TIME, 1:] = columns[:, :_HELD] | columns[:, _HELD:] << 4
    return out.reshape(-1)
