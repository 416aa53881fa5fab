/*
 * pages.h - the layout of KV pages, and access to them.
 *
 * A page holds 32 positions of every layer. Per layer and KV head it has a slab of two parts, K and V. Both
 * are panels of 16 lanes (16 positions, or 16 dimensions) in the layout that fb_kernels.gemm multiplies:
 *
 *     K   [2 blocks of 16 positions][head_dim][16]        scores of 16 positions = panel x query
 *     V   [head_dim / 16, rounded up][32 positions][16]   16 outputs = panel x probabilities
 *
 * In bf16 both are pairs, as gemm_pairs multiplies them:
 *
 *     K   [2 blocks of 16 positions][head_dim / 2, rounded up][16][2 dimensions]
 *     V   [head_dim / 16, rounded up][16][16][2 positions]
 *
 * Lanes of V beyond head_dim stay zero. In a Q8_0 part the panels are followed by one scale per position. The
 * scores of K are multiplied by it, and so are the probabilities before they multiply V.
 */
#ifndef FABULA_KV_PAGES_H
#define FABULA_KV_PAGES_H

#include "base/device.h"
#include "kernels/kernels.h"

/* K or V of a slab. */
struct fb_kv_part {
    enum fb_dtype dtype; /* F32, F16, BF16, or Q8_0 for bytes */
    size_t elements, bytes;
};

struct fb_page_pool {
    struct fb_kv_part k, v;
    int32_t n_pages, n_layers, n_kv_heads, head_dim;
    size_t page_bytes, n_bytes;
    char *memory;                                /* on the device, if there is one */
    fb_device *device;                           /* NULL: the CPU */
    struct fb_page_pool *parts[FB_MOST_MEMBERS]; /* on a group, instead of memory: see split.h */
};

/* Returns a slab, which begins with its K part. */
static inline char *fb_slab(const struct fb_page_pool *pool, int32_t page, int32_t layer, int32_t kv_head) {
    const size_t index = (size_t)layer * (size_t)pool->n_kv_heads + (size_t)kv_head;
    return pool->memory + (size_t)page * pool->page_bytes + index * (pool->k.bytes + pool->v.bytes);
}

static inline char *fb_slab_v(const struct fb_page_pool *pool, char *slab) {
    return slab + pool->k.bytes;
}

/* The scales [32] of a Q8_0 part, NULL for other formats. */
static inline float *fb_part_scales(const struct fb_kv_part *part, char *at) {
    return part->dtype == FB_Q8_0 ? (float *)(void *)(at + part->elements) : NULL;
}

/* Dimensions of K that are stored per position: head_dim, rounded up to even for bf16. */
static inline size_t fb_k_dimensions(enum fb_dtype dtype, size_t head_dim) {
    return dtype == FB_BF16 ? (head_dim + 1) / 2 * 2 : head_dim;
}

/* The gemm kernel of a part; bf16 parts use gemm_pairs instead. */
static inline fb_gemm_kernel fb_part_gemm(const struct fb_kv_part *part, const struct fb_kernels *kernels) {
    return part->dtype == FB_Q8_0 ? kernels->gemm_bytes : kernels->gemm[part->dtype];
}

/* Writes one position (0 .. 31 of its page) of one head: k and v f32 [head_dim]. With `is_last` (the last
 * position that a step writes), the other half of V's pair is zeroed: attention multiplies it by probability
 * zero. */
void fb_slab_write(const struct fb_page_pool *pool, const struct fb_kernels *kernels, char *slab, int32_t position,
    bool is_last, const float *k, const float *v);

#endif
