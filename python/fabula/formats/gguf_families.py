"""The architectures of GGUF files, one row each: which family's config.json and tensors they hold, and how.

A row says what differs from Llama: the tensors a layer has, which of them may have biases, the order of q's and k's
rows, the windows, and keys that only this architecture reads. What only a file decides is set by a function above the
table.

Some numbers are in no key: llama.cpp derives them from the architecture and the number of layers, as noted at each row.

Source: load_arch_hparams and load_arch_tensors of llama.cpp's src/models, its conversion scripts, and the list of rope
types in src/llama-model.cpp, all in the source of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fabula.errors import shown
from fabula.formats import gguf_latent
from fabula.formats.gguf import GgufTensor
from fabula.formats.gguf_keys import Keys
from fabula.lean_dataclasses import dataclass, field

FULL, SLIDING = "full_attention", "sliding_attention"

QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "attn_output")
FUSED = ("attn_qkv", *ATTENTION)
PLAIN_MLP = ("ffn_up", "ffn_down")
MLP = ("ffn_gate", *PLAIN_MLP)
USUAL = ("attn_norm", *ATTENTION, "ffn_norm", *MLP)
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
OF_EXPERTS = ("_exps", "_shexp", "ffn_gate_inp", "exp_probs_b")  # ends of the names of their tensors
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
EXPERT_KEYS = frozenset(["expert_count", "expert_used_count", "expert_feed_forward_length"])
_SHARED_KEYS = EXPERT_KEYS | {"expert_shared_feed_forward_length"}
_GROUP_KEYS = EXPERT_KEYS | {
    *("expert_shared_count", "expert_weights_scale", "expert_weights_norm", "expert_gating_func"),
    *("leading_dense_block_count", "expert_group_count", "expert_group_used_count"),
}
_SIGMOID = 2  # of enum llama_expert_gating_func_type
SPARSE = ("attn_norm", *ATTENTION, "ffn_norm", *EXPERTS)
# A norm behind each half of a layer.
POST = {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}

# Tensors of Gemma 3n's streams and low-rank residuals.
ALTUP = {
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}

Config = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a row's function may ask.

    Attributes:
        keys, arch: of the file.
        tensors: its tensors, by name.
        n_layers, n_kv_heads, hidden_size, n_heads, head_dim: sizes.
    """

    keys: Keys
    arch: str
    tensors: Mapping[str, GgufTensor]
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int

    def key(self, name: str) -> str:
        return f"{self.arch}.{name}"

    def has(self, part: str) -> bool:
        """Whether the layers have a tensor of that name."""
        return any(name.startswith("blk.") and name.split(".")[2:] == [part, "weight"] for name in self.tensors)

    def number(self, name: str, default: float | None, *, zero: float | None = None) -> float:
        if zero is not None and self.keys.metadata.get(self.key(name)) == 0:
            return zero
        return self.keys.positive(self.key(name), default, zero=zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The sliding windows of an architecture.

    Attributes:
        default: its length where the key is missing; None where the key must be there, 0 for no windows.
        every: without a pattern in the file each layer but every n-th has one; 0: all have.
    """

    default: int | None = 0
    every: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a file of an architecture is read.

    Attributes:
        model_type: of the config.json that says the same;  model_class: of transformers.
        paired: whether rows of q and k are stored pairwise, unlike in transformers (gguf_names.py).
        layer: names of a layer's tensors.
        names: names behind `model.layers.N.`, where they differ from those that are usual.
        biases: by flag of config.json, the tensors that may have a bias; "" for a bias that config.json has no flag
            for, since it is always there.
        norm_bias, head_bias, positions, embedding_norm: whether norms have biases, the head has one, positions are
            learned, and embeddings have a norm.
        eps: key of config.json for the epsilon of layer norms; "" for RMS norms.
        silu: whether the MLP is a gated SiLU.
        varied: whether KV heads and MLPs may differ from layer to layer; `finish` reads them.
        latent: whether attention is that of latents, whose rotated part `head_dim` stands for.
        scale: of scores, where it is not that of a head's width.
        rotated: whether a part of each head may be rotated.
        factors, longrope: whether rope factors may come as tensors: one list, or two by the context's length. (Qwen has
            such files from `fabula quantize` only.)
        scalings: types of rope scaling.
        windows: None for none.
        fields: keys of config.json that stand in place of the usual ones.
        reads: keys that only this architecture reads.
        finish: adds to the config what only the file decides, or changes it.
    """

    model_type: str
    model_class: str
    paired: bool = False
    layer: tuple[str, ...] = USUAL
    names: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norm_bias: bool = False
    head_bias: bool = False
    positions: bool = False
    embedding_norm: bool = False
    eps: str = ""
    silu: bool = True
    varied: bool = False
    latent: bool = False
    scale: float | None = None
    rotated: bool = False
    factors: bool = False
    longrope: bool = False
    scalings: tuple[str, ...] = ("none", "linear", "yarn", "longrope")
    windows: Windows | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    finish: Callable[[Facts, Config], None] | None = None


# ---- What only a file decides ---------------------------------------------------------------------------------------


def _llama(f: Facts, config: Config) -> None:
    """A llama with windows is a mistral, one with experts a mixtral. Their biases are refused by gguf_names.py."""
    if f.keys.integer(f.key("expert_count"), 0, low=0) and f.arch == "llama":
        config |= {"intermediate_size": _read_experts(f, config)}
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        config.pop("layer_types", None)
        return
    for name in sorted(EXPERT_KEYS) if f.arch == "llama" else ():
        if f.keys.integer(f.key(name), 0, low=0):
            raise f.keys.unsupported(f.key(name), "is there, but no expert_count: a mixture without experts")
    if config.get("sliding_window"):
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        if FULL not in config["layer_types"]:
            del config["layer_types"]


def _read_experts(f: Facts, config: Config) -> int:
    """Numbers of experts, and their width, which is also that of their tensors. Returns it."""
    n = f.keys.integer(f.key("expert_count"))
    down = next((t for name, t in f.tensors.items() if name.endswith(".ffn_down_exps.weight")), None)
    if down is None:
        raise f.keys.unsupported(f.key("expert_count"), f"is {n}, but no tensor holds all experts (ffn_down_exps)")
    config |= {"num_experts": n, "num_experts_per_tok": f.keys.integer(f.key("expert_used_count"))}
    width = down.shape[-1]
    if (said := f.keys.integer(f.key("expert_feed_forward_length"), width)) != width:
        raise f.keys.error(f.key("expert_feed_forward_length"), f"is {said}, but experts are {width} wide")
    return width


def _qwen3moe(f: Facts, config: Config) -> None:
    """llama.cpp always divides the weights by their sum."""
    config |= {"moe_intermediate_size": _read_experts(f, config), "norm_topk_prob": True}


def _qwen2moe(f: Facts, config: Config) -> None:
    """llama.cpp never divides the weights by their sum."""
    config |= {"moe_intermediate_size": _read_experts(f, config), "norm_topk_prob": False}
    config["shared_expert_intermediate_size"] = _shared_width(f, config["intermediate_size"])


def _shared_width(f: Facts, default: int) -> int:
    """The width of the shared experts together."""
    shared = next((t for name, t in f.tensors.items() if name.endswith(".ffn_gate_shexp.weight")), None)
    return f.keys.integer(
        f.key("expert_shared_feed_forward_length"), default if shared is None else shared.shape[0], low=0
    )


def _of_groups(f: Facts, config: Config) -> None:
    """Sigmoids with a correction, shared experts, dense layers first."""
    config |= {"moe_intermediate_size": _read_experts(f, config)}
    config |= {
        "n_routed_experts": config.pop("num_experts"),
        "n_group": f.keys.integer(f.key("expert_group_count"), 1),
        "topk_group": f.keys.integer(f.key("expert_group_used_count"), 1),
        "n_shared_experts": f.keys.integer(f.key("expert_shared_count")),
        "first_k_dense_replace": f.keys.integer(f.key("leading_dense_block_count"), 0, low=0),
        "routed_scaling_factor": f.number("expert_weights_scale", 1.0, zero=1.0),
        "norm_topk_prob": f.keys.flag(f.key("expert_weights_norm"), False),
    }
    _want_sigmoids(f)
    if f.arch == "glm4moe":
        config["use_qk_norm"] = f.has("attn_q_norm")
    else:
        config["sliding_window"] = None


def _want_sigmoids(f: Facts) -> None:
    key = f.key("expert_gating_func")
    if (kind := f.keys.integer(key, _SIGMOID)) != _SIGMOID:
        raise f.keys.unsupported(key, f"is {kind}, which is not a sigmoid, as in all models of this architecture")


def _minimax_m2(f: Facts, config: Config) -> None:
    config |= {"intermediate_size": _read_experts(f, config)}
    _want_sigmoids(f)


def _ernie_moe(f: Facts, config: Config) -> None:
    size = _read_experts(f, config)
    config |= {"moe_num_experts": config.pop("num_experts"), "moe_k": config.pop("num_experts_per_tok")}
    shared = _shared_width(f, 0)
    n_shared = f.keys.integer(f.key("expert_shared_count"), shared // size, low=0)
    if shared != n_shared * size:
        raise f.keys.error(f.key("expert_shared_feed_forward_length"), f"is {shared}, not {n_shared} times {size}")
    config |= {
        "moe_intermediate_size": size,
        "moe_num_shared_experts": n_shared,
        "moe_layer_start_index": f.keys.integer(f.key("leading_dense_block_count"), 0, low=0),
        "moe_layer_interval": f.keys.integer(f.key("interleave_moe_layer_step"), 1),
    }


def _granite_moe(f: Facts, config: Config) -> None:
    _granite(f, config)
    config |= {"intermediate_size": _read_experts(f, config), "shared_intermediate_size": _shared_width(f, 0)}


def _hunyuan_moe(f: Facts, config: Config) -> None:
    size = _read_experts(f, config)
    config |= {"intermediate_size": size, "moe_topk": config.pop("num_experts_per_tok")}
    if (shared := _shared_width(f, size)) != size:
        raise f.keys.unsupported(f.key("expert_shared_feed_forward_length"), f"is {shared}, experts are {size} wide")


def _gpt_oss(f: Facts, config: Config) -> None:
    """The rotation is that of the published model, whose ramp is not cut to whole numbers; llama.cpp cuts it."""
    config["intermediate_size"] = _read_experts(f, config)
    if config["rope_scaling"]:
        config["rope_scaling"] = {**config["rope_scaling"], "truncate": False}
    else:  # a config without any means the scaling of the published models
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}


def _olmoe(f: Facts, config: Config) -> None:
    config |= {"intermediate_size": _read_experts(f, config), "norm_topk_prob": False}
    config["clip_qkv"] = f.number("attention.clamp_kqv", 0.0, zero=0.0) or None


def _mistral3(f: Facts, config: Config) -> None:
    """Queries grow with their position where the file says so (Ministral 3)."""
    _llama(f, config)
    beta = f.number("attention.temperature_scale", 0.0, zero=0.0)
    if not beta:
        return
    original = f.keys.integer(f.key("rope.scaling.original_context_length"), config["max_position_embeddings"], low=1)
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    config["rope_scaling"] = {
        **scaling, "original_max_position_embeddings": original, "llama_4_scaling_beta": beta,
    }  # fmt: skip
    config |= {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}


def _granite_swa(f: Facts, config: Config) -> None:
    f.number("logit_scale", None)  # a divisor; gguf_config.py accepts only 1
    _llama(f, config)


def _granite(f: Facts, config: Config) -> None:
    """Factors; 0 stands for "not given". `rope.scaling.finetuned` false means layers without rotation."""
    key = f.key("rope.scaling.finetuned")
    if not f.keys.flag(key, True):
        raise f.keys.unsupported(key, "is false, which means layers without rotation here; that is not offered")
    config |= {
        "logits_scaling": f.number("logit_scale", None),
        "residual_multiplier": f.number("residual_scale", 1.0, zero=1.0),
        "embedding_multiplier": f.number("embedding_scale", 1.0, zero=1.0),
        "attention_multiplier": f.number("attention.scale", f.head_dim**-0.5, zero=f.head_dim**-0.5),
    }


def _minicpm(f: Facts, config: Config) -> None:
    """Granite's factors under other names; the defaults are those of the first release."""
    config |= {
        "logits_scaling": f.number("logit_scale", f.hidden_size / 256),
        "residual_multiplier": f.number("residual_scale", 1.4 / math.sqrt(f.n_layers), zero=1.0),
        "embedding_multiplier": f.number("embedding_scale", 12.0, zero=1.0),
        "attention_multiplier": f.head_dim**-0.5,
    }


def _baichuan(f: Facts, _: Config) -> None:
    """The number of layers decides: models of 32 have rotations, those of 40 ALiBi."""
    if f.n_layers not in (32, 40):
        raise f.keys.unsupported(
            f.key("block_count"), f"is {f.n_layers}: models of 32 layers have rotations, those of 40 ALiBi; others none"
        )


def _mpt(f: Facts, config: Config) -> None:
    most = f.number("attention.max_alibi_bias", 0.0, zero=0.0)
    if not most:
        raise f.keys.unsupported(f.key("attention.max_alibi_bias"), "is 0: models without ALiBi are not offered")
    config["attn_config"] = {
        "alibi_bias_max": most, "clip_qkv": f.number("attention.clamp_kqv", 0.0, zero=0.0) or None,
    }  # fmt: skip


def query_scale(f: Facts, n_layers_27b: int) -> float:
    """Gemma's query_pre_attn_scalar, for which there is no key: 27B models, known by their layers, have another."""
    return f.hidden_size / f.n_heads if f.n_layers == n_layers_27b else f.head_dim


def _gemma2(f: Facts, config: Config) -> None:
    config["query_pre_attn_scalar"] = query_scale(f, 46)
    for name, key, default in (
        ("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ):
        config[name] = f.number(key, default)


def _gemma3(f: Facts, config: Config) -> None:
    config["query_pre_attn_scalar"] = query_scale(f, 62)
    config["attn_logit_softcapping"] = None
    config["final_logit_softcapping"] = f.number("final_logit_softcapping", 0.0, zero=0.0) or None
    config["rope_local_base_freq"] = f.number("rope.freq_base_swa", 10000.0)


def _gemma4(f: Facts, config: Config) -> None:
    """Two head geometries, and layers that share KV; see models/gemma4.py.

    Layers without a window have frequency factors: 1 for rotated pairs, 1e30 for the others.
    """
    keys, n = f.keys, f.n_layers
    kinds = config["layer_types"]
    if kinds[-1] == SLIDING:
        raise keys.unsupported(f.key("attention.sliding_window_pattern"), "ends with a window, which no model has")
    narrow = keys.integer(f.key("attention.key_length_swa"))
    for name in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if (value := keys.integer(f.key(name), narrow)) != narrow:
            raise keys.unsupported(f.key(name), f"is {value}; only that of a whole head, {narrow}, is offered")
    kv_heads = keys.each(f.key("attention.head_count_kv"), n, f.n_heads)
    sizes = keys.each(f.key("feed_forward_length"), n)
    shared = keys.integer(f.key("attention.shared_kv_layers"), 0, low=0, high=n - 1)
    wide = sizes[-1] == 2 * sizes[0]
    if sizes != [sizes[0] * (2 if wide and i >= n - shared else 1) for i in range(n)]:
        raise keys.unsupported(f.key("feed_forward_length"), "differs in other layers than those that share KV")
    full = [i for i in range(n - shared) if kinds[i] == FULL]
    k_is_v = not any(f"blk.{i}.attn_v.weight" in f.tensors for i in full)
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {
        "head_dim": narrow,
        "num_key_value_heads": kv_heads[0],
        "intermediate_size": sizes[0],
        "per_layer_config": {
            str(i): {"num_key_value_heads": kv_heads[i], "head_dim": narrow if kinds[i] == SLIDING else f.head_dim}
            for i in range(n)
        },
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": wide,
        "attention_k_eq_v": k_is_v,
        "hidden_size_per_layer_input": keys.integer(f.key("embedding_length_per_layer_input"), low=0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0, zero=0.0) or None,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 10000.0)},
        },
    }


