"""Typed access to GGUF key-values, and the effect of each `<architecture>.*` key on the logits.

llama.cpp has about 170 such keys for all its architectures. For the supported ones, each key is one of:

    READ         gguf_config.py applies it, or `reads` of the architecture's row
    NO_EFFECT    no logit depends on it
    others that name a computation: must be neutral (see `_is_neutral`), or the file is refused by the key's name

So a key for an unsupported computation is never ignored, whether or not llama.cpp applies it in this architecture.
Unknown keys are ignored, as in llama.cpp.

Sources: llama.cpp's src/llama-arch.cpp (names), src/llama-model.cpp `load_hparams` and src/models/ (who reads them).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fabula.errors import ModelFileError, Unsupported, shown

INT32_MAX = 2**31 - 1
NO_TOKEN = 2**32 - 1  # -1 as UINT32: written by converters for "no such token"

READ = frozenset([
    "attention.causal", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attention.sliding_window_pattern", "attention.value_length", "block_count",
    "context_length", "embedding_length", "expert_count", "feed_forward_length", "rope.dimension_count",
    "rope.freq_base", "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.type", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
])  # fmt: skip
NO_EFFECT = frozenset([
    "vocab_size",  # the vocabulary itself counts, and must match the rows of the embedding
    "tensor_data_layout",  # names the row order of q and k, which is always the same in these files
    "rope.scaling.finetuned",  # whether the model was trained with its scaling
    "pooling_type", "classifier.pooling_type", "classifier.output_labels",  # of embeddings; a head would be a tensor
    "decoder_start_token_id",  # of encoder-decoder models
])  # fmt: skip

# Prefixes of keys that name a computation, in any architecture.
_COMPUTING = re.compile(
    r"activation[._]|adapters\.|altup\.|attention\.|attn_|block_size$|conv_|convnext\.|decoder_block|deepstack_|dense_|"
    r"embedding_length_|embedding_scale$|expert|features_length$|final_logit|full_attention_|hash_layer|"
    r"hidden_activation$|hrm\.|hyper_connection\.|interleave_|kda\.|leading_dense|logit_scale$|moe_|n_deepstack|nextn_|"
    r"norm_before_|num_loops$|ple\.|posnet\.|rescale_|residual_scale$|rope\.|router_|selector_|shortconv\.|skip_loop|"
    r"ssm\.|swiglu_|swin_norm$|target_|time_|token_shift_|use_parallel_residual$|wkv\."
)
# Factors: 1 has no effect either. llama.cpp takes 0 for "not given".
_FACTORS = frozenset([
    "attention.output_scale", "attention.value_scale", "embedding_scale", "expert_weights_scale", "logit_scale",
    "residual_scale", "rope.scaling.yarn_ext_factor",
])  # fmt: skip


class GgufWarning(UserWarning):
    """Something in a GGUF file is unusable or wrong, and was ignored."""


def warn(path: Path, message: str) -> None:
    """Warns about a file."""
    warnings.warn(f"{path}: {message}", GgufWarning, stacklevel=3)


class Keys:
    """Typed access to a file's key-values; every error names the key. Integers may have any width.

    Args:
        path: named in errors.
        metadata: see `GgufFile.metadata`.
    """

    def __init__(self, path: Path, metadata: Mapping[str, object]) -> None:
        self.path = path
        self.metadata = metadata

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: key {key!r}: {problem}", path=self.path, field=key)

    def unsupported(self, key: str, problem: str) -> Unsupported:
        return Unsupported(f"{self.path}: key {key!r}: {problem}")

    def has(self, key: str) -> bool:
        return key in self.metadata

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is of type {type(value).__name__}, must be a string")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = INT32_MAX) -> int:
        return self._integer(key, self._get(key, default), low, high)

    def same(self, key: str, n_layers: int, default: int | None = None) -> int:
        """An integer above 0, or an array with that integer for each layer."""
        value = self._get(key, default)
        if not isinstance(value, np.ndarray):
            return self._integer(key, value, 1, INT32_MAX)
        if value.dtype.kind not in "iu":
            raise self.error(key, "is an array, whose items must be integers")
        if len(value) != n_layers:
            raise self.error(key, f"has {len(value)} items, must be one number or one for each of {n_layers} layers")
        if len(distinct := np.unique(value)) != 1:
            numbers = ", ".join(map(str, value[:32])) + (", ..." if len(value) > 32 else "")
            raise self.error(
                key, f"is [{numbers}], must be the same for every layer: layers of different sizes are not offered"
            )
        return self._integer(key, int(distinct[0]), 1, INT32_MAX)

    def each(self, key: str, n_layers: int, default: int | None = None, *, low: int = 1) -> list[int]:
        """An integer, `low` or more, for each layer; one stands for all."""
        value = self._get(key, default)
        if not isinstance(value, np.ndarray):
            return [self._integer(key, value, low, INT32_MAX)] * n_layers
        if value.dtype.kind not in "iu" or len(value) != n_layers:
            raise self.error(key, f"must be an integer or {n_layers} integers, one for each layer")
        return [self._integer(key, int(item), low, INT32_MAX) for item in value]

    def some(self, key: str, n_layers: int, default: int | None = None) -> int:
        """An integer above 0 for each layer, 0 for those without: that of the first layer that has one."""
        found = [item for item in self.each(key, n_layers, default, low=0) if item]
        if not found:
            raise self.error(key, "is 0 for all layers")
        return found[0]

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; integers 0 and 1 are accepted too."""
        value = self._get(key, default)
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise self.error(key, f"is {shown(value)}, must be true or false")

    def positive(self, key: str, default: float | None = None, *, zero: float | None = None) -> float:
        """A finite number above 0. A FLOAT32 becomes the shortest decimal that rounds to it, as in JSON.

        Args:
            key: its name.
            default: value if it is missing.
            zero: value if it is 0; None refuses 0.
        """
        value = self._get(key, default)
        if not isinstance(value, float):
            raise self.error(key, f"is of type {type(value).__name__}, must be a float")
        if value == 0 and zero is not None:
            return zero
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

    def token(self, key: str, vocab_size: int, *, needed: bool = True) -> int | None:
        """A token id; None if the key is missing or means "no token".

        Args:
            key: its name.
            vocab_size: ids are below it.
            needed: whether an id outside the vocabulary is an error; else it means no token.
        """
        value = self.metadata.get(key)
        beyond = isinstance(value, int) and not 0 <= value < vocab_size
        if value is None or (beyond and (value == NO_TOKEN or not needed)):
            return None
        return self._integer(key, value, 0, vocab_size - 1)

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"is of type {type(value).__name__}, must be an integer")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, must be {low} to {high}")
        return value

    def _get(self, key: str, default: object) -> object:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value


