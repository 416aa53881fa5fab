"""The families with recurrent layers: short convolutions, gated delta rules, state space models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabula.models import hybrid_rules as rules
from fabula.models.config import Traits
from fabula.models.family import NO_BIAS, Family

_LFM2: Mapping[str, Any] = {
    **NO_BIAS,
    "context_length": 128000,
    "n_kv_heads": 8,
    "theta": 1e6,
    "tied": True,
    "eps": ("norm_eps", 1e-5),
    "qk_norm": "head",
    "activation": ("", "silu"),
    "mixers": {rules.CONV: rules.short_conv},
}

_QWEN: Mapping[str, Any] = {
    "context_length": 32768,
    "head_dim": 256,
    "rotated": 0.25,
    "qk_norm": "head",
    "norm_offset": 1.0,
    "qkv_bias": False,
    "output_bias": False,
    "kinds": rules.every_fourth(),
    "mixers": {rules.LINEAR: rules.delta_rule},
    "finish": rules.gated,
}

HYBRIDS: Mapping[str, Family] = {
    # Liquid AI 2025: gated short convolutions, and attention in some layers. LFM2.5 has the same form.
    "lfm2": Family("LFM2", Traits(**_LFM2, kinds=rules.lfm2_kinds, adapt=rules.lfm2)),
    "lfm2_moe": Family(
        "LFM2-MoE", Traits(**_LFM2, kinds=rules.listed_kinds, adapt=rules.lfm2_moe, experts=rules.lfm2_experts)
    ),
    # Qwen team 2025 and 2026: gated delta rules, attention with a gate in each fourth layer.
    "qwen3_next": Family("Qwen3-Next", Traits(**_QWEN, n_kv_heads=2, experts=rules.qwen3_next_experts)),
    "qwen3_5_text": Family("Qwen3.5", Traits(**_QWEN, n_kv_heads=4)),
    "qwen3_5_moe_text": Family("Qwen3.5-MoE", Traits(**_QWEN, n_kv_heads=2, inner=1, experts=rules.qwen3_5_experts)),
    # OLMo team 2026: delta rules with negative eigenvalues, norms behind attention only.
    "olmo_hybrid": Family(
        "OLMo Hybrid",
        Traits(
            context_length=65536,
            norms="post",
            qk_norm="row",
            kinds=rules.olmo_kinds,
            mixers={rules.LINEAR: rules.olmo_delta_rule},
            adapt=rules.olmo_hybrid,
            finish=rules.olmo_norms,
        ),
    ),
    # IBM 2025, Granite 4: Mamba-2, mostly without rotation.
    "granitemoehybrid": Family(
        "Granite 4",
        Traits(
            names={"num_experts": "num_local_experts", "layer_types": "layers_block_type"},
            kinds=rules.all_linear,
            mixers={rules.LINEAR: rules.mamba2},
            adapt=rules.granite_hybrid,
            experts=rules.granite_hybrid_experts,
        ),
    ),
    # IBM and others 2024.
    "bamba": Family(
        "Bamba",
        Traits(
            ignored=("partial_rotary_factor",),
            context_length=262144,
            n_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            rotated=0.5,
            mlp_bias=("mlp_bias", False),
            kinds=rules.bamba_kinds,
            mixers={rules.LINEAR: rules.bamba_mamba},
            adapt=rules.bamba,
        ),
    ),
    # TII 2025: a state space model beside the attention of each layer.
    "falcon_h1": Family(
        "Falcon-H1",
        Traits(
            context_length=8192,
            n_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            mlp_bias=("mlp_bias", False),
            adapt=rules.falcon_h1,
            finish=rules.falcon_h1_layers,
        ),
    ),
    # NVIDIA 2025: each layer is a state space model, attention without rotation, or an MLP.
    "nemotron_h": Family(
        "Nemotron-H",
        Traits(
            **NO_BIAS,
            context_length=4096,
            n_kv_heads=8,
            head_dim=128,
            eps=("layer_norm_epsilon", 1e-5),
            gated=False,
            activation=("mlp_hidden_act", "relu2"),
            mlp_bias=("mlp_bias", False),
            mixers={rules.LINEAR: rules.nemotron_mamba},
            no_rope=rules.unrotated,
            adapt=rules.nemotron_h,
            finish=rules.nemotron_layers,
        ),
    ),
}
