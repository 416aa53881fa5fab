"""Architectures of GGUF files with RMS norms and an MLP in each layer.

"llama" holds Mixtral, too, and "gemma4" models with experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fabula.errors import shown
from fabula.formats.gguf_architecture import (
    ALTUP,
    ATTENTION,
    EXPERT_KEYS,
    EXPERTS,
    FULL,
    HEAD_NORMS,
    MLP,
    PER_LAYER,
    PLAIN_MLP,
    POST,
    QKV,
    SHARED,
    SLIDING,
    USUAL,
    XIELU,
    Architecture,
    Config,
    Facts,
    Windows,
    read_experts,
)


def _llama(f: Facts, config: Config) -> None:
    """A llama with windows is a mistral, one with experts a mixtral. Their biases are refused by gguf_names.py."""
    if f.keys.integer(f.key("expert_count"), 0, low=0) and f.arch == "llama":
        config |= {"intermediate_size": read_experts(f, config)}
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        config.pop("layer_types", None)
        return
    for name in sorted(EXPERT_KEYS) if f.arch == "llama" else ():
        if f.keys.integer(f.key(name), 0, low=0):
            raise f.keys.unsupported(f.key(name), "is there, but no expert_count: a mixture without experts")
    if config.get("sliding_window"):
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        if FULL not in config["layer_types"]:
            del config["layer_types"]


def _mistral3(f: Facts, config: Config) -> None:
    """Queries grow with their position where the file says so (Ministral 3)."""
    _llama(f, config)
    beta = f.number("attention.temperature_scale", 0.0, zero=0.0)
    if not beta:
        return
    original = f.keys.integer(f.key("rope.scaling.original_context_length"), config["max_position_embeddings"], low=1)
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    config["rope_scaling"] = {
        **scaling, "original_max_position_embeddings": original, "llama_4_scaling_beta": beta,
    }  # fmt: skip
    config |= {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}


def _granite_swa(f: Facts, config: Config) -> None:
    f.number("logit_scale", None)  # a divisor; gguf_config.py accepts only 1
    _llama(f, config)


def granite(f: Facts, config: Config) -> None:
    """Factors; 0 stands for "not given". `rope.scaling.finetuned` false means layers without rotation."""
    key = f.key("rope.scaling.finetuned")
    if not f.keys.flag(key, True):
        raise f.keys.unsupported(key, "is false, which means layers without rotation here; that is not offered")
    config |= granite_factors(f)


def granite_factors(f: Facts) -> Config:
    return {
        "logits_scaling": f.number("logit_scale", None),
        "residual_multiplier": f.number("residual_scale", 1.0, zero=1.0),
        "embedding_multiplier": f.number("embedding_scale", 1.0, zero=1.0),
        "attention_multiplier": f.number("attention.scale", f.head_dim**-0.5, zero=f.head_dim**-0.5),
    }


def _minicpm(f: Facts, config: Config) -> None:
    """Granite's factors under other names; the defaults are those of the first release."""
    config |= {
        "logits_scaling": f.number("logit_scale", f.hidden_size / 256),
        "residual_multiplier": f.number("residual_scale", 1.4 / math.sqrt(f.n_layers), zero=1.0),
        "embedding_multiplier": f.number("embedding_scale", 12.0, zero=1.0),
        "attention_multiplier": f.head_dim**-0.5,
    }


def _baichuan(f: Facts, _: Config) -> None:
    """The number of layers decides: models of 32 have rotations, those of 40 ALiBi."""
    if f.n_layers not in (32, 40):
        raise f.keys.unsupported(
            f.key("block_count"), f"is {f.n_layers}: models of 32 layers have rotations, those of 40 ALiBi; others none"
        )


def query_scale(f: Facts, n_layers_27b: int) -> float:
    """Gemma's query_pre_attn_scalar, for which there is no key: 27B models, known by their layers, have another."""
    return f.hidden_size / f.n_heads if f.n_layers == n_layers_27b else f.head_dim


