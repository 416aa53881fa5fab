"""Creates the programs of a model from its builder: on one device, or one part on each of several joined devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fabula import _native, _program
from fabula._parallel import DeviceGroup, JoinedProgram
from fabula.formats.checkpoint import DType
from fabula.lean_dataclasses import replace
from fabula.models.builder import ProgramBuilder
from fabula.models.description import ModelConfig
from fabula.models.shares import alike

if TYPE_CHECKING:
    from fabula._native import Isa


class Programs:
    """Creates programs that share one set of weights.

    Args:
        builder: with packed matrices.
        config: of the model.
        shape: of each device's program.
        isa: instruction set of the CPU.
        device: where it runs; None for the CPU.
    """

    def __init__(
        self,
        builder: ProgramBuilder,
        config: ModelConfig,
        shape: _program.Shape,
        isa: Isa,
        device: _native.Device | None,
    ) -> None:
        self._ops, self._widths, self._n_threads = builder.ops, builder.widths, builder.n_threads
        self._cpus = builder.placing.cpus
        self._config, self._shape, self._isa, self._device = config, shape, isa, device

    def program(self) -> _program.Program:
        """The model's program; its output rows are logits, float32 [vocab_size]."""
        return self._make(self._shape, self._ops, self._config.vocab_size)

    def hidden_program(self, max_tokens: int) -> _program.Program:
        """The same up to the last norm; its output rows are hidden states, float32 [hidden_size].

        It shares the weights and has its own buffers for `max_tokens` tokens. Since a program of the library ends with
        a product, the states are multiplied by the identity matrix, which keeps their values.
        """
        n = self._config.hidden_size
        identity = np.eye(n, dtype=np.float32)
        ops = []
        for i, rows in enumerate(alike(n, len(self._ops)).shares):
            weight = _native.Weight(DType.F32, len(rows), n)
            weight.pack_rows(identity[rows.start : rows.stop].view(np.uint8).reshape(-1), DType.F32, len(rows))
            if self._device is not None:
                weight.move(self._device.members[i])
            last = replace(self._ops[i][-1], weight=weight, vector=None, scale=1.0, limit=0.0)
            ops.append([*self._ops[i][:-1], last])
        return self._make(replace(self._shape, max_tokens=max_tokens), ops, n)

    def _make(self, shape: _program.Shape, ops: Sequence[Sequence[_program.Op]], n_outputs: int) -> _program.Program:
        devices = self._device.members if self._device else [None]
        parts = [
            _program.Program(shape, widths, of_device, n_threads=self._n_threads, isa=self._isa, device=device)
            for widths, of_device, device in zip(self._widths, ops, devices, strict=True)
        ]
        if self._device is None and self._cpus:
            parts[0].pin(self._cpus)
        if not isinstance(self._device, DeviceGroup):
            return parts[0]
        return JoinedProgram(self._device, parts, self._config.n_kv_heads, n_outputs)
