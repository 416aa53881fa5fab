"""The sampling chain of the native library on logits in memory; see fb_sample in fabula.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula._ffi import ffi, lib
from fabula._native import F32, I32, check, floats, ints
from fabula.errors import InvalidArgument


def sampling_struct(*, chain: Sequence[int] | None = None, **fields: Any) -> Any:
    """A struct fb_sampling with the library's defaults and `fields` set over them."""
    settings = ffi.new("struct fb_sampling *")
    lib.fb_sampling_default(settings)
    for name, value in fields.items():
        setattr(settings, name, value)
    if chain is not None:
        if len(chain) > lib.FB_MAX_CHAIN:
            raise InvalidArgument(f"chain has {len(chain)} steps, at most {lib.FB_MAX_CHAIN} fit")
        settings.n_chain = len(chain)
        for i, step in enumerate(chain):
            settings.chain[i] = step
    return settings


def sample_work(vocab_size: int) -> npt.NDArray[np.float64]:
    """Scratch for sample(), 16-byte aligned, as complex128 guarantees."""
    n_bytes = int(lib.fb_sample_work_bytes(vocab_size))
    return np.empty(-(-n_bytes // 16) * 2, np.float64)


def _sample_arguments(
    logits: F32, settings: Any, position: int, history: I32, bias_ids: I32, bias_values: F32, breakers: I32, work: Any
) -> tuple[Any, ...]:
    return (
        floats(logits), logits.size, settings, position, ints(history), history.size,
        ints(bias_ids), floats(bias_values), bias_ids.size, ints(breakers), breakers.size,
        ffi.cast("void *", work.ctypes.data),
    )  # fmt: skip


def sample(
    logits: F32, settings: Any, position: int, history: I32, bias_ids: I32, bias_values: F32, breakers: I32, work: Any
) -> tuple[int, float]:
    """Samples one token; see fb_sample. Returns (token id, natural log-probability under the plain softmax)."""
    token, logprob = ffi.new("int32_t *"), ffi.new("float *")
    arguments = _sample_arguments(logits, settings, position, history, bias_ids, bias_values, breakers, work)
    check(lib.fb_sample(*arguments, token, logprob))
    return int(token[0]), float(logprob[0])


def sample_probabilities(
    logits: F32, settings: Any, position: int, history: I32, bias_ids: I32, bias_values: F32, breakers: I32, work: Any
) -> F32:
    """The probabilities the chain leaves, float32 [vocab_size]; see fb_sample_probabilities."""
    out = np.empty(logits.size, np.float32)
    arguments = _sample_arguments(logits, settings, position, history, bias_ids, bias_values, breakers, work)
    check(lib.fb_sample_probabilities(*arguments, floats(out)))
    return out


def random_words(seed: int, position: int, stream: int) -> tuple[int, int, int, int]:
    """Four 32-bit words of Philox 4x32-10 for (seed, position, stream)."""
    words = ffi.new("uint32_t[4]")
    lib.fb_random(seed, position, stream, words)
    return words[0], words[1], words[2], words[3]
