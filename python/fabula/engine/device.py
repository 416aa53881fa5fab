"""Chooses where a model runs: the CPU, a GPU by number, the first GPU with enough memory, or several GPUs together."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from fabula import _native
from fabula._parallel import MOST_DEVICES, DeviceGroup
from fabula.choices import DEVICE_NAME, DEVICE_PRODUCTS
from fabula.errors import DeviceError, EngineError, InvalidArgument, Unsupported

LIBRARY = "FABULA_CUBLASLT"  # environment variable: path of cuBLASLt, if the system does not find it
RESERVED = 0.05  # of a GPU's free memory that "auto" leaves for batches


def check_device(name: object) -> str:
    """Checks the name of a device.

    Raises:
        InvalidArgument: it is not one.
    """
    if not isinstance(name, str) or not re.fullmatch(DEVICE_NAME, name):
        raise InvalidArgument(f"device is {name!r}, must be cpu, cuda, cuda:N with the number of a GPU, or auto")
    return name


def check_parallel(n: object, device: str) -> int:
    """Checks the number of GPUs that run a model together.

    Raises:
        InvalidArgument: it is out of range, or above 1 for a device that is not a GPU.
    """
    if type(n) is not int or not 1 <= n <= MOST_DEVICES:
        raise InvalidArgument(f"tensor_parallel is {n!r}, must be a whole number in 1 .. {MOST_DEVICES}")
    if n > 1 and device in ("cpu", "auto"):
        raise InvalidArgument(f"tensor_parallel is {n} and device {device}: several GPUs need device cuda or cuda:N")
    return n


def check_products(name: object) -> str:
    """Checks the name of the implementation of a GPU's matrix products.

    Raises:
        InvalidArgument: it is not one.
    """
    if name not in DEVICE_PRODUCTS:
        raise InvalidArgument(f"device_products is {name!r}, must be own or library")
    return str(name)


def library_path() -> str | None:
    """The path of cuBLASLt in LIBRARY; None if the variable is not set."""
    return os.environ.get(LIBRARY) or None


class Placement:
    """The devices that one model may run on.

    Args:
        name: "cpu"; "cuda" for the first GPU; "cuda:N"; "auto" for a GPU with enough memory, else the CPU.
        memory: bytes of a GPU that the model may take; None for what is free.
        n_devices: number of GPUs, starting at the named one, that run the model together.
        products: "own", or "library" for cuBLASLt in batches of many tokens.

    Raises:
        InvalidArgument: an unknown name, or there are fewer GPUs.
        Unsupported: this build has no CUDA; several GPUs were requested and NCCL is missing; or cuBLASLt was requested
            and cannot be loaded.
        DeviceError: a GPU was requested, and the driver is missing, too old, or finds none.
    """

    def __init__(self, name: str = "cpu", memory: int | None = None, n_devices: int = 1, products: str = "own") -> None:
        check_device(name)
        self.n_devices = check_parallel(n_devices, name)
        self.products = check_products(products)
        self._memory = memory
        self.is_cpu = name == "cpu"
        self._device: _native.Device | None = None
        self._n_tried = 0  # GPUs to try
        if name not in ("cpu", "auto"):
            self._device = self._open(name, int(name.partition(":")[2] or 0))
            self._prepare(self._device)
        elif name == "auto":
            with suppress(Unsupported, DeviceError):  # no GPU: the CPU
                self._n_tried = _native.device_count()

    def _open(self, name: str, first: int) -> _native.Device:
        """The named GPU, or the group of GPUs that starts with it."""
        n, remedy = self.n_devices, "take device cpu or auto"
        if n > 1:
            name, remedy = f"{name}, tensor_parallel {n}", "take tensor_parallel 1 or other GPUs"
        try:
            devices = [_native.Device(index, self._memory) for index in range(first, first + n)]
            return devices[0] if n == 1 else DeviceGroup(devices)
        except EngineError as error:
            raise type(error)(f"device {name}: {error}; {remedy}", status=error.status) from None

    def choose(self, n_bytes: int) -> _native.Device | None:
        """The device for a model of that many bytes; None for the CPU."""
        for index in range(self._n_tried):
            with suppress(DeviceError):  # skip one that cannot be used
                device = _native.Device(index, self._memory)
                if n_bytes <= (1 - RESERVED) * device.memory()[1]:
                    self._prepare(device)
                    return device
        return self._device

    def _prepare(self, device: _native.Device) -> None:
        if self.products == "own":
            return
        try:
            for member in device.members:
                member.use_library(library_path())
        except Unsupported as error:
            text = f"device_products library: {error}; name its file in {LIBRARY}, or take device_products own"
            raise Unsupported(text, status=error.status) from None


CPU = Placement()