def _gemma3n(f: Facts, config: Config) -> None:
    """llama.cpp has numbers of its own for most of these keys, those of the released models."""
    keys, n = f.keys, f.n_layers
    cutoffs = keys.metadata.get(f.key("activation_sparsity_scale"))
    if cutoffs is None:
        cutoffs = np.array([1.6448533535 if i < 10 else -np.inf for i in range(n)])
    if not isinstance(cutoffs, np.ndarray) or cutoffs.dtype.kind != "f" or len(cutoffs) != n:
        raise keys.error(f.key("activation_sparsity_scale"), f"must be an array of {n} numbers, one for each layer")
    from statistics import NormalDist  # slow to import

    laurel, table = (f.tensors.get(f"{name}.weight") for name in ("blk.0.laurel_l", "per_layer_token_embd"))
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {
        "intermediate_size": keys.each(f.key("feed_forward_length"), n),
        "num_kv_shared_layers": keys.integer(f.key("attention.shared_kv_layers"), max(n - 20, 0), low=0, high=n - 1),
        "hidden_size_per_layer_input": keys.integer(f.key("embedding_length_per_layer_input"), 256),
        "vocab_size_per_layer_input": table.shape[0] if table is not None else config["vocab_size"],
        "altup_active_idx": keys.integer(f.key("altup.active_idx"), 0, low=0),
        "altup_num_inputs": keys.integer(f.key("altup.num_inputs"), 4),
        "altup_correct_scale": f.has("altup_correct_scale"),
        "laurel_rank": laurel.shape[0] if laurel is not None else 64,
        "activation_sparsity_pattern": [NormalDist().cdf(float(cutoff)) for cutoff in cutoffs],
        "final_logit_softcapping": f.number("final_logit_softcapping", 30.0),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": f.number("rope.freq_base_swa", 10000.0)},
        },
    }


