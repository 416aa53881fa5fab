/*
 * routes.h - which experts the rows of a step go to, and the rows of each expert.
 *
 * ROUTER gives each row its experts by rank, best first. For the grouped product the pairs of (row, rank) are sorted by
 * block of rows, expert and row, so that an expert's matrix is read once for all the rows of a block that chose it:
 *
 *     pairs    (2,0) (5,1) (7,0) | (0,1) (2,1) | ...        pair = row * n_chosen + rank
 *     groups   expert 0            expert 3
 *
 * What is computed for a pair does not depend on its place, so batches, blocks and threads change no bits.
 */
#ifndef FABULA_OPS_ROUTES_H
#define FABULA_OPS_ROUTES_H

#include "kernels/kernels.h"

enum {
    FB_MOST_EXPERTS = 1024,
    FB_MOST_CHOSEN = 64,
    FB_ROUTE_ROWS = 512 /* rows per block: the results of a sum over experts, 4 panels wide, stay near L2 */
};

/* The rows of one expert in one block. */
struct fb_group {
    int32_t expert;
    int32_t first, n_rows; /* in `pairs` */
    int64_t end_item;      /* work items up to it; see experts.h */
};

struct fb_routes {
    const float *chosen; /* [n_rows][ld]: rows of the router */
    size_t ld, n_rows, n_chosen, n_experts;
    int32_t *pairs, *places; /* [n_rows n_chosen]: sorted pairs, and the place of each */
    struct fb_group *groups; /* [fb_most_groups]: of experts that some row chose */
    size_t n_groups;
};

static inline size_t fb_route_blocks(size_t n_rows) {
    return (n_rows + FB_ROUTE_ROWS - 1) / FB_ROUTE_ROWS;
}

/* Groups of a step, at most. */
static inline size_t fb_most_groups(size_t n_rows, size_t n_experts) {
    return fb_route_blocks(n_rows) * n_experts;
}

static inline float fb_route_weight(const struct fb_routes *routes, size_t row, size_t rank) {
    return routes->chosen[row * routes->ld + routes->n_chosen + rank];
}

/* Fills `pairs`, `places` and `groups` from `chosen`. */
void fb_sort_routes(struct fb_routes *routes);

/* The operator ROUTER on one row: out [2 n_chosen]. */
void fb_route_row(
    const struct fb_kernels *kernels, const struct fb_op *op, const float *logits, size_t n_experts, float *out);

#endif
