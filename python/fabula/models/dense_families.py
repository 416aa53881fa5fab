"""Families with RMS norms and an MLP in each layer: Llama and what came of it, and text parts of multimodal models.

Llama 4 and Gemma 4 have mixtures of experts in some of their models.
"""

from __future__ import annotations

from collections.abc import Mapping

from fabula.lean_dataclasses import replace
from fabula.models import expert_rules as experts
from fabula.models import family_rules as rules
from fabula.models import gemma3n, gemma4
from fabula.models.config import Traits
from fabula.models.family import NO_BIAS, Family

# Llama 3 scaling that Apertus and CWM configs stand for where they have none.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}

_GEMMA2 = Traits(
    context_length=8192,
    n_kv_heads=4,
    head_dim=256,
    tied=True,
    windowed="always",
    kinds=rules.every(2),
    norms="sandwich",
    norm_offset=1.0,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    score_cap=50.0,
    logit_cap=30.0,
    adapt=rules.gemma2,
)
_QWEN2_VL = Traits(
    qkv_bias=True,
    output_bias=False,
    context_length=32768,
    n_kv_heads=8,
    theta=1e6,
    eps=("rms_norm_eps", 1e-5),
    windowed="switched",
    max_window_layers=80,
    finish=rules.mrope,
)
_OLMO2 = Traits(eps=("rms_norm_eps", 1e-5), norms="post", qk_norm="row")
_GLM = Traits(
    context_length=131072,
    n_kv_heads=2,
    head_dim=128,
    eps=("rms_norm_eps", 1.5625e-07),
    rotated=0.5,
    interleaved=True,
    qkv_bias=("attention_bias", True),
    output_bias=False,
)

