/*
 * linear.h - out = x weight^T with whatever is fused behind it, as items that threads share.
 *
 * An item is a group of panels x a block of tokens. Its product goes into a tile on the stack and from there, once,
 * to its place: with bias and residual added, or through SwiGLU. So `residual` may be `out`, and no item sees
 * another's sums.
 */
#ifndef FABULA_OPS_LINEAR_H
#define FABULA_OPS_LINEAR_H

#include "kernels/kernels.h"
#include "quant/weight.h"

#include <stdatomic.h>

struct fb_linear {
    const struct fb_kernels *kernels;
    const struct fb_weight *weight;
    /* The inputs in the format that the weight takes: f32 and f16 `x`, bf16 `pairs`, blocks `activations`. */
    const float *x;                          /* [n_tokens][ldx] */
    const uint16_t *pairs;                   /* [n_tokens][ld_pairs] */
    const struct fb_activation *activations; /* [n_tokens][ld_activations] blocks */
    const float *bias;                       /* [weight rows] or NULL */
    const float *residual;                   /* [n_tokens][ld_residual] or NULL */
    float *out;                              /* [n_tokens][ld_out], its first `width` columns written */
    size_t ldx, ld_pairs, ld_activations, ld_residual, ld_out;
    size_t n_tokens, width;
    bool swiglu;            /* panels 2 i and 2 i + 1 are gate and up; width is half the rows */
    atomic_int *non_finite; /* NULL, or raised when a result is NaN or infinite */
    size_t group;           /* panels in an item; set by fb_linear_items */
};

/* Number of items; chooses the group so that `n_threads` find enough of them. */
int64_t fb_linear_items(struct fb_linear *linear, int n_threads);
void fb_linear_item(const struct fb_linear *linear, int64_t index);

#endif
