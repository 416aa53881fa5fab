/* pool.c - pages in memory of the GPU. See program.h. */
#include "pool.h"

#include "runtime.h"

#include <stdlib.h>

/* Some copies return before they are done, and the streams of programs do not wait for the default one. */
static enum fb_status finish(int error, const char *what) {
    FB_TRY(fb_cuda_check(error, what));
    return fb_cuda_check(cudaDeviceSynchronize(), what);
}

enum fb_status fb_cuda_pool_create(enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages, int32_t n_layers,
    int32_t n_kv_heads, int32_t head_dim, fb_cuda_pool **out) {
    FB_REQUIRE(out, "out is null");
    struct fb_page_pool shape;
    FB_TRY(fb_page_pool_lay_out(k_dtype, v_dtype, n_pages, n_layers, n_kv_heads, head_dim, &shape));
    fb_cuda_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a pool of pages");
    pool->shape = shape;
    void *memory = NULL;
    enum fb_status status = fb_cuda_take(shape.n_bytes, "no memory for KV pages", &memory);
    pool->shape.memory = memory;
    if (status == FB_OK) status = finish(cudaMemset(memory, 0, shape.n_bytes), "clearing KV pages");
    if (status != FB_OK) {
        fb_cuda_pool_free(pool);
        return status;
    }
    *out = pool;
    return FB_OK;
}

void fb_cuda_pool_free(fb_cuda_pool *pool) {
    if (!pool) return;
    if (pool->shape.memory) cudaFree(pool->shape.memory);
    free(pool);
}

size_t fb_cuda_page_bytes(const fb_cuda_pool *pool) {
    return pool ? pool->shape.page_bytes : 0;
}

static enum fb_status check_page(const fb_cuda_pool *pool, const char *name, int32_t page) {
    FB_REQUIRE(pool, "pool is null");
    FB_REQUIRE(
        page >= 0 && page < pool->shape.n_pages, "%s is page %d, the pool has %d", name, page, pool->shape.n_pages);
    return FB_OK;
}

static char *page_at(const fb_cuda_pool *pool, int32_t page) {
    return pool->shape.memory + (size_t)page * pool->shape.page_bytes;
}

enum fb_status fb_cuda_page_copy(fb_cuda_pool *pool, int32_t dst, int32_t src) {
    FB_TRY(check_page(pool, "dst", dst));
    FB_TRY(check_page(pool, "src", src));
    if (dst == src) return FB_OK;
    return finish(cudaMemcpy(page_at(pool, dst), page_at(pool, src), pool->shape.page_bytes, cudaMemcpyDeviceToDevice),
        "copying a page");
}

enum fb_status fb_cuda_page_zero(fb_cuda_pool *pool, int32_t page) {
    FB_TRY(check_page(pool, "page", page));
    return finish(cudaMemset(page_at(pool, page), 0, pool->shape.page_bytes), "clearing a page");
}

enum fb_status fb_cuda_page_read(const fb_cuda_pool *pool, int32_t page, void *dst, size_t n_bytes) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(
        dst && n_bytes == pool->shape.page_bytes, "dst has %zu bytes, a page has %zu", n_bytes, pool->shape.page_bytes);
    return fb_cuda_check(cudaMemcpy(dst, page_at(pool, page), n_bytes, cudaMemcpyDeviceToHost), "reading a page");
}

enum fb_status fb_cuda_page_write(fb_cuda_pool *pool, int32_t page, const void *src, size_t n_bytes) {
    FB_TRY(check_page(pool, "page", page));
    FB_REQUIRE(
        src && n_bytes == pool->shape.page_bytes, "src has %zu bytes, a page has %zu", n_bytes, pool->shape.page_bytes);
    return finish(cudaMemcpy(page_at(pool, page), src, n_bytes, cudaMemcpyHostToDevice), "writing a page");
}
