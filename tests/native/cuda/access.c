/* access.c - see access.h. */
#include "access.h"

#include "kv/pages.h"
#include "ops/attention.h"
#include "ops/sample.h"
#include "quant/layout.h"

void access_layout(enum fb_dtype dtype, int32_t numbers[5]) {
    const struct fb_layout layout = fb_layout_of(dtype);
    numbers[0] = layout.bits;
    numbers[1] = layout.zero_shift ? 1 << layout.zero_shift : 0;
    numbers[2] = layout.kind;
    numbers[3] = layout.scale_bytes;
    numbers[4] = layout.super_bytes;
}

void access_slab_write(fb_page_pool *pool, int32_t page, int32_t layer, int32_t kv_head, int32_t position, bool is_last,
    const float *k, const float *v) {
    fb_slab_write(
        &pool->layers[layer], &fb_kernels_reference, fb_slab(pool, page, layer, kv_head), position, is_last, k, v);
}

enum fb_status access_pool(fb_device *device, enum fb_dtype k, enum fb_dtype v, int32_t n_pages, int32_t n_layers,
    int32_t n_kv_heads, int32_t head_dim, fb_page_pool **out) {
    struct fb_kv_layer layers[8];
    for (int32_t i = 0; i < n_layers; i++)
        layers[i] = (struct fb_kv_layer){n_kv_heads, head_dim, head_dim};
    return fb_page_pool_create_on(device, k, v, n_pages, layers, n_layers, out);
}

int32_t access_lowest_visible(const struct fb_sequence *sequence, int32_t window, int32_t position) {
    return fb_lowest_visible(sequence, (struct fb_mask){.window = window}, position);
}

bool access_sees_sinks(const struct fb_sequence *sequence, int32_t window, int32_t position) {
    return fb_sees_sinks(sequence, (struct fb_mask){.window = window}, position);
}

enum fb_status access_plan(int32_t vocab_size, const struct fb_sampling *settings, uint64_t position,
    const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values, int32_t n_bias,
    const int32_t *breakers, int32_t n_breakers, void *work, struct fb_sample_changes *changes,
    struct fb_sample_plan *out) {
    const struct fb_sample_request request = {
        NULL, vocab_size, settings, position, history, n_history, bias_ids, bias_values, n_bias, breakers, n_breakers};
    return fb_plan_sample(&request, work, changes, out);
}
