"""What the rows of families say in functions: kinds of layers, and what only a config decides.

An `adapt` function sets traits by a config's fields; a `finish` function changes the finished description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fabula.lean_dataclasses import replace
from fabula.models.config import ConfigReader, Kinds, Traits
from fabula.models.description import ModelConfig, Norm, Temperature

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


# ---- Kinds of layers ------------------------------------------------------------------------------------------------


def every(n: int, *, key: str = "", first: bool = False) -> Kinds:
    """Windows in all layers but each n-th (the last of n, or the first); `key` names the n of a config."""

    def kinds(read: ConfigReader, n_layers: int) -> list[str]:
        step = read.integer(key, 1, 1024, n) if key else n
        rest = 0 if first else step - 1
        return [FULL if i % step == rest else SLIDING for i in range(n_layers)]

    return kinds


def all_sliding(read: ConfigReader, n_layers: int) -> list[str]:
    """All layers have a window, if there is one."""
    is_off = "sliding_window" in read.config and read.config["sliding_window"] is None
    return [FULL if is_off else SLIDING] * n_layers


def all_full(_: ConfigReader, n_layers: int) -> list[str]:
    return [FULL] * n_layers


def smollm3_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    windowed = read.flag("use_sliding_window", False) and read.config.get("sliding_window") is not None
    return [SLIDING if windowed and skipped else FULL for skipped in no_rope_layers(read, [FULL] * n_layers)]


def no_rope_layers(read: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    """`no_rope_layers` has 1 for a layer with rotation; by default each fourth has none."""
    flags = read.config.get("no_rope_layers")
    if flags is None:
        step = read.integer("no_rope_layer_interval", 1, 1024, 4)
        return [(i + 1) % step == 0 for i in range(len(kinds))]
    if not isinstance(flags, list) or len(flags) != len(kinds) or any(flag not in (0, 1) for flag in flags):
        raise read.error("no_rope_layers", f"must list 0 or 1 for each of {len(kinds)} layers")
    return [not flag for flag in flags]


def full_unrotated(_: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    return [kind == FULL for kind in kinds]


def full_unrotated_beside_windows(read: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    return [kind == FULL and read.config.get("sliding_window", 0) is not None for kind in kinds]


# ---- What only a config decides -------------------------------------------------------------------------------------


def refuse(key: str) -> Callable[[ConfigReader, Traits], Traits]:
    """Refuses a config where `key` is set."""

    def adapt(read: ConfigReader, t: Traits) -> Traits:
        if read.config.get(key):
            raise read.unsupported(key, "not offered for this family")
        return t

    return adapt


def granite(read: ConfigReader, t: Traits) -> Traits:
    def number(key: str) -> float:
        return read.number(key, -1e6, 1e6, 1.0)

    return replace(
        t,
        embedding_scale=number("embedding_multiplier"),
        residual_scale=number("residual_multiplier"),
        score_scale=read.number("attention_multiplier", 1e-9, 1e6, 1.0),
        logit_scale=1 / read.number("logits_scaling", 1e-6, 1e6, 1.0),
    )


def internlm3(read: ConfigReader, t: Traits) -> Traits:
    if read.flag("attention_bias", False) != read.flag("mlp_bias", False):
        raise read.unsupported("bias", "qkv_bias and bias must be the same")
    return t


def iquest(read: ConfigReader, t: Traits) -> Traits:
    return refuse("clip_qkv")(read, refuse("use_sliding_window")(read, t))


def ministral3(read: ConfigReader, t: Traits) -> Traits:
    rope = read.config.get("rope_scaling") or read.config.get("rope_parameters") or t.rope
    if not isinstance(rope, Mapping) or rope.get("llama_4_scaling_beta") is None:
        raise read.error("rope_parameters", "must have a llama_4_scaling_beta in this family")
    beta, length = rope["llama_4_scaling_beta"], rope.get("original_max_position_embeddings")
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not abs(beta) < 1e6:
        raise read.error("rope_parameters", f"llama_4_scaling_beta is {beta!r}, must be a number")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise read.error("rope_parameters", f"original_max_position_embeddings is {length!r}, must be at least 1")
    return replace(t, temperature=Temperature(float(beta), length))


def gemma(read: ConfigReader, t: Traits) -> Traits:
    t = refuse("use_bidirectional_attention")(read, t)
    if read.config.get(t.activation[0]) == "gelu" and t.activation[0] == "hidden_act":
        read.config = {**read.config, "hidden_act": "gelu_pytorch_tanh"}  # what released configs mean by it
    return replace(t, embedding_scale=read.integer("hidden_size", 1, 1 << 20) ** 0.5)


def gemma2(read: ConfigReader, t: Traits) -> Traits:
    """Gemma 2 and 3: soft caps, and a score scale of its own. Gemma 3 does not cap scores."""
    caps = t.score_cap > 0
    return replace(
        gemma(read, t),
        score_scale=read.number("query_pre_attn_scalar", 1e-6, 1e6, 256) ** -0.5,
        score_cap=read.number("attn_logit_softcapping", 0.0, 1e6, t.score_cap, nullable=True) if caps else 0.0,
        logit_cap=read.number("final_logit_softcapping", 0.0, 1e6, t.logit_cap or None, nullable=True),
    )


def phi3(read: ConfigReader, c: ModelConfig) -> ModelConfig:
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


def phimoe(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, head_bias=read.flag("lm_head_bias", False))


def phimoe_rope(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """longrope with a factor on cos and sin for short contexts and one for long ones.

    As in the published code, long contexts have the list of long factors; transformers 5.24 takes the short list for
    all.
    """
    rope = dict(c.rope)
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return c
    name = "rope_scaling" if read.config.get("rope_scaling") else "rope_parameters"
    if kind != "longrope":
        raise read.unsupported(name, "not longrope")
    scales = [rope.pop(key, None) for key in ("short_mscale", "long_mscale")]
    if not all(isinstance(scale, int | float) and not isinstance(scale, bool) for scale in scales):
        raise read.error(name, "must have the numbers short_mscale and long_mscale in this family")
    if not isinstance(rope.get("original_max_position_embeddings"), int):
        raise read.error(name, "must have original_max_position_embeddings in this family")
    rope["attention_factors"] = scales
    return replace(c, rope=rope, ropes=((rope, c.head_dim),))


def olmo(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, qkv_clip=read.number("clip_qkv", 0.0, 1e6, None, nullable=True))


def cohere(read: ConfigReader, t: Traits) -> Traits:
    has_norms = t.qk_norm == "heads" and read.flag("use_qk_norm", False)
    return replace(t, qk_norm="heads" if has_norms else "", logit_scale=read.number("logit_scale", -1e6, 1e6, 0.0625))


def phi(read: ConfigReader, t: Traits) -> Traits:
    if not read.flag("qk_layernorm", False):
        return t
    return replace(t, qk_norm="head", qk_norm_kind="layer", qk_norm_biased=True)


def bloom(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    del read
    return replace(c, embedding_norm=c.final_norm)


def mpt(read: ConfigReader, t: Traits) -> Traits:
    """Settings of attention are in an object of their own.

    transformers 5.24 takes slopes of 8 whatever `alibi_bias_max` says; here it counts, as in the published code and in
    llama.cpp. What transformers ignores and that code does not is refused.
    """
    about = read.config.get("attn_config")
    if about is not None and not isinstance(about, Mapping):
        raise read.error("attn_config", f"is {about!r}, must be an object")
    attention = ConfigReader(about or {}, read.path)
    usual = {"alibi": True, "attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "kv_n_heads": None}
    usual |= {"qk_gn": False, "rope": False, "sliding_window_size": -1}
    for key, value in usual.items():
        if attention.config.get(key, value) not in (value, None):
            raise read.unsupported("attn_config", f"{key} other than {value} is not offered")
    for key, value in {"expansion_ratio": 4, "logit_scale": None, "no_bias": True}.items():
        if read.config.get(key, value) != value:
            raise read.unsupported(key, f"only {value} is offered")
    if "layernorm" not in str(read.config.get("norm_type", "layernorm")).lower():
        raise read.unsupported("norm_type", "only layer norms are offered")
    scale = attention.config.get("softmax_scale")
    return replace(
        t,
        alibi=attention.number("alibi_bias_max", 1e-3, 1e3, 8.0),
        qkv_clip=attention.number("clip_qkv", 0.0, 1e6, None, nullable=True),
        score_scale=None if scale is None else attention.number("softmax_scale", 1e-9, 1e6, None),
    )


def stablelm(read: ConfigReader, t: Traits) -> Traits:
    return replace(
        t,
        qk_norm="heads" if read.flag("qk_layernorm", False) else "",
        parallel="one" if read.flag("use_parallel_residual", False) else "",
    )


def hunyuan(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """A fixed alpha in place of dynamic scaling: theta grows by alpha^(dim / (dim - 2))."""
    rope = dict(c.rope)
    alpha = rope.get("alpha")
    if rope.get("rope_type", rope.get("type")) != "dynamic" or not alpha:
        return c
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise read.error("rope_parameters", f"alpha is {alpha!r}, must be a number above 0")
    rope |= {"rope_type": "default", "rope_theta": rope["rope_theta"] * alpha ** (c.head_dim / (c.head_dim - 2))}
    return replace(c, rope=rope, ropes=((rope, c.head_dim),))


def neox(read: ConfigReader, t: Traits) -> Traits:
    return replace(t, parallel="two" if read.flag("use_parallel_residual", True) else "")


def gpt2(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Scores may have no scale, or one that shrinks with the layer."""
    scale = c.head_dim**-0.5 if read.flag("scale_attn_weights", True) else 1.0
    shrinks = read.flag("scale_attn_by_inverse_layer_idx", False)
    layers = [
        replace(layer, attention=replace(layer.attention, scale=scale / (i + 1 if shrinks else 1)))
        for i, layer in enumerate(c.layers)
    ]
    return replace(c, layers=tuple(layers))


