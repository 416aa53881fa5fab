"""The law of configs for every family: each field of its config class either changes logits as in transformers, or the
load is refused by the field's name. See test_config_flips.py, whose judge this uses, for the four families with all
general fields; here each family gets its own fields, and a part of the general ones.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import hybrid_families as hybrids
import test_config_flips as flips_of_llama
from decoder_families import CASES, FULL, SLIDING, Case, make_model
from test_config_flips import ABSENT, FIELDS, LONG, OTHERS, SPOKEN, YARN, judge

# In transformers a part of Mistral 3's multimodal models only.
transformers.AutoModelForCausalLM.register(transformers.Mistral4Config, transformers.Mistral4ForCausalLM, exist_ok=True)
# One case of each family.
FAMILIES: dict[str, Case] = {case.model_type: case for case in reversed(CASES.values())}
FAMILIES["gemma4_text-experts"] = CASES["gemma4-experts"]
FAMILIES["llama4_text-dense"] = CASES["llama4"]
OWN: dict[str, list[Any]] = {
    **hybrids.FLIPS,
    "activation_sparsity_pattern": [[0.1] * 7, [0.0] * 7, None, [0.5]],
    "altup_active_idx": [2],
    "altup_correct_scale": [False],
    "altup_num_inputs": [2, 3],
    "apply_residual_connection_post_layernorm": [True],
    "attn_config": [
        {"clip_qkv": 0.1},
        {"softmax_scale": 0.9},
        {"alibi": False},
        {"qk_ln": True},
        {"prefix_lm": True},
        {"attn_type": "multiquery_attention"},
        {"attn_pdrop": 0},
        None,
    ],
    "d_model": [144],
    "expansion_ratio": [2],
    "dim_model_base": [36, None],
    "kv_lora_rank": [20],
    "q_lora_rank": [None, 20],
    "qk_nope_head_dim": [10],
    "qk_rope_head_dim": [6, 7],
    "rope_interleave": [True, False, None],
    "scale_depth": [0.9, None],
    "scale_emb": [2, 0.5],
    "topk_method": ["group_limited_greedy", "noaux_tc", "greedy"],
    "v_head_dim": [13, None],
    "laurel_rank": [8],
    "learned_pos_emb": [False],
    "n_heads": [4],
    "n_layers": [2],
    "no_bias": [False],
    "norm_type": ["rmsnorm"],
    "slow_but_exact": [True],
    "activation": ["relu", "silu", "no such"],
    "activation_function": ["gelu", "relu", "silu", "gelu_fast", "no such"],
    "add_cross_attention": [True],
    "alibi": [None],  # true: test_decoder_families.py; the code that runs here adds biases twice
    "attention_chunk_size": [8, None],
    "attention_k_eq_v": [True],
    "attention_multiplier": [0.3, -0.2],
    "attention_out_bias": [True, False],
    "attn_logit_softcapping": [0.5, None],
    "attn_scale": [0.9],
    "attn_temperature_tuning": [False],
    "bias": [True, False],
    "clip_qkv": [0.2, None],
    "decoder_sparse_step": [1, 2, 3],
    "embedding_multiplier": [0.5, 7.0],
    "enable_moe_block": [True, False],
    "ffn_hidden_size": [None, ABSENT],
    "final_logit_softcapping": [0.5, None],
    "first_k_dense_replace": [0, 2],
    "floor_scale": [4],
    "hidden_activation": ["gelu", "silu", "relu", "no such", None, ABSENT],
    "hidden_size_per_layer_input": [8],
    "interleave_moe_layer_step": [1, 2],
    "layer_norm_eps": [0.1, 0.0],
    "layer_norm_epsilon": [0.1, ABSENT],
    "logit_scale": [0.5, ABSENT],
    "logits_scaling": [0.5, 3],
    "max_window_layers": [0, 2],
    "mlp_only_layers": [[0], [0, 2], [], None],
    "moe_layer_end_index": [1, -1],
    "moe_layer_interval": [1, 2],
    "moe_layer_start_index": [0, 1],
    "moe_norm_min": [1e-12, 0.9],
    "moe_num_shared_experts": [1, 0],
    "n_group": [1, 7, 2],
    "n_shared_experts": [1],
    "topk_group": [1, 2],
    "routed_scaling_factor": [0.3, 1.0],
    "router_jitter_noise": [0.05, 0.0],
    "num_experts_per_tok": [1, 2],
    "top_k_experts": [1, 2],
    "shared_intermediate_size": [30, 0],
    "swiglu_alpha": [1.0, ABSENT],
    "swiglu_limit": [0.5, ABSENT],
    "lm_head_bias": [True, False],
    "mlp_layer_types": [
        *(["dense", "sparse", "sparse"], ["sparse", "dense", "sparse"], ["sparse"] * 3, ["dense"] * 3),
        *(["sparse"], ["dense"], ["other"] * 3, None),
    ],
    "moe_layers": [None, [1], []],
    "multi_query": [False],
    "n_inner": [None, 100],
    "n_layer": [1],
    "n_positions": [64, ABSENT],
    "new_decoder_architecture": [True],
    "no_rope_layer_interval": [1, 2],
    "no_rope_layers": [[0, 1, 0, 1, 1], [1] * 5, None, [1], []],
    "norm_eps": [0.1, ABSENT],
    "norm_topk_prob": [True, False],
    "norm_epsilon": [0.1, ABSENT],
    "num_kv_heads": [1, 6],
    "num_kv_shared_layers": [0, 1, 6],
    "num_ln_in_parallel_attn": [1],
    "original_max_position_embeddings": [16],
    "parallel_attn": [False],
    "qk_layernorm": [True],
    "qkv_bias": [False],
    "query_pre_attn_scalar": [4, 100],
    "reorder_and_upcast_attn": [True],
    "residual_multiplier": [0.1, 2],
    "rotary_dim": [4, 3, None],
    "scale_attn_by_inverse_layer_idx": [True],
    "scale_attn_weights": [False],
    "shared_expert_intermediate_size": [30],
    "sliding_window_pattern": [2, None],
    "use_bias": [False, True],
    "use_bidirectional_attention": [True, None],
    "use_double_wide_mlp": [True],
    "use_parallel_residual": [True, False],
    "use_qk_norm": [True, False],
    "use_qkv_bias": [True, False],
    "vocab_size_per_layer_input": [204, 100],
}
# Those that have no say in logits, and sizes, which test_decoder_families.py has in many values.
IDLE = {
    *hybrids.IDLE,
    *("attn_pdrop", "classifier_dropout", "embd_pdrop", "embedding_dropout", "eod_token_id", "hidden_dropout"),
    *(
        "altup_coef_clip",
        "emb_pdrop",
        "embedding_fraction",
        "init_device",
        "max_seq_len",
        "pretraining_tp",
    ),
    *("moe_k", "moe_num_experts", "moe_topk", "n_routed_experts", "num_mtp_layers", "sep_token_id"),
    *("is_decoder", "moe_intermediate_size", "n_embd", "n_head", "num_experts"),
    *("num_local_experts", "output_router_logits", "resid_pdrop", "residual_dropout", "router_aux_loss_coef"),
    *(
        "input_jitter_noise",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
    ),
    *("summary_use_proj", "intermediate_size_mlp", "embedding_initializer_range"),
}
# What a refusal may speak of in place of the field: the tensors that are missing or of another shape then.
WEIGHTS = {
    **hybrids.SPOKEN,
    **dict.fromkeys(("bias", "use_bias", "use_qkv_bias", "use_qk_norm", "multi_query", "n_inner"), ("tensor",)),
    **dict.fromkeys(
        ("attention_out_bias", "ffn_hidden_size", "num_kv_heads", "hidden_size_per_layer_input"), ("tensor",)
    ),
    **dict.fromkeys(("new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn"), ("tensor",)),
    **dict.fromkeys(("attention_k_eq_v", "use_double_wide_mlp", "use_parallel_residual", "n_positions"), ("tensor",)),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qk_layernorm", "num_kv_shared_layers", "n_layer"), ("tensor",)),
    **dict.fromkeys(("decoder_sparse_step", "mlp_only_layers", "qkv_bias"), ("tensor",)),
    "shared_expert_intermediate_size": ("tensor",),
    "use_sliding_window": ("sliding_window",),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_interval", "moe_layer_start_index"), ("tensor",)),
    **dict.fromkeys(("moe_layer_end_index", "moe_num_shared_experts", "n_shared_experts"), ("tensor",)),
    **dict.fromkeys(("n_group", "topk_group"), ("n_group", "topk_group", "num_experts_per_tok")),
    "shared_intermediate_size": ("tensor",),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "mlp_layer_types"), ("tensor",)),
    "qk_rope_head_dim": ("tensor", "head_dim"),
    "topk_method": ("n_group",),
    **dict.fromkeys(("moe_layers", "interleave_moe_layer_step", "lm_head_bias"), ("tensor",)),
    "enable_moe_block": ("tensor", "num_experts"),
    "num_experts": ("tensor",),
    **dict.fromkeys(("d_model", "n_heads", "n_layers", "altup_num_inputs", "laurel_rank"), ("tensor",)),
    "num_hidden_layers": (
        "layers_block_type",
        "layer_types",
        "no_rope_layers",
        "intermediate_size",
        "num_kv_shared_layers",
        "per_layer_config",
    ),
    "layer_types": (
        "tensor",
        "layers_block_type",
        "sliding_window",
        "sliding_attention",
        "attention_chunk_size",
        "per_layer_config",
    ),
    "num_key_value_heads": ("tensor",),
    "per_layer_config": ("tensor",),
    "vocab_size_per_layer_input": ("tensor",),
    "sliding_window": ("layer_types",),
    "max_position_embeddings": ("tensor",),
    "rope_parameters": ("rope", "llama_4_scaling_beta"),
}
UNSTEADY = ("bamba",)  # transformers 5.24 gives other logits with a cache than without, whatever the config says
KINDS = [[FULL], ["mamba", FULL], None]


def flips(case: Case) -> Iterator[dict[str, Any]]:
    declared = {field.name for field in dataclasses.fields(case.config_class)}
    unknown = declared - FIELDS.keys() - OWN.keys() - IDLE
    assert not unknown, f"fields nobody wrote values for: {unknown}"
    config = case.config_class(**copy.deepcopy(case.settings))
    n_layers = config.num_hidden_layers
    mixed = [[FULL, SLIDING] * n_layers, [SLIDING, FULL] * n_layers, [FULL] * n_layers]
    for key in sorted(declared):
        values = FIELDS.get(key, OWN.get(key)) or OWN.get(key) or ()
        if key == "layer_types":
            values = [*KINDS, *(kinds[:n_layers] for kinds in mixed)]
        elif key == "num_hidden_layers":
            values = [1, "2"]
        elif case.family == "Youtu" and key == "pad_token_id":
            values = ()  # see decoder_families.py
        for value in values:
            yield {key: value}
    if {"conv", "linear_attention"} & set(kinds := getattr(config, "layer_types", None) or ()):
        yield {"layer_types": kinds[::-1]}
    if "sliding_window" in declared:
        for kinds in mixed:
            yield {"sliding_window": 8, "layer_types": kinds[:n_layers]}


def shared_flips(family: str, case: Case) -> list[dict[str, Any]]:
    """Fields of every config, and the forms of rope: a part of them for each family, all with FABULA_TEST_LONG=1."""
    declared = {field.name for field in dataclasses.fields(case.config_class)}
    idle = ("mlp_layer_types",)  # not read, but its length is checked
    shared: list[dict[str, Any]] = [
        {key: value} for key, values in OTHERS.items() if key not in idle for value in values
    ]
    has_rope = "rope_parameters" in declared  # others check a rope they do not use
    for rope in flips_of_llama.ropes(12) if has_rope else ():
        shared += [{"rope_scaling": rope}, {"rope_scaling": rope, "rope_theta": 70.0, "rope_parameters": ABSENT}]
        if rope is not None:
            shared.append({"rope_parameters": rope | {"rope_theta": 33.0}})
    if not has_rope:
        return shared
    shared += [{"rope_parameters": {kind: YARN | {"rope_theta": 50.0} for kind in (FULL, SLIDING)}}]
    shared += [
        {"partial_rotary_factor": 0.5, "rope_parameters": ABSENT},
        {"rope_theta": 50.0, "rope_parameters": ABSENT},
    ]
    return shared if LONG else shared[sorted(FAMILIES).index(family) % 8 :: 8]


# One family of each structure; the others are more examples of the same reader.
QUICK = (
    "apertus",
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma4_text",
    "gpt2",
    "lfm2",
    "llama4_text",
    "phi3",
    "qwen3_moe",
)


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.heavy) for name in sorted(FAMILIES)],
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    make_model(FAMILIES[request.param], folder)
    (folder / "config.json").rename(folder / "original.json")
    return request.param, folder


def problems(made: tuple[str, Path], patch: pytest.MonkeyPatch, changes: Iterable[dict[str, Any]]) -> str:
    family, folder = made
    for key, words in WEIGHTS.items():
        patch.setitem(SPOKEN, key, (*SPOKEN.get(key, ()), *words))
    found = [problem for change in changes if (problem := judge(folder, change))]
    if family in UNSTEADY:
        found = [problem for problem in found if not problem.endswith("which nobody is told")]
    return "\n".join(found)


@pytest.mark.filterwarnings("ignore")
def test_every_field(made: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not problems(made, monkeypatch, flips(FAMILIES[made[0]]))


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
def test_shared_fields(made: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not problems(made, monkeypatch, shared_flips(made[0], FAMILIES[made[0]]))
