"""transformers' Llama on the CPU, built from the tensors of a loaded model's file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from fabula import _native
from fabula.bench.model import Run
from fabula.bench.status import Status
from fabula.errors import Unsupported
from fabula.formats.checkpoint import Checkpoint
from fabula.formats.open import open_checkpoint
from fabula.model import Model
from fabula.models.description import ModelConfig

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_HEAD = "lm_head.weight"


class Transformers:
    """A Llama in transformers.

    Args:
        model: in evaluation mode.
        threads: threads of torch.
    """

    name = "transformers"

    def __init__(self, model: Any, threads: int) -> None:
        self._model = model
        torch.set_num_threads(threads)
        text = f"{transformers.__version__}, torch {torch.__version__}, {threads} threads, {model.dtype}".replace(
            "torch.", ""
        )
        self.settings = dict.fromkeys(("prefill", "decode"), text)

    @classmethod
    def of(cls, model: Model, status: Status) -> Transformers:
        """Opens transformers for a loaded model.

        Raises:
            Unsupported: the model is not a Llama, has other tensors, or quantized weights.
        """
        if model.config.model_type != "llama":
            raise Unsupported(f"only Llama is built here, the model is {model.config.model_type}")
        if model.weights not in _DTYPES:
            raise Unsupported(f"it computes in {', '.join(_DTYPES)}, the weights are {model.weights}")
        status(f"{model.weights}: building transformers' model")
        checkpoint = open_checkpoint(model.path)
        try:
            config = _config(model.config)
            built: Any = transformers.LlamaForCausalLM(config)
            missing, unexpected = built.load_state_dict(_tensors(checkpoint), strict=False)
        finally:
            checkpoint.close()
        if set(missing) - {_HEAD} or unexpected:
            raise Unsupported("the model has other tensors than transformers' Llama")
        built.tie_weights()
        return cls(built.to(_DTYPES[model.weights]).eval(), model.threads)

    def run(self, prompt: Sequence[int], n_tokens: int) -> Run:
        with torch.inference_mode():
            start = time.perf_counter()
            token, cache = self._step(list(prompt), None)
            first = time.perf_counter()
            tokens = [token]
            for _ in range(n_tokens - 1):
                token, cache = self._step(tokens[-1:], cache)
                tokens.append(token)
            return Run(first - start, time.perf_counter() - first, tuple(tokens))

    def together(self, prompts: Sequence[Sequence[int]], shared: int, n_tokens: int) -> None:
        """Not measured: batches are padded and share no prefix."""

    def close(self) -> None:
        """Frees the weights."""
        self._model = None

    def _step(self, tokens: list[int], cache: Any) -> tuple[int, Any]:
        out = self._model(
            input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        return int(out.logits[0, -1].argmax()), out.past_key_values


def _config(c: ModelConfig) -> Any:
    return transformers.LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.context_length,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default"} | dict(c.rope),
        tie_word_embeddings=c.tied,
        attention_bias=c.attention_bias,
        mlp_bias=c.mlp_bias,
    )


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """All tensors of a checkpoint as f32."""
    tensors = {}
    for name, info in checkpoint.tensors.items():
        n = int(np.prod(info.shape, dtype=np.int64))
        values: npt.NDArray[np.float32] = _native.dequantize(info.dtype, checkpoint.read(name), n)
        tensors[name] = torch.from_numpy(values.reshape(info.shape))
    return tensors
