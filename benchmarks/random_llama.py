"""Llamas of any shape with random weights generated on read, to measure speed without a file.

A tensor repeats one block of random numbers, so that even 8 billion weights take little time and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula.formats.checkpoint import DType, TensorInfo

_PIECE = 1 << 18  # elements, a multiple of every block size
_SPREAD = (
    0.02  # standard deviation of weights, about that of trained models, so that products stay in range of every format
)


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The shape of a Llama. Sources: config.json of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def config(self, context: int) -> dict[str, Any]:
        """As in config.json."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": self.tied,
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shapes of the matrices, by their names in a checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "self_attn.q_proj.weight": (q, self.hidden),
                prefix + "self_attn.k_proj.weight": (kv, self.hidden),
                prefix + "self_attn.v_proj.weight": (kv, self.hidden),
                prefix + "self_attn.o_proj.weight": (self.hidden, q),
                prefix + "mlp.gate_proj.weight": (self.inner, self.hidden),
                prefix + "mlp.up_proj.weight": (self.inner, self.hidden),
                prefix + "mlp.down_proj.weight": (self.hidden, self.inner),
            }
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocab, self.hidden)}

    @property
    def multiplied(self) -> int:
        """Weights multiplied per token, including the head; an untied embedding is only looked up."""
        looked_up = 0 if self.tied else self.vocab * self.hidden
        return sum(rows * columns for rows, columns in self.matrices().values()) - looked_up


SMOLLM2_135M = LlamaShape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, True)
LLAMA_1B = LlamaShape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256, True)
LLAMA_8B = LlamaShape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128, 128256, False)
TINY = LlamaShape("tiny", 64, 96, 2, 4, 2, 16, 128, False)


class RandomLlama:
    """A checkpoint with random weights.

    Args:
        shape: how large it is.
        dtype: format of its matrices; vectors are f32 and all ones.
        context: positions that it knows.
    """

    format = "safetensors"

    def __init__(self, shape: LlamaShape, dtype: DType, context: int) -> None:
        self.path = Path("random") / shape.name
        self.config: Mapping[str, Any] = shape.config(context)
        self.metadata: Mapping[str, Any] = {}
        rows = np.random.default_rng(0).standard_normal((_PIECE // 256, 256), np.float32) * np.float32(_SPREAD)
        self._piece = _native.quantize(dtype, rows, 1)
        elements, n_bytes = _native.dtype_block(dtype)
        tensors = [
            TensorInfo(name, dtype, dims, dims[0] * dims[1] // elements * n_bytes)
            for name, dims in shape.matrices().items()
        ]
        norms = [f"model.layers.{i}.{kind}" for i in range(shape.layers) for kind in ("input", "post_attention")]
        names = ["model.norm.weight", *(f"{norm}_layernorm.weight" for norm in norms)]
        tensors += [TensorInfo(name, DType.F32, (shape.hidden,), 4 * shape.hidden) for name in names]
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in tensors}

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        info = self.tensors[name]
        if len(info.shape) == 1:
            return np.ones(info.shape, np.float32).view(np.uint8)
        return np.resize(self._piece, info.n_bytes)

    def span(self, name: str) -> None:
        """In no file."""

    def close(self) -> None:
        """Does nothing."""
