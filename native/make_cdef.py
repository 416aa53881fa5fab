"""Writes the cffi module of the public header: `make_cdef.py fabula.h _cdef.py`.

The text between the header's two markers is the cdef (cffi, out-of-line ABI mode). The result is plain Python that
imports in a millisecond and opens the library with dlopen, so one wheel works with every Python version.
"""

import sys
from pathlib import Path

from cffi import FFI


def main() -> None:
    header, target = Path(sys.argv[1]), Path(sys.argv[2])
    text = header.read_text(encoding="utf-8")
    declarations = text.split("/* cffi: begin */")[1].split("/* cffi: end */")[0]
    ffi = FFI()
    ffi.cdef(declarations)
    ffi.set_source("fabula._cdef", None)
    ffi.emit_python_code(str(target))


if __name__ == "__main__":
    main()
