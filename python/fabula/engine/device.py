"""Where a model runs: the CPU, a GPU by its number, or the first one with room for it."""

from __future__ import annotations

import re
from contextlib import suppress

from fabula import _native
from fabula.errors import DeviceError, EngineError, InvalidArgument, Unsupported

_NAME = re.compile(r"cpu|auto|cuda(?::([0-9]{1,3}))?")
RESERVED = 0.05  # of a GPU's free memory that "auto" leaves for batches


def check_device(name: object) -> str:
    """The name of a device.

    Raises:
        InvalidArgument: it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(f"device is {name!r}, must be cpu, cuda, cuda:N with the number of a GPU, or auto")
    return name


class Placement:
    """What may be chosen for one model.

    Args:
        name: "cpu"; "cuda" for the first GPU; "cuda:N"; "auto" for a GPU that has room, else the CPU.
        memory: bytes of a GPU that the model may take; None for what is free.

    Raises:
        InvalidArgument: no name of a device, or there are fewer GPUs.
        Unsupported: a GPU is asked for, and this build has no CUDA.
        DeviceError: a GPU is asked for, and the driver is missing, too old, or finds none.
    """

    def __init__(self, name: str = "cpu", memory: int | None = None) -> None:
        check_device(name)
        self._memory = memory
        self._device: _native.Device | None = None
        self._n_devices = 0  # to try
        if name not in ("cpu", "auto"):
            try:
                self._device = _native.Device(int(name.partition(":")[2] or 0), memory)
            except EngineError as error:
                raise type(error)(f"device {name}: {error}; take device cpu or auto", status=error.status) from None
        elif name == "auto":
            with suppress(Unsupported, DeviceError):  # then it is the CPU
                self._n_devices = _native.device_count()

    def choose(self, n_bytes: int) -> _native.Device | None:
        """The device for a model that takes so many bytes, None for the CPU."""
        for index in range(self._n_devices):
            with suppress(DeviceError):  # one that cannot be used is passed over
                device = _native.Device(index, self._memory)
                if n_bytes <= (1 - RESERVED) * device.memory()[1]:
                    return device
        return self._device


CPU = Placement()
