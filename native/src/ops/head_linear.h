/*
 * head_linear.h - products with a matrix for each head, as work items for the threads.
 *
 *     in    [n_tokens][heads][in_head]                 out   [n_tokens][heads][in_head - n_cols + n_rows]
 *           in head  = copied numbers, x [n_cols]            out head = copied numbers, weight_head x
 *
 * Latent attention has two: queries that attend to latents, whose rotated part is copied, and values made of attended
 * latents. A work item is a head, some of its panels and a block of tokens. It converts its input itself (bf16, or 8
 * bits): a few hundred numbers a token, which cost less than a barrier.
 */
#ifndef FABULA_OPS_HEAD_LINEAR_H
#define FABULA_OPS_HEAD_LINEAR_H

#include "kernels/kernels.h"
#include "quant/weight.h"

struct fb_head_linear {
    const struct fb_kernels *kernels;
    const struct fb_weight *weight; /* a matrix for each head */
    const float *x;                 /* [n_tokens][ldx] */
    float *out;                     /* [n_tokens][ld_out], heads from column 0 on */
    size_t ldx, ld_out, n_tokens;
    size_t in_head;     /* numbers of a head of `x`, n_cols at least */
    char *scratch;      /* fb_head_linear_bytes of this thread */
    size_t item_panels; /* per work item; set by fb_head_linear_items */
};

/* Bytes of scratch that the items of a weight need. */
size_t fb_head_linear_bytes(const struct fb_weight *weight);

/* Number of work items; chooses item_panels so that `n_threads` threads get enough of them. */
int64_t fb_head_linear_items(struct fb_head_linear *product, int n_threads);
void fb_head_linear_item(const struct fb_head_linear *product, int64_t index);

#endif
