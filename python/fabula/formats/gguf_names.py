"""GGUF in Hugging Face's words: the config, the tensors' names and the order of their rows.

    general.architecture "llama"  ->  model_type "llama", or "mistral" when a sliding window is given
    llama.attention.head_count    ->  num_attention_heads                               (see _config)
    blk.3.attn_q.weight           ->  model.layers.3.self_attn.q_proj.weight            (see _TENSORS, _LAYER)

GGUF's llama files hold the rows of q and k in another order: their rotation turns neighbouring rows
(2 i, 2 i + 1) of a head, Hugging Face's turns rows (i, i + head_dim / 2). So each head's rows are put back as
they are read; quantised blocks run along a row, so whole rows move without touching a number. Qwen's files
are in Hugging Face's order already.

Nothing is guessed: an unknown architecture, tensor or kind of scaling is refused, because a model with a part
left out talks nonsense. Sources: the key list of ggml's docs/gguf.md; llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, Unsupported
from fabula.formats.checkpoint import DType, TensorInfo
from fabula.formats.gguf import BLOCKS, MAX_TENSORS, GgufFile, GgufTensor
from fabula.formats.readfile import shown

# general.architecture -> (model_type, architectures)
_FAMILIES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# blk.N.<key>.weight or .bias -> model.layers.N.<value>.weight or .bias
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z_]+)\.(weight|bias)")
_GGUF_NAMES = {theirs: ours for ours, theirs in (*_TENSORS.items(), *_LAYER.items())}
_HF_LAYER_TENSOR = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.([a-z_.]+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"
_TOKENS = "tokenizer.ggml.tokens"
_INT32_MAX = 2**31 - 1
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the block layouts of blocks.h


def open_gguf(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Opens a .gguf file as a checkpoint.

    Raises:
        ModelFileError: the file is damaged, or a key or tensor is missing, of the wrong type or out of range.
        Unsupported: an architecture, tensor, tensor type, scaling or split file not offered here.
        OutOfMemory: no room for the header.
    """
    file = GgufFile(path)
    try:
        return GgufCheckpoint(file)
    except BaseException:
        file.close()
        raise


