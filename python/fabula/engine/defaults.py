"""A model's sampling defaults: the values that its files recommend for settings that are not given.

They come, in this order, from the table of models that Fabula fetches by name, from a GGUF's sampling keys, or from
generation_config.json. SDK, server and command line leave settings that are not given unset (`SamplingParams.given`);
`Generation` fills them in, and each turn stores the resolved values.

A value that cannot be used is skipped with a warning that names file and key: the model can still be loaded, since only
the choice of tokens depends on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fabula.engine.sampling import MODEL_SETTINGS, SamplingParams
from fabula.errors import InvalidArgument, shown
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.download import KNOWN_MODELS
from fabula.formats.readfile import read_json_object
from fabula.lean_dataclasses import dataclass, field, replace

GENERATION_CONFIG = "generation_config.json"
_MAX_BYTES = 16 << 20  # as of the other settings in a folder
_INTEGERS = ("top_k", "penalty_window")

# Key of generation_config.json -> setting. Source: transformers' GenerationConfig.
_HF_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
}
# Key of a GGUF -> setting. Source: gguf-py's constants.py and llama.cpp's common.cpp, which reads them as its defaults.
GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.xtc_threshold": "xtc_threshold",
    "general.sampling.penalty_last_n": "penalty_window",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_GGUF_PREFIX = "general.sampling."
_MIROSTAT = "general.sampling.mirostat"  # 0: off; keys with this prefix then have no meaning


# Of the terminal commands, for models that recommend nothing: small models ramble when all tokens may be sampled.
# SDK and server use neutral values then.
TERMINAL: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {"chat": {"temperature": 0.7, "top_p": 0.9}, "story": {"temperature": 0.8, "top_p": 0.95}}
)


class SamplingDefaultWarning(UserWarning):
    """A sampling default of a model's files cannot be used."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The sampling settings that a model recommends.

    Attributes:
        values: by the names of `SamplingParams`; missing ones are neutral.
        source: "generation_config.json", "gguf", "model card", or "" for none.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Every setting that can have a model default, with its value, and the source of the values."""
        params = SamplingParams().resolved(self.values)
        return {name: getattr(params, name) for name in MODEL_SETTINGS} | {"source": self.source}

    def summary(self) -> str:
        """One line for people."""
        if not self.values:
            terminal = "; ".join(f"{kind} {_words(values)}" for kind, values in TERMINAL.items())
            return f"none, so temperature 1 and nothing else; in the terminal {terminal}"
        return f"{_words(self.values)} ({self.source})"

    def in_terminal(self, params: SamplingParams, kind: str) -> SamplingParams:
        """Settings of a terminal command; those not given are TERMINAL's, if the model recommends nothing.

        Args:
            params: as the command line gives them.
            kind: "chat" or "story".
        """
        missing = {} if self.values else {k: v for k, v in TERMINAL[kind].items() if k not in params.given}
        return replace(params, **missing) if missing else params  # type: ignore[arg-type]


def _words(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def read_defaults(checkpoint: Checkpoint) -> SamplingDefaults:
    """The sampling defaults of a model.

    Raises:
        ModelFileError: generation_config.json is not a JSON object.
    """
    known = _of_known(checkpoint.path)
    if known:
        return SamplingDefaults(known, "model card")
    if checkpoint.format == "gguf":
        values = dict(_of_gguf(checkpoint.metadata, checkpoint.path))
        return SamplingDefaults(values, "gguf" if values else "")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return SamplingDefaults()
    values = dict(_of_generation_config(read_json_object(path, max_bytes=_MAX_BYTES, wide_integers=True), path))
    return SamplingDefaults(values, GENERATION_CONFIG if values else "")


def _of_known(path: Path) -> Mapping[str, float]:
    for known in KNOWN_MODELS.values():
        if path.name == known.file and path.stat().st_size == known.n_bytes:
            return known.sampling
    return {}


def _of_generation_config(found: Mapping[str, Any], path: Path) -> Iterator[tuple[str, float]]:
    for key, setting in _HF_KEYS.items():
        if (value := _checked(setting, found.get(key), key, path)) is not None:
            yield setting, value
    do_sample = found.get("do_sample")
    if do_sample is False:
        yield "temperature", 0.0  # greedy, whatever the temperature
    elif do_sample not in (None, True):
        _warn(path, "do_sample", do_sample, "must be true or false")


def _of_gguf(metadata: Mapping[str, Any], path: Path) -> Iterator[tuple[str, float]]:
    for key, setting in GGUF_KEYS.items():
        if (value := _checked(setting, metadata.get(key), key, path)) is not None:
            yield setting, value
    unused = [key for key in metadata if key.startswith(_GGUF_PREFIX) and key not in GGUF_KEYS]
    for key in sorted(unused):
        if not key.startswith(_MIROSTAT) or (key == _MIROSTAT and metadata[key] != 0):
            _warn(path, key, metadata[key], "is not offered here")


def _checked(setting: str, value: object, key: str, path: Path) -> float | None:
    """A valid value of a setting; None if it is missing or cannot be used."""
    if value is None:
        return None
    if setting in _INTEGERS and isinstance(value, float) and value.is_integer():
        value = int(value)
    if setting == "top_k" and type(value) is int and value < 0:
        value = 0  # -1 means off, too
    try:
        params = SamplingParams(**{setting: value})  # type: ignore[arg-type]
    except InvalidArgument as error:
        _warn(path, key, value, str(error).rpartition(", ")[2])
        return None
    found: float = getattr(params, setting)
    return found


def _warn(path: Path, key: str, value: object, why: str) -> None:
    warnings.warn(
        f"{path}: {key} is {shown(value)}, {why}; the model has no default for it", SamplingDefaultWarning, stacklevel=2
    )
