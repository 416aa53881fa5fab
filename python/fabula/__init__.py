"""Fabula: run language models on the machine you have.

>>> from fabula import Model, SamplingParams
>>> with Model.load() as model:
...     print(model.generate("Once upon a time", SamplingParams(max_tokens=40)).text())

Names are imported on first use, so that `import fabula` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fabula import errors, ops
    from fabula.engine.constraint import Constraint
    from fabula.engine.decoding import Piece
    from fabula.engine.defaults import SamplingDefaults, SamplingDefaultWarning
    from fabula.engine.embedding import Embeddings
    from fabula.engine.generation import Generation, Timings
    from fabula.engine.sampling import SamplingParams
    from fabula.errors import (
        ContextOverflow,
        DeviceError,
        DeviceOutOfMemory,
        DownloadError,
        EngineBusy,
        EngineError,
        InvalidArgument,
        ModelFileError,
        ModelNotFound,
        NonFinite,
        OutOfMemory,
        SessionBusy,
        SessionExists,
        SessionNotFound,
        StoreCorrupt,
        StoreError,
        StoreFull,
        StoreLocked,
        StoreReadOnly,
        StoreTooNew,
        TemplateError,
        TokenizerError,
        Unsupported,
    )
    from fabula.formats.locate import pull
    from fabula.model import Model
    from fabula.models.builder import DamagedWeightWarning
    from fabula.models.description import ModelConfig
    from fabula.sessions.policy import ContextPolicy
    from fabula.sessions.reply import Reply
    from fabula.sessions.session import Session
    from fabula.sessions.turn import Turn
    from fabula.sessions.views import Alternative, Count
    from fabula.text.tokenizer import Tokenizer, TokenizerWarning
    from fabula.workspace import Workspace

# Module of each public name; "" if the name is a module.
_HOMES = {
    "Alternative": "sessions.views",
    "Constraint": "engine.constraint",
    "ContextOverflow": "errors",
    "ContextPolicy": "sessions.policy",
    "Count": "sessions.views",
    "DamagedWeightWarning": "models.builder",
    "DeviceError": "errors",
    "DeviceOutOfMemory": "errors",
    "DownloadError": "errors",
    "Embeddings": "engine.embedding",
    "EngineBusy": "errors",
    "EngineError": "errors",
    "Generation": "engine.generation",
    "InvalidArgument": "errors",
    "Model": "model",
    "ModelConfig": "models.description",
    "ModelFileError": "errors",
    "ModelNotFound": "errors",
    "NonFinite": "errors",
    "OutOfMemory": "errors",
    "Piece": "engine.decoding",
    "Reply": "sessions.reply",
    "SamplingDefaultWarning": "engine.defaults",
    "SamplingDefaults": "engine.defaults",
    "SamplingParams": "engine.sampling",
    "Session": "sessions.session",
    "SessionBusy": "errors",
    "SessionExists": "errors",
    "SessionNotFound": "errors",
    "StoreCorrupt": "errors",
    "StoreError": "errors",
    "StoreFull": "errors",
    "StoreLocked": "errors",
    "StoreReadOnly": "errors",
    "StoreTooNew": "errors",
    "TemplateError": "errors",
    "Timings": "engine.generation",
    "Tokenizer": "text.tokenizer",
    "TokenizerError": "errors",
    "TokenizerWarning": "text.tokenizer",
    "Turn": "sessions.turn",
    "Unsupported": "errors",
    "Workspace": "workspace",
    "errors": "",
    "ops": "",
    "pull": "formats.locate",
}

__all__ = [
    "Alternative",
    "Constraint",
    "ContextOverflow",
    "ContextPolicy",
    "Count",
    "DamagedWeightWarning",
    "DeviceError",
    "DeviceOutOfMemory",
    "DownloadError",
    "Embeddings",
    "EngineBusy",
    "EngineError",
    "Generation",
    "InvalidArgument",
    "Model",
    "ModelConfig",
    "ModelFileError",
    "ModelNotFound",
    "NonFinite",
    "OutOfMemory",
    "Piece",
    "Reply",
    "SamplingDefaultWarning",
    "SamplingDefaults",
    "SamplingParams",
    "Session",
    "SessionBusy",
    "SessionExists",
    "SessionNotFound",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreReadOnly",
    "StoreTooNew",
    "TemplateError",
    "Timings",
    "Tokenizer",
    "TokenizerError",
    "TokenizerWarning",
    "Turn",
    "Unsupported",
    "Workspace",
    "__version__",
    "errors",
    "ops",
    "pull",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fabula' has no attribute {name!r}")
    value = getattr(import_module(f"fabula.{home}"), name) if home else import_module(f"fabula.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
