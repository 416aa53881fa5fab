"""Qwen2 and Qwen2.5 (Qwen team 2024): Llama with biases on q, k and v, and optional windows in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig, Traits, read_config
from fabula.models.decoder import emit_decoder

TRAITS = Traits(qkv_bias=True, windowed="switched", context_length=32768, n_kv_heads=32)


def read(config: Mapping[str, Any], path: Path) -> ModelConfig:
    return read_config(config, path, TRAITS)


def emit(builder: ProgramBuilder, config: ModelConfig) -> None:
    emit_decoder(builder, config)
