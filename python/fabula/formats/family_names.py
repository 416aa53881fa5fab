"""What families call the tensors that `transformers`' Llama has too: their names, and the canonical ones.

A name is a path; the rules replace whole parts of it, one rule after the other. The canonical names are Llama's. A
layer's norms are

    input_layernorm             before attention        post_self_attn_layernorm    after it
    post_attention_layernorm    before the MLP          post_mlp_layernorm          after it

and a fused matrix is `qkv_proj` or `gate_up_proj`, one that is not gated `up_proj`.

Source: modeling files of transformers 5.24; InternLM 2 and Baichuan: their published modeling files.
"""

from __future__ import annotations

from collections.abc import Mapping

Rules = Mapping[str, str]

_SANDWICH: Rules = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
_POST: Rules = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
_GPT: Rules = {  # GPT-2 and its heirs
    "h": "layers",
    "wte": "embed_tokens",
    "wpe": "embed_positions",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "ln_f": "norm",
}

_SHARED: Rules = {"mlp.shared_experts": "mlp.shared_expert"}
_GRANITE_MOE: Rules = {
    "block_sparse_moe.router.layer": "mlp.gate",
    "block_sparse_moe.input_linear": "mlp.experts.gate_up_proj",
    "block_sparse_moe.output_linear": "mlp.experts.down_proj",
    "shared_mlp.input_linear": "mlp.shared_expert.gate_up_proj",
    "shared_mlp.output_linear": "mlp.shared_expert.down_proj",
}
_MIXTRAL: Rules = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

_LFM2: Rules = {
    "embedding_norm": "norm",
    "operator_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "self_attn.out_proj": "self_attn.o_proj",
    "q_layernorm": "q_norm",
    "k_layernorm": "k_norm",
    "feed_forward.expert_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}

NAMES: Mapping[str, Rules] = {
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gemma3n_text": _SANDWICH,
    "gemma4_text": {
        **_SANDWICH,
        "post_feedforward_layernorm_1": "post_dense_layernorm",
        "pre_feedforward_layernorm_2": "pre_experts_layernorm",
        "post_feedforward_layernorm_2": "post_experts_layernorm",
        "router.proj": "mlp.gate",
        "router": "mlp.gate",
        "experts": "mlp.experts",
    },
    "muse_glimmer_text": _SANDWICH,
    "olmo2": _POST,
    "olmo3": _POST,
    "exaone4": _POST,
    "stablelm": {"q_layernorm": "q_norm", "k_layernorm": "k_norm"},
    "hunyuan_v1_dense": {"query_layernorm": "q_norm", "key_layernorm": "k_norm"},
    "apertus": {"attention_layernorm": "input_layernorm", "feedforward_layernorm": "post_attention_layernorm"},
    "starcoder2": {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
    "phi": {
        "self_attn.dense": "self_attn.o_proj",
        "q_layernorm": "q_norm",
        "k_layernorm": "k_norm",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "final_layernorm": "norm",
    },
    "gpt2": {
        **_GPT,
        "attn.c_attn": "self_attn.qkv_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    },
    "gptj": {
        **_GPT,
        "attn.out_proj": "self_attn.o_proj",
        "attn": "self_attn",
        "mlp.fc_in": "mlp.up_proj",
        "mlp.fc_out": "mlp.down_proj",
    },
    "gpt_neox": {
        "embed_in": "embed_tokens",
        "embed_out": "lm_head",
        "final_layer_norm": "norm",
        "attention.query_key_value": "self_attn.qkv_proj",
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    "falcon": {
        "h": "layers",
        "ln_f": "norm",
        "word_embeddings": "embed_tokens",
        "ln_attn": "input_layernorm",
        "ln_mlp": "post_attention_layernorm",
        "self_attention.query_key_value": "self_attn.qkv_proj",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    "bloom": {
        "h": "layers",
        "ln_f": "norm",
        "word_embeddings": "embed_tokens",
        "word_embeddings_layernorm": "embed_norm",
        "self_attention.query_key_value": "self_attn.qkv_proj",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    "mpt": {
        "blocks": "layers",
        "wte": "embed_tokens",
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "norm_f": "norm",
        "attn.Wqkv": "self_attn.qkv_proj",
        "attn.out_proj": "self_attn.o_proj",
        "ffn": "mlp",
    },
    "internlm2": {
        "tok_embeddings": "embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wqkv": "self_attn.qkv_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "output": "lm_head",
    },
    "mixtral": _MIXTRAL,
    "gpt_oss": {"mlp.router": "mlp.gate"},
    "minimax_m2": {**_MIXTRAL, "mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias"},
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "glm4_moe": _SHARED,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "sarvam_mla", "mistral4"), _SHARED),
    "dots1": _SHARED,
    "ernie4_5_moe": {
        **_SHARED,
        "mlp.moe_statics.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    },
    "hunyuan_v1_moe": {
        "query_layernorm": "q_norm",
        "key_layernorm": "k_norm",
        "mlp.gate.wg": "mlp.gate",
        "mlp.shared_mlp": "mlp.shared_expert",
    },
    "olmo_hybrid": {
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
        "linear_attn.a_proj": "linear_attn.in_proj_a",
        "linear_attn.b_proj": "linear_attn.in_proj_b",
        "linear_attn.g_proj": "linear_attn.in_proj_z",
        "linear_attn.o_proj": "linear_attn.out_proj",
        "linear_attn.o_norm": "linear_attn.norm",
    },
    "granitemoehybrid": _GRANITE_MOE,
    "bamba": {
        "pre_ff_layernorm": "post_attention_layernorm",
        "feed_forward": "mlp",
        "final_layernorm": "norm",
    },
    "falcon_h1": {
        "pre_ff_layernorm": "post_attention_layernorm",
        "feed_forward": "mlp",
        "final_layernorm": "norm",
    },
    "nemotron_h": {
        "embeddings": "embed_tokens",
        "mixer.norm": "mamba.gate_norm",
        "norm": "input_layernorm",
        "mamba.gate_norm": "mamba.norm",
        "norm_f": "norm",
        **{f"mixer.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"},
        **{f"mixer.{part}_proj": f"mlp.{part}_proj" for part in ("up", "down")},
        "mixer": "mamba",
    },
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "baichuan": {"self_attn.W_pack": "self_attn.qkv_proj"},
    "llama4_text": {"feed_forward.router": "mlp.gate", "feed_forward": "mlp"},
    "phimoe": {**_MIXTRAL, "mlp.router": "mlp.gate"},
}


def renamed(name: str, model_type: str) -> str:
    """A tensor's name by the rules of a family; the same where it has none."""
    path = f".{name}."
    for old, new in NAMES.get(model_type, {}).items():
        path = path.replace(f".{old}.", f".{new}.")
    return path[1:-1]
