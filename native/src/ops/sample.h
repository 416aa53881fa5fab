/*
 * sample.h - shared by the files of the sampler: the candidates that a chain works on, and its steps.
 *
 *   sample.c              public functions, checks, the chain, the selection of the token
 *   sample_cut.c          candidates and the steps that drop some (top-k, top-p, min-p, typical, XTC)
 *   kernels/vocabulary.h  loops over a whole vocabulary
 *   sample_history.c      the steps that change logits (bias, penalties, DRY)
 *   sample_plan.c         everything that does not depend on logits, for a device
 *   random.c              Philox 4x32-10
 *
 * Logits and weights are double: sums over a vocabulary then err by about 1e-15, so a plain reference samples
 * the same token. Ties are decided by the id: of two equal logits the lower id counts as likelier.
 */
#ifndef FABULA_OPS_SAMPLE_H
#define FABULA_OPS_SAMPLE_H

#include "kernels/kernels.h"

enum {
    FB_SAMPLE_BINS = 1024,   /* bins of a histogram in a selection: 8 KiB, which stay in L1 */
    FB_DRY_MAX_MATCH = 4096, /* longest repetition that DRY distinguishes; bounds the scratch */
    FB_STREAM_TOKEN = 0,     /* random streams: the token's, and XTC's */
    FB_STREAM_XTC = 1
};

/* The remaining tokens, in slots 0 .. n-1 by ascending id. All arrays are in the caller's scratch. */
struct fb_candidates {
    const struct fb_kernels *kernels;
    int32_t n, vocab_size;
    bool whole;         /* nothing was dropped yet: slot i is token i, and `id` is not filled */
    bool weighted;      /* weight and total match the current logits */
    double total;       /* sum of the weights */
    double *logit;      /* [n] -INFINITY for a banned token */
    double *weight;     /* [n] exp(logit - highest logit when the weights were computed) */
    uint64_t *mass;     /* [FB_SAMPLE_BINS] */
    int32_t *id;        /* [n] */
    int32_t *list;      /* [vocab_size] slots, for selections */
    int32_t *per_token; /* [vocab_size] scratch by token id, never cleared as a whole */
    int32_t *match;     /* [FB_DRY_MAX_MATCH] */
};

/* One call of the sampler; fields as in fb_sample. */
struct fb_sample_request {
    const float *logits;
    int32_t vocab_size;
    const struct fb_sampling *settings;
    uint64_t position;
    const int32_t *history;
    int32_t n_history;
    const int32_t *bias_ids;
    const float *bias_values;
    int32_t n_bias;
    const int32_t *breakers;
    int32_t n_breakers;
};

/* Id of a slot, and the slot of an id (-1 if it was dropped). */
int32_t fb_candidate_id(const struct fb_candidates *c, int32_t slot);
int32_t fb_candidate_slot(const struct fb_candidates *c, int32_t id);

/* Whether settings and ids are in their ranges, as in fb_sample; does not read logits. */
enum fb_status fb_check_request(const struct fb_sample_request *request);

/* Divides the caller's scratch of fb_sample_work_bytes into the arrays of a call. */
struct fb_candidates fb_candidates_in(void *work, int32_t vocab_size);

/* *top: the highest of n logits. FB_NON_FINITE as in fb_sample. */
enum fb_status fb_check_logits(const struct fb_kernels *kernels, const float *logits, int32_t n, float *top);

/* Makes every token a candidate with its logit. */
void fb_candidates_load(struct fb_candidates *c, const float *logits);

/* Computes weight and total if they are out of date; FB_INVALID_ARGUMENT if all candidates are banned. The
 * steps below call it when needed. */
enum fb_status fb_candidates_weigh(struct fb_candidates *c);

/* Weights are summed in blocks of this size, so that fb_candidates.total and the selection agree. */
enum { FB_SUM_BLOCK = 256 };

/* Steps that change logits. */
void fb_step_bias(struct fb_candidates *c, const struct fb_sample_request *request);
void fb_step_penalties(struct fb_candidates *c, const struct fb_sample_request *request);
void fb_step_dry(struct fb_candidates *c, const struct fb_sample_request *request);
void fb_step_temperature(struct fb_candidates *c, double temperature);

/* The distinct tokens that penalties change, with count[token] (of vocab_size), how often each occurs in the
 * window; and those that DRY changes, with longest[token], minus the length of the repetition. Both return
 * how many. */
int32_t fb_list_penalties(const struct fb_sample_request *request, int32_t *count, int32_t *list);
int32_t fb_list_dry(const struct fb_sample_request *request, int32_t *longest, int32_t *match, int32_t *list);
double fb_dry_loss(const struct fb_sampling *settings, int32_t length);

/* Steps that drop candidates; each keeps at least one. */
enum fb_status fb_step_top_k(struct fb_candidates *c, int32_t k);
enum fb_status fb_step_top_p(struct fb_candidates *c, double p);
enum fb_status fb_step_typical_p(struct fb_candidates *c, double p);
enum fb_status fb_step_min_p(struct fb_candidates *c, double p);
enum fb_status fb_step_xtc(struct fb_candidates *c, double threshold);

/* Philox 4x32-10 on any counter and key. */
void fb_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* Uniform number in [0, 1): the upper 53 bits of words 0 and 1 of fb_random, times 2^-53. */
double fb_uniform(uint64_t seed, uint64_t position, uint32_t stream);

#endif
