/* routes.c - chooses experts, and sorts rows by expert. See routes.h. */
#include "ops/routes.h"

#include <math.h>
#include <string.h>

/* ---- Choosing ---------------------------------------------------------------------------------------------------- */

/* The index of the largest number that is not taken yet, the lowest of equal ones. NaN is chosen only after all
 * others, or if it comes first. */
static size_t best_of(const float *x, const bool *taken, size_t n) {
    size_t best = n;
    for (size_t i = 0; i < n; i++)
        if (!taken[i] && (best == n || x[i] > x[best])) best = i;
    return best;
}

/* How good a group of experts is. */
static float rate_group(const float *ranking, size_t n, bool by_best) {
    bool taken[FB_MOST_EXPERTS] = {0};
    const size_t first = best_of(ranking, taken, n);
    if (by_best || n < 2) return ranking[first];
    taken[first] = true;
    return ranking[first] + ranking[best_of(ranking, taken, n)];
}

/* Marks the experts of all groups but the best as taken. */
static void drop_groups(const struct fb_op *op, const float *ranking, size_t n_experts, bool *taken) {
    const size_t n_groups = (size_t)op->n_groups, size = n_experts / n_groups;
    float rating[FB_MOST_EXPERTS];
    bool kept[FB_MOST_EXPERTS] = {0};
    for (size_t g = 0; g < n_groups; g++)
        rating[g] = rate_group(ranking + g * size, size, op->flags & FB_ROUTE_TOP);
    for (int32_t i = 0; i < op->n_top_groups; i++)
        kept[best_of(rating, kept, n_groups)] = true;
    for (size_t i = 0; i < n_experts; i++)
        taken[i] = !kept[i / size];
}

static void softmax(const struct fb_kernels *kernels, const float *x, size_t n, float *out) {
    const float sum = kernels->exp_sum(x, n, 1.0f, kernels->max(x, n), out);
    kernels->scale(out, n, 1.0f / sum);
}

/* SparseMixer at inference (Liu et al. 2024, arXiv:2409.12136; Phi-3.5-MoE): experts are chosen one after the other. The
 * weight of each is its part of a softmax over those not chosen before it whose logits are near its own: at most `limit`
 * below, as a part of the larger of the two, the other taken absolutely. */
static void mix_row(
    const struct fb_kernels *kernels, const struct fb_op *op, const float *logits, size_t n, float *out) {
    bool taken[FB_MOST_EXPERTS] = {0};
    float kept[FB_MOST_EXPERTS];
    const size_t n_chosen = (size_t)op->n_chosen;
    for (size_t r = 0; r < n_chosen; r++) {
        const size_t best = best_of(logits, taken, n);
        size_t n_kept = 0;
        for (size_t i = 0; i < n; i++) {
            const float size = fabsf(logits[i]), larger = size > logits[best] ? size : logits[best];
            if (!taken[i] && !((logits[best] - logits[i]) / larger > op->limit)) kept[n_kept++] = logits[i];
        }
        taken[best] = true;
        out[r] = (float)best;
        out[n_chosen + r] = op->scale / kernels->exp_sum(kept, n_kept, 1.0f, logits[best], kept);
    }
}

void fb_route_row(
    const struct fb_kernels *kernels, const struct fb_op *op, const float *logits, size_t n_experts, float *out) {
    float scores[FB_MOST_EXPERTS], ranking[FB_MOST_EXPERTS];
    bool taken[FB_MOST_EXPERTS] = {0};
    const size_t n_bytes = n_experts * sizeof *scores, n_chosen = (size_t)op->n_chosen;
    const bool is_sigmoid = op->flags & FB_ROUTE_SIGMOID, is_late = op->flags & FB_ROUTE_CHOSEN;
    if (op->flags & FB_ROUTE_MIXER) {
        mix_row(kernels, op, logits, n_experts, out);
        return;
    }
    memcpy(scores, logits, n_bytes);
    if (is_sigmoid)
        kernels->activate[FB_ACTIVATION_SIGMOID](scores, n_experts, NULL);
    else if (!is_late)
        softmax(kernels, logits, n_experts, scores);
    /* Sigmoids of large logits are equal: what ranks them is added to them, or they rank as their logits do. */
    memcpy(ranking, is_sigmoid && !op->vector && op->n_groups <= 1 ? logits : scores, n_bytes);
    if (op->vector) kernels->add(ranking, op->vector, n_experts);
    if (op->n_groups > 1) drop_groups(op, ranking, n_experts, taken);

    float *ids = out, *weights = out + n_chosen, sum = op->eps;
    for (size_t r = 0; r < n_chosen; r++) {
        const size_t best = best_of(ranking, taken, n_experts);
        taken[best] = true;
        ids[r] = (float)best;
        weights[r] = scores[best];
    }
    if (is_late) softmax(kernels, weights, n_chosen, weights);
    for (size_t r = 0; r < n_chosen; r++)
        sum += weights[r];
    for (size_t r = 0; r < n_chosen; r++) {
        if (op->flags & FB_ROUTE_NORM) weights[r] /= sum;
        weights[r] *= op->scale;
        if (op->vector2) weights[r] *= op->vector2[(size_t)ids[r]];
    }
}

/* ---- Sorting ----------------------------------------------------------------------------------------------------- */

static size_t expert_of(const struct fb_routes *routes, size_t pair) {
    return (size_t)routes->chosen[pair / routes->n_chosen * routes->ld + pair % routes->n_chosen];
}

/* A counting sort of the pairs first .. end - 1, which are the rows of one block. */
static void sort_block(struct fb_routes *routes, size_t first, size_t end) {
    int32_t next[FB_MOST_EXPERTS] = {0};
    for (size_t pair = first; pair < end; pair++)
        next[expert_of(routes, pair)]++;
    int32_t place = (int32_t)first;
    for (size_t e = 0; e < routes->n_experts; e++) {
        const int32_t n_rows = next[e];
        if (n_rows) routes->groups[routes->n_groups++] = (struct fb_group){(int32_t)e, place, n_rows, 0};
        next[e] = place;
        place += n_rows;
    }
    for (size_t pair = first; pair < end; pair++) {
        const int32_t at = next[expert_of(routes, pair)]++;
        routes->pairs[at] = (int32_t)pair;
        routes->places[pair] = at;
    }
}

void fb_sort_routes(struct fb_routes *routes) {
    const size_t n_pairs = routes->n_rows * routes->n_chosen, step = FB_ROUTE_ROWS * routes->n_chosen;
    routes->n_groups = 0;
    for (size_t first = 0; first < n_pairs; first += step)
        sort_block(routes, first, n_pairs - first < step ? n_pairs : first + step);
}
