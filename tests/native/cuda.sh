#!/bin/sh
# Compiles the kernels for NVIDIA GPUs with warnings as errors, and runs a small model where there is a GPU. FABULA_CUDA_ARCHITECTURES, e.g.
# "75-real;90a-real", says for what instead of everything. JOBS compilers run side by side (2). PYTHON names an interpreter. Without
# nvcc it fails, unless FABULA_CUDA_OPTIONAL is 1. The CPU's side is not optimised: it is only linked.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$top/build/cuda

if ! command -v nvcc >/dev/null; then
    echo "the CUDA kernels are not compiled: nvcc is missing"
    [ "${FABULA_CUDA_OPTIONAL:-}" = 1 ] && exit 0
    exit 1
fi

cmake -S "$top" -B "$build" -DPython_EXECUTABLE="${PYTHON:-python3}" -DFABULA_CUDA=ON -DFABULA_WERROR=ON -DCMAKE_BUILD_TYPE=Debug \
    ${FABULA_CUDA_ARCHITECTURES:+"-DFABULA_CUDA_ARCHITECTURES=$FABULA_CUDA_ARCHITECTURES"}
cmake --build "$build" --target fabula_cuda_model -j "${JOBS:-2}"
"$build/fabula_cuda_model"
echo "CUDA: the kernels were compiled for $(sed -n 's/^FABULA_CUDA_ARCHITECTURES:[A-Z]*=//p' "$build/CMakeCache.txt")"
