/* neon_i8mm.c - kernels for AArch64 with USDOT and SMMLA (Neoverse V1 and N2, Apple M2 and later); see
 * neon.h. */
#if defined(__aarch64__)
#define KERNEL_TABLE fb_kernels_neon_i8mm
#define FABULA_NEON_I8MM
#include "kernels/neon.h"
#else
typedef int fb_no_neon_i8mm_here; /* a translation unit must not be empty */
#endif
