#!/bin/sh
# Builds the library for NVIDIA GPUs with warnings as errors, runs a small model if there is a GPU, and runs the Python tests
# of its errors without one. FABULA_CUDA_ARCHITECTURES, e.g. "75-real;90a-real", replaces the default of all architectures.
# JOBS compilers run in parallel (2). PYTHON is an interpreter with the test packages. Without nvcc it fails, unless
# FABULA_CUDA_OPTIONAL is 1. The CPU code is not optimized: it is only linked.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$top/build/cuda
python=${PYTHON:-python3}

if ! command -v nvcc >/dev/null; then
    echo "the CUDA kernels are not compiled: nvcc is missing"
    [ "${FABULA_CUDA_OPTIONAL:-}" = 1 ] && exit 0
    exit 1
fi

cmake -S "$top" -B "$build" -DPython_EXECUTABLE="$python" -DFABULA_CUDA=ON -DFABULA_WERROR=ON -DCMAKE_BUILD_TYPE=Debug \
    ${FABULA_CUDA_ARCHITECTURES:+"-DFABULA_CUDA_ARCHITECTURES=$FABULA_CUDA_ARCHITECTURES"}
cmake --build "$build" --target fabula_native fabula_cuda_model -j "${JOBS:-2}"
"$build/fabula_cuda_model"

rm -rf "$build/package"
mkdir -p "$build/package"
cp -r "$top/python/fabula" "$build/package/"
cp "$build/native/"* "$build/package/fabula/"
cd "$top"
PYTHONPATH="$build/package" "$python" -m pytest -p no:cacheprovider tests/test_device.py tests/test_parallel.py
echo "CUDA: the kernels were compiled for $(sed -n 's/^FABULA_CUDA_ARCHITECTURES:[A-Z]*=//p' "$build/CMakeCache.txt")"
