/*
 * decode.c - several decode steps in one call (fb_program_decode). Each step computes every sequence's pending
 * tokens and samples its next one. The tokens are those that fb_program_run and fb_sample would give in turn.
 * A device samples itself (ops/sample_plan.h), without copying logits.
 */
#include "ops/sample_plan.h"
#include "program/program.h"

#include "base/status.h"
#include "ops/sample.h"

#include <stdlib.h>
#include <string.h>

/* State of one call, besides the program. */
struct decoding {
    struct fb_decode_request *requests;
    int32_t *active; /* [n_requests] indices into `requests` of the sequences that still decode */
    struct fb_sequence *sequences;
    int32_t *tokens;              /* the first step's tokens, which are the most */
    int32_t *in_step;             /* [n_requests] indices into `requests` of the sequences of the present step */
    int32_t *outputs;             /* [n_requests] batch row of each active sequence's logits */
    bool *failed, *is_sampled;    /* [n_requests] is_sampled: by the device */
    struct fb_sample_plan *plans; /* [n_requests] of the rows that the device samples */
    struct fb_sample_changes changes;
    int32_t *sampled; /* [n_requests] tokens that the device sampled */
    float *logprobs;  /* [n_requests] and their log-probabilities */
    int32_t n_active;
    const float *logits;
    char *work;
    size_t work_bytes;
    int32_t vocab_size;
    fb_state_pool *states;
};

static enum fb_status check_request(const struct fb_program *p, const struct fb_decode_request *d, int32_t i) {
    const int32_t n_tokens = d->sequence.n_tokens;
    FB_REQUIRE(n_tokens >= 1 && n_tokens <= p->shape.max_tokens,
        "request %d: its sequence has %d tokens, must be 1 .. %d", i, n_tokens, p->shape.max_tokens);
    FB_REQUIRE(d->n_steps >= 0 && d->n_history >= n_tokens && d->history && (d->logprobs || d->n_steps == 0),
        "request %d: n_steps %d must be 0 or more, n_history %d at least %d, history and logprobs not null", i,
        d->n_steps, d->n_history, n_tokens);
    FB_REQUIRE(
        (int64_t)d->sequence.n_past + n_tokens - 1 + d->n_steps <= (int64_t)d->sequence.n_pages * FB_PAGE_POSITIONS,
        "request %d: %d pages for %d positions, %d tokens and %d steps", i, d->sequence.n_pages, d->sequence.n_past,
        n_tokens, d->n_steps);
    FB_REQUIRE(d->n_ends >= 0 && (d->n_ends == 0 || d->ends), "request %d: ends is null, n_ends is %d", i, d->n_ends);
    for (int32_t t = d->n_history - n_tokens; t < d->n_history; t++)
        FB_REQUIRE(d->history[t] >= 0 && d->history[t] < p->shape.vocab_size, "request %d: its token %d is %d", i, t,
            d->history[t]);
    return FB_OK;
}

/* The arguments of fb_sample for a sequence's next token. */
static struct fb_sample_request request_of(const struct fb_decode_request *d, const float *logits, int32_t vocab_size) {
    const int32_t n = d->n_history + d->n_sampled;
    return (struct fb_sample_request){logits, vocab_size, d->settings, (uint64_t)n, d->history, n, d->bias_ids,
        d->bias_values, d->n_bias, d->breakers, d->n_breakers};
}

/* Samples one sequence's next token, or takes the device's. After a failure the sequence stops; the caller
 * gets the reason from fb_sample. */
static void sample_one(void *context, int64_t index, int thread) {
    struct decoding *all = context;
    struct fb_decode_request *d = &all->requests[all->active[index]];
    const struct fb_sample_request r = request_of(
        d, all->logits + (size_t)index * (size_t)all->vocab_size, all->vocab_size);
    int32_t token = -1;
    float logprob = 0.0f;
    if (all->is_sampled[index]) {
        token = all->sampled[index];
        logprob = all->logprobs[index];
        all->failed[index] = token < 0;
    } else {
        all->failed[index] = fb_sample(r.logits, r.vocab_size, r.settings, r.position, r.history, r.n_history,
                                 r.bias_ids, r.bias_values, r.n_bias, r.breakers, r.n_breakers,
                                 all->work + (size_t)thread * all->work_bytes, &token, &logprob) != FB_OK;
    }
    if (all->failed[index]) return;
    d->history[r.n_history] = token;
    d->logprobs[d->n_sampled++] = logprob;
}

