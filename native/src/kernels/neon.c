/* neon.c - kernels for every AArch64 CPU; see neon.h. */
#if defined(__aarch64__)
#define KERNEL_TABLE fb_kernels_neon
#include "kernels/neon.h"
#else
typedef int fb_no_neon_here; /* a translation unit must not be empty */
#endif
