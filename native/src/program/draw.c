/*
 * draw.c - several steps in one call: each computes the last token of every sequence and draws its next. What is drawn
 * is what fb_program_run and fb_sample would give, one after the other. A device draws the likeliest token itself where
 * nothing changes logits before; the logits of other sequences are copied from it.
 */
#include "program/program.h"

#include "base/status.h"
#include "ops/sample.h"

#include <stdlib.h>
#include <string.h>

/* What a call works with, besides the program. */
struct drawing {
    struct fb_draw *draws;
    int32_t *active; /* [n_draws] places of those that still draw */
    struct fb_sequence *sequences;
    int32_t *tokens, *outputs; /* [n_draws] */
    bool *failed, *is_greedy;  /* [n_draws] the latter: the device draws */
    float *logprobs;           /* [n_draws] of tokens that the device drew; the tokens take the place of `tokens` */
    int32_t n_active;
    const float *logits;
    char *work;
    size_t work_bytes;
    int32_t vocab_size;
};

static enum fb_status check_draw(const struct fb_program *p, const struct fb_draw *d, int32_t i) {
    FB_REQUIRE(
        d->sequence.n_tokens == 1, "draw %d: its sequence appends %d tokens, must be 1", i, d->sequence.n_tokens);
    FB_REQUIRE(d->n_steps >= 1 && d->n_history >= 1 && d->history && d->logprobs,
        "draw %d: n_steps %d and n_history %d must be 1 or more, history and logprobs not null", i, d->n_steps,
        d->n_history);
    FB_REQUIRE((int64_t)d->sequence.n_past + d->n_steps <= (int64_t)d->sequence.n_pages * FB_PAGE_POSITIONS,
        "draw %d: %d pages for %d positions and %d steps", i, d->sequence.n_pages, d->sequence.n_past, d->n_steps);
    FB_REQUIRE(d->n_ends >= 0 && (d->n_ends == 0 || d->ends), "draw %d: ends is null, n_ends is %d", i, d->n_ends);
    FB_REQUIRE(d->history[d->n_history - 1] >= 0 && d->history[d->n_history - 1] < p->shape.vocab_size,
        "draw %d: its last token is %d", i, d->history[d->n_history - 1]);
    return FB_OK;
}

/* Whether the likeliest token is drawn as the model has it. */
static bool takes_likeliest(const struct fb_draw *d) {
    const struct fb_sampling *s = d->settings;
    return fb_check_sampling(s) == FB_OK && s->temperature == 0.0f && d->n_bias == 0 && s->repetition_penalty == 1.0f &&
           s->frequency_penalty == 0.0f && s->presence_penalty == 0.0f && s->dry_multiplier == 0.0f;
}

/* Draws for one sequence. A failure ends it: whoever asked meets the reason again with fb_sample. */
static void draw_one(void *context, int64_t index, int thread) {
    struct drawing *all = context;
    struct fb_draw *d = &all->draws[all->active[index]];
    const int32_t n = d->n_history + d->n_drawn;
    int32_t token;
    if (all->is_greedy[index]) {
        d->history[n] = all->tokens[index];
        d->logprobs[d->n_drawn++] = all->logprobs[index];
        all->failed[index] = false;
        return;
    }
    all->failed[index] = fb_sample(all->logits + (size_t)index * (size_t)all->vocab_size, all->vocab_size, d->settings,
                             (uint64_t)n, d->history, n, d->bias_ids, d->bias_values, d->n_bias, d->breakers,
                             d->n_breakers, all->work + (size_t)thread * all->work_bytes, &token,
                             &d->logprobs[d->n_drawn]) != FB_OK;
    if (all->failed[index]) return;
    d->history[n] = token;
    d->n_drawn++;
}

static bool goes_on(const struct fb_draw *d) {
    if (d->n_drawn == d->n_steps) return false;
    const int32_t last = d->history[d->n_history + d->n_drawn - 1];
    for (int32_t i = 0; i < d->n_ends; i++)
        if (d->ends[i] == last) return false;
    return true;
}

