"""The model families, by `model_type` of config.json: one row each.

All of them are the decoder of models/decoder.py. A row says how its config and layers differ from Llama's; see
`Traits`. Where only the config decides, a short function above the table does. Names of tensors that differ from
Llama's are in formats/family_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fabula.errors import ModelFileError, Unsupported
from fabula.models.config import ConfigReader, Kinds, Traits, read_config
from fabula.models.description import ModelConfig, Temperature

FULL, SLIDING = "full_attention", "sliding_attention"
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


# ---- Kinds of layers ------------------------------------------------------------------------------------------------


def _every(n: int, *, key: str = "", first: bool = False) -> Kinds:
    """Windows in all layers but each n-th (the last of n, or the first); `key` names the n of a config."""

    def kinds(read: ConfigReader, n_layers: int) -> list[str]:
        step = read.integer(key, 1, 1024, n) if key else n
        rest = 0 if first else step - 1
        return [FULL if i % step == rest else SLIDING for i in range(n_layers)]

    return kinds


def _all_sliding(read: ConfigReader, n_layers: int) -> list[str]:
    """All layers have a window, if there is one."""
    is_off = "sliding_window" in read.config and read.config["sliding_window"] is None
    return [FULL if is_off else SLIDING] * n_layers


def _smollm3_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    windowed = read.flag("use_sliding_window", False) and read.config.get("sliding_window") is not None
    return [SLIDING if windowed and skipped else FULL for skipped in _no_rope_layers(read, [FULL] * n_layers)]


def _no_rope_layers(read: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    """`no_rope_layers` has 1 for a layer with rotation; by default each fourth has none."""
    flags = read.config.get("no_rope_layers")
    if flags is None:
        step = read.integer("no_rope_layer_interval", 1, 1024, 4)
        return [(i + 1) % step == 0 for i in range(len(kinds))]
    if not isinstance(flags, list) or len(flags) != len(kinds) or any(flag not in (0, 1) for flag in flags):
        raise read.error("no_rope_layers", f"must list 0 or 1 for each of {len(kinds)} layers")
    return [not flag for flag in flags]


def _full_unrotated(_: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    return [kind == FULL for kind in kinds]


def _full_unrotated_beside_windows(read: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    return [kind == FULL and read.config.get("sliding_window", 0) is not None for kind in kinds]


# ---- What only a config decides -------------------------------------------------------------------------------------


def _refuse(key: str) -> Callable[[ConfigReader, Traits], Traits]:
    """Refuses a config where `key` is set."""

    def adapt(read: ConfigReader, t: Traits) -> Traits:
        if read.config.get(key):
            raise read.unsupported(key, "not offered for this family")
        return t

    return adapt


def _granite(read: ConfigReader, t: Traits) -> Traits:
    def number(key: str) -> float:
        return read.number(key, -1e6, 1e6, 1.0)

    return replace(
        t,
        embedding_scale=number("embedding_multiplier"),
        residual_scale=number("residual_multiplier"),
        score_scale=number("attention_multiplier"),
        logit_scale=1 / read.number("logits_scaling", 1e-6, 1e6, 1.0),
    )


def _internlm3(read: ConfigReader, t: Traits) -> Traits:
    if read.flag("attention_bias", False) != read.flag("mlp_bias", False):
        raise read.unsupported("bias", "qkv_bias and bias must be the same")
    return t


def _iquest(read: ConfigReader, t: Traits) -> Traits:
    return _refuse("clip_qkv")(read, _refuse("use_sliding_window")(read, t))


def _ministral3(read: ConfigReader, t: Traits) -> Traits:
    rope = read.config.get("rope_scaling") or read.config.get("rope_parameters") or t.rope
    if not isinstance(rope, Mapping) or rope.get("llama_4_scaling_beta") is None:
        raise read.error("rope_parameters", "must have a llama_4_scaling_beta in this family")
    beta, length = rope["llama_4_scaling_beta"], rope.get("original_max_position_embeddings")
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not abs(beta) < 1e6:
        raise read.error("rope_parameters", f"llama_4_scaling_beta is {beta!r}, must be a number")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise read.error("rope_parameters", f"original_max_position_embeddings is {length!r}, must be at least 1")
    return replace(t, temperature=Temperature(float(beta), length))


def _gemma(read: ConfigReader, t: Traits) -> Traits:
    t = _refuse("use_bidirectional_attention")(read, t)
    if read.config.get(t.activation[0]) == "gelu" and t.activation[0] == "hidden_act":
        read.config = {**read.config, "hidden_act": "gelu_pytorch_tanh"}  # what released configs mean by it
    return replace(t, embedding_scale=read.integer("hidden_size", 1, 1 << 20) ** 0.5)


def _gemma2(read: ConfigReader, t: Traits) -> Traits:
    """Gemma 2 and 3: soft caps, and a score scale of its own."""
    return replace(
        _gemma(read, t),
        score_scale=read.number("query_pre_attn_scalar", 1e-6, 1e6, 256) ** -0.5,
        score_cap=read.number("attn_logit_softcapping", 0.0, 1e6, t.score_cap or None, nullable=True),
        logit_cap=read.number("final_logit_softcapping", 0.0, 1e6, t.logit_cap or None, nullable=True),
    )


def _phi3(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Phi-3 calls its scaling longrope, su or yarn, and has the trained length beside it."""
    rope = dict(c.rope)
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise read.unsupported("rope_scaling" if read.config.get("rope_scaling") else "rope_parameters", "not longrope")
    if kind != "default":
        rope["rope_type"] = "longrope"
        original = read.integer("original_max_position_embeddings", 1, 1 << 24, 4096)
        rope["original_max_position_embeddings"] = original
    return replace(c, rope=rope, ropes=((rope, c.head_dim),))


