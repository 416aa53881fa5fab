/*
 * sample.cu - samples tokens by plans (ops/sample_plan.h), as many rows in parallel as there is scratch for.
 *
 *     survey   many blocks per row: the highest logit of each group of 256, and logits as doubles if steps
 *              need them
 *     chain    one block per row: the steps, up to where the whole vocabulary needs weights. After a top-k
 *              only the remaining candidates do, so most chains end here
 *     weigh    many blocks per row: those weights, and the terms of the log-probability
 *     chain    one block per row: the remaining steps, and the selection of the token
 */
#include "cuts.cuh"

enum {
    WIDE_GROUPS = 8,
    WIDE_THREADS = 32 * WIDE_GROUPS
}; /* per block, in launches with many blocks per row: a warp takes a group */
enum { EXP_LANES = 16 };

/* exp(x) for x <= 0, with the operations of the CPU's sampler (kernels/vocabulary.h). */
FB_DEVICE float exp_of(float x) {
    const float shifted = x * FB_EXP_LOG2E + FB_EXP_ROUND, n = shifted - FB_EXP_ROUND;
    const float r = (x - n * FB_EXP_LN2_HI) - n * FB_EXP_LN2_LO, rr = r * r;
    const float p = ((FB_EXP_P0 * r + FB_EXP_P1) * rr + (FB_EXP_P2 * r + FB_EXP_P3)) * rr + (FB_EXP_P4 * r + FB_EXP_P5);
    const float e = p * rr + (r + 1.0f);
    return x >= FB_EXP_LOW ? e * fb_float_of_bits((fb_bits_of_float(shifted) + 127u) << 23) : 0.0f;
}

FB_DEVICE const float *logits_of(const fb_cuda_sampling &a, const fb_sample_plan &plan) {
    return a.logits + plan.row * a.ld_logits;
}

/* ---- Survey ------------------------------------------------------------------------------------------------------ */

/* The top of a group with a damaged logit is +infinity. */
static __global__ void survey_kernel(fb_cuda_sampling a, int32_t first_plan) {
    const fb_sample_plan &plan = a.plans[first_plan + (int32_t)blockIdx.y];
    const candidates c = candidates_in(a.scratch, (int32_t)blockIdx.y, a.vocab_size, nullptr);
    const float *row = logits_of(a, plan);
    const int32_t lane = (int32_t)threadIdx.x % 32, group = (int32_t)(blockIdx.x * WIDE_GROUPS + threadIdx.x / 32);
    float top = -INFINITY;
    for (int32_t k = lane; k < GROUP; k += 32) {
        const int32_t i = group * GROUP + k;
        if (i >= a.vocab_size) break;
        const float logit = fb_is_nan(row[i]) ? INFINITY : row[i];
        top = logit > top ? logit : top;
        if (plan.n_steps > 0 || !plan.is_greedy) c.logit[i] = (double)logit;
    }
    top = fb_warp_max(top);
    if (lane == 0 && group < c.n_groups) c.group_top[group] = (double)top;
}

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

/* A thread adds 16 terms in f32, every 16th of the group; their sums are added in double, by halves. */
FB_DEVICE void sum_exps(const candidates &c, const float *row, int32_t first_group) {
    const float top = (float)c.saved->raw_top;
    const int32_t lane = (int32_t)threadIdx.x % EXP_LANES, group = first_group + (int32_t)threadIdx.x / EXP_LANES;
    float part = 0.0f;
    for (int32_t i = group * GROUP + lane; i < (group + 1) * GROUP && i < c.vocab_size; i += EXP_LANES)
        part += exp_of(row[i] - top);
    double sum = (double)part;
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, EXP_LANES / 2);
    for (int step = 1; step < EXP_LANES / 2; step *= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (lane == 0 && group < c.n_groups) c.group_exp[group] = sum;
}

