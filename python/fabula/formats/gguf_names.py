"""Maps GGUF tensors to Hugging Face's names and row order. gguf_config.py maps the config.

    blk.3.attn_q.weight           ->  model.layers.3.self_attn.q_proj.weight   (see _TENSORS, _LAYER)

The names are those of formats/tensor_names.py, which models/ takes for every family; gguf_families.py has those
that an architecture calls otherwise. Fused tensors stay fused: `attn_qkv` is `qkv_proj`, and a doubled `ffn_up`
`gate_up_proj`.

GGUF's llama files store the rows of q and k in another order: ggml rotates neighboring rows (2 i, 2 i + 1) of a head,
Hugging Face rows (i, i + head_dim / 2). So each head's rows are permuted back when they are read. Quantized blocks run
along a row, so whole rows move unchanged. Qwen's files are in Hugging Face's order already.

An unknown architecture, tensor or scaling is refused, because a model with a missing part produces nonsense.

Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula.errors import ModelFileError, Unsupported, shown
from fabula.formats.checkpoint import DType, Span, TensorInfo
from fabula.formats.gguf import BLOCKS, GgufFile, GgufTensor
from fabula.formats.gguf_config import QUANTIZATION_VERSION, ROPE_TENSORS, Source, config_of, tensor_error
from fabula.formats.gguf_families import ALTUP, ARCHITECTURES, OF_EXPERTS, XIELU, Architecture
from fabula.formats.gguf_split import GgufParts, open_gguf_file
from fabula.lean_dataclasses import dataclass

__all__ = ["NO_SINK", "QUANTIZATION_VERSION", "GgufCheckpoint", "gguf_name", "open_gguf", "permute_rows"]

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output_norm.bias": "model.norm.bias",
    "output.bias": "lm_head.bias",
    "position_embd.weight": "model.embed_positions.weight",
    "token_embd_norm.weight": "model.embed_norm.weight",
    "token_embd_norm.bias": "model.embed_norm.bias",
    "altup_proj.weight": "model.altup_projections.weight",
    "altup_unembd_proj.weight": "model.altup_unembed_projections.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
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
    "attn_qkv": "self_attn.qkv_proj",
    "attn_norm_2": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_LAYER_TENSOR = re.compile(
    r"blk\.(0|[1-9][0-9]{0,8})\.(?:((?:shortconv\.)?[a-z0-9_]+)\.(weight|bias|scale)|(ssm_[ad]|ffn_norm))"
)
_NORMS = ("attn_norm", "attn_norm_2", "ffn_norm")  # those that have biases if any norm has
_GGUF_NAMES = {
    theirs: ours for ours, theirs in (*_TENSORS.items(), *_LAYER.items(), *ALTUP.items()) if ours != "attn_norm_2"
}
_NO_WEIGHTS = (
    "layer_output_scale",
    "altup_correct_scale",
    "exp_probs_b",
    "attn_sinks",
    "ssm_a",
    "ssm_d",
    "ssm_dt",
    "ffn_gate_inp.scale",
    "ffn_down_exps.scale",
)  # their names end there in safetensors files
_OF_STREAM = re.compile(r"(model\.altup_[a-z]*projections)\.[0-9]+\.weight")
_HF_LAYER_TENSOR = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.([a-z_.]+)\.(weight|bias)")
_NO_BIASES = ("mistral", "mixtral")  # families in files of architecture llama that have no biases
_SINKS = re.compile(r"blk\.[0-9]{1,9}\.attn_sinks\.weight")
NO_SINK = np.float32(-1e30)  # a sink logit without effect: exp(-1e30) is 0 in the softmax


def open_gguf(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Opens a .gguf file, or the first part of a split model, as a checkpoint.

    Raises:
        ModelFileError: the file is damaged, a key or tensor is missing, of the wrong type or out of range, or the parts
            do not belong together.
        Unsupported: an unsupported architecture, tensor, tensor type or scaling.
        OutOfMemory: no room for the header.
    """
    file = open_gguf_file(path)
    try:
        return GgufCheckpoint(file)
    except BaseException:
        file.close()
        raise


