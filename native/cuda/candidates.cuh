/*
 * candidates.cuh - the remaining tokens of a row that is being sampled, as a block of threads sees them
 * (struct fb_candidates of ops/sample.h).
 *
 * They are in the row's scratch, by ascending id. While they are the whole vocabulary, every 256 tokens form
 * a group whose highest logit is stored, so that only few groups need to be read. Sums of weights have the
 * order of the CPU's sampler (weight_sum of kernels/vocabulary.h): 8 lanes per group, folded by halves, then
 * group by group. All threads of the block call these functions together and hold the same values in `struct
 * candidates`.
 */
#ifndef FABULA_CUDA_CANDIDATES_CUH
#define FABULA_CUDA_CANDIDATES_CUH

#include "device.h"
#include "kernels.h"

#include <float.h>

enum { SAMPLE_THREADS = 512, SAMPLE_WARPS = SAMPLE_THREADS / 32, GROUP = 256, SUM_LANES = 8 };
enum { BINS = 2 * SAMPLE_THREADS }; /* of a histogram in a selection; as FB_SAMPLE_BINS */

typedef unsigned long long mass_t;

struct sample_shared {
    double numbers[SAMPLE_WARPS];
    mass_t sums[SAMPLE_WARPS];
    mass_t mass[BINS];
    mass_t before;
    double weights[GROUP];
    double number;
    int32_t found;
};

/* State of a row between launches. */
struct sample_state {
    double total;   /* sum of the weights */
    double top;     /* subtracted from logits before they became weights */
    double factor;  /* logits are still to be multiplied by it; 1: none */
    double raw_top; /* highest of the unchanged logits */
    int32_t n;
    int32_t n_steps_done;
    bool is_whole;      /* slot i is token i, and `id` is not filled */
    bool is_weighted;   /* weight, group_sum and total match the current logits */
    bool wants_weights; /* of the whole vocabulary, from the weigh launch */
    bool has_failed;
};

struct candidates {
    double *logit, *weight; /* [vocab_size] */
    double *group_top;      /* [groups] */
    double *group_sum;      /* [groups] sum of weights up to the end of each group */
    double *group_exp;      /* [groups] terms of the log-probability */
    int32_t *id;            /* [vocab_size] */
    sample_state *saved;
    sample_shared *shared;
    int32_t vocab_size, n_groups;
    sample_state now;
};

FB_BOTH int32_t sample_groups(int32_t n) {
    return (n + GROUP - 1) / GROUP;
}

/* Bytes of scratch per row, with alignment. */
FB_BOTH size_t sample_row_bytes(int32_t vocab_size) {
    const size_t n = (size_t)vocab_size, n_doubles = 2 * n + 3 * (size_t)sample_groups(vocab_size);
    return (n_doubles * sizeof(double) + sizeof(sample_state) + n * sizeof(int32_t) + 255) / 256 * 256;
}

FB_DEVICE candidates candidates_in(char *scratch, int32_t row, int32_t vocab_size, sample_shared *shared) {
    candidates c;
    c.vocab_size = vocab_size;
    c.n_groups = sample_groups(vocab_size);
    c.logit = reinterpret_cast<double *>(scratch + (size_t)row * sample_row_bytes(vocab_size));
    c.weight = c.logit + vocab_size;
    c.group_top = c.weight + vocab_size;
    c.group_sum = c.group_top + c.n_groups;
    c.group_exp = c.group_sum + c.n_groups;
    c.saved = reinterpret_cast<sample_state *>(c.group_exp + c.n_groups);
    c.id = reinterpret_cast<int32_t *>(c.saved + 1);
    c.shared = shared;
    return c;
}

FB_DEVICE int32_t candidate_id(const candidates &c, int32_t slot) {
    return c.now.is_whole ? slot : c.id[slot];
}