def refuse_other_computations(
    keys: Keys, arch: str, neutral: Mapping[str, Collection[object]], more: Collection[str] = ()
) -> None:
    """Refuses keys for computations that the architecture's program does not do.

    Args:
        keys: of the file.
        arch: its architecture.
        neutral: values that agree with what is computed anyway, by key name without the architecture.
        more: names of keys that only this architecture reads.

    Raises:
        Unsupported: such a key; names it and its value.
    """
    read = READ.union(more)
    for key, value in keys.metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or name in read or name in NO_EFFECT or not _COMPUTING.match(name):
            continue
        if not (_is_neutral(name, value) or any(_equal(value, other) for other in neutral.get(name, ()))):
            text = str(value.tolist()) if isinstance(value, np.ndarray) else value
            raise keys.unsupported(key, f"is {shown(text)}; models of architecture {arch!r} are offered without that")


def _is_neutral(name: str, value: object) -> bool:
    """Whether a value switches its computation off: 0, false, empty, or an array of them; -1 in an array of indices."""
    if isinstance(value, np.ndarray):
        return bool(np.isin(value, (0, -1) if value.dtype.kind == "i" else (0,)).all())
    if isinstance(value, list | str):
        return not value
    return value == 0 or (name in _FACTORS and value == 1)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return value is other or (type(value) is type(other) and value == other)
