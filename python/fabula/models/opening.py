"""Opens a model and checks its config and tensors: the common part of `load` and `inspect`.

Problems are found in a fixed order, before weights are read: storage of the weights, family, config, then (after the
tokenizer, which the caller loads) rope and tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fabula._native import Weight, dtype_block
from fabula._program import RopeTable
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import Checkpoint, DType
from fabula.formats.open import gguf_files, has_safetensors, open_checkpoint
from fabula.formats.quantized import refuse_quantized
from fabula.formats.readfile import read_json_object
from fabula.formats.safetensors import ADAPTER_FILE, CONFIG_FILE, MAX_CONFIG_BYTES
from fabula.formats.text_part import text_part
from fabula.models.builder import F32, PANEL_ROWS, ProgramBuilder
from fabula.models.decoder import emit_decoder
from fabula.models.description import ModelConfig
from fabula.models.families import family_of
from fabula.models.packing import Part
from fabula.models.precision import Precision, precision_of
from fabula.models.rope import longest_context, make_rope
from fabula.models.shares import Axis, Shares
from fabula.models.views import viewed


def open_model(path: Path) -> tuple[Checkpoint, ModelConfig]:
    """Opens a model and reads its config.

    Raises:
        ModelNotFound: the path does not exist.
        ModelFileError: it is not a model, or a damaged one.
        Unsupported: the weights were quantized by another tool, or the family or a field of its config is unsupported.
    """
    path = Path(path)
    _refuse_family(path)
    checkpoint = open_checkpoint(path)
    try:
        return checkpoint, family_of(checkpoint.config, checkpoint.path).read(checkpoint.config, checkpoint.path)
    except BaseException:
        checkpoint.close()
        raise


def lay_out(builder: ProgramBuilder, config: ModelConfig, context: int) -> tuple[RopeTable, ...]:
    """Emits the model's program into a builder and computes its rope tables.

    Raises:
        ModelFileError: a tensor is missing or its shape does not match the config, or a rope value is out of range.
        Unsupported: an unsupported tensor format or rope scaling.
    """
    path = builder.checkpoint.path
    ropes = [make_rope(rope, head_dim, config.context_length, context, path) for rope, head_dim in config.ropes]
    emit_decoder(builder, config)
    return tuple(RopeTable(rope.inv_freq, rope.scale) for rope in ropes)


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises and warns like loading, from names, formats and shapes alone; errors as `lay_out`."""
    checkpoint = viewed(checkpoint, config)
    lay_out(_Checker(checkpoint, precision_of("auto", config), 1, Shares(config)), config, config.context_length)


def check_context(checkpoint: Checkpoint, config: ModelConfig, context: int | None) -> None:
    """Raises InvalidArgument for a context longer than the model supports."""
    longest = longest_context(config)
    if context is None or context <= longest:
        return
    scaling = (
        "a .gguf file with the keys rope.scaling.type and rope.scaling.factor"
        if checkpoint.format == "gguf"
        else 'a config.json with rope_scaling: {"rope_type": "yarn", "factor": 4.0,'
        f' "original_max_position_embeddings": {config.context_length}}} reaches 4 times as far'
    )
    raise InvalidArgument(
        f"context is {context}, but {checkpoint.path.name} was made for {longest} positions; beyond them answers mean"
        f" little. Take {longest} or fewer, and a context policy (slide, drop_oldest_turns) for longer conversations. A"
        f" model that can be stretched, as its card says, needs {scaling}"
    )


def packed_bytes(checkpoint: Checkpoint, precision: Precision, config: ModelConfig, shares: Shares) -> int:
    """Bytes that the packed matrices of a model take, from names, formats and shapes alone; errors as `lay_out`."""
    builder = _Sizes(checkpoint, precision, 1, shares)
    emit_decoder(builder, config)
    return builder.n_bytes


class _Checker(ProgramBuilder):
    """A builder that checks tensors without reading them."""

    n_bytes = 0  # of the weights that it stands for

    def vector(self, name: str, length: int) -> F32:
        self._check(name, (length,))
        return np.zeros(length, np.float32)

    def table(self, name: str, n_rows: int, n_columns: int) -> F32:
        self._check(name, (n_rows, n_columns))
        return np.zeros((n_rows, n_columns), np.float32)

    def taps(self, name: str, width: int, n_taps: int) -> F32:
        self._check_taps(name, width, n_taps)
        return np.zeros((n_taps, width), np.float32)

    def scalar(self, name: str) -> float:
        self._check_scalar(name)
        return 1.0

    def _weights(self, dtype: DType, n_rows: Sequence[int], columns: Axis, parts: Sequence[Part]) -> list[Weight]:
        del parts
        for n, share in zip(n_rows, columns.shares, strict=True):
            self.n_bytes += _weight_bytes(dtype, n, len(share))
        return [cast(Weight, _Rows(n)) for n in n_rows]

    def _expert_weights(self, dtype: DType, n_rows: int, n_columns: int, n: int, parts: Sequence[Part]) -> list[Weight]:
        del parts
        self.n_bytes += n * _weight_bytes(dtype, n_rows, n_columns)
        return [cast(Weight, _Rows(n_rows))]


class _Sizes(_Checker):
    """A builder that only counts bytes, and leaves warnings to the one that loads."""

    def warn_of_unused(self, spare: Collection[str] = ()) -> None:
        del spare


def _weight_bytes(dtype: DType, n_rows: int, n_columns: int) -> int:
    """Bytes of a weight in memory: whole panels, in pairs for the plain formats."""
    size, _ = dtype_block(dtype)
    rows, columns = (2 * PANEL_ROWS, 2 if dtype is DType.BF16 else 1) if size == 1 else (PANEL_ROWS, size)
    return -(-n_rows // rows) * -(-n_columns // columns) * Weight(dtype, rows, columns).n_bytes


class _Rows:
    """Stands for a Weight: operators only need its rows."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows


def _refuse_family(path: Path) -> None:
    """Refuses an unknown family first, so that no error suggests to convert its weights."""
    config_file = path / CONFIG_FILE
    if not config_file.is_file() or (path / ADAPTER_FILE).exists():
        return
    if has_safetensors(path) or not gguf_files(path):
        config = text_part(read_json_object(config_file, max_bytes=MAX_CONFIG_BYTES))
        refuse_quantized(config, path)
        if isinstance(config.get("model_type"), str):
            family_of(config, path)
