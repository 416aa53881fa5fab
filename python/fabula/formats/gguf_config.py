"""Maps a GGUF file's key-values to the keys of config.json, or refuses an unsupported model.

    general.architecture "llama"  ->  model_type "llama", or "mistral" when a sliding window is given
    llama.attention.head_count    ->  num_attention_heads

Every key that llama.cpp applies in these architectures is applied here or refused by name (gguf_keys.py). Three
defaults follow llama.cpp and are not obvious: a scaling factor without a type is linear, per-pair rope factors may come
as tensors, and `rope.scaling.attn_factor` multiplies cos and sin whatever the type.

Sources: the key list of ggml's docs/gguf.md; llama.cpp's convert_hf_to_gguf.py, src/llama-model.cpp and
src/llama-context.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, Unsupported, shown
from fabula.formats.checkpoint import DType
from fabula.formats.gguf import BLOCKS, MAX_TENSORS, GgufTensor
from fabula.formats.gguf_families import ARCHITECTURES, ATTENTION, FULL, MLP, SLIDING, Architecture, Facts
from fabula.formats.gguf_keys import Keys, refuse_other_computations

# general.type of files that are not a language model -> what they are, and what would work.
_TYPES = {
    "adapter": "a LoRA adapter, which changes another model; merge it into that model and convert the result, "
    "or give the model itself",
    "mmproj": "the image or audio encoder that goes with a model (mmproj); give the .gguf file of the language model "
    "next to it",
    "imatrix": "an importance matrix, which serves to quantize a model; give the model itself",
}
# The same for architectures that are not text decoders.
_OTHER_KINDS = {
    "clip": _TYPES["mmproj"],
    "controlvector": "a control vector, which changes another model; give the model itself",
    "whisper": "a speech recognizer; models that write text are offered",
    **dict.fromkeys(
        ("bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed", "modern-bert",
         "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder"),
        "an encoder, which makes vectors and writes no text; models that write text are offered",
    ),
    **dict.fromkeys(
        ("aura", "cosmos", "flux", "hidream", "hyvid", "ltxv", "lumina2", "qwen_image", "sd1", "sd3", "sdxl", "wan"),
        "a model that makes images; models that write text are offered",
    ),
}  # fmt: skip

ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
_TOKENS = "tokenizer.ggml.tokens"
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the block layouts of blocks.h


class Source(Protocol):
    """A `GgufFile`, or the parts of a split one."""

    path: Path
    metadata: dict[str, object]
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> npt.NDArray[np.uint8]: ...


def check_kind(path: Path, metadata: Mapping[str, object]) -> None:
    """Refuses a file that is not a model of a supported family; called before tensors are parsed.

    Raises:
        ModelFileError: `general.architecture` is missing or not a string.
        Unsupported: another family or kind of file; says what it is and what would work.
    """
    keys = Keys(path, metadata)
    kind = metadata.get("general.type")
    if isinstance(kind, str) and kind in _TYPES:
        raise keys.unsupported("general.type", f"is {shown(kind)}: this is {_TYPES[kind]}")
    arch = keys.text("general.architecture")
    if arch in ARCHITECTURES:
        return
    what = f": this is {_OTHER_KINDS[arch]}" if arch in _OTHER_KINDS else ""
    raise keys.unsupported("general.architecture", f"is {shown(arch)}, offered are {', '.join(ARCHITECTURES)}{what}")


def config_of(file: Source) -> dict[str, Any]:
    """The keys of config.json, derived from the key-values and from which tensors are present.

    Raises:
        ModelFileError: a key is missing, of the wrong type or out of range.
        Unsupported: another family, or a key for an unsupported computation.
    """
    check_kind(file.path, file.metadata)
    keys = Keys(file.path, file.metadata)
    arch = keys.text("general.architecture")
    if not keys.flag(f"{arch}.attention.causal", True):
        raise keys.unsupported(
            f"{arch}.attention.causal",
            "is false: tokens would attend to later ones, as in an encoder; only causal models are supported",
        )
    if (n := keys.integer(f"{arch}.expert_count", 0, low=0)) > 0 and "ffn_down_exps" not in ARCHITECTURES[arch].layer:
        raise keys.unsupported(f"{arch}.expert_count", f"is {n}: mixtures of experts are not offered")
    _check_quantization(file, keys)
    n_layers = keys.integer(f"{arch}.block_count", high=MAX_TENSORS)
    if "nextn_predict_layers" in ARCHITECTURES[arch].reads:  # the last layers predict further tokens, and are not used
        n_layers -= keys.integer(f"{arch}.nextn_predict_layers", 0, low=0, high=n_layers - 1)
    hidden_size = keys.integer(f"{arch}.embedding_length")
    n_heads = keys.same(f"{arch}.attention.head_count", n_layers)
    if not keys.has(f"{arch}.attention.key_length") and hidden_size % n_heads:
        raise keys.error(
            f"{arch}.attention.head_count",
            f"is {n_heads}, which does not divide embedding_length {hidden_size}",
        )
    row = ARCHITECTURES[arch]
    head_dim = keys.integer(f"{arch}.attention.key_length", hidden_size // n_heads)
    if row.latent:
        head_dim = keys.integer(f"{arch}.rope.dimension_count")
    elif (value := keys.integer(f"{arch}.attention.value_length", head_dim)) != head_dim:
        raise keys.unsupported(
            f"{arch}.attention.value_length", f"is {value}; only that of a whole head, {head_dim}, is offered"
        )
    rotated = _rotated(keys, arch, row, head_dim)
    same = keys.some if row.varied else keys.same
    n_kv_heads = same(f"{arch}.attention.head_count_kv", n_layers, n_heads)
    windows = _windows(keys, arch, row, n_layers)
    vocab_size = _vocab_size(file, keys)
    fields = row.fields
    config: dict[str, Any] = {
        "model_type": row.model_type,
        "architectures": [row.model_class],
        "hidden_size": hidden_size,
        fields.get("intermediate_size", "intermediate_size"): same(f"{arch}.feed_forward_length", n_layers),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        fields.get("num_key_value_heads", "num_key_value_heads"): n_kv_heads,
        "head_dim": head_dim,
        **({"hidden_act": "silu"} if row.silu else {}),
        **_epsilon(keys, arch, row),
        fields.get("rope_theta", "rope_theta"): keys.positive(f"{arch}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, keys, arch, row, rotated),
        "max_position_embeddings": keys.integer(f"{arch}.context_length"),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_bias_flags(file, row),
        **_token_ids(keys, vocab_size),
    }
    if row.rotated:
        config[fields.get("partial_rotary_factor", "partial_rotary_factor")] = _part(rotated, head_dim)
    if windows is not None:
        config["sliding_window"] = max(windows) or None
        config["layer_types"] = [SLIDING if window else FULL for window in windows]
    facts = Facts(
        keys=keys, arch=arch, tensors=file.tensors, n_layers=n_layers, hidden_size=hidden_size, n_heads=n_heads,
        n_kv_heads=n_kv_heads, head_dim=head_dim,
    )  # fmt: skip
    if row.finish is not None:
        row.finish(facts, config)
    _refuse_others(keys, arch, row, config, head_dim)
    return config


def _refuse_others(keys: Keys, arch: str, row: Architecture, config: Mapping[str, Any], head_dim: int) -> None:
    """Refuses keys for computations that the architecture's program does not do."""
    scale = row.scale or float(config.get("query_pre_attn_scalar", head_dim)) ** -0.5
    neutral: dict[str, tuple[object, ...]] = {
        "attention.scale": (float(np.float32(scale)), scale),
        "attention.key_length_swa": (head_dim,),
        "attention.value_length_swa": (head_dim,),
        "rope.dimension_count_swa": (keys.integer(f"{arch}.rope.dimension_count", head_dim),),
        "rope.freq_base_swa": (keys.positive(f"{arch}.rope.freq_base", 10000.0),),
        "embedding_length_out": (config["hidden_size"],),
        "hidden_activation": ("silu", "swish", "swiglu") if row.silu else (),
        "rope.scaling.yarn_attn_factor": (_own_yarn_factor(keys, arch),),
    }
    pattern = keys.metadata.get(f"{arch}.attention.rope_pattern")
    if isinstance(pattern, np.ndarray) and not pattern.all():
        raise keys.unsupported(f"{arch}.attention.rope_pattern", "leaves layers without rotation, which is not offered")
    neutral["attention.rope_pattern"] = (pattern,)
    refuse_other_computations(keys, arch, neutral, row.reads)


