"""Opens the native library: the only importer of cffi's module.

`_cdef.py` is generated at build time from fabula.h, next to libfabula.so. Opening the library compares the ABI number
and the size of every public struct, so a stale build is refused with a clear message instead of crashing later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_STRUCTS = ("fb_op", "fb_program_shape", "fb_sequence", "fb_batch", "fb_sampling", "fb_device_info")


def _open() -> tuple[Any, Any]:
    try:
        from fabula import _cdef
    except ImportError as error:
        raise ImportError(
            "Fabula's native part is not built: run `pip install .`, "
            "or `cmake -S . -B build && cmake --build build` in a checkout"
        ) from error
    ffi: Any = _cdef.ffi
    path = Path(_cdef.__file__).with_name("libfabula.so")
    try:
        # Never unmapped: at interpreter exit destructors and the library's threads may outlive this module.
        lib: Any = ffi.dlopen(str(path), ffi.RTLD_NOW | getattr(ffi, "RTLD_NODELETE", 0))
    except OSError as error:
        raise ImportError(f"cannot load {path.name}: {error}; build Fabula again") from error
    if lib.fb_abi_version() != lib.FB_ABI_VERSION:
        raise ImportError(
            f"{path.name} has ABI {lib.fb_abi_version()}, this package needs {lib.FB_ABI_VERSION}; build Fabula again"
        )
    for name in _STRUCTS:
        built, seen = lib.fb_sizeof(name.encode()), ffi.sizeof(f"struct {name}")
        if built != seen:
            raise ImportError(
                f"{path.name} has struct {name} of {built} bytes, this package expects {seen}; build again"
            )
    return ffi, lib


ffi, lib = _open()
