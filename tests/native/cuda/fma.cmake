# fma: the option with which emulated GPU kernels use this machine's FMA instructions, if it has them. Without, each fmaf is a
# call of the C library, which is slow and has the same result.
include(CheckCSourceRuns)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT CMAKE_CROSSCOMPILING)
  check_c_source_runs("int main(void) { return !(__builtin_cpu_supports(\"avx\") && __builtin_cpu_supports(\"fma\")); }"
    FABULA_HOST_HAS_FMA)
endif()
set(fma $<$<BOOL:${FABULA_HOST_HAS_FMA}>:-mfma>)
