/* pages.c - the pool of KV pages. See pages.h. */
#include "kv/pages.h"

#include "base/memory.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_HEAD_DIM = 1024, MAX_COUNT = 1 << 20 };

enum fb_status fb_page_pool_create(
    enum fb_dtype dtype, int32_t n_pages, int32_t n_layers, int32_t n_kv_heads, int32_t head_dim, fb_page_pool **out) {
    FB_REQUIRE(out, "out is null");
    FB_REQUIRE(dtype == FB_F32 || dtype == FB_F16, "KV is held in f32 or f16, not in dtype %d", (int)dtype);
    FB_REQUIRE(n_pages >= 1, "n_pages is %d, must be 1 or more", n_pages);
    FB_REQUIRE(n_layers >= 1 && n_layers <= MAX_COUNT, "n_layers is %d, must be 1 .. %d", n_layers, MAX_COUNT);
    FB_REQUIRE(n_kv_heads >= 1 && n_kv_heads <= MAX_COUNT, "n_kv_heads is %d, must be 1 .. %d", n_kv_heads, MAX_COUNT);
    FB_REQUIRE(head_dim >= 1 && head_dim <= MAX_HEAD_DIM, "head_dim is %d, must be 1 .. %d", head_dim, MAX_HEAD_DIM);
    size_t element_bytes = dtype == FB_F32 ? 4 : 2;
    size_t k_elements = (size_t)FB_PAGE_POSITIONS * (size_t)head_dim;
    size_t v_elements = (size_t)FB_PAGE_POSITIONS * (size_t)((head_dim + 15) / 16 * 16);
    size_t slab_bytes = (k_elements + v_elements) * element_bytes, page_bytes, n_bytes;
    if (!fb_size_multiply(slab_bytes, (size_t)n_layers * (size_t)n_kv_heads, &page_bytes) ||
        !fb_size_multiply(page_bytes, (size_t)n_pages, &n_bytes))
        return fb_fail(FB_OUT_OF_MEMORY, "%d KV pages do not fit memory", n_pages);
    struct fb_page_pool *pool = calloc(1, sizeof *pool);
    char *memory = pool ? fb_memory_take(n_bytes) : NULL;
    if (!memory) {
        free(pool);
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for %d KV pages (%zu bytes)", n_pages, n_bytes);
    }
    *pool = (struct fb_page_pool){.dtype = dtype,
        .n_pages = n_pages,
        .n_layers = n_layers,
        .n_kv_heads = n_kv_heads,
        .head_dim = head_dim,
        .element_bytes = element_bytes,
        .k_elements = k_elements,
        .slab_elements = k_elements + v_elements,
        .page_bytes = page_bytes,
        .n_bytes = n_bytes,
        .memory = memory};
    *out = pool;
    return FB_OK;
}

void fb_page_pool_free(fb_page_pool *pool) {
    if (!pool) return;
    fb_memory_release(pool->memory, pool->n_bytes);
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

enum fb_status fb_page_copy(fb_page_pool *pool, int32_t dst, int32_t src) {
    FB_TRY(check_page(pool, "dst", dst));
    FB_TRY(check_page(pool, "src", src));
    memmove(page_at(pool, dst), page_at(pool, src), pool->page_bytes);
    return FB_OK;
}

enum fb_status fb_page_zero(fb_page_pool *pool, int32_t page) {
    FB_TRY(check_page(pool, "page", page));
    memset(page_at(pool, page), 0, pool->page_bytes);
    return FB_OK;
}

enum fb_status fb_page_read(const fb_page_pool *pool, int32_t page, void *dst, size_t n_bytes) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(dst && n_bytes == pool->page_bytes, "dst has %zu bytes, a page has %zu", n_bytes, pool->page_bytes);
    memcpy(dst, page_at(pool, page), n_bytes);
    return FB_OK;
}

enum fb_status fb_page_write(fb_page_pool *pool, int32_t page, const void *src, size_t n_bytes) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(src && n_bytes == pool->page_bytes, "src has %zu bytes, a page has %zu", n_bytes, pool->page_bytes);
    memcpy(page_at(pool, page), src, n_bytes);
    return FB_OK;
}

void fb_slab_write(const struct fb_page_pool *pool, const struct fb_kernels *kernels, char *slab, int32_t position,
    const float *k, const float *v) {
    const size_t head_dim = (size_t)pool->head_dim, at = (size_t)position;
    const size_t first = at / 16 * 16 * head_dim + at % 16; /* element of dimension 0 inside K */
    uint32_t narrow[MAX_HEAD_DIM];                          /* room for either format */
    kernels->narrow[pool->dtype](k, head_dim, narrow);
    if (pool->element_bytes == 4) {
        uint32_t *out = (uint32_t *)slab + first;
        for (size_t d = 0; d < head_dim; d++)
            out[d * 16] = narrow[d];
    } else {
        const uint16_t *halfs = (const uint16_t *)narrow;
        uint16_t *out = (uint16_t *)slab + first;
        for (size_t d = 0; d < head_dim; d++)
            out[d * 16] = halfs[d];
    }
    char *to = fb_slab_v(pool, slab);
    for (size_t d = 0; d < head_dim; d += 16) {
        size_t lanes = head_dim - d < 16 ? head_dim - d : 16;
        size_t element = (d / 16 * FB_PAGE_POSITIONS + at) * 16;
        kernels->narrow[pool->dtype](v + d, lanes, to + element * pool->element_bytes);
    }
}
