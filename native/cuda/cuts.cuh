/*
 * cuts.cuh - the steps of the sampling chain for a block of threads. They make the same decisions as
 * ops/sample_cut.c and ops/sample_history.c from the same numbers, so the same candidates are kept.
 */
#ifndef FABULA_CUDA_CUTS_CUH
#define FABULA_CUDA_CUTS_CUH

#include "candidates.cuh"

/* ---- Steps that change logits ------------------------------------------------------------------------------------ */

/* Updates the highest logit of the groups that changes touched: a warp takes a group; all groups if there are
 * many changes. */
FB_DEVICE void update_groups(candidates &c, const fb_sample_change *changes, int32_t n) {
    const int32_t lane = sample_thread() % 32, n_wanted = n < c.n_groups ? n : c.n_groups;
    for (int32_t i = sample_thread() / 32; i < n_wanted; i += SAMPLE_WARPS) {
        const int32_t g = n < c.n_groups ? changes[i].token / GROUP : i;
        double top = -INFINITY;
        for (int32_t at = g * GROUP + lane; at < (g + 1) * GROUP && at < c.vocab_size; at += 32)
            top = c.logit[at] > top ? c.logit[at] : top;
        for (int step = 16; step >= 1; step /= 2) {
            const double other = __shfl_xor_sync(0xFFFFFFFFu, top, step);
            top = other > top ? other : top;
        }
        if (lane == 0) c.group_top[g] = top;
    }
    __syncthreads();
}

FB_DEVICE double penalized(const fb_sample_plan &plan, double logit, double count) {
    logit = logit > 0.0 ? logit / plan.repetition : logit * plan.repetition;
    return logit - (count * plan.frequency + plan.presence);
}

/* A thread takes a token with all its entries. */
FB_DEVICE void change_logits(candidates &c, const fb_sample_plan &plan, const fb_sample_change *changes, int step) {
    const fb_sample_change *all = changes + plan.first_change;
    int32_t n = plan.n_bias;
    if (step == FB_SAMPLER_PENALTIES) {
        all += plan.n_bias;
        n = plan.n_penalties;
    } else if (step == FB_SAMPLER_DRY) {
        all += plan.n_bias + plan.n_penalties;
        n = plan.n_dry;
    }
    apply_factor(c);
    for (int32_t i = sample_thread(); i < n; i += SAMPLE_THREADS) {
        const int32_t token = all[i].token, slot = candidate_slot(c, token);
        if (slot < 0 || (i > 0 && all[i - 1].token == token)) continue;
        double logit = c.logit[slot];
        for (int32_t k = i; k < n && all[k].token == token; k++) {
            if (step == FB_SAMPLER_BIAS) logit += all[k].amount;
            if (step == FB_SAMPLER_PENALTIES) logit = penalized(plan, logit, all[k].amount);
            if (step == FB_SAMPLER_DRY) logit -= all[k].amount;
        }
        c.logit[slot] = logit;
    }
    __syncthreads();
    c.now.is_weighted = false;
    if (c.now.is_whole) update_groups(c, all, n);
}

FB_DEVICE void step_temperature(candidates &c, double factor) {
    c.now.is_weighted = false;
    c.now.factor = factor;
    if (!c.now.is_whole) apply_factor(c);
}

/* ---- Selection --------------------------------------------------------------------------------------------------- */

/* As in ops/sample_cut.c: lower keys come first, equal ones by slot. */
struct order {
    const double *logit;
    bool by_distance;
    double center;

    __device__ double key(int32_t slot) const {
        return by_distance ? fabs(logit[slot] - center) : -logit[slot];
    }
};

/* A candidate's mass: 1, or its weight times `scale`, rounded. Integers have the same sum in any order. */
struct measure {
    const double *weight; /* NULL: by count */
    double scale;
    mass_t target;

    __device__ mass_t mass(int32_t slot) const {
        return weight ? (mass_t)(long long)(weight[slot] * scale + 0.5) : 1;
    }
};

/* Mass by weight, up to the share p of the total, which the scale brings to 2^61 .. 2^62. */
FB_DEVICE measure measure_weight(const candidates &c, double p) {
    const int exponent = (int)(fb_bits_of_double(c.now.total) >> 52) - 1022;
    const double scale = fb_double_of_bits((uint64_t)(62 - exponent + 1023) << 52);
    return measure{c.weight, scale, (mass_t)ceil(p * c.now.total * scale)};
}

struct cut {
    double key; /* of the last candidate that is kept */
    int32_t slot;

