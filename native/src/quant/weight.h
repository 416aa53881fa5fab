/*
 * weight.h - a weight matrix as panels of 16 rows.
 *
 *     panel p:   k = 0            k = 1                 k = n_cols - 1
 *              [ w(16p..16p+15,0) w(16p..16p+15,1) ...  w(16p..16p+15,n_cols-1) ]     16 x n_cols elements, contiguous
 *
 * In bf16 two columns lie together, of an odd number the last beside 0:
 *
 *              [ w(16p,0) w(16p,1) w(16p+1,0) w(16p+1,1) ... w(16p+15,1) | w(16p,2) w(16p,3) ...
 *
 * One vector load takes one column of 16 outputs, so a product needs no horizontal sum, and a panel is read as one
 * unbroken stream whether one token is multiplied or a thousand. Panels of the block formats are drawn in layout.h.
 */
#ifndef FABULA_QUANT_WEIGHT_H
#define FABULA_QUANT_WEIGHT_H

#include "base/device.h"
#include "quant/layout.h"

#include <stdatomic.h>

struct fb_weight {
    enum fb_dtype dtype;
    int32_t n_rows, n_cols;
    int32_t n_panels; /* n_rows / 16, rounded up */
    size_t panel_bytes;
    size_t n_bytes;
    atomic_llong non_finite;
    char *panels;      /* on the device, if there is one */
    fb_device *device; /* NULL: the CPU */
};

/* Elements of a panel of a plain format. */
static inline size_t fb_weight_panel_stride(const struct fb_weight *weight) {
    return (size_t)weight->n_cols * 16;
}

static inline char *fb_weight_panel(const struct fb_weight *weight, size_t panel) {
    return weight->panels + panel * weight->panel_bytes;
}

/* Row as f32 [n_cols], no checks. */
void fb_weight_gather_row(const struct fb_weight *weight, int32_t row, float *dst);

#endif
