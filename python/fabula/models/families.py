"""The model families, by `model_type` of config.json: one row each.

All of them are the decoder of models/decoder.py with other switches. A family whose layers differ gets a file of its
own with an `emit` function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported
from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig, Traits, read_config
from fabula.models.decoder import emit_decoder


@dataclass(frozen=True, slots=True)
class Family:
    """A family: how its config is read and its program emitted.

    Attributes:
        name: as people write it.
        traits: switches and defaults of its config.
        head_norm: whether each q and k head has an RMS norm before it is rotated.
    """

    name: str
    traits: Traits
    head_norm: bool = False

    def read(self, config: Mapping[str, Any], path: Path) -> ModelConfig:
        """Checks a config.json; `path` is named in errors.

        Raises:
            ModelFileError, Unsupported: see `read_config`.
        """
        return read_config(config, path, self.traits)

    def emit(self, builder: ProgramBuilder, config: ModelConfig) -> None:
        """Adds the model's operators to `builder`; see `emit_decoder`."""
        emit_decoder(builder, config, head_norm=self.head_norm)


FAMILIES: Mapping[str, Family] = {
    # Touvron et al. 2023; Llama 2 and 3; SmolLM, TinyLlama, Yi and others of the same form.
    "llama": Family("Llama", Traits(mlp_bias=True)),
    # Jiang et al. 2023: a sliding window in every layer, or in those that `layer_types` names.
    "mistral": Family("Mistral", Traits(qkv_bias=False, windowed="always", context_length=131072, n_kv_heads=8)),
    # Qwen team 2024, Qwen2 and Qwen2.5: biases on q, k and v, optional windows in the upper layers.
    "qwen2": Family("Qwen2", Traits(qkv_bias=True, windowed="switched", context_length=32768, n_kv_heads=32)),
    # Qwen team 2025: norms on q and k heads.
    "qwen3": Family(
        "Qwen3", Traits(windowed="switched", context_length=32768, n_kv_heads=32, head_dim=128), head_norm=True
    ),
}


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.

    Raises:
        ModelFileError: `model_type` is missing or not a string.
        Unsupported: no such family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{path}: config 'model_type' is missing", path=path, field="model_type")
    if kind not in FAMILIES:
        raise Unsupported(f"{path}: model family {kind[:60]!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
