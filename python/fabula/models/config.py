"""Reads the config of a decoder model from config.json and checks it before any weight is read.

Keys are Hugging Face's: both the older `rope_theta` + `rope_scaling` and the newer `rope_parameters`. The file is
untrusted, so every value is checked for type and range, and sizes against each other.

The law: a field that transformers reads either changes the logits here in the same way, or the model is refused by the
field's name. Fields that transformers ignores are ignored. `tests/test_config_flips.py` compares them field by field.
Source: configuration and modeling files of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fabula.errors import ModelFileError, Unsupported
from fabula.formats.text_part import LEFT_OUT
from fabula.lean_dataclasses import dataclass, field, replace
from fabula.models.description import (
    Activation,
    Attention,
    Experts,
    HeadNorm,
    Layer,
    Mixer,
    Mlp,
    ModelConfig,
    Norm,
    Rope,
    Temperature,
)

# Largest accepted sizes, about ten times those of the largest open models.
_MAX_LAYERS = 1024
_MAX_HEADS = 1024
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 22
_MAX_CONTEXT = 1 << 24


class ConfigReader:
    """Typed access to config.json; errors name file and key."""

    def __init__(
        self,
        config: Mapping[str, Any],
        path: Path,
        names: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        ignored: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._names = {**(names or {}), **(fields or {})}
        dropped = {*(fields or {}), *ignored}
        self.config = {key: value for key, value in config.items() if key not in dropped}
        for key, name in self._names.items():  # from here on under the usual key
            if name in config:
                if self.config.get(key, config[name]) != config[name]:
                    raise ModelFileError(
                        f"{path}: config {key!r} is {_shown(config[key])}, but {name!r} is {_shown(config[name])}",
                        path=path,
                        field=key,
                    )
                self.config = {**self.config, key: config[name]}

    def error(self, key: str, problem: str) -> ModelFileError:
        key = self._names.get(key, key)
        return ModelFileError(f"{self.path}: config {key!r} {problem}", path=self.path, field=key)

    def unsupported(self, key: str, problem: str) -> Unsupported:
        return Unsupported(f"{self.path}: config {key!r} is {_shown(self.config.get(key))}: {problem}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"is {_shown(value)}, must be a whole number in {low} .. {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None, *, nullable: bool = False) -> float:
        """A number; null is 0 if `nullable`."""
        value = self.config.get(key, default)
        if value is None and nullable:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, f"is {_shown(value)}, must be a number in {low:g} .. {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {_shown(value)}, must be true or false")
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


Flag = bool | tuple[str, bool]  # fixed for the family, or read from this key with this default
Kinds = Callable[[ConfigReader, int], list[str]]  # of n layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a family differs from Llama: the fields of its config, their defaults, and the shape of its layers.

    What only a config decides is set by `adapt`, and what no trait describes by `finish`.

    Attributes:
        names: other names of usual keys, which may be used as well;  fields: those used instead;  ignored: keys that
            the family does not read.
        context_length, n_kv_heads, head_dim, theta, tied: defaults of `max_position_embeddings`, of
            `num_key_value_heads` (None: as many as query heads, as null always means), of `head_dim` (None: hidden_size
            / num_attention_heads), of `rope_theta` and of `tie_word_embeddings`.
        reads_head_dim: whether `head_dim` is read at all.
        inner: default of `intermediate_size`, in hidden sizes; None: it must be there.
        rope: default of `rope_parameters`.
        rotated: default of `partial_rotary_factor`; None: heads are rotated whole.
        interleaved: whether rotated pairs are neighbors in a head.
        rope_by_kind: whether each kind of layer has its own rope parameters.
        local_theta: key and default of the theta of windowed layers, with `rope_by_kind`.
        no_rope: which layers have no rotation, by the layers' kinds.
        windowed: layers with `sliding_window`: "never"; "always": all, or those in `layer_types`; "switched": by
            `use_sliding_window` and `max_window_layers`, or by `layer_types`.
        window, max_window_layers: defaults of `sliding_window` and of `max_window_layers`, the layers below the first
            with a window.
        kinds: default of `layer_types`;  lists_kinds: whether they may differ.
        mixers: by the kind of a layer, the recurrent layer that it has in place of attention.
        norm: kind of all norms;  eps: its key and default;  norm_weighted, norm_biased: see `Norm`;  norm_offset,
            offset_final_norm: see `ModelConfig`.
        norms: before both halves, after, or both.
        parallel: "" or whether both halves share "one" norm or have "two".
        qk_norm: as in `HeadNorm.weights`; "" for none.  qk_norm_kind, qk_norm_biased, qk_norm_rotated: see there.
        alibi: largest exponent of ALiBi's slopes (`alibi_slopes`), which then stands for rotation; 0 for none.
            alibi_rounded: see `Attention.rounds_biases`.
        qkv_bias, output_bias, mlp_bias, down_bias: biases; down_bias None: as mlp_bias.
        qkv_clip: bound of q, k and v; 0 for none.
        sinks: see `Attention`.
        gated: whether the MLP is.  activation: its key and default.
        embedding_scale, residual_scale, score_scale, score_cap, logit_scale, logit_cap, temperature, head_bias,
            learned_positions: see `ModelConfig`, `Layer` and `Attention`.
        qkv: how a fused `qkv_proj` holds its rows: "stacked", or "grouped": the queries of a KV head, then its k and v.
        transposed: whether matrices are stored as [in, out] in safetensors files.
        experts: of a config's n layers, None for one with an MLP.
        adapt: the traits of one config.
        finish: last changes to the description.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    reads: Sequence[str] = ()
    context_length: int = 2048
    n_kv_heads: int | None = None
    head_dim: int | None = None
    reads_head_dim: bool = True
    inner: int | None = None
    tied: bool = False
    theta: float = 10000.0
    rope: Mapping[str, Any] | None = None
    rotated: float | None = None
    interleaved: bool = False
    rope_by_kind: bool = False
    local_theta: tuple[str, float] = ("rope_theta", 10000.0)
    no_rope: Callable[[ConfigReader, Sequence[str]], list[bool]] | None = None
    windowed: Literal["never", "always", "switched"] = "never"
    window: int | None = 4096
    max_window_layers: int = 28
    kinds: Kinds | None = None
    lists_kinds: bool = True
    mixers: Mapping[str, Callable[[ConfigReader], Mixer]] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    norm_weighted: bool = True
    norm_biased: bool = False
    norm_offset: float = 0.0
    offset_final_norm: bool = True
    norms: Literal["pre", "post", "sandwich"] = "pre"
    parallel: Literal["", "one", "two"] = ""
    qk_norm: Literal["", "head", "heads", "row", "none"] = ""
    qk_norm_kind: Literal["rms", "layer"] = "rms"
    qk_norm_biased: bool = False
    qk_norm_rotated: bool = False
    alibi: float = 0.0
    alibi_rounded: bool = False
    qkv_bias: Flag = ("attention_bias", False)
    output_bias: Flag = ("attention_bias", False)
    mlp_bias: Flag = False
    down_bias: Flag | None = None
    sinks: bool = False
    gated: bool = True
    activation: tuple[str, str] = ("hidden_act", "silu")
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    score_scale: float | None = None
    score_cap: float = 0.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    temperature: Temperature | None = None
    head_bias: bool = False
    learned_positions: bool = False
    qkv_clip: float = 0.0
    qkv: Literal["stacked", "grouped"] = "stacked"
    transposed: bool = False
    experts: Callable[[ConfigReader, int], Sequence[Experts | None]] | None = None
    adapt: Callable[[ConfigReader, Traits], Traits] | None = None
    finish: Callable[[ConfigReader, ModelConfig], ModelConfig] | None = None


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


def read_config(config: Mapping[str, Any], path: Path, traits: Traits) -> ModelConfig:
    """Reads and checks a decoder's config.

    Args:
        config: content of config.json.
        path: for error messages.
        traits: of the family.

    Raises:
        ModelFileError: a key is missing, of the wrong type, out of range, or does not fit another.
        Unsupported: a field means an unsupported computation, such as an unknown activation, attention to later
            tokens, or experts.
    """
    read = ConfigReader(config, path, traits.names, traits.fields, traits.ignored)
    refuse_unknown(read, traits.reads)
    t = traits.adapt(read, traits) if traits.adapt else traits
    config = read.config
    n_layers = read.integer("num_hidden_layers", 1, _MAX_LAYERS)
    n_heads = read.integer("num_attention_heads", 1, _MAX_HEADS)
    missing_kv = n_heads if "num_key_value_heads" in config else t.n_kv_heads or n_heads
    n_kv_heads = read.integer("num_key_value_heads", 1, _MAX_HEADS, missing_kv)
    hidden_size = read.integer("hidden_size", 1, _MAX_WIDTH)
    if n_heads % n_kv_heads:
        raise read.error("num_key_value_heads", f"is {n_kv_heads}, must divide num_attention_heads {n_heads}")
    head_dim = _head_dim(read, t, hidden_size, n_heads)
    context_length = read.integer("max_position_embeddings", 1, _MAX_CONTEXT, t.context_length)
    kinds, windows = _windows(read, n_layers, t, context_length)
    ropes, tables = _ropes(read, t, kinds, head_dim)
    eps = read.number(*(t.eps[0], 1e-30, 1.0, t.eps[1]))  # > 0, so that a row of zeros does not become 0 / 0
    norm = Norm(t.norm, eps, t.norm_weighted, t.norm_biased)
    qkv_bias, output_bias, mlp_bias = (_flag(read, flag) for flag in (t.qkv_bias, t.output_bias, t.mlp_bias))
    inner = read.integer("intermediate_size", 1, _MAX_WIDTH, t.inner * hidden_size if t.inner else None)
    mlp = Mlp(
        size=inner,
        activation=read_activation(read, *t.activation),
        gated=t.gated,
        bias=mlp_bias,
        down_bias=mlp_bias if t.down_bias is None else _flag(read, t.down_bias),
    )
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        k_dim=head_dim,
        v_dim=head_dim,
        scale=head_dim**-0.5 if t.score_scale is None else t.score_scale,
        cap=t.score_cap,
        temperature=t.temperature,
        norm=HeadNorm(t.qk_norm_kind, eps, t.qk_norm, t.qk_norm_biased, rotated=t.qk_norm_rotated)
        if t.qk_norm
        else None,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qkv_clip=t.qkv_clip,
        sinks=t.sinks,
        slopes=alibi_slopes(n_heads, t.alibi) if t.alibi else (),
        rounds_biases=t.alibi_rounded,
    )
    experts = t.experts(read, n_layers) if t.experts else [None] * n_layers
    before, after = (norm if t.norms in kind else None for kind in (("pre", "sandwich"), ("post", "sandwich")))
    mixers = {kind: t.mixers[kind](read) for kind in dict.fromkeys(kinds) if kind in t.mixers}
    kv = [sum(kind not in mixers for kind in kinds[:i]) for i in range(n_layers)]
    layers = tuple(
        Layer(
            attention=replace(attention, kv=kv[i], window=window, chunked=kind == "chunked_attention", rope=table),
            mixer=mixers.get(kind),
            attends=kind not in mixers,
            mlp=mlp,
            before_attention=before,
            after_attention=after,
            before_mlp=None if t.parallel == "one" else before,
            after_mlp=after,
            parallel=bool(t.parallel),
            residual_scale=t.residual_scale,
            experts=experts[i],
        )
        for i, (kind, window, table) in enumerate(zip(kinds, windows, tables, strict=True))
    )
    found = ModelConfig(
        model_type=str(config.get("model_type")),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        intermediate_size=inner,
        vocab_size=read.integer("vocab_size", 1, _MAX_VOCABULARY),
        context_length=context_length,
        rms_norm_eps=eps,
        rope=ropes[0][0] if ropes else {},
        windows=windows,
        tied=read.flag("tie_word_embeddings", t.tied),
        attention_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        layers=layers,
        ropes=ropes,
        final_norm=norm,
        interleaved=t.interleaved,
        norm_offset=t.norm_offset,
        offset_final_norm=t.offset_final_norm,
        embedding_scale=t.embedding_scale,
        n_positions=context_length if t.learned_positions else 0,
        logit_scale=t.logit_scale,
        logit_cap=t.logit_cap,
        head_bias=t.head_bias,
        qkv=t.qkv,
        transposed=t.transposed,
        left_out=tuple(config.get(LEFT_OUT, ())),
        base=any(name.endswith("Model") and "For" not in name and "Head" not in name for name in _architectures(read)),
    )
    found = t.finish(read, found) if t.finish else found
    if not found.attentions:
        raise read.unsupported("layer_types", "a model without any layer with attention is not offered")
    return found


def _flag(read: ConfigReader, flag: Flag) -> bool:
    return flag if isinstance(flag, bool) else read.flag(*flag)


def alibi_slopes(n_heads: int, most: float) -> tuple[float, ...]:
    """The slopes of ALiBi (Press et al. 2022, arXiv:2108.12409): 2^(-most k / n), k = 1 .. n, for n heads.

    Where n is no power of 2, those of the power below, then every other one of the power above.
    """
    n = 1 << (n_heads.bit_length() - 1)
    series = [2.0 ** (-most * k / n) for k in range(1, n + 1)]
    return tuple(series + [2.0 ** (-most * k / (2 * n)) for k in range(1, 2 * (n_heads - n), 2)])


def _head_dim(read: ConfigReader, t: Traits, hidden_size: int, n_heads: int) -> int:
    missing_dim = None if "head_dim" in read.config else t.head_dim
    if read.config.get("head_dim") is None and missing_dim is None and hidden_size % n_heads:
        raise read.error("hidden_size", f"is {hidden_size}, not a multiple of num_attention_heads {n_heads}")
    head_dim = read.integer("head_dim", 2, 1024, missing_dim or hidden_size // n_heads)
    if not t.reads_head_dim and head_dim * n_heads != hidden_size:
        raise read.error("head_dim", f"is {head_dim}, in this family it is hidden_size / num_attention_heads")
    if (head_dim % 2 or head_dim < 2) and not (t.learned_positions or t.alibi):
        raise read.error("head_dim", f"is {head_dim}, must be even for rotary embeddings")
    return head_dim


def read_activation(read: ConfigReader, key: str, default: str) -> Activation:
    name = read.config.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS or (name == "xielu") != (default == "xielu"):
        names = "xielu" if default == "xielu" else ", ".join(name for name in _ACTIVATIONS if name != "xielu")
        raise Unsupported(f"{read.path}: config {key!r} is {_shown(name)}; supported: {names}")
    return _ACTIVATIONS[name]


def refuse_unknown(read: ConfigReader, reads: Sequence[str] = ()) -> None:
    """Refuses what transformers would follow in a decoder of any family and Fabula does not compute."""
    config = read.config

    def refuse(key: str, problem: str) -> Unsupported:
        return Unsupported(f"{read.path}: config {key!r} is {_shown(config[key])}: {problem}")

    if not config.get("is_causal", True):
        raise refuse("is_causal", "every token would attend to later ones too; Fabula's attention is causal")
    if config.get("per_layer_config") and "per_layer_config" not in reads:
        raise refuse("per_layer_config", "layers that differ from each other are not offered")
    if config.get("kv_sharing_modes"):
        raise refuse("kv_sharing_modes", "layers that share keys and values are not offered")
    if config.get("attention_chunk_size") is not None and "attention_chunk_size" not in reads:
        raise refuse("attention_chunk_size", "attention in chunks is not offered")
    if config.get("transformers_weights") is not None:
        raise refuse("transformers_weights", "weights are read from model.safetensors or its shards only")
    if isinstance(config.get("text_config"), Mapping):
        raise refuse("text_config", f"a config inside that of a {config.get('model_type')}; which one holds is unclear")
    for name in _architectures(read):
        if "For" in name and "ForCausalLM" not in name:
            raise refuse(
                "architectures", "a model with another head than one for text; Fabula generates and embeds text only"
            )


def _architectures(read: ConfigReader) -> list[str]:
    names = read.config.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise read.error("architectures", f"is {_shown(names)}, must be a list of names")
    return names


def _ropes(
    read: ConfigReader, t: Traits, kinds: Sequence[str], head_dim: int
) -> tuple[tuple[tuple[Rope, int], ...], list[int]]:
    """The rope tables, and each layer's; -1 for a layer without rotation."""
    if t.learned_positions or t.alibi:
        return (), [-1] * len(kinds)
    by_kind = _ropes_by_kind(read, t) if t.rope_by_kind else dict.fromkeys(kinds, _rope(read, t))
    without = t.no_rope(read, kinds) if t.no_rope else [False] * len(kinds)
    ropes: list[Rope] = []
    tables = []
    for kind, skipped in zip(kinds, without, strict=True):
        if skipped or kind in t.mixers:
            tables.append(-1)
            continue
        rope = by_kind[kind]
        if rope not in ropes:
            ropes.append(rope)
        tables.append(ropes.index(rope))
    return tuple((rope, head_dim) for rope in ropes), tables


