/* neon_dotprod.c - kernels for AArch64 with SDOT (Cortex-A76, Neoverse N1, Apple M1 and later); see
 * neon.h. */
#if defined(__aarch64__)
#define KERNEL_TABLE fb_kernels_neon_dotprod
#define FABULA_NEON_DOTPROD
#include "kernels/neon.h"
#else
typedef int fb_no_neon_dotprod_here; /* a translation unit must not be empty */
#endif