/* Computes the last token of all that draw. */
static enum fb_status compute(fb_program *p, fb_page_pool *pool, struct drawing *all, float *logits) {
    for (int32_t i = 0; i < all->n_active; i++) {
        const struct fb_draw *d = &all->draws[all->active[i]];
        all->sequences[i] = d->sequence;
        all->sequences[i].n_past += d->n_drawn;
        all->tokens[i] = d->history[d->n_history + d->n_drawn - 1];
        all->outputs[i] = i;
        all->is_greedy[i] = p->device && takes_likeliest(d);
    }
    const struct fb_batch batch = {.struct_size = sizeof batch,
        .n_tokens = all->n_active,
        .tokens = all->tokens,
        .sequences = all->sequences,
        .n_sequences = all->n_active,
        .outputs = all->outputs,
        .n_outputs = all->n_active};
    const size_t n_logits = (size_t)all->n_active * (size_t)all->vocab_size;
    const struct fb_results results = {logits, all->is_greedy, all->tokens, all->logprobs};
    return p->device ? fb_program_run_on_device(p, pool, &batch, &results, n_logits)
                     : fb_program_run(p, pool, &batch, logits, n_logits);
}

static void drop_finished(struct drawing *all) {
    int32_t n = 0;
    for (int32_t i = 0; i < all->n_active; i++)
        if (!all->failed[i] && goes_on(&all->draws[all->active[i]])) all->active[n++] = all->active[i];
    all->n_active = n;
}

static enum fb_status run_steps(fb_program *p, fb_page_pool *pool, struct drawing *all, int32_t n_steps,
    const int32_t *stop, float *logits, double *seconds, int32_t *n_done) {
    const int64_t start = fb_now_ns();
    const int32_t n_workers = p->n_threads < FB_DRAWING_THREADS ? p->n_threads : FB_DRAWING_THREADS;
    for (*n_done = 0; *n_done < n_steps && all->n_active > 0;) {
        if (*n_done > 0 && stop && __atomic_load_n(stop, __ATOMIC_RELAXED)) return FB_OK;
        const enum fb_status status = compute(p, pool, all, logits);
        if (status != FB_OK) return *n_done > 0 ? FB_OK : status; /* the next call meets it in its first step */
        if (all->n_active == 1)
            draw_one(all, 0, 0);
        else
            fb_team_run(draw_one, all, all->n_active, n_workers);
        drop_finished(all);
        seconds[(*n_done)++] = 1e-9 * (double)(fb_now_ns() - start);
    }
    return FB_OK;
}

enum fb_status fb_program_draw(fb_program *program, fb_page_pool *pool, struct fb_draw *draws, int32_t n_draws,
    int32_t n_steps, const int32_t *stop, float *logits, size_t n_logits, double *seconds, int32_t *n_done) {
    FB_REQUIRE(program && pool && draws && logits && seconds && n_done,
        "program, pool, draws, logits, seconds or n_done is null");
    const int32_t most = program->shape.max_tokens, vocab_size = program->shape.vocab_size;
    FB_REQUIRE(n_draws >= 1 && n_draws <= most, "n_draws is %d, must be 1 .. %d", n_draws, most);
    FB_REQUIRE(n_steps >= 1, "n_steps is %d, must be 1 or more", n_steps);
    FB_REQUIRE(program->n_results == vocab_size, "the program ends with %d numbers, not with logits of %d tokens",
        program->n_results, vocab_size);
    FB_REQUIRE(n_logits >= (size_t)n_draws * (size_t)vocab_size, "%zu logits, %d x %d are needed", n_logits, n_draws,
        vocab_size);
    for (int32_t i = 0; i < n_draws; i++)
        FB_TRY(check_draw(program, &draws[i], i));
    const size_t n = (size_t)n_draws;
    struct drawing all = {.draws = draws, .n_active = n_draws, .logits = logits, .vocab_size = vocab_size};
    all.sequences = calloc(n, sizeof *all.sequences);
    all.active = calloc(3 * n, sizeof *all.active);
    all.failed = calloc(2 * n, sizeof *all.failed);
    all.logprobs = calloc(n, sizeof *all.logprobs);
    all.work = program->draw_work;
    all.work_bytes = program->draw_work_bytes;
    enum fb_status status = FB_OK;
    if (!all.sequences || !all.active || !all.failed || !all.logprobs) {
        status = fb_fail(FB_OUT_OF_MEMORY, "no memory to draw for %d sequences", n_draws);
    } else {
        all.tokens = all.active + n;
        all.outputs = all.tokens + n;
        all.is_greedy = all.failed + n;
        for (int32_t i = 0; i < n_draws; i++) {
            all.active[i] = i;
            draws[i].n_drawn = 0;
        }
        status = run_steps(program, pool, &all, n_steps, stop, logits, seconds, n_done);
    }
    free(all.sequences);
    free(all.active);
    free(all.failed);
    free(all.logprobs);
    return status;
}
