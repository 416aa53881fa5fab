/* pages.cuh - the layout of K and V in a page (kv/pages.h), for kernels. */
#ifndef FABULA_CUDA_PAGES_CUH
#define FABULA_CUDA_PAGES_CUH

#include "device.h"
#include "kernels.h"

/* Index of dimension d of a position in K: [2 blocks of 16 positions][head_dim][16]; in bf16 [2
 * blocks][pairs][16][2 dimensions]. */
FB_DEVICE int64_t fb_k_element(fb_dtype dtype, int32_t head_dim, int32_t position, int32_t d) {
    const int64_t block = position / 16 * 16, lane = position % 16;
    if (dtype == FB_BF16) return block * ((head_dim + 1) / 2 * 2) + (d / 2 * 16 + lane) * 2 + d % 2;
    return block * head_dim + d * 16 + lane;
}

/* And in V: [head_dim / 16][32 positions][16]; in bf16 [head_dim / 16][16][16][2 positions]. */
FB_DEVICE int64_t fb_v_element(fb_dtype dtype, int32_t position, int32_t d) {
    const int64_t panel = (int64_t)(d / 16) * FB_PAGE_POSITIONS * 16;
    if (dtype == FB_BF16) return panel + (position / 2 * 16 + d % 16) * 2 + position % 2;
    return panel + position * 16 + d % 16;
}

#endif
