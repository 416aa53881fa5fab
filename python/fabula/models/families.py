"""The families Fabula knows, by `model_type` of config.json. A new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported
from fabula.models import llama, mistral, qwen2, qwen3
from fabula.models.builder import ProgramBuilder
from fabula.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """A family: how its config is read and its program emitted."""

    name: str
    read: Callable[[Mapping[str, Any], Path], ModelConfig]
    emit: Callable[[ProgramBuilder, ModelConfig], None]


FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama", llama.read, llama.emit),
    "mistral": Family("Mistral", mistral.read, mistral.emit),
    "qwen2": Family("Qwen2", qwen2.read, qwen2.emit),
    "qwen3": Family("Qwen3", qwen3.read, qwen3.emit),
}


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.

    Raises:
        ModelFileError: `model_type` is missing or not text.
        Unsupported: no such family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{path}: config 'model_type' is missing", path=path, field="model_type")
    if kind not in FAMILIES:
        raise Unsupported(f"{path}: model family {kind[:60]!r} is not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind]
