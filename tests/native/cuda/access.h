/* access.h - internals of the library for tests in C++, which cannot include its headers. */
#ifndef FABULA_TESTS_ACCESS_H
#define FABULA_TESTS_ACCESS_H

#include "fabula.h"
#include "ops/sample_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* fb_layout_of: bits, zero point, kind, scale_bytes, super_bytes */
void access_layout(enum fb_dtype dtype, int32_t numbers[5]);

/* fb_slab_write with the reference kernels */
void access_slab_write(fb_page_pool *pool, int32_t page, int32_t layer, int32_t kv_head, int32_t position, bool is_last,
    const float *k, const float *v);

/* A page pool on a device (NULL: the CPU) whose layers are alike. */
enum fb_status access_pool(fb_device *device, enum fb_dtype k, enum fb_dtype v, int32_t n_pages, int32_t n_layers,
    int32_t n_kv_heads, int32_t head_dim, fb_page_pool **out);

int32_t access_lowest_visible(const struct fb_sequence *sequence, int32_t window, int32_t position);
bool access_sees_sinks(const struct fb_sequence *sequence, int32_t window, int32_t position);

/* fb_plan_sample; arguments as for fb_sample */
enum fb_status access_plan(int32_t vocab_size, const struct fb_sampling *settings, uint64_t position,
    const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values, int32_t n_bias,
    const int32_t *breakers, int32_t n_breakers, void *work, struct fb_sample_changes *changes,
    struct fb_sample_plan *out);

#ifdef __cplusplus
}
#endif
#endif
