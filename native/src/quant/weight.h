/*
 * weight.h - a weight matrix as panels of 16 rows, the plain formats' two by two, of an odd number the last beside one of zeros.
 *
 *     panels p, p + 1:   k = 0                               k = 1
 *                      [ w(16p..16p+15,0) w(16p+16..16p+31,0) w(16p..16p+15,1) w(16p+16..16p+31,1) ...   32 x n_cols elements
 *
 * In bf16 two columns lie together, of an odd number the last beside 0:
 *
 *                      [ w(16p,0) w(16p,1) w(16p+1,0) w(16p+1,1) ... w(16p+15,1) | w(16p+16,0) w(16p+16,1) ...
 *
 * One vector load takes one column of 16 outputs, so a product needs no horizontal sum, and panels are read as one
 * unbroken stream whether one token is multiplied or a thousand. Panels of the block formats are drawn in layout.h.
 */
#ifndef FABULA_QUANT_WEIGHT_H
#define FABULA_QUANT_WEIGHT_H

#include "base/device.h"
#include "kernels/kernels.h"
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

/* A panel of blocks, or where two panels of a plain format begin. */
static inline char *fb_weight_panel(const struct fb_weight *weight, size_t panel) {
    return weight->panels + panel * weight->panel_bytes;
}

/* Panels of a plain format from an even number on. */
static inline struct fb_panels fb_weight_plain(const struct fb_weight *weight, size_t panel) {
    return (struct fb_panels){
        fb_weight_panel(weight, panel), 2, weight->panel_bytes / fb_dtype_block_bytes(weight->dtype)};
}

/* Row as f32 [n_cols], no checks. */
void fb_weight_gather_row(const struct fb_weight *weight, int32_t row, float *dst);

#endif
