"""Architectures of GGUF files with mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping

from fabula.formats.gguf_architecture import (
    ATTENTION,
    EXPERT_KEYS,
    EXPERTS,
    FULL,
    GROUP_KEYS,
    HEAD_NORMS,
    MLP,
    QKV,
    SHARED,
    SHARED_KEYS,
    SLIDING,
    SPARSE_LAYER,
    USUAL,
    Architecture,
    Config,
    Facts,
    Windows,
    read_experts,
    shared_width,
)
from fabula.formats.gguf_dense import granite

_SIGMOID = 2  # of enum llama_expert_gating_func_type


def _qwen3moe(f: Facts, config: Config) -> None:
    """llama.cpp always divides the weights by their sum."""
    config |= {"moe_intermediate_size": read_experts(f, config), "norm_topk_prob": True}


def _qwen2moe(f: Facts, config: Config) -> None:
    """llama.cpp never divides the weights by their sum."""
    config |= {"moe_intermediate_size": read_experts(f, config), "norm_topk_prob": False}
    config["shared_expert_intermediate_size"] = shared_width(f, config["intermediate_size"])


def _of_groups(f: Facts, config: Config) -> None:
    """Sigmoids with a correction, shared experts, dense layers first."""
    config |= {"moe_intermediate_size": read_experts(f, config)}
    config |= {
        "n_routed_experts": config.pop("num_experts"),
        "n_group": f.keys.integer(f.key("expert_group_count"), 1),
        "topk_group": f.keys.integer(f.key("expert_group_used_count"), 1),
        "n_shared_experts": f.keys.integer(f.key("expert_shared_count")),
        "first_k_dense_replace": f.keys.integer(f.key("leading_dense_block_count"), 0, low=0),
        "routed_scaling_factor": f.number("expert_weights_scale", 1.0, zero=1.0),
        "norm_topk_prob": f.keys.flag(f.key("expert_weights_norm"), False),
    }
    want_sigmoids(f)
    if f.arch == "glm4moe":
        config["use_qk_norm"] = f.has("attn_q_norm")
    else:
        config["sliding_window"] = None


def want_sigmoids(f: Facts) -> None:
    key = f.key("expert_gating_func")
    if (kind := f.keys.integer(key, _SIGMOID)) != _SIGMOID:
        raise f.keys.unsupported(key, f"is {kind}, which is not a sigmoid, as in all models of this architecture")


def _minimax_m2(f: Facts, config: Config) -> None:
    config |= {"intermediate_size": read_experts(f, config)}
    want_sigmoids(f)


def _ernie_moe(f: Facts, config: Config) -> None:
    size = read_experts(f, config)
    config |= {"moe_num_experts": config.pop("num_experts"), "moe_k": config.pop("num_experts_per_tok")}
    shared = shared_width(f, 0)
    n_shared = f.keys.integer(f.key("expert_shared_count"), shared // size, low=0)
    if shared != n_shared * size:
        raise f.keys.error(f.key("expert_shared_feed_forward_length"), f"is {shared}, not {n_shared} times {size}")
    config |= {
        "moe_intermediate_size": size,
        "moe_num_shared_experts": n_shared,
        "moe_layer_start_index": f.keys.integer(f.key("leading_dense_block_count"), 0, low=0),
        "moe_layer_interval": f.keys.integer(f.key("interleave_moe_layer_step"), 1),
    }


def _granite_moe(f: Facts, config: Config) -> None:
    granite(f, config)
    config |= {"intermediate_size": read_experts(f, config), "shared_intermediate_size": shared_width(f, 0)}


def _hunyuan_moe(f: Facts, config: Config) -> None:
    size = read_experts(f, config)
    config |= {"intermediate_size": size, "moe_topk": config.pop("num_experts_per_tok")}
    if (shared := shared_width(f, size)) != size:
        raise f.keys.unsupported(f.key("expert_shared_feed_forward_length"), f"is {shared}, experts are {size} wide")


def _gpt_oss(f: Facts, config: Config) -> None:
    """The rotation is that of the published model, whose ramp is not cut to whole numbers; llama.cpp cuts it."""
    config["intermediate_size"] = read_experts(f, config)
    if config["rope_scaling"]:
        config["rope_scaling"] = {**config["rope_scaling"], "truncate": False}
    else:  # a config without any means the scaling of the published models
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}


def _phimoe(f: Facts, config: Config) -> None:
    """SparseMixer, as the model has it, with the noise of the released one; llama.cpp has a softmax in its place."""
    config |= {"intermediate_size": read_experts(f, config), "lm_head_bias": "output.bias" in f.tensors}
    if scaling := config["rope_scaling"]:
        factor = scaling["attention_factor"]
        config["rope_scaling"] = {**scaling, "short_mscale": factor, "long_mscale": factor}


def _mellum(f: Facts, config: Config) -> None:
    """llama.cpp always divides the weights by their sum. Layers with windows have no scaling, and a theta of their own,
    which its conversion writes and llama.cpp does not read."""
    config |= {"moe_intermediate_size": read_experts(f, config), "norm_topk_prob": True}
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config["rope_parameters"] = {
        FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
        SLIDING: {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", theta)},
    }


def _olmoe(f: Facts, config: Config) -> None:
    config |= {"intermediate_size": read_experts(f, config), "norm_topk_prob": False}
    config["clip_qkv"] = f.number("attention.clamp_kqv", 0.0, zero=0.0) or None


SPARSE: Mapping[str, Architecture] = {
    "qwen2moe": Architecture(
        model_type="qwen2_moe", model_class="Qwen2MoeForCausalLM", biases={"": QKV}, factors=True,
        layer=(*SPARSE_LAYER, *SHARED, "ffn_gate_inp_shexp"),
        reads=SHARED_KEYS, finish=_qwen2moe,
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe", model_class="Qwen3MoeForCausalLM", layer=(*SPARSE_LAYER, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, factors=True, reads=EXPERT_KEYS, finish=_qwen3moe,
    ),
    "granitemoe": Architecture(
        model_type="granitemoeshared", model_class="GraniteMoeSharedForCausalLM", paired=True, factors=True,
        longrope=True, layer=(*SPARSE_LAYER, *SHARED), biases={"attention_bias": ATTENTION},
        reads=SHARED_KEYS | {"logit_scale", "residual_scale", "embedding_scale", "attention.scale"},
        finish=_granite_moe,
    ),
    # The norm in front of the MLP has the name of one behind attention.
    "glm4moe": Architecture(
        model_type="glm4_moe", model_class="Glm4MoeForCausalLM", rotated=True, biases={"attention_bias": QKV},
        layer=(
            *("attn_norm", *ATTENTION, "post_attention_norm", *MLP, *HEAD_NORMS), *EXPERTS, *SHARED, "exp_probs_b",
        ),
        names={"post_attention_norm": "post_attention_layernorm"},
        reads=GROUP_KEYS | {"nextn_predict_layers"}, finish=_of_groups,
    ),
    "dots1": Architecture(
        model_type="dots1", model_class="Dots1ForCausalLM", biases={"attention_bias": ATTENTION},
        layer=(*USUAL, *HEAD_NORMS, *EXPERTS, *SHARED, "exp_probs_b"), reads=GROUP_KEYS, finish=_of_groups,
    ),
    "ernie4_5-moe": Architecture(
        model_type="ernie4_5_moe", model_class="Ernie4_5_MoeForCausalLM",
        layer=(*USUAL, *EXPERTS, *SHARED, "exp_probs_b"),
        reads=SHARED_KEYS | {"expert_shared_count", "leading_dense_block_count", "interleave_moe_layer_step"},
        finish=_ernie_moe,
    ),
    "minimax-m2": Architecture(
        model_type="minimax_m2", model_class="MiniMaxM2ForCausalLM", rotated=True,
        layer=(*SPARSE_LAYER, *HEAD_NORMS, "exp_probs_b"),
        reads=EXPERT_KEYS | {"expert_gating_func"}, finish=_minimax_m2,
    ),
    "hunyuan-moe": Architecture(
        model_type="hunyuan_v1_moe", model_class="HunYuanMoEV1ForCausalLM", layer=(*SPARSE_LAYER, *SHARED, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, reads=SHARED_KEYS, finish=_hunyuan_moe,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss", model_class="GptOssForCausalLM",
        layer=("attn_norm", *ATTENTION, "attn_sinks", "post_attention_norm", *EXPERTS),
        names={"attn_sinks": "self_attn.sinks", "post_attention_norm": "post_attention_layernorm"},
        biases={"attention_bias": ATTENTION, "": EXPERTS}, windows=Windows(default=None, every=2),
        reads=EXPERT_KEYS, finish=_gpt_oss,
    ),
    # llama.cpp has RMS norms here and a plain softmax; the model has layer norms and SparseMixer.
    "phimoe": Architecture(
        model_type="phimoe", model_class="PhimoeForCausalLM", layer=(*SPARSE_LAYER, "attn_qkv"), longrope=True,
        norm_bias=True, head_bias=True, biases={"attention_bias": ("attn_qkv", *ATTENTION)}, windows=Windows(),
        scalings=("longrope",), reads=EXPERT_KEYS, finish=_phimoe,
    ),
    "mellum": Architecture(
        model_type="mellum", model_class="MellumForCausalLM", layer=(*SPARSE_LAYER, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, windows=Windows(every=4),
        reads=EXPERT_KEYS | {"rope.freq_base_swa"}, finish=_mellum,
    ),
    "olmoe": Architecture(
        model_type="olmoe", model_class="OlmoeForCausalLM",
        layer=(*SPARSE_LAYER, *HEAD_NORMS),
        reads=EXPERT_KEYS | {"attention.clamp_kqv"}, finish=_olmoe,
    ),
}  # fmt: skip