FB_DEVICE void make_weights(const candidates &c, int32_t first_group, double *shared) {
    const double factor = c.saved->factor, top = c.saved->top;
    const int32_t thread = (int32_t)threadIdx.x, first = first_group * GROUP;
    for (int32_t k = thread; k < WIDE_GROUPS * GROUP && first + k < c.vocab_size; k += WIDE_THREADS) {
        const double logit = factor == 1.0 ? c.logit[first + k] : c.logit[first + k] * factor;
        const double weight = exp64_of(logit - top);
        c.logit[first + k] = logit;
        c.weight[first + k] = weight;
        shared[k] = weight;
    }
    __syncthreads();
    const int32_t lane = thread % SUM_LANES, group = thread / SUM_LANES; /* of the first two warps */
    double sum = 0.0;
    for (int32_t k = lane; group < WIDE_GROUPS && k < GROUP && first + group * GROUP + k < c.vocab_size; k += SUM_LANES)
        sum += shared[group * GROUP + k];
    for (int step = 1; step < SUM_LANES; step *= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (lane == 0 && group < WIDE_GROUPS && first_group + group < c.n_groups) c.group_sum[first_group + group] = sum;
}

static __global__ void weigh_kernel(fb_cuda_sampling a, int32_t first_plan) {
    FB_SHARED(double, weights, WIDE_GROUPS *GROUP);
    const fb_sample_plan &plan = a.plans[first_plan + (int32_t)blockIdx.y];
    const candidates c = candidates_in(a.scratch, (int32_t)blockIdx.y, a.vocab_size, nullptr);
    if (c.saved->has_failed) return;
    const int32_t first_group = (int32_t)blockIdx.x * WIDE_GROUPS;
    if (threadIdx.x < WIDE_GROUPS * EXP_LANES) sum_exps(c, logits_of(a, plan), first_group);
    if (c.saved->wants_weights) make_weights(c, first_group, weights);
}

/* ---- Selection --------------------------------------------------------------------------------------------------- */

/* The first of the highest logits of the whole vocabulary; -1 if all are banned. Without steps they are read
 * from `row`. */
FB_DEVICE int32_t pick_highest(const candidates &c, const float *row, bool is_changed) {
    const double top = highest_of(c, c.group_top, c.n_groups);
    if (!(top > -INFINITY)) return -1;
    double mine = -INFINITY;
    for (int32_t g = sample_thread(); g < c.n_groups; g += SAMPLE_THREADS)
        if (c.group_top[g] == top && (double)-g > mine) mine = (double)-g;
    const int32_t slot = (int32_t)-block_max(c.shared, mine) * GROUP + sample_thread();
    mine = -INFINITY;
    if (sample_thread() < GROUP && slot < c.vocab_size && (is_changed ? c.logit[slot] : (double)row[slot]) == top)
        mine = (double)-slot;
    return (int32_t)-block_max(c.shared, mine);
}

/* As pick_at() of ops/sample.c: the first slot at which the running sum of weights exceeds a share of the
 * total. */
FB_DEVICE int32_t pick_at(const candidates &c, double uniform) {
    const double target = uniform * c.now.total;
    const int32_t thread = sample_thread(), last = sample_groups(c.now.n) - 1;
    double mine = (double)-last;
    for (int32_t g = last - 1 - thread; g >= 0; g -= SAMPLE_THREADS)
        if (c.group_sum[g] > target) mine = (double)-g;
    const int32_t group = (int32_t)-block_max(c.shared, mine), first = group * GROUP;
    const int32_t n = c.now.n - first < GROUP ? c.now.n - first : GROUP;
    if (thread < n) c.shared->weights[thread] = c.weight[first + thread];
    __syncthreads();
    if (thread == 0) {
        double sum = group > 0 ? c.group_sum[group - 1] : 0.0;
        int32_t at = 0;
        for (int32_t i = 0; i < n; i++) {
            if (c.shared->weights[i] > 0.0) at = i;
            sum += c.shared->weights[i];
            if (sum > target) break;
        }
        c.shared->found = first + at;
    }
    __syncthreads();
    return c.shared->found;
}

FB_DEVICE void store_result(const candidates &c, const float *row, int32_t token, int32_t *out, float *logprob) {
    const double sum = sum_in_order(c.shared, c.group_exp, c.n_groups);
    if (sample_thread() != 0) return;
    const double log_p = ((double)row[token] - c.now.raw_top) - log(sum);
    *out = token;
    *logprob = log_p > -(double)FLT_MAX ? (float)log_p : -FLT_MAX; /* finite, as JSON requires */
}

/* ---- Chain ------------------------------------------------------------------------------------------------------- */

FB_DEVICE sample_state begin_chain(const candidates &c) {
    sample_state start = {};
    start.factor = 1.0;
    start.n = c.vocab_size;
    start.is_whole = true;
    start.raw_top = highest_of(c, c.group_top, c.n_groups);
    start.has_failed = !(start.raw_top > -INFINITY && start.raw_top < INFINITY);
    return start;
}

/* Continues after the weigh launch. */
FB_DEVICE sample_state resume_chain(const candidates &c) {
    sample_state now = *c.saved;
    if (!now.wants_weights) return now;
    now.wants_weights = false;
    now.is_weighted = true;
    now.factor = 1.0;
    now.total = sum_in_order(c.shared, c.group_sum, c.n_groups);
    return now;
}

static __global__ void __launch_bounds__(SAMPLE_THREADS)
    chain_kernel(fb_cuda_sampling a, int32_t first_plan, bool is_last) {
    FB_SHARED(sample_shared, shared, 1);
    const int32_t row = (int32_t)blockIdx.x;
    const fb_sample_plan &plan = a.plans[first_plan + row];
    candidates c = candidates_in(a.scratch, row, a.vocab_size, shared);
    c.now = is_last ? resume_chain(c) : begin_chain(c);
    const bool is_through = !c.now.has_failed && run_chain(c, plan, a.changes, !is_last);
    if (!is_last) {
        if (c.now.wants_weights) { /* the weigh launch multiplies the logits */
            for (int32_t g = sample_thread(); g < c.n_groups; g += SAMPLE_THREADS)
                c.group_top[g] *= c.now.factor;
        }
        if (sample_thread() == 0) *c.saved = c.now;
        return;
    }
    const float *logits = logits_of(a, plan);
    int32_t token = -1;
    if (is_through)
        token = plan.is_greedy ? pick_highest(c, logits, plan.n_steps > 0) : candidate_id(c, pick_at(c, plan.uniform));
    if (token >= 0)
        store_result(c, logits, token, a.tokens + first_plan + row, a.logprobs + first_plan + row);
    else if (sample_thread() == 0)
        a.tokens[first_plan + row] = -1;
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

size_t fb_cuda_sample_bytes(int32_t vocab_size) {
    return sample_row_bytes(vocab_size);
}

int fb_cuda_sample(const struct fb_cuda_sampling *sampling, fb_cuda_stream stream) {
    const unsigned n_wide = (unsigned)(sample_groups(sampling->vocab_size) + WIDE_GROUPS - 1) / WIDE_GROUPS;
    int error = 0;
    for (int32_t first = 0; first < sampling->n_plans && !error; first += sampling->n_at_once) {
        const int32_t left = sampling->n_plans - first;
        const unsigned n = (unsigned)(left < sampling->n_at_once ? left : sampling->n_at_once);
        error = fb_launch(survey_kernel, dim3(n_wide, n), WIDE_THREADS, 0, stream, *sampling, first);
        if (!error) error = fb_launch(chain_kernel, dim3(n), SAMPLE_THREADS, 0, stream, *sampling, first, false);
        if (!error) error = fb_launch(weigh_kernel, dim3(n_wide, n), WIDE_THREADS, 0, stream, *sampling, first);
        if (!error) error = fb_launch(chain_kernel, dim3(n), SAMPLE_THREADS, 0, stream, *sampling, first, true);
    }
    return error;
}
