"""Rotary embeddings: from a config's theta and scaling to one frequency per rotated pair.

    angle(position, i) = position * inv_freq[i],   inv_freq[i] = theta^(-2 i / dim) without scaling     (Su et al. 2021)

Scaling types, with the names of transformers and their sources:
    linear    positions are divided by a factor                                   (kaiokendev 2023; Chen et al. 2023)
    dynamic   theta grows with the context                                        (NTK-aware, bloc97 2023)
    yarn      slow pairs are interpolated, fast ones kept, cos and sin are scaled (Peng et al. 2023)
    llama3    long waves are divided, short ones kept, smooth between              (Llama 3.1 release)
    longrope  a factor per pair, one list for short and one for long contexts      (Ding et al. 2024)
    proportional  the first part of the pairs is rotated, with frequencies of the whole head    (Gemma 4)
    frequency_factors  a factor per pair stored in a GGUF file

`dynamic` and `longrope` depend on the length of the context. Here that is fixed: the context the model is loaded with,
so that cached keys never have to be rotated again. Up to the trained length it makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, Unsupported
from fabula.lean_dataclasses import dataclass
from fabula.models.description import ModelConfig


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation angles of a model.

    Attributes:
        inv_freq: float32 [rotated pairs], radians per position.
        scale: factor on cos and sin.
    """

    inv_freq: npt.NDArray[np.float32]
    scale: float


class _Values:
    """Typed access to the rope mapping; errors name file and key."""

    def __init__(self, rope: Mapping[str, Any], path: Path) -> None:
        self.rope, self.path = rope, path

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: config rope {key!r} {problem}", path=self.path, field=key)

    def number(self, key: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self.rope.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
            raise self.error(key, f"is {value!r}, must be a number above {above:g}")
        return float(value)

    def factors(self, key: str, length: int) -> npt.NDArray[np.float64]:
        value = self.rope.get(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in value)
        ):
            raise self.error(key, f"must be a list of {length} numbers above 0")
        return np.asarray(value, np.float64)


def longest_context(config: ModelConfig) -> int:
    """The longest context a model supports: that of its rope, or the table of its learned positions.

    linear, dynamic and yarn extend the trained length by a factor; some configs keep the trained length in
    max_position_embeddings. With llama3 and longrope, configs have the extended length there.
    """
    rope, trained_context = config.rope, config.context_length
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or isinstance(factor, bool) or not isinstance(factor, int | float):
        return trained_context
    before = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    base = before if isinstance(before, int) and not isinstance(before, bool) else trained_context
    stretched = base * factor
    return max(trained_context, int(stretched)) if math.isfinite(stretched) else trained_context


def rotated_width(rope: Mapping[str, Any], head_dim: int) -> int:
    """Elements of a head that are rotated: `rotary_dim`, or a part of the head."""
    if rope.get("rope_type", rope.get("type")) == "proportional":  # some pairs by an angle of 0
        return head_dim
    return int(rope.get("rotary_dim") or head_dim * float(rope.get("partial_rotary_factor") or 1.0))


def make_rope(rope: Mapping[str, Any], head_dim: int, trained_context: int, context: int, path: Path) -> Rope:
    """Computes the frequencies.

    Args:
        rope: theta and scaling, one of `ModelConfig.ropes`; `partial_rotary_factor` is the part of a head that is
            rotated.
        head_dim: width of a head.
        trained_context: max_position_embeddings.
        context: positions the model is loaded for.
        path: for error messages.

    Raises:
        ModelFileError: a scaling value is missing or out of range.
        Unsupported: an unknown scaling type.
    """
    values = _Values(rope, path)
    try:
        with np.errstate(all="ignore"):
            made = _make(values, head_dim, trained_context, context)
        usable = np.isfinite(made.inv_freq).all() and math.isfinite(made.scale)
    except (ArithmeticError, ValueError):  # each number is in range, but the formula overflows
        usable = False
    if not usable:
        raise values.error("rope_theta", "and the scaling's numbers give frequencies that are not finite")
    return made


