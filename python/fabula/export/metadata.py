"""Converts a config to GGUF key-values: the inverse of formats/gguf_config.py, which must read the same config.

The architecture is chosen so that llama.cpp computes the same logits; peer_notes.py says what it does not support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula.engine.defaults import GGUF_KEYS, SamplingDefaults
from fabula.errors import Unsupported
from fabula.export.hybrids import HYBRID_KEYS
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.gguf_config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from fabula.formats.gguf_families import ARCHITECTURES, XIELU
from fabula.formats.gguf_write import Value
from fabula.models.description import ModelConfig
from fabula.models.rope import make_rope, rotated_width

# model_type -> architecture. GPT-J has none in llama.cpp.
_BASE: Mapping[str, str] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "cwm", "helium", "internlm2", "internlm3", "iquestcoder", "baichuan"),
        "llama",
    ),
    **dict.fromkeys(("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"), "qwen2"),
    **dict.fromkeys(("qwen3", "qwen3_vl_text"), "qwen3"),
    **dict.fromkeys(("olmo2", "olmo3"), "olmo2"),
    "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
    "granitemoeshared": "granitemoe", "glm4_moe": "glm4moe", "ernie4_5_moe": "ernie4_5-moe",
    "lfm2_moe": "lfm2moe", "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
    "granitemoehybrid": "granitehybrid", "bamba": "granitehybrid", "falcon_h1": "falcon-h1",
    "minimax_m2": "minimax-m2", "gpt_oss": "gpt-oss", "hunyuan_v1_moe": "hunyuan-moe",
    "llama4_text": "llama4", "ministral3": "mistral3", "gemma3_text": "gemma3", "gemma3n_text": "gemma3n",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "sarvam_mla", "youtu"), "deepseek2"),
    "gemma4_text": "gemma4", "phi": "phi2", "glm": "chatglm",
    "cohere": "command-r", "hunyuan_v1_dense": "hunyuan-dense", "gpt_neox": "gptneox",
}  # fmt: skip
_SOFTMAX, _SIGMOID = 1, 2  # of enum llama_expert_gating_func_type
_UNROTATED = 1e30  # as in llama.cpp's conversion
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN: defaults of readers


def architecture_of(config: ModelConfig, path: Path) -> str:
    """The `general.architecture` in which readers compute the same as with this config.

    llama.cpp supports sliding windows in granite_swa, which equals llama if its scales are 1 and its attention sinks
    have no effect, and YaRN's betas in mistral3, which otherwise equals llama.

    Raises:
        Unsupported: no architecture for this family, or none with windows.
    """
    base = _BASE.get(config.model_type, config.model_type)
    if config.model_type == "baichuan" and (config.normalized_head or config.layers[0].attention.slopes):
        base = "baichuan"
    if base not in ARCHITECTURES:
        raise Unsupported(f"{path}: GGUF files are not written for the family {config.model_type!r}")
    if any(not layer.experts for layer in config.layers) and "ffn_down" not in ARCHITECTURES[base].layer:
        raise Unsupported(f"{path}: GGUF has no layers without experts in family {config.model_type!r}")
    is_sparse = any(layer.experts for layer in config.layers)  # "llama" has windows for Mistral, not for Mixtral
    if base == "llama4" and not is_sparse:
        raise Unsupported(f"{path}: GGUF files of Llama 4 are written for mixtures of experts only")
    if has_windows(config) and is_sparse and (base == "llama" or ARCHITECTURES[base].windows is None):
        raise Unsupported(
            f"{path}: config 'sliding_window': GGUF has no key for a window in family {config.model_type!r}"
        )
    if has_windows(config) and base in ("llama", "mistral3"):
        return "granite_swa"
    if has_windows(config) and ARCHITECTURES[base].windows is None:
        raise Unsupported(
            f"{path}: config 'sliding_window': GGUF has no key for a window in family {config.model_type!r}"
        )
    return "mistral3" if base == "llama" and other_betas(config) else base


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
    row = ARCHITECTURES[arch]
    if config.mlp_bias and row.silu and not any("ffn_up" in parts for parts in row.biases.values()):
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
        f"{arch}.attention.layer_norm{'' if row.eps else '_rms'}_epsilon": np.float32(config.final_norm.eps),
    }
    if config.ropes:
        rope, head_dim = main_rope(config)
        keys[f"{arch}.rope.dimension_count"] = rotated_width(rope, head_dim)
        keys[f"{arch}.rope.freq_base"] = np.float32(rope["rope_theta"])
    keys[f"{arch}.vocab_size"] = config.vocab_size
    keys |= {f"{arch}.{key}": value for key, value in _windows(config, arch, path).items()}
    keys |= {f"{arch}.{key}": value for key, value in _experts(config, arch).items()}
    if arch in _OWN:
        keys |= {f"{arch}.{key}": value for key, value in _OWN[arch](config).items()}
    keys |= {f"{arch}.rope.scaling.{key}": value for key, value in _scaling(config, arch, path).items()}
    return keys


def main_rope(config: ModelConfig) -> tuple[Mapping[str, Any], int]:
    """The rope of layers without a window, or else of all; and the width of their heads."""
    tables = [
        attention.rope
        for attention in sorted(config.attentions, key=lambda attention: attention.window > 0)
        if attention.rope >= 0
    ]
    return config.ropes[tables[0]]


def local_theta(config: ModelConfig) -> float | None:
    """The theta of layers with a window."""
    tables = [a.rope for a in config.attentions if a.window and a.rope >= 0]
    return float(config.ropes[tables[0]][0]["rope_theta"]) if tables else None


def _windows(config: ModelConfig, arch: str, path: Path) -> dict[str, Value]:
    row = ARCHITECTURES[arch].windows
    if row is None or arch in ("llama", "mistral3") or (not has_windows(config) and row.default == 0):
        return {}
    sizes = set(config.windows) - {0}
    if len(sizes) > 1:
        raise Unsupported(f"{path}: config 'sliding_window': GGUF has no key for windows of different sizes")
    window = sizes.pop() if sizes else config.context_length
    if arch == "phi3":  # all layers, and no pattern
        return {"attention.sliding_window": window}
    return {
        "attention.sliding_window": window,
        "attention.sliding_window_pattern": np.array(config.windows, np.bool_),
    }


def _experts(c: ModelConfig, arch: str) -> dict[str, Value]:
    experts = next((layer.experts for layer in c.layers if layer.experts), None)
    if experts is None:
        return {}
    keys: dict[str, Value] = {
        "expert_count": experts.router.n_experts,
        "expert_used_count": experts.router.n_chosen,
        "expert_feed_forward_length": experts.size,
    }
    reads = ARCHITECTURES[arch].reads
    router, first = experts.router, next(i for i, layer in enumerate(c.layers) if layer.experts)
    sparse = [i for i, layer in enumerate(c.layers) if layer.experts]
    more: dict[str, Value] = {
        "expert_shared_feed_forward_length": experts.shared,
        "expert_shared_count": experts.shared // experts.size,
        "expert_weights_scale": np.float32(router.scale),
        "expert_weights_norm": router.renormalized,
        "expert_gating_func": _SIGMOID if router.scores == "sigmoid" else _SOFTMAX,
        "expert_group_count": router.n_groups or 1,
        "expert_group_used_count": router.n_top_groups or 1,
        "leading_dense_block_count": first,
        "interleave_moe_layer_step": sparse[1] - first if len(sparse) > 1 else first + 1,
    }
    return keys | {key: value for key, value in more.items() if key in reads}


def _granite_keys(c: ModelConfig) -> dict[str, Value]:
    return {
        "logit_scale": np.float32(1 / c.logit_scale),
        "residual_scale": np.float32(c.layers[0].residual_scale),
        "embedding_scale": np.float32(c.embedding_scale),
        "attention.scale": np.float32(c.layers[0].attention.scale),
    }


def _gemma3_keys(c: ModelConfig) -> dict[str, Value]:
    keys: dict[str, Value] = {"final_logit_softcapping": np.float32(c.logit_cap)} if c.logit_cap else {}
    theta = local_theta(c)
    return keys if theta is None else {**keys, "rope.freq_base_swa": np.float32(theta)}


def _gemma3n_keys(c: ModelConfig) -> dict[str, Value]:
    assert c.altup is not None
    cutoffs = [-math.inf if layer.mlp.cutoff is None else layer.mlp.cutoff for layer in c.layers]
    theta = local_theta(c)
    keys: dict[str, Value] = {
        "feed_forward_length": np.array([layer.mlp.size for layer in c.layers], np.int32),
        "altup.active_idx": c.altup.active,
        "altup.num_inputs": c.altup.n,
        "activation_sparsity_scale": np.array(cutoffs, np.float32),
        "attention.shared_kv_layers": sum(not layer.attention.writes for layer in c.layers),
        "embedding_length_per_layer_input": c.n_per_layer,
        "final_logit_softcapping": np.float32(c.logit_cap),
    }
    return keys if theta is None else {**keys, "rope.freq_base_swa": np.float32(theta)}


def _mpt_keys(c: ModelConfig) -> dict[str, Value]:
    """The largest bias is the exponent of the last slope of a power of 2 heads."""
    a = c.layers[0].attention
    slope = a.slopes[(1 << (a.n_heads.bit_length() - 1)) - 1]
    keys: dict[str, Value] = {"attention.max_alibi_bias": np.float32(-math.log2(slope))}
    return {**keys, "attention.clamp_kqv": np.float32(a.qkv_clip)} if a.qkv_clip else keys


def _gemma4_keys(c: ModelConfig) -> dict[str, Value]:
    """Sizes by layer. Without its key, the cap of logits is taken to be 30."""
    full = next(layer.attention for layer in c.layers if not layer.attention.window)
    narrow = next((layer.attention for layer in c.layers if layer.attention.window), full)
    theta = local_theta(c)
    keys: dict[str, Value] = {
        "attention.key_length": full.k_dim,
        "attention.value_length": full.k_dim,
        "attention.key_length_swa": narrow.k_dim,
        "attention.value_length_swa": narrow.k_dim,
        "attention.head_count_kv": np.array([layer.attention.n_kv_heads for layer in c.layers], np.int32),
        "feed_forward_length": np.array([layer.mlp.size for layer in c.layers], np.int32),
        "rope.dimension_count": full.k_dim,
        "rope.dimension_count_swa": narrow.k_dim,
        "attention.shared_kv_layers": sum(not layer.attention.writes for layer in c.layers),
        "embedding_length_per_layer_input": c.n_per_layer,
        "final_logit_softcapping": np.float32(c.logit_cap),
    }
    return keys if theta is None else {**keys, "rope.freq_base_swa": np.float32(theta)}


def _ministral3_keys(c: ModelConfig) -> dict[str, Value]:
    temperature = c.layers[0].attention.temperature
    return {} if temperature is None else {"attention.temperature_scale": np.float32(temperature.beta)}


def _deepseek2_keys(c: ModelConfig) -> dict[str, Value]:
    """Widths of latents and, of their own, those of heads. Readers want numbers of experts in models without, too."""
    latent = c.layers[0].attention.latent
    assert latent is not None
    keys: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": latent.rank,
        "attention.key_length": latent.width,
        "attention.value_length": latent.rank,
        "attention.key_length_mla": latent.plain + latent.rotated,
        "attention.value_length_mla": latent.value,
        "rope.dimension_count": latent.rotated,
    }
    if latent.q_rank:
        keys["attention.q_lora_rank"] = latent.q_rank
    if not any(layer.experts for layer in c.layers):
        keys |= {"leading_dense_block_count": c.n_layers, "expert_shared_count": 0}
        keys["expert_feed_forward_length"] = c.intermediate_size
    if _rope_kind(c) == "yarn":
        keys["rope.scaling.yarn_log_multiplier"] = np.float32(0.1 * float(c.rope.get("mscale_all_dim") or 0.0))
    return keys


# What only one architecture has a key for.
_OWN: Mapping[str, Callable[[ModelConfig], dict[str, Value]]] = {
    "granite_swa": lambda _: {"logit_scale": np.float32(1.0)},
    "granite": _granite_keys,
    "granitemoe": _granite_keys,
    "minicpm": _granite_keys,
    "mistral3": _ministral3_keys,
    "gemma2": lambda c: {
        "attn_logit_softcapping": np.float32(c.layers[0].attention.cap),
        "final_logit_softcapping": np.float32(c.logit_cap),
    },
    "gemma3": _gemma3_keys,
    "gemma3n": _gemma3n_keys,
    "gemma4": _gemma4_keys,
    "mellum": lambda c: {} if (theta := local_theta(c)) is None else {"rope.freq_base_swa": np.float32(theta)},
    "mpt": _mpt_keys,
    "deepseek2": _deepseek2_keys,
    "olmo": lambda c: {"attention.clamp_kqv": np.float32(clip)} if (clip := c.layers[0].attention.qkv_clip) else {},
    "command-r": lambda c: {"logit_scale": np.float32(c.logit_scale)},
    "cohere2": lambda c: {"logit_scale": np.float32(c.logit_scale)},
    "stablelm": lambda c: {"use_parallel_residual": c.layers[0].parallel},
    "gptneox": lambda c: {"use_parallel_residual": c.layers[0].parallel},
    **HYBRID_KEYS,
}


def numbers_of_xielu(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Value]:
    """The numbers of xIELU, which are keys in GGUF, of float32 [n_layers]."""
    if config.layers[0].mlp.activation != "xielu":
        return {}
    defaults = {"beta": 0.5, "eps": -1e-6}  # not stored in every checkpoint
    keys: dict[str, Value] = {}
    for key in XIELU:
        numbers = []
        for i in range(config.n_layers):
            name = f"model.layers.{i}.mlp.act_fn.{key}"
            if name not in checkpoint.tensors and key in defaults:
                numbers.append(defaults[key])
                continue
            info = checkpoint.tensors[name]
            numbers.append(float(_native.dequantize(info.dtype, checkpoint.read(name), 1)[0]))
        keys[f"xielu.{key}"] = np.array(numbers, np.float32)
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


def has_windows(config: ModelConfig) -> bool:
    """Whether any window is shorter than the model's context."""
    return any(0 < window < config.context_length for window in config.windows)


