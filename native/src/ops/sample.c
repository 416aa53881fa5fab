/*
 * sample.c - the sampler's public functions: checks, the chain of steps, the selection of the token. See
 * sample.h for its other files.
 *
 * Every step works on the whole vocabulary; nothing is dropped that the caller did not ask to be dropped.
 * Order: logits are checked and weighed unchanged (for `logprob`), the chain changes and drops candidates,
 * and one uniform number selects by inverse CDF in the order of ids. Temperature 0 is greedy: of the chain
 * only bias, penalties and DRY run, in any position, and the highest logit wins, even if the chain has no
 * temperature step.
 */
#include "ops/sample.h"
#include "base/float_mode.h"
#include "base/status.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { MAX_VOCAB = 1 << 30 }; /* rows of the largest fb_weight */

/* llama.cpp's order, with the bias first: truncating steps see the model's own probabilities, and temperature
 * only spreads what is left. Hugging Face transformers applies temperature first; there a high one widens
 * top-p and min-p too. */
void fb_sampling_default(struct fb_sampling *out) {
    static const uint8_t chain[] = {FB_SAMPLER_BIAS, FB_SAMPLER_PENALTIES, FB_SAMPLER_DRY, FB_SAMPLER_TOP_K,
        FB_SAMPLER_TYPICAL_P, FB_SAMPLER_TOP_P, FB_SAMPLER_MIN_P, FB_SAMPLER_XTC, FB_SAMPLER_TEMPERATURE};
    if (!out) return;
    *out = (struct fb_sampling){
        .struct_size = sizeof *out,
        .temperature = 1.0f,
        .top_p = 1.0f,
        .typical_p = 1.0f,
        .repetition_penalty = 1.0f,
        .penalty_window = -1,
        .dry_base = 1.75f,
        .dry_allowed_length = 2,
        .dry_window = -1,
        .xtc_threshold = 0.1f,
        .n_chain = sizeof chain,
    };
    memcpy(out->chain, chain, sizeof chain);
}

/* ---- Checks ------------------------------------------------------------------------------------------------------ */

static enum fb_status check_range(const char *name, float value, float low, float high) {
    FB_REQUIRE(
        value >= low && value <= high, "%s is %g, must be in %g .. %g", name, (double)value, (double)low, (double)high);
    return FB_OK;
}

/* (0, high] */
static enum fb_status check_positive(const char *name, float value, float high) {
    FB_REQUIRE(
        value > 0.0f && value <= high, "%s is %g, must be above 0 and at most %g", name, (double)value, (double)high);
    return FB_OK;
}

static enum fb_status check_least(const char *name, int32_t value, int32_t low) {
    FB_REQUIRE(value >= low, "%s is %d, must be %d or more", name, value, low);
    return FB_OK;
}

static enum fb_status check_sampling(const struct fb_sampling *s) {
    FB_REQUIRE(s, "settings is NULL");
    FB_REQUIRE(
        s->struct_size == sizeof *s, "struct_size of the settings is %u, must be %zu", s->struct_size, sizeof *s);
    FB_TRY(check_range("temperature", s->temperature, 0.0f, FLT_MAX));
    FB_TRY(check_least("top_k", s->top_k, 0));
    FB_TRY(check_positive("top_p", s->top_p, 1.0f));
    FB_TRY(check_range("min_p", s->min_p, 0.0f, 1.0f));
    FB_TRY(check_positive("typical_p", s->typical_p, 1.0f));
    FB_TRY(check_positive("repetition_penalty", s->repetition_penalty, FLT_MAX));
    FB_TRY(check_range("frequency_penalty", s->frequency_penalty, -FLT_MAX, FLT_MAX));
    FB_TRY(check_range("presence_penalty", s->presence_penalty, -FLT_MAX, FLT_MAX));
    FB_TRY(check_least("penalty_window", s->penalty_window, -1));
    FB_TRY(check_range("dry_multiplier", s->dry_multiplier, 0.0f, FLT_MAX));
    FB_TRY(check_range("dry_base", s->dry_base, 1.0f, FLT_MAX));
    FB_TRY(check_least("dry_allowed_length", s->dry_allowed_length, 1));
    FB_TRY(check_least("dry_window", s->dry_window, -1));
    FB_TRY(check_range("xtc_probability", s->xtc_probability, 0.0f, 1.0f));
    FB_TRY(check_range("xtc_threshold", s->xtc_threshold, 0.0f, 1.0f));
    FB_REQUIRE(
        s->n_chain >= 0 && s->n_chain <= FB_MAX_CHAIN, "n_chain is %d, must be in 0 .. %d", s->n_chain, FB_MAX_CHAIN);
    uint32_t seen = 0;
    for (int32_t i = 0; i < s->n_chain; i++) {
        const uint32_t step = s->chain[i];
        FB_REQUIRE(step >= FB_SAMPLER_BIAS && step <= FB_SAMPLER_XTC, "chain[%d] is %u, must be in %d .. %d", i, step,
            FB_SAMPLER_BIAS, FB_SAMPLER_XTC);
        FB_REQUIRE(!(seen >> step & 1), "chain[%d] is %u, a step that is already in the chain", i, step);
        seen |= 1u << step;
    }
    return FB_OK;
}

