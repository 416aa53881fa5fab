/*
 * test_bytes_kv.c - keys and values written as bytes: codes, scales and where they lie, against plain loops.
 */
#include "check.h"
#include "kv/pages.h"

#include <math.h>
#include <string.h>

enum { K_DIM = 70, V_DIM = 37, V_PADDED = 48, WIDEST = 70 };

static uint32_t state = 3;

static float uniform(void) { /* -1 .. 1 */
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state / 2147483648.0f;
}

/* Codes and scale of n numbers as the layout defines them (pages.h). */
static float expected(const float *x, size_t n, int8_t *codes) {
    float top = 0.0f;
    memset(codes, 0, n);
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return NAN;
        top = fmaxf(top, fabsf(x[i]));
    }
    if (top < 1e-30f) return 0.0f;
    const float inverse = 127.0f / top;
    for (size_t i = 0; i < n; i++)
        codes[i] = (int8_t)lrintf(x[i] * inverse);
    return top / 127.0f;
}

static bool same_bits(float a, float b) {
    return (isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof a) == 0;
}

enum { RANDOM, TIES, ZEROS, TINY, LARGE, NEGATIVE_TOP, WITH_NAN, WITH_INFINITY, KINDS };

static void fill(float *x, size_t n, int kind) {
    for (size_t i = 0; i < n; i++) {
        x[i] = uniform();
        if (kind == TIES) x[i] = (float)((int)i * 7 % 254 - 127) * 0.5f;
        if (kind == ZEROS) x[i] = i % 2 ? 0.0f : -0.0f;
        if (kind == TINY) x[i] *= 9e-31f;
        if (kind == LARGE) x[i] *= 3.4e38f;
    }
    if (kind == TIES) x[n - 1] = 127.0f; /* scale 1: halves lie between two codes */
    if (kind == NEGATIVE_TOP) x[n / 2] = -1.5f;
    if (kind == WITH_NAN) x[n - 1] = -NAN;
    if (kind == WITH_INFINITY) x[0] = -INFINITY;
}

static void check_position(const struct fb_kv_layout *layer, char *slab, int32_t at, const float *k, const float *v) {
    int8_t codes[WIDEST];
    const char *keys = slab, *values = fb_slab_v(layer, slab);
    CHECK_AT(same_bits(fb_part_scales(&layer->k, slab)[at], expected(k, K_DIM, codes)), "K, position %d", at);
    for (size_t d = 0; d < K_DIM; d++)
        CHECK_AT((int8_t)keys[((size_t)at / 16 * K_DIM + d) * 16 + (size_t)at % 16] == codes[d], "K %zu, position %d",
            d, at);
    CHECK_AT(same_bits(fb_part_scales(&layer->v, fb_slab_v(layer, slab))[at], expected(v, V_DIM, codes)),
        "V, position %d", at);
    for (size_t d = 0; d < V_PADDED; d++)
        CHECK_AT((int8_t)values[(d / 16 * FB_PAGE_POSITIONS + (size_t)at) * 16 + d % 16] == (d < V_DIM ? codes[d] : 0),
            "V %zu, position %d", d, at);
}

int main(void) {
    const struct fb_kv_layer heads = {.n_kv_heads = 1, .k_dim = K_DIM, .v_dim = V_DIM};
    fb_page_pool *pool = NULL;
    CHECK(fb_page_pool_create(FB_Q8_0, FB_Q8_0, 1, &heads, 1, &pool) == FB_OK);
    if (!pool) return check_result();
    CHECK(fb_page_zero(pool, 0) == FB_OK);
    const struct fb_kv_layout *layer = &pool->layers[0];
    char *slab = fb_slab(pool, 0, 0, 0);
    static float k[FB_PAGE_POSITIONS][K_DIM], v[FB_PAGE_POSITIONS][V_DIM];
    for (int32_t at = 0; at < FB_PAGE_POSITIONS; at++) {
        fill(k[at], K_DIM, at % KINDS);
        fill(v[at], V_DIM, (at + at / KINDS + 1) % KINDS);
        fb_slab_write(layer, &fb_kernels_reference, slab, at, true, k[at], v[at]);
    }
    /* After all were written: no position touches another. */
    for (int32_t at = 0; at < FB_PAGE_POSITIONS; at++)
        check_position(layer, slab, at, k[at], v[at]);
    fb_page_pool_free(pool);
    return check_result();
}
