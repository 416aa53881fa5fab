"""Llama (Touvron et al. 2023), Llama 2 and 3, and what follows their form: SmolLM, TinyLlama, Yi, ..."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig, Traits, read_config
from fabula.models.decoder import emit_decoder

TRAITS = Traits(mlp_bias=True)


def read(config: Mapping[str, Any], path: Path) -> ModelConfig:
    return read_config(config, path, TRAITS)


def emit(builder: ProgramBuilder, config: ModelConfig) -> None:
    emit_decoder(builder, config)
