/* pages.c - the pool of KV pages. See pages.h. */
#include "kv/pages.h"

#include "base/memory.h"
#include "base/status.h"
#include "kernels/kernels.h"
#include "kv/split.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Together they keep the bytes of a page below 2^63. */
enum { MAX_HEAD_DIM = 1024, MAX_COUNT = 1 << 20, MAX_LAYERS = 1 << 20 };

static struct fb_kv_part part_of(enum fb_dtype dtype, size_t dimensions) {
    const size_t elements = (size_t)FB_PAGE_POSITIONS * dimensions;
    const size_t scales = dtype == FB_Q8_0 ? FB_PAGE_POSITIONS * sizeof(float) : 0;
    return (struct fb_kv_part){dtype, elements, elements * fb_element_bytes(dtype) + scales};
}

static bool holds_kv(enum fb_dtype dtype) {
    return dtype == FB_F32 || dtype == FB_F16 || dtype == FB_BF16 || dtype == FB_Q8_0;
}

static enum fb_status check_layer(const struct fb_kv_layer *layer, int32_t i) {
    FB_REQUIRE(layer->n_kv_heads >= 1 && layer->n_kv_heads <= MAX_COUNT, "layer %d: n_kv_heads is %d, must be 1 .. %d",
        i, layer->n_kv_heads, MAX_COUNT);
    FB_REQUIRE(layer->k_dim >= 1 && layer->k_dim <= MAX_HEAD_DIM && layer->v_dim >= 0 && layer->v_dim <= MAX_HEAD_DIM,
        "layer %d: k_dim is %d and v_dim %d, must be 1 .. %d, or v_dim 0 for values that are a part of K", i,
        layer->k_dim, layer->v_dim, MAX_HEAD_DIM);
    return FB_OK;
}

/* Fills the layout of every layer, one behind the other. */
static enum fb_status lay_out(
    struct fb_page_pool *pool, enum fb_dtype k_dtype, enum fb_dtype v_dtype, const struct fb_kv_layer *layers) {
    for (int32_t i = 0; i < pool->n_layers; i++) {
        const struct fb_kv_layer *from = &layers[i];
        FB_TRY(check_layer(from, i));
        struct fb_kv_layout *to = &pool->layers[i];
        *to = (struct fb_kv_layout){.n_kv_heads = from->n_kv_heads,
            .k_dim = from->k_dim,
            .v_dim = from->v_dim,
            .k = part_of(k_dtype, fb_k_dimensions(k_dtype, (size_t)from->k_dim)),
            .v = from->v_dim ? part_of(v_dtype, (size_t)(from->v_dim + 15) / 16 * 16)
                             : (struct fb_kv_part){k_dtype, 0, 0},
            .offset = pool->page_bytes};
        pool->page_bytes += fb_slab_bytes(to) * (size_t)from->n_kv_heads;
    }
    if (!fb_size_multiply(pool->page_bytes, (size_t)pool->n_pages, &pool->n_bytes))
        return fb_fail(FB_OUT_OF_MEMORY, "%d KV pages do not fit memory", pool->n_pages);
    return FB_OK;
}

/* Whether all layers have the same heads, as devices need. */
static bool are_alike(const struct fb_kv_layer *layers, int32_t n_layers) {
    for (int32_t i = 1; i < n_layers; i++)
        if (memcmp(&layers[i], &layers[0], sizeof layers[0]) != 0) return false;
    return true;
}

static bool is_split(const struct fb_page_pool *pool) {
    return pool->device && pool->device->n_members;
}

static enum fb_status allocate_memory(struct fb_page_pool *pool) {
    if (!pool->device) {
        pool->memory = fb_memory_allocate(pool->n_bytes);
        if (pool->memory) return FB_OK;
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for %d KV pages (%zu bytes)", pool->n_pages, pool->n_bytes);
    }
    if (is_split(pool)) {
        FB_TRY(fb_split_create(pool));
        fb_device_retain(pool->device);
        return FB_OK;
    }
    void *memory;
    FB_TRY(fb_device_allocate(pool->device, "KV pages", pool->n_bytes, &memory));
    pool->memory = memory;
    const enum fb_status status = pool->device->kind->clear(pool->device->index, memory, pool->n_bytes);
    if (status != FB_OK) fb_device_release(pool->device, memory, pool->n_bytes);
    return status;
}

enum fb_status fb_page_pool_create(enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages,
    const struct fb_kv_layer *layers, int32_t n_layers, fb_page_pool **out) {
    return fb_page_pool_create_on(NULL, k_dtype, v_dtype, n_pages, layers, n_layers, out);
}

static enum fb_status build(
    struct fb_page_pool *pool, enum fb_dtype k_dtype, enum fb_dtype v_dtype, const struct fb_kv_layer *layers) {
    FB_TRY(lay_out(pool, k_dtype, v_dtype, layers));
    return allocate_memory(pool);
}