static enum fb_status check_ids(const char *name, const int32_t *ids, int32_t n, int32_t vocab_size) {
    FB_REQUIRE(n >= 0, "n_%s is %d, must be 0 or more", name, n);
    FB_REQUIRE(n == 0 || ids, "%s is NULL, but n_%s is %d", name, name, n);
    for (int32_t i = 0; i < n; i++)
        FB_REQUIRE(ids[i] >= 0 && ids[i] < vocab_size, "%s[%d] is token %d, must be in 0 .. %d", name, i, ids[i],
            vocab_size - 1);
    return FB_OK;
}

enum fb_status fb_check_request(const struct fb_sample_request *r) {
    FB_REQUIRE(r->vocab_size >= 1 && r->vocab_size <= MAX_VOCAB, "vocab_size is %d, must be in 1 .. %d", r->vocab_size,
        MAX_VOCAB);
    FB_TRY(check_sampling(r->settings));
    FB_TRY(check_ids("history", r->history, r->n_history, r->vocab_size));
    FB_TRY(check_ids("breakers", r->breakers, r->n_breakers, r->vocab_size));
    FB_TRY(check_ids("bias", r->bias_ids, r->n_bias, r->vocab_size));
    FB_REQUIRE(r->n_bias == 0 || r->bias_values, "bias_values is NULL, but n_bias is %d", r->n_bias);
    for (int32_t i = 0; i < r->n_bias; i++)
        FB_REQUIRE(r->bias_values[i] <= FLT_MAX, "bias of token %d is %g, must be a finite number or -infinity",
            r->bias_ids[i], (double)r->bias_values[i]);
    return FB_OK;
}

static enum fb_status check_call(const struct fb_sample_request *r, const void *work) {
    FB_REQUIRE(r->logits, "logits is NULL");
    FB_REQUIRE(work && (uintptr_t)work % 16 == 0, "work is NULL or not 16-byte aligned");
    return fb_check_request(r);
}

/* ---- Scratch ----------------------------------------------------------------------------------------------------- */

/*
 * double [vocab] logit, [vocab] weight
 * uint64 [FB_SAMPLE_BINS] mass
 * int32  [vocab] id, [vocab] list, [vocab] per_token, [FB_DRY_MAX_MATCH] match
 */
size_t fb_sample_work_bytes(int32_t vocab_size) {
    if (vocab_size < 1 || vocab_size > MAX_VOCAB) return 0;
    const size_t n = (size_t)vocab_size;
    return 2 * n * sizeof(double) + FB_SAMPLE_BINS * sizeof(uint64_t) + (3 * n + FB_DRY_MAX_MATCH) * sizeof(int32_t);
}

struct fb_candidates fb_candidates_in(void *work, int32_t vocab_size) {
    const size_t n = (size_t)vocab_size;
    struct fb_candidates c = {.kernels = fb_kernels_of(fb_isa_best()), .vocab_size = vocab_size, .logit = work};
    c.weight = c.logit + n;
    c.mass = (uint64_t *)(void *)(c.weight + n);
    c.id = (int32_t *)(void *)(c.mass + FB_SAMPLE_BINS);
    c.list = c.id + n;
    c.per_token = c.list + n;
    c.match = c.per_token + n;
    return c;
}

