"""Chooses the format of each tensor, in a file or in memory, as llama.cpp does.

    f32 f16 bf16               every matrix in it
    q8_0 q6_k q5_k q3_k ...    every matrix in it
    mxfp4                      the matrices of MLPs and experts in it, all others in Q8_0
    q2_k q4_k iq4_nl           a few tensors of the first layers, or attn_v, attn_output and ffn_down, in more bits
    q4_k_m q5_k_m              attn_v and ffn_down of the first, the last and every third layer in Q6_K

The head, and a tied embedding, get Q6_K or better. Small matrices of Gemma 3n and 4 stay F16 (_SMALL). Vectors (norms,
biases), routers and convolutions stay F32. Rows that are not a multiple of a format's block fall back to a format with
blocks of 32, or else to F16.

Source: facts of llama.cpp's src/llama-quant.cpp. Its names for q4_k, q5_k and q3_k are Q4_K_S, Q5_K_S and Q3_K_S.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from fabula.formats.checkpoint import DType
from fabula.formats.gguf import BLOCKS
from fabula.lean_dataclasses import dataclass

_LAYER = re.compile(r"blk\.(\d+)\.((?:shortconv\.)?[a-z_]+)\.weight")
_ROLES = {
    "token_embd.weight": "embedding",
    "output.weight": "head",
    **{f"{role}.weight": role for role in ("per_layer_token_embd", "per_layer_model_proj")},
    **{f"{role}.weight": role for role in ("altup_proj", "altup_unembd_proj")},
}
_SMALL = ("altup_", "laurel_", "per_layer_model_proj")  # beginnings of roles


@dataclass(frozen=True, slots=True)
class Kind:
    """A quantization type.

    Attributes:
        dtype: of matrices without a rule of their own.
        file_type: its number in enum llama_ftype, for `general.file_type`.
    """

    dtype: DType
    file_type: int


KINDS: Mapping[str, Kind] = {
    "f32": Kind(DType.F32, 0),
    "f16": Kind(DType.F16, 1),
    "bf16": Kind(DType.BF16, 32),
    "q8_0": Kind(DType.Q8_0, 7),
    "q6_k": Kind(DType.Q6_K, 18),
    "q5_k_m": Kind(DType.Q5_K, 17),
    "q5_k": Kind(DType.Q5_K, 16),
    "q5_1": Kind(DType.Q5_1, 9),
    "q5_0": Kind(DType.Q5_0, 8),
    "q4_k_m": Kind(DType.Q4_K, 15),
    "q4_k": Kind(DType.Q4_K, 14),
    "q4_1": Kind(DType.Q4_1, 3),
    "q4_0": Kind(DType.Q4_0, 2),
    "iq4_nl": Kind(DType.IQ4_NL, 25),
    "mxfp4": Kind(DType.MXFP4, 38),
    "q3_k": Kind(DType.Q3_K, 11),
    "q2_k": Kind(DType.Q2_K, 10),
}

_FALLBACK = {
    DType.Q2_K: DType.Q4_0,
    DType.Q3_K: DType.Q4_0,
    DType.Q4_K: DType.Q5_0,
    DType.Q5_K: DType.Q5_1,
    DType.Q6_K: DType.Q8_0,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Properties of the model that the choice depends on.

    Attributes:
        n_layers: of the model.
        queries_per_kv: query heads that share a KV head.
        tied: whether head and embedding are one matrix.
    """

    n_layers: int
    queries_per_kv: int
    tied: bool


def role_of(name: str) -> str:
    """A tensor's role, from its GGUF name: "embedding", "head", "attn_q", ..., or "norms and biases"."""
    if name in _ROLES:
        return _ROLES[name]
    match = _LAYER.fullmatch(name)
    return match[2] if match and not match[2].endswith("norm") else "norms and biases"


def dtype_for(kind: Kind, name: str, shape: tuple[int, ...], model: Shape) -> DType:
    """The format of a tensor, by its GGUF name."""
    role = role_of(name)
    if role.startswith("ffn_gate_inp"):  # they decide which experts are chosen
        return DType.F32
    if len(shape) < 2 or role in ("norms and biases", "shortconv.conv"):
        return DType.F32
    if BLOCKS[kind.dtype][0] == 1:
        return kind.dtype
    if role.startswith(_SMALL):
        return DType.F16
    dtype = kind.dtype
    if kind is KINDS["mxfp4"] and not role.startswith("ffn_"):
        dtype = DType.Q8_0
    elif role == "head" or (role == "embedding" and model.tied):
        # It affects every logit, so it gets more bits than the rest.
        dtype = DType.Q6_K if dtype is not DType.Q8_0 and shape[-1] % BLOCKS[dtype][0] == 0 else DType.Q8_0
    elif match := _LAYER.fullmatch(name):
        dtype = _mixed(kind, role.removesuffix("_exps").removesuffix("_shexp"), int(match[1]), model)
    if shape[-1] % BLOCKS[dtype][0]:
        dtype = _FALLBACK.get(dtype, DType.F16)
    return DType.F16 if shape[-1] % BLOCKS[dtype][0] else dtype


def _mixed(kind: Kind, role: str, layer: int, model: Shape) -> DType:
    """The format of a layer's matrix before the fallback for its row length."""
    many_queries = model.queries_per_kv >= 4  # then attn_v is small compared to the rest
    eighth = model.n_layers // 8
    if kind is KINDS["q2_k"]:
        if role == "attn_v":
            return DType.Q4_K if many_queries else DType.Q3_K
        return DType.Q3_K if role in ("attn_output", "ffn_down") else kind.dtype
    if kind is KINDS["q4_k"] or kind is KINDS["iq4_nl"]:
        values = many_queries if kind is KINDS["iq4_nl"] else layer < 4
        more = (role == "attn_v" and values) or (role == "ffn_down" and layer < eighth)
        return DType.Q5_K if more else kind.dtype
    if kind is KINDS["q4_k_m"] or kind is KINDS["q5_k_m"]:
        more = layer < eighth or layer >= 7 * model.n_layers // 8 or (layer - eighth) % 3 == 2
        return DType.Q6_K if more and role in ("attn_v", "ffn_down") else kind.dtype
    return kind.dtype
