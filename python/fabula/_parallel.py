"""Native calls for tensor parallelism: several devices that run one model together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fabula._ffi import ffi, lib
from fabula._native import Device, check
from fabula._program import Program

MOST_DEVICES: int = lib.FB_MOST_MEMBERS


class DeviceGroup(Device):
    """A group of GPUs linked by NCCL; see fb_device_join in fabula.h. A pool belongs to the group, weights and programs
    to its members.

    Raises:
        Unsupported: NCCL is missing.
        DeviceError: the GPUs cannot be linked.
    """

    def __init__(self, members: Sequence[Device]) -> None:
        out = ffi.new("fb_device **")
        check(lib.fb_device_join([device.handle for device in members], len(members), out))
        self.handle: Any = ffi.gc(out[0], lib.fb_device_free)
        self.info = members[0].info
        self.name = "cuda:" + "+".join(str(device.info.index) for device in members)
        self._members = tuple(members)

    @property
    def members(self) -> tuple[Device, ...]:
        """The GPUs, in the order in which parts are added."""
        return self._members


class JoinedProgram(Program):
    """The programs of a group's devices as one program; see fb_program_join in fabula.h.

    Args:
        group: of the devices.
        parts: one program per device, in the group's order; closed with this one.
        n_kv_heads, n_outputs: of the whole model: KV heads, and floats of an output row.
    """

    def __init__(self, group: DeviceGroup, parts: Sequence[Program], n_kv_heads: int, n_outputs: int) -> None:
        out = ffi.new("fb_program **")
        handles = [part.handle for part in parts]
        check(lib.fb_program_join(group.handle, handles, len(handles), n_kv_heads, n_outputs, out))
        self.handle: Any = ffi.gc(out[0], lib.fb_program_free, lib.fb_program_scratch_bytes(out[0]))
        self.shape, self.n_threads, self.n_outputs = parts[0].shape, parts[0].n_threads, n_outputs
        self._decode_logits = np.empty(0, np.float32)
        self._parts = tuple(parts)  # borrowed by C

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.close()
