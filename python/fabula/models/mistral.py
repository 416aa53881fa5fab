"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer, where `sliding_window` is set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig, read_config
from fabula.models.decoder import emit_decoder


def read(config: Mapping[str, Any], path: Path) -> ModelConfig:
    return read_config(config, path, qkv_bias=False, windowed="always")


def emit(builder: ProgramBuilder, config: ModelConfig) -> None:
    emit_decoder(builder, config)
