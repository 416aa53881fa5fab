/*
 * linear.h - out = x weight^T with fused operations, as work items for the threads.
 *
 * A work item is some panels x a block of tokens. Its product goes into a tile on the stack and is copied to
 * `out` once, behind everything that is fused: bias, activation, scale, residual, soft cap. So `residual` may be
 * `out`, and no item reads another's sums.
 */
#ifndef FABULA_OPS_LINEAR_H
#define FABULA_OPS_LINEAR_H

#include "kernels/kernels.h"
#include "quant/weight.h"

#include <stdatomic.h>

struct fb_linear {
    const struct fb_kernels *kernels;
    const struct fb_weight *weight;
    /* The inputs in the format that the weight takes: `x`, `pairs` for bf16 (fb_takes_pairs), `activations`
     * for blocks. */
    const float *x;                          /* [n_tokens][ldx] */
    const uint16_t *pairs;                   /* [n_tokens][ld_pairs] */
    const struct fb_activation *activations; /* [n_tokens][ld_activations] blocks */
    const float *bias;                       /* [weight rows] or NULL */
    const float *residual;                   /* [n_tokens][ld_residual] or NULL */
    float *out;                              /* [n_tokens][ld_out], its first `width` columns written */
    size_t ldx, ld_pairs, ld_activations, ld_residual, ld_out;
    size_t n_tokens, width;
    bool is_gated;                        /* panels 2 i and 2 i + 1 are gate and up; width is half the rows */
    enum fb_activation_kind activation;   /* of the gate, or of the result before `scale` */
    float numbers[FB_ACTIVATION_NUMBERS]; /* of the activation */
    float scale;                          /* factor on the result before the residual */
    float soft_cap;                       /* 0: none */
    atomic_int *non_finite;               /* NULL, or set to 1 when a result is NaN or infinite */
    size_t item_panels;                   /* panels per work item; set by fb_linear_items */
};

/* The product of some rows of the input and panels of the weight, counted through all experts, into a tile
 * [n_rows][ld]. next: panels that are read next, or NULL; few rows prefetch these panels themselves instead. */
void fb_linear_multiply(const struct fb_linear *linear, size_t panel, size_t n_panels, size_t row, size_t n_rows,
    const char *next, float *tile, size_t ld);

/* out = activation(gate) * up for a panel of each; `up` follows `gate`, `out` may be `gate`. */
void fb_linear_gate(const struct fb_linear *linear, float *gate, float *out);

/* Number of work items; chooses item_panels so that `n_threads` threads get enough of them. */
int64_t fb_linear_items(struct fb_linear *linear, int n_threads);
void fb_linear_item(const struct fb_linear *linear, int64_t index);

#endif