def _gemma2(f: Facts, config: Config) -> None:
    config["query_pre_attn_scalar"] = query_scale(f, 46)
    for name, key, default in (
        ("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ):
        config[name] = f.number(key, default)


def _gemma3(f: Facts, config: Config) -> None:
    config["query_pre_attn_scalar"] = query_scale(f, 62)
    config["attn_logit_softcapping"] = None
    config["final_logit_softcapping"] = f.number("final_logit_softcapping", 0.0, zero=0.0) or None
    config["rope_local_base_freq"] = f.number("rope.freq_base_swa", 10000.0)


def _gemma4(f: Facts, config: Config) -> None:
    """Two head geometries, and layers that share KV; see models/gemma4.py.

    Layers without a window have frequency factors: 1 for rotated pairs, 1e30 for the others.
    """
    keys, n = f.keys, f.n_layers
    kinds = config["layer_types"]
    if kinds[-1] == SLIDING:
        raise keys.unsupported(f.key("attention.sliding_window_pattern"), "ends with a window, which no model has")
    narrow = keys.integer(f.key("attention.key_length_swa"))
    for name in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if (value := keys.integer(f.key(name), narrow)) != narrow:
            raise keys.unsupported(f.key(name), f"is {value}; only that of a whole head, {narrow}, is offered")
    kv_heads = keys.each(f.key("attention.head_count_kv"), n, f.n_heads)
    sizes = keys.each(f.key("feed_forward_length"), n)
    shared = keys.integer(f.key("attention.shared_kv_layers"), 0, low=0, high=n - 1)
    wide = sizes[-1] == 2 * sizes[0]
    if sizes != [sizes[0] * (2 if wide and i >= n - shared else 1) for i in range(n)]:
        raise keys.unsupported(f.key("feed_forward_length"), "differs in other layers than those that share KV")
    full = [i for i in range(n - shared) if kinds[i] == FULL]
    k_is_v = not any(f"blk.{i}.attn_v.weight" in f.tensors for i in full)
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {
        "head_dim": narrow,
        "num_key_value_heads": kv_heads[0],
        "intermediate_size": sizes[0],
        "per_layer_config": {
            str(i): {"num_key_value_heads": kv_heads[i], "head_dim": narrow if kinds[i] == SLIDING else f.head_dim}
            for i in range(n)
        },
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": wide,
        "attention_k_eq_v": k_is_v,
        "hidden_size_per_layer_input": keys.integer(f.key("embedding_length_per_layer_input"), low=0),
        "vocab_size_per_layer_input": config["vocab_size"],
        **_beside_mlp(f, config),
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0, zero=0.0) or None,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 10000.0)},
        },
    }


def _beside_mlp(f: Facts, config: Config) -> Config:
    """The mixture beside each MLP, in models that have one."""
    if not f.keys.integer(f.key("expert_count"), 0, low=0):
        return {}
    size = read_experts(f, config)
    chosen = config.pop("num_experts_per_tok")
    return {"enable_moe_block": True, "top_k_experts": chosen, "moe_intermediate_size": size}


def _llama4(f: Facts, config: Config) -> None:
    """llama.cpp has numbers of its own for chunks, temperature and norms: those of the released models.

    A window of 0 stands for models without experts, which it then refuses.
    """
    keys, n = f.keys, f.n_layers
    size, step = read_experts(f, config), keys.integer(f.key("interleave_moe_layer_step"))
    key = f.key("attention.sliding_window")
    if (window := keys.integer(key, _LLAMA4_CHUNK, low=0)) != _LLAMA4_CHUNK and SLIDING in config["layer_types"]:
        raise keys.unsupported(key, f"is {window}; models of this architecture have chunks of {_LLAMA4_CHUNK}")
    if window == 0:
        raise keys.unsupported(key, "is 0: models without chunks are not offered")
    config.pop("sliding_window")
    config |= {
        "intermediate_size": size,
        "intermediate_size_mlp": config["intermediate_size"],
        "moe_layers": list(range(step - 1, n, step)),
        "layer_types": ["chunked_attention" if kind == SLIDING else FULL for kind in config["layer_types"]],
        "attention_chunk_size": _LLAMA4_CHUNK,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": keys.integer(f.key("expert_count")) != 128,
    }