class GgufCheckpoint:
    """A GGUF file as `fabula.formats.checkpoint.Checkpoint` has it. Owns the file."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path
        self.format = "gguf"
        self.metadata: Mapping[str, Any] = file.metadata
        self.config: Mapping[str, Any] = _config(file)
        self.tensors: Mapping[str, TensorInfo]
        self._sources, self.tensors = _tensors(file, self.config)
        self._head_dim = int(self.config["head_dim"])

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor's raw bytes, uint8 [n_bytes], rows in Hugging Face's order.

        Raises:
            ModelFileError: no such tensor, or the file is closed or shorter than when it was opened.
            OutOfMemory: no room for the bytes.
        """
        if name not in self._sources:
            raise ModelFileError(f"{self.path}: has no tensor {shown(name)}", path=self.path, field=name)
        source = self._sources[name]
        raw = self._file.read(source.name)
        return _unpermute(raw, source.shape[0], self._head_dim) if source.permuted else raw

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor comes from: its GGUF name, its shape, and whether its rows are to be put back."""

    name: str
    shape: tuple[int, ...]
    permuted: bool


def _unpermute(raw: npt.NDArray[np.uint8], n_rows: int, head_dim: int) -> npt.NDArray[np.uint8]:
    """Rows (head, pair, member) of GGUF's llama into (head, member, pair); raw is uint8 [n_bytes]."""
    rows = raw.reshape(n_rows // head_dim, head_dim // 2, 2, raw.size // n_rows)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)


def permute_rows(raw: npt.NDArray[np.uint8], n_rows: int, head_dim: int) -> npt.NDArray[np.uint8]:
    """Rows (head, member, pair) of Hugging Face into (head, pair, member) of GGUF's llama; raw is uint8 [n_bytes]."""
    rows = raw.reshape(n_rows // head_dim, 2, head_dim // 2, raw.size // n_rows)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)


def gguf_name(name: str) -> str | None:
    """GGUF's name of a Hugging Face tensor; None if it has none."""
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    match = _HF_LAYER_TENSOR.fullmatch(name)
    part = None if match is None else _GGUF_NAMES.get(match[2])
    return None if match is None or part is None else f"blk.{match[1]}.{part}.{match[3]}"


# ---- Keys ---------------------------------------------------------------------------------------------


class _Keys:
    """Typed access to a file's key-values; every failure names the key."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._metadata = file.metadata

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: key {key!r}: {problem}", path=self._path, field=key)

    def unsupported(self, key: str, problem: str) -> Unsupported:
        return Unsupported(f"{self._path}: key {key!r}: {problem}")

    def has(self, key: str) -> bool:
        return key in self._metadata

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is of type {type(value).__name__}, must be a string")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = _INT32_MAX) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"is of type {type(value).__name__}, must be an integer")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, must be {low} to {high}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. A FLOAT32 becomes the shortest decimal that rounds to it, as in JSON."""
        value = self._get(key, default)
        if not isinstance(value, float):
            raise self.error(key, f"is of type {type(value).__name__}, must be a float")
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"is {value}, must be finite and above 0")
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else value

    def strings(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list):
            raise self.error(key, f"is of type {type(value).__name__}, must be an array of strings")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self._metadata.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value


# ---- Config -------------------------------------------------------------------------------------------


def _config(file: GgufFile) -> dict[str, Any]:
    """The keys of config.json, from the key-values and the presence of tensors."""
    keys = _Keys(file)
    arch = keys.text("general.architecture")
    if arch not in _FAMILIES:
        raise keys.unsupported("general.architecture", f"is {shown(arch)}, offered are {', '.join(sorted(_FAMILIES))}")
    _refuse_unusual(file, keys, arch)
    hidden_size = keys.integer(f"{arch}.embedding_length")
    n_heads = keys.integer(f"{arch}.attention.head_count")
    if not keys.has(f"{arch}.attention.key_length") and hidden_size % n_heads:
        raise keys.error(
            f"{arch}.attention.head_count",
            f"is {n_heads}, which does not divide embedding_length {hidden_size}",
        )
    head_dim = keys.integer(f"{arch}.attention.key_length", hidden_size // n_heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (value := keys.integer(key, head_dim)) != head_dim:
            raise keys.unsupported(key, f"is {value}; only that of a whole head, {head_dim}, is offered")
    vocab_size = _vocab_size(file, keys)
    model_type, architecture = _FAMILIES[arch]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": keys.integer(f"{arch}.block_count", high=MAX_TENSORS),
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.integer(f"{arch}.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.positive(f"{arch}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, keys, arch, head_dim),
        "max_position_embeddings": keys.integer(f"{arch}.context_length"),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        **_token_ids(keys, vocab_size),
    }
    if keys.has(f"{arch}.attention.sliding_window"):
        window = keys.integer(f"{arch}.attention.sliding_window", low=0)
        config["sliding_window"] = window or None
        if window and arch == "llama":
            config["model_type"], config["architectures"] = "mistral", ["MistralForCausalLM"]
    return config


def _refuse_unusual(file: GgufFile, keys: _Keys, arch: str) -> None:
    """Files of a known architecture that still need what is not offered."""
    if (n := keys.integer("split.count", 1, low=0)) > 1:
        raise keys.unsupported(
            "split.count", f"is {n}: this is one part of a split model; join the parts into one file first"
        )
    if (n := keys.integer(f"{arch}.expert_count", 0, low=0)) > 0:
        raise keys.unsupported(f"{arch}.expert_count", f"is {n}: mixtures of experts are not offered")
    version = keys.integer("general.quantization_version", QUANTIZATION_VERSION, low=0)
    quantised = any(BLOCKS[tensor.dtype][0] > 1 for tensor in file.tensors.values())
    if quantised and version != QUANTIZATION_VERSION:
        raise keys.unsupported(
            "general.quantization_version",
            f"is {version}, must be {QUANTIZATION_VERSION}; quantise the model again",
        )


def _vocab_size(file: GgufFile, keys: _Keys) -> int:
    """The number of tokens, which must be the rows of the embedding where both are given."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or keys.has(_TOKENS):
        n_tokens = len(keys.strings(_TOKENS))
        if n_tokens == 0:
            raise keys.error(_TOKENS, "is empty")
        if embedding is not None and embedding.shape[0] != n_tokens:
            raise keys.error(_TOKENS, f"has {n_tokens} tokens, but token_embd.weight {embedding.shape[0]} rows")
        return n_tokens
    return embedding.shape[0]


def _token_ids(keys: _Keys, vocab_size: int) -> dict[str, Any]:
    """bos, eos and pad ids. Ends of turn and of message join eos in a list, as config.json may have it."""
    ids: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        full = f"tokenizer.ggml.{key}_token_id"
        ids[f"{name}_token_id"] = keys.integer(full, low=0, high=vocab_size - 1) if keys.has(full) else None
    ends = [] if ids["eos_token_id"] is None else [ids["eos_token_id"]]
    for full in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        if keys.has(full) and (token := keys.integer(full, low=0, high=vocab_size - 1)) not in ends:
            ends.append(token)
    if len(ends) > 1:
        ids["eos_token_id"] = ends
    elif ends:
        ids["eos_token_id"] = ends[0]
    return ids


def _rope_scaling(file: GgufFile, keys: _Keys, arch: str, head_dim: int) -> dict[str, Any] | None:
    """How positions are stretched, None for not at all.

    Llama 3's scaling comes as a tensor: one factor for each rotated pair, which divides its frequency. It has
    no name in config.json, so it gets one here, and the factors are floats [head_dim / 2]:
    {"rope_type": "frequency_factors", "factors": [...]}
    """
    prefix = f"{arch}.rope.scaling"
    kind = keys.text(f"{prefix}.type", "none")
    if _ROPE_FREQS in file.tensors:
        if kind != "none":
            raise keys.unsupported(f"{prefix}.type", f"is {shown(kind)} beside {_ROPE_FREQS}: one of them only")
        return {"rope_type": "frequency_factors", "factors": _frequency_factors(file, head_dim)}
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.positive(f"{prefix}.factor")}
    if kind != "yarn":
        raise keys.unsupported(f"{prefix}.type", f"is {shown(kind)}, offered are none, linear and yarn")
    factor = keys.positive(f"{prefix}.factor")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if keys.has(f"{prefix}.original_context_length"):
        scaling["original_max_position_embeddings"] = keys.integer(f"{prefix}.original_context_length")
    if keys.has(f"{prefix}.attn_factor"):
        # ggml multiplies YaRN's own 0.1 ln(factor) + 1 by it; in config.json the number replaces that.
        own = 0.1 * math.log(max(factor, 1.0)) + 1.0
        scaling["attention_factor"] = keys.positive(f"{prefix}.attn_factor") * own
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if keys.has(f"{prefix}.{theirs}"):
            scaling[ours] = keys.positive(f"{prefix}.{theirs}")
    return scaling


def _frequency_factors(file: GgufFile, head_dim: int) -> list[float]:
    tensor = file.tensors[_ROPE_FREQS]
    if tensor.dtype != DType.F32 or tensor.shape != (head_dim // 2,):
        raise _tensor_error(file, tensor, f"is {tensor.dtype.name} {tensor.shape}, must be F32 ({head_dim // 2},)")
    factors = file.read(_ROPE_FREQS).view("<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise _tensor_error(file, tensor, "holds a factor that is not finite and above 0")
    return [float(factor) for factor in factors]


# ---- Tensors ------------------------------------------------------------------------------------------


def _tensor_error(file: GgufFile, tensor: GgufTensor, problem: str) -> ModelFileError:
    return ModelFileError(f"{file.path}: tensor {shown(tensor.name)}: {problem}", path=file.path, field=tensor.name)


def _tensors(file: GgufFile, config: Mapping[str, Any]) -> tuple[dict[str, _Source], dict[str, TensorInfo]]:
    """Both by Hugging Face name: where each tensor comes from, and what it is."""
    sources: dict[str, _Source] = {}
    infos: dict[str, TensorInfo] = {}
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FREQS:  # went into the config
            continue
        name = _hf_name(file, tensor, config["num_hidden_layers"])
        permuted = file.metadata["general.architecture"] == "llama" and _is_permuted(file, tensor, config)
        sources[name] = _Source(tensor.name, tensor.shape, permuted)
        infos[name] = TensorInfo(name, tensor.dtype, tensor.shape, tensor.n_bytes)
    return sources, infos


def _hf_name(file: GgufFile, tensor: GgufTensor, n_layers: int) -> str:
    if tensor.name in _TENSORS:
        return _TENSORS[tensor.name]
    match = _LAYER_TENSOR.fullmatch(tensor.name)
    if match is None or match[2] not in _LAYER:
        raise Unsupported(f"{file.path}: tensor {shown(tensor.name)}: is not part of any model family offered here")
    if int(match[1]) >= n_layers:
        raise _tensor_error(file, tensor, f"belongs to layer {match[1]}, but block_count is {n_layers}")
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _is_permuted(file: GgufFile, tensor: GgufTensor, config: Mapping[str, Any]) -> bool:
    """Whether this tensor of a llama file has its rows in GGUF's order: q and k do, their biases too."""
    if ".attn_q." in tensor.name:
        n_rows = config["num_attention_heads"] * config["head_dim"]
    elif ".attn_k." in tensor.name:
        n_rows = config["num_key_value_heads"] * config["head_dim"]
    else:
        return False
    if config["head_dim"] % 2:
        raise _tensor_error(file, tensor, f"has heads of {config['head_dim']} rows, must be an even number")
    if tensor.shape[0] != n_rows:
        raise _tensor_error(
            file, tensor, f"has {tensor.shape[0]} rows, heads times head_dim in the config are {n_rows}"
        )
    if len(tensor.shape) == 1 and BLOCKS[tensor.dtype][0] > 1:
        raise _tensor_error(file, tensor, f"is a vector of {tensor.dtype.name}, must be F32, F16 or BF16")
    return True