def _rotated(keys: Keys, arch: str, row: Architecture, head_dim: int) -> int:
    """How many elements of a head are rotated."""
    key = f"{arch}.rope.dimension_count"
    value = keys.integer(key, head_dim)
    if value != head_dim and not row.rotated:
        raise keys.unsupported(key, f"is {value}; only that of a whole head, {head_dim}, is offered")
    if value > head_dim or value % 2:
        raise keys.error(key, f"is {value}, must be an even number up to the width of a head, {head_dim}")
    return value


def _part(rotated: int, head_dim: int) -> float:
    """The part of a head as a number that gives `rotated` back when it is multiplied by the head and cut."""
    part = rotated / head_dim
    return part if int(head_dim * part) == rotated else math.nextafter(part, 1.0)


def _epsilon(keys: Keys, arch: str, row: Architecture) -> dict[str, float]:
    if not row.eps:
        return {"rms_norm_eps": keys.positive(f"{arch}.attention.layer_norm_rms_epsilon")}
    return {row.eps: keys.positive(f"{arch}.attention.layer_norm_epsilon")} if row.eps != "-" else {}


def _bias_flags(file: Source, row: Architecture) -> dict[str, bool]:
    """The flags of config.json for biases, by the biases that are there."""
    biases = {name.split(".", 2)[2][:-5] for name in file.tensors if name.startswith("blk.") and name.endswith(".bias")}
    usual = {"attention_bias": ATTENTION, "mlp_bias": MLP} if row.silu else {}
    flags = {flag: not biases.isdisjoint(parts) for flag, parts in usual.items()}
    return flags | {flag: not biases.isdisjoint(parts) for flag, parts in row.biases.items() if flag}


