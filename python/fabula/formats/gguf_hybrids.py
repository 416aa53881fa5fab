"""Architectures of GGUF files with recurrent layers.

Which layers these are is in `attention.recurrent_layers` or `full_attention_interval`, or they are those without KV
heads. Keys of the group `ssm.` have names of state space models, whatever the recurrence is: see each function.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fabula.formats.gguf_architecture import (
    ATTENTION,
    EXPERT_KEYS,
    EXPERTS,
    FULL,
    HEAD_NORMS,
    MLP,
    PLAIN_MLP,
    SHARED,
    SHARED_KEYS,
    USUAL,
    Architecture,
    Config,
    Facts,
    read_experts,
    shared_width,
)
from fabula.formats.gguf_dense import granite_factors
from fabula.formats.gguf_sparse import want_sigmoids

LINEAR = "linear_attention"
_SSM_KEYS = frozenset(
    f"ssm.{name}" for name in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")
)
_SHORT_CONV = {
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
_LFM2_LAYER = (*USUAL, *HEAD_NORMS, *_SHORT_CONV)
# Of a gated delta rule. `ssm_ba` and, in older files, `ssm_in` hold the parts of each k head side by side.
_DELTA = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.decay",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN_LAYER = ("attn_norm", *ATTENTION, *HEAD_NORMS)
_MAMBA = {
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_dt": "mamba.dt_bias",
    "ssm_a": "mamba.decay",
    "ssm_d": "mamba.D",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}


def _layer_kinds(f: Facts, other: str) -> list[str]:
    """Layers without KV heads are of another kind."""
    key = f.key("attention.head_count_kv")
    kv_heads = f.keys.each(key, f.n_layers, low=0)
    if len(set(kv_heads) - {0}) != 1:
        raise f.keys.unsupported(key, "differs from layer to layer")
    return [FULL if n else other for n in kv_heads]


def _lfm2(f: Facts, config: Config) -> None:
    """The norm before the head has the name of one of embeddings."""
    config |= {
        "layer_types": _layer_kinds(f, "conv"),
        "conv_L_cache": f.keys.integer(f.key("shortconv.l_cache")),
        "block_auto_adjust_ff_dim": False,
        "norm_eps": config.pop("rms_norm_eps"),
    }


def _lfm2moe(f: Facts, config: Config) -> None:
    """llama.cpp always divides the weights by their sum."""
    _lfm2(f, config)
    del config["block_auto_adjust_ff_dim"]
    config |= {"moe_intermediate_size": read_experts(f, config), "norm_topk_prob": True}
    config["num_dense_layers"] = f.keys.integer(f.key("leading_dense_block_count"), 0, low=0)
    config["routed_scaling_factor"] = f.number("expert_weights_scale", 1.0, zero=1.0)
    config["use_expert_bias"] = f.has("exp_probs_b", "bias")
    want_sigmoids(f)


def _delta_rule(f: Facts, config: Config) -> None:
    """The rank of time steps is the number of v heads, the count of groups that of k heads. v heads of a k head are not
    neighbors, but in files of qwen3next."""
    n_layers = f.keys.integer(f.key("block_count"))
    listed = f.keys.metadata.get(f.key("attention.recurrent_layers"))
    if listed is None:
        step = f.keys.integer(f.key("full_attention_interval"), 4)
        kinds = [LINEAR if (i + 1) % step else FULL for i in range(n_layers)]
    elif isinstance(listed, np.ndarray) and listed.dtype.kind == "b" and len(listed) == n_layers:
        kinds = [LINEAR if recurrent else FULL for recurrent in listed]
    else:
        raise f.keys.error(f.key("attention.recurrent_layers"), f"must be an array of {n_layers} booleans")
    n_heads, inner = f.keys.integer(f.key("ssm.time_step_rank")), f.keys.integer(f.key("ssm.inner_size"))
    if inner % n_heads:
        raise f.keys.error(f.key("ssm.inner_size"), f"is {inner}, no multiple of the {n_heads} heads (time_step_rank)")
    config |= {
        "layer_types": kinds[: f.n_layers],
        "linear_conv_kernel_dim": f.keys.integer(f.key("ssm.conv_kernel")),
        "linear_key_head_dim": f.keys.integer(f.key("ssm.state_size")),
        "linear_value_head_dim": inner // n_heads,
        "linear_num_key_heads": f.keys.integer(f.key("ssm.group_count")),
        "linear_num_value_heads": n_heads,
        "linear_heads_tiled": f.arch != "qwen3next",
    }


def _qwen_sparse(f: Facts, config: Config) -> None:
    """llama.cpp always divides the weights by their sum."""
    _delta_rule(f, config)
    config |= {"moe_intermediate_size": read_experts(f, config), "norm_topk_prob": True}
    config["shared_expert_intermediate_size"] = shared_width(f, config.get("intermediate_size", 1))


def _mamba(f: Facts, config: Config, **names: str) -> None:
    """`names`: of the fields that a family calls otherwise."""
    n_heads, inner = f.keys.integer(f.key("ssm.time_step_rank")), f.keys.integer(f.key("ssm.inner_size"))
    if inner % n_heads:
        raise f.keys.error(f.key("ssm.inner_size"), f"is {inner}, no multiple of the {n_heads} heads (time_step_rank)")
    found = {
        "mamba_n_heads": n_heads,
        "mamba_d_head": inner // n_heads,
        "mamba_n_groups": f.keys.integer(f.key("ssm.group_count")),
        "mamba_d_state": f.keys.integer(f.key("ssm.state_size")),
        "mamba_d_conv": f.keys.integer(f.key("ssm.conv_kernel")),
    }
    config |= {names.get(key, key): value for key, value in found.items()}


def _granite_hybrid(f: Facts, config: Config) -> None:
    """Bamba, too, whose heads are rotated by half. `rope.scaling.finetuned` says whether they are."""
    _mamba(f, config)
    inner = f.keys.integer(f.key("ssm.inner_size"))
    if inner % f.hidden_size:
        raise f.keys.unsupported(f.key("ssm.inner_size"), f"is {inner}, no multiple of the hidden size")
    rotated = f.keys.flag(f.key("rope.scaling.finetuned"), True)
    part = config.pop("partial_rotary_factor")
    if rotated and part != 1.0:
        _bamba(f, config, part)
        return
    config |= granite_factors(f)
    n_experts = f.keys.integer(f.key("expert_count"), 0, low=0)
    config |= {
        "layer_types": _layer_kinds(f, LINEAR),
        "mamba_expand": inner // f.hidden_size,
        "position_embedding_type": "rope" if rotated else "nope",
    }
    if n_experts:
        shared = shared_width(f, 0)
        config |= {"intermediate_size": read_experts(f, config), "shared_intermediate_size": shared}
    else:
        size = shared_width(f, config["intermediate_size"])
        config |= {"num_local_experts": 0, "shared_intermediate_size": size, "intermediate_size": size}


def _bamba(f: Facts, config: Config, part: float) -> None:
    for name in ("logit_scale", "residual_scale", "embedding_scale"):
        if (factor := f.number(name, 1.0, zero=1.0)) != 1.0:
            raise f.keys.unsupported(f.key(name), f"is {factor}: only in models whose heads are rotated whole, or not")
    kinds = _layer_kinds(f, LINEAR)
    config |= {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == FULL],
        "mamba_expand": f.keys.integer(f.key("ssm.inner_size")) // f.hidden_size,
        "rope_parameters": {
            "rope_theta": config.pop("rope_theta"), "partial_rotary_factor": part,
            **(config.pop("rope_scaling") or {"rope_type": "default"}),
        },
    }  # fmt: skip


def _falcon_h1(f: Facts, config: Config) -> None:
    """All factors are in the tensors."""
    _mamba(f, config)
    config |= {
        "mamba_d_ssm": f.keys.integer(f.key("ssm.inner_size")),
        "mamba_rms_norm": f.has("ssm_norm"),
        "mamba_norm_before_gate": False,
    }


def _nemotron_h(f: Facts, config: Config) -> None:
    """A layer with neither KV heads nor an MLP is recurrent. Nothing is rotated."""
    del config["partial_rotary_factor"]
    _mamba(
        f, config,
        mamba_n_heads="mamba_num_heads", mamba_d_head="mamba_head_dim", mamba_n_groups="n_groups",
        mamba_d_state="ssm_state_size", mamba_d_conv="conv_kernel",
    )  # fmt: skip
    sizes = f.keys.each(f.key("feed_forward_length"), f.n_layers, low=0)
    kinds = _layer_kinds(f, LINEAR)
    if len(set(sizes) - {0}) > 1:
        raise f.keys.unsupported(f.key("feed_forward_length"), "differs from layer to layer")
    config |= {
        "layers_block_type": ["mlp" if size else kind for size, kind in zip(sizes, kinds, strict=True)],
        "mlp_hidden_act": "relu2",
    }


HYBRIDS: Mapping[str, Architecture] = {
    "lfm2": Architecture(
        model_type="lfm2", model_class="Lfm2ForCausalLM", varied=True, final_norm="token_embd_norm", layer=_LFM2_LAYER,
        names=_SHORT_CONV, biases={"conv_bias": tuple(_SHORT_CONV)}, reads=frozenset(["shortconv.l_cache"]),
        finish=_lfm2,
    ),
    "lfm2moe": Architecture(
        model_type="lfm2_moe", model_class="Lfm2MoeForCausalLM", varied=True, final_norm="token_embd_norm",
        layer=(*_LFM2_LAYER, *EXPERTS, "exp_probs_b"), names=_SHORT_CONV, biases={"conv_bias": tuple(_SHORT_CONV)},
        reads=EXPERT_KEYS
        | {"shortconv.l_cache", "leading_dense_block_count", "expert_gating_func", "expert_weights_scale"},
        finish=_lfm2moe,
    ),
    "qwen3next": Architecture(
        model_type="qwen3_next", model_class="Qwen3NextForCausalLM", rotated=True,
        layer=(*_QWEN_LAYER, *_DELTA, *EXPERTS, *SHARED, "ffn_gate_inp_shexp"), names=_DELTA,
        reads=SHARED_KEYS
        | _SSM_KEYS
        | {"attention.recurrent_layers", "full_attention_interval", "nextn_predict_layers"},
        finish=_qwen_sparse,
    ),
    # For text all sections of a position are equal, so rotations are the usual ones.
    "qwen35": Architecture(
        model_type="qwen3_5_text", model_class="Qwen3_5ForCausalLM", rotated=True, layer=(*_QWEN_LAYER, *_DELTA, *MLP),
        names=_DELTA,
        reads=_SSM_KEYS
        | {"attention.recurrent_layers", "full_attention_interval", "nextn_predict_layers", "rope.dimension_sections"},
        finish=_delta_rule,
    ),
    "qwen35moe": Architecture(
        model_type="qwen3_5_moe_text", model_class="Qwen3_5MoeForCausalLM", rotated=True,
        layer=(*_QWEN_LAYER, *_DELTA, *EXPERTS, *SHARED, "ffn_gate_inp_shexp"), names=_DELTA,
        reads=SHARED_KEYS
        | _SSM_KEYS
        | {"attention.recurrent_layers", "full_attention_interval", "nextn_predict_layers", "rope.dimension_sections"},
        finish=_qwen_sparse,
    ),
    "granitehybrid": Architecture(
        model_type="granitemoehybrid", model_class="GraniteMoeHybridForCausalLM", varied=True, paired=True,
        rotated=True, layer=(*USUAL, *_MAMBA, *EXPERTS, *SHARED), names=_MAMBA,
        biases={
            "attention_bias": ATTENTION, "mlp_bias": MLP, "mamba_conv_bias": ("ssm_conv1d",),
            "mamba_proj_bias": ("ssm_in", "ssm_out"),
        },
        reads=SHARED_KEYS | _SSM_KEYS | {"logit_scale", "residual_scale", "embedding_scale", "attention.scale"},
        finish=_granite_hybrid,
    ),
    "falcon-h1": Architecture(
        model_type="falcon_h1", model_class="FalconH1ForCausalLM", layer=(*USUAL, *_MAMBA), names=_MAMBA,
        biases={
            "attention_bias": ATTENTION, "mlp_bias": MLP, "mamba_conv_bias": ("ssm_conv1d",),
            "mamba_proj_bias": ("ssm_in",), "projectors_bias": ("ssm_out",),
        },
        reads=_SSM_KEYS, finish=_falcon_h1,
    ),
    "nemotron_h": Architecture(
        model_type="nemotron_h", model_class="NemotronHForCausalLM", varied=True, silu=False, rotated=True,
        eps="layer_norm_epsilon",
        layer=("attn_norm", *_MAMBA, *ATTENTION, *PLAIN_MLP), names=_MAMBA,
        biases={"mlp_bias": PLAIN_MLP, "use_conv_bias": ("ssm_conv1d",), "use_bias": ("ssm_in", "ssm_out")},
        reads=_SSM_KEYS, finish=_nemotron_h,
    ),
}  # fmt: skip
