"""GGUF files with multi-head latent attention: DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash and others of this form. All
of them have the architecture deepseek2.

Newer files have the matrices of keys and values apart (attn_k_b, transposed, and attn_v_b), and the widths of heads in
keys of their own; older ones have one matrix (attn_kv_b), and the widths in the usual keys.

Source: src/models/deepseek2.cpp, src/llama-context.cpp (YaRN) and conversion/deepseek.py of llama.cpp, in the source of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabula.formats.gguf_architecture import Architecture, Facts

_SOFTMAX, _SIGMOID = 1, 2  # of enum llama_expert_gating_func_type
_GLM = ((47, 48), 154880)  # layers and tokens of GLM-4.7-Flash, whose first files do not say that it has sigmoids
_NAMES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}


def _deepseek2(f: Facts, config: dict[str, Any]) -> None:
    """The family follows from how experts are chosen: V3, V2, or Youtu without any."""
    keys, rotated = f.keys, f.head_dim
    is_split = keys.integer(f.key("attention.key_length_mla"), 0, low=0) > 0
    of_k, of_v = (f"attention.{part}_length{'_mla' if is_split else ''}" for part in ("key", "value"))
    width = keys.integer(f.key(of_k))
    if width <= rotated:
        raise keys.error(f.key(of_k), f"is {width}, must be above rope.dimension_count {rotated}")
    config |= {
        "kv_lora_rank": keys.integer(f.key("attention.kv_lora_rank")),
        "q_lora_rank": keys.integer(f.key("attention.q_lora_rank")) if f.has("attn_q_a") else None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": width - rotated,
        "v_head_dim": keys.integer(f.key(of_v)),
        "num_key_value_heads": f.n_heads,
    }
    _magnitude(f, config)
    dense = keys.integer(f.key("leading_dense_block_count"), 0, low=0)
    if not keys.integer(f.key("expert_count"), 0, low=0) or dense >= f.n_layers:
        config |= {"model_type": "youtu", "architectures": ["YoutuForCausalLM"]}
        return
    _experts(f, config, dense)


def _magnitude(f: Facts, config: dict[str, Any]) -> None:
    """YaRN's factor on queries and keys: 0.1 mscale_all_dim of config.json. llama.cpp takes mscale to be the same."""
    key, scaling = f.key("rope.scaling.yarn_log_multiplier"), config["rope_scaling"]
    if not scaling:
        return
    if scaling["rope_type"] != "yarn" or not f.keys.has(key) or "attention_factor" in scaling:
        name = f.key("rope.scaling.attn_factor") if "attention_factor" in scaling else key
        raise f.keys.unsupported(name, "scaling of positions is offered as YaRN with yarn_log_multiplier alone")
    weight = round(10 * f.number("rope.scaling.yarn_log_multiplier", 0.0, zero=0.0), 6)
    config["rope_scaling"] = {**scaling, "mscale": weight, "mscale_all_dim": weight}


def _experts(f: Facts, config: dict[str, Any], dense: int) -> None:
    keys = f.keys
    down = next((t for name, t in f.tensors.items() if name.endswith(".ffn_down_exps.weight")), None)
    if down is None:
        raise keys.unsupported(f.key("expert_count"), "is there, but no tensor holds all experts (ffn_down_exps)")
    n_groups = keys.integer(f.key("expert_group_count"), 1)
    config |= {
        "n_routed_experts": keys.integer(f.key("expert_count")),
        "num_experts_per_tok": keys.integer(f.key("expert_used_count")),
        "moe_intermediate_size": down.shape[-1],
        "n_shared_experts": keys.integer(f.key("expert_shared_count")),
        "n_group": n_groups,
        "topk_group": keys.integer(f.key("expert_group_used_count"), 1),
        "first_k_dense_replace": dense,
        "routed_scaling_factor": f.number("expert_weights_scale", 1.0, zero=1.0),
    }
    if (said := keys.integer(f.key("expert_feed_forward_length"), down.shape[-1])) != down.shape[-1]:
        raise keys.error(f.key("expert_feed_forward_length"), f"is {said}, but experts are {down.shape[-1]} wide")
    is_glm = f.n_layers in _GLM[0] and config["vocab_size"] == _GLM[1]
    kind = keys.integer(f.key("expert_gating_func"), 0, low=0) or (_SIGMOID if is_glm else _SOFTMAX)
    is_renormalized = keys.flag(f.key("expert_weights_norm"), False)
    if kind == _SIGMOID:
        config["norm_topk_prob"] = is_renormalized
        return
    if kind != _SOFTMAX:
        raise keys.unsupported(f.key("expert_gating_func"), f"is {kind}, offered are 1 (softmax) and 2 (sigmoid)")
    if is_renormalized:
        raise keys.unsupported(f.key("expert_weights_norm"), "is true with a softmax, which is not offered here")
    config |= {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}
    config["topk_method"] = "group_limited_greedy" if n_groups > 1 else "greedy"


# Arguments of `Architecture`.
LATENT: Mapping[str, Architecture] = {
    # Groups of experts of V2 are rated by their best expert here and in transformers, by the best two in llama.cpp.
    "deepseek2": Architecture(
        model_type="deepseek_v3",
        model_class="DeepseekV3ForCausalLM",
        latent=True,
        scalings=("none", "yarn"),
        layer=(
            *("attn_norm", "attn_q", *_NAMES, "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
            *("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "exp_probs_b"),
            *("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
        ),
        names=_NAMES,
        reads=frozenset([
            "attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
            "rope.scaling.yarn_log_multiplier", "expert_count", "expert_used_count", "expert_feed_forward_length",
            "expert_shared_count", "expert_weights_scale", "expert_weights_norm", "expert_gating_func",
            "expert_group_count", "expert_group_used_count", "leading_dense_block_count", "nextn_predict_layers",
        ]),
        finish=_deepseek2,
    ),
}  # fmt: skip
