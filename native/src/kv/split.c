/* split.c - a page pool over the members of a group. See split.h. */
#include "kv/split.h"

#include "base/status.h"

#include <stdlib.h>
#include <string.h>

enum fb_status fb_split_heads(int32_t n_kv_heads, int32_t n_members, int32_t member, int32_t *first, int32_t *n) {
    FB_REQUIRE(n_kv_heads % n_members == 0 || n_members % n_kv_heads == 0,
        "%d KV heads cannot be split over %d devices: one number must divide the other", n_kv_heads, n_members);
    *first = (int32_t)((int64_t)member * n_kv_heads / n_members);
    *n = n_kv_heads < n_members ? 1 : n_kv_heads / n_members;
    return FB_OK;
}

enum fb_status fb_split_create(struct fb_page_pool *pool) {
    const fb_device *group = pool->device;
    const struct fb_kv_layout *layer = &pool->layers[0]; /* all are alike */
    struct fb_kv_layer *shares = calloc((size_t)pool->n_layers, sizeof *shares);
    enum fb_status status = shares ? FB_OK : fb_fail(FB_OUT_OF_MEMORY, "no memory for a page pool");
    for (int32_t i = 0; status == FB_OK && i < group->n_members; i++) {
        int32_t first = 0, n = 0;
        status = fb_split_heads(layer->n_kv_heads, group->n_members, i, &first, &n);
        for (int32_t l = 0; status == FB_OK && l < pool->n_layers; l++)
            shares[l] = (struct fb_kv_layer){n, layer->k_dim, layer->v_dim};
        if (status == FB_OK)
            status = fb_page_pool_create_on(group->members[i], layer->k.dtype, layer->v.dtype, pool->n_pages, shares,
                pool->n_layers, &pool->parts[i]);
    }
    free(shares);
    if (status != FB_OK) fb_split_free(pool);
    return status;
}

void fb_split_free(struct fb_page_pool *pool) {
    for (int32_t i = 0; i < pool->device->n_members; i++)
        fb_page_pool_free(pool->parts[i]);
}

enum fb_status fb_split_copy(const struct fb_page_pool *pool, int32_t dst, int32_t src) {
    for (int32_t i = 0; i < pool->device->n_members; i++)
        FB_TRY(fb_page_copy(pool->parts[i], dst, src));
    return FB_OK;
}

enum fb_status fb_split_zero(const struct fb_page_pool *pool, int32_t page) {
    for (int32_t i = 0; i < pool->device->n_members; i++)
        FB_TRY(fb_page_zero(pool->parts[i], page));
    return FB_OK;
}

/* Bytes of one layer's heads, and the byte offset of a member's heads in a layer of a whole page. */
static size_t layer_bytes(const struct fb_page_pool *pool) {
    return pool->page_bytes / (size_t)pool->n_layers;
}

static size_t member_offset(const struct fb_page_pool *pool, int32_t member) {
    const struct fb_kv_layout *layer = &pool->layers[0];
    const size_t first = (size_t)member * (size_t)layer->n_kv_heads / (size_t)pool->device->n_members;
    return first * fb_slab_bytes(layer);
}

static enum fb_status allocate_buffer(const struct fb_page_pool *part, char **out) {
    *out = malloc(part->page_bytes);
    return *out ? FB_OK : fb_fail(FB_OUT_OF_MEMORY, "no memory for %zu bytes of a page", part->page_bytes);
}

enum fb_status fb_split_read(const struct fb_page_pool *pool, int32_t page, char *dst) {
    for (int32_t i = 0; i < pool->device->n_members; i++) {
        const struct fb_page_pool *part = pool->parts[i];
        const size_t bytes = layer_bytes(part), offset = member_offset(pool, i);
        if (i > 0 && offset == member_offset(pool, i - 1)) continue; /* a copy of the same head */
        char *buffer;
        FB_TRY(allocate_buffer(part, &buffer));
        const enum fb_status status = fb_page_read(part, page, buffer, part->page_bytes);
        for (size_t layer = 0; status == FB_OK && layer < (size_t)pool->n_layers; layer++)
            memcpy(dst + layer * layer_bytes(pool) + offset, buffer + layer * bytes, bytes);
        free(buffer);
        FB_TRY(status);
    }
    return FB_OK;
}

enum fb_status fb_split_write(const struct fb_page_pool *pool, int32_t page, const char *src) {
    for (int32_t i = 0; i < pool->device->n_members; i++) {
        struct fb_page_pool *part = pool->parts[i];
        const size_t bytes = layer_bytes(part), offset = member_offset(pool, i);
        char *buffer;
        FB_TRY(allocate_buffer(part, &buffer));
        for (size_t layer = 0; layer < (size_t)pool->n_layers; layer++)
            memcpy(buffer + layer * bytes, src + layer * layer_bytes(pool) + offset, bytes);
        const enum fb_status status = fb_page_write(part, page, buffer, part->page_bytes);
        free(buffer);
        FB_TRY(status);
    }
    return FB_OK;
}
