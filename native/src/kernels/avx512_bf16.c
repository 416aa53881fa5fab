/* avx512_bf16.c - kernels for AVX-512 with VNNI and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later); see
 * avx512.h. */
#if defined(__x86_64__)
#define KERNEL_TABLE fb_kernels_avx512_bf16
#include "kernels/avx512.h"
#else
typedef int fb_no_avx512_bf16_here; /* a translation unit must not be empty */
#endif
