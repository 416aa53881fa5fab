"""The numbers of a decoder model, read from config.json and checked before any weight is touched.

Keys are Hugging Face's (both the older `rope_theta` + `rope_scaling` and the newer `rope_parameters`). A config comes
from a file nobody vouches for: every value is checked for type and range, and sizes that do not fit each other are
refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported

# Largest sizes taken seriously; the largest open models stay an order of magnitude below.
_MAX_LAYERS = 1024
_MAX_HEADS = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 22
_MAX_CONTEXT = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the families need to know; names as in transformers unless stated.

    Attributes:
        model_type: the family's name in config.json.
        n_layers, n_heads, n_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size: sizes.
        context_length: max_position_embeddings.
        rms_norm_eps: epsilon of every norm.
        rope: theta and scaling, all keys in one mapping; see `models/rope.py`.
        windows: per layer, how many positions a token sees, itself included; 0 for all.
        tied: whether the head is the embedding.
        attention_bias: whether q, k and v have biases;  output_bias: whether o has one;  mlp_bias: gate, up and down.
    """

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: Mapping[str, Any]
    windows: tuple[int, ...]
    tied: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool


class ConfigReader:
    """Typed access to config.json that names file and key when something is wrong."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.config = config
        self.path = path

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: config {key!r} {problem}", path=self.path, field=key)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"is {_shown(value)}, must be a whole number in {low} .. {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, f"is {_shown(value)}, must be a number in {low:g} .. {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {_shown(value)}, must be true or false")
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_config(
    config: Mapping[str, Any], path: Path, *, qkv_bias: bool | None = None, windowed: str = "never"
) -> ModelConfig:
    """Reads and checks a decoder's config.

    Args:
        config: config.json's content.
        path: named in errors.
        qkv_bias: True when the family always has biases on q, k and v, None to read `attention_bias`.
        windowed: "never", "always" (every layer has `sliding_window`, when set), or "switched" (`use_sliding_window`
        and
            `max_window_layers`, or `layer_types`, say which).

    Raises:
        ModelFileError: a key is missing, of the wrong type, out of range, or does not fit another.
        Unsupported: an activation other than SiLU.
    """
    read = ConfigReader(config, path)
    n_layers = read.integer("num_hidden_layers", 1, _MAX_LAYERS)
    n_heads = read.integer("num_attention_heads", 1, _MAX_HEADS)
    n_kv_heads = read.integer("num_key_value_heads", 1, _MAX_HEADS, n_heads)
    hidden_size = read.integer("hidden_size", 1, _MAX_WIDTH)
    if n_heads % n_kv_heads:
        raise read.error("num_key_value_heads", f"is {n_kv_heads}, must divide num_attention_heads {n_heads}")
    if config.get("head_dim") is None and hidden_size % n_heads:
        raise read.error("hidden_size", f"is {hidden_size}, not a multiple of num_attention_heads {n_heads}")
    head_dim = read.integer("head_dim", 2, 1024, hidden_size // n_heads)
    if head_dim % 2 or head_dim < 2:
        raise read.error("head_dim", f"is {head_dim}, must be even to be rotated")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise Unsupported(f"{path}: config 'hidden_act' is {_shown(activation)}; Fabula knows silu")
    attention_bias = read.flag("attention_bias", False)
    return ModelConfig(
        model_type=str(config.get("model_type")),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size", 1, _MAX_WIDTH),
        vocab_size=read.integer("vocab_size", 1, _MAX_VOCABULARY),
        context_length=read.integer("max_position_embeddings", 1, _MAX_CONTEXT, 2048),
        rms_norm_eps=read.number("rms_norm_eps", 1e-30, 1.0, 1e-6),  # a row of zeros must not become 0 / 0
        rope=_rope(read),
        windows=_windows(read, n_layers, windowed),
        tied=read.flag("tie_word_embeddings", False),
        attention_bias=attention_bias if qkv_bias is None else qkv_bias,
        output_bias=attention_bias if qkv_bias is None else False,
        mlp_bias=read.flag("mlp_bias", False),
    )


def _rope(read: ConfigReader) -> Mapping[str, Any]:
    """Theta and scaling in one mapping: newer configs keep both in `rope_parameters`."""
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = read.config.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise read.error(key, f"is {_shown(value)}, must be an object")
        merged.update(value)
    theta = merged.get("rope_theta", read.config.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
        raise read.error("rope_theta", f"is {_shown(theta)}, must be a number above 0")
    merged["rope_theta"] = float(theta)
    if (read.config.get("partial_rotary_factor") or merged.get("partial_rotary_factor") or 1.0) != 1.0:
        raise Unsupported(f"{read.path}: config 'partial_rotary_factor' other than 1 is not offered for this family")
    return merged


def _windows(read: ConfigReader, n_layers: int, windowed: str) -> tuple[int, ...]:
    none = (0,) * n_layers
    if windowed == "never" or read.config.get("sliding_window") is None:
        return none
    window = read.integer("sliding_window", 1, _MAX_CONTEXT)
    if windowed == "always":
        return (window,) * n_layers
    kinds = read.config.get("layer_types")
    if kinds is not None:
        known = {"full_attention": 0, "sliding_attention": window}
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(str(kind) not in known for kind in kinds):
            raise read.error("layer_types", f"must list {' or '.join(known)} for each of {n_layers} layers")
        return tuple(known[str(kind)] for kind in kinds)
    if not read.flag("use_sliding_window", False):
        return none
    first = read.integer("max_window_layers", 0, _MAX_LAYERS, n_layers)
    return tuple(window if layer >= first else 0 for layer in range(n_layers))
