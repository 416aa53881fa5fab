"""What the rows of models/hybrid_families.py say in functions: recurrent layers, and what only a config decides.

Source: configuration and modeling files of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fabula.lean_dataclasses import replace
from fabula.models.config import ConfigReader, Kinds, Traits, read_activation
from fabula.models.description import DeltaRule, Experts, Mamba2, ModelConfig, Norm, Router, ShortConv
from fabula.models.expert_rules import counts, width, with_gated_shared
from fabula.models.family_rules import granite, mrope

FULL, CONV, LINEAR = "full_attention", "conv", "linear_attention"
MOST_TAPS = 64  # of a convolution, as in FB_OP_SHORT_CONV
MOST_WIDE = 1024  # of a head of a state, as in FB_OP_DELTA_RULE
MOST_HEADS = 4096
_MAX_WIDTH = 1 << 20


# ---- LFM2 -----------------------------------------------------------------------------------------------------------


def short_conv(read: ConfigReader) -> ShortConv:
    return ShortConv(
        width=read.integer("hidden_size", 1, _MAX_WIDTH),
        n_taps=read.integer("conv_L_cache", 2, MOST_TAPS, 3),
        bias=read.flag("conv_bias", False),
    )


def lfm2(read: ConfigReader, t: Traits) -> Traits:
    """Released configs have other names for two fields, which go before the usual ones, and a width of the MLP that is
    two thirds of what is said, rounded up."""
    config = dict(read.config)
    for name, usual in (("block_ff_dim", "intermediate_size"), ("tie_embedding", "tie_word_embeddings")):
        if name in config:
            config[usual] = config[name]
    read.config = config
    inner = read.integer("intermediate_size", 1, _MAX_WIDTH, 12288)
    if read.flag("block_auto_adjust_ff_dim", True):
        inner = int(2 * inner / 3)
        if config.get("block_ffn_dim_multiplier", 1.0) is not None:
            inner = int(read.number("block_ffn_dim_multiplier", 1e-3, 1e3, 1.0) * inner)
            multiple = read.integer("block_multiple_of", 1, _MAX_WIDTH, 256)
            inner = -(-inner // multiple) * multiple
    read.config = {**config, "intermediate_size": inner}
    return t


def lfm2_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """`full_attn_idxs` lists the layers with attention; by default all have it."""
    full = read.config.get("full_attn_idxs")
    if full is None:
        return [FULL] * n_layers
    if not isinstance(full, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in full):
        raise read.error("full_attn_idxs", "must be a list of layers")
    return [FULL if i in full else CONV for i in range(n_layers)]


def lfm2_moe(read: ConfigReader, t: Traits) -> Traits:
    if "tie_embedding" in read.config:
        read.config = {**read.config, "tie_word_embeddings": read.config["tie_embedding"]}
    return t


def listed_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    raise read.error("layer_types", f"is missing: it must list the kind of each of {n_layers} layers")


def lfm2_experts(read: ConfigReader, n_layers: int) -> Sequence[Experts | None]:
    """Sigmoids, in all layers but the first."""
    n, chosen = counts(read, 32, 4)
    router = Router(
        n_experts=n,
        n_chosen=chosen,
        scores="sigmoid",
        renormalized=read.flag("norm_topk_prob", True),
        eps=1e-6,
        scale=read.number("routed_scaling_factor", -1e6, 1e6, 1.0),
        corrected=read.flag("use_expert_bias", True),
    )
    experts = Experts(router=router, size=width(read, "moe_intermediate_size", 1792))
    dense = read.integer("num_dense_layers", 0, 1024, 2)
    return [None if i < dense else experts for i in range(n_layers)]


# ---- Gated delta rule -----------------------------------------------------------------------------------------------


def delta_rule(read: ConfigReader) -> DeltaRule:
    """Of Qwen3-Next and Qwen3.5."""
    n_v = read.integer("linear_num_value_heads", 1, MOST_HEADS, 32)
    n_k = read.integer("linear_num_key_heads", 1, MOST_HEADS, 16)
    if n_v % n_k:
        raise read.error("linear_num_value_heads", f"is {n_v}, must be a multiple of linear_num_key_heads {n_k}")
    return DeltaRule(
        n_k_heads=n_k,
        n_v_heads=n_v,
        k_dim=read.integer("linear_key_head_dim", 1, MOST_WIDE, 128),
        v_dim=read.integer("linear_value_head_dim", 1, MOST_WIDE, 128),
        n_taps=read.integer("linear_conv_kernel_dim", 2, MOST_TAPS, 4),
        norm=Norm("rms", read.number("rms_norm_eps", 1e-30, 1.0, 1e-6)),
        activation=read_activation(read, "hidden_act", "silu"),
        tiled=read.flag("linear_heads_tiled", False),
    )


def olmo_delta_rule(read: ConfigReader) -> DeltaRule:
    """As many heads as attention has, k heads three quarters of the hidden size together, by default."""
    hidden, n_heads = read.integer("hidden_size", 1, 1 << 20), read.integer("num_attention_heads", 1, 1024)
    n_k = read.integer("linear_num_key_heads", 1, MOST_HEADS, n_heads)
    k_dim = read.integer("linear_key_head_dim", 1, MOST_WIDE, int(0.75 * hidden / n_k))
    values = {"linear_num_key_heads": n_k, "linear_key_head_dim": k_dim}
    read.config = {**read.config, **values}
    for key, value in (("linear_num_value_heads", n_heads), ("linear_value_head_dim", 2 * k_dim)):
        if read.config.get(key) is None:
            read.config = {**read.config, key: value}
    rule = delta_rule(read)
    return replace(rule, norm=Norm("rms", 1e-5), negative=read.flag("linear_allow_neg_eigval", True))


def every_fourth(key: str = "full_attention_interval") -> Kinds:
    """Each n-th layer has attention, the others a recurrence; `key` names the n of a config."""

    def kinds(read: ConfigReader, n_layers: int) -> list[str]:
        step = read.integer(key, 1, 1024, 4)
        return [LINEAR if (i + 1) % step else FULL for i in range(n_layers)]

    return kinds


def olmo_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """Each fourth layer has attention, or else the last."""
    del read
    kinds = [LINEAR if i % 4 != 3 else FULL for i in range(n_layers)]
    return kinds if FULL in kinds else [*kinds[:-1], FULL]


def olmo_hybrid(read: ConfigReader, t: Traits) -> Traits:
    """A theta of null stands for no rotation."""
    rope = read.config.get("rope_scaling") or read.config.get("rope_parameters") or {}
    theta = read.config.get("rope_theta", t.theta)
    if isinstance(rope, Mapping) and rope.get("rope_theta", theta) is not None:
        return t
    dropped = ("rope_scaling", "rope_parameters", "rope_theta")
    read.config = {key: value for key, value in read.config.items() if key not in dropped}
    return replace(t, no_rope=unrotated)


def olmo_norms(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Recurrent layers have norms before both halves, the others behind them."""
    del read
    norm = c.final_norm
    layers = [
        replace(layer, before_attention=norm, before_mlp=norm, after_attention=None, after_mlp=None)
        if layer.mixer
        else layer
        for layer in c.layers
    ]
    return replace(c, layers=tuple(layers))