def _rope_object(read: ConfigReader, key: str) -> Mapping[str, Any]:
    value = read.config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise read.error(key, f"is {_shown(value)}, must be an object")
    return value or {}


def _rope(read: ConfigReader, t: Traits) -> Rope:
    """Theta and scaling in one mapping.

    A `rope_scaling` that is not empty stands for all of `rope_parameters`; numbers missing in it come from the config's
    top level, where older configs have them. `original_max_position_embeddings` of the top level goes before both.
    """
    config = read.config
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = _rope_object(read, key)
        if value and not merged:
            merged = dict(value)
            if nested := [name for name, part in value.items() if isinstance(part, Mapping)]:
                raise Unsupported(
                    f"{read.path}: config {key!r} is nested under {_shown(nested[0])}: a rope for some layers only is"
                    " not offered for this family"
                )
    if not merged and t.rope is not None and config.get("rope_parameters") is None:
        merged = dict(t.rope)
    return _completed(read, t, merged, "rope_theta", t.theta)


def _ropes_by_kind(read: ConfigReader, t: Traits) -> dict[str, Rope]:
    """The ropes of layers with and without a window, which `rope_parameters` has under their kinds.

    Older configs have `rope_theta` and `rope_scaling` for layers without a window, and a theta for those with one.
    """
    nested = dict(_rope_object(read, "rope_parameters") or t.rope or {})
    if flat := [name for name, part in nested.items() if part is not None and not isinstance(part, Mapping)]:
        raise Unsupported(
            f"{read.path}: config 'rope_parameters' has {_shown(flat[0])} for all layers: this family has ropes for"
            " sliding_attention and full_attention"
        )
    scaling = _rope_object(read, "rope_scaling")
    if "type" in scaling and "rope_type" not in scaling:  # transformers does not read it here
        raise read.unsupported("rope_scaling", "its kind must be named rope_type in this family")
    full = {**(nested.get("full_attention") or {}), **scaling}
    if full.get("truncate") is False or (nested.get("sliding_attention") or {}).get("truncate") is False:
        raise Unsupported(f"{read.path}: config rope 'truncate' is False: transformers does not read it in this family")
    local = dict(nested.get("sliding_attention") or {})
    if t.local_theta[0] == "rope_theta" and "rope_theta" not in full:  # as in transformers: it holds for one of them
        local.setdefault("rope_theta", t.local_theta[1])
    return {
        "full_attention": _completed(read, t, full, "rope_theta", t.theta),
        "sliding_attention": _completed(read, t, local, *t.local_theta),
    }