static bool is_unfinished(const struct fb_decode_request *d) {
    if (d->n_sampled == d->n_steps) return false;
    const int32_t last = d->history[d->n_history + d->n_sampled - 1];
    for (int32_t i = 0; i < d->n_ends; i++)
        if (d->ends[i] == last) return false;
    return true;
}

/* Describes a sequence's part of the next step; returns its number of tokens. */
static int32_t describe(const struct fb_decode_request *d, struct fb_sequence *sequence, int32_t *tokens) {
    *sequence = d->sequence;
    if (d->n_sampled > 0) {
        sequence->state_in = sequence->state_out;
        sequence->n_keeps = 0;
        sequence->n_past += d->sequence.n_tokens - 1 + d->n_sampled;
        sequence->n_tokens = 1;
    }
    const int32_t *from = d->history + d->n_history + d->n_sampled - sequence->n_tokens;
    memcpy(tokens, from, (size_t)sequence->n_tokens * sizeof *tokens);
    return sequence->n_tokens;
}

/* Plans what the device samples. A sequence that cannot be planned is left to fb_sample, which
 * reports why. */
static enum fb_status plan(struct decoding *all, struct fb_results *results) {
    all->changes.n = 0;
    for (int32_t i = 0; i < all->n_active; i++) {
        const struct fb_sample_request request = request_of(&all->requests[all->active[i]], NULL, all->vocab_size);
        struct fb_sample_plan *next = &all->plans[results->n_plans];
        const enum fb_status status = fb_plan_sample(&request, all->work, &all->changes, next);
        if (status == FB_OUT_OF_MEMORY) return status;
        all->is_sampled[i] = status == FB_OK;
        next->row = i;
        results->n_plans += status == FB_OK;
    }
    results->is_sampled = all->is_sampled;
    results->plans = all->plans;
    results->changes = all->changes.all;
    results->n_changes = all->changes.n;
    results->tokens = all->sampled;
    results->logprobs = all->logprobs;
    return FB_OK;
}

/* Runs a step's batch. */
static enum fb_status run_batch(fb_program *p, fb_page_pool *pool, struct decoding *all, const struct fb_batch *batch,
    float *logits, size_t n_logits) {
    if (!p->device) return fb_program_run(p, pool, batch, logits, n_logits);
    struct fb_results results = {.logits = logits};
    FB_TRY(plan(all, &results));
    return fb_program_run_on_device(p, pool, batch, &results, n_logits);
}

/* Runs one step over all active sequences. Afterwards `active` holds those that sample (n_steps > 0). */
static enum fb_status compute(fb_program *p, fb_page_pool *pool, struct decoding *all, float *logits) {
    const int32_t n_sequences = all->n_active;
    int32_t n_tokens = 0, n_outputs = 0;
    for (int32_t i = 0; i < n_sequences; i++) {
        const int32_t index = all->active[i];
        all->in_step[i] = index;
        n_tokens += describe(&all->requests[index], &all->sequences[i], all->tokens + n_tokens);
        if (all->requests[index].n_steps == 0) continue;
        all->active[n_outputs] = index;
        all->outputs[n_outputs++] = n_tokens - 1;
    }
    all->n_active = n_outputs;
    const struct fb_batch batch = {.struct_size = sizeof batch,
        .n_tokens = n_tokens,
        .tokens = all->tokens,
        .sequences = all->sequences,
        .n_sequences = n_sequences,
        .outputs = all->outputs,
        .n_outputs = n_outputs,
        .states = all->states};
    const size_t n_logits = (size_t)n_outputs * (size_t)all->vocab_size;
    const enum fb_status status = run_batch(p, pool, all, &batch, logits, n_logits);
    for (int32_t i = 0; i < n_sequences; i++) {
        const struct fb_sequence *sequence = &all->sequences[i];
        all->requests[all->in_step[i]].state_position = status == FB_OK ? sequence->n_past + sequence->n_tokens : -1;
    }
    return status;
}

