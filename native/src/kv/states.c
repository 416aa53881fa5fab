/* states.c - the pool of state slots. See states.h. */
#include "kv/states.h"

#include "base/memory.h"
#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_LAYERS = 1 << 20, LINE_FLOATS = 16 };

static const size_t SYSTEM_PAGE = 4096;             /* the smallest of any system */
static const int64_t MAX_FLOATS = (int64_t)1 << 40; /* of a layer: keeps sums of MAX_LAYERS below 2^63 bytes */

static size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

static enum fb_status lay_out(struct fb_state_pool *pool, const int64_t *layer_floats) {
    size_t n_floats = 0;
    for (int32_t i = 0; i < pool->n_layers; i++) {
        FB_REQUIRE(layer_floats[i] >= 1 && layer_floats[i] <= MAX_FLOATS,
            "layer %d of the state pool has %lld numbers, must be 1 .. 2^40", i, (long long)layer_floats[i]);
        pool->layers[i] = (struct fb_state_layer){(size_t)layer_floats[i], n_floats};
        n_floats += round_up((size_t)layer_floats[i], LINE_FLOATS);
    }
    pool->slot_bytes = n_floats * sizeof(float);
    if (pool->slot_bytes >= SYSTEM_PAGE) pool->slot_bytes = round_up(pool->slot_bytes, SYSTEM_PAGE);
    if (!fb_size_multiply(pool->slot_bytes, (size_t)pool->n_slots, &pool->n_bytes))
        return fb_fail(FB_OUT_OF_MEMORY, "%d state slots do not fit memory", pool->n_slots);
    pool->memory = fb_memory_allocate(pool->n_bytes);
    if (pool->memory) return FB_OK;
    return fb_fail(FB_OUT_OF_MEMORY, "no memory for %d state slots (%zu bytes)", pool->n_slots, pool->n_bytes);
}

enum fb_status fb_state_pool_create(
    const int64_t *layer_floats, int32_t n_layers, int32_t n_slots, fb_state_pool **out) {
    FB_REQUIRE(layer_floats && out, "layer_floats or out is null");
    FB_REQUIRE(n_slots >= 1, "n_slots is %d, must be 1 or more", n_slots);
    FB_REQUIRE(n_layers >= 1 && n_layers <= MAX_LAYERS, "n_layers is %d, must be 1 .. %d", n_layers, MAX_LAYERS);
    struct fb_state_pool *pool = calloc(1, sizeof *pool);
    struct fb_state_layer *layers = calloc((size_t)n_layers, sizeof *layers);
    enum fb_status status = FB_OK;
    if (!pool || !layers) {
        status = fb_fail(FB_OUT_OF_MEMORY, "no memory for a state pool");
    } else {
        *pool = (struct fb_state_pool){.layers = layers, .n_layers = n_layers, .n_slots = n_slots};
        status = lay_out(pool, layer_floats);
    }
    if (status != FB_OK) {
        free(layers);
        free(pool);
        return status;
    }
    *out = pool;
    return FB_OK;
}

void fb_state_pool_free(fb_state_pool *pool) {
    if (!pool) return;
    fb_memory_release(pool->memory, pool->n_bytes);
    free(pool->layers);
    free(pool);
}

size_t fb_state_bytes(const fb_state_pool *pool) {
    return pool ? pool->slot_bytes : 0;
}

static enum fb_status check_slot(const struct fb_state_pool *pool, const char *name, int32_t slot) {
    FB_REQUIRE(pool, "pool is null");
    FB_REQUIRE(slot >= 0 && slot < pool->n_slots, "%s is state slot %d, the pool has %d", name, slot, pool->n_slots);
    return FB_OK;
}

static char *slot_at(const struct fb_state_pool *pool, int32_t slot) {
    return pool->memory + (size_t)slot * pool->slot_bytes;
}

enum fb_status fb_state_copy(fb_state_pool *pool, int32_t dst, int32_t src) {
    FB_TRY(check_slot(pool, "dst", dst));
    FB_TRY(check_slot(pool, "src", src));
    memmove(slot_at(pool, dst), slot_at(pool, src), pool->slot_bytes);
    return FB_OK;
}

enum fb_status fb_state_zero(fb_state_pool *pool, int32_t slot) {
    FB_TRY(check_slot(pool, "slot", slot));
    memset(slot_at(pool, slot), 0, pool->slot_bytes);
    return FB_OK;
}

enum fb_status fb_state_discard(fb_state_pool *pool, int32_t slot) {
    FB_TRY(check_slot(pool, "slot", slot));
    fb_memory_discard(slot_at(pool, slot), pool->slot_bytes);
    return FB_OK;
}

enum fb_status fb_state_read(const fb_state_pool *pool, int32_t slot, void *dst, size_t n_bytes) {
    FB_TRY(check_slot(pool, "slot", slot));
    FB_REQUIRE(
        dst && n_bytes == pool->slot_bytes, "dst has %zu bytes, a state slot has %zu", n_bytes, pool->slot_bytes);
    memcpy(dst, slot_at(pool, slot), n_bytes);
    return FB_OK;
}

enum fb_status fb_state_write(fb_state_pool *pool, int32_t slot, const void *src, size_t n_bytes) {
    FB_TRY(check_slot(pool, "slot", slot));
    FB_REQUIRE(
        src && n_bytes == pool->slot_bytes, "src has %zu bytes, a state slot has %zu", n_bytes, pool->slot_bytes);
    memcpy(slot_at(pool, slot), src, n_bytes);
    return FB_OK;
}