def _completed(read: ConfigReader, t: Traits, rope: dict[str, Any], key: str, default: float) -> Rope:
    """Adds what stands at the config's top level."""
    config = read.config
    theta = rope.setdefault("rope_theta", config.get(key, default))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
        raise read.error(key, f"is {_shown(theta)}, must be a number above 0")
    rope["rope_theta"] = float(theta)
    if rope.get("rope_type", rope.get("type")) == "proportional" and not t.rope_by_kind:
        raise Unsupported(f"{read.path}: rope scaling 'proportional' is not offered for this family")
    outside, inside = config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")
    if t.rotated is None:
        if (outside or 1.0) != 1.0 or (inside or 1.0) != 1.0:
            raise Unsupported(
                f"{read.path}: config 'partial_rotary_factor' other than 1 is not offered for this family"
            )
    else:
        part = inside if inside is not None else outside if outside is not None else t.rotated
        if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
            raise read.error("partial_rotary_factor", f"is {_shown(part)}, must be a number above 0 and at most 1")
        rope["partial_rotary_factor"] = float(part)
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = read.integer("original_max_position_embeddings", 1, _MAX_CONTEXT)
    return rope


_OLD_LAYER_TYPES = {
    "attention": "full_attention",
    "mamba": "linear_attention",
}  # older name: name; see transformers' configuration_utils.py


