/*
 * sample_plan.h - a draw with all worked out that does not depend on logits: which steps of the chain have something to
 * do, the tokens whose logits they change, the random numbers. A device that goes through it as ops/sample.c goes
 * through its chain draws the same token.
 */
#ifndef FABULA_OPS_SAMPLE_PLAN_H
#define FABULA_OPS_SAMPLE_PLAN_H

#include "fabula.h"

struct fb_sample_request;

/* One token whose logit a step changes. */
struct fb_sample_change {
    int32_t token;
    int32_t place; /* in the caller's list */
    double amount; /* bias; how often penalties saw it; what DRY takes off */
};

struct fb_sample_plan {
    double factor; /* 1 / temperature */
    double repetition, frequency, presence;
    double top_p, typical_p, min_p, xtc_threshold;
    double uniform; /* picks the token */
    int32_t row;    /* of logits */
    int32_t top_k;
    /* In one array for all plans, one behind the other. Of the bias an id may stand twice: ids ascend, and entries of one keep
     * their order. The others are distinct. */
    int32_t first_change, n_bias, n_penalties, n_dry;
    int32_t n_steps;
    uint8_t steps[FB_MAX_CHAIN]; /* enum fb_sampler; XTC only if its coin fell that way */
    bool is_greedy;              /* the highest logit behind the steps, all of which change logits */
};

/* Grows as plans are made. */
struct fb_sample_changes {
    struct fb_sample_change *all;
    int32_t n, capacity;
};

/* work: scratch as fb_sample takes. FB_INVALID_ARGUMENT as fb_sample would say; FB_OUT_OF_MEMORY. */
enum fb_status fb_plan_sample(
    const struct fb_sample_request *request, void *work, struct fb_sample_changes *changes, struct fb_sample_plan *out);

#endif