DENSE: Mapping[str, Family] = {
    # Touvron et al. 2023; Llama 2 and 3; SmolLM, TinyLlama, Yi and others of the same form.
    "llama": Family("Llama", Traits(mlp_bias=("mlp_bias", False))),
    # Jiang et al. 2023: a sliding window in every layer, or in those that `layer_types` names.
    "mistral": Family("Mistral", Traits(**NO_BIAS, windowed="always", context_length=131072, n_kv_heads=8)),
    # Qwen team 2024, Qwen2 and Qwen2.5: biases on q, k and v, optional windows in the upper layers.
    "qwen2": Family(
        "Qwen2",
        Traits(qkv_bias=True, output_bias=False, windowed="switched", context_length=32768, n_kv_heads=32),
    ),
    # Qwen team 2025: norms on q and k heads.
    "qwen3": Family(
        "Qwen3", Traits(windowed="switched", context_length=32768, n_kv_heads=32, head_dim=128, qk_norm="head")
    ),
    # Llama under another name.
    "internlm3": Family(
        "InternLM 3",
        Traits(
            names={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
            context_length=32768,
            n_kv_heads=2,
            head_dim=128,
            eps=("rms_norm_eps", 1e-5),
            mlp_bias=("mlp_bias", False),
            adapt=rules.internlm3,
        ),
    ),
    "seed_oss": Family(
        "Seed-OSS",
        Traits(
            context_length=524288,
            n_kv_heads=8,
            head_dim=128,
            qkv_bias=("attention_bias", True),
            output_bias=("attention_out_bias", False),
            mlp_bias=("mlp_bias", False),
        ),
    ),
    "iquestcoder": Family(
        "IQuest-Coder",
        Traits(
            context_length=131072,
            n_kv_heads=8,
            head_dim=128,
            eps=("rms_norm_eps", 1e-5),
            mlp_bias=("mlp_bias", False),
            adapt=rules.iquest,
        ),
    ),
    "ministral": Family(
        "Ministral", Traits(**NO_BIAS, windowed="always", context_length=131072, n_kv_heads=8, kinds=rules.all_sliding)
    ),
    # Mistral AI 2025: queries grow with their position.
    "ministral3": Family(
        "Ministral 3",
        Traits(
            **NO_BIAS,
            windowed="always",
            window=None,
            lists_kinds=False,
            context_length=262144,
            n_kv_heads=8,
            head_dim=128,
            eps=("rms_norm_eps", 1e-5),
            rope=_YARN
            | {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
            | {"llama_4_scaling_beta": 0.1},
            adapt=rules.ministral3,
        ),
    ),
    # Meta 2025, Code World Model: windows in three of four layers.
    "cwm": Family(
        "CWM",
        Traits(
            **NO_BIAS,
            windowed="always",
            window=8192,
            kinds=rules.every(4, first=True),
            context_length=131072,
            n_kv_heads=8,
            head_dim=128,
            eps=("rms_norm_eps", 1e-5),
            theta=1e6,
            rope=_LLAMA3 | {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192},
            mlp_bias=("mlp_bias", False),
        ),
    ),
    # Hugging Face 2025: each fourth layer has no rotation.
    "smollm3": Family(
        "SmolLM3",
        Traits(
            windowed="switched",
            window=None,
            kinds=rules.smollm3_kinds,
            no_rope=rules.no_rope_layers,
            context_length=32768,
            n_kv_heads=4,
            theta=2e6,
            tied=True,
            mlp_bias=("mlp_bias", False),
        ),
    ),
    # IBM 2024: factors on embeddings, residuals, scores and logits.
    "granite": Family("Granite", Traits(mlp_bias=("mlp_bias", False), adapt=rules.granite)),
    # Arcee 2025: an MLP that is not gated.
    "arcee": Family(
        "Arcee",
        Traits(
            context_length=4096,
            eps=("rms_norm_eps", 1e-5),
            gated=False,
            activation=("hidden_act", "relu2"),
            mlp_bias=("mlp_bias", False),
        ),
    ),
    # Kyutai 2025.
    "helium": Family(
        "Helium",
        Traits(
            context_length=4096,
            n_kv_heads=20,
            head_dim=128,
            theta=100000.0,
            eps=("rms_norm_eps", 1e-8),
            interleaved=True,
            output_bias=False,
            mlp_bias=("mlp_bias", False),
        ),
    ),
    # Gemma team 2024: norm weights stored as w - 1, embeddings times sqrt(hidden_size).
    "gemma": Family(
        "Gemma",
        Traits(
            context_length=8192,
            n_kv_heads=16,
            head_dim=256,
            tied=True,
            norm_offset=1.0,
            activation=("hidden_act", "gelu_pytorch_tanh"),
            adapt=rules.gemma,
        ),
    ),
    # Gemma team 2024: norms before and after, soft caps, windows in every other layer.
    "gemma2": Family("Gemma 2", _GEMMA2),
    # Gemma team 2025: norms of q and k, five layers with a window and a theta of their own for each without.
    "gemma3_text": Family(
        "Gemma 3",
        replace(
            _GEMMA2,
            context_length=131072,
            kinds=rules.every(6, key="sliding_window_pattern"),
            rope_by_kind=True,
            theta=1e6,
            local_theta=("rope_local_base_freq", 10000.0),
            qk_norm="head",
            score_cap=0.0,
            logit_cap=0.0,
        ),
    ),
    # Gemma team 2025; see models/gemma3n.py.
    "gemma3n_text": Family(
        "Gemma 3n",
        Traits(
            context_length=32768,
            n_kv_heads=2,
            head_dim=256,
            tied=True,
            rope_by_kind=True,
            theta=1e6,
            local_theta=("rope_local_base_freq", 10000.0),
            windowed="always",
            window=512,
            kinds=rules.every(5),
            norms="sandwich",
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            score_scale=1.0,
            adapt=gemma3n.adapt,
            finish=gemma3n.finish,
        ),
    ),
    # Gemma team 2026; see models/gemma4.py.
    "gemma4_text": Family(
        "Gemma 4",
        Traits(
            context_length=131072,
            n_kv_heads=4,
            head_dim=256,
            tied=True,
            ignored=("partial_rotary_factor",),
            reads=("per_layer_config",),
            rope=gemma4.ROPES,
            rope_by_kind=True,
            rotated=1.0,
            windowed="always",
            window=512,
            norms="sandwich",
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            score_scale=1.0,
            experts=experts.gemma4,
            adapt=gemma4.adapt,
            finish=gemma4.finish,
        ),
    ),
    # Microsoft 2024: fused projections, longrope, partial rotation in Phi-4-mini.
    "phi3": Family(
        "Phi-3",
        Traits(
            **NO_BIAS,
            windowed="always",
            window=None,
            lists_kinds=False,
            context_length=4096,
            eps=("rms_norm_eps", 1e-5),
            rotated=1.0,
            finish=rules.phi3,
        ),
    ),
    # OLMo team 2025: norms behind both halves, and on whole rows of q and k.
    "olmo2": Family("OLMo 2", _OLMO2),
    "olmo3": Family(
        "OLMo 3",
        replace(
            _OLMO2,
            windowed="always",
            kinds=rules.every(4),
            rope_by_kind=True,
            theta=500000.0,
            local_theta=("rope_theta", 500000.0),
        ),
    ),
    # Zhipu AI 2024: half of each head is rotated, in neighboring pairs.
    "glm": Family("GLM", _GLM),
    "glm4": Family("GLM-4", replace(_GLM, norms="sandwich")),
    # LG AI 2025: norms behind both halves; layers without a window have no rotation.
    "exaone4": Family(
        "EXAONE 4",
        Traits(
            **NO_BIAS,
            eps=("rms_norm_eps", 1e-5),
            n_kv_heads=32,
            windowed="always",
            kinds=rules.every(4, key="sliding_window_pattern"),
            no_rope=rules.full_unrotated_beside_windows,
            norms="post",
            qk_norm="head",
        ),
    ),
    # Baidu 2025.
    "ernie4_5": Family(
        "ERNIE 4.5",
        Traits(
            context_length=131072,
            n_kv_heads=2,
            head_dim=128,
            theta=500000.0,
            tied=True,
            eps=("rms_norm_eps", 1e-5),
            interleaved=True,
            qkv_bias=("use_bias", False),
            output_bias=("use_bias", False),
            mlp_bias=("use_bias", False),
        ),
    ),
    # Tencent 2025: norms of q and k behind the rotation.
    "hunyuan_v1_dense": Family(
        "Hunyuan", Traits(eps=("rms_norm_eps", 1e-5), qk_norm="head", qk_norm_rotated=True, finish=rules.hunyuan)
    ),
    # Swiss AI 2025: xIELU with trained numbers.
    "apertus": Family(
        "Apertus",
        Traits(
            context_length=65536,
            theta=12e6,
            rope=_LLAMA3 | {"rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192},
            eps=("rms_norm_eps", 1e-5),
            qk_norm="head",
            gated=False,
            activation=("hidden_act", "xielu"),
        ),
    ),
    # InternLM team 2024: q, k and v of each KV head in one matrix.
    "internlm2": Family(
        "InternLM 2",
        Traits(
            context_length=32768, qkv="grouped", qkv_bias=("bias", True), output_bias=("bias", True), mlp_bias=False
        ),
    ),
    # Baichuan 2023: 7B with rotation, 13B with ALiBi.
    "baichuan": Family(
        "Baichuan", Traits(**NO_BIAS, context_length=4096, adapt=rules.baichuan, finish=rules.baichuan_head)
    ),
    # Hu et al. 2024.
    "minicpm": Family("MiniCPM", Traits(context_length=32768, tied=True, adapt=rules.minicpm)),
    # Meta 2025: chunks, layers without rotation, norms of q and k after rotation; experts in some layers or all.
    "llama4_text": Family(
        "Llama 4",
        Traits(
            context_length=131072,
            n_kv_heads=8,
            head_dim=128,
            theta=500000.0,
            eps=("rms_norm_eps", 1e-5),
            fields={"moe_intermediate_size": "intermediate_size", "intermediate_size": "intermediate_size_mlp"},
            names={"num_experts": "num_local_experts"},
            reads=("attention_chunk_size",),
            interleaved=True,
            kinds=rules.llama4_kinds,
            no_rope=rules.no_rope_layers,
            qk_norm_rotated=True,
            experts=experts.llama4,
            adapt=rules.llama4,
            finish=rules.llama4_layers,
        ),
    ),
    # Meta 2026: an output gate, norms of q and k without weights, a norm of embeddings.
    "muse_glimmer_text": Family(
        "Muse Glimmer",
        Traits(
            **NO_BIAS,
            context_length=131072,
            n_kv_heads=2,
            head_dim=128,
            eps=("rms_norm_eps", 1e-5),
            windowed="always",
            window=2048,
            kinds=rules.from_the_end(4),
            no_rope=rules.muse_glimmer_unrotated,
            norms="sandwich",
            norm_offset=1.0,
            offset_final_norm=False,
            qk_norm="none",
            activation=("hidden_activation", "silu"),
            adapt=rules.muse_glimmer,
            finish=rules.muse_glimmer_layers,
        ),
    ),
    # Text parts of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
    "qwen2_vl_text": Family("Qwen2-VL", _QWEN2_VL),
    "qwen2_5_vl_text": Family("Qwen2.5-VL", _QWEN2_VL),
    "qwen3_vl_text": Family(
        "Qwen3-VL",
        Traits(context_length=128000, n_kv_heads=32, head_dim=128, theta=500000.0, qk_norm="head", finish=rules.mrope),
    ),
}
