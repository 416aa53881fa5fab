/*
 * pages.h - the layout of KV pages, and access to them.
 *
 * A page holds 32 positions of every layer that has keys and values of its own. Per layer and KV head it has a
 * slab of two parts, K and V. Layers may differ in heads and widths. Both parts are panels of 16 lanes (16
 * positions, or 16 dimensions) in the layout that fb_kernels.gemm multiplies:
 *
 *     K   [2 blocks of 16 positions][k_dim][16]        scores of 16 positions = panel x query
 *     V   [v_dim / 16, rounded up][32 positions][16]   16 outputs = panel x probabilities
 *
 * In bf16 both are pairs, as gemm_pairs multiplies them:
 *
 *     K   [2 blocks of 16 positions][k_dim / 2, rounded up][16][2 dimensions]
 *     V   [v_dim / 16, rounded up][16][16][2 positions]
 *
 * A layer with v_dim 0 has no V part: its values are a part of K, which fb_slab_values puts into V's layout.
 *
 * Lanes of V beyond v_dim stay zero. In a Q8_0 part the panels are followed by one scale per position. The
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

/* A layer of a page. */
struct fb_kv_layout {
    int32_t n_kv_heads, k_dim, v_dim;
    struct fb_kv_part k, v;
    size_t offset; /* of its first slab in a page */
};

struct fb_page_pool {
    struct fb_kv_layout *layers; /* [n_layers] */
    int32_t n_layers, n_pages;
    size_t page_bytes, n_bytes;
    char *memory;                                /* on the device, if there is one */
    fb_device *device;                           /* NULL: the CPU */
    struct fb_page_pool *parts[FB_MOST_MEMBERS]; /* on a group, instead of memory: see split.h */
};

static inline size_t fb_slab_bytes(const struct fb_kv_layout *layer) {
    return layer->k.bytes + layer->v.bytes;
}

/* Returns a slab, which begins with its K part. */
static inline char *fb_slab(const struct fb_page_pool *pool, int32_t page, int32_t layer, int32_t kv_head) {
    const struct fb_kv_layout *l = &pool->layers[layer];
    return pool->memory + (size_t)page * pool->page_bytes + l->offset + (size_t)kv_head * fb_slab_bytes(l);
}

static inline char *fb_slab_v(const struct fb_kv_layout *layer, char *slab) {
    return slab + layer->k.bytes;
}

/* The scales [32] of a Q8_0 part, NULL for other formats. */
static inline float *fb_part_scales(const struct fb_kv_part *part, char *at) {
    return part->dtype == FB_Q8_0 ? (float *)(void *)(at + part->elements) : NULL;
}

/* Dimensions of K that are stored per position: k_dim, rounded up to even for bf16. */
static inline size_t fb_k_dimensions(enum fb_dtype dtype, size_t k_dim) {
    return dtype == FB_BF16 ? (k_dim + 1) / 2 * 2 : k_dim;
}

/* The gemm kernel of a part; bf16 parts use gemm_pairs instead. */
static inline fb_gemm_kernel fb_part_gemm(const struct fb_kv_part *part, const struct fb_kernels *kernels) {
    return part->dtype == FB_Q8_0 ? kernels->gemm_bytes : kernels->gemm[part->dtype];
}

/* Writes one position (0 .. 31 of its page) of one head: k f32 [k_dim], v [v_dim], unused if v_dim is 0. With `is_last` (the last
 * position that a step writes), the other half of V's pair is zeroed: attention multiplies it by probability
 * zero. */
void fb_slab_write(const struct fb_kv_layout *layer, const struct fb_kernels *kernels, char *slab, int32_t position,
    bool is_last, const float *k, const float *v);

/* Bytes that fb_slab_values writes at most. */
static inline size_t fb_values_bytes(size_t v_dim) {
    return (v_dim + 15) / 16 * 16 * FB_PAGE_POSITIONS * sizeof(float) + FB_PAGE_POSITIONS * sizeof(float);
}

/* For a layer without V: copies the last v_dim numbers of the first `n` positions of a slab's K to `out`, in the layout
 * and format of a V part, scales included. Other positions are undefined, but for those that share a pair with one of
 * the first n: they become zero. In values.c. */
void fb_slab_values(const struct fb_kv_layout *layer, const char *slab, size_t v_dim, size_t n, char *out);

#endif
