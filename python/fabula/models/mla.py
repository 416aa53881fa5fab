"""Families with multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434), a row each, and their configs.

Of a position only a latent is kept, and one rotated part for all heads; k and v are made of it:

    latent = norm(kv_a x)      k_h = [k_b_h latent, rotated part]      v_h = v_b_h latent

models/latent.py computes attention over the latents themselves.

Source: configuration and modeling files of transformers 5.24; Kimi K2: its published config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fabula.lean_dataclasses import replace
from fabula.models import expert_rules as experts
from fabula.models import family_rules as rules
from fabula.models.config import ConfigReader, Traits, read_activation
from fabula.models.description import Experts, Latent, ModelConfig, Router
from fabula.models.family import Family
from fabula.models.rope import yarn_magnitude

_MAX_WIDTH = 1 << 20
_MAX_HEAD = 1024  # of the native library
Adapt = Callable[[ConfigReader, Traits], Traits]


# ---- Attention ------------------------------------------------------------------------------------------------------


def _with_defaults(adapt: Adapt | None = None, **defaults: Any) -> Adapt:
    """Fills in the defaults of a family's config class; `adapt` comes before the rest."""

    def adapted(read: ConfigReader, t: Traits) -> Traits:
        read.config = {**defaults, **read.config}
        if "norm_topk_prob" in read.config and read.config["norm_topk_prob"] is None:
            read.config["norm_topk_prob"] = False
        if adapt:
            t = adapt(read, t)
        n_heads, n_kv_heads = read.integer("num_attention_heads", 1, 1024), read.config.get("num_key_value_heads")
        if n_kv_heads not in (None, n_heads):
            raise read.error("num_key_value_heads", f"is {n_kv_heads!r}, must be num_attention_heads: {n_heads}")
        rotated = read.integer("qk_rope_head_dim", 2, _MAX_HEAD)
        read.config = {**read.config, "head_dim": rotated, "num_key_value_heads": n_heads}
        interleaves = t.interleaved and read.config.get("rope_interleave", True) is not None
        return replace(t, interleaved=interleaves and read.flag("rope_interleave", True))

    return adapted


def _latent(read: ConfigReader) -> Latent:
    has_q_rank = read.config.get("q_lora_rank") is not None
    found = Latent(
        rank=read.integer("kv_lora_rank", 1, _MAX_HEAD),
        q_rank=read.integer("q_lora_rank", 1, _MAX_WIDTH) if has_q_rank else 0,
        plain=read.integer("qk_nope_head_dim", 1, _MAX_WIDTH),
        rotated=read.integer("qk_rope_head_dim", 2, _MAX_HEAD),
        value=read.integer("v_head_dim", 1, _MAX_WIDTH),
    )
    if found.rank + found.rotated > _MAX_HEAD:
        raise read.unsupported("kv_lora_rank", f"with qk_rope_head_dim it makes more than {_MAX_HEAD}")
    return found