def _olmo(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, qkv_clip=read.number("clip_qkv", 0.0, 1e6, None, nullable=True))


def _cohere(read: ConfigReader, t: Traits) -> Traits:
    has_norms = t.qk_norm == "heads" and read.flag("use_qk_norm", False)
    return replace(t, qk_norm="heads" if has_norms else "", logit_scale=read.number("logit_scale", -1e6, 1e6, 0.0625))


def _stablelm(read: ConfigReader, t: Traits) -> Traits:
    return replace(
        t,
        qk_norm="heads" if read.flag("qk_layernorm", False) else "",
        parallel="one" if read.flag("use_parallel_residual", False) else "",
    )


def _hunyuan(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """A fixed alpha in place of dynamic scaling: theta grows by alpha^(dim / (dim - 2))."""
    rope = dict(c.rope)
    alpha = rope.get("alpha")
    if rope.get("rope_type", rope.get("type")) != "dynamic" or not alpha:
        return c
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise read.error("rope_parameters", f"alpha is {alpha!r}, must be a number above 0")
    rope |= {"rope_type": "default", "rope_theta": rope["rope_theta"] * alpha ** (c.head_dim / (c.head_dim - 2))}
    return replace(c, rope=rope, ropes=((rope, c.head_dim),))


def _neox(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, parallel="two" if read.flag("use_parallel_residual", True) else "")


def _gpt2(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Scores may have no scale, or one that shrinks with the layer."""
    scale = c.head_dim**-0.5 if read.flag("scale_attn_weights", True) else 1.0
    shrinks = read.flag("scale_attn_by_inverse_layer_idx", False)
    layers = [
        replace(layer, attention=replace(layer.attention, scale=scale / (i + 1 if shrinks else 1)))
        for i, layer in enumerate(c.layers)
    ]
    return replace(c, layers=tuple(layers))


def _gptj(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, rope={"rope_theta": 10000.0, "rotary_dim": read.integer("rotary_dim", 2, 1024, 64)})


def _falcon(read: ConfigReader, t: Traits) -> Traits:
    """Three generations: one KV head beside parallel halves, or none of both, or a few KV heads and two norms."""
    for key in ("alibi",):
        t = _refuse(key)(read, t)
    grouped, parallel = read.flag("new_decoder_architecture", False), read.flag("parallel_attn", True)
    n_norms = read.integer("num_ln_in_parallel_attn", 1, 2, 2 if grouped else 1)
    if (grouped and not parallel) or (n_norms == 2 and not (grouped and parallel)):
        raise read.unsupported("num_ln_in_parallel_attn" if parallel else "parallel_attn", "no released model has that")
    one_kv_head = not grouped and read.flag("multi_query", True)
    if one_kv_head:
        read.config = {**read.config, "num_key_value_heads": 1}
    return replace(
        t,
        qkv="stacked" if one_kv_head else "grouped",
        parallel="" if not parallel else "two" if n_norms == 2 else "one",
    )


# Llama 3 scaling that Apertus and CWM configs stand for where they have none.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}

_GEMMA2 = Traits(
    context_length=8192,
    n_kv_heads=4,
    head_dim=256,
    tied=True,
    windowed="always",
    kinds=_every(2),
    norms="sandwich",
    norm_offset=1.0,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    score_cap=50.0,
    logit_cap=30.0,
    adapt=_gemma2,
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
    adapt=_cohere,
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
            adapt=_internlm3,
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
            adapt=_iquest,
        ),
    ),
    "ministral": Family(
        "Ministral", Traits(**_NO_BIAS, windowed="always", context_length=131072, n_kv_heads=8, kinds=_all_sliding)
    ),
    # Mistral AI 2025: queries grow with their position.
    "ministral3": Family(
        "Ministral 3",
        Traits(
            **_NO_BIAS,
            windowed="always",
            window=None,
            context_length=262144,
            n_kv_heads=8,
            head_dim=128,
            eps=("rms_norm_eps", 1e-5),
            rope=_YARN
            | {"rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
            | {"llama_4_scaling_beta": 0.1},
            adapt=_ministral3,
        ),
    ),
    # Meta 2025, Code World Model: windows in three of four layers.
    "cwm": Family(
        "CWM",
        Traits(
            **_NO_BIAS,
            windowed="always",
            window=8192,
            kinds=_every(4, first=True),
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
            kinds=_smollm3_kinds,
            no_rope=_no_rope_layers,
            context_length=32768,
            n_kv_heads=4,
            theta=2e6,
            tied=True,
            mlp_bias=("mlp_bias", False),
        ),
    ),
    # IBM 2024: factors on embeddings, residuals, scores and logits.
    "granite": Family("Granite", Traits(mlp_bias=("mlp_bias", False), adapt=_granite)),
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
            adapt=_gemma,
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
            kinds=_every(6, key="sliding_window_pattern"),
            rope_by_kind=True,
            theta=1e6,
            local_theta=("rope_local_base_freq", 10000.0),
            qk_norm="head",
            score_cap=0.0,
            logit_cap=0.0,
        ),
    ),
    # Microsoft 2024: fused projections, longrope, partial rotation in Phi-4-mini.
    "phi3": Family(
        "Phi-3",
        Traits(
            **_NO_BIAS,
            windowed="always",
            window=None,
            context_length=4096,
            eps=("rms_norm_eps", 1e-5),
            rotated=1.0,
            finish=_phi3,
        ),
    ),
    # Groeneveld et al. 2024: layer norms without weights.
    "olmo": Family("OLMo", Traits(norm="layer", norm_weighted=False, eps=("", 1e-5), adapt=_olmo)),
    # OLMo team 2025: norms behind both halves, and on whole rows of q and k.
    "olmo2": Family("OLMo 2", _OLMO2),
    "olmo3": Family(
        "OLMo 3",
        replace(
            _OLMO2,
            windowed="always",
            kinds=_every(4),
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
            kinds=_every(4, key="sliding_window_pattern"),
            no_rope=_full_unrotated_beside_windows,
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
            kinds=_every(4, key="sliding_window_pattern"),
            no_rope=_full_unrotated,
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
            adapt=_stablelm,
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
        "Hunyuan", Traits(eps=("rms_norm_eps", 1e-5), qk_norm="head", qk_norm_rotated=True, finish=_hunyuan)
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
            finish=_gpt2,
            adapt=_refuse("add_cross_attention"),
            context_length=1024,
            qkv_bias=True,
            output_bias=True,
        ),
    ),
    # Wang & Komatsuzaki 2021: both halves beside each other.
    "gptj": Family("GPT-J", Traits(**_GPT, **_NO_BIAS, interleaved=True, parallel="one", head_bias=True, adapt=_gptj)),
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
            adapt=_neox,
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
            adapt=_refuse("qk_layernorm"),
        ),
    ),
    # Almazrouei et al. 2023. Falcon 3 is Llama.
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
            adapt=_falcon,
        ),
    ),
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
