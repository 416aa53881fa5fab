/*
 * experts.h - the grouped product: rows times the matrices of the experts that a router chose for them.
 *
 * A work item of results that are kept is some panels of one expert x some of the rows that chose it. A work item of a
 * sum is some panels of all experts x a block of rows: it computes the results of every pair in scratch memory and then
 * adds those of each row by rank, so the order of a sum depends on the row alone, and no barrier is needed before it.
 */
#ifndef FABULA_OPS_EXPERTS_H
#define FABULA_OPS_EXPERTS_H

#include "ops/linear.h"
#include "ops/routes.h"

struct fb_experts {
    /* Weight, bias [n_experts][weight rows], activation, scale, residual, out of `width` results per expert. Inputs are
     * rows by place. */
    struct fb_linear product;
    struct fb_routes routes; /* sorted */
    bool by_pair;            /* inputs are rows by pair, not by place: only if no group has more than one row */
    bool sums, weighs;       /* FB_EXPERTS_SUM, FB_EXPERTS_WEIGH */
    float *scratch;          /* fb_expert_scratch floats of this thread, for a sum */
};

/* Floats of scratch for sums over n_chosen experts, of steps of n_rows rows at most. */
size_t fb_expert_scratch(size_t n_rows, size_t n_chosen);

/* Number of work items; sets item_panels of the product and the items of each group. */
int64_t fb_expert_items(struct fb_experts *experts, int n_threads);
void fb_expert_item(const struct fb_experts *experts, int64_t index);

#endif
