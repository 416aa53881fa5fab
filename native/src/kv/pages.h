/*
 * pages.h - the pool of KV pages and the way into one.
 *
 * A page holds 32 positions of every layer; per layer and KV head it is a slab of two panels (16 lanes = 16
 * positions, or 16 lanes = 16 dimensions), in the shape that fb_kernels.gemm multiplies:
 *
 *     K   [2 blocks of 16 positions][head_dim][16]        scores of 16 positions = panel x query
 *     V   [head_dim / 16, rounded up][32 positions][16]   16 outputs = panel x probabilities
 *
 * Lanes of V beyond head_dim stay zero.
 */
#ifndef FABULA_KV_PAGES_H
#define FABULA_KV_PAGES_H

#include "fabula.h"

struct fb_page_pool {
    enum fb_dtype dtype; /* F32 or F16 */
    int32_t n_pages, n_layers, n_kv_heads, head_dim;
    size_t element_bytes;
    size_t k_elements;    /* of one slab's K: 32 head_dim */
    size_t slab_elements; /* K and V of one layer and head */
    size_t page_bytes, n_bytes;
    char *memory;
};

static inline size_t fb_slab_element(const struct fb_page_pool *pool, int32_t layer, int32_t kv_head) {
    return ((size_t)layer * (size_t)pool->n_kv_heads + (size_t)kv_head) * pool->slab_elements;
}

/* K of a slab; V follows k_elements later. */
static inline char *fb_slab(const struct fb_page_pool *pool, int32_t page, int32_t layer, int32_t kv_head) {
    return pool->memory + (size_t)page * pool->page_bytes + fb_slab_element(pool, layer, kv_head) * pool->element_bytes;
}

static inline char *fb_slab_v(const struct fb_page_pool *pool, char *slab) {
    return slab + pool->k_elements * pool->element_bytes;
}

struct fb_kernels;

/* Writes one position (0 .. 31 of its page) of one head: k and v f32 [head_dim]. */
void fb_slab_write(const struct fb_page_pool *pool, const struct fb_kernels *kernels, char *slab, int32_t position,
    const float *k, const float *v);

#endif
