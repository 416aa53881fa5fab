#!/bin/sh
# Builds the library with emulated GPUs (tests/native/cuda/emulated.cmake) and runs the Python tests that need a GPU, and
# those of sessions and pages with their models on one and on two GPUs. PYTHON is the interpreter with the test packages.
# The CPU code is not optimized.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$top/build/emulated
python=${PYTHON:-python3}

cmake -S "$top" -B "$build" -DPython_EXECUTABLE="$python" -DFABULA_CUDA=EMULATED -DFABULA_WERROR=ON -DCMAKE_BUILD_TYPE=Debug
cmake --build "$build" --target fabula_native fabula_products -j "${JOBS:-2}"

rm -rf "$build/package"
mkdir -p "$build/package"
cp -r "$top/python/fabula" "$build/package/"
cp "$build/native/"* "$build/package/fabula/"
cd "$top"
export PYTHONPATH="$build/package" LD_LIBRARY_PATH="$build/nccl" FABULA_CUBLASLT="$build/libfabula_products.so"
"$python" -m pytest -p no:cacheprovider tests/test_device.py tests/test_parallel.py tests/test_bench_gpu.py
# Only one of the long random walks over sessions, which takes half a minute.
FABULA_TEST_DEVICE=cuda "$python" -m pytest -p no:cacheprovider tests/test_draw.py tests/test_kv_cache.py tests/test_sessions.py \
    -k "not every_walk or 1-f16"
FABULA_TEST_DEVICE=cuda:2 FABULA_TEST_PARALLEL=2 "$python" -m pytest -p no:cacheprovider tests/test_sessions.py tests/test_kv_cache.py \
    -k "not every_walk"
