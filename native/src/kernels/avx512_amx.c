/* avx512_amx.c - kernels for AVX-512 with VNNI, BF16 and AMX-INT8 (Sapphire Rapids and later); see
 * avx512.h. */
#if defined(__x86_64__) && defined(FABULA_AMX)
#define KERNEL_TABLE fb_kernels_avx512_amx
#define MATRIX_TILES "kernels/blocks_amx.h"
#include "kernels/avx512.h"
#else
typedef int fb_no_avx512_amx_here; /* a translation unit must not be empty */
#endif
