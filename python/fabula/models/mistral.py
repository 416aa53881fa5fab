"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer, or in those that `layer_types` name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig, Traits, read_config
from fabula.models.decoder import emit_decoder

TRAITS = Traits(qkv_bias=False, windowed="always", context_length=131072, n_kv_heads=8)


def read(config: Mapping[str, Any], path: Path) -> ModelConfig:
    return read_config(config, path, TRAITS)


def emit(builder: ProgramBuilder, config: ModelConfig) -> None:
    emit_decoder(builder, config)
