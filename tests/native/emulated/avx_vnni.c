/* avx_vnni.c - the AVX-VNNI kernels with the same instruction in its AVX-512 VL encoding. */
#define KERNEL_TABLE      fb_kernels_avx_vnni_emulated
#define FABULA_DPBUSD_256 _mm256_dpbusd_epi32
#include "kernels/kernels.h"
extern const struct fb_kernels fb_kernels_avx_vnni_emulated;
#include "kernels/avx2.h"
