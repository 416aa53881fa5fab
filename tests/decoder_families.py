"""Tiny random checkpoints of every family, made through transformers, with shapes that fit no register.

Three query heads on one KV head or a few, heads of 24, 40 or 80, a vocabulary that is no multiple of 16, windows
shorter than a prompt, and patterns of layers that the number of layers cuts short.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny
from hybrid_families import hybrid_settings, use_recurrent_form

FULL, SLIDING = "full_attention", "sliding_attention"
ODD: Mapping[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "vocab_size": 203,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Families where a head is hidden_size / num_attention_heads.
PLAIN = {key: value for key, value in ODD.items() if key != "head_dim"} | {"hidden_size": 144}
GPT: Mapping[str, Any] = {"n_embd": 120, "n_layer": 2, "n_head": 3, "n_positions": 700, "vocab_size": 203}
GPT = GPT | {key: ODD[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
NEOX = {key: value for key, value in PLAIN.items() if key != "num_key_value_heads"} | {"num_attention_heads": 3}
FALCON = {key: value for key, value in NEOX.items() if key != "intermediate_size"} | {"num_attention_heads": 6}
GEMMA4 = ODD | {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "sliding_window": 19,
    "head_dim": 24,
    "global_head_dim": 40,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": 203,
}
GEMMA3N = ODD | {
    "num_hidden_layers": 7,
    "sliding_window": 19,
    "num_kv_shared_layers": 2,
    "laurel_rank": 12,
    "hidden_size_per_layer_input": 24,
    "vocab_size_per_layer_input": 190,  # the tokens behind it have no embedding of their own
    "activation_sparsity_pattern": [0.8, 0.5, 0.3, 0.95, 0.0, 0.0, 0.6],
}
BLOOM = {key: ODD[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
MPT = BLOOM | {"d_model": 72, "n_heads": 3, "n_layers": 3, "max_seq_len": 700}
BLOOM |= {"hidden_size": 120, "n_head": 6, "n_layer": 3}
LLAMA4 = ODD | {
    "num_hidden_layers": 5,
    "moe_layers": [],
    "intermediate_size_mlp": 100,
    "attention_chunk_size": 23,
    "floor_scale": 16,
    "attn_scale": 0.4,
    "no_rope_layer_interval": 3,
}
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
GPT_OSS = {"num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 19}
LOCAL = {"num_local_experts": 7, "num_experts_per_tok": 3}
ROUTED = {
    **{"n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "n_shared_experts": 2},
    **{"routed_scaling_factor": 1.7, "first_k_dense_replace": 1, "norm_topk_prob": True},
}
GROUPS = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}
LLAMA4_SPARSE = {"moe_layers": None, "intermediate_size": 40, "num_local_experts": 7, "num_experts_per_tok": 3}
GEMMA4_SPARSE = {"enable_moe_block": True, "num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 40}
PHIMOE = {"num_local_experts": 7, "attention_bias": True, "lm_head_bias": True}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.09,
    "logits_scaling": 2.5,
}
MLA = {key: value for key, value in ODD.items() if key != "head_dim"} | {
    **{"num_key_value_heads": 6, "kv_lora_rank": 40, "q_lora_rank": 33, "qk_rope_head_dim": 12},
    **{"qk_nope_head_dim": 20, "v_head_dim": 27},
}
NO_Q_LATENT = {"q_lora_rank": None, "attention_bias": True}
DEEP_YARN = {
    **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    **{"mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 32.0, "beta_slow": 1.0},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@dataclass(frozen=True)
class Case:
    """A family with one setting.

    Attributes:
        family: name of the classes in transformers, before Config and ForCausalLM.
        settings: of the config.
        config: name of the config class, where it is another.
        attention: which code of transformers computes attention.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=lambda: ODD)
    config: str = ""
    attention: str = "eager"

    @property
    def config_class(self) -> Any:
        return getattr(transformers, self.config or f"{self.family}Config")

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.family + ("LMHeadModel" if self.family == "GPT2" else "ForCausalLM"))

    @property
    def model_type(self) -> str:
        return str(self.config_class.model_type)


def _longrope(n: int) -> dict[str, Any]:
    short = [1.0 + 0.1 * i for i in range(n)]
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": [2 * x for x in short],
        "rope_theta": 10000.0,
    }


