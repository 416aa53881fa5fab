"""Families with layer norms: GPT-2 and its heirs, Command R, and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fabula.lean_dataclasses import replace
from fabula.models import family_rules as rules
from fabula.models.config import Traits
from fabula.models.family import NO_BIAS, Family

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

LAYER_NORM: Mapping[str, Family] = {
    # Groeneveld et al. 2024: layer norms without weights.
    "olmo": Family("OLMo", Traits(norm="layer", norm_weighted=False, eps=("", 1e-5), adapt=rules.olmo)),
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
        "GPT-J", Traits(**_GPT, **NO_BIAS, interleaved=True, parallel="one", head_bias=True, adapt=rules.gptj)
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
            **NO_BIAS,
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
}
