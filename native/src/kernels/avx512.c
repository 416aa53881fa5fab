/* avx512.c - kernels for AVX-512 without byte dot products (Skylake-X); see avx512.h. */
#if defined(__x86_64__)
#define KERNEL_TABLE fb_kernels_avx512
#include "kernels/avx512.h"
#else
typedef int fb_no_avx512_here; /* a translation unit must not be empty */
#endif
