/*
 * heads.h - what happens to attention heads before they are used: norms and rotation. Called for whole rows
 * (program/rows.c) and by attention for single heads (struct fb_raw_heads), with the same bits.
 */
#ifndef FABULA_OPS_HEADS_H
#define FABULA_OPS_HEADS_H

#include "kernels/kernels.h"

/* One rope table, and the angles of a step's tokens. */
struct fb_angles {
    const float *inv_freq; /* [n_pairs] */
    size_t n_pairs;
    float scale;
    float *cos_sin;        /* [n_tokens][2][n_pairs]: cos of each pair, then sin */
    float *sink_rotations; /* likewise: from a query's position to the one at which sinks see it (attention.h) */
};

/* Norms n heads of width `dim` in place: all together with FB_HEADS_WHOLE, else each. `vector` [length] holds the
 * weights, of one head or of all, and with FB_HEADS_BIASED then as many biases. */
void fb_norm_heads(const struct fb_kernels *kernels, const struct fb_op *op, const float *vector, int32_t length,
    float *heads, int32_t n, int32_t dim);

/* Norms head number `index` of them, without FB_HEADS_WHOLE. */
void fb_norm_head(const struct fb_kernels *kernels, const struct fb_op *op, const float *vector, int32_t length,
    int32_t index, float *head, int32_t dim);

/* RMS norm without weight of one v head. */
void fb_norm_value(const struct fb_kernels *kernels, const struct fb_op *op, float *head, int32_t dim);

/* FB_HEADS_LATENT: RMS norm of the last v_dim numbers of one k head. */
void fb_norm_latent(
    const struct fb_kernels *kernels, const struct fb_op *op, float *head, const struct fb_heads *geometry);

static inline void fb_rotate_head(
    const struct fb_kernels *kernels, float *head, const float *cos_sin, size_t row, size_t n_pairs) {
    const float *cosines = cos_sin + row * 2 * n_pairs;
    kernels->rotate(head, head + n_pairs, cosines, cosines + n_pairs, n_pairs);
}

#endif
