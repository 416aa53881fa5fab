#!/bin/sh
# Cross-compiles the library and the C tests for AArch64 and runs them under qemu-user: on a CPU with every extension, then
# kernels and model on one without byte dot products. PYTHON is an interpreter that has cffi. Without the compiler or qemu
# it fails, unless FABULA_AARCH64_OPTIONAL is 1.
set -eu
top=$(cd "$(dirname "$0")/../.." && pwd)
build=$top/build/aarch64
python=${PYTHON:-python3}

for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
    if ! command -v $tool >/dev/null; then
        echo "AArch64 is not tested: $tool is missing (apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
        [ "${FABULA_AARCH64_OPTIONAL:-}" = 1 ] && exit 0
        exit 1
    fi
done

cmake -S "$top" -B "$build" -DCMAKE_TOOLCHAIN_FILE="$top/tests/native/aarch64.cmake" -DPython_EXECUTABLE="$python" \
    -DFABULA_NATIVE_TESTS=ON -DFABULA_WERROR=ON
cmake --build "$build" -j "$(nproc)"
cd "$build"
ctest -j "$(nproc)" --output-on-failure

# Both programs must have tested each table.
for name in neon neon_dotprod neon_i8mm; do
    if [ "$(grep -c "^tested: $name\$" Testing/Temporary/LastTest.log)" != 2 ]; then
        echo "$name was not tested by test_kernels and test_blocks"
        exit 1
    fi
done

# A CPU without SDOT uses the base table, and neither the table nor the rest of the library needs more.
old="qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu cortex-a53"
$old ./test_program
for test in test_kernels test_blocks; do
    $old ./$test 2 >a53.log || { cat a53.log; exit 1; }
    for line in "tested: neon" "skipped: this CPU lacks neon_dotprod" "skipped: this CPU lacks neon_i8mm"; do
        grep -qx "$line" a53.log || { cat a53.log; echo "$test on cortex-a53 did not print: $line"; exit 1; }
    done
done
echo "AArch64: neon, neon_dotprod and neon_i8mm passed under qemu"
