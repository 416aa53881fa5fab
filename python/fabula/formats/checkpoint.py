"""The interface of a model on disk, whatever its file format: a config and named tensors.

Both readers use Hugging Face's names: `config` has the keys of config.json and tensors have the names of a
`transformers` checkpoint (`model.layers.0.self_attn.q_proj.weight`), so a model family is written once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fabula.errors import Unsupported
from fabula.lean_dataclasses import dataclass


class DType(enum.IntEnum):
    """Number formats of tensors; values as in `enum fb_dtype` of fabula.h."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q4_0 = 3
    Q4_1 = 4
    Q5_0 = 5
    Q5_1 = 6
    Q8_0 = 7
    Q4_K = 8
    Q5_K = 9
    Q6_K = 10
    Q2_K = 11
    Q3_K = 12
    IQ4_NL = 13
    MXFP4 = 14


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: Hugging Face name.
        dtype: format of its bytes.
        shape: row-major, slowest dimension first, as in `transformers`: a linear weight is (out, in).
        n_bytes: bytes that `Checkpoint.read` returns.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    n_bytes: int


class Span(NamedTuple):
    """Where a file has the bytes that `Checkpoint.read` would return, for code that reads them itself.

    Attributes:
        file: descriptor, open until the checkpoint is closed.
        offset: of the first byte.
        path: for messages.
        after: to be called once the bytes were read, by any thread; None for nothing.
    """

    file: int
    offset: int
    path: Path
    after: Callable[[], None] | None = None


class TensorTable(Mapping[str, TensorInfo]):
    """Tensors by name. Iterates over the supported ones; looking up an unsupported one raises Unsupported.

    Args:
        path: of the model, for error messages.
        tensors: the supported tensors.
        others: for each unsupported tensor, why.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], others: dict[str, str]) -> None:
        self._path = path
        self._tensors = tensors
        self.others = others

    @property
    def all_names(self) -> set[str]:
        """Names of all tensors, unsupported ones included."""
        return self._tensors.keys() | self.others.keys()

    def __getitem__(self, name: str) -> TensorInfo:
        if name in self.others:
            raise Unsupported(f"{self._path}: tensor {name[:80]!r} {self.others[name]}")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Checkpoint(Protocol):
    """An opened model. Reads by position, not by memory map, so a file that shrinks gives an error, not a signal.

    Attributes:
        path: the folder or .gguf file.
        format: "safetensors" or "gguf".
        config: keys and values as in config.json.
        metadata: the GGUF key-values, empty for safetensors.
        tensors: by Hugging Face name.
    """

    path: Path
    format: str
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor's raw bytes, uint8 [n_bytes], rows in Hugging Face's order.

        Raises:
            ModelFileError: no such tensor, or the file ended early.
        """
        ...

    def span(self, name: str) -> Span | None:
        """Where a file has these bytes; None if they are not in one piece there, so that only `read` gives them."""
        ...

    def close(self) -> None:
        """Closes the files; may be called twice."""
        ...
