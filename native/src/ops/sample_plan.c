/* sample_plan.c - the parts of sampling that do not depend on logits. See sample_plan.h. */
#include "ops/sample_plan.h"

#include "base/status.h"
#include "ops/sample.h"

#include <stdlib.h>

/* Makes room for n more changes. */
static enum fb_status reserve(struct fb_sample_changes *changes, int32_t n) {
    const int64_t wanted = (int64_t)changes->n + n;
    if (wanted <= changes->capacity) return FB_OK;
    FB_REQUIRE(wanted <= INT32_MAX / 2, "%lld changed logits are too many", (long long)wanted);
    struct fb_sample_change *grown = realloc(changes->all, 2 * (size_t)wanted * sizeof *grown);
    if (!grown) return fb_fail(FB_OUT_OF_MEMORY, "no memory for %lld changed logits", (long long)wanted);
    changes->all = grown;
    changes->capacity = (int32_t)(2 * wanted);
    return FB_OK;
}

static void add(struct fb_sample_changes *changes, int32_t token, int32_t place, double amount) {
    changes->all[changes->n++] = (struct fb_sample_change){token, place, amount};
}

static int by_token(const void *a, const void *b) {
    const struct fb_sample_change *x = a, *y = b;
    if (x->token != y->token) return x->token < y->token ? -1 : 1;
    return (x->place > y->place) - (x->place < y->place);
}

static void add_bias(const struct fb_sample_request *r, struct fb_sample_changes *changes) {
    const int32_t first = changes->n;
    bool ascends = true;
    for (int32_t i = 0; i < r->n_bias; i++) {
        ascends = ascends && (i == 0 || r->bias_ids[i] >= r->bias_ids[i - 1]);
        add(changes, r->bias_ids[i], i, (double)r->bias_values[i]);
    }
    if (!ascends) qsort(changes->all + first, (size_t)r->n_bias, sizeof *changes->all, by_token);
}

/* Adds a step's changes; *n: how many. */
static enum fb_status plan_changes(const struct fb_sample_request *r, int step, struct fb_candidates *c,
    struct fb_sample_changes *changes, int32_t *n) {
    if (step == FB_SAMPLER_BIAS) {
        FB_TRY(reserve(changes, r->n_bias));
        add_bias(r, changes);
        *n = r->n_bias;
        return FB_OK;
    }
    const bool is_dry = step == FB_SAMPLER_DRY;
    *n = is_dry ? fb_list_dry(r, c->per_token, c->match, c->list) : fb_list_penalties(r, c->per_token, c->list);
    FB_TRY(reserve(changes, *n));
    for (int32_t i = 0; i < *n; i++) {
        const int32_t value = c->per_token[c->list[i]];
        add(changes, c->list[i], i, is_dry ? fb_dry_loss(r->settings, -value) : (double)value);
    }
    return FB_OK;
}

/* Whether a step that drops candidates, or temperature, is not neutral. */
static bool is_active(const struct fb_sample_request *r, int step) {
    const struct fb_sampling *s = r->settings;
    switch (step) {
    case FB_SAMPLER_TEMPERATURE:
        return s->temperature != 1.0f;
    case FB_SAMPLER_TOP_K:
        return s->top_k != 0;
    case FB_SAMPLER_TYPICAL_P:
        return s->typical_p < 1.0f;
    case FB_SAMPLER_TOP_P:
        return s->top_p < 1.0f;
    case FB_SAMPLER_MIN_P:
        return s->min_p != 0.0f;
    case FB_SAMPLER_XTC:
        return s->xtc_threshold > 0.0f && s->xtc_threshold <= 0.5f &&
               fb_uniform(s->seed, r->position, FB_STREAM_XTC) < (double)s->xtc_probability;
    default:
        return false;
    }
}

enum fb_status fb_plan_sample(
    const struct fb_sample_request *r, void *work, struct fb_sample_changes *changes, struct fb_sample_plan *out) {
    FB_TRY(fb_check_request(r));
    const struct fb_sampling *s = r->settings;
    struct fb_candidates c = fb_candidates_in(work, r->vocab_size);
    struct fb_sample_plan plan = {.factor = s->temperature > 0.0f ? 1.0 / (double)s->temperature : 1.0,
        .repetition = (double)s->repetition_penalty,
        .frequency = (double)s->frequency_penalty,
        .presence = (double)s->presence_penalty,
        .top_p = (double)s->top_p,
        .typical_p = (double)s->typical_p,
        .min_p = (double)s->min_p,
        .xtc_threshold = (double)s->xtc_threshold,
        .uniform = fb_uniform(s->seed, r->position, FB_STREAM_TOKEN),
        .top_k = s->top_k,
        .is_greedy = s->temperature == 0.0f};
    int32_t counts[FB_SAMPLER_XTC + 1] = {0};
    /* Changes are stored in this order, whatever the chain's. */
    static const int order[] = {FB_SAMPLER_BIAS, FB_SAMPLER_PENALTIES, FB_SAMPLER_DRY};
    plan.first_change = changes->n;
    for (size_t o = 0; o < sizeof order / sizeof *order; o++)
        for (int32_t i = 0; i < s->n_chain; i++)
            if (s->chain[i] == order[o]) FB_TRY(plan_changes(r, order[o], &c, changes, &counts[order[o]]));
    plan.n_bias = counts[FB_SAMPLER_BIAS];
    plan.n_penalties = counts[FB_SAMPLER_PENALTIES];
    plan.n_dry = counts[FB_SAMPLER_DRY];
    for (int32_t i = 0; i < s->n_chain; i++)
        if (counts[s->chain[i]] > 0 || (!plan.is_greedy && is_active(r, s->chain[i])))
            plan.steps[plan.n_steps++] = s->chain[i];
    *out = plan;
    return FB_OK;
}