/* ---- Chain and selection ----------------------------------------------------------------------------------------- */

/* Whether a step changes logits and is not neutral. */
static bool changes_logits(const struct fb_sample_request *r, int step) {
    const struct fb_sampling *s = r->settings;
    switch (step) {
    case FB_SAMPLER_BIAS:
        return r->n_bias > 0;
    case FB_SAMPLER_PENALTIES:
        return r->n_history > 0 &&
               (s->repetition_penalty != 1.0f || s->frequency_penalty != 0.0f || s->presence_penalty != 0.0f);
    case FB_SAMPLER_DRY:
        return r->n_history > 1 && s->dry_multiplier > 0.0f;
    default:
        return false;
    }
}

static enum fb_status run_step(struct fb_candidates *c, const struct fb_sample_request *r, int step) {
    const struct fb_sampling *s = r->settings;
    switch (step) {
    case FB_SAMPLER_BIAS:
        fb_step_bias(c, r);
        return FB_OK;
    case FB_SAMPLER_PENALTIES:
        fb_step_penalties(c, r);
        return FB_OK;
    case FB_SAMPLER_DRY:
        fb_step_dry(c, r);
        return FB_OK;
    case FB_SAMPLER_TEMPERATURE:
        fb_step_temperature(c, (double)s->temperature);
        return FB_OK;
    case FB_SAMPLER_TOP_K:
        return fb_step_top_k(c, s->top_k);
    case FB_SAMPLER_TYPICAL_P:
        return fb_step_typical_p(c, (double)s->typical_p);
    case FB_SAMPLER_TOP_P:
        return fb_step_top_p(c, (double)s->top_p);
    case FB_SAMPLER_MIN_P:
        return fb_step_min_p(c, (double)s->min_p);
    default: /* XTC, if its random number says so */
        if (fb_uniform(s->seed, r->position, FB_STREAM_XTC) >= (double)s->xtc_probability) return FB_OK;
        return fb_step_xtc(c, (double)s->xtc_threshold);
    }
}

/* Slot of the highest logit, the first of equal ones; FB_INVALID_ARGUMENT if all are banned. */
static enum fb_status pick_highest(const struct fb_candidates *c, int32_t *slot) {
    double top = -INFINITY;
    int32_t at = -1;
    for (int32_t i = 0; i < c->n; i++)
        if (c->logit[i] > top) {
            top = c->logit[i];
            at = i;
        }
    FB_REQUIRE(at >= 0, "every token is banned: bias left none of %d", c->vocab_size);
    *slot = at;
    return FB_OK;
}

static enum fb_status run_greedy(
    struct fb_candidates *c, const struct fb_sample_request *r, float top, int32_t *token) {
    bool changed = false;
    for (int32_t i = 0; i < r->settings->n_chain; i++) {
        const int step = r->settings->chain[i];
        if (!changes_logits(r, step)) continue;
        if (!changed) fb_candidates_load(c, r->logits);
        changed = true;
        FB_TRY(run_step(c, r, step));
    }
    if (changed) return pick_highest(c, token);
    int32_t at = 0;
    while (r->logits[at] < top)
        at++;
    *token = at;
    return FB_OK;
}

/* Runs the whole chain; afterwards the candidates have weights. */
static enum fb_status run_chain(struct fb_candidates *c, const struct fb_sample_request *r) {
    fb_candidates_load(c, r->logits);
    for (int32_t i = 0; i < r->settings->n_chain; i++)
        FB_TRY(run_step(c, r, r->settings->chain[i]));
    return fb_candidates_weigh(c);
}

/* First slot, by ascending id, at which the running sum of weights exceeds u * total. Whole blocks are
 * skipped by the same sums that make up `total`, so the search always ends in a block. Within a block
 * rounding may leave the sum slightly short of the target; then the last slot with a weight above 0 is
 * selected. */
