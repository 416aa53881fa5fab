"""From a path to a model whose config and tensors are known to be good: what `load` and `inspect` both go through.

What a checkpoint lacks or asks for too much is found in one order, and before weights are read: how the weights are
stored, the family, the config, then (behind the tokenizer, which is not this file's business) rope and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from fabula._native import Weight
from fabula.errors import InvalidArgument
from fabula.formats.checkpoint import Checkpoint, DType
from fabula.formats.open import gguf_files, has_safetensors, open_checkpoint
from fabula.formats.quantized import refuse_quantized
from fabula.formats.readfile import read_json_object
from fabula.formats.safetensors import ADAPTER_FILE, CONFIG_FILE, MAX_CONFIG_BYTES
from fabula.models.builder import F32, ProgramBuilder
from fabula.models.config import ModelConfig
from fabula.models.families import family_of
from fabula.models.packing import Part
from fabula.models.precision import precision_of
from fabula.models.rope import Rope, longest_context, make_rope
from fabula.models.shares import Axis, Shares


def open_model(path: Path) -> tuple[Checkpoint, ModelConfig]:
    """Opens a model and reads its config.

    Raises:
        ModelNotFound: nothing is there.
        ModelFileError: something is there, but no model, or a damaged one.
        Unsupported: the weights are quantized by another tool, the family is unknown, or its config asks for what
            Fabula does not compute.
    """
    path = Path(path)
    _refuse_family(path)
    checkpoint = open_checkpoint(path)
    try:
        return checkpoint, family_of(checkpoint.config, checkpoint.path).read(checkpoint.config, checkpoint.path)
    except BaseException:
        checkpoint.close()
        raise


def lay_out(builder: ProgramBuilder, config: ModelConfig, context: int) -> Rope:
    """Has the family emit its program into a builder, and finds the angles of its positions.

    Raises:
        ModelFileError: a tensor is missing or of another shape than the config says, or a rope value is out of range.
        Unsupported: a tensor's format or a rope scaling that Fabula does not know.
    """
    checkpoint = builder.checkpoint
    rope = make_rope(config.rope, config.head_dim, config.context_length, context, checkpoint.path)
    family_of(checkpoint.config, checkpoint.path).emit(builder, config)
    return rope


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises and warns as loading would, from names, formats and shapes alone; errors as `lay_out`."""
    lay_out(_Checker(checkpoint, precision_of("auto", config), 1, Shares(config)), config, config.context_length)


def check_context(checkpoint: Checkpoint, config: ModelConfig, context: int | None) -> None:
    """Raises InvalidArgument for a context that the model's positions do not reach."""
    longest = longest_context(config.rope, config.context_length)
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


class _Checker(ProgramBuilder):
    """A builder that looks at what a model's tensors are and reads none of them."""

    def vector(self, name: str, length: int) -> F32:
        self._check(name, (length,))
        return np.zeros(length, np.float32)

    def _weights(self, dtype: DType, n_rows: Sequence[int], columns: Axis, parts: Sequence[Part]) -> list[Weight]:
        del dtype, columns, parts  # nothing is packed
        return [cast(Weight, _Rows(n)) for n in n_rows]


class _Rows:
    """All that the operators want to know of a weight while they are collected."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows


def _refuse_family(path: Path) -> None:
    """Refuses a folder of an unknown family before it is said that its weights lie there in a form to be converted."""
    config_file = path / CONFIG_FILE
    if not config_file.is_file() or (path / ADAPTER_FILE).exists():
        return
    if has_safetensors(path) or not gguf_files(path):
        config = read_json_object(config_file, max_bytes=MAX_CONFIG_BYTES)
        refuse_quantized(config, path)
        if isinstance(config.get("model_type"), str):
            family_of(config, path)
