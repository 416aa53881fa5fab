"""The model families, by `model_type` of config.json: one row each.

All of them are the decoder of models/decoder.py. A row says how its config and layers differ from Llama's; see
`Traits`. Where only the config decides, a short function of models/family_rules.py does. Names of tensors that differ
from Llama's are in formats/family_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported
from fabula.lean_dataclasses import dataclass, replace
from fabula.models import expert_rules as experts
from fabula.models import family_rules as rules
from fabula.models import gemma3n, gemma4, mla
from fabula.models.config import Traits, read_config
from fabula.models.description import ModelConfig

_NO_BIAS: Mapping[str, Any] = {"qkv_bias": False, "output_bias": False}


@dataclass(frozen=True, slots=True)
class Family:
    """A family: how its config is read.

    Attributes:
        name: as people write it.
        traits: what differs from Llama.
    """

    name: str
    traits: Traits

    def read(self, config: Mapping[str, Any], path: Path) -> ModelConfig:
        """Checks a config.json; `path` is named in errors.

        Raises:
            ModelFileError, Unsupported: see `read_config`.
        """
        return read_config(config, path, self.traits)


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
_GPT: Mapping[str, Any] = {
    "names": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "fields": {"intermediate_size": "n_inner"},
    "ignored": ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "rope_theta"),
    "inner": 4,
    "norm": "layer",
    "norm_biased": True,
    "eps": ("layer_norm_epsilon", 1e-5),
    "mlp_bias": True,
    "gated": False,
    "activation": ("activation_function", "gelu_new"),
}
# BLOOM and MPT: heads and MLPs of one width, ALiBi in place of rotation.
_UNROTATED: Mapping[str, Any] = {
    "ignored": (*_GPT["ignored"], "intermediate_size"),
    "inner": 4,
    "tied": True,
    "norm": "layer",
    "eps": ("layer_norm_epsilon", 1e-5),
    "gated": False,
    "alibi": 8.0,
}
_COHERE = Traits(
    context_length=8192,
    theta=500000.0,
    tied=True,
    norm="layer",
    eps=("layer_norm_eps", 1e-5),
    interleaved=True,
    parallel="one",
    qk_norm="heads",
    qk_norm_kind="layer",
    adapt=rules.cohere,
)

FAMILIES: Mapping[str, Family] = {
    # Touvron et al. 2023; Llama 2 and 3; SmolLM, TinyLlama, Yi and others of the same form.
    "llama": Family("Llama", Traits(mlp_bias=("mlp_bias", False))),
    # Jiang et al. 2023: a sliding window in every layer, or in those that `layer_types` names.
    "mistral": Family("Mistral", Traits(**_NO_BIAS, windowed="always", context_length=131072, n_kv_heads=8)),
    # Qwen team 2024, Qwen2 and Qwen2.5: biases on q, k and v, optional windows in the upper layers.
    "qwen2": Family(
        "Qwen2",
        Traits(qkv_bias=True, output_bias=False, windowed="switched", context_length=32768, n_kv_heads=32),
    ),
    # Qwen team 2025: norms on q and k heads.
    "qwen3": Family(
        "Qwen3", Traits(windowed="switched", context_length=32768, n_kv_heads=32, head_dim=128, qk_norm="head")
    ),
    # Jiang et al. 2024.
    "mixtral": Family(
        "Mixtral",
        Traits(
            **_NO_BIAS,
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
            **_NO_BIAS,
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
        "Ministral", Traits(**_NO_BIAS, windowed="always", context_length=131072, n_kv_heads=8, kinds=rules.all_sliding)
    ),
    # Mistral AI 2025: queries grow with their position.
    "ministral3": Family(
        "Ministral 3",
        Traits(
            **_NO_BIAS,
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
            **_NO_BIAS,
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
            adapt=gemma4.adapt,
            finish=gemma4.finish,
        ),
    ),
    # Microsoft 2024: fused projections, longrope, partial rotation in Phi-4-mini.
    "phi3": Family(
        "Phi-3",
        Traits(
            **_NO_BIAS,
            windowed="always",
            window=None,
            lists_kinds=False,
            context_length=4096,
            eps=("rms_norm_eps", 1e-5),
            rotated=1.0,
            finish=rules.phi3,
        ),
    ),
    # Groeneveld et al. 2024: layer norms without weights.
    "olmo": Family("OLMo", Traits(norm="layer", norm_weighted=False, eps=("", 1e-5), adapt=rules.olmo)),
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
            **_NO_BIAS,
            eps=("rms_norm_eps", 1e-5),
            n_kv_heads=32,
            windowed="always",
            kinds=rules.every(4, key="sliding_window_pattern"),
            no_rope=rules.full_unrotated_beside_windows,
            norms="post",
            qk_norm="head",
        ),
    ),
    # Cohere 2024: both halves beside each other behind one layer norm.
    "cohere": Family("Command R", _COHERE),
    "cohere2": Family(
        "Command R7B",
        replace(
            _COHERE,
            theta=10000.0,
            reads_head_dim=False,
            qk_norm="",
            windowed="always",
            kinds=rules.every(4, key="sliding_window_pattern"),
            no_rope=rules.full_unrotated,
        ),
    ),
    # Stability AI 2024: a quarter of each head is rotated.
    "stablelm": Family(
        "StableLM",
        Traits(
            context_length=4096,
            n_kv_heads=32,
            reads_head_dim=False,
            norm="layer",
            norm_biased=True,
            eps=("layer_norm_eps", 1e-5),
            rotated=0.25,
            qk_norm_kind="layer",
            qkv_bias=("use_qkv_bias", False),
            output_bias=False,
            adapt=rules.stablelm,
        ),
    ),
    # NVIDIA 2024: layer norms with weights stored as w - 1, an MLP of relu squared.
    "nemotron": Family(
        "Nemotron",
        Traits(
            context_length=4096,
            norm="layer",
            norm_biased=True,
            norm_offset=1.0,
            eps=("norm_eps", 1e-5),
            rotated=0.5,
            gated=False,
            activation=("hidden_act", "relu2"),
            mlp_bias=("mlp_bias", False),
        ),
    ),
    # Lozhkov et al. 2024.
    "starcoder2": Family(
        "StarCoder2",
        Traits(
            context_length=4096,
            n_kv_heads=2,
            tied=True,
            windowed="always",
            window=None,
            lists_kinds=False,
            norm="layer",
            norm_biased=True,
            eps=("norm_epsilon", 1e-5),
            gated=False,
            activation=("hidden_act", "gelu_pytorch_tanh"),
            qkv_bias=("use_bias", True),
            output_bias=("use_bias", True),
            mlp_bias=("use_bias", True),
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
    # Radford et al. 2019: learned positions; matrices are stored as [in, out].
    "gpt2": Family(
        "GPT-2",
        Traits(
            **_GPT,
            tied=True,
            learned_positions=True,
            transposed=True,
            finish=rules.gpt2,
            adapt=rules.refuse("add_cross_attention"),
            context_length=1024,
            qkv_bias=True,
            output_bias=True,
        ),
    ),
    # Wang & Komatsuzaki 2021: both halves beside each other.
    "gptj": Family(
        "GPT-J", Traits(**_GPT, **_NO_BIAS, interleaved=True, parallel="one", head_bias=True, adapt=rules.gptj)
    ),
    # Black et al. 2022; Pythia.
    "gpt_neox": Family(
        "GPT-NeoX",
        Traits(
            fields={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
            ignored=("num_key_value_heads",),
            reads_head_dim=False,
            rotated=0.25,
            norm="layer",
            norm_biased=True,
            eps=("layer_norm_eps", 1e-5),
            qkv_bias=("attention_bias", True),
            output_bias=("attention_bias", True),
            mlp_bias=True,
            gated=False,
            activation=("hidden_act", "gelu"),
            qkv="grouped",
            adapt=rules.neox,
        ),
    ),
    # Microsoft 2023: Phi-1, 1.5 and 2.
    "phi": Family(
        "Phi",
        Traits(
            rotated=0.5,
            norm="layer",
            norm_biased=True,
            eps=("layer_norm_eps", 1e-5),
            parallel="one",
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            gated=False,
            activation=("hidden_act", "gelu_new"),
            head_bias=True,
            adapt=rules.phi,
        ),
    ),
    # Almazrouei et al. 2023; Falcon-RW with ALiBi. Falcon 3 is Llama.
    "falcon": Family(
        "Falcon",
        Traits(
            fields={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
            names={"hidden_size": "n_embed"},
            inner=4,
            reads_head_dim=False,
            tied=True,
            norm="layer",
            norm_biased=True,
            eps=("layer_norm_epsilon", 1e-5),
            qkv_bias=("bias", False),
            output_bias=("bias", False),
            mlp_bias=("bias", False),
            gated=False,
            activation=("activation", "gelu"),
            adapt=rules.falcon,
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
        "Baichuan", Traits(**_NO_BIAS, context_length=4096, adapt=rules.baichuan, finish=rules.baichuan_head)
    ),
    # BigScience 2022: ALiBi, a norm of embeddings.
    "bloom": Family(
        "BLOOM",
        Traits(
            **_UNROTATED,
            names={
                "hidden_size": "n_embed",
                "max_position_embeddings": "seq_length",
                "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer",
            },
            norm_biased=True,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            activation=("", "gelu_new"),
            qkv="grouped",
            adapt=rules.refuse("apply_residual_connection_post_layernorm"),
            finish=rules.bloom,
        ),
    ),
    # MosaicML 2023: ALiBi, no biases.
    "mpt": Family(
        "MPT",
        Traits(
            **_UNROTATED,
            **_NO_BIAS,
            names={
                "hidden_size": "d_model",
                "max_position_embeddings": "max_seq_len",
                "num_attention_heads": "n_heads",
                "num_hidden_layers": "n_layers",
            },
            activation=("", "gelu"),
            adapt=rules.mpt,
        ),
    ),
    # Hu et al. 2024.
    "minicpm": Family("MiniCPM", Traits(context_length=32768, tied=True, adapt=rules.minicpm)),
    # Meta 2025: chunks, layers without rotation, norms of q and k behind it.
    "llama4_text": Family(
        "Llama 4",
        Traits(
            context_length=131072,
            n_kv_heads=8,
            head_dim=128,
            theta=500000.0,
            eps=("rms_norm_eps", 1e-5),
            fields={"intermediate_size": "intermediate_size_mlp"},
            reads=("attention_chunk_size",),
            interleaved=True,
            kinds=rules.llama4_kinds,
            no_rope=rules.no_rope_layers,
            qk_norm_rotated=True,
            adapt=rules.llama4,
            finish=rules.llama4_layers,
        ),
    ),
    # Meta 2026: an output gate, norms of q and k without weights, a norm of embeddings.
    "muse_glimmer_text": Family(
        "Muse Glimmer",
        Traits(
            **_NO_BIAS,
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
    **{kind: Family(name, traits) for kind, (name, traits) in mla.ROWS.items()},
}


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.

    Raises:
        ModelFileError: `model_type` is missing or not a string.
        Unsupported: no such family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelFileError(f"{path}: config 'model_type' is missing", path=path, field="model_type")
    if kind not in FAMILIES:
        raise Unsupported(f"{path}: model family {kind[:60]!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]