    __device__ bool keeps(double other, int32_t other_slot) const {
        return other < key || (other == key && other_slot <= slot);
    }
};

FB_DEVICE int32_t bin_of(double key, double low, double scale) {
    const int32_t bin = (int32_t)((key - low) * scale);
    return bin < BINS ? bin : BINS - 1;
}

/* The bin in which the mass reaches the target, or the last; adds the mass before it to *before. */
FB_DEVICE int32_t find_bin(sample_shared *shared, mass_t target, mass_t *before) {
    const int32_t pair = 2 * sample_thread();
    const mass_t first = shared->mass[pair], second = shared->mass[pair + 1];
    mass_t total;
    const mass_t with = *before + block_scan(shared, first + second, &total), without = with - first - second;
    const bool is_last = sample_thread() == SAMPLE_THREADS - 1;
    if (without < target && (with >= target || is_last)) {
        const bool is_first = without + first >= target;
        shared->found = is_first ? pair : pair + 1;
        shared->before = is_first ? without : without + first;
    }
    __syncthreads();
    *before = shared->before;
    const int32_t found = shared->found;
    __syncthreads();
    return found;
}

/* Of the slots with this key, the first at which the mass reaches the target, or the last. */
FB_DEVICE int32_t find_among_equals(
    sample_shared *shared, const order &by, const measure &what, int32_t n, double key, mass_t before) {
    int32_t last = -1;
    for (int32_t first = 0; first < n; first += SAMPLE_THREADS) {
        const int32_t slot = first + sample_thread();
        const bool is_member = slot < n && by.key(slot) == key;
        const mass_t mass = is_member ? what.mass(slot) : 0;
        mass_t total;
        const mass_t with = before + block_scan(shared, mass, &total);
        const bool is_wanted = is_member && with >= what.target && with - mass < what.target;
        const double found = block_max(shared, is_wanted ? (double)slot : -1.0);
        if (found >= 0.0) return (int32_t)found;
        if (is_member) last = slot;
        before += total;
    }
    return (int32_t)block_max(shared, (double)last);
}

/* The last member of the shortest prefix, in the given order, of the n slots that are not banned whose mass
 * reaches the target. Iterates as in ops/sample_cut.c: the members of one bin are divided into the next bins,
 * until all keys are equal. */