def _windows(read: ConfigReader, n_layers: int, t: Traits, context_length: int) -> tuple[list[str], tuple[int, ...]]:
    """Each layer's kind, and its window; 0 for none."""
    kinds = _layer_types(read, n_layers, t)
    listed = kinds is not None
    if kinds is None and t.kinds is not None:
        kinds = t.kinds(read, n_layers)
    if t.windowed == "switched" and not read.flag("use_sliding_window", False):
        window = None
    elif t.windowed != "never" and "sliding_window" not in read.config:
        window = t.window
    elif read.config.get("sliding_window") is None:
        window = None
    elif t.windowed == "never" and (kinds is None or "sliding_attention" not in kinds):
        # transformers computes such a prompt without a window, but applies the window in decode.
        window = read.integer("sliding_window", context_length, _MAX_CONTEXT) if kinds is None else None
    else:
        window = read.integer("sliding_window", 1, _MAX_CONTEXT)
    if listed and not t.lists_kinds and window is not None and kinds != ["sliding_attention"] * n_layers:
        raise read.error("layer_types", "must be sliding_attention for all layers: this family has one window for all")
    if kinds is not None:
        if "sliding_attention" in kinds and (window is None or t.windowed == "never"):
            key = "layer_types" if listed else "sliding_window"
            raise read.error(key, "names sliding_attention, but no sliding_window is set for this family")
        sizes = {"sliding_attention": window or 0}
        if "chunked_attention" in kinds:
            sizes["chunked_attention"] = read.integer("attention_chunk_size", 1, _MAX_CONTEXT, 8192)
        return kinds, tuple(sizes.get(kind, 0) for kind in kinds)
    if window is None or t.windowed == "never":
        return ["full_attention"] * n_layers, (0,) * n_layers
    first = read.integer("max_window_layers", 0, _MAX_LAYERS, t.max_window_layers) if t.windowed == "switched" else 0
    windows = tuple(window if layer >= first else 0 for layer in range(n_layers))
    return ["sliding_attention" if window else "full_attention" for window in windows], windows


def _layer_types(read: ConfigReader, n_layers: int, t: Traits) -> list[str] | None:
    """`layer_types`, checked; None where the config has none."""
    kinds = read.config.get("layer_types")
    if kinds is None:
        return None
    windows = () if t.mixers and t.windowed == "never" else ("sliding_attention",)
    chunks = ("chunked_attention",) if "attention_chunk_size" in t.reads else ()
    known = ("full_attention", *windows, *chunks, *t.mixers)
    kinds = [_OLD_LAYER_TYPES.get(str(kind), str(kind)) for kind in kinds] if isinstance(kinds, list) else []
    if len(kinds) != n_layers or any(kind not in known for kind in kinds):
        raise read.error("layer_types", f"must list {' or '.join(known)} for each of {n_layers} layers")
    return kinds
