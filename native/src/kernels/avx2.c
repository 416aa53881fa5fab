/* avx2.c - kernels for AVX2 without byte dot products; see avx2.h. */
#if defined(__x86_64__)
#define KERNEL_TABLE fb_kernels_avx2
#include "kernels/avx2.h"
#else
typedef int fb_no_avx2_here; /* a translation unit must not be empty */
#endif