FB_DEVICE cut find_cut(sample_shared *shared, const order &by, const measure &what, int32_t n) {
    double low = INFINITY, high = -INFINITY;
    mass_t before = 0;
    for (int32_t i = sample_thread(); i < n; i += SAMPLE_THREADS) {
        if (!(by.logit[i] >= -DBL_MAX)) continue;
        const double key = by.key(i);
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
    low = block_min(shared, low);
    high = block_max(shared, high);
    while (high > low) {
        const double scale = BINS / (high - low);
        for (int32_t bin = sample_thread(); bin < BINS; bin += SAMPLE_THREADS)
            shared->mass[bin] = 0;
        __syncthreads();
        for (int32_t i = sample_thread(); i < n; i += SAMPLE_THREADS) {
            const double key = by.key(i);
            if (key >= low && key <= high) atomicAdd(&shared->mass[bin_of(key, low, scale)], what.mass(i));
        }
        __syncthreads();
        const int32_t wanted = find_bin(shared, what.target, &before);
        double next_low = INFINITY, next_high = -INFINITY;
        for (int32_t i = sample_thread(); i < n; i += SAMPLE_THREADS) {
            const double key = by.key(i);
            if (!(key >= low && key <= high) || bin_of(key, low, scale) != wanted) continue;
            next_low = key < next_low ? key : next_low;
            next_high = key > next_high ? key : next_high;
        }
        low = block_min(shared, next_low);
        high = block_max(shared, next_high);
    }
    return cut{low, find_among_equals(shared, by, what, n, low, before)};
}

/* ---- Steps that drop candidates ---------------------------------------------------------------------------------- */

FB_DEVICE void end_cut(candidates &c) {
    if (c.now.is_weighted) update_total(c);
}

FB_DEVICE void drop_after(candidates &c, const order &by, const measure &what) {
    const cut at = find_cut(c.shared, by, what, c.now.n);
    compact(c, -INFINITY, [=](int32_t slot) { return at.keeps(by.key(slot), slot); });
    end_cut(c);
}

FB_DEVICE int32_t count_from(const candidates &c, const double *x, int32_t n, double floor) {
    int32_t mine = 0;
    for (int32_t i = sample_thread(); i < n; i += SAMPLE_THREADS)
        mine += x[i] >= floor;
    return block_count(c.shared, mine);
}

/* k groups have a top that reaches the k-th highest top, so at least k candidates reach it, and all that are
 * kept do. */
FB_DEVICE void step_top_k(candidates &c, int32_t k) {
    if (k >= c.now.n) return;
    apply_factor(c);
    const measure what = {nullptr, 0.0, (mass_t)k};
    if (c.now.is_whole && count_from(c, c.group_top, c.n_groups, -DBL_MAX) >= k) {
        const double floor = -find_cut(c.shared, order{c.group_top, false, 0.0}, what, c.n_groups).key;
        const double *logit = c.logit;
        compact(c, floor, [=](int32_t slot) { return logit[slot] >= floor; });
    } else if (count_from(c, c.logit, c.now.n, -DBL_MAX) < k) {
        return; /* the rest is banned */
    }
    drop_after(c, order{c.logit, false, 0.0}, what);
}

/* A logit below those of weights of `floor` and more, with a margin for the errors of exp and log. */
FB_DEVICE double logit_below(const candidates &c, double floor) {
    return c.now.top + log(floor) - 1e-3;
}

FB_DEVICE void step_top_p(candidates &c, double p) {
    /* A lower bound of the nucleus: see ops/sample_cut.c. */
    const double floor = 0.5 * (1.0 - p) * c.now.total / c.now.n;
    const double *weight = c.weight;
    const measure what = measure_weight(c, p);
    compact(c, logit_below(c, floor), [=](int32_t slot) { return weight[slot] >= floor; });
    drop_after(c, order{c.logit, false, 0.0}, what);
}

FB_DEVICE void step_typical_p(candidates &c, double p) {
    const double *weight = c.weight, *logit = c.logit;
    const double top = highest_logit(c);
    sum_groups(c.now.n, [=](int32_t i) { return weight[i] > 0.0 ? weight[i] * (logit[i] - top) : 0.0; }, c.group_sum);
    const double mean = sum_in_order(c.shared, c.group_sum, sample_groups(c.now.n)) / c.now.total;
    drop_after(c, order{c.logit, true, top + mean}, measure_weight(c, p));
}

FB_DEVICE void step_min_p(candidates &c, double p) {
    const double limit = p * highest_of(c, c.weight, c.now.n);
    const double *weight = c.weight;
    compact(c, logit_below(c, limit), [=](int32_t slot) { return weight[slot] >= limit; });
    end_cut(c);
}

FB_DEVICE void step_xtc(candidates &c, double threshold) {
    const double limit = threshold * c.now.total, *weight = c.weight;
    double low = INFINITY;
    for (int32_t i = sample_thread(); i < c.now.n; i += SAMPLE_THREADS)
        if (weight[i] >= limit && c.logit[i] < low) low = c.logit[i];
    low = block_min(c.shared, low);
    double mine = -1.0;
    for (int32_t i = sample_thread(); i < c.now.n; i += SAMPLE_THREADS)
        if (weight[i] >= limit && c.logit[i] == low) mine = (double)i;
    const int32_t least = (int32_t)block_max(c.shared, mine);
    if (least < 0) return;
    compact(c, -INFINITY, [=](int32_t slot) { return weight[slot] < limit || slot == least; });
    end_cut(c);
}

/* ---- Chain ------------------------------------------------------------------------------------------------------- */

/* Runs the remaining steps; false if it must stop before the end: see weigh. */
FB_DEVICE bool run_chain(candidates &c, const fb_sample_plan &plan, const fb_sample_change *changes, bool may_wait) {
    for (; c.now.n_steps_done < plan.n_steps; c.now.n_steps_done++) {
        const int step = plan.steps[c.now.n_steps_done];
        if (step <= FB_SAMPLER_DRY) {
            change_logits(c, plan, changes, step);
        } else if (step == FB_SAMPLER_TEMPERATURE) {
            step_temperature(c, plan.factor);
        } else if (step == FB_SAMPLER_TOP_K) {
            step_top_k(c, plan.top_k);
        } else {
            if (!weigh(c, may_wait)) return false;
            if (step == FB_SAMPLER_TYPICAL_P) step_typical_p(c, plan.typical_p);
            if (step == FB_SAMPLER_TOP_P) step_top_p(c, plan.top_p);
            if (step == FB_SAMPLER_MIN_P) step_min_p(c, plan.min_p);
            if (step == FB_SAMPLER_XTC) step_xtc(c, plan.xtc_threshold);
        }
    }
    return plan.is_greedy || weigh(c, may_wait);
}

#endif