def _gemma3n(f: Facts, config: Config) -> None:
    """llama.cpp has numbers of its own for most of these keys, those of the released models."""
    keys, n = f.keys, f.n_layers
    cutoffs = keys.metadata.get(f.key("activation_sparsity_scale"))
    if cutoffs is None:
        cutoffs = np.array([1.6448533535 if i < 10 else -np.inf for i in range(n)])
    if not isinstance(cutoffs, np.ndarray) or cutoffs.dtype.kind != "f" or len(cutoffs) != n:
        raise keys.error(f.key("activation_sparsity_scale"), f"must be an array of {n} numbers, one for each layer")
    from statistics import NormalDist  # slow to import

    laurel, table = (f.tensors.get(f"{name}.weight") for name in ("blk.0.laurel_l", "per_layer_token_embd"))
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {
        "intermediate_size": keys.each(f.key("feed_forward_length"), n),
        "num_kv_shared_layers": keys.integer(f.key("attention.shared_kv_layers"), max(n - 20, 0), low=0, high=n - 1),
        "hidden_size_per_layer_input": keys.integer(f.key("embedding_length_per_layer_input"), 256),
        "vocab_size_per_layer_input": table.shape[0] if table is not None else config["vocab_size"],
        "altup_active_idx": keys.integer(f.key("altup.active_idx"), 0, low=0),
        "altup_num_inputs": keys.integer(f.key("altup.num_inputs"), 4),
        "altup_correct_scale": f.has("altup_correct_scale"),
        "laurel_rank": laurel.shape[0] if laurel is not None else 64,
        "activation_sparsity_pattern": [NormalDist().cdf(float(cutoff)) for cutoff in cutoffs],
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 10000.0)},
        },
    }


def _olmo2(f: Facts, config: Config) -> None:
    """OLMo 3 has windows, whose layers have no scaling."""
    if not config.pop("sliding_window", None):
        config.pop("layer_types")
        return
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": f.keys.integer(f.key("attention.sliding_window")),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": theta},
        },
    }


def _phi3(_: Facts, config: Config) -> None:
    if (scaling := config["rope_scaling"]) is not None:
        config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]


def _apertus(f: Facts, _: Config) -> None:
    """The numbers of xIELU are keys of their own; see gguf_names.py."""
    for name in XIELU:
        value = f.keys.metadata.get(f"xielu.{name}")
        if value is None:
            raise f.keys.error(f"xielu.{name}", "is missing")
        if isinstance(value, np.ndarray) and (value.dtype.kind != "f" or len(value) != f.n_layers):
            raise f.keys.error(f"xielu.{name}", f"must be a number or {f.n_layers} numbers, one for each layer")
        if not isinstance(value, np.ndarray | float):
            raise f.keys.error(f"xielu.{name}", f"is {shown(value)}, must be a number")


_GEMMA2: dict[str, Any] = {
    "layer": (*USUAL, *POST),
    "names": POST | {"ffn_norm": "post_attention_layernorm"},
    "biases": {"attention_bias": ATTENTION},
    "silu": False,
}
_LLAMA4_CHUNK = 8192
# Gemma 4's norms and factors of a mixture beside an MLP.
_BESIDE = {
    "pre_ffw_norm_2": "pre_experts_layernorm",
    "post_ffw_norm_1": "post_dense_layernorm",
    "post_ffw_norm_2": "post_experts_layernorm",
    "ffn_gate_inp.scale": "mlp.gate.scale",
    "ffn_down_exps.scale": "mlp.gate.per_expert_scale",
}
_GLM: dict[str, Any] = {
    "names": {"ffn_up": "mlp.gate_up_proj"},
    "biases": {"attention_bias": ("attn_qkv", *QKV)},
    "rotated": True,
}
_BOTH = {"attention_bias": ATTENTION, "mlp_bias": MLP}

