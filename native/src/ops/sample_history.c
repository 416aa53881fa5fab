/*
 * sample_history.c - the steps of the sampler that change logits: bias, penalties, DRY, temperature. See
 * sample.h. Which tokens penalties and DRY change is found without reading logits, also for a GPU
 * (sample_plan.h).
 *
 * Except for temperature, no step touches more of the vocabulary than the tokens it changes: `per_token` is
 * written for the tokens of the window before it is read, so it needs no clearing. All steps work on the
 * remaining ids.
 */
#include "ops/sample.h"

#include <float.h>
#include <math.h>

/* Last `window` tokens of the history; -1 means all. */
static const int32_t *window_of(const struct fb_sample_request *request, int32_t window, int32_t *n) {
    *n = window < 0 || window > request->n_history ? request->n_history : window;
    return *n ? request->history + (request->n_history - *n) : NULL;
}

/* logit += value for each entry in order; an id that occurs twice gets both. */
void fb_step_bias(struct fb_candidates *c, const struct fb_sample_request *request) {
    for (int32_t i = 0; i < request->n_bias; i++) {
        const int32_t slot = fb_candidate_slot(c, request->bias_ids[i]);
        if (slot >= 0) c->logit[slot] += (double)request->bias_values[i];
    }
    c->weighted = c->weighted && request->n_bias == 0;
}

/*
 * For each distinct token that occurs `count` times in the window:
 *    repetition (Keskar et al., "CTRL", 2019, section 4.1; the sign rule is that of transformers):
 *        logit = logit > 0 ? logit / repetition : logit * repetition
 *    frequency and presence (OpenAI's API reference):
 *        logit = logit - (count * frequency + presence)
 */
void fb_step_penalties(struct fb_candidates *c, const struct fb_sample_request *request) {
    const struct fb_sampling *s = request->settings;
    const double repetition = (double)s->repetition_penalty;
    const double frequency = (double)s->frequency_penalty, presence = (double)s->presence_penalty;
    const int32_t n = fb_list_penalties(request, c->per_token, c->list);
    for (int32_t i = 0; i < n; i++) {
        const int32_t slot = fb_candidate_slot(c, c->list[i]);
        if (slot < 0) continue;
        double logit = c->logit[slot];
        logit = logit > 0.0 ? logit / repetition : logit * repetition;
        c->logit[slot] = logit - ((double)c->per_token[c->list[i]] * frequency + presence);
    }
    c->weighted = c->weighted && n == 0;
}

int32_t fb_list_penalties(const struct fb_sample_request *request, int32_t *count, int32_t *list) {
    const struct fb_sampling *s = request->settings;
    int32_t n, n_listed = 0;
    const int32_t *window = window_of(request, s->penalty_window, &n);
    if (s->repetition_penalty == 1.0f && s->frequency_penalty == 0.0f && s->presence_penalty == 0.0f) return 0;
    for (int32_t i = 0; i < n; i++)
        count[window[i]] = 0;
    for (int32_t i = 0; i < n; i++)
        if (count[window[i]]++ == 0) list[n_listed++] = window[i];
    return n_listed;
}

/*
 * For each index i of the reversed window (s[0] is the last token): how far s[i..] repeats the end s[0..].
 * The repetition would continue with s[i - 1], so that token's longest match is raised. `match` holds the
 * Z-function of the first n_pattern tokens (Gusfield, "Algorithms on Strings", 1997, section 1.4). Lengths
 * never exceed n_pattern, and an entry is always copied from an index below it, so the array need not be
 * longer. Each successful comparison advances `right`: linear time.
 */
static void longest_matches(const int32_t *last, int32_t n, int32_t n_pattern, int32_t *match, int32_t *longest) {
    int32_t left = 0, right = 0;
    for (int32_t i = 1; i < n; i++) {
        int32_t length = 0;
        if (i < right) length = match[i - left] < right - i ? match[i - left] : right - i;
        while (length < n_pattern && i + length < n && last[-length] == last[-(i + length)])
            length++;
        if (i + length > right) {
            left = i;
            right = i + length;
        }
        if (i < n_pattern) match[i] = length;
        const int32_t next = last[1 - i];
        if (longest[next] >= 0 && length > longest[next]) longest[next] = length;
    }
}

/*
 * DRY ("don't repeat yourself"), introduced by p-e-w in text-generation-webui, pull request 5677, 2024: a
 * token that would continue a repetition of L >= allowed_length tokens loses multiplier * base^(L -
 * allowed_length), where L is the longest such repetition. A repetition does not extend over a breaker, and a
 * breaker itself is never penalized. Repetitions longer than FB_DRY_MAX_MATCH count as that long, and a loss
 * is at most FLT_MAX: DRY never bans.
 */
void fb_step_dry(struct fb_candidates *c, const struct fb_sample_request *request) {
    const int32_t n = fb_list_dry(request, c->per_token, c->match, c->list);
    for (int32_t i = 0; i < n; i++) {
        const int32_t slot = fb_candidate_slot(c, c->list[i]);
        if (slot >= 0) c->logit[slot] -= fb_dry_loss(request->settings, -c->per_token[c->list[i]]);
    }
    c->weighted = c->weighted && n == 0;
}

double fb_dry_loss(const struct fb_sampling *s, int32_t length) {
    const double loss = (double)s->dry_multiplier * pow((double)s->dry_base, (double)(length - s->dry_allowed_length));
    return loss < (double)FLT_MAX ? loss : (double)FLT_MAX;
}

int32_t fb_list_dry(const struct fb_sample_request *request, int32_t *longest, int32_t *match, int32_t *list) {
    const struct fb_sampling *s = request->settings;
    int32_t n;
    const int32_t *window = window_of(request, s->dry_window, &n);
    if (n < 2 || s->dry_multiplier == 0.0f) return 0;
    for (int32_t i = 0; i < n; i++)
        longest[window[i]] = 0;
    for (int32_t i = 0; i < request->n_breakers; i++)
        longest[request->breakers[i]] = -1;

    const int32_t *last = window + n - 1;
    int32_t n_pattern = 0, n_listed = 0;
    while (n_pattern < n && n_pattern < FB_DRY_MAX_MATCH && longest[last[-n_pattern]] == 0)
        n_pattern++;
    if (n_pattern < s->dry_allowed_length) return 0;
    longest_matches(last, n, n_pattern, match, longest);
    for (int32_t i = 0; i < n; i++) {
        const int32_t token = window[i];
        if (longest[token] < s->dry_allowed_length) continue;
        list[n_listed++] = token;
        longest[token] = -longest[token]; /* listed */
    }
    return n_listed;
}

/* logit * (1 / temperature): one division instead of one per token. */
void fb_step_temperature(struct fb_candidates *c, double temperature) {
    if (temperature == 1.0) return;
    const double factor = 1.0 / temperature;
    for (int32_t i = 0; i < c->n; i++)
        c->logit[i] *= factor;
    c->weighted = false;
}
