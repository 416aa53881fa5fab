"""Qwen3 (Qwen team 2025): Llama with an RMS norm on every q and k head before they are rotated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig, Traits, read_config
from fabula.models.decoder import emit_decoder

TRAITS = Traits(windowed="switched", context_length=32768, n_kv_heads=32, head_dim=128)


def read(config: Mapping[str, Any], path: Path) -> ModelConfig:
    return read_config(config, path, TRAITS)


def emit(builder: ProgramBuilder, config: ModelConfig) -> None:
    emit_decoder(builder, config, head_norm=True)