def _olmo(f: Facts, config: Config) -> None:
    key = f.key("attention.layer_norm_epsilon")
    if not math.isclose(f.keys.positive(key), 1e-5, rel_tol=1e-6):
        raise f.keys.unsupported(key, "is not 1e-05, which this family always has")
    config["clip_qkv"] = f.number("attention.clamp_kqv", 0.0, zero=0.0) or None


def _olmo2(f: Facts, config: Config) -> None:
    """OLMo 3 has windows, whose layers have no scaling."""
    if not config.pop("sliding_window", None):
        config.pop("layer_types")
        return
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    config |= {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": f.keys.integer(f.key("attention.sliding_window")),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": theta},
        },
    }


def _phi3(_: Facts, config: Config) -> None:
    if (scaling := config["rope_scaling"]) is not None:
        config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]


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


def _apertus(f: Facts, _: Config) -> None:
    """The numbers of xIELU are keys of their own; see gguf_names.py."""
    for name in XIELU:
        value = f.keys.metadata.get(f"xielu.{name}")
        if value is None:
            raise f.keys.error(f"xielu.{name}", "is missing")
        if isinstance(value, np.ndarray) and (value.dtype.kind != "f" or len(value) != f.n_layers):
            raise f.keys.error(f"xielu.{name}", f"must be a number or {f.n_layers} numbers, one for each layer")
        if not isinstance(value, np.ndarray | float):
            raise f.keys.error(f"xielu.{name}", f"is {shown(value)}, must be a number")


