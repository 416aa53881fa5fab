/* select.c - from an instruction set to its table. */
#include "kernels/kernels.h"

const struct fb_kernels *fb_kernels_of(enum fb_isa isa) {
    switch (isa) {
#if defined(__x86_64__)
    case FB_ISA_AVX2:
        return &fb_kernels_avx2;
    case FB_ISA_AVX_VNNI:
        return &fb_kernels_avx_vnni;
    case FB_ISA_AVX512:
        return &fb_kernels_avx512;
    case FB_ISA_AVX512_VNNI:
        return &fb_kernels_avx512_vnni;
    case FB_ISA_AVX512_BF16:
        return &fb_kernels_avx512_bf16;
#ifdef FABULA_AMX
    case FB_ISA_AVX512_AMX:
        return &fb_kernels_avx512_amx;
#endif
#elif defined(__aarch64__)
    case FB_ISA_NEON:
        return &fb_kernels_neon;
    case FB_ISA_NEON_DOTPROD:
        return &fb_kernels_neon_dotprod;
    case FB_ISA_NEON_I8MM:
        return &fb_kernels_neon_i8mm;
#endif
    default:
        return &fb_kernels_reference;
    }
}