enum fb_status fb_page_pool_create_on(fb_device *device, enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages,
    const struct fb_kv_layer *layers, int32_t n_layers, fb_page_pool **out) {
    FB_REQUIRE(layers && out, "layers or out is null");
    FB_REQUIRE(holds_kv(k_dtype) && holds_kv(v_dtype),
        "K and V are stored in f32, f16, bf16 or q8_0, not in dtypes %d and %d", (int)k_dtype, (int)v_dtype);
    FB_REQUIRE(n_pages >= 1, "n_pages is %d, must be 1 or more", n_pages);
    FB_REQUIRE(n_layers >= 1 && n_layers <= MAX_LAYERS, "n_layers is %d, must be 1 .. %d", n_layers, MAX_LAYERS);
    if (device && !are_alike(layers, n_layers))
        return fb_fail(FB_UNSUPPORTED, "a GPU holds KV pages of layers that are alike only");
    if (device && layers[0].v_dim == 0)
        return fb_fail(FB_UNSUPPORTED, "a GPU holds no KV pages of layers whose values are a part of K");
    struct fb_page_pool *pool = calloc(1, sizeof *pool);
    struct fb_kv_layout *layouts = calloc((size_t)n_layers, sizeof *layouts);
    if (!pool || !layouts) {
        free(pool);
        free(layouts);
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for a page pool");
    }
    *pool = (struct fb_page_pool){.layers = layouts, .n_layers = n_layers, .n_pages = n_pages, .device = device};
    const enum fb_status status = build(pool, k_dtype, v_dtype, layers);
    if (status != FB_OK) {
        free(layouts);
        free(pool);
        return status;
    }
    *out = pool;
    return FB_OK;
}

void fb_page_pool_free(fb_page_pool *pool) {
    if (!pool) return;
    if (is_split(pool)) {
        fb_split_free(pool);
        fb_device_drop(pool->device);
    } else if (pool->device) {
        fb_device_release(pool->device, pool->memory, pool->n_bytes);
    } else {
        fb_memory_release(pool->memory, pool->n_bytes);
    }
    free(pool->layers);
    free(pool);
}

size_t fb_page_bytes(const fb_page_pool *pool) {
    return pool ? pool->page_bytes : 0;
}

static enum fb_status check_page(const struct fb_page_pool *pool, const char *name, int32_t page) {
    FB_REQUIRE(pool, "pool is null");
    FB_REQUIRE(page >= 0 && page < pool->n_pages, "%s is page %d, the pool has %d", name, page, pool->n_pages);
    return FB_OK;
}

static char *page_at(const struct fb_page_pool *pool, int32_t page) {
    return pool->memory + (size_t)page * pool->page_bytes;
}

/* Copies one page's bytes; one side or both are in the pool. */
static enum fb_status copy(const struct fb_page_pool *pool, enum fb_direction direction, void *to, const void *from) {
    if (pool->device) return pool->device->kind->copy(pool->device->index, direction, to, from, pool->page_bytes);
    memmove(to, from, pool->page_bytes);
    return FB_OK;
}

enum fb_status fb_page_copy(fb_page_pool *pool, int32_t dst, int32_t src) {
    FB_TRY(check_page(pool, "dst", dst));
    FB_TRY(check_page(pool, "src", src));
    if (is_split(pool)) return fb_split_copy(pool, dst, src);
    return copy(pool, FB_ON_DEVICE, page_at(pool, dst), page_at(pool, src));
}

enum fb_status fb_page_zero(fb_page_pool *pool, int32_t page) {
    FB_TRY(check_page(pool, "page", page));
    if (is_split(pool)) return fb_split_zero(pool, page);
    if (pool->device) return pool->device->kind->clear(pool->device->index, page_at(pool, page), pool->page_bytes);
    memset(page_at(pool, page), 0, pool->page_bytes);
    return FB_OK;
}

enum fb_status fb_page_discard(fb_page_pool *pool, int32_t page, int32_t first_layer, int32_t n_layers) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(first_layer >= 0 && n_layers >= 1 && n_layers <= pool->n_layers - first_layer,
        "first_layer is %d and n_layers %d, the pool has %d layers", first_layer, n_layers, pool->n_layers);
    if (pool->device) return FB_OK;
    const struct fb_kv_layout *first = &pool->layers[first_layer], *last = first + n_layers - 1;
    const size_t end = last->offset + fb_slab_bytes(last) * (size_t)last->n_kv_heads;
    fb_memory_discard(page_at(pool, page) + first->offset, end - first->offset);
    return FB_OK;
}

enum fb_status fb_page_read(const fb_page_pool *pool, int32_t page, void *dst, size_t n_bytes) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(dst && n_bytes == pool->page_bytes, "dst has %zu bytes, a page has %zu", n_bytes, pool->page_bytes);
    if (is_split(pool)) return fb_split_read(pool, page, dst);
    return copy(pool, FB_FROM_DEVICE, dst, page_at(pool, page));
}

enum fb_status fb_page_write(fb_page_pool *pool, int32_t page, const void *src, size_t n_bytes) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(src && n_bytes == pool->page_bytes, "src has %zu bytes, a page has %zu", n_bytes, pool->page_bytes);
    if (is_split(pool)) return fb_split_write(pool, page, src);
    return copy(pool, FB_TO_DEVICE, page_at(pool, page), src);
}

