"""Converts a config to GGUF key-values: the inverse of formats/gguf_config.py, which must read the same config.

The architecture is chosen so that llama.cpp computes the same logits; `llama_cpp_notes` lists what it does not support.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fabula.engine.defaults import GGUF_KEYS, SamplingDefaults
from fabula.errors import Unsupported
from fabula.formats.gguf_config import ROPE_FREQS
from fabula.formats.gguf_families import PAIRED
from fabula.formats.gguf_write import Value
from fabula.models.description import ModelConfig
from fabula.models.rope import make_rope

_BASE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> architecture
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN: defaults of readers


def architecture_of(config: ModelConfig, path: Path) -> str:
    """The `general.architecture` in which readers compute the same as with this config.

    llama.cpp supports sliding windows in granite_swa, which equals llama if its scales are 1 and its attention sinks
    have no effect, and YaRN's betas in mistral3, which otherwise equals llama.

    Raises:
        Unsupported: no architecture has windows for this family.
    """
    base = _BASE[config.model_type]
    if _has_windows(config):
        if base != "llama":
            raise Unsupported(
                f"{path}: config 'sliding_window': GGUF has no key for a window in family {config.model_type!r}"
            )
        return "granite_swa"
    return "mistral3" if base == "llama" and _other_betas(config) else base


def config_keys(config: ModelConfig, name: str, path: Path) -> dict[str, Value]:
    """The key-values of a model, without its tokenizer.

    Args:
        config: its sizes.
        name: `general.name`.
        path: for error messages.

    Raises:
        Unsupported: GGUF has no key for something in the config.
    """
    arch = architecture_of(config, path)
    if config.mlp_bias and arch not in PAIRED:
        raise Unsupported(f"{path}: config 'mlp_bias': GGUF has no key for it in family {config.model_type!r}")
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
    if arch == "granite_swa":
        sizes = set(config.windows) - {0}
        if len(sizes) > 1:
            raise Unsupported(f"{path}: config 'sliding_window': GGUF has no key for windows of different sizes")
        keys[f"{arch}.attention.sliding_window"] = sizes.pop()
        keys[f"{arch}.attention.sliding_window_pattern"] = np.array(config.windows, np.bool_)
        keys[f"{arch}.logit_scale"] = np.float32(1.0)
    keys |= {f"{arch}.rope.scaling.{key}": value for key, value in _scaling(config, path).items()}
    return keys


def sampling_keys(defaults: SamplingDefaults) -> dict[str, Value]:
    """A model's sampling defaults as GGUF keys; there is none for `typical_p`."""
    found: dict[str, Value] = {}
    for key, setting in GGUF_KEYS.items():
        if (value := defaults.values.get(setting)) is not None:
            found[key] = np.int32(value) if isinstance(value, int) else np.float32(value)
    return found


def has_sinks(arch: str) -> bool:
    """Whether an architecture needs attention sinks, a tensor [n_heads] in each layer."""
    return arch == "granite_swa"


def llama_cpp_notes(config: ModelConfig, metadata: Mapping[str, Value], names: Collection[str]) -> Iterator[str]:
    """What llama.cpp computes differently from a file, or cannot read; one sentence each.

    Args:
        config: of the model.
        metadata: key-values of the file.
        names: of its tensors.
    """
    arch = str(metadata["general.architecture"])
    if _has_windows(config):
        window = max(config.windows)
        if arch == "granite_swa":
            yield (
                f"it is written as granite_swa, in which llama.cpp has the window of {window} tokens; versions that do "
                "not know this architecture refuse the file"
            )
        else:
            yield (
                f"llama.cpp has no window in architecture {arch}: it ignores that of {window} tokens, so its "
                "results differ for longer texts; convert the model's Hugging Face folder for a file that keeps it"
            )
    if arch != "mistral3" and (betas := _other_betas(config)):
        yield f"llama.cpp ignores {' and '.join(betas)} of YaRN in architecture {arch}, so its results differ"
    problems = {
        "Llama 3's scaling of positions": arch not in PAIRED and ROPE_FREQS in names,
        "a bias of attn_output": arch not in PAIRED and any(name.endswith("attn_output.bias") for name in names),
        f"{config.n_heads} heads of {config.head_dim} in a hidden size of {config.hidden_size}": arch == "qwen2"
        and config.n_heads * config.head_dim != config.hidden_size,
    }
    for what, found in problems.items():
        if found:
            yield f"llama.cpp refuses the file: it does not support {what} in architecture {arch}"


def _has_windows(config: ModelConfig) -> bool:
    """Whether any window is shorter than the model's context."""
    return any(0 < window < config.context_length for window in config.windows)


def _rope_kind(config: ModelConfig) -> str:
    return str(config.rope.get("rope_type", config.rope.get("type")) or "default")


def _other_betas(config: ModelConfig) -> list[str]:
    """The betas of YaRN that differ from the defaults of readers."""
    if _rope_kind(config) != "yarn":
        return []
    return [key for key, usual in _BETAS.items() if (config.rope.get(key) or usual) != usual]


def _scaling(config: ModelConfig, path: Path) -> dict[str, Value]:
    kind = _rope_kind(config)
    if kind in ("default", "llama3"):
        return {}
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"{path}: config 'rope_scaling': GGUF has no key for {kind!r} in this family")
    if kind == "yarn" and config.rope.get("truncate", True) is False:
        raise Unsupported(f"{path}: config 'rope_scaling': GGUF has no key for 'truncate' false")
    rope = make_rope(config.rope, config.head_dim, config.context_length, config.context_length, path)
    original = config.rope.get("original_max_position_embeddings", config.context_length)
    factor = float(config.rope.get("factor", config.context_length / original))
    scaling: dict[str, Value] = {"type": kind, "factor": np.float32(factor)}
    if kind == "yarn":
        scaling["original_context_length"] = int(original)
        for key in _BETAS:
            if config.rope.get(key) is not None:
                scaling[f"yarn_{key}"] = np.float32(config.rope[key])
        # Readers multiply YaRN's default factor on cos and sin by this.
        attention = rope.scale / (0.1 * math.log(max(factor, 1.0)) + 1.0)
        if abs(attention - 1.0) > 1e-6:
            scaling["attn_factor"] = np.float32(attention)
    return scaling


def frequency_factors(config: ModelConfig, path: Path) -> npt.NDArray[np.float32] | None:
    """Llama 3's scaling as the tensor rope_freqs.weight, float32 [head_dim / 2]: the divisor of each pair's frequency.
    None without such scaling."""
    if _rope_kind(config) != "llama3":
        return None
    rope = make_rope(config.rope, config.head_dim, config.context_length, config.context_length, path)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = float(config.rope["rope_theta"]) ** -exponents
    return (plain / rope.inv_freq).astype(np.float32)