class GgufCheckpoint:
    """A GGUF file as a `fabula.formats.checkpoint.Checkpoint`. Owns the file.

    `rope_scaling` of its config may have a type that config.json does not know; see gguf_config.py.
    """

    def __init__(self, file: GgufFile | GgufParts) -> None:
        self._file = file
        self.path = file.path
        self.format = "gguf"
        self.metadata: Mapping[str, Any] = file.metadata
        self.config: Mapping[str, Any] = config_of(file)
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
        if source.name is None:
            numbers = np.full(self.tensors[name].shape, source.value, np.float32)
            return numbers.reshape(-1).view(np.uint8)
        raw = self._file.read(source.name)
        return _unpermute(raw, source.shape[0], self._head_dim) if source.permuted else raw

    def span(self, name: str) -> Span | None:
        """Where the file has these bytes; see `Checkpoint.span`."""
        source = self._sources.get(name)
        if source is None or source.name is None or source.permuted:
            return None
        return self._file.span(source.name)

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor comes from: its GGUF name (None: all its numbers are `value`, such as 0 for a bias that is not in
    the file), its shape, and whether its rows are permuted."""

    name: str | None
    shape: tuple[int, ...]
    permuted: bool
    value: float = 0.0


def _unpermute(raw: npt.NDArray[np.uint8], n_rows: int, head_dim: int) -> npt.NDArray[np.uint8]:
    """Rows (head, pair, member) of GGUF's llama to Hugging Face's (head, member, pair); raw is uint8 [n_bytes]."""
    rows = raw.reshape(n_rows // head_dim, head_dim // 2, 2, raw.size // n_rows)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)


def permute_rows(raw: npt.NDArray[np.uint8], n_rows: int, head_dim: int) -> npt.NDArray[np.uint8]:
    """Rows (head, member, pair) of Hugging Face to GGUF's (head, pair, member); raw is uint8 [n_bytes]."""
    rows = raw.reshape(n_rows // head_dim, 2, head_dim // 2, raw.size // n_rows)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)


def gguf_name(name: str) -> str | None:
    """The GGUF name of a tensor, as most architectures have it; None if it has none."""
    name = _OF_STREAM.sub(r"\1.weight", name)
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    match = _HF_LAYER_TENSOR.fullmatch(name)
    part = None if match is None else _GGUF_NAMES.get(match[2])
    return None if match is None or part is None else f"blk.{match[1]}.{part}.{match[3]}"


def canonical_name(name: str, arch: str, *, two_norms: bool = False) -> str | None:
    """The name that models/ knows a GGUF tensor by; None if there is none. A name of that kind is returned as it is.

    Args:
        name: of the tensor.
        arch: architecture of the file.
        two_norms: whether it is a Falcon with two norms a layer, the second of which is that of attention.
    """
    row = ARCHITECTURES[arch]
    if name == f"{row.final_norm}.weight":
        return "model.norm.weight"
    if name in _TENSORS:
        return _TENSORS[name]
    if match := _LAYER_TENSOR.fullmatch(name):
        part, kind = _part_of(match), match[3] or "weight"
        if part not in row.names and part not in _LAYER:
            return None
        found = row.names.get(part, _LAYER.get(part, ""))
        if two_norms:
            found = {"attn_norm": _LAYER["attn_norm_2"], "attn_norm_2": _LAYER["attn_norm"]}.get(part, found)
        return f"model.layers.{match[1]}.{found}" + ("" if part in _NO_WEIGHTS else f".{kind}")
    if match := _HF_LAYER_TENSOR.fullmatch(name):
        return name if match[2] in {*_LAYER.values(), *row.names.values()} else None
    return name if name in _TENSORS.values() else None


def stored_name(layer: int, part: str, arch: str = "") -> str:
    """A layer's tensor in a file. Factors are ".scale" of a part, whose matrix has that name, too."""
    ending = {"ssm_a": "", "ssm_d": "", "ssm_dt": ".bias", "exp_probs_b": ".bias"}.get(part, ".weight")
    is_whole = part.endswith(".scale") or (arch, part) == ("falcon-h1", "ffn_norm")
    return f"blk.{layer}.{part}" + ("" if is_whole else ending)


def _part_of(match: re.Match[str]) -> str:
    return (match[2] or match[4]) + (".scale" if match[3] == "scale" else "")


# ---- Tensors ------------------------------------------------------------------------------------------


def _tensors(file: Source, config: Mapping[str, Any]) -> tuple[dict[str, _Source], dict[str, TensorInfo]]:
    """Sources and infos of the tensors, by Hugging Face name."""
    sources: dict[str, _Source] = {}
    infos: dict[str, TensorInfo] = {}
    arch = str(file.metadata["general.architecture"])
    row = ARCHITECTURES[arch]
    is_mistral = config["model_type"] in _NO_BIASES
    for tensor in file.tensors.values():
        if tensor.name in ROPE_TENSORS or _is_no_sink(file, tensor):  # config_of has read those
            continue
        if file.metadata.get(f"{arch}.nextn_predict_layers") and _layer_of(tensor.name) >= config["num_hidden_layers"]:
            continue
        name = _hf_name(file, tensor, config, row)
        permuted = row.paired and _is_permuted(file, tensor, config)
        shape = tensor.shape
        if name.startswith("model.altup_") and len(shape) == 3:  # a matrix for each stream, one below the other
            shape = (shape[0] * shape[1], shape[2])
        if name.endswith(".shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)
        sources[name] = _Source(tensor.name, shape, permuted)
        infos[name] = TensorInfo(name, tensor.dtype, shape, tensor.n_bytes)
    for name in () if is_mistral else _biases(config, row):
        if name not in infos and (weight := infos.get(name.replace(".bias", ".weight"))) is not None:
            length = weight.shape[0]
            sources[name] = _Source(None, (length,), False)
            infos[name] = TensorInfo(name, DType.F32, (length,), 4 * length)
    if config["model_type"] == "deepseek_v3":  # no correction where it is missing
        n = config["n_routed_experts"]
        for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
            name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            sources.setdefault(name, _Source(None, (n,), False))
            infos.setdefault(name, TensorInfo(name, DType.F32, (n,), 4 * n))
    if arch == "gemma4":
        for layer in range(config["num_hidden_layers"]):  # 1 where it is missing
            name = f"model.layers.{layer}.layer_scalar"
            sources.setdefault(name, _Source(None, (1,), False, 1.0))
            infos.setdefault(name, TensorInfo(name, DType.F32, (1,), 4))
            if n_experts := config.get("num_experts"):
                name = f"model.layers.{layer}.mlp.gate.per_expert_scale"
                sources.setdefault(name, _Source(None, (n_experts,), False, 1.0))
                infos.setdefault(name, TensorInfo(name, DType.F32, (n_experts,), 4 * n_experts))
    if arch == "apertus":
        for name, value in _xielu_numbers(file, config["num_hidden_layers"]):
            sources[name] = _Source(None, (1,), False, value)
            infos[name] = TensorInfo(name, DType.F32, (1,), 4)
    return sources, infos


def _layer_of(name: str) -> int:
    """The number of a tensor's layer, -1 for one of no layer."""
    match = re.match(r"blk\.([0-9]{1,9})\.", name)
    return int(match[1]) if match else -1


def _xielu_numbers(file: Source, n_layers: int) -> Iterator[tuple[str, float]]:
    """The numbers of xIELU, which are keys in GGUF and tensors elsewhere."""
    for key in XIELU:
        values = np.broadcast_to(np.asarray(file.metadata[f"xielu.{key}"]), n_layers)
        for layer, value in enumerate(values.tolist()):
            yield f"model.layers.{layer}.mlp.act_fn.{key}", value


def _is_no_sink(file: Source, tensor: GgufTensor) -> bool:
    """Whether a tensor holds granite_swa's attention sinks, float32 [n_heads], without effect.

    Raises:
        Unsupported: the sinks have an effect.
    """
    if file.metadata["general.architecture"] != "granite_swa" or not _SINKS.fullmatch(tensor.name):
        return False
    if tensor.dtype != DType.F32 or not (file.read(tensor.name).view("<f4") <= NO_SINK).all():
        raise Unsupported(f"{file.path}: tensor {shown(tensor.name)}: attention sinks are not offered")
    return True


def _biases(config: Mapping[str, Any], row: Architecture) -> Iterator[str]:
    """The names of all biases that the program of this config adds. A GGUF file may leave out any of them, which are
    then 0."""
    for flag, parts in row.biases.items():
        if not flag or config[flag]:
            for part in parts:
                for layer in range(config["num_hidden_layers"]):
                    yield f"model.layers.{layer}.{row.names.get(part) or _LAYER[part]}.bias"


def _hf_name(file: Source, tensor: GgufTensor, config: Mapping[str, Any], row: Architecture) -> str:
    """Refuses a tensor that the program of this config does not use, as llama.cpp does."""
    arch = file.metadata["general.architecture"]
    if tensor.name == f"{row.final_norm}.weight":
        return "model.norm.weight"
    if tensor.name in _TENSORS:
        wanted = {
            "output_norm.weight": False,
            "output_norm.bias": row.norm_bias,
            "output.bias": row.head_bias,
            "position_embd.weight": row.positions,
            "token_embd_norm.weight": row.embedding_norm,
            "token_embd_norm.bias": row.embedding_norm,
            "altup_proj.weight": "altup_router" in row.layer,
            "altup_unembd_proj.weight": "altup_router" in row.layer,
        }
        if wanted.get(tensor.name, True):
            return _TENSORS[tensor.name]
    match = _LAYER_TENSOR.fullmatch(tensor.name)
    part = "" if match is None else _part_of(match)
    if match is None or part not in {**_LAYER, **row.names}:
        raise Unsupported(f"{file.path}: tensor {shown(tensor.name)}: is not part of any model family offered here")
    if int(match[1]) >= config["num_hidden_layers"]:
        raise tensor_error(
            file, tensor, f"belongs to layer {match[1]}, but block_count is {config['num_hidden_layers']}"
        )
    is_mistral = config["model_type"] in _NO_BIASES
    biased = () if is_mistral else {part for parts in row.biases.values() for part in parts}
    is_sparse = any(key in config for key in ("num_experts", "n_routed_experts", "moe_num_experts"))
    allowed = part in row.layer and (is_sparse or not part.endswith(OF_EXPERTS))
    if match[3] == "bias":
        allowed = allowed and (part in (*biased, "exp_probs_b", "ssm_dt") or (row.norm_bias and part in _NORMS))
    name = canonical_name(tensor.name, str(arch), two_norms=config.get("num_ln_in_parallel_attn") == 2)
    if not allowed or name is None:
        window = " with a window" if config["model_type"] == "mistral" else ""
        raise Unsupported(
            f"{file.path}: tensor {shown(tensor.name)}: is not part of models of architecture {arch!r}{window}"
        )
    return name


def _is_permuted(file: Source, tensor: GgufTensor, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of a llama file has its rows in GGUF's order: weights and biases of q and k."""
    if ".attn_q." in tensor.name:
        n_rows = config["num_attention_heads"] * config["head_dim"]
    elif ".attn_k." in tensor.name:
        n_rows = config["num_key_value_heads"] * config["head_dim"]
    else:
        return False
    if config["head_dim"] % 2:
        raise tensor_error(file, tensor, f"has heads of {config['head_dim']} rows, must be an even number")
    if tensor.shape[0] != n_rows:
        raise tensor_error(file, tensor, f"has {tensor.shape[0]} rows, heads times head_dim in the config are {n_rows}")
    if len(tensor.shape) == 1 and BLOCKS[tensor.dtype][0] > 1:
        raise tensor_error(file, tensor, f"is a vector of {tensor.dtype.name}, must be F32, F16 or BF16")
    return True