/* -1 if it was dropped. */
FB_DEVICE int32_t candidate_slot(const candidates &c, int32_t id) {
    if (c.now.is_whole) return id;
    int32_t low = 0, high = c.now.n;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (c.id[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < c.now.n && c.id[low] == id ? low : -1;
}

/* ---- Operations of a block --------------------------------------------------------------------------------------- */

FB_DEVICE int32_t sample_thread() {
    return (int32_t)threadIdx.x;
}

FB_DEVICE double block_max(sample_shared *shared, double x) {
    for (int step = 16; step >= 1; step /= 2) {
        const double other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
        x = other > x ? other : x;
    }
    if (sample_thread() % 32 == 0) shared->numbers[sample_thread() / 32] = x;
    __syncthreads();
    x = shared->numbers[0];
    for (int warp = 1; warp < SAMPLE_WARPS; warp++)
        x = shared->numbers[warp] > x ? shared->numbers[warp] : x;
    __syncthreads();
    return x;
}

FB_DEVICE double block_min(sample_shared *shared, double x) {
    return -block_max(shared, -x);
}

/* Sum of x over the threads up to this one; *total: over all. */
FB_DEVICE mass_t block_scan(sample_shared *shared, mass_t x, mass_t *total) {
    const int lane = sample_thread() % 32, own = sample_thread() / 32;
    for (int step = 1; step < 32; step *= 2) {
        const mass_t other = __shfl_sync(0xFFFFFFFFu, x, lane >= step ? lane - step : lane);
        if (lane >= step) x += other;
    }
    if (lane == 31) shared->sums[own] = x;
    __syncthreads();
    *total = 0;
    for (int warp = 0; warp < SAMPLE_WARPS; warp++) {
        if (warp == own) x += *total;
        *total += shared->sums[warp];
    }
    __syncthreads();
    return x;
}

FB_DEVICE int32_t block_count(sample_shared *shared, int32_t mine) {
    mass_t total;
    block_scan(shared, (mass_t)mine, &total);
    return (int32_t)total;
}

/* x[0] + x[1] + ..., in this order; each x becomes the sum up to it. */
FB_DEVICE double sum_in_order(sample_shared *shared, double *x, int32_t n) {
    if (sample_thread() == 0) {
        double sum = 0.0;
#pragma unroll 8
        for (int32_t i = 0; i < n; i++) {
            sum += x[i];
            x[i] = sum;
        }
        shared->number = sum;
    }
    __syncthreads();
    const double sum = shared->number;
    __syncthreads();
    return sum;
}

/* sums[g] = sum of term(i) over group g, in 8 lanes. */
template <class Term> FB_DEVICE void sum_groups(int32_t n, Term term, double *sums) {
    const int32_t n_items = sample_groups(n) * SUM_LANES;
    for (int32_t first = 0; first < n_items; first += SAMPLE_THREADS) {
        const int32_t item = first + sample_thread(), group = item / SUM_LANES;
        const int32_t end = (group + 1) * GROUP < n ? (group + 1) * GROUP : n;
        double sum = 0.0;
        for (int32_t i = group * GROUP + item % SUM_LANES; i < end; i += SUM_LANES)
            sum += term(i);
        for (int step = 1; step < SUM_LANES; step *= 2)
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        if (item < n_items && item % SUM_LANES == 0) sums[group] = sum;
    }
    __syncthreads();
}

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

/* exp(x) for x <= 0 in double, with the operations of the CPU's sampler. */
FB_DEVICE double exp64_of(double x) {
    const double shifted = x * FB_EXP64_LOG2E + FB_EXP64_ROUND, n = shifted - FB_EXP64_ROUND;
    const double r = (x - n * FB_EXP64_LN2_HI) - n * FB_EXP64_LN2_LO, rr = r * r;
    const double p = r * ((FB_EXP64_P0 * rr + FB_EXP64_P1) * rr + 1.0);
    const double q = ((FB_EXP64_Q0 * rr + FB_EXP64_Q1) * rr + FB_EXP64_Q2) * rr + 2.0;
    const double e = 1.0 + 2.0 * (p / (q - p));
    return x >= FB_EXP64_LOW ? e * fb_double_of_bits((fb_bits_of_double(shifted) + 1023u) << 52) : 0.0;
}

/* Multiplies logits by the factor that temperature deferred. */
FB_DEVICE void apply_factor(candidates &c) {
    if (c.now.factor == 1.0) return;
    for (int32_t i = sample_thread(); i < c.now.n; i += SAMPLE_THREADS)
        c.logit[i] *= c.now.factor;
    for (int32_t g = sample_thread(); c.now.is_whole && g < c.n_groups; g += SAMPLE_THREADS)
        c.group_top[g] *= c.now.factor;
    c.now.factor = 1.0;
    __syncthreads();
}

FB_DEVICE double highest_of(const candidates &c, const double *x, int32_t n) {
    double top = -INFINITY;
    for (int32_t i = sample_thread(); i < n; i += SAMPLE_THREADS)
        top = x[i] > top ? x[i] : top;
    return block_max(c.shared, top);
}

/* The highest logit. The factor keeps the order, and so the highest. */
FB_DEVICE double highest_logit(const candidates &c) {
    if (c.now.is_whole) return highest_of(c, c.group_top, c.n_groups) * c.now.factor;
    return highest_of(c, c.logit, c.now.n);
}

FB_DEVICE void update_total(candidates &c) {
    const double *weight = c.weight;
    sum_groups(c.now.n, [=](int32_t i) { return weight[i]; }, c.group_sum);
    c.now.total = sum_in_order(c.shared, c.group_sum, sample_groups(c.now.n));
}

/* Computes weights if they are out of date. False if all candidates are banned, or if the whole vocabulary
 * needs weights and `may_wait`: then the weigh launch computes them. */
FB_DEVICE bool weigh(candidates &c, bool may_wait) {
    if (c.now.is_weighted) return true;
    c.now.top = highest_logit(c);
    c.now.has_failed = !(c.now.top > -INFINITY);
    c.now.wants_weights = may_wait && c.now.is_whole && !c.now.has_failed;
    if (c.now.has_failed || c.now.wants_weights) return false;
    apply_factor(c);
    for (int32_t i = sample_thread(); i < c.now.n; i += SAMPLE_THREADS)
        c.weight[i] = exp64_of(c.logit[i] - c.now.top);
    __syncthreads();
    c.now.is_weighted = true;
    update_total(c);
    return true;
}

/* ---- Dropping ---------------------------------------------------------------------------------------------------- */

/* Keeps the slots for which stays(slot) is true; it may read only its own slot. With the whole vocabulary,
 * groups whose highest logit is below `least_top` are skipped: nothing in them may stay. */
template <class Stays> FB_DEVICE void compact(candidates &c, double least_top, Stays stays) {
    static_assert(SAMPLE_THREADS == 2 * GROUP, "a round is two groups");
    int32_t n = 0;
    for (int32_t first = 0; first < c.now.n; first += SAMPLE_THREADS) {
        const int32_t g = first / GROUP;
        if (c.now.is_whole && c.group_top[g] < least_top && (g + 1 >= c.n_groups || c.group_top[g + 1] < least_top))
            continue;
        const int32_t slot = first + sample_thread();
        const bool is_kept = slot < c.now.n && stays(slot);
        double logit = 0.0, weight = 0.0;
        int32_t id = 0;
        if (is_kept) {
            logit = c.logit[slot];
            if (c.now.is_weighted) weight = c.weight[slot];
            id = candidate_id(c, slot);
        }
        mass_t n_kept;
        const int32_t to = n + (int32_t)block_scan(c.shared, is_kept, &n_kept) - 1;
        if (is_kept) { /* all threads have read; `to` is not a slot of a later iteration */
            c.logit[to] = logit;
            if (c.now.is_weighted) c.weight[to] = weight;
            c.id[to] = id;
        }
        n += (int32_t)n_kept;
    }
    __syncthreads();
    c.now.n = n;
    c.now.is_whole = false;
}

#endif