def gptj(read: ConfigReader, t: Traits) -> Traits:
    width = read.integer("hidden_size", 1, 1 << 20, 4096) // read.integer("num_attention_heads", 1, 1024, 16)
    if "rotary_dim" in read.config and read.config["rotary_dim"] is None:
        raise read.unsupported("rotary_dim", "no released model rotates whole rows")
    rotary_dim = read.integer("rotary_dim", 2, width, min(64, width))
    return replace(t, rope={"rope_theta": 10000.0, "rotary_dim": rotary_dim})


def shared_kv(read: ConfigReader, c: ModelConfig, shares: int) -> list[tuple[int, bool]]:
    """The KV layer of each layer, and whether it writes it: the last `shares` attend to that of the last layer of their
    kind before them, with a window or without."""
    own: dict[bool, int] = {}  # KV layer of the last layer with a window, and of the last without
    found: list[tuple[int, bool]] = []
    for i, window in enumerate(c.windows):
        writes = i < c.n_layers - shares
        if writes:
            own[window > 0] = i
        elif (window > 0) not in own:
            problem = f"is {shares}: by layer_types, layer {i} has none of its kind to share with"
            raise read.error("num_kv_shared_layers", problem)
        found.append((own[window > 0], writes))
    return found


def falcon(read: ConfigReader, t: Traits) -> Traits:
    """Three generations: one KV head beside parallel halves, or none of both, or a few KV heads and two norms."""
    if read.flag("alibi", False):
        t = replace(t, alibi=8.0, alibi_rounded=True)
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


