"""Facts about a model as Ollama tells them: size, digest, family, quantization, metadata."""

from __future__ import annotations

import datetime
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quart import current_app

from fabula.model import Model
from fabula.models.decoder import has_head
from fabula.models.opening import open_model
from fabula.server.borrowed import Json
from fabula.server.ollama.names import shown
from fabula.server.ollama.writer import rfc3339
from fabula.server.reasoning import Reasoning
from fabula.server.state import Serving, server

_KEY = "fabula.ollama.facts"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint says of itself.

    Attributes:
        format: "gguf" or "safetensors".
        family: its architecture's name.
        n_parameters: numbers in its tensors.
        n_bytes: size of its files.
        modified: time of its last change.
        has_head: whether it generates text.
        info: metadata by GGUF's names.
    """

    format: str
    family: str
    n_parameters: int
    n_bytes: int
    modified: datetime.datetime
    has_head: bool
    info: dict[str, Any]


async def facts_of(serving: Serving) -> Facts | None:
    """The facts of a model; None while it is not loaded. Read from its files once."""
    model = serving.model
    if model is None:
        return None
    known: dict[str, Facts] = current_app.extensions.setdefault(_KEY, {})
    if serving.name not in known:
        known[serving.name] = await server().call(lambda: _read(model))
    return known[serving.name]


def _read(model: Model) -> Facts:
    checkpoint, config = open_model(model.path)
    try:
        shapes = [tensor.shape for name, tensor in checkpoint.tensors.items()]
        format, head = checkpoint.format, has_head(checkpoint, config)
    finally:
        checkpoint.close()
    n_parameters = sum(math.prod(shape) for shape in shapes)
    family = config.model_type
    info = {
        "general.architecture": family,
        "general.parameter_count": n_parameters,
        f"{family}.context_length": model.context,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.block_count": config.n_layers,
        f"{family}.attention.head_count": config.n_heads,
        f"{family}.attention.head_count_kv": config.n_kv_heads,
        f"{family}.vocab_size": config.vocab_size,
    }
    files = _files(model.path)
    modified = max((file.stat().st_mtime for file in files), default=0.0)
    return Facts(
        format,
        family,
        n_parameters,
        sum(file.stat().st_size for file in files),
        datetime.datetime.fromtimestamp(modified, datetime.UTC),
        head,
        info,
    )


def _files(path: Path) -> list[Path]:
    """The weights' files of a checkpoint."""
    if path.is_file():
        return [path]
    return [file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf") and file.is_file()]


def n_of(count: int) -> str:
    """A number of parameters in short, such as 134.52M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def details(serving: Serving, facts: Facts | None) -> Json:
    """The details that several routes tell."""
    model = serving.model
    family = facts.family if facts is not None else ""
    return {
        "parent_model": "",
        "format": facts.format if facts is not None else "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": n_of(facts.n_parameters) if facts is not None else "",
        "quantization_level": model.weights.upper() if model is not None else "",
    }


def digest(serving: Serving) -> str:
    """64 hexadecimal digits that identify a model's weights; blocks."""
    model = serving.model
    return hashlib.sha256((model.fingerprint.key if model is not None else serving.name).encode()).hexdigest()


async def tag(serving: Serving) -> Json:
    """A model in the list of models."""
    facts, name = await facts_of(serving), shown(serving.name)
    modified = facts.modified if facts is not None else datetime.datetime.fromtimestamp(server().begun_at, datetime.UTC)
    return {
        "name": name,
        "model": name,
        "modified_at": rfc3339(modified),
        "size": facts.n_bytes if facts is not None else 0,
        "digest": await server().call(lambda: digest(serving)),
        "details": details(serving, facts),
    }


def capabilities(model: Model, facts: Facts) -> list[str]:
    """What a model can do, by Ollama's words; blocks."""
    if not facts.has_head:
        return ["embedding"]
    found = ["completion"]
    if model.tokenizer.chat_template is not None:
        found.append("tools")
        if Reasoning(model).form is not None:
            found.append("thinking")
    return found
