/*
 * sample_plan.h - everything about sampling a token that does not depend on logits: which steps of the chain
 * are not neutral, the tokens whose logits they change, the random numbers. A device that follows the plan as
 * ops/sample.c follows its chain samples the same token.
 */
#ifndef FABULA_OPS_SAMPLE_PLAN_H
#define FABULA_OPS_SAMPLE_PLAN_H

#include "fabula.h"

struct fb_sample_request;

/* One token whose logit a step changes. */
struct fb_sample_change {
    int32_t token;
    int32_t place; /* in the caller's list */
    double amount; /* bias, count for penalties, or loss for DRY */
};

struct fb_sample_plan {
    double factor; /* 1 / temperature */
    double repetition, frequency, presence;
    double top_p, typical_p, min_p, xtc_threshold;
    double uniform; /* selects the token */
    int32_t row;    /* of logits */
    int32_t top_k;
    /* Ranges in one array for all plans, one after another. Bias may list an id twice: ids ascend, and
     * entries of one id keep their order. The ids of penalties and DRY are distinct. */
    int32_t first_change, n_bias, n_penalties, n_dry;
    int32_t n_steps;
    uint8_t steps[FB_MAX_CHAIN]; /* enum fb_sampler; XTC only if its random number says so */
    bool is_greedy;              /* selects the highest logit after the steps, all of which change logits */
};

/* Grows as plans are made. */
struct fb_sample_changes {
    struct fb_sample_change *all;
    int32_t n, capacity;
};

/* work: scratch of fb_sample_work_bytes. FB_INVALID_ARGUMENT as in fb_sample; FB_OUT_OF_MEMORY. */
enum fb_status fb_plan_sample(
    const struct fb_sample_request *request, void *work, struct fb_sample_changes *changes, struct fb_sample_plan *out);

#endif
