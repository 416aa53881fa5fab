#!/bin/sh
# Tests on an NVIDIA GPU; without one it says so and succeeds. Builds the library for this machine's GPU
# (FABULA_CUDA_ARCHITECTURES, e.g. "90a-real", builds for another), then runs
#
#     the tests of operators and of a small model against the CPU,
#     the Python tests that need a GPU, and those of decoding, cache and sessions with their models on it,
#     and the first again under compute-sanitizer: memcheck (accesses out of bounds or misaligned) and
#     racecheck (shared memory that threads of a block write and read without a barrier in between).
#
# By hand: CUDA_LAUNCH_BLOCKING=1 compute-sanitizer --tool racecheck build/gpu/fabula_cuda_attention
#
# PYTHON is an interpreter with the test packages. JOBS compilers run in parallel (2). The CPU code is not optimized, unless
# BUILD_TYPE is Release; then build/gpu/package is also a PYTHONPATH for benchmarks/gpu.py.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$top/build/gpu
python=${PYTHON:-python3}

if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "not run: there is no NVIDIA GPU (nvidia-smi is missing or lists none)"
    exit 0
fi
if ! command -v nvcc >/dev/null; then
    echo "the CUDA kernels are not compiled: nvcc is missing"
    exit 1
fi
sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$(command -v nvcc)")/compute-sanitizer")
if ! [ -x "$sanitizer" ]; then
    echo "compute-sanitizer is missing; it is part of the CUDA toolkit (cuda-sanitizer)"
    exit 1
fi
nvidia-smi -L

failed=0
attempt() { # continues after a failure: time on a GPU may be short
    echo "== $*"
    "$@" || { failed=$((failed + 1)); echo "== FAILED: $*"; }
}

programs="fabula_cuda_rows fabula_cuda_linear fabula_cuda_tensor fabula_cuda_attention fabula_cuda_sample fabula_cuda_model"
cmake -S "$top" -B "$build" -DPython_EXECUTABLE="$python" -DFABULA_CUDA=ON -DFABULA_WERROR=ON -DCMAKE_BUILD_TYPE="${BUILD_TYPE:-Debug}" \
    -DFABULA_CUDA_ARCHITECTURES="${FABULA_CUDA_ARCHITECTURES:-native}"
cmake --build "$build" --target fabula_native $programs -j "${JOBS:-2}"

# Tests read results as soon as a launch returns.
export CUDA_LAUNCH_BLOCKING=1
for program in $programs; do
    attempt "$build/$program"
done
unset CUDA_LAUNCH_BLOCKING

rm -rf "$build/package"
mkdir -p "$build/package"
cp -r "$top/python/fabula" "$build/package/"
cp "$build/native/"* "$build/package/fabula/"
cd "$top"
export PYTHONPATH="$build/package${PYTHONPATH:+:$PYTHONPATH}"
attempt "$python" -m pytest -p no:cacheprovider -m gpu tests/test_device.py tests/test_parallel.py tests/test_bench_gpu.py
attempt env FABULA_TEST_DEVICE=cuda "$python" -m pytest -p no:cacheprovider tests/test_draw.py tests/test_kv_cache.py tests/test_sessions.py

export CUDA_LAUNCH_BLOCKING=1
for tool in memcheck racecheck; do
    for program in $programs; do
        attempt "$sanitizer" --tool $tool --error-exitcode 1 "$build/$program"
    done
done
[ $failed -eq 0 ] || { echo "GPU: $failed checks failed"; exit 1; }
echo "GPU: operators, model and Python tests passed, compute-sanitizer found nothing"