static int32_t pick_at(const struct fb_candidates *c, double u) {
    const double target = u * c->total;
    double sum = 0.0;
    int32_t first = 0;
    for (; first + FB_SUM_BLOCK < c->n; first += FB_SUM_BLOCK) {
        const double block = c->kernels->weight_sum(c->weight + first, FB_SUM_BLOCK);
        if (sum + block > target) break;
        sum += block;
    }
    int32_t at = first;
    for (int32_t i = first; i < c->n && i < first + FB_SUM_BLOCK; i++) {
        if (c->weight[i] > 0.0) at = i;
        sum += c->weight[i];
        if (sum > target) break;
    }
    return at;
}

/* ---- Public functions -------------------------------------------------------------------------------------------- */

static enum fb_status sample(const struct fb_sample_request *r, void *work, int32_t *token, float *logprob) {
    float top;
    FB_TRY(check_call(r, work));
    struct fb_candidates c = fb_candidates_in(work, r->vocab_size);
    FB_TRY(fb_check_logits(c.kernels, r->logits, r->vocab_size, &top));
    int32_t sampled = 0;
    if (r->settings->temperature == 0.0f) {
        FB_TRY(run_greedy(&c, r, top, &sampled));
    } else {
        FB_TRY(run_chain(&c, r));
        sampled = fb_candidate_id(&c, pick_at(&c, fb_uniform(r->settings->seed, r->position, FB_STREAM_TOKEN)));
    }
    *token = sampled;
    const double log_sum = c.kernels->log_sum_exp(r->logits, (size_t)r->vocab_size, top);
    const double log_p = ((double)r->logits[sampled] - (double)top) - log_sum;
    *logprob = log_p > -(double)FLT_MAX ? (float)log_p : -FLT_MAX; /* finite, as JSON requires */
    return FB_OK;
}

enum fb_status fb_sample(const float *logits, int32_t vocab_size, const struct fb_sampling *settings, uint64_t position,
    const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values, int32_t n_bias,
    const int32_t *breakers, int32_t n_breakers, void *work, int32_t *token, float *logprob) {
    const struct fb_sample_request request = {logits, vocab_size, settings, position, history, n_history, bias_ids,
        bias_values, n_bias, breakers, n_breakers};
    FB_REQUIRE(token && logprob, "token or logprob is NULL");
    const fb_float_mode mode = fb_float_mode_enter();
    const enum fb_status status = sample(&request, work, token, logprob);
    fb_float_mode_leave(mode);
    return status;
}

static enum fb_status find_probabilities(const struct fb_sample_request *r, void *work, float *probabilities) {
    float top;
    FB_TRY(check_call(r, work));
    struct fb_candidates c = fb_candidates_in(work, r->vocab_size);
    FB_TRY(fb_check_logits(c.kernels, r->logits, r->vocab_size, &top));
    int32_t best = 0;
    const bool greedy = r->settings->temperature == 0.0f;
    if (greedy)
        FB_TRY(run_greedy(&c, r, top, &best));
    else
        FB_TRY(run_chain(&c, r));
    memset(probabilities, 0, (size_t)r->vocab_size * sizeof *probabilities);
    if (greedy)
        probabilities[best] = 1.0f;
    else
        for (int32_t i = 0; i < c.n; i++)
            probabilities[fb_candidate_id(&c, i)] = (float)(c.weight[i] / c.total);
    return FB_OK;
}

enum fb_status fb_sample_probabilities(const float *logits, int32_t vocab_size, const struct fb_sampling *settings,
    uint64_t position, const int32_t *history, int32_t n_history, const int32_t *bias_ids, const float *bias_values,
    int32_t n_bias, const int32_t *breakers, int32_t n_breakers, void *work, float *probabilities) {
    const struct fb_sample_request request = {logits, vocab_size, settings, position, history, n_history, bias_ids,
        bias_values, n_bias, breakers, n_breakers};
    FB_REQUIRE(probabilities, "probabilities is NULL");
    const fb_float_mode mode = fb_float_mode_enter();
    const enum fb_status status = find_probabilities(&request, work, probabilities);
    fb_float_mode_leave(mode);
    return status;
}
