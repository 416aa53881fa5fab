/*
 * weight.h - a weight matrix as panels of 16 rows.
 *
 * Panels of the plain formats (f32, f16, bf16) are interleaved in pairs; if their number is odd, the last
 * one's partner is zero:
 *
 *     panels p, p + 1, p even; L = w(16p .. 16p+15, k), R = w(16p+16 .. 16p+31, k):
 *
 *          k = 0     k = 1     k = 2
 *        [ L    R    L    R    L    R   ...  ]     32 x n_cols elements
 *
 * In bf16 two columns are interleaved; if their number is odd, the last one's partner is 0:
 *
 *        [ w(16p,0) w(16p,1) w(16p+1,0) w(16p+1,1) ... w(16p+15,1) | w(16p+16,0) w(16p+16,1) ...
 *
 * One vector load reads one column of 16 outputs, so a product needs no horizontal sum, and panels are read
 * as one contiguous stream for any number of tokens. Panels of the block formats are drawn in layout.h.
 */
#ifndef FABULA_QUANT_WEIGHT_H
#define FABULA_QUANT_WEIGHT_H

#include "base/device.h"
#include "kernels/kernels.h"
#include "quant/layout.h"

#include <stdatomic.h>

struct fb_weight {
    enum fb_dtype dtype;
    int32_t n_experts; /* matrices, one after another; 1 usually */
    int32_t n_rows, n_cols;
    int32_t n_panels;      /* n_rows / 16, rounded up */
    int32_t expert_panels; /* from a matrix to the next; even for the plain formats */
    size_t panel_bytes;
    size_t n_bytes;
    bool takes_f32; /* bf16: products take inputs in f32, not rounded to bf16 */
    atomic_llong non_finite;
    char *panels;      /* on the device, if there is one */
    fb_device *device; /* NULL: the CPU */
};

/* Whether products take inputs rounded to bf16, by gemm_pairs. */
static inline bool fb_takes_pairs(const struct fb_weight *weight) {
    return weight->dtype == FB_BF16 && !weight->takes_f32;
}

/* A panel of blocks, or the start of a pair of plain panels. */
static inline char *fb_weight_panel(const struct fb_weight *weight, size_t panel) {
    return weight->panels + panel * weight->panel_bytes;
}

/* Panels of a plain format, from an even one on. */
static inline struct fb_panels fb_weight_plain(const struct fb_weight *weight, size_t panel) {
    return (struct fb_panels){
        fb_weight_panel(weight, panel), 2, weight->panel_bytes / fb_dtype_block_bytes(weight->dtype)};
}

/* Dequantizes row `row` of the first matrix to f32 [n_cols], unchecked. */
void fb_weight_gather_row(const struct fb_weight *weight, int32_t row, float *dst);

#endif
