"""Refuses to write a file that would be read as another model.

The key-values are read back as a loader would read them, and the model they describe is compared with the one that is
written, number by number. What differs has no word in GGUF, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fabula.errors import Unsupported
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import GgufTensor
from fabula.formats.gguf_config import ROPE_TENSORS, Source, config_of
from fabula.models.description import ModelConfig
from fabula.models.families import family_of
from fabula.models.rope import make_rope

# Of the whole model; layers are compared one by one, and ropes by their frequencies.
_COMPARED = (
    "n_layers", "hidden_size", "vocab_size", "context_length", "tied", "final_norm", "embedding_scale",
    "n_positions", "logit_scale", "logit_cap", "head_bias", "n_per_layer", "altup", "embedding_norm", "normalized_head",
)  # fmt: skip
_TOLERANCE = 1e-6  # keys are float32


class _Written:
    """The file to be, as config_of wants it."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._tensors = tensors
        self.tensors = {
            name: GgufTensor(name, t.dtype if t.name in ROPE_TENSORS else DType.F32, tuple(t.shape), 0, t.n_bytes)
            for name, t in tensors.items()
        }

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        return cast("npt.NDArray[np.uint8]", self._tensors[name].read())


def refuse_losses(path: Path, config: ModelConfig, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raises Unsupported if the file's keys describe another model than `config`; names what differs.

    Args:
        path: of the source, for error messages.
        config: of the model.
        metadata: key-values of the file.
        tensors: its tensors, with `name`, `dtype`, `shape`, `n_bytes` and `read`.
    """
    arch = metadata["general.architecture"]
    plain = {key: _plain(value) for key, value in metadata.items()}
    written = config_of(cast(Source, _Written(path, plain, tensors)))
    again = family_of(written, path).read(written, path)
    if difference := next(differences(config, again, path), None):
        what, ours, theirs = difference
        raise Unsupported(
            f"{path}: GGUF has no key for this in architecture {arch!r}: {what} is {ours}, and would be read as"
            f" {theirs}"
        )


def _plain(value: Any) -> Any:
    """A value as a reader of the file gets it."""
    if isinstance(value, np.bool_):
        return bool(value)
    return value.item() if isinstance(value, np.generic) else value


def differences(a: ModelConfig, b: ModelConfig, path: Path) -> Iterator[tuple[str, object, object]]:
    """What two models compute differently, by its name, with the value of each. Biases are not compared."""
    for name in _COMPARED:
        yield from _differing(name, getattr(a, name), getattr(b, name))
    yield from _differing("windows", *(tuple(_window(window, c) for window in c.windows) for c in (a, b)))
    for i, (one, other) in enumerate(zip(a.layers, b.layers, strict=False)):
        for what, ours, theirs in _differing(f"layer {i}", one, other):
            part = what.rsplit(" ", 1)[-1]
            if part in ("output_bias", "qkv_bias", "bias", "down_bias", "conv_bias", "out_bias", "kv", "rope", "tiled"):
                continue  # biases are tensors, and are compared as such; rows are written in the architecture's order
            if part == "window" and _window(ours, a) == _window(theirs, b):
                continue
            yield what, ours, theirs
        ropes = [_frequencies(c, layer.attention.rope, path) for c, layer in ((a, one), (b, other))]
        if (ropes[0] is None) != (ropes[1] is None):
            words = ["none" if rope is None else "there" for rope in ropes]
            yield f"layer {i}: rotation", words[0], words[1]
        elif ropes[0] is not None and ropes[1] is not None and not _alike(*ropes[0], *ropes[1]):
            yield f"layer {i}: the rotation's frequencies", ropes[0][0][:3].tolist(), ropes[1][0][:3].tolist()


def _window(window: object, config: ModelConfig) -> object:
    """A window that hides nothing is none."""
    return 0 if isinstance(window, int) and window >= config.context_length else window


def _frequencies(config: ModelConfig, rope: int, path: Path) -> tuple[npt.NDArray[np.float32], float] | None:
    if rope < 0:
        return None
    made = make_rope(*config.ropes[rope], config.context_length, config.context_length, path)
    return made.inv_freq, made.scale


def _alike(one: npt.NDArray[np.float32], scale: float, other: npt.NDArray[np.float32], other_scale: float) -> bool:
    near = one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-5, atol=1e-12))
    return near and math.isclose(scale, other_scale, rel_tol=1e-5)


def _differing(what: str, a: Any, b: Any) -> Iterator[tuple[str, object, object]]:
    if is_dataclass(a) and is_dataclass(b):
        for field in fields(a):
            yield from _differing(f"{what}: {field.name}".replace(": ", " "), *(getattr(x, field.name) for x in (a, b)))
    elif isinstance(a, float) and isinstance(b, float):
        if not math.isclose(a, b, rel_tol=_TOLERANCE):
            yield what, a, b
    elif a != b:
        yield what, a, b