def _windows(keys: Keys, arch: str, row: Architecture, n_layers: int) -> list[int] | None:
    """Every layer's window, 0 for none; None where the file does not say and the architecture has none."""
    key, pattern_key = f"{arch}.attention.sliding_window", f"{arch}.attention.sliding_window_pattern"
    if row.windows is None:
        if window := keys.integer(key, 0, low=0):
            raise keys.unsupported(key, f"is {window}; llama.cpp has no window in models of architecture {arch!r}")
        return None
    every, default = row.windows.every, row.windows.default
    window = keys.integer(key, low=1) if default is None else keys.integer(key, default, low=0)
    if default == 0 and every == 0 and not keys.has(key):
        return None
    pattern = keys.metadata.get(pattern_key)
    if pattern is None and default is None and not every:
        raise keys.error(pattern_key, "is missing")
    if not window:
        return [0] * n_layers
    if isinstance(pattern, int) and not isinstance(pattern, bool) and every:
        every, pattern = keys.integer(pattern_key, low=0), None
    if pattern is None:
        return [0 if every and i % every == every - 1 else window for i in range(n_layers)]
    if not isinstance(pattern, np.ndarray) or pattern.dtype.kind != "b" or len(pattern) != n_layers:
        raise keys.error(pattern_key, f"must be an array of {n_layers} booleans, one for each layer")
    return [window if has else 0 for has in pattern.tolist()]


