#!/bin/sh
# Builds the library and the C tests with AddressSanitizer and UBSan, runs the C tests, then the Python tests that drive the
# library with good and hostile input against the same build. PYTHON is the interpreter with the test packages.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$top/build/sanitize
python=${PYTHON:-python3}

cmake -S "$top" -B "$build" -DPython_EXECUTABLE="$python" -DFABULA_SANITIZE=ON -DFABULA_NATIVE_TESTS=ON -DFABULA_WERROR=ON
cmake --build "$build" -j "$(nproc)" --target all fabula_native
(cd "$build" && ctest -j "$(nproc)" --output-on-failure)

# A copy of the package with the sanitized library. The interpreter itself is not instrumented, so the runtime is preloaded,
# and leak detection is off (CPython keeps memory until the end on purpose).
rm -rf "$build/package"
mkdir -p "$build/package"
cp -r "$top/python/fabula" "$build/package/"
cp "$build/native/"* "$build/package/fabula/"
cd "$top"
LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$build/package \
    "$python" -m pytest -p no:cacheprovider tests/test_native.py tests/test_dequantize.py tests/test_quantize.py tests/test_sampling.py \
    tests/test_gguf_hostile.py tests/test_slide.py
