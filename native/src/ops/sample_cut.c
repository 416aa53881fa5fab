/*
 * sample_cut.c - weights of the candidates, and the steps of the sampler that drop candidates. See sample.h.
 *
 * A step works on the distribution that the previous ones left: probability = weight / total, where total is
 * recomputed after each drop. No step sorts the vocabulary. top-k, top-p and typical-p need only the point
 * where a sorted list would be truncated (the cut), and find_cut() finds it with successively finer
 * histograms. Slots stay ordered by id.
 *
 * find_cut() adds integers, so its result does not depend on the order of sums: a GPU, which adds in a
 * different order (native/cuda/cuts.cuh), finds the same cut.
 */
#include "ops/sample.h"
#include "base/status.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    SORT_AT_MOST = 32,                  /* members of a bin that are sorted instead of divided into new bins */
    GUESS_AT_MOST = FB_SAMPLE_BINS / 4, /* highest k for which guess_top_k() is tried */
    GUESS_BINS_PER_NAT = 32
};

/* ---- Candidates -------------------------------------------------------------------------------------------------- */

int32_t fb_candidate_id(const struct fb_candidates *c, int32_t slot) {
    return c->whole ? slot : c->id[slot];
}

int32_t fb_candidate_slot(const struct fb_candidates *c, int32_t id) {
    if (c->whole) return id;
    int32_t low = 0, high = c->n;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (c->id[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low < c->n && c->id[low] == id ? low : -1;
}

enum fb_status fb_check_logits(const struct fb_kernels *kernels, const float *logits, int32_t n, float *top) {
    if (!kernels->top_logit(logits, (size_t)n, top)) {
        int32_t i = 0;
        while (logits[i] <= FLT_MAX)
            i++;
        return fb_fail(
            FB_NON_FINITE, "logit of token %d is %g: the model or its input is damaged", i, (double)logits[i]);
    }
    if (*top == -INFINITY) return fb_fail(FB_NON_FINITE, "all %d logits are -infinity", n);
    return FB_OK;
}

void fb_candidates_load(struct fb_candidates *c, const float *logits) {
    c->kernels->to_double(logits, (size_t)c->vocab_size, c->logit);
    c->n = c->vocab_size;
    c->whole = true;
    c->weighted = false;
}

static void update_total(struct fb_candidates *c) {
    c->total = 0.0;
    for (int32_t i = 0; i < c->n; i += FB_SUM_BLOCK) {
        const int32_t n = c->n - i < FB_SUM_BLOCK ? c->n - i : FB_SUM_BLOCK;
        c->total += c->kernels->weight_sum(c->weight + i, (size_t)n);
    }
}

enum fb_status fb_candidates_weigh(struct fb_candidates *c) {
    if (c->weighted) return FB_OK;
    const double top = c->kernels->highest(c->logit, (size_t)c->n);
    FB_REQUIRE(
        top > -INFINITY, "every token is banned: bias and earlier steps of the chain left none of %d", c->vocab_size);
    c->kernels->exp_weights(c->logit, (size_t)c->n, top, c->weight);
    c->weighted = true;
    update_total(c);
    return FB_OK;
}

/* Moves a candidate that is kept to slot `to`. */
static inline void keep(struct fb_candidates *c, int32_t slot, int32_t to) {
    c->id[to] = c->whole ? slot : c->id[slot];
    c->logit[to] = c->logit[slot];
    if (c->weighted) c->weight[to] = c->weight[slot];
}

static void end_cut(struct fb_candidates *c, int32_t n) {
    c->n = n;
    c->whole = false;
    if (c->weighted) update_total(c);
}

/* ---- Selection --------------------------------------------------------------------------------------------------- */

/* How a step orders candidates: by logit, highest first, or by the distance of the logit from a center,
 * nearest first. Lower keys come first, equal keys by slot. */
struct order {
    bool by_distance;
    double center;
};

struct cut {
    double key; /* of the last candidate that is kept */
    int32_t slot;
};

/* A candidate's mass: 1, or its weight times `scale`, rounded. */
struct measure {
    bool by_count;
    double scale; /* scales the total to 2^61 .. 2^62: all masses together stay below 2^63 */
    uint64_t target;
};

static struct measure measure_count(int32_t k) {
    return (struct measure){.by_count = true, .target = (uint64_t)k};
}

/* Mass by weight, up to the share p of the total. */
static struct measure measure_weight(const struct fb_candidates *c, double p) {
    int exponent;
    (void)frexp(c->total, &exponent);
    const double scale = ldexp(1.0, 62 - exponent);
    return (struct measure){.scale = scale, .target = (uint64_t)ceil(p * c->total * scale)};
}

/* Rounded manually, which is one conversion; rint() may be a call. */
static inline uint64_t mass_of(const struct fb_candidates *c, const struct measure *measure, int32_t slot) {
    return measure->by_count ? 1 : (uint64_t)(int64_t)(c->weight[slot] * measure->scale + 0.5);
}

static inline double key_of(const struct fb_candidates *c, struct order order, int32_t slot) {
    return order.by_distance ? fabs(c->logit[slot] - order.center) : -c->logit[slot];
}

static void sort_few(const struct fb_candidates *c, struct order order, int32_t *list, int32_t n) {
    for (int32_t i = 1; i < n; i++) {
        const int32_t slot = list[i];
        const double key = key_of(c, order, slot);
        int32_t j = i;
        for (; j > 0 && key_of(c, order, list[j - 1]) > key; j--)
            list[j] = list[j - 1];
        list[j] = slot;
    }
}

/*
 * The shortest prefix, in the given order, of the n slots in c->list (ascending, none banned) whose mass
 * reaches the target. Returns its last member.
 *
 * Each round divides the members into bins of equal width between their lowest and highest key, finds the bin
 * in which the target is reached and continues with its members alone. The highest key is always in another
 * bin than the lowest, so rounds end; one or two are usual, and no input makes it quadratic, as with
 * quickselect.
 */
static struct cut find_cut(const struct fb_candidates *c, struct order order, struct measure measure, int32_t n) {
    int32_t *list = c->list;
    uint64_t *mass = c->mass, before = 0;
    while (n > SORT_AT_MOST) {
        double low = INFINITY, high = -INFINITY;
        for (int32_t i = 0; i < n; i++) {
            const double key = key_of(c, order, list[i]);
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
        if (!(high > low)) break; /* all equal: the list is already sorted */
        /* Finite: keys come from f32, so they are at least 1e-200 apart and below 1e200. */
        const double scale = FB_SAMPLE_BINS / (high - low);
        memset(mass, 0, FB_SAMPLE_BINS * sizeof *mass);
        for (int32_t i = 0; i < n; i++) {
            const int32_t bin = (int32_t)((key_of(c, order, list[i]) - low) * scale);
            mass[bin < FB_SAMPLE_BINS ? bin : FB_SAMPLE_BINS - 1] += mass_of(c, &measure, list[i]);
        }
        int32_t wanted = 0;
        while (wanted < FB_SAMPLE_BINS - 1 && before + mass[wanted] < measure.target)
            before += mass[wanted++];
        int32_t members = 0;
        for (int32_t i = 0; i < n; i++) {
            const int32_t bin = (int32_t)((key_of(c, order, list[i]) - low) * scale);
            list[members] = list[i];
            members += (bin < FB_SAMPLE_BINS ? bin : FB_SAMPLE_BINS - 1) == wanted;
        }
        n = members;
    }
    if (n <= SORT_AT_MOST) sort_few(c, order, list, n);
    int32_t last = 0;
    for (;; last++) {
        before += mass_of(c, &measure, list[last]);
        if (before >= measure.target || last + 1 >= n) break;
    }
    return (struct cut){.key = key_of(c, order, list[last]), .slot = list[last]};
}

/* Lists the slots whose `values` are at least `floor`; returns how many. */
static int32_t list_slots(const struct fb_candidates *c, const double *values, double floor) {
    int32_t n = 0;
    for (int32_t i = 0; i < c->n; i++) {
        c->list[n] = i;
        n += values[i] >= floor;
    }
    return n;
}

/*
 * A logit that probably a few more than k candidates reach; a guess that is too high costs time only. Takes
 * the highest logit of each of FB_SAMPLE_BINS blocks, and of those the k-th highest, to within a bin: then k
 * blocks hold at least one each.
 */
static double guess_top_k(const struct fb_candidates *c, int32_t k) {
    double *block_top = (double *)(void *)c->mass; /* not in use yet */
    int32_t *count = c->match, n_blocks = 0;
    const int32_t block = c->n / FB_SAMPLE_BINS + 1;
    for (int32_t i = 0; i < c->n; i += block)
        block_top[n_blocks++] = c->kernels->highest(c->logit + i, (size_t)(c->n - i < block ? c->n - i : block));
    const double high = c->kernels->highest(block_top, (size_t)n_blocks);
    const double scale = GUESS_BINS_PER_NAT;
    memset(count, 0, FB_SAMPLE_BINS * sizeof *count);
    for (int32_t i = 0; i < n_blocks; i++) {
        const double distance = (high - block_top[i]) * scale;
        if (distance < FB_SAMPLE_BINS) count[(int32_t)distance]++;
    }
    int32_t bin = 0, reached = 0;
    while (bin < FB_SAMPLE_BINS && (reached += count[bin]) < k)
        bin++;
    return bin < FB_SAMPLE_BINS ? high - (bin + 1) / scale : -DBL_MAX;
}

static void drop_after(struct fb_candidates *c, struct order order, struct cut cut) {
    int32_t n = 0;
    for (int32_t i = 0; i < c->n; i++) {
        const double key = key_of(c, order, i);
        if (key > cut.key) continue; /* almost all */
        if (key < cut.key || i <= cut.slot) keep(c, i, n++);
    }
    end_cut(c, n);
}

/* ---- Steps ------------------------------------------------------------------------------------------------------- */

/* The k highest logits (Fan et al., "Hierarchical Neural Story Generation", 2018); 0 is off. */
enum fb_status fb_step_top_k(struct fb_candidates *c, int32_t k) {
    if (k == 0 || k >= c->n) return FB_OK;
    int32_t n = 0;
    if (k <= GUESS_AT_MOST) n = list_slots(c, c->logit, guess_top_k(c, k));
    if (n < k) {
        n = list_slots(c, c->logit, -DBL_MAX);
        if (n < k) return FB_OK; /* the rest is banned */
    }
    const struct order order = {.by_distance = false};
    drop_after(c, order, find_cut(c, order, measure_count(k), n));
    return FB_OK;
}

/* Nucleus (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019): the fewest likeliest
 * tokens whose probabilities sum to p or more. */
enum fb_status fb_step_top_p(struct fb_candidates *c, double p) {
    if (p >= 1.0) return FB_OK;
    FB_TRY(fb_candidates_weigh(c));
    /* All tokens below (1 - p) total / n together hold less than 1 - p, so the nucleus ends above them. Half
     * of that, to be safe from rounding. */
    const int32_t n = list_slots(c, c->weight, 0.5 * (1.0 - p) * c->total / c->n);
    const struct order order = {.by_distance = false};
    drop_after(c, order, find_cut(c, order, measure_weight(c, p), n));
    return FB_OK;
}

/* Locally typical (Meister et al., "Locally Typical Sampling", 2022): of the tokens ordered by how close
 * their surprise -log p is to the entropy, the fewest whose probabilities sum to p or more. Surprise is log
 * total minus the logit, entropy is log total minus the mean logit; so the distance is that of the logit from
 * the mean logit, and no logarithm is needed. */
enum fb_status fb_step_typical_p(struct fb_candidates *c, double p) {
    if (p >= 1.0) return FB_OK;
    FB_TRY(fb_candidates_weigh(c));
    /* The highest logit is subtracted before the sum, so that large logits cancel. */
    const double top = c->kernels->highest(c->logit, (size_t)c->n);
    double sum = 0.0, terms[FB_SUM_BLOCK]; /* in the order of sums of weights */
    for (int32_t first = 0; first < c->n; first += FB_SUM_BLOCK) {
        const int32_t n = c->n - first < FB_SUM_BLOCK ? c->n - first : FB_SUM_BLOCK;
        for (int32_t i = 0; i < n; i++)
            terms[i] = c->weight[first + i] > 0.0 ? c->weight[first + i] * (c->logit[first + i] - top) : 0.0;
        sum += c->kernels->weight_sum(terms, (size_t)n);
    }
    const double mean = sum / c->total;
    const struct order order = {.by_distance = true, .center = top + mean};
    const int32_t n = list_slots(c, c->logit, -DBL_MAX);
    drop_after(c, order, find_cut(c, order, measure_weight(c, p), n));
    return FB_OK;
}

/* Tokens at least p times as likely as the likeliest (Nguyen et al., "Turning Up the Heat: Min-p Sampling",
 * 2024). */
enum fb_status fb_step_min_p(struct fb_candidates *c, double p) {
    if (p == 0.0) return FB_OK;
    FB_TRY(fb_candidates_weigh(c));
    const double limit = p * c->kernels->highest(c->weight, (size_t)c->n);
    int32_t n = 0;
    for (int32_t i = 0; i < c->n; i++)
        if (c->weight[i] >= limit) keep(c, i, n++);
    end_cut(c, n);
    return FB_OK;
}

/* XTC, "exclude top choices", introduced by p-e-w in text-generation-webui, pull request 6335, 2024: of the
 * tokens with a probability of `threshold` or more only the least likely is kept (of equal ones the highest
 * id). With a threshold above one half there are never two such tokens. */
enum fb_status fb_step_xtc(struct fb_candidates *c, double threshold) {
    if (threshold <= 0.0 || threshold > 0.5) return FB_OK;
    FB_TRY(fb_candidates_weigh(c));
    const double limit = threshold * c->total;
    int32_t least = -1;
    for (int32_t i = 0; i < c->n; i++)
        if (c->weight[i] >= limit && (least < 0 || c->logit[i] <= c->logit[least])) least = i;
    if (least < 0) return FB_OK;
    int32_t n = 0;
    for (int32_t i = 0; i < c->n; i++)
        if (c->weight[i] < limit || i == least) keep(c, i, n++);
    end_cut(c, n);
    return FB_OK;
}