CASES: dict[str, Case] = {
    "internlm3": Case("Llama", ODD | {"qkv_bias": True, "bias": True}, "InternLM3Config"),
    "seed_oss": Case("SeedOss"),
    "seed_oss-out-bias": Case("SeedOss", ODD | {"attention_out_bias": True, "mlp_bias": True}),
    "iquestcoder": Case("Llama", PLAIN | {"head_dim": 24}, "IQuestCoderConfig"),
    "ministral": Case("Ministral", ODD | {"sliding_window": 19, "layer_types": [SLIDING, FULL, SLIDING]}),
    "ministral3": Case("Ministral3", ODD | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}),
    "cwm": Case("Cwm", ODD | {"sliding_window": 19}),
    "smollm3": Case("SmolLM3", ODD | {"num_hidden_layers": 5}),
    "smollm3-windows": Case(
        "SmolLM3", ODD | {"use_sliding_window": True, "sliding_window": 21, "no_rope_layer_interval": 2}
    ),
    "granite": Case(
        "Granite",
        ODD
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.09,
            "logits_scaling": 2.5,
        },
    ),
    "arcee": Case("Arcee", ODD | {"mlp_bias": True, "attention_bias": True}),
    "helium": Case("Helium", PLAIN | {"head_dim": 24, "attention_bias": True}),
    "gemma": Case("Gemma"),
    "gemma2": Case("Gemma2", ODD | {"sliding_window": 19, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}),
    "gemma3": Case(
        "Gemma3", ODD | {"sliding_window": 19, "query_pre_attn_scalar": 20, "num_hidden_layers": 7}, "Gemma3TextConfig"
    ),
    "phi3": Case("Phi3", PLAIN | {"sliding_window": 23}),
    "phi4-mini": Case("Phi3", PLAIN | {"tie_word_embeddings": True, "partial_rotary_factor": 0.75}),
    "phi3-longrope": Case("Phi3", PLAIN | {"rope_parameters": _longrope(12), "original_max_position_embeddings": 16}),
    "olmo": Case("Olmo", PLAIN | {"clip_qkv": 0.9}),
    "olmo2": Case("Olmo2", PLAIN | {"attention_bias": True}),
    "olmo3": Case("Olmo3", PLAIN | {"sliding_window": 19, "num_hidden_layers": 5}),
    "glm": Case("Glm"),
    "glm4": Case("Glm4"),
    "exaone4": Case("Exaone4", PLAIN | {"sliding_window": 19, "num_hidden_layers": 5}),
    "exaone4-full": Case("Exaone4", PLAIN | {"sliding_window": None, "layer_types": [FULL] * 3}),
    "mixtral": Case("Mixtral", ODD | {"num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 19}),
    "qwen2_moe": Case(
        "Qwen2Moe", PLAIN | MOE | {"shared_expert_intermediate_size": 60, "mlp_only_layers": [1], "head_dim": 24}
    ),
    "qwen2_moe-windows": Case(
        "Qwen2Moe",
        PLAIN
        | MOE
        | {"shared_expert_intermediate_size": 60, "decoder_sparse_step": 2, "norm_topk_prob": True, "head_dim": 24}
        | {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 2, "num_hidden_layers": 4},
    ),
    "qwen3_moe": Case("Qwen3Moe", ODD | MOE),
    "qwen3_moe-steps": Case("Qwen3Moe", ODD | MOE | {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "gpt_oss": Case("GptOss", ODD | GPT_OSS),
    "gpt_oss-plain": Case(
        "GptOss",
        ODD
        | GPT_OSS
        | {"attention_bias": False, "layer_types": [FULL, FULL, SLIDING], "swiglu_limit": 0.7}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    ),
    "olmoe": Case("Olmoe", PLAIN | MOE | {"norm_topk_prob": True}),
    "granitemoe": Case("GraniteMoe", PLAIN | LOCAL | GRANITE),
    "granitemoeshared": Case("GraniteMoeShared", PLAIN | LOCAL | GRANITE | {"shared_intermediate_size": 60}),
    "glm4_moe": Case("Glm4Moe", ODD | ROUTED | {"use_qk_norm": True, "attention_bias": True}),
    "glm4_moe-groups": Case("Glm4Moe", ODD | ROUTED | GROUPS | {"norm_topk_prob": False}),
    "dots1": Case("Dots1", ODD | ROUTED | {"sliding_window": 19, "max_window_layers": 1, "n_group": 1}),
    "ernie4_5_moe": Case(
        "Ernie4_5_Moe",
        PLAIN | {"moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 40, "moe_num_shared_experts": 2},
    ),
    "ernie4_5_moe-alone": Case(
        "Ernie4_5_Moe",
        PLAIN
        | {"moe_num_experts": 7, "moe_k": 3, "moe_intermediate_size": 40, "moe_num_shared_experts": 0}
        | {"moe_layer_interval": 2, "moe_layer_start_index": 0, "num_hidden_layers": 4},
    ),
    "minimax_m2": Case("MiniMaxM2", ODD | LOCAL | {"rotary_dim": 20}),
    "hunyuan_moe": Case("HunYuanMoEV1", ODD | {"num_experts": 7, "moe_topk": 3, "attention_bias": True}),
    "deepseek_v2": Case("DeepseekV2", MLA | ROUTED | {"rope_parameters": DEEP_YARN}),
    "deepseek_v2-groups": Case(
        "DeepseekV2", MLA | ROUTED | GROUPS | NO_Q_LATENT | {"topk_method": "group_limited_greedy"}
    ),
    "deepseek_v3": Case("DeepseekV3", MLA | ROUTED | GROUPS | {"rope_parameters": DEEP_YARN | {"mscale": 1.0}}),
    "deepseek_v3-halves": Case(
        "DeepseekV3",
        MLA | ROUTED | NO_Q_LATENT | {"n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "glm4_moe_lite": Case("Glm4MoeLite", MLA | ROUTED | {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "sarvam_mla": Case("DeepseekV3", MLA | ROUTED | {"q_lora_rank": None}, "SarvamMLAConfig"),
    "mistral4": Case(
        "Mistral4",
        MLA | ROUTED | GROUPS | {"rope_parameters": DEEP_YARN | {"llama_4_scaling_beta": 0.3}},
    ),
    # transformers 5.24 makes the embedding of a padding token 0 when it loads this family.
    "youtu": Case("Youtu", MLA | {"pad_token_id": None}),
    "minicpm3": Case("MiniCPM3", MLA | {"scale_emb": 3, "dim_model_base": 18, "v_head_dim": None}),
    "phimoe": Case("Phimoe", PLAIN | PHIMOE | {"sliding_window": 19, "router_jitter_noise": 0.3}),
    "phimoe-longrope": Case(
        "Phimoe",
        PLAIN
        | {"num_local_experts": 7, "original_max_position_embeddings": 16}
        | {
            "rope_parameters": _longrope(12)
            | {"long_factor": _longrope(12)["short_factor"], "short_mscale": 1.1, "long_mscale": 1.3}
            | {"original_max_position_embeddings": 16}
        },
    ),
    "mellum": Case("Mellum", ODD | MOE | {"sliding_window": 19, "layer_types": [SLIDING, FULL, SLIDING]}),
    "mellum-dense-too": Case(
        "Mellum",
        ODD
        | MOE
        | {"mlp_layer_types": ["dense", "sparse", "sparse"], "norm_topk_prob": False, "attention_bias": True}
        | {"rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 500.0}}},
    ),
    "cohere": Case("Cohere", PLAIN | {"use_qk_norm": True, "attention_bias": True}),
    "cohere2": Case("Cohere2", PLAIN | {"sliding_window": 19, "num_hidden_layers": 5}),
    "stablelm": Case("StableLm", PLAIN | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": Case("StableLm", PLAIN | {"use_parallel_residual": True, "qk_layernorm": True}),
    "nemotron": Case("Nemotron", ODD | {"attention_bias": True, "mlp_bias": True}),
    "starcoder2": Case("Starcoder2", PLAIN | {"sliding_window": 19}),
    "ernie4_5": Case("Ernie4_5", ODD | {"use_bias": True}),
    "hunyuan": Case("HunYuanDenseV1", ODD | {"attention_bias": True}),
    "hunyuan-alpha": Case(
        "HunYuanDenseV1",
        ODD | {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 10000.0}},
    ),
    "apertus": Case("Apertus"),
    "gemma3n": Case("Gemma3n", GEMMA3N, "Gemma3nTextConfig"),
    "gemma3n-three-streams": Case(
        "Gemma3n",
        GEMMA3N
        | {"altup_num_inputs": 3, "altup_active_idx": 1, "altup_correct_scale": False, "num_kv_shared_layers": 0}
        | {"intermediate_size": [100, 60, 100, 24, 100, 100, 33], "attention_bias": True}
        | {"final_logit_softcapping": 5.0, "activation_sparsity_pattern": [0.0, 0.5, 0.0, 0.2, 0.0, 0.0, 0.7]},
        "Gemma3nTextConfig",
    ),
    "gemma4": Case("Gemma4", GEMMA4, "Gemma4TextConfig"),
    "gemma4-k-is-v": Case(
        "Gemma4",
        GEMMA4
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"use_double_wide_mlp": True, "final_logit_softcapping": 3.0},
        "Gemma4TextConfig",
    ),
    "gemma4-plain": Case(
        "Gemma4", GEMMA4 | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, "Gemma4TextConfig"
    ),
    "gemma4-experts": Case("Gemma4", GEMMA4 | GEMMA4_SPARSE, "Gemma4TextConfig"),
    "gemma4-experts-k-is-v": Case(
        "Gemma4",
        GEMMA4
        | GEMMA4_SPARSE
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 1, "final_logit_softcapping": 3.0},
        "Gemma4TextConfig",
    ),
    "llama4-steps": Case("Llama4", LLAMA4 | LLAMA4_SPARSE | {"interleave_moe_layer_step": 2}, "Llama4TextConfig"),
    "llama4-one": Case(
        "Llama4", LLAMA4 | LLAMA4_SPARSE | {"num_experts_per_tok": 1, "moe_layers": [0, 3, 4]}, "Llama4TextConfig"
    ),
    "llama4": Case("Llama4", LLAMA4, "Llama4TextConfig"),
    "llama4-plain": Case("Llama4", LLAMA4 | {"use_qk_norm": False, "attention_chunk_size": None}, "Llama4TextConfig"),
    "falcon": Case("Falcon", FALCON),
    "falcon-rows": Case("Falcon", FALCON | {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-groups": Case("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-groups-one-norm": Case(
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    # Without the fused kernel of torch, transformers 5.24 adds Falcon's biases twice.
    "falcon-rw": Case(
        "Falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        attention="sdpa",
    ),
    "bloom": Case("Bloom", BLOOM),
    "mpt": Case("Mpt", MPT),
    "mpt-scaled": Case("Mpt", MPT | {"n_heads": 4, "attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.3}}),
    "gpt2": Case("GPT2", GPT),
    "gpt2-scales": Case("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 100}),
    "gptj": Case("GPTJ", GPT | {"rotary_dim": 20}),
    "gpt_neox": Case("GPTNeoX", NEOX),
    "gpt_neox-sequential": Case("GPTNeoX", NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "phi": Case("Phi", PLAIN | {"partial_rotary_factor": 0.6, "hidden_size": 240}),
    "phi-norms": Case("Phi", PLAIN | {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
}
CASES |= {name: Case(*about) for name, about in hybrid_settings(ODD, PLAIN).items()}


def make_model(case: Case, folder: Path, seed: int = 0) -> Any:
    """Writes a random checkpoint and returns the transformers model, in evaluation mode."""
    torch.manual_seed(seed)
    config = case.config_class(**copy.deepcopy(dict(case.settings)))  # some add to what they are given
    config._attn_implementation = case.attention
    model = case.model_class(config).eval()
    use_recurrent_form(model)
    with torch.no_grad():  # the default start is so small that every logit is almost the same; biases start at 0
        corrections = [pair for pair in model.named_buffers() if pair[0].endswith(("correction_bias", "expert_bias"))]
        for name, parameter in [*model.named_parameters(), *corrections]:
            spread = 0.3 if "norm" in name or "bias" in name or parameter.dim() < 2 else 0.15
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    return model


def make_talking_model(case: Case, folder: Path) -> Path:
    """A checkpoint with the tokenizer and the chat template of `tiny.py`: a model that sessions can use."""
    tiny.write_model(folder)
    with_tokens = {"vocab_size": tiny.VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if "vocab_size_per_layer_input" in case.settings:
        with_tokens["vocab_size_per_layer_input"] = tiny.VOCAB
    make_model(replace(case, settings=case.settings | with_tokens), folder)
    return folder