def _make(values: _Values, head_dim: int, trained_context: int, context: int) -> Rope:
    """`make_rope` without the check of the result."""
    rope = values.rope
    theta = values.number("rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = values.number("partial_rotary_factor", 1.0)
    if kind == "proportional":
        return _proportional(values, theta, head_dim, part)
    whole, head_dim = head_dim, rotated_width(rope, head_dim)
    if head_dim < 2 or head_dim % 2 or head_dim > whole:
        key = "rotary_dim" if rope.get("rotary_dim") else "partial_rotary_factor"
        raise values.error(key, f"leaves {head_dim} of {whole} elements of a head to rotate; pairs are rotated")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = theta**-exponents
    if kind == "default" or kind is None:
        return _rope(plain)
    if kind == "linear":
        return _rope(plain / values.number("factor"))
    if kind == "dynamic":
        factor = values.number("factor")
        if context > trained_context:
            stretch = factor * context / trained_context - (factor - 1)
            theta *= stretch ** (head_dim / (head_dim - 2))
        return _rope(theta**-exponents)
    if kind == "llama3":
        return _llama3(values, plain, trained_context)
    if kind == "yarn":
        return _yarn(values, plain, theta, head_dim, trained_context)
    if kind == "longrope":
        return _longrope(values, plain, trained_context, context)
    if kind == "frequency_factors":
        return _rope(plain / values.factors("factors", head_dim // 2), values.number("attention_factor", 1.0))
    raise Unsupported(
        f"{values.path}: rope scaling {kind!r} is unknown; known are default, linear, dynamic, yarn, llama3, longrope"
    )


def _rope(inv_freq: npt.NDArray[np.float64], scale: float = 1.0) -> Rope:
    return Rope(inv_freq.astype(np.float32), scale)


def _proportional(values: _Values, theta: float, head_dim: int, part: float) -> Rope:
    """Rotates the first pairs of a whole head, with the frequencies they have there; the others stay (Gemma 4)."""
    n = int(part * head_dim // 2)
    inv_freq = np.zeros(head_dim // 2)
    inv_freq[:n] = theta ** -(np.arange(0, 2 * n, 2) / head_dim) / values.number("factor", 1.0)
    return _rope(inv_freq)


def _llama3(values: _Values, plain: npt.NDArray[np.float64], trained_context: int) -> Rope:
    """Divides wavelengths above old_context / low_freq_factor, keeps those below old_context / high_freq_factor."""
    factor = values.number("factor")
    low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
    old_context = values.number("original_max_position_embeddings", float(trained_context))
    if high <= low:
        raise values.error("high_freq_factor", f"is {high:g}, must be above low_freq_factor {low:g}")
    wavelength = 2 * math.pi / plain
    smooth = np.clip((old_context / wavelength - low) / (high - low), 0.0, 1.0)
    return _rope((1 - smooth) * plain / factor + smooth * plain)


def _yarn(values: _Values, plain: npt.NDArray[np.float64], theta: float, dim: int, trained_context: int) -> Rope:
    """Keeps pairs with more than beta_fast turns in the old context, interpolates those with less than beta_slow."""
    old_context = values.number("original_max_position_embeddings", float(trained_context))
    factor = values.number("factor", trained_context / old_context)
    fast, slow = values.number("beta_fast", 32.0), values.number("beta_slow", 1.0)

    def pair_of(turns: float) -> float:
        return dim * math.log(old_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(fast), pair_of(slow)
    if values.rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in transformers: avoids a division by 0 below
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    inv_freq = plain / factor * interpolated + plain * (1 - interpolated)

    if values.rope.get("attention_factor") is not None:
        scale = values.number("attention_factor")
    elif values.rope.get("mscale") and values.rope.get("mscale_all_dim"):
        all_dim = values.number("mscale_all_dim")
        scale = yarn_magnitude(factor, values.number("mscale")) / yarn_magnitude(factor, all_dim)
    else:
        scale = yarn_magnitude(factor)
    return _rope(inv_freq, scale)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on q and k, which make up for attention that spreads over a longer context (Peng et al. 2023)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(values: _Values, plain: npt.NDArray[np.float64], trained_context: int, context: int) -> Rope:
    old_context = values.number("original_max_position_embeddings", float(trained_context))
    factors = values.factors("long_factor" if context > old_context else "short_factor", plain.size)
    if values.rope.get("attention_factors") is not None:  # for short contexts, for long ones (Phi-3.5-MoE)
        return _rope(plain / factors, float(values.factors("attention_factors", 2)[int(context > old_context)]))
    factor = values.number("factor", trained_context / old_context)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old_context))
    return _rope(plain / factors, values.number("attention_factor", default))
