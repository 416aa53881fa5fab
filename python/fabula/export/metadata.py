"""A config as GGUF key-values: the reverse of formats/gguf_names.py, whose reader must find the same config again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabula.engine.defaults import GGUF_KEYS, SamplingDefaults
from fabula.errors import Unsupported
from fabula.formats.gguf_write import Value
from fabula.models.config import ModelConfig
from fabula.models.rope import make_rope

# model_type -> general.architecture; Mistral is a Llama with a window.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def config_keys(config: ModelConfig, name: str, path: Path) -> dict[str, Value]:
    """The key-values of a model without those of its tokenizer.

    Args:
        config: its sizes.
        name: `general.name`.
        path: named in errors.

    Raises:
        Unsupported: something that the keys have no words for.
    """
    arch = ARCHITECTURES[config.model_type]
    keys: dict[str, Value] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.context_length,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.n_heads,
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": np.float32(config.rope["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
    }
    windows = set(config.windows) - {0}
    if windows:
        if arch != "llama" or len(windows) > 1 or 0 in config.windows:
            raise Unsupported(
                f"{path}: config 'sliding_window': GGUF has no words for a window in family {config.model_type!r}"
                if arch != "llama"
                else f"{path}: config 'sliding_window': GGUF has no words for windows in some layers only"
            )
        keys[f"{arch}.attention.sliding_window"] = windows.pop()
    keys |= {f"{arch}.rope.scaling.{key}": value for key, value in _scaling(config, path).items()}
    return keys


def sampling_keys(defaults: SamplingDefaults) -> dict[str, Value]:
    """A model's sampling defaults as GGUF has them; `typical_p` has no key there."""
    found: dict[str, Value] = {}
    for key, setting in GGUF_KEYS.items():
        if (value := defaults.values.get(setting)) is not None:
            found[key] = np.int32(value) if isinstance(value, int) else np.float32(value)
    return found


def _rope_kind(config: ModelConfig) -> str:
    return str(config.rope.get("rope_type", config.rope.get("type")) or "default")


def _scaling(config: ModelConfig, path: Path) -> dict[str, Value]:
    kind = _rope_kind(config)
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"{path}: config 'rope_scaling': GGUF has no words for {kind!r} in this family")
    rope = make_rope(config.rope, config.head_dim, config.context_length, config.context_length, path)
    original = config.rope.get("original_max_position_embeddings", config.context_length)
    factor = float(config.rope.get("factor", config.context_length / original))
    scaling: dict[str, Value] = {"type": kind, "factor": np.float32(factor)}
    if kind == "yarn":
        scaling["original_context_length"] = int(original)
        for key in ("beta_fast", "beta_slow"):
            if config.rope.get(key) is not None:
                scaling[f"yarn_{key}"] = np.float32(config.rope[key])
        # Readers multiply YaRN's own factor on cos and sin by this one.
        attention = rope.scale / (0.1 * math.log(max(factor, 1.0)) + 1.0)
        if abs(attention - 1.0) > 1e-6:
            scaling["attn_factor"] = np.float32(attention)
    return scaling


def frequency_factors(config: ModelConfig, path: Path) -> npt.NDArray[np.float32] | None:
    """Llama 3's scaling as the tensor rope_freqs.weight, float32 [head_dim / 2]: what each pair's frequency is divided
    by; None where there is no such scaling."""
    if _rope_kind(config) != "llama3":
        return None
    rope = make_rope(config.rope, config.head_dim, config.context_length, config.context_length, path)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = float(config.rope["rope_theta"]) ** -exponents
    return (plain / rope.inv_freq).astype(np.float32)