XIELU = ("alpha_n", "alpha_p", "beta", "eps")

_GEMMA2: dict[str, Any] = {
    "layer": (*USUAL, *POST),
    "names": POST | {"ffn_norm": "post_attention_layernorm"},
    "biases": {"attention_bias": ATTENTION},
    "silu": False,
}
_GLM: dict[str, Any] = {
    "names": {"ffn_up": "mlp.gate_up_proj"},
    "biases": {"attention_bias": ("attn_qkv", *QKV)},
    "rotated": True,
}
_LAYER_NORM: Mapping[str, Any] = {"norm_bias": True, "silu": False}
_BOTH = {"attention_bias": ATTENTION, "mlp_bias": MLP}
_PLAIN = ("attn_norm", "attn_qkv", *ATTENTION, "ffn_norm", *PLAIN_MLP)

ARCHITECTURES: Mapping[str, Architecture] = {
    # Early versions of `fabula quantize` wrote windows for llama, which llama.cpp does not have there.
    "llama": Architecture(
        model_type="llama", model_class="LlamaForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        layer=(*USUAL, *EXPERTS), windows=Windows(), reads=EXPERT_KEYS, finish=_llama,
    ),
    "qwen2": Architecture(model_type="qwen2", model_class="Qwen2ForCausalLM", biases={"": QKV}, factors=True),
    "qwen3": Architecture(
        model_type="qwen3", model_class="Qwen3ForCausalLM", layer=(*USUAL, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, factors=True,
    ),
    # llama with more YaRN keys, and Ministral 3.
    "mistral3": Architecture(
        model_type="llama", model_class="LlamaForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        windows=Windows(), reads=frozenset(["rope.scaling.yarn_log_multiplier", "attention.temperature_scale"]),
        finish=_mistral3,
    ),
    # llama with windows, as `fabula quantize` writes it: all scales 1, sinks without effect.
    "granite_swa": Architecture(
        model_type="llama", model_class="LlamaForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        windows=Windows(default=None), finish=_granite_swa,
    ),
    # The text part; for text all sections of a position are equal, so rotations are the usual ones.
    "qwen2vl": Architecture(
        model_type="qwen2", model_class="Qwen2ForCausalLM", biases={"": QKV},
        reads=frozenset(["rope.dimension_sections"]),
    ),
    "qwen3vl": Architecture(
        model_type="qwen3", model_class="Qwen3ForCausalLM", layer=(*USUAL, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, reads=frozenset(["rope.dimension_sections", "n_deepstack_layers"]),
    ),
    "exaone": Architecture(model_type="llama", model_class="LlamaForCausalLM", factors=True),
    "internlm2": Architecture(model_type="llama", model_class="LlamaForCausalLM", paired=True),
    # Heads of Baichuan 2 are normalized when they are loaded, which llama.cpp does not do.
    "baichuan": Architecture(model_type="baichuan", model_class="BaichuanForCausalLM", paired=True, finish=_baichuan),
    "granite": Architecture(
        model_type="granite", model_class="GraniteForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        reads=frozenset(["logit_scale", "residual_scale", "embedding_scale", "attention.scale"]), finish=_granite,
    ),
    "minicpm": Architecture(
        model_type="granite", model_class="GraniteForCausalLM", paired=True, biases=_BOTH, factors=True, longrope=True,
        reads=frozenset(["logit_scale", "residual_scale", "embedding_scale"]), finish=_minicpm,
    ),
    "smollm3": Architecture(model_type="smollm3", model_class="SmolLM3ForCausalLM", paired=True, biases=_BOTH),
    "arcee": Architecture(
        model_type="arcee", model_class="ArceeForCausalLM", paired=True, factors=True, silu=False,
        layer=("attn_norm", *ATTENTION, "ffn_norm", *PLAIN_MLP),
        biases={"attention_bias": ATTENTION, "mlp_bias": PLAIN_MLP},
    ),
    "gemma": Architecture(
        model_type="gemma", model_class="GemmaForCausalLM", biases={"attention_bias": ATTENTION}, silu=False
    ),
    "gemma2": Architecture(
        model_type="gemma2", model_class="Gemma2ForCausalLM", **_GEMMA2, windows=Windows(default=4096, every=2),
        reads=frozenset(["attn_logit_softcapping", "final_logit_softcapping"]), finish=_gemma2,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text", model_class="Gemma3ForCausalLM", **_GEMMA2 | {"layer": (*USUAL, *POST, *HEAD_NORMS)},
        windows=Windows(every=6), scalings=("none", "linear"),
        reads=frozenset(["final_logit_softcapping", "rope.freq_base_swa"]), finish=_gemma3,
    ),
    "gemma3n": Architecture(
        model_type="gemma3n_text", model_class="Gemma3nForCausalLM", silu=False, varied=True, scale=1.0,
        layer=(*USUAL, *POST, *HEAD_NORMS, *PER_LAYER, *ALTUP), names={**_GEMMA2["names"], **PER_LAYER, **ALTUP},
        biases={"attention_bias": ATTENTION}, windows=Windows(default=None, every=5), scalings=("none", "linear"),
        reads=frozenset([
            "altup.active_idx", "altup.num_inputs", "activation_sparsity_scale", "embedding_length_per_layer_input",
            "attention.shared_kv_layers", "rope.freq_base_swa", "final_logit_softcapping",
        ]), finish=_gemma3n,
    ),
    "gemma4": Architecture(
        model_type="gemma4_text", model_class="Gemma4ForCausalLM", silu=False, varied=True, scale=1.0, factors=True,
        layer=(*USUAL, *POST, *HEAD_NORMS, *PER_LAYER, "layer_output_scale"),
        names={**_GEMMA2["names"], **PER_LAYER, "layer_output_scale": "layer_scalar"},
        windows=Windows(default=None), scalings=("none", "linear"),
        reads=frozenset([
            "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa", "rope.freq_base_swa",
            "attention.shared_kv_layers", "embedding_length_per_layer_input", "final_logit_softcapping",
        ]), finish=_gemma4,
    ),
    # llama.cpp ignores the window; transformers does not.
    "phi3": Architecture(
        model_type="phi3", model_class="Phi3ForCausalLM", layer=(*USUAL, "attn_qkv"), longrope=True, rotated=True,
        names={"ffn_up": "mlp.gate_up_proj"}, scalings=("longrope",), windows=Windows(), finish=_phi3,
    ),
    "phi2": Architecture(
        model_type="phi", model_class="PhiForCausalLM", **_LAYER_NORM, eps="layer_norm_eps", head_bias=True,
        layer=("attn_norm", *FUSED, *PLAIN_MLP), rotated=True, biases={"": (*FUSED, *PLAIN_MLP)},
    ),
    "olmo": Architecture(
        model_type="olmo", model_class="OlmoForCausalLM", paired=True, layer=(*ATTENTION, *MLP), eps="-",
        reads=frozenset(["attention.clamp_kqv"]), finish=_olmo,
    ),
    # OLMo 2, and 3 with windows. The norm in front of the MLP stands behind attention.
    "olmo2": Architecture(
        model_type="olmo2", model_class="Olmo2ForCausalLM", layer=(*ATTENTION, *MLP, *HEAD_NORMS, *POST), names=POST,
        biases={"attention_bias": ATTENTION}, windows=Windows(every=4), finish=_olmo2,
    ),
    # Layers without a window have no rotation; llama.cpp has windows only in the model of 64 layers.
    "exaone4": Architecture(
        model_type="exaone4", model_class="Exaone4ForCausalLM", layer=(*ATTENTION, *MLP, *HEAD_NORMS, *POST),
        names=POST, factors=True, windows=Windows(every=4),
    ),
    "glm4": Architecture(
        model_type="glm4", model_class="Glm4ForCausalLM", **_GLM | {"names": {**POST, **_GLM["names"]}},
        layer=(*USUAL, "attn_qkv", *POST),
    ),
    "chatglm": Architecture(model_type="glm", model_class="GlmForCausalLM", **_GLM, layer=(*USUAL, "attn_qkv")),
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
    "seed_oss": Architecture(
        model_type="seed_oss", model_class="SeedOssForCausalLM",
        layer=("attn_norm", *ATTENTION, "post_attention_norm", *MLP),
        names={"post_attention_norm": "post_attention_layernorm"},
        biases={"attention_bias": QKV, "attention_out_bias": ("attn_output",), "mlp_bias": MLP},
    ),
    "ernie4_5": Architecture(
        model_type="ernie4_5", model_class="Ernie4_5ForCausalLM", biases={"use_bias": (*ATTENTION, *MLP)}
    ),
    "hunyuan-dense": Architecture(
        model_type="hunyuan_v1_dense", model_class="HunYuanDenseV1ForCausalLM", layer=(*USUAL, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION},
    ),
    "apertus": Architecture(
        model_type="apertus", model_class="ApertusForCausalLM", factors=True, longrope=True, silu=False,
        layer=("attn_norm", *ATTENTION, "ffn_norm", *PLAIN_MLP, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, finish=_apertus,
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
    # Mixtures of experts.
    "qwen2moe": Architecture(
        model_type="qwen2_moe", model_class="Qwen2MoeForCausalLM", biases={"": QKV}, factors=True,
        layer=(*SPARSE, *SHARED, "ffn_gate_inp_shexp"),
        reads=_SHARED_KEYS, finish=_qwen2moe,
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe", model_class="Qwen3MoeForCausalLM", layer=(*SPARSE, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, factors=True, reads=EXPERT_KEYS, finish=_qwen3moe,
    ),
    "granitemoe": Architecture(
        model_type="granitemoeshared", model_class="GraniteMoeSharedForCausalLM", paired=True, factors=True,
        longrope=True, layer=(*SPARSE, *SHARED), biases={"attention_bias": ATTENTION},
        reads=_SHARED_KEYS | {"logit_scale", "residual_scale", "embedding_scale", "attention.scale"},
        finish=_granite_moe,
    ),
    # The norm in front of the MLP has the name of one behind attention.
    "glm4moe": Architecture(
        model_type="glm4_moe", model_class="Glm4MoeForCausalLM", rotated=True, biases={"attention_bias": QKV},
        layer=(
            *("attn_norm", *ATTENTION, "post_attention_norm", *MLP, *HEAD_NORMS), *EXPERTS, *SHARED, "exp_probs_b",
        ),
        names={"post_attention_norm": "post_attention_layernorm"},
        reads=_GROUP_KEYS | {"nextn_predict_layers"}, finish=_of_groups,
    ),
    "dots1": Architecture(
        model_type="dots1", model_class="Dots1ForCausalLM", biases={"attention_bias": ATTENTION},
        layer=(*USUAL, *HEAD_NORMS, *EXPERTS, *SHARED, "exp_probs_b"), reads=_GROUP_KEYS, finish=_of_groups,
    ),
    "ernie4_5-moe": Architecture(
        model_type="ernie4_5_moe", model_class="Ernie4_5_MoeForCausalLM",
        layer=(*USUAL, *EXPERTS, *SHARED, "exp_probs_b"),
        reads=_SHARED_KEYS | {"expert_shared_count", "leading_dense_block_count", "interleave_moe_layer_step"},
        finish=_ernie_moe,
    ),
    "minimax-m2": Architecture(
        model_type="minimax_m2", model_class="MiniMaxM2ForCausalLM", rotated=True,
        layer=(*SPARSE, *HEAD_NORMS, "exp_probs_b"), reads=EXPERT_KEYS | {"expert_gating_func"}, finish=_minimax_m2,
    ),
    "hunyuan-moe": Architecture(
        model_type="hunyuan_v1_moe", model_class="HunYuanMoEV1ForCausalLM", layer=(*SPARSE, *SHARED, *HEAD_NORMS),
        biases={"attention_bias": ATTENTION}, reads=_SHARED_KEYS, finish=_hunyuan_moe,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss", model_class="GptOssForCausalLM",
        layer=("attn_norm", *ATTENTION, "attn_sinks", "post_attention_norm", *EXPERTS),
        names={"attn_sinks": "self_attn.sinks", "post_attention_norm": "post_attention_layernorm"},
        biases={"attention_bias": ATTENTION, "": EXPERTS}, windows=Windows(default=None, every=2),
        reads=EXPERT_KEYS, finish=_gpt_oss,
    ),
    "olmoe": Architecture(
        model_type="olmoe", model_class="OlmoeForCausalLM",
        layer=(*SPARSE, *HEAD_NORMS),
        reads=EXPERT_KEYS | {"attention.clamp_kqv"}, finish=_olmoe,
    ),
    **{arch: Architecture(**row) for arch, row in gguf_latent.ROWS.items()},
}  # fmt: skip
# Architectures that store the rows of q and k pairwise (gguf_names.py).
PAIRED = tuple(arch for arch, row in ARCHITECTURES.items() if row.paired)
