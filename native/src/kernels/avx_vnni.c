/* avx_vnni.c - kernels for AVX2 with AVX-VNNI (Alder Lake, Sierra Forest and later, which lack AVX-512); see
 * avx2.h. */
#if defined(__x86_64__)
#define KERNEL_TABLE      fb_kernels_avx_vnni
#define FABULA_DPBUSD_256 _mm256_dpbusd_avx_epi32
#include "kernels/avx2.h"
#else
typedef int fb_no_avx_vnni_here; /* a translation unit must not be empty */
#endif
