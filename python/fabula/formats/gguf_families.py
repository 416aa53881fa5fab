"""The architectures of GGUF files, one row each: which family's config.json and tensors they hold, and how.

A row says what differs from Llama: the tensors a layer has, which of them may have biases, the order of q's and k's
rows, the windows, and keys that only this architecture reads. What only a file decides is set by a function. Rows and
functions are in tables by kind: gguf_dense.py, gguf_layer_norm.py, gguf_sparse.py, gguf_hybrids.py.

Some numbers are in no key: llama.cpp derives them from the architecture and the number of layers, as noted at each row.

Source: load_arch_hparams and load_arch_tensors of llama.cpp's src/models, its conversion scripts, and the list of rope
types in src/llama-model.cpp, all in the source of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Mapping

from fabula.formats.gguf_architecture import (
    ALTUP,
    ATTENTION,
    FULL,
    MLP,
    OF_EXPERTS,
    SLIDING,
    XIELU,
    Architecture,
    Facts,
)
from fabula.formats.gguf_dense import DENSE
from fabula.formats.gguf_hybrids import HYBRIDS
from fabula.formats.gguf_latent import LATENT
from fabula.formats.gguf_layer_norm import LAYER_NORM
from fabula.formats.gguf_sparse import SPARSE

__all__ = [
    "ALTUP",
    "ARCHITECTURES",
    "ATTENTION",
    "FULL",
    "MLP",
    "OF_EXPERTS",
    "PAIRED",
    "SLIDING",
    "XIELU",
    "Architecture",
    "Facts",
]

ARCHITECTURES: Mapping[str, Architecture] = {**DENSE, **LAYER_NORM, **SPARSE, **LATENT, **HYBRIDS}
# Architectures that store the rows of q and k pairwise (gguf_names.py).
PAIRED = tuple(arch for arch, row in ARCHITECTURES.items() if row.paired)