def _check_quantization(file: Source, keys: Keys) -> None:
    version = keys.integer("general.quantization_version", QUANTIZATION_VERSION, low=0)
    quantized = any(BLOCKS[tensor.dtype][0] > 1 for tensor in file.tensors.values())
    if quantized and version != QUANTIZATION_VERSION:
        raise keys.unsupported(
            "general.quantization_version",
            f"is {version}, must be {QUANTIZATION_VERSION}; quantize the model again",
        )


def _vocab_size(file: Source, keys: Keys) -> int:
    """The number of tokens; must equal the rows of the embedding if both are given."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or keys.has(_TOKENS):
        n_tokens = len(keys.strings(_TOKENS))
        if n_tokens == 0:
            raise keys.error(_TOKENS, "is empty")
        if embedding is not None and embedding.shape[0] != n_tokens:
            raise keys.error(_TOKENS, f"has {n_tokens} tokens, but token_embd.weight {embedding.shape[0]} rows")
        return n_tokens
    return embedding.shape[0]


def _token_ids(keys: Keys, vocab_size: int) -> dict[str, Any]:
    """bos, eos and pad ids. End-of-turn and end-of-message ids join eos in a list, as in config.json.

    A bos or end id outside the vocabulary is an error. A bad padding id is ignored here, as nothing uses it; the
    tokenizer warns about it.
    """
    bos, *ends = (keys.token(f"tokenizer.ggml.{name}_token_id", vocab_size) for name in ("bos", "eos", "eot", "eom"))
    found = list(dict.fromkeys(token for token in ends if token is not None))
    eos: int | list[int] | None = found if len(found) > 1 else found[0] if found else None
    padding = keys.token("tokenizer.ggml.padding_token_id", vocab_size, needed=False)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": padding}


# ---- Rope ---------------------------------------------------------------------------------------------


def _rope_scaling(file: Source, keys: Keys, arch: str, row: Architecture, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json; None without scaling.

    Llama 3's scaling is stored as a tensor of one divisor per rotated pair. config.json has no name for that, so we use
    a type of our own, with the factors as floats [head_dim / 2]:
    {"rope_type": "frequency_factors", "factors": [...], "attention_factor": ...}

    `head_dim` is the part of a head that is rotated.
    """
    prefix = f"{arch}.rope.scaling"
    kind = keys.text(f"{prefix}.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.unsupported(f"{prefix}.type", f"is {shown(kind)}, offered are none, linear, yarn and longrope")
    # Phi-3's lists of factors need no type.
    if row.scalings == ("longrope",) and (kind in ("none", "linear") and ROPE_LONG in file.tensors):
        kind = "longrope"
    factor = 1.0 if kind == "none" else _factor(keys, arch, needed=keys.has(f"{prefix}.type") and kind != "longrope")
    attention = keys.positive(f"{prefix}.attn_factor", 1.0)  # on cos and sin
    lists = [name for name in (ROPE_LONG, ROPE_SHORT) if name in file.tensors]
    if kind == "longrope":
        return _longrope(file, keys, arch, row, head_dim, factor, attention)
    if kind not in row.scalings and (factor != 1.0 or attention != 1.0):
        raise keys.unsupported(f"{prefix}.type", f"is {shown(kind)}, offered here: {', '.join(row.scalings)}")
    if lists:
        raise Unsupported(f"{file.path}: tensor {lists[0]!r}: without {prefix}.type 'longrope'")
    if ROPE_FREQS in file.tensors:
        if not row.factors:
            raise Unsupported(f"{file.path}: tensor {ROPE_FREQS!r}: is not part of models of architecture {arch!r}")
        if kind == "yarn" or factor != 1.0:
            problem = f"is {shown(kind)}, and there is {ROPE_FREQS}: only one of them may be given"
            raise keys.unsupported(f"{prefix}.type", problem)
        return _pair_factors(_factors(file, ROPE_FREQS, head_dim), attention)
    if kind == "yarn":
        return _yarn(keys, arch, factor, attention)
    if attention != 1.0:
        return _pair_factors([factor] * (head_dim // 2), attention)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _factor(keys: Keys, arch: str, *, needed: bool) -> float:
    """The divisor of positions; 0 means 1. Older files use another key."""
    newer, older = f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear"
    if keys.has(older) and not keys.has(newer):
        return keys.positive(older, zero=1.0)
    return keys.positive(newer, None if needed else 1.0, zero=1.0)


def _pair_factors(factors: list[float], attention: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "frequency_factors", "factors": factors}
    return scaling if attention == 1.0 else {**scaling, "attention_factor": attention}


def _own_yarn_factor(keys: Keys, arch: str) -> float:
    """YaRN's default factor on cos and sin; 1 without YaRN."""
    prefix = f"{arch}.rope.scaling"
    if keys.text(f"{prefix}.type", "linear") != "yarn":
        return 1.0
    factor = max(_factor(keys, arch, needed=True), 1.0)
    # mscale_all_dim of config.json, where mscale is 1.
    multiplier = keys.positive(f"{prefix}.yarn_log_multiplier", 0.0, zero=0.0) if arch == "mistral3" else 0.0
    return (0.1 * math.log(factor) + 1.0) / (0.1 * multiplier * math.log(factor) + 1.0)


def _yarn(keys: Keys, arch: str, factor: float, attention: float) -> dict[str, Any]:
    prefix = f"{arch}.rope.scaling"
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original := keys.integer(f"{prefix}.original_context_length", 0, low=0):
        scaling["original_max_position_embeddings"] = original
    own = _own_yarn_factor(keys, arch)
    if keys.has(f"{prefix}.attn_factor") or (arch == "mistral3" and keys.has(f"{prefix}.yarn_log_multiplier")):
        # In ggml it multiplies YaRN's default factor; in config.json it replaces the default.
        scaling["attention_factor"] = attention * own
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if keys.has(f"{prefix}.{theirs}"):
            scaling[ours] = keys.positive(f"{prefix}.{theirs}")
    return scaling


def _longrope(
    file: Source, keys: Keys, arch: str, row: Architecture, head_dim: int, factor: float, attention: float
) -> dict[str, Any]:
    """Per-pair factors: one list for contexts up to the original length, one for longer contexts."""
    key = f"{arch}.rope.scaling.type"
    if not row.longrope:
        names = ", ".join(name for name, other in ARCHITECTURES.items() if other.longrope)
        raise keys.unsupported(key, f"is 'longrope', which is offered with the architectures {names}")
    if ROPE_FREQS in file.tensors:
        raise keys.unsupported(key, f"is 'longrope', and there is {ROPE_FREQS}: only one of them may be given")
    lists = {}
    for name, ours in ((ROPE_SHORT, "short_factor"), (ROPE_LONG, "long_factor")):
        if name not in file.tensors:
            raise keys.unsupported(key, f"is 'longrope', but the tensor {name!r} with its factors is missing")
        lists[ours] = [factor * one for one in _factors(file, name, head_dim)]
    trained = keys.integer(f"{arch}.context_length")
    original = keys.integer(f"{arch}.rope.scaling.original_context_length", 0, low=0) or trained
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": attention,
        **lists,
    }


def _factors(file: Source, name: str, head_dim: int) -> list[float]:
    """Reads a tensor of rope factors, float32 [head_dim / 2]."""
    tensor = file.tensors[name]
    if tensor.dtype != DType.F32 or tensor.shape != (head_dim // 2,):
        raise tensor_error(file, tensor, f"is {tensor.dtype.name} {tensor.shape}, must be F32 ({head_dim // 2},)")
    factors = file.read(name).view("<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise tensor_error(file, tensor, "holds a factor that is not finite and above 0")
    return [float(factor) for factor in factors]


def tensor_error(file: Source, tensor: GgufTensor, problem: str) -> ModelFileError:
    """An error that names file and tensor."""
    return ModelFileError(f"{file.path}: tensor {shown(tensor.name)}: {problem}", path=file.path, field=tensor.name)
