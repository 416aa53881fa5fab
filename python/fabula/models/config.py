"""Reads the config of a decoder model from config.json and checks it before any weight is read.

Keys are Hugging Face's: both the older `rope_theta` + `rope_scaling` and the newer `rope_parameters`. The file is
untrusted, so every value is checked for type and range, and sizes against each other.

The law: a field that transformers reads either changes the logits here in the same way, or the model is refused by the
field's name. Fields that transformers ignores are ignored. `tests/test_config_flips.py` compares them field by field.
Source: configuration and modeling files of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fabula.errors import ModelFileError, Unsupported

# Largest accepted sizes, about ten times those of the largest open models.
_MAX_LAYERS = 1024
_MAX_HEADS = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 22
_MAX_CONTEXT = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a model; names as in transformers unless stated.

    Attributes:
        model_type: the family's name in config.json.
        n_layers, n_heads, n_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size: sizes.
        context_length: max_position_embeddings.
        rms_norm_eps: epsilon of every norm.
        rope: theta and scaling, all keys in one mapping; see `models/rope.py`.
        windows: per layer, how many positions a token attends to, itself included; 0 for all.
        tied: whether head and embedding are one matrix.
        base: whether it was saved as a base model (AutoModel), which may have no head.
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
    base: bool = False


class ConfigReader:
    """Typed access to config.json; errors name file and key."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a family's config differs from Llama's: which fields it reads, and defaults of missing ones.

    Attributes:
        qkv_bias: whether q, k and v have biases; None: `attention_bias` decides for q, k, v and o.
        mlp_bias: whether `mlp_bias` is read.
        windowed: layers with `sliding_window`: "never"; "always": all, or those in `layer_types`; "switched": by
            `use_sliding_window` and `max_window_layers`, or by `layer_types`.
        context_length: default of `max_position_embeddings`.
        n_kv_heads: default of `num_key_value_heads`; None: as many as query heads, as null always means.
        head_dim: default of `head_dim`; None: hidden_size / num_attention_heads.
    """

    qkv_bias: bool | None = None
    mlp_bias: bool = False
    windowed: Literal["never", "always", "switched"] = "never"
    context_length: int = 2048
    n_kv_heads: int | None = None
    head_dim: int | None = None


_WINDOW = 4096  # default of `sliding_window`, in every family that has one
_MAX_WINDOW_LAYERS = 28  # default of `max_window_layers`: layers below the first with a window


def read_config(config: Mapping[str, Any], path: Path, traits: Traits) -> ModelConfig:
    """Reads and checks a decoder's config.

    Args:
        config: content of config.json.
        path: for error messages.
        traits: of the family.

    Raises:
        ModelFileError: a key is missing, of the wrong type, out of range, or does not fit another.
        Unsupported: a field means an unsupported computation, such as an activation other than SiLU, attention to
            later tokens, or layers of different sizes.
    """
    read = ConfigReader(config, path)
    _refuse_unknown(read)
    n_layers = read.integer("num_hidden_layers", 1, _MAX_LAYERS)
    n_heads = read.integer("num_attention_heads", 1, _MAX_HEADS)
    missing_kv = n_heads if "num_key_value_heads" in config else traits.n_kv_heads or n_heads
    n_kv_heads = read.integer("num_key_value_heads", 1, _MAX_HEADS, missing_kv)
    hidden_size = read.integer("hidden_size", 1, _MAX_WIDTH)
    if n_heads % n_kv_heads:
        raise read.error("num_key_value_heads", f"is {n_kv_heads}, must divide num_attention_heads {n_heads}")
    missing_dim = None if "head_dim" in config else traits.head_dim
    if config.get("head_dim") is None and missing_dim is None and hidden_size % n_heads:
        raise read.error("hidden_size", f"is {hidden_size}, not a multiple of num_attention_heads {n_heads}")
    head_dim = read.integer("head_dim", 2, 1024, missing_dim or hidden_size // n_heads)
    if head_dim % 2 or head_dim < 2:
        raise read.error("head_dim", f"is {head_dim}, must be even for rotary embeddings")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise Unsupported(f"{path}: config 'hidden_act' is {_shown(activation)}; only silu is supported")
    attention_bias = read.flag("attention_bias", False)
    context_length = read.integer("max_position_embeddings", 1, _MAX_CONTEXT, traits.context_length)
    return ModelConfig(
        model_type=str(config.get("model_type")),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=read.integer("intermediate_size", 1, _MAX_WIDTH),
        vocab_size=read.integer("vocab_size", 1, _MAX_VOCABULARY),
        context_length=context_length,
        rms_norm_eps=read.number("rms_norm_eps", 1e-30, 1.0, 1e-6),  # > 0, so that a row of zeros does not become 0 / 0
        rope=_rope(read),
        windows=_windows(read, n_layers, traits.windowed, context_length),
        tied=read.flag("tie_word_embeddings", False),
        attention_bias=attention_bias if traits.qkv_bias is None else traits.qkv_bias,
        output_bias=attention_bias if traits.qkv_bias is None else False,
        mlp_bias=traits.mlp_bias and read.flag("mlp_bias", False),
        base=any(name.endswith("Model") and "For" not in name for name in _architectures(read)),
    )


def _refuse_unknown(read: ConfigReader) -> None:
    """Refuses what transformers would follow in a decoder of any family and Fabula does not compute."""
    config = read.config

    def refuse(key: str, problem: str) -> Unsupported:
        return Unsupported(f"{read.path}: config {key!r} is {_shown(config[key])}: {problem}")

    if not config.get("is_causal", True):
        raise refuse("is_causal", "every token would attend to later ones too; Fabula's attention is causal")
    if config.get("per_layer_config"):
        raise refuse("per_layer_config", "layers that differ from each other are not offered")
    if config.get("kv_sharing_modes"):
        raise refuse("kv_sharing_modes", "layers that share keys and values are not offered")
    if config.get("attention_chunk_size") is not None:
        raise refuse("attention_chunk_size", "attention in chunks is not offered")
    if config.get("transformers_weights") is not None:
        raise refuse("transformers_weights", "weights are read from model.safetensors or its shards only")
    if isinstance(config.get("text_config"), Mapping):
        raise refuse("text_config", f"a config inside that of a {config.get('model_type')}; which one holds is unclear")
    for name in _architectures(read):
        if "For" in name and "ForCausalLM" not in name:
            raise refuse(
                "architectures", "a model with another head than one for text; Fabula generates and embeds text only"
            )


def _architectures(read: ConfigReader) -> list[str]:
    names = read.config.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise read.error("architectures", f"is {_shown(names)}, must be a list of names")
    return names


def _rope(read: ConfigReader) -> Mapping[str, Any]:
    """Theta and scaling in one mapping.

    A `rope_scaling` that is not empty stands for all of `rope_parameters`; numbers missing in it come from the config's
    top level, where older configs have them. `original_max_position_embeddings` of the top level goes before both.
    """
    config = read.config
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise read.error(key, f"is {_shown(value)}, must be an object")
        if value and not merged:
            merged = dict(value)
            if nested := [name for name, part in value.items() if isinstance(part, Mapping)]:
                raise Unsupported(
                    f"{read.path}: config {key!r} is nested under {_shown(nested[0])}: a rope for some layers only is"
                    " not offered for this family"
                )
    theta = merged.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
        raise read.error("rope_theta", f"is {_shown(theta)}, must be a number above 0")
    merged["rope_theta"] = float(theta)
    if (config.get("partial_rotary_factor") or 1.0) != 1.0 or (merged.get("partial_rotary_factor") or 1.0) != 1.0:
        raise Unsupported(f"{read.path}: config 'partial_rotary_factor' other than 1 is not offered for this family")
    if config.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = read.integer("original_max_position_embeddings", 1, _MAX_CONTEXT)
    return merged


_OLD_LAYER_TYPES = {"attention": "full_attention"}  # older name: name; see transformers' configuration_utils.py


def _windows(read: ConfigReader, n_layers: int, windowed: str, context_length: int) -> tuple[int, ...]:
    """Each layer's window; 0 for none."""
    kinds = _layer_types(read, n_layers)
    if windowed == "switched" and not read.flag("use_sliding_window", False):
        window = None
    elif windowed != "never" and "sliding_window" not in read.config:
        window = _WINDOW
    elif read.config.get("sliding_window") is None:
        window = None
    elif windowed == "never" and (kinds is None or "sliding_attention" not in kinds):
        # transformers computes such a prompt without a window, but applies the window in decode.
        window = read.integer("sliding_window", context_length, _MAX_CONTEXT) if kinds is None else None
    else:
        window = read.integer("sliding_window", 1, _MAX_CONTEXT)
    if kinds is not None:
        if "sliding_attention" in kinds and (window is None or windowed == "never"):
            raise read.error("layer_types", "names sliding_attention, but no sliding_window is set for this family")
        return tuple(window or 0 if kind == "sliding_attention" else 0 for kind in kinds)
    if window is None or windowed == "never":
        return (0,) * n_layers
    first = read.integer("max_window_layers", 0, _MAX_LAYERS, _MAX_WINDOW_LAYERS) if windowed == "switched" else 0
    return tuple(window if layer >= first else 0 for layer in range(n_layers))


def _layer_types(read: ConfigReader, n_layers: int) -> list[str] | None:
    """`layer_types`, checked; None where the config has none."""
    kinds = read.config.get("layer_types")
    if kinds is None:
        return None
    known = ("full_attention", "sliding_attention")
    kinds = [_OLD_LAYER_TYPES.get(str(kind), str(kind)) for kind in kinds] if isinstance(kinds, list) else []
    if len(kinds) != n_layers or any(kind not in known for kind in kinds):
        raise read.error("layer_types", f"must list {' or '.join(known)} for each of {n_layers} layers")
    return kinds
