"""Writes the cffi modules of the public headers: `make_cdef.py fabula.h _cdef.py fabula_bench.h _cdef_bench.py`.

The text between a header's two markers is the cdef (cffi, out-of-line ABI mode); a later header may use the types of
those before. The results are plain Python that imports in a millisecond and opens the library with dlopen, so one wheel
works with every Python version.
"""

import sys
from pathlib import Path

from cffi import FFI


def main() -> None:
    earlier: list[FFI] = []
    for header, target in zip(map(Path, sys.argv[1::2]), map(Path, sys.argv[2::2]), strict=True):
        text = header.read_text(encoding="utf-8")
        declarations = text.split("/* cffi: begin */")[1].split("/* cffi: end */")[0]
        ffi = FFI()
        for other in earlier:
            ffi.include(other)
        ffi.cdef(declarations)
        ffi.set_source(f"fabula.{target.stem}", None)
        ffi.emit_python_code(str(target))
        earlier.append(ffi)


if __name__ == "__main__":
    main()