static void drop_finished(struct decoding *all) {
    int32_t n = 0;
    for (int32_t i = 0; i < all->n_active; i++)
        if (!all->failed[i] && is_unfinished(&all->requests[all->active[i]])) all->active[n++] = all->active[i];
    all->n_active = n;
}

static enum fb_status run_steps(fb_program *p, fb_page_pool *pool, struct decoding *all, int32_t n_steps,
    const int32_t *stop, float *logits, double *seconds, int32_t *n_done) {
    const int64_t start = fb_now_ns();
    const int32_t n_workers = p->n_threads < FB_SAMPLING_THREADS ? p->n_threads : FB_SAMPLING_THREADS;
    for (*n_done = 0; *n_done < n_steps && all->n_active > 0;) {
        if (*n_done > 0 && stop && __atomic_load_n(stop, __ATOMIC_RELAXED)) return FB_OK;
        const enum fb_status status = compute(p, pool, all, logits);
        if (status != FB_OK) return *n_done > 0 ? FB_OK : status; /* the next call's first step returns it */
        if (all->n_active == 1)
            sample_one(all, 0, 0);
        else if (all->n_active > 1)
            fb_team_run(sample_one, all, all->n_active, n_workers);
        drop_finished(all);
        seconds[(*n_done)++] = 1e-9 * (double)(fb_now_ns() - start);
    }
    return FB_OK;
}

enum fb_status fb_program_decode(fb_program *program, fb_page_pool *pool, fb_state_pool *states,
    struct fb_decode_request *requests, int32_t n_requests, int32_t n_steps, const int32_t *stop, float *logits,
    size_t n_logits, double *seconds, int32_t *n_done) {
    FB_REQUIRE(program && pool && requests && logits && seconds && n_done,
        "program, pool, requests, logits, seconds or n_done is null");
    const int32_t most = program->shape.max_tokens, vocab_size = program->shape.vocab_size;
    FB_REQUIRE(n_requests >= 1 && n_requests <= most, "n_requests is %d, must be 1 .. %d", n_requests, most);
    FB_REQUIRE(n_steps >= 1, "n_steps is %d, must be 1 or more", n_steps);
    FB_REQUIRE(program->n_results == vocab_size, "the program's last op has %d rows, the vocabulary %d tokens",
        program->n_results, vocab_size);
    FB_REQUIRE(n_logits >= (size_t)n_requests * (size_t)vocab_size, "%zu logits, %d x %d are needed", n_logits,
        n_requests, vocab_size);
    size_t n = (size_t)n_requests, n_tokens = 0;
    for (int32_t i = 0; i < n_requests; i++) {
        FB_TRY(check_request(program, &requests[i], i));
        n_tokens += (size_t)requests[i].sequence.n_tokens;
    }
    struct decoding all = {
        .requests = requests, .n_active = n_requests, .logits = logits, .vocab_size = vocab_size, .states = states};
    all.sequences = calloc(n, sizeof *all.sequences);
    all.active = calloc(4 * n + n_tokens, sizeof *all.active);
    all.failed = calloc(2 * n, sizeof *all.failed);
    all.plans = calloc(n, sizeof *all.plans);
    all.logprobs = calloc(n, sizeof *all.logprobs);
    all.work = program->sample_work;
    all.work_bytes = program->sample_work_bytes;
    enum fb_status status = FB_OK;
    if (!all.sequences || !all.active || !all.failed || !all.plans || !all.logprobs) {
        status = fb_fail(FB_OUT_OF_MEMORY, "no memory to decode %d sequences", n_requests);
    } else {
        all.sampled = all.active + n;
        all.outputs = all.sampled + n;
        all.in_step = all.outputs + n;
        all.tokens = all.in_step + n;
        all.is_sampled = all.failed + n;
        for (int32_t i = 0; i < n_requests; i++) {
            all.active[i] = i;
            requests[i].n_sampled = 0;
        }
        status = run_steps(program, pool, &all, n_steps, stop, logits, seconds, n_done);
    }
    free(all.sequences);
    free(all.active);
    free(all.failed);
    free(all.plans);
    free(all.changes.all);
    free(all.logprobs);
    return status;
}