def gated(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Attention has a gate of its result. Heads for further tokens, which only drafts need, are left out."""
    if read.config.get("attention_bias"):
        raise read.unsupported("attention_bias", "gates with a bias are not offered")
    if any(c.rope.get(key) == "mrope" for key in ("rope_type", "type")):
        raise read.unsupported("rope_parameters", "rope_type 'mrope' is not offered in this family")
    c = mrope(read, c)
    left_out = ("heads for drafts (MTP)",) if read.config.get("mtp_num_hidden_layers") else ()
    layers = [replace(layer, attention=replace(layer.attention, gated=True)) for layer in c.layers]
    return replace(c, layers=tuple(layers), left_out=(*c.left_out, *left_out))


def qwen3_next_experts(read: ConfigReader, n_layers: int) -> Sequence[Experts | None]:
    """As in Qwen2-MoE, with other defaults."""
    return with_gated_shared(read, n_layers, n_experts=512, n_chosen=10, size=512, shared=512, renormalized=True)


def qwen3_5_experts(read: ConfigReader, n_layers: int) -> Sequence[Experts | None]:
    """In every layer; weights are always divided by their sum."""
    n, chosen = counts(read, 256, 8)
    experts = Experts(
        router=Router(n_experts=n, n_chosen=chosen, renormalized=True),
        size=width(read, "moe_intermediate_size", 512),
        activation=read_activation(read, "hidden_act", "silu"),
        shared=width(read, "shared_expert_intermediate_size", 512),
        shared_gated=True,
    )
    return [experts] * n_layers


# ---- State space models ---------------------------------------------------------------------------------------------

# Names that a family has for the fields of `mamba2`.
_NAMES: Mapping[str, str] = {
    "n_heads": "mamba_n_heads",
    "d_head": "mamba_d_head",
    "n_groups": "mamba_n_groups",
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias",
    "proj_bias": "mamba_proj_bias",
    "eps": "rms_norm_eps",
    "act": "hidden_act",
}


def time_steps(read: ConfigReader) -> tuple[float, float]:
    """`time_step_limit`, the bounds of time steps; 0 for no upper one. transformers writes infinity as an object."""
    limits = read.config.get("time_step_limit", [0.0, None])
    if not isinstance(limits, list) or len(limits) != 2:
        raise read.error("time_step_limit", "must be a list of two numbers")
    low, high = (0.0 if i == 0 and x is None else x for i, x in enumerate(limits))
    if high in (None, {"__float__": "Infinity"}, "Infinity"):
        high = math.inf
    for bound in (low, high):
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound >= 0:
            raise read.error("time_step_limit", "must be two numbers, 0 or more")
    if high == 0 or low > high:
        raise read.error("time_step_limit", "must be two numbers, the second larger")
    return float(low), 0.0 if math.isinf(high) else float(high)


def mamba2(
    read: ConfigReader, names: Mapping[str, str] = _NAMES, inner: int | None = None, *, eps: float = 1e-6
) -> Mamba2:
    """A state space layer.

    Args:
        read: the config.
        names: of its fields.
        inner: columns that the heads must have together; None for `mamba_expand` times the hidden size.
        eps: default of the norm's.
    """
    if inner is None:
        inner = read.integer("mamba_expand", 1, 64, 2) * read.integer("hidden_size", 1, _MAX_WIDTH)
    n_heads = read.integer(names["n_heads"], 1, MOST_HEADS, 128)
    n_groups = read.integer(names["n_groups"], 1, n_heads, 1)
    if read.config.get(names["d_head"]) == "auto":
        read.config = {key: value for key, value in read.config.items() if key != names["d_head"]}
    head_dim = read.integer(names["d_head"], 1, MOST_WIDE, max(1, inner // n_heads))
    if head_dim * n_heads != inner:
        raise read.error(names["n_heads"], f"is {n_heads}: heads of {head_dim} do not fill {inner} columns")
    if n_heads % n_groups:
        raise read.error(names["n_groups"], f"is {n_groups}, must divide the {n_heads} heads")
    low, limit = time_steps(read)
    bias = read.flag(names["proj_bias"], False)
    return Mamba2(
        n_heads=n_heads,
        head_dim=head_dim,
        n_groups=n_groups,
        state_dim=read.integer(names["d_state"], 1, MOST_WIDE, 256),
        n_taps=read.integer(names["d_conv"], 2, MOST_TAPS, 4),
        conv_bias=read.flag(names["conv_bias"], True),
        activation=read_activation(read, names["act"], "silu"),
        bias=bias,
        out_bias=bias,
        dt_low=low,
        dt_limit=limit,
        norm=Norm("rms", read.number(names["eps"], 1e-30, 1.0, eps)),
        n_norm_groups=n_groups,
    )


def granite_hybrid(read: ConfigReader, t: Traits) -> Traits:
    """Without `position_embedding_type` nothing is rotated. Without experts the shared MLP is the only one."""
    kind = read.config.get("position_embedding_type")
    if kind not in (None, "rope", "nope"):
        raise read.unsupported("position_embedding_type", "only rope or none is offered")
    if read.config.get("num_local_experts", 8) == 0:
        size = read.integer("shared_intermediate_size", 1, _MAX_WIDTH, 1024)
        read.config = {**read.config, "intermediate_size": size}
    t = granite(read, t)
    return t if kind == "rope" else replace(t, no_rope=unrotated)


def unrotated(_: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    return [True] * len(kinds)


def all_linear(_: ConfigReader, n_layers: int) -> list[str]:
    return [LINEAR] * n_layers


def granite_hybrid_experts(read: ConfigReader, n_layers: int) -> Sequence[Experts | None]:
    """Weights are the softmax over those chosen."""
    if read.config.get("num_experts", 8) == 0:
        return [None] * n_layers
    n, chosen = counts(read, 8, 2)
    experts = Experts(
        router=Router(n_experts=n, n_chosen=chosen, scores="chosen"),
        size=width(read, "intermediate_size", 11008),
        activation=read_activation(read, "hidden_act", "silu"),
        shared=width(read, "shared_intermediate_size", 1024),
    )
    return [experts] * n_layers


def bamba_mamba(read: ConfigReader) -> Mamba2:
    return mamba2(read, eps=1e-5)


def bamba(read: ConfigReader, t: Traits) -> Traits:
    return unlisted(read, t, "attn_layer_indices names the layers with attention")


def unlisted(read: ConfigReader, t: Traits, problem: str) -> Traits:
    """Refuses lists of kinds, which transformers does not take in some families."""
    for key in ("layer_types", "layers_block_type"):
        if key in read.config:
            raise read.unsupported(key, problem)
    return t


def bamba_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    full = read.config.get("attn_layer_indices") or []
    if not isinstance(full, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in full):
        raise read.error("attn_layer_indices", "must be a list of layers")
    return [FULL if i in full else LINEAR for i in range(n_layers)]


def _factor(read: ConfigReader, key: str) -> float:
    return read.number(key, -1e6, 1e6, 1.0)


def _factors(read: ConfigReader, key: str, n: int) -> tuple[float, ...]:
    values = read.config.get(key)
    if values is None:
        return (1.0,) * n
    if not isinstance(values, list) or len(values) != n or any(isinstance(x, bool) for x in values):
        raise read.error(key, f"must be a list of {n} numbers")
    if any(not isinstance(x, int | float) or not abs(x) < 1e6 for x in values):
        raise read.error(key, f"must be a list of {n} numbers")
    return tuple(map(float, values))


def falcon_h1(read: ConfigReader, t: Traits) -> Traits:
    """Factors of embeddings and logits (muP)."""
    t = unlisted(read, t, "all layers of this family are alike")
    return replace(
        t, embedding_scale=_factor(read, "embedding_multiplier"), logit_scale=_factor(read, "lm_head_multiplier")
    )


def falcon_h1_layers(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """A state space model beside the attention of each layer, and factors of both. That on keys is one on scores."""
    inner = None
    if read.config.get("mamba_d_ssm", 1024) is not None:
        inner = read.integer("mamba_d_ssm", 1, _MAX_WIDTH, 1024)
    is_normed = read.flag("mamba_rms_norm", False)
    mixer = replace(
        mamba2(read, inner=inner),
        norm=Norm("rms", c.rms_norm_eps) if is_normed else None,
        gate_first=not (is_normed and read.flag("mamba_norm_before_gate", True)),
        out_bias=read.flag("projectors_bias", False),
        in_scale=_factor(read, "ssm_in_multiplier"),
        scales=_factors(read, "ssm_multipliers", 5),
        out_scale=_factor(read, "ssm_out_multiplier"),
    )
    gate, down = _factors(read, "mlp_multipliers", 2)
    keys = read.number("key_multiplier", 1e-9, 1e6, 1.0)
    layers = []
    for layer in c.layers:
        attention = replace(
            layer.attention,
            scale=layer.attention.scale * keys,
            in_scale=_factor(read, "attention_in_multiplier"),
            out_scale=_factor(read, "attention_out_multiplier"),
        )
        mlp = replace(layer.mlp, gate_scale=gate, out_scale=down)
        layers.append(replace(layer, attention=attention, mlp=mlp, mixer=mixer))
    return replace(c, layers=tuple(layers))


# ---- Nemotron-H -----------------------------------------------------------------------------------------------------

_LETTERS = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
_OLD = {"mamba": LINEAR, "attention": FULL}
_NEMOTRON: Mapping[str, str] = {
    "n_heads": "mamba_num_heads",
    "d_head": "mamba_head_dim",
    "n_groups": "n_groups",
    "d_state": "ssm_state_size",
    "d_conv": "conv_kernel",
    "conv_bias": "use_conv_bias",
    "proj_bias": "use_bias",
    "eps": "layer_norm_epsilon",
    "act": "mamba_hidden_act",
}
_OLD_NEMOTRON = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_conv_bias": "use_conv_bias",
}


def _nemotron_kinds(read: ConfigReader) -> list[str]:
    """What each layer is: a state space model, attention, an MLP or a mixture of experts, and nothing else."""
    key = next((key for key in ("layer_types", "layers_block_type") if read.config.get(key) is not None), "")
    kinds: Any = read.config.get(key) if key else [LINEAR, "moe", FULL, "mlp"]
    if not key and "hybrid_override_pattern" in read.config:
        key, pattern = "hybrid_override_pattern", read.config["hybrid_override_pattern"]
        kinds = [_LETTERS.get(letter, letter) for letter in pattern] if isinstance(pattern, str) else None
    known = (*_LETTERS.values(), *_OLD)
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= 1024 or any(kind not in known for kind in kinds):
        raise read.error(key, f"must list {', '.join(_LETTERS.values())}")
    return [_OLD.get(str(kind), str(kind)) for kind in kinds]


def nemotron_h(read: ConfigReader, t: Traits) -> Traits:
    kinds = _nemotron_kinds(read)
    config = dict(read.config)
    for old, name in _OLD_NEMOTRON.items():
        if old in config:
            config[name] = config[old]
    layer_types = [LINEAR if kind == LINEAR else FULL for kind in kinds]
    read.config = {**config, "num_hidden_layers": len(kinds), "layer_types": layer_types, "layers_block_type": kinds}
    return t


def nemotron_mamba(read: ConfigReader) -> Mamba2:
    """transformers takes `time_step_min` as the bound of time steps, whatever `time_step_limit` says."""
    read.config = {key: value for key, value in read.config.items() if key != "time_step_limit"}
    heads = read.integer("mamba_num_heads", 1, MOST_HEADS, 128)
    head_dim = read.integer("mamba_head_dim", 1, MOST_WIDE, 64)
    for key, value in (("n_groups", 8), ("ssm_state_size", 128), ("mamba_head_dim", head_dim)):
        if read.config.get(key) is None:
            read.config = {**read.config, key: value}
    least = read.number("time_step_min", 0.0, 1e6, 1e-3)
    return replace(mamba2(read, _NEMOTRON, heads * head_dim, eps=1e-5), dt_low=least, dt_limit=0.0)


def nemotron_layers(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    layers, n_kv = [], 0
    for layer, kind in zip(c.layers, read.config["layers_block_type"], strict=True):
        if kind == "moe":
            raise read.unsupported("layers_block_type", "mixtures of experts are not offered in this family")
        norm = c.final_norm
        is_mlp = kind == "mlp"
        layers.append(
            replace(
                layer,
                attention=replace(layer.attention, kv=n_kv),
                attends=kind == FULL,
                has_mlp=is_mlp,
                before_attention=None if is_mlp else norm,
                before_mlp=norm if is_mlp else None,
            )
        )
        n_kv += kind == FULL
    left_out = ("heads for drafts (MTP)",) if read.config.get("num_nextn_predict_layers") else ()
    return replace(c, layers=tuple(layers), left_out=(*c.left_out, *left_out))