def llama4_kinds(read: ConfigReader, n_layers: int) -> list[str]:
    """Layers with rotation attend within a chunk, if there are chunks."""
    chunked = read.config.get("attention_chunk_size", 8192) is not None
    return [FULL if skipped or not chunked else CHUNKED for skipped in no_rope_layers(read, [FULL] * n_layers)]


def llama4(read: ConfigReader, t: Traits) -> Traits:
    """Some released configs have an empty list in place of none."""
    if not read.config.get("no_rope_layers"):
        read.config = {key: value for key, value in read.config.items() if key != "no_rope_layers"}
    return replace(t, qk_norm="none" if read.flag("use_qk_norm", True) else "")


def llama4_layers(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Layers without rotation have no norms of q and k, and queries that grow with their position."""
    heat = None
    if read.flag("attn_temperature_tuning", True):
        beta = read.number("attn_scale", -1e6, 1e6, 0.1)
        heat = Temperature(beta, read.integer("floor_scale", 1, 1 << 30, 8192), 1)
    layers = [
        replace(layer, attention=replace(layer.attention, norm=None, temperature=heat))
        if layer.attention.rope < 0
        else layer
        for layer in c.layers
    ]
    return replace(c, layers=tuple(layers))


def ropes_by_kind(read: ConfigReader, t: Traits) -> Traits:
    """Each kind of layers has a rotation of its own; one for all is refused, as transformers does."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = read.config.get(key)
        if isinstance(rope, Mapping) and rope and not any(isinstance(part, Mapping) for part in rope.values()):
            raise read.unsupported(key, "one for all kinds of layers is not offered")
    return t


def mrope(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Rotation by place in an image; in a text all three positions are the same, so it is the plain one."""
    del read
    rope = {key: value for key, value in c.rope.items() if not key.startswith("mrope_")}
    for key in ("rope_type", "type"):
        if rope.get(key) == "mrope":
            rope[key] = "default"
    return replace(c, rope=rope, ropes=((rope, c.head_dim),))


def minicpm(read: ConfigReader, t: Traits) -> Traits:
    """Factors of the muP parametrization (Hu et al. 2024, arXiv:2404.06395). Source: its published modeling file."""
    hidden_size, n_layers = read.integer("hidden_size", 1, 1 << 20), read.integer("num_hidden_layers", 1, 1024)
    if read.config.get("num_experts"):
        raise read.unsupported("num_experts", "mixtures of experts are not offered")
    return replace(
        t,
        embedding_scale=read.number("scale_emb", -1e6, 1e6, 1.0),
        residual_scale=read.number("scale_depth", -1e6, 1e6, 1.0) / n_layers**0.5,
        logit_scale=read.number("dim_model_base", 1e-6, 1e9, 1.0) / hidden_size,
    )


def baichuan(read: ConfigReader, t: Traits) -> Traits:
    """The 13B models, known by their 40 layers, have ALiBi in place of rotation."""
    return replace(t, alibi=8.0 if read.integer("num_hidden_layers", 1, 1024) >= 40 else 0.0)


def baichuan_head(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """Baichuan 2 divides each row of the head by its length."""
    return replace(c, normalized_head=c.vocab_size == 125696 or read.config.get("z_loss_weight") is not None)


def muse_glimmer(read: ConfigReader, t: Traits) -> Traits:
    return replace(
        t,
        score_scale=read.number("qk_scale_factor", 1e-6, 1e6, 3.87) * read.integer("head_dim", 2, 1024, 128) ** -0.5,
        logit_scale=read.number("output_multiplier", -1e6, 1e6, 0.19611613513818404),
        logit_cap=read.number("final_logit_softcapping", 1e-6, 1e6, 20.0),
    )


def muse_glimmer_layers(read: ConfigReader, c: ModelConfig) -> ModelConfig:
    """An output gate, another epsilon behind both halves, and a norm of embeddings."""
    after = Norm("rms", read.number("post_norm_eps", 1e-30, 1.0, 1e-8))
    layers = [
        replace(layer, attention=replace(layer.attention, gated=True), after_attention=after, after_mlp=after)
        for layer in c.layers
    ]
    return replace(c, layers=tuple(layers), embedding_norm=Norm("rms", c.rms_norm_eps, weighted=False))


def from_the_end(n: int) -> Kinds:
    """The last layer, and each n-th before it, has no window."""
    return lambda _, n_layers: [FULL if (n_layers - 1 - i) % n == 0 else SLIDING for i in range(n_layers)]


def muse_glimmer_unrotated(read: ConfigReader, kinds: Sequence[str]) -> list[bool]:
    thetas = read.config.get("layer_rope_theta")
    if thetas is None:
        return [(len(kinds) - 1 - i) % 4 == 0 for i in range(len(kinds))]
    if not isinstance(thetas, list) or len(thetas) != len(kinds):
        raise read.error("layer_rope_theta", f"must list a number for each of {len(kinds)} layers")
    return [not theta for theta in thetas]