/* The bits of |x|, which are ordered like the magnitudes: 0 .. infinity, then NaN. */
static int32_t magnitude_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & INT32_MAX;
}

/* Quantizes n numbers to int8 codes and returns their scale; NaN if a number is NaN or infinite. Both loops are
 * written so that compilers vectorize them: a maximum of integers has no NaN to look after, and a sum with
 * 1.5 x 2^23 rounds to even, as lrintf does, and leaves the code in its low byte. */
static float quantize_head(const float *x, size_t n, int8_t *codes) {
    const float round = 0x1.8p23f;
    int32_t top_bits = 0;
    for (size_t i = 0; i < n; i++) {
        const int32_t bits = magnitude_bits(x[i]);
        top_bits = bits > top_bits ? bits : top_bits;
    }
    float top;
    memcpy(&top, &top_bits, sizeof top);
    const bool is_finite = top_bits < magnitude_bits(INFINITY);
    if (!is_finite || top < 1e-30f) {
        memset(codes, 0, n);
        return is_finite ? 0.0f : NAN;
    }
    const float inverse = 127.0f / top;
    for (size_t i = 0; i < n; i++) {
        const float shifted = x[i] * inverse + round;
        uint32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        codes[i] = (int8_t)(uint8_t)bits;
    }
    return top / 127.0f;
}

/* Write K and V of a position as bf16 pairs. */
static void write_k_pairs(const struct fb_kernels *kernels, uint16_t *to, size_t at, size_t head_dim, const float *k) {
    uint16_t narrow[MAX_HEAD_DIM + 1];
    const size_t held = fb_k_dimensions(FB_BF16, head_dim);
    kernels->narrow_pairs(k, head_dim, narrow);
    to += at / 16 * 16 * held + at % 16 * 2;
    for (size_t d = 0; d < held; d++)
        to[d / 2 * 32 + d % 2] = narrow[d];
}

static void write_v_pairs(
    const struct fb_kernels *kernels, uint16_t *to, size_t at, bool is_last, size_t head_dim, const float *v) {
    uint16_t narrow[MAX_HEAD_DIM + 1];
    kernels->narrow_pairs(v, head_dim, narrow);
    for (size_t d = 0; d < head_dim; d++) {
        uint16_t *pair = to + (d / 16 * (FB_PAGE_POSITIONS / 2) + at / 2) * 32 + d % 16 * 2;
        pair[at % 2] = narrow[d];
        if (is_last && at % 2 == 0) pair[1] = 0;
    }
}

static void write_v(const struct fb_kv_layout *layer, const struct fb_kernels *kernels, char *to, size_t at,
    bool is_last, const float *v) {
    const size_t v_dim = (size_t)layer->v_dim;
    if (layer->v.dtype == FB_BF16) {
        write_v_pairs(kernels, (uint16_t *)(void *)to, at, is_last, v_dim, v);
        return;
    }
    int8_t codes[MAX_HEAD_DIM];
    float *scales = fb_part_scales(&layer->v, to);
    if (scales) scales[at] = quantize_head(v, v_dim, codes);
    for (size_t d = 0; d < v_dim; d += 16) {
        const size_t lanes = v_dim - d < 16 ? v_dim - d : 16;
        const size_t element = (d / 16 * FB_PAGE_POSITIONS + at) * 16;
        if (scales)
            memcpy(to + element, codes + d, lanes);
        else
            kernels->narrow[layer->v.dtype](v + d, lanes, to + element * fb_element_bytes(layer->v.dtype));
    }
}

void fb_slab_write(const struct fb_kv_layout *layer, const struct fb_kernels *kernels, char *slab, int32_t position,
    bool is_last, const float *k, const float *v) {
    if (layer->v_dim) write_v(layer, kernels, fb_slab_v(layer, slab), (size_t)position, is_last, v);
    if (layer->k.dtype == FB_BF16) {
        write_k_pairs(kernels, (uint16_t *)(void *)slab, (size_t)position, (size_t)layer->k_dim, k);
        return;
    }
    const size_t k_dim = (size_t)layer->k_dim, at = (size_t)position;
    const size_t first = at / 16 * 16 * k_dim + at % 16; /* element of dimension 0 inside K */
    uint32_t narrow[MAX_HEAD_DIM];                       /* fits any format */
    float *k_scales = fb_part_scales(&layer->k, slab);
    if (k_scales)
        k_scales[at] = quantize_head(k, k_dim, (int8_t *)narrow);
    else
        kernels->narrow[layer->k.dtype](k, k_dim, narrow);
    switch (fb_element_bytes(layer->k.dtype)) {
    case 4:
        for (size_t d = 0; d < k_dim; d++)
            ((uint32_t *)(void *)slab)[first + d * 16] = narrow[d];
        break;
    case 2:
        for (size_t d = 0; d < k_dim; d++)
            ((uint16_t *)(void *)slab)[first + d * 16] = ((const uint16_t *)narrow)[d];
        break;
    default:
        for (size_t d = 0; d < k_dim; d++)
            slab[first + d * 16] = ((const char *)narrow)[d];
    }
}