def finish(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """One KV head, the latent, for all query heads."""
    latent = _latent(read)
    scale = (latent.plain + latent.rotated) ** -0.5 * _magnitude(read, c.rope) ** 2
    layers = []
    for layer in c.layers:
        attention = replace(
            layer.attention, n_kv_heads=1, k_dim=latent.width, v_dim=latent.rank, scale=scale, latent=latent
        )
        layers.append(replace(layer, attention=attention))
    return replace(c, layers=tuple(layers), n_kv_heads=1, head_dim=latent.width)


def _magnitude(read: ConfigReader, rope: Mapping[str, Any]) -> float:
    """YaRN's factor on queries and keys, where it is not one on cos and sin."""
    all_dim = rope.get("mscale_all_dim")
    if not all_dim or (rope.get("rope_type", rope.get("type")) or "default") == "default":
        return 1.0
    about = ConfigReader(rope, read.path)
    factor = about.number("factor", 1e-9, 1e9, None)
    return yarn_magnitude(factor, about.number("mscale_all_dim", -1e6, 1e6, None))


# ---- Mixtures -------------------------------------------------------------------------------------------------------


def _deepseek_v2_experts(read: ConfigReader, n_layers: int) -> experts.Layers:
    """A softmax over all experts; of groups the one with the best expert is the best."""
    n = read.integer("n_routed_experts", 1, experts.MOST_EXPERTS)
    method = read.config["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise read.unsupported("topk_method", "supported: greedy, group_limited_greedy")
    has_groups = method == "group_limited_greedy"
    n_groups = read.integer("n_group", 1, n) if has_groups else 1
    top = read.integer("topk_group", 1, n_groups) if has_groups else 1
    if n % n_groups:
        raise read.error("n_group", f"is {n_groups}, must divide the {n} experts")
    router = Router(
        n_experts=n,
        n_chosen=read.integer("num_experts_per_tok", 1, min(n // n_groups * top, experts.MOST_CHOSEN)),
        scale=read.number("routed_scaling_factor", -1e6, 1e6, None),
        n_groups=n_groups if n_groups > 1 else 0,
        n_top_groups=top if n_groups > 1 else 0,
        rated_by_best=True,
    )
    size = experts.width(read, "moe_intermediate_size")
    made = Experts(
        router=router,
        size=size,
        activation=read_activation(read, "hidden_act", "silu"),
        shared=size * read.integer("n_shared_experts", 1, experts.MOST_EXPERTS),
    )
    dense = read.integer("first_k_dense_replace", 0, 1024)
    return [None if i < dense else made for i in range(n_layers)]


def _glm4_lite_experts(read: ConfigReader, n_layers: int) -> experts.Layers:
    """`mlp_layer_types` says which layers are dense; by default the first."""
    kinds = read.config.get("mlp_layer_types")
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (n_layers - 1)
    if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise read.error("mlp_layer_types", f"must list dense or sparse for each of {n_layers} layers")
    read.config = {**read.config, "first_k_dense_replace": 0}
    made = experts.glm4(read, n_layers)
    return [layer if kind == "sparse" else None for kind, layer in zip(kinds, made, strict=True)]


def _mistral4_experts(read: ConfigReader, n_layers: int) -> experts.Layers:
    """A softmax over all experts, without a correction."""
    return [
        layer and replace(layer, router=replace(layer.router, scores="softmax", corrected=False))
        for layer in experts.glm4(read, n_layers)
    ]


# ---- Families -------------------------------------------------------------------------------------------------------


def _mistral4(read: ConfigReader, t: Traits) -> Traits:
    """Queries grow with their position. The part of a head that is rotated is said in three ways; all must agree."""
    rotated, plain = (read.integer(key, 1, _MAX_WIDTH) for key in ("qk_rope_head_dim", "qk_nope_head_dim"))
    for key in ("rope_scaling", "rope_parameters"):
        rope = read.config.get(key)
        if isinstance(rope, Mapping) and "partial_rotary_factor" in rope:
            part = rope["partial_rotary_factor"]
            if not isinstance(part, int | float) or int((rotated + plain) * part) != rotated:
                wanted = f"qk_rope_head_dim of qk_nope_head_dim + qk_rope_head_dim, {rotated / (rotated + plain):g}"
                raise read.error(key, f"partial_rotary_factor is {part!r}, must be {wanted}")
            read.config = {**read.config, key: {k: v for k, v in rope.items() if k != "partial_rotary_factor"}}
    return rules.ministral3(read, t)


def _minicpm3(read: ConfigReader, t: Traits) -> Traits:
    """MiniCPM's factors; null means none."""
    hidden_size, n_layers = read.integer("hidden_size", 1, _MAX_WIDTH), read.integer("num_hidden_layers", 1, 1024)
    if read.config["v_head_dim"] is None:
        n_heads = read.integer("num_attention_heads", 1, 1024)
        read.config = {**read.config, "v_head_dim": hidden_size // n_heads}
    for key, none in (("scale_depth", n_layers**0.5), ("dim_model_base", hidden_size)):
        if read.config[key] is None:
            read.config = {**read.config, key: none}
    return replace(
        t,
        embedding_scale=read.number("scale_emb", -1e6, 1e6, None),
        residual_scale=read.number("scale_depth", -1e6, 1e6, None) / n_layers**0.5,
        logit_scale=read.number("dim_model_base", 1e-6, 1e9, None) / hidden_size,
    )


_V3: dict[str, Any] = {
    **{"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "num_experts_per_tok": 8},
    **{"n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "norm_topk_prob": True},
    **{"routed_scaling_factor": 2.5, "intermediate_size": 18432, "num_key_value_heads": 128},
}
_DEEPSEEK_V3 = Traits(
    context_length=4096,
    interleaved=True,
    experts=experts.glm4,
    adapt=_with_defaults(**_V3),
    finish=finish,
)

LATENT: Mapping[str, Family] = {
    # DeepSeek-AI 2024: V2, V2-Lite and V2.5.
    "deepseek_v2": Family(
        "DeepSeek V2",
        replace(
            _DEEPSEEK_V3,
            context_length=2048,
            experts=_deepseek_v2_experts,
            adapt=_with_defaults(
                rules.refuse("mlp_bias"),
                **_V3
                | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "n_group": None}
                | {"topk_group": None, "topk_method": "greedy", "first_k_dense_replace": 0, "num_experts_per_tok": None}
                | {"routed_scaling_factor": 1.0, "intermediate_size": 11008, "num_key_value_heads": None},
            ),
        ),
    ),
    # DeepSeek-AI 2024 and 2025: V3, V3.1 and R1; Moonlight and others of the same form.
    "deepseek_v3": Family("DeepSeek V3", _DEEPSEEK_V3),
    # Moonshot AI 2025: DeepSeek V3 with other counts.
    "kimi_k2": Family("Kimi K2", _DEEPSEEK_V3),
    # Zhipu AI 2026: GLM-4.7-Flash.
    "glm4_moe_lite": Family(
        "GLM-4.7-Flash",
        replace(
            _DEEPSEEK_V3,
            context_length=202752,
            eps=("rms_norm_eps", 1e-5),
            experts=_glm4_lite_experts,
            adapt=_with_defaults(
                **_V3
                | {"n_routed_experts": 64, "moe_intermediate_size": 1536, "num_experts_per_tok": 4, "n_group": 1}
                | {"topk_group": 1, "routed_scaling_factor": 1.8, "q_lora_rank": 768, "v_head_dim": 256}
                | {"qk_nope_head_dim": 192, "intermediate_size": 10240, "num_key_value_heads": 20},
            ),
        ),
    ),
    # Sarvam AI 2026: DeepSeek V3 without groups.
    "sarvam_mla": Family(
        "Sarvam MLA",
        replace(
            _DEEPSEEK_V3,
            names={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
            adapt=_with_defaults(
                **_V3
                | {"n_routed_experts": 128, "q_lora_rank": None, "n_group": 1, "topk_group": 1}
                | {"first_k_dense_replace": 1, "intermediate_size": 16384, "num_key_value_heads": None},
            ),
        ),
    ),
    # Mistral AI 2026: queries that grow with their position.
    "mistral4": Family(
        "Mistral 4",
        replace(
            _DEEPSEEK_V3,
            context_length=1048576,
            rope={
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0},
                **{"original_max_position_embeddings": 8192, "mscale": 1.0, "mscale_all_dim": 1.0},
                "llama_4_scaling_beta": 0.1,
            },
            experts=_mistral4_experts,
            adapt=_with_defaults(
                _mistral4,
                **_V3
                | {"n_routed_experts": 128, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
                | {"routed_scaling_factor": 1.0, "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_nope_head_dim": 64}
                | {"first_k_dense_replace": 0, "intermediate_size": 12288, "num_key_value_heads": 32},
            ),
        ),
    ),
    # Tencent 2026: without experts.
    "youtu": Family(
        "Youtu-LLM",
        replace(
            _DEEPSEEK_V3,
            context_length=131072,
            tied=True,
            experts=None,
            adapt=_with_defaults(**_V3 | {"intermediate_size": 6144, "num_key_value_heads": 16}),
        ),
    ),
    # OpenBMB 2024: without experts; pairs are halves of the rotated part.
    "minicpm3": Family(
        "MiniCPM3",
        Traits(
            context_length=32768,
            tied=True,
            eps=("rms_norm_eps", 1e-5),
            mlp_bias=("mlp_bias", False),
            adapt=_with_defaults(
                _minicpm3,
                **{"kv_lora_rank": 256, "q_lora_rank": 768, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64},
                **{"v_head_dim": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
                **{"intermediate_size": 6400, "num_key_value_heads": 40},
            ),
            finish=finish,
        ),
    ),
}  # fmt: skip