DENSE: Mapping[str, Architecture] = {
    # Early versions of `fabula quantize` wrote windows for llama, which llama.cpp does not have there.
    "llama": Architecture(
        model_type="llama", model_class="LlamaForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        layer=(*USUAL, *EXPERTS), windows=Windows(), reads=EXPERT_KEYS, finish=_llama,
    ),
    "qwen2": Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM", biases={"": QKV}, factors=True),
    "qwen3": Architecture(
        model_type="qwen3", model_class="Qwen3ForCausalLM", layer=(*USUAL, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, factors=True,
    ),
    # llama with more YaRN keys, and Ministral 3.
    "mistral3": Architecture(
        model_type="llama", model_class="LlamaForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        windows=Windows(), reads=frozenset(["rope.scaling.yarn_log_multiplier", "attention.temperature_scale"]),
        finish=_mistral3,
    ),
    # llama with windows, as `fabula quantize` writes it: all scales 1, sinks without effect.
    "granite_swa": Architecture(
        model_type="llama", model_class="LlamaForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        windows=Windows(default=None), finish=_granite_swa,
    ),
    # The text part; for text all sections of a position are equal, so rotations are the usual ones.
    "qwen2vl": Architecture(
        model_type="qwen2", model_class="Qwen2ForCausalLM", biases={"": QKV},
        reads=frozenset(["rope.dimension_sections"]),
    ),
    "qwen3vl": Architecture(
        model_type="qwen3", model_class="Qwen3ForCausalLM", layer=(*USUAL, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, reads=frozenset(["rope.dimension_sections", "n_deepstack_layers"]),
    ),
    "exaone": Architecture(model_type="llama", model_class="LlamaForCausalLM", factors=True),
    "internlm2": Architecture(model_type="llama", model_class="LlamaForCausalLM", paired=True),
    # Heads of Baichuan 2 are normalized when they are loaded, which llama.cpp does not do.
    "baichuan": Architecture(model_type="baichuan", model_class="BaichuanForCausalLM", paired=True, finish=_baichuan),
    "granite": Architecture(
        model_type="granite", model_class="GraniteForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        reads=frozenset(["logit_scale", "residual_scale", "embedding_scale", "attention.scale"]), finish=granite,
    ),
    "minicpm": Architecture(
        model_type="granite", model_class="GraniteForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        reads=frozenset(["logit_scale", "residual_scale", "embedding_scale"]), finish=_minicpm,
    ),
    "smollm3": Architecture(model_type="smollm3", model_class="SmolLM3ForCausalLM", paired=True, biases=_BOTH),
    "arcee": Architecture(
        model_type="arcee", model_class="ArceeForCausalLM", paired=True, factors=True, silu=False,
        layer=("attn_norm", *ATTENTION, "ffn_norm", *PLAIN_MLP),
        biases={"attention_bias": ATTENTION, "mlp_bias": PLAIN_MLP},
    ),
    "gemma": Architecture(
        model_type="gemma", model_class="GemmaForCausalLM", biases={"attention_bias": ATTENTION}, silu=False
    ),
    "gemma2": Architecture(
        model_type="gemma2", model_class="Gemma2ForCausalLM", **_GEMMA2, windows=Windows(default=4096, every=2),
        reads=frozenset(["attn_logit_softcapping", "final_logit_softcapping"]), finish=_gemma2,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text", model_class="Gemma3ForCausalLM", **_GEMMA2 | {"layer": (*USUAL, *POST, *HEAD_NORMS)},
        windows=Windows(every=6), scalings=("none", "linear"),
        reads=frozenset(["final_logit_softcapping", "rope.freq_base_swa"]), finish=_gemma3,
    ),
    "gemma3n": Architecture(
        model_type="gemma3n_text", model_class="Gemma3nForCausalLM", silu=False, varied=True, scale=1.0,
        layer=(*USUAL, *POST, *HEAD_NORMS, *PER_LAYER, *ALTUP), names={**_GEMMA2["names"], **PER_LAYER, **ALTUP},
        biases={"attention_bias": ATTENTION}, windows=Windows(default=None, every=5), scalings=("none", "linear"),
        reads=frozenset([
            "altup.active_idx", "altup.num_inputs", "activation_sparsity_scale", "embedding_length_per_layer_input",
            "attention.shared_kv_layers", "rope.freq_base_swa", "final_logit_softcapping",
        ]), finish=_gemma3n,
    ),
    "gemma4": Architecture(
        model_type="gemma4_text", model_class="Gemma4ForCausalLM", silu=False, varied=True, scale=1.0, factors=True,
        layer=(*USUAL, *POST, *HEAD_NORMS, *PER_LAYER, "layer_output_scale", *EXPERTS, "ffn_gate_up_exps", *_BESIDE),
        names={**_GEMMA2["names"], **PER_LAYER, "layer_output_scale": "layer_scalar", **_BESIDE},
        windows=Windows(default=None), scalings=("none", "linear"),
        reads=frozenset([
            "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa", "rope.freq_base_swa",
            "attention.shared_kv_layers", "embedding_length_per_layer_input", "final_logit_softcapping", *EXPERT_KEYS,
        ]), finish=_gemma4,
    ),
    "llama4": Architecture(
        model_type="llama4_text", model_class="Llama4ForCausalLM", factors=True,
        layer=(*USUAL, *EXPERTS, *SHARED), windows=Windows(default=8192, every=4),
        biases={"attention_bias": ATTENTION}, reads=EXPERT_KEYS | {"interleave_moe_layer_step"}, finish=_llama4,
    ),
    # llama.cpp ignores the window; transformers does not.
    "phi3": Architecture(
        model_type="phi3", model_class="Phi3ForCausalLM", layer=(*USUAL, "attn_qkv"), longrope=True, rotated=True,
        names={"ffn_up": "mlp.gate_up_proj"}, scalings=("longrope",), windows=Windows(), finish=_phi3,
    ),
    # OLMo 2, and 3 with windows. The norm in front of the MLP stands behind attention.
    "olmo2": Architecture(
        model_type="olmo2", model_class="Olmo2ForCausalLM", layer=(*ATTENTION, *MLP, *HEAD_NORMS, *POST), names=POST,
        biases={"attention_bias": ATTENTION}, windows=Windows(every=4), finish=_olmo2,
    ),
    # Layers without a window have no rotation; llama.cpp has windows only in the model of 64 layers.
    "exaone4": Architecture(
        model_type="exaone4", model_class="Exaone4ForCausalLM", layer=(*ATTENTION, *MLP, *HEAD_NORMS, *POST),
        names=POST, factors=True, windows=Windows(every=4),
    ),
    "glm4": Architecture(
        model_type="glm4", model_class="Glm4ForCausalLM", **_GLM | {"names": {**POST, **_GLM["names"]}},
        layer=(*USUAL, "attn_qkv", *POST),
    ),
    "chatglm": Architecture(model_type="glm", model_class="GlmForCausalLM", **_GLM, layer=(*USUAL, "attn_qkv")),
    "seed_oss": Architecture(
        model_type="seed_oss", model_class="SeedOssForCausalLM",
        layer=("attn_norm", *ATTENTION, "post_attention_norm", *MLP),
        names={"post_attention_norm": "post_attention_layernorm"},
        biases={"attention_bias": QKV, "attention_out_bias": ("attn_output",), "mlp_bias": MLP},
    ),
    "ernie4_5": Architecture(
        model_type="ernie4_5", model_class="Ernie4_5ForCausalLM", biases={"use_bias": (*ATTENTION, *MLP)}
    ),
    "hunyuan-dense": Architecture(
        model_type="hunyuan_v1_dense", model_class="HunYuanDenseV1ForCausalLM", layer=(*USUAL, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION},
    ),
    "apertus": Architecture(
        model_type="apertus", model_class="ApertusForCausalLM", factors=True, longrope=True, silu=False,
        layer=("attn_norm", *ATTENTION, "ffn_norm", *PLAIN_MLP, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, finish=_apertus,
    ),
}  # fmt: skip
