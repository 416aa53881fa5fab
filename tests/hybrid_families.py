"""Cases of families with recurrent layers, for decoder_families.py: one and two recurrent layers before the first with
attention, odd heads, several heads on a k head, groups of B and C, and convolutions over three and four tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

FULL, CONV, LINEAR = "full_attention", "conv", "linear_attention"


def use_recurrent_form(model: Any) -> None:
    """Lets a model of transformers compute delta rules token by token in prefill, too, not in chunks with a rounding of
    their own."""
    module = sys.modules[type(model).__module__]
    if hasattr(module, "torch_chunk_gated_delta_rule"):
        module.torch_chunk_gated_delta_rule = module.torch_recurrent_gated_delta_rule


def hybrid_settings(odd: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Each case's family, settings and config class, from the settings that families with odd and with plain heads
    share."""
    kinds = [CONV, FULL, CONV, CONV, FULL]
    lfm2 = {**odd, "num_hidden_layers": 5, "layer_types": kinds, "block_auto_adjust_ff_dim": False}
    moe = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
    delta = {
        **{**odd, "num_hidden_layers": 5, "layer_types": [LINEAR, FULL, LINEAR, LINEAR, FULL]},
        **{"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 20},
        "linear_value_head_dim": 24,
    }
    two_first = {"layer_types": [LINEAR, LINEAR, FULL, LINEAR, LINEAR], "linear_conv_kernel_dim": 3}
    shared = {**moe, "shared_expert_intermediate_size": 60}
    mamba = {"mamba_n_heads": 6, "mamba_d_head": 48, "mamba_n_groups": 2, "mamba_d_state": 20}
    granite = {
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.09},
        "logits_scaling": 2.5,
    }
    granite = {**plain, **mamba, **granite, "num_hidden_layers": 4, "shared_intermediate_size": 60}
    bamba = {**plain, **mamba, "num_hidden_layers": 4}
    falcon = {**plain, **mamba, "mamba_d_ssm": 288}
    factors = {
        **{"embedding_multiplier": 3.0, "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "ssm_in_multiplier": 1.25},
        **{"attention_in_multiplier": 0.8, "attention_out_multiplier": 0.6, "ssm_out_multiplier": 0.3},
        **{"mlp_multipliers": [0.88, 0.39], "ssm_multipliers": [0.9, 1.2, 0.4, 1.5, 0.7]},
    }
    nemotron = {
        **{key: value for key, value in odd.items() if key != "num_hidden_layers"},
        **{"mamba_num_heads": 6, "mamba_head_dim": 20, "n_groups": 3, "ssm_state_size": 24, "mlp_hidden_act": "relu2"},
        "layers_block_type": [LINEAR, "mlp", LINEAR, FULL, "mlp", LINEAR, "mlp", FULL],
    }
    return {
        "lfm2": ("Lfm2", lfm2, ""),
        "lfm2-adjusted": (
            "Lfm2",
            {
                **plain,
                **{"num_hidden_layers": 4, "conv_L_cache": 4, "conv_bias": True, "full_attn_idxs": [2]},
                **{"block_multiple_of": 20, "block_ffn_dim_multiplier": 1.3},
            },
            "",
        ),
        "lfm2_moe": (
            "Lfm2Moe",
            {**plain, **moe, "num_hidden_layers": 5, "layer_types": kinds, "num_dense_layers": 1},
            "",
        ),
        "qwen3_next": ("Qwen3Next", {**delta, **shared, "mlp_only_layers": [1]}, ""),
        "qwen3_next-two-first": (
            "Qwen3Next",
            {**delta, **shared, **two_first, "decoder_sparse_step": 2, "norm_topk_prob": False},
            "",
        ),
        "qwen3_5": ("Qwen3_5", delta, "Qwen3_5TextConfig"),
        "qwen3_5-two-first": ("Qwen3_5", {**delta, **two_first, "linear_num_value_heads": 3}, "Qwen3_5TextConfig"),
        "qwen3_5_moe": ("Qwen3_5Moe", {**delta, **shared}, "Qwen3_5MoeTextConfig"),
        "olmo_hybrid": ("OlmoHybrid", {**plain, "num_hidden_layers": 5}, ""),
        "olmo_hybrid-unrotated": (
            "OlmoHybrid",
            {
                **{**plain, "num_hidden_layers": 4, "layer_types": [LINEAR, FULL, LINEAR, FULL]},
                **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 20},
                **{"linear_value_head_dim": 24, "linear_conv_kernel_dim": 3, "linear_allow_neg_eigval": False},
                "rope_parameters": {"rope_type": "default", "rope_theta": None},
            },
            "",
        ),
        "granitemoehybrid": (
            "GraniteMoeHybrid",
            {
                **granite,
                "layer_types": [LINEAR, FULL, LINEAR, LINEAR],
                "num_local_experts": 7,
                "num_experts_per_tok": 3,
            },
            "",
        ),
        "granitemoehybrid-dense": (
            "GraniteMoeHybrid",
            {
                **{**granite, "layer_types": [LINEAR, LINEAR, FULL, LINEAR], "num_local_experts": 0},
                **{"position_embedding_type": "rope", "mamba_d_conv": 3, "mamba_conv_bias": False},
                **{"mamba_proj_bias": True, "time_step_limit": [0.4, 1.5], "attention_bias": True},
            },
            "",
        ),
        "bamba": ("Bamba", {**bamba, "num_hidden_layers": 3, "attn_layer_indices": [1]}, ""),
        "bamba-biased": (
            "Bamba",
            {**bamba, "attn_layer_indices": [2], "mamba_d_conv": 3, "mlp_bias": True, "attention_bias": True},
            "",
        ),
        "falcon_h1": ("FalconH1", {**falcon, **factors}, ""),
        "falcon_h1-normed": (
            "FalconH1",
            {
                **{**falcon, **factors, "mamba_rms_norm": True, "mamba_d_conv": 3, "projectors_bias": True},
                **{"mlp_bias": True, "attention_bias": True, "mamba_proj_bias": True},
            },
            "",
        ),
        "falcon_h1-gate-first": (
            "FalconH1",
            {**falcon, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
            "",
        ),
        "nemotron_h": ("NemotronH", nemotron, ""),
        "nemotron_h-biased": (
            "NemotronH",
            {
                **{**nemotron, "layers_block_type": [LINEAR, LINEAR, FULL, "mlp", LINEAR], "mlp_bias": True},
                **{"conv_kernel": 3, "use_conv_bias": False, "use_bias": True, "attention_bias": True},
                "mlp_hidden_act": "silu",
            },
            "",
        ),
    }


# Values of fields for test_family_flips.py.
FLIPS: dict[str, list[Any]] = {
    "attention_in_multiplier": [0.5],
    "attention_out_multiplier": [0.5],
    "attn_layer_indices": [[0], [1, 2], None],
    "block_auto_adjust_ff_dim": [True, False],
    "block_ffn_dim_multiplier": [1.5, None],
    "block_multiple_of": [7],
    "conv_L_cache": [2, 4],
    "conv_bias": [True, False],
    "conv_kernel": [3],
    "full_attn_idxs": [[0], None],
    "key_multiplier": [0.3, -1.0],
    "layers_block_type": [[LINEAR, FULL], ["mlp"], [LINEAR, "moe"], ["no such"], None],
    "linear_allow_neg_eigval": [False, True],
    "linear_conv_kernel_dim": [3],
    "linear_key_head_dim": [10, None],
    "linear_num_key_heads": [1, 2],
    "linear_num_value_heads": [3],
    "linear_value_head_dim": [12],
    "lm_head_multiplier": [2.0],
    "mamba_conv_bias": [False, True],
    "mamba_d_conv": [3],
    "mamba_d_head": ["auto", 24],
    "mamba_d_ssm": [None, 144],
    "mamba_d_state": [10],
    "mamba_expand": [1, 3],
    "mamba_head_dim": [10],
    "mamba_hidden_act": ["gelu", "relu", "no such"],
    "mamba_n_groups": [1, 3],
    "mamba_n_heads": [3, 12],
    "mamba_norm_before_gate": [False, True],
    "mamba_num_heads": [3],
    "mamba_proj_bias": [True],
    "mamba_rms_norm": [True],
    "mlp_hidden_act": ["silu", "gelu", "no such"],
    "mlp_multipliers": [[0.5, 2.0], None, [1.0]],
    "n_groups": [1, 2],
    "num_dense_layers": [0, 2],
    "num_nextn_predict_layers": [1],
    "position_embedding_type": ["rope", None, "nope"],
    "projectors_bias": [True],
    "residual_in_fp32": [True],
    "ssm_in_multiplier": [0.5],
    "ssm_multipliers": [[0.5, 2.0, 1.0, 1.5, 0.3], None, [1.0]],
    "ssm_out_multiplier": [0.5],
    "ssm_state_size": [12],
    "time_step_limit": [[0.1, 0.3], [0.0, 0.2], [0.2, {"__float__": "Infinity"}]],
    "time_step_min": [0.05, 0.7],
    "use_conv_bias": [False],
    "use_expert_bias": [False],
}
IDLE = {
    *("chunk_size", "expand", "linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max"),
    *("linear_dt_min", "mamba_chunk_size", "mamba_ssm_cache_dtype", "moe_latent_size", "mtp_layers_block_type"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "num_logits_to_keep", "time_step_floor"),
    *("rescale_prenorm_residual", "time_step_max", "use_mamba_kernels", "z_loss_coefficient"),
}
# What a refusal may speak of in place of the field: tensors that are missing or of another shape then.
SPOKEN = {
    **dict.fromkeys(FLIPS, ("tensor",)),
    "layers_block_type": ("tensor", "layer_types"),
    **dict.fromkeys(("mamba_d_head", "mamba_expand", "mamba_n_heads"), ("tensor", "mamba_n_heads", "mamba_n_groups")),
    "mamba_d_ssm": ("tensor", "mamba_n_heads"),
    "mamba_num_heads": ("tensor", "n_groups"),
    "attn_layer_indices": ("tensor", "layer with attention"),
    "linear_num_key_heads": ("tensor", "linear_num_value_heads"),
    "linear_num_value_heads": ("tensor",),
}
