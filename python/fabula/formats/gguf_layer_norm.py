"""Architectures of GGUF files with layer norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fabula.formats.gguf_architecture import (
    ATTENTION,
    FUSED,
    HEAD_NORMS,
    MLP,
    PLAIN_MLP,
    QKV,
    USUAL,
    Architecture,
    Config,
    Facts,
    Windows,
)


def _mpt(f: Facts, config: Config) -> None:
    most = f.number("attention.max_alibi_bias", 0.0, zero=0.0)
    if not most:
        raise f.keys.unsupported(f.key("attention.max_alibi_bias"), "is 0: models without ALiBi are not offered")
    config["attn_config"] = {
        "alibi_bias_max": most, "clip_qkv": f.number("attention.clamp_kqv", 0.0, zero=0.0) or None,
    }  # fmt: skip


def _olmo(f: Facts, config: Config) -> None:
    key = f.key("attention.layer_norm_epsilon")
    if not math.isclose(f.keys.positive(key), 1e-5, rel_tol=1e-6):
        raise f.keys.unsupported(key, "is not 1e-05, which this family always has")
    config["clip_qkv"] = f.number("attention.clamp_kqv", 0.0, zero=0.0) or None


def _command_r(f: Facts, config: Config) -> None:
    config["logit_scale"] = f.number("logit_scale", 1.0, zero=1.0)
    config["use_qk_norm"] = f.has("attn_q_norm")


def _cohere2(f: Facts, config: Config) -> None:
    config["logit_scale"] = f.number("logit_scale", None, zero=1.0)


def _stablelm(f: Facts, config: Config) -> None:
    """As in llama.cpp the tensors decide, not the key `use_parallel_residual`."""
    config["use_parallel_residual"] = not f.has("ffn_norm")
    config["qk_layernorm"] = f.has("attn_q_norm")


def _neox(f: Facts, config: Config) -> None:
    config["use_parallel_residual"] = f.keys.flag(f.key("use_parallel_residual"), True)


def _falcon(f: Facts, config: Config) -> None:
    """Three generations: one KV head; a few and one norm; a few and two norms."""
    two_norms = f.has("attn_norm_2")
    config |= {
        "new_decoder_architecture": f.n_kv_heads > 1 or two_norms,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
    }


_LAYER_NORM: Mapping[str, Any] = {"norm_bias": True, "silu": False}
_PLAIN = ("attn_norm", "attn_qkv", *ATTENTION, "ffn_norm", *PLAIN_MLP)

LAYER_NORM: Mapping[str, Architecture] = {
    "phi2": Architecture(
        model_type="phi", model_class="PhiForCausalLM", **_LAYER_NORM, eps="layer_norm_eps", head_bias=True,
        layer=("attn_norm", *FUSED, *PLAIN_MLP), rotated=True, biases={"": (*FUSED, *PLAIN_MLP)},
    ),
    "olmo": Architecture(
        model_type="olmo", model_class="OlmoForCausalLM", paired=True, layer=(*ATTENTION, *MLP), eps="-",
        reads=frozenset(["attention.clamp_kqv"]), finish=_olmo,
    ),
    "command-r": Architecture(
        model_type="cohere", model_class="CohereForCausalLM", eps="layer_norm_eps",
        layer=("attn_norm", *ATTENTION, *MLP, *HEAD_NORMS), biases={"attention_bias": ATTENTION},
        reads=frozenset(["logit_scale"]), finish=_command_r,
    ),
    "cohere2": Architecture(
        model_type="cohere2", model_class="Cohere2ForCausalLM", eps="layer_norm_eps",
        layer=("attn_norm", *ATTENTION, *MLP), biases={"attention_bias": ATTENTION},
        windows=Windows(default=None, every=4), reads=frozenset(["logit_scale"]), finish=_cohere2,
    ),
    "stablelm": Architecture(
        model_type="stablelm", model_class="StableLmForCausalLM", norm_bias=True, eps="layer_norm_eps", rotated=True,
        layer=(*USUAL, *HEAD_NORMS), biases={"use_qkv_bias": QKV}, reads=frozenset(["use_parallel_residual"]),
        finish=_stablelm,
    ),
    "nemotron": Architecture(
        model_type="nemotron", model_class="NemotronForCausalLM", **_LAYER_NORM, eps="norm_eps", rotated=True,
        layer=("attn_norm", *ATTENTION, "ffn_norm", *PLAIN_MLP),
        biases={"attention_bias": ATTENTION, "mlp_bias": PLAIN_MLP},
    ),
    "starcoder2": Architecture(
        model_type="starcoder2", model_class="Starcoder2ForCausalLM", **_LAYER_NORM, eps="norm_epsilon",
        layer=("attn_norm", *ATTENTION, "ffn_norm", *PLAIN_MLP), biases={"use_bias": (*ATTENTION, *PLAIN_MLP)},
    ),
    # transformers has the exact GELU; llama.cpp takes the approximation with tanh, here and in gptneox.
    "falcon": Architecture(
        model_type="falcon", model_class="FalconForCausalLM", **_LAYER_NORM, eps="layer_norm_epsilon",
        layer=("attn_norm", "attn_norm_2", "attn_qkv", "attn_output", *PLAIN_MLP),
        biases={"bias": ("attn_qkv", "attn_output", *PLAIN_MLP)},
        fields={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"}, finish=_falcon,
    ),
    "bloom": Architecture(
        model_type="bloom", model_class="BloomForCausalLM", **_LAYER_NORM, eps="layer_norm_epsilon", layer=_PLAIN,
        biases={"": (*FUSED, *PLAIN_MLP)}, embedding_norm=True,
    ),
    "mpt": Architecture(
        model_type="mpt", model_class="MptForCausalLM", eps="layer_norm_epsilon", silu=False, layer=_PLAIN,
        reads=frozenset(["attention.clamp_kqv", "attention.max_alibi_bias"]), finish=_mpt,
    ),
    "gpt2": Architecture(
        model_type="gpt2", model_class="GPT2LMHeadModel", **_LAYER_NORM, eps="layer_norm_epsilon", layer=_PLAIN,
        biases={"": (*FUSED, *PLAIN_MLP)}, positions=True, fields={"intermediate_size": "n_inner"},
    ),
    "gptneox": Architecture(
        model_type="gpt_neox", model_class="GPTNeoXForCausalLM", **_LAYER_NORM, eps="layer_norm_eps", rotated=True,
        layer=_PLAIN, biases={"attention_bias": FUSED, "": PLAIN_MLP},
        fields={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        reads=frozenset(["use_parallel_residual"]), finish=_neox,
    ),
}  # fmt: skip
