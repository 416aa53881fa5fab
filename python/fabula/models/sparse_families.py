"""Families with mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping

from fabula.models import expert_rules as experts
from fabula.models import family_rules as rules
from fabula.models.config import Traits
from fabula.models.family import NO_BIAS, Family

_MELLUM_ROPES = {
    rules.FULL: {"rope_type": "default", "rope_theta": 500000.0},
    rules.SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
}

SPARSE: Mapping[str, Family] = {
    # Jiang et al. 2024.
    "mixtral": Family(
        "Mixtral",
        Traits(
            **NO_BIAS,
            names={"num_experts": "num_local_experts"},
            windowed="always",
            window=None,
            lists_kinds=False,
            context_length=131072,
            n_kv_heads=8,
            theta=1e6,
            eps=("rms_norm_eps", 1e-5),
            experts=experts.mixtral,
        ),
    ),
    # Qwen team 2024: shared experts with a gate.
    "qwen2_moe": Family(
        "Qwen2-MoE",
        Traits(
            qkv_bias=("qkv_bias", True),
            output_bias=False,
            names={"num_experts": "num_local_experts"},
            windowed="switched",
            kinds=experts.qwen2_kinds,
            context_length=32768,
            n_kv_heads=16,
            reads_head_dim=False,
            experts=experts.qwen2,
        ),
    ),
    # Qwen team 2025: norms on q and k heads.
    "qwen3_moe": Family(
        "Qwen3-MoE",
        Traits(
            names={"num_experts": "num_local_experts"},
            windowed="switched",
            lists_kinds=False,
            kinds=experts.qwen3_kinds,
            context_length=32768,
            n_kv_heads=4,
            qk_norm="head",
            experts=experts.qwen3,
        ),
    ),
    # Muennighoff et al. 2024: norms on whole rows of q and k.
    "olmoe": Family(
        "OLMoE",
        Traits(
            names={"num_experts": "num_local_experts"},
            context_length=4096,
            reads_head_dim=False,
            eps=("rms_norm_eps", 1e-5),
            inner=1,
            qk_norm="row",
            adapt=rules.refuse("clip_qkv"),
            experts=experts.olmoe,
        ),
    ),
    # OpenAI 2025: sinks, windows in every other layer, biases, clamped gates, experts in MXFP4.
    "gpt_oss": Family(
        "gpt-oss",
        Traits(
            names={"num_experts": "num_local_experts"},
            ignored=("hidden_act",),
            windowed="always",
            window=128,
            kinds=rules.every(2),
            context_length=131072,
            n_kv_heads=8,
            head_dim=64,
            theta=150000.0,
            rope={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            eps=("rms_norm_eps", 1e-5),
            qkv_bias=("attention_bias", True),
            output_bias=("attention_bias", True),
            sinks=True,
            experts=experts.gpt_oss,
        ),
    ),
    # IBM 2024 and 2025: with shared experts or without.
    "granitemoe": Family(
        "Granite MoE",
        Traits(names={"num_experts": "num_local_experts"}, adapt=rules.granite, experts=experts.granite_alone),
    ),
    "granitemoeshared": Family(
        "Granite MoE with shared experts",
        Traits(names={"num_experts": "num_local_experts"}, adapt=rules.granite, experts=experts.granite),
    ),
    # Zhipu AI 2025: GLM-4.5, 4.6, 4.7.
    "glm4_moe": Family(
        "GLM-4.5",
        Traits(
            names={"n_routed_experts": "num_local_experts"},
            context_length=131072,
            n_kv_heads=8,
            eps=("rms_norm_eps", 1e-5),
            rotated=0.5,
            output_bias=False,
            adapt=experts.glm4_norms,
            experts=experts.glm4,
        ),
    ),
    # Rednote 2025.
    "dots1": Family(
        "dots.llm1",
        Traits(
            names={"n_routed_experts": "num_local_experts"},
            windowed="always",
            kinds=experts.dots1_kinds,
            n_kv_heads=32,
            qk_norm="head",
            output_bias=("attention_bias", False),
            experts=experts.dots1,
        ),
    ),
    # Baidu 2025.
    "ernie4_5_moe": Family(
        "ERNIE 4.5 MoE",
        Traits(
            names={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
            context_length=131072,
            n_kv_heads=4,
            theta=500000.0,
            tied=True,
            eps=("rms_norm_eps", 1e-5),
            interleaved=True,
            qkv_bias=("use_bias", False),
            output_bias=("use_bias", False),
            mlp_bias=("use_bias", False),
            adapt=rules.refuse("use_bias"),
            experts=experts.ernie,
        ),
    ),
    # MiniMax 2025: norms on whole rows of q and k.
    "minimax_m2": Family(
        "MiniMax M2",
        Traits(
            **NO_BIAS,
            names={"num_experts": "num_local_experts"},
            context_length=196608,
            n_kv_heads=8,
            head_dim=128,
            theta=5e6,
            rotated=1.0,
            qk_norm="row",
            adapt=experts.minimax_m2_rotation,
            experts=experts.minimax_m2,
        ),
    ),
    # Microsoft 2024: SparseMixer, layer norms, a bias of the head.
    "phimoe": Family(
        "Phi-MoE",
        Traits(
            names={"num_experts": "num_local_experts"},
            context_length=131072,
            n_kv_heads=8,
            theta=1e6,
            windowed="always",
            window=None,
            lists_kinds=False,
            norm="layer",
            norm_biased=True,
            eps=("rms_norm_eps", 1e-5),
            adapt=rules.phimoe,
            finish=rules.phimoe_rope,
            experts=experts.phimoe,
        ),
    ),
    # JetBrains 2026: windows in some layers, which have a theta of their own.
    "mellum": Family(
        "Mellum 2",
        Traits(
            names={"num_experts": "num_local_experts"},
            context_length=131072,
            n_kv_heads=4,
            head_dim=128,
            theta=500000.0,
            rope=_MELLUM_ROPES,
            rope_by_kind=True,
            windowed="always",
            window=1024,
            kinds=rules.all_full,
            qk_norm="head",
            experts=experts.mellum,
            adapt=rules.ropes_by_kind,
        ),
    ),
    # Tencent 2025: norms of q and k behind the rotation.
    "hunyuan_v1_moe": Family(
        "Hunyuan MoE",
        Traits(
            names={"num_experts_per_tok": "moe_topk"},
            eps=("rms_norm_eps", 1e-5),
            qk_norm="head",
            qk_norm_rotated=True,
            finish=rules.hunyuan,
            experts=experts.hunyuan,
        ),
    ),
}