def _rope_kind(config: ModelConfig) -> str:
    return str(config.rope.get("rope_type", config.rope.get("type")) or "default")


def other_betas(config: ModelConfig) -> list[str]:
    """The betas of YaRN that differ from the defaults of readers."""
    if _rope_kind(config) != "yarn":
        return []
    return [key for key, usual in _BETAS.items() if (config.rope.get(key) or usual) != usual]


def _scaling(config: ModelConfig, arch: str, path: Path) -> dict[str, Value]:
    if not config.ropes:
        return {}
    rope, head_dim = main_rope(config)
    kind = str(rope.get("rope_type", rope.get("type")) or "default")
    made = make_rope(rope, head_dim, config.context_length, config.context_length, path)
    original = rope.get("original_max_position_embeddings", config.context_length)
    if len(set(factors := rope.get("attention_factors", ()))) > 1:
        short, long = factors
        raise Unsupported(f"{path}: config rope: GGUF has one factor: short_mscale is {short}, long_mscale {long}")
    if kind == "longrope" and arch in ("phi3", "phimoe"):
        return {"type": kind, "original_context_length": int(original), "attn_factor": np.float32(made.scale)}
    if kind in ("default", "llama3") or (kind == "proportional" and rope.get("factor", 1.0) == 1.0):
        return {}
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"{path}: config 'rope_scaling': GGUF has no key for {kind!r} in this family")
    if arch == "deepseek2" and (
        kind != "yarn" or not rope.get("mscale_all_dim") or rope.get("mscale") != rope["mscale_all_dim"]
    ):
        raise Unsupported(
            f"{path}: config 'rope_scaling': in this family GGUF has YaRN with 'mscale' equal to 'mscale_all_dim' only"
        )
    # The architecture says whether the ends of the ramp are cut to whole numbers.
    is_cut = rope.get("truncate", True) is not False
    if kind == "yarn" and is_cut == (arch == "gpt-oss"):
        raise Unsupported(f"{path}: config 'rope_scaling': GGUF has no key for 'truncate' {str(is_cut).lower()}")
    factor = float(rope.get("factor", config.context_length / original))
    scaling: dict[str, Value] = {"type": kind, "factor": np.float32(factor)}
    if kind == "yarn":
        scaling["original_context_length"] = int(original)
        for key in _BETAS:
            if rope.get(key) is not None:
                scaling[f"yarn_{key}"] = np.float32(rope[key])
        # Readers multiply YaRN's default factor on cos and sin by this.
        attention = made.scale / (0.1 * math.log(max(factor, 1.0)) + 1.0)
        if abs(attention - 1.0) > 1e-6 and arch != "deepseek2":  # there the logarithm stands for both
            scaling["attn_factor"] = np.float32(attention)
    return scaling


def rope_tensors(config: ModelConfig, path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Factors of rotated pairs, float32 [rotated / 2] each: Llama 3's scaling is the divisor of each pair's frequency,
    longrope has one list for short and one for long contexts, and pairs that stay in place have a divisor so large that
    they do. Empty without such scaling."""
    if not config.ropes:
        return {}
    rope, head_dim = main_rope(config)
    kind = str(rope.get("rope_type", rope.get("type")) or "default")
    if kind == "longrope":
        lists = ((ROPE_LONG, "long_factor"), (ROPE_SHORT, "short_factor"))
        return {name: np.array(rope[key], np.float32) for name, key in lists}
    if kind == "proportional":
        n = int(float(rope.get("partial_rotary_factor", 1.0)) * head_dim // 2)
        return {ROPE_FREQS: np.array([1.0] * n + [_UNROTATED] * (head_dim // 2 - n), np.float32)}
    if kind != "llama3":
        return {}
    made = make_rope(rope, head_dim, config.context_length, config.context_length, path)
    width = rotated_width(rope, head_dim)
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    plain = float(rope["rope_theta"]) ** -exponents
    return {ROPE_FREQS: (plain / made.inv_freq).astype(np.float32)}
