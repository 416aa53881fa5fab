"""Experts of gpt-oss and Llama 4 in the form of the other families: gate rows first, then up rows, matrices [out, in].

    found in safetensors files                         becomes
    gate_up_proj       [n, hidden, 2 size]             [n, 2 size, hidden]
    gate_up_proj       [n, 2 size, hidden] in MXFP4    [n, 2 size, hidden]
    gate_up_proj_bias  [n, 2 size]                     gate_proj_bias and up_proj_bias, each [n, size]
    down_proj          [n, size, hidden]               [n, hidden, size]; in MXFP4 it is so already

In gpt-oss gates and ups alternate. Source: modeling_gpt_oss.py and modeling_llama4.py of transformers 5.24.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fabula import _native
from fabula.formats.checkpoint import Checkpoint, DType, Span, TensorInfo, TensorTable
from fabula.lean_dataclasses import replace

_EXPERTS = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)")
_BIAS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)gate_up_proj_bias")


class TransposedExperts:
    """A safetensors checkpoint whose experts have the usual form; all else is as it was.

    Args:
        checkpoint: the source.
        alternate: whether gates and ups alternate there.
    """

    def __init__(self, checkpoint: Checkpoint, *, alternate: bool) -> None:
        self._checkpoint, self._alternate = checkpoint, alternate
        self.path: Path = checkpoint.path
        self.format: str = checkpoint.format
        self.config: Mapping[str, Any] = checkpoint.config
        self.metadata: Mapping[str, Any] = checkpoint.metadata
        self._parts = {
            name: match[1]
            for name, info in checkpoint.tensors.items()
            if (match := _EXPERTS.fullmatch(name)) and len(info.shape) == 3
        }
        self._biases: dict[str, tuple[str, int]] = {}  # the tensor that has them, and the first of its columns
        tensors: dict[str, TensorInfo] = {}
        for name, info in checkpoint.tensors.items():
            match = _BIAS.fullmatch(name)
            if match is None or len(info.shape) != 2 or info.shape[1] % 2:
                tensors[name] = self._described(info)
                continue
            for first, part in enumerate(("gate_proj_bias", "up_proj_bias")):
                self._biases[match[1] + part] = name, first
                shape, n_bytes = (info.shape[0], info.shape[1] // 2), info.n_bytes // 2
                tensors[match[1] + part] = TensorInfo(match[1] + part, info.dtype, shape, n_bytes)
        others = checkpoint.tensors.others if isinstance(checkpoint.tensors, TensorTable) else {}
        self.tensors: Mapping[str, TensorInfo] = TensorTable(self.path, tensors, dict(others))

    def _is_transposed(self, info: TensorInfo) -> bool:
        return info.name in self._parts and len(info.shape) == 3 and info.dtype is not DType.MXFP4

    def _described(self, info: TensorInfo) -> TensorInfo:
        if not self._is_transposed(info):
            return info
        n, n_in, n_out = info.shape
        return replace(info, shape=(n, n_out, n_in))

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Reads one tensor; see `Checkpoint.read`."""
        if name in self._biases:
            stored, first = self._biases[name]
            info = self._checkpoint.tensors[stored]
            columns = self._checkpoint.read(stored).reshape(info.shape[0], info.shape[1] // 2, 2, -1)
            return np.ascontiguousarray(columns[:, :, first]).reshape(-1)
        raw = self._checkpoint.read(name)
        part = self._parts.get(name)
        if part is None:
            return raw
        info = self._checkpoint.tensors[name]
        _, n_bytes = _native.dtype_block(info.dtype)
        if self._is_transposed(info):
            rows = raw.reshape(*info.shape, n_bytes).swapaxes(1, 2)
        else:
            rows = raw.reshape(info.shape[0], info.shape[1], -1)
        if part == "down_proj" or not self._alternate:
            return np.ascontiguousarray(rows).reshape(-1)
        n_rows = rows.shape[1]
        order = np.concatenate([np.arange(0, n_rows, 2), np.arange(1, n_rows, 2)])
        return np.ascontiguousarray(rows[:, order]).reshape(-1)

    def span(self, name: str) -> Span | None:
        """Where a file has these bytes; see `Checkpoint.span`."""
        return None if name in self._biases or name in self._parts else self._checkpoint.span(name)

    def close(self) -> None:
        """Closes the checkpoint."""
        self._checkpoint.close()
