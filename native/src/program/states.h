/*
 * states.h - recurrent operators: what the rows of the table (operators.c) point to, and an item's way through the
 * tokens of its sequence.
 *
 * A work item owns a part of a sequence's state, some columns or some lanes of a head, and computes all tokens of the
 * step for it, tile by tile. It reads its part from slot state_in and writes it to state_out, and behind each token of
 * `keeps` to that slot as well. Parts never depend on each other, so how a step is cut into items does not change a bit.
 */
#ifndef FABULA_PROGRAM_STATES_H
#define FABULA_PROGRAM_STATES_H

#include "program/operators.h"
#include "program/run.h"

/* Tokens that an item prepares at a time: their inputs stay in L1. */
enum { FB_TILE_TOKENS = 16 };

struct fb_tiles {
    const struct fb_sequence *sequence;
    int32_t begin, n_tokens; /* of the present tile; zeros before the first */
    int32_t keep;            /* the next of the sequence's keeps */
};

/* Goes on to the next tile, which ends at the next keep at the latest; false behind the last token. */
bool fb_next_tile(struct fb_tiles *tiles);

/* The slot that the state behind the present tile is kept in; -1 for none. To be called once a tile. */
int32_t fb_kept_slot(struct fb_tiles *tiles);

/* The operator's numbers in a slot; NULL for slot -1. */
static inline float *fb_state_of(const struct fb_run *run, const struct fb_op *op, int32_t slot) {
    return fb_state_at(run->batch->states, slot, op->layer);
}

static inline float *fb_state_scratch(const struct fb_program *p, int thread) {
    return p->state_scratch + (size_t)thread * p->state_scratch_floats;
}

/* Checks the layer of the state pool and takes it for the operator. */
enum fb_status fb_check_state_layer(const struct fb_check *c);

/* As in struct fb_operator: SHORT_CONV, in states.c. */
enum fb_status fb_check_conv(const struct fb_check *c);
int64_t fb_conv_floats(const struct fb_op *op);
size_t fb_conv_scratch(const struct fb_op *op);
int64_t fb_conv_items(const struct fb_run *run, const struct fb_op *op, int n_threads);
void fb_conv_item(const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker);
int64_t fb_conv_work(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch);

/* DELTA_RULE and SSM, in recurrences.c. */
enum fb_status fb_check_delta_rule(const struct fb_check *c);
enum fb_status fb_check_ssm(const struct fb_check *c);
int64_t fb_matrix_floats(const struct fb_op *op);
size_t fb_delta_rule_scratch(const struct fb_op *op);
size_t fb_ssm_scratch(const struct fb_op *op);
int64_t fb_matrix_items(const struct fb_run *run, const struct fb_op *op, int n_threads);
void fb_delta_rule_item(
    const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker);
void fb_ssm_item(const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker);
int64_t fb_delta_rule_work(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch);
int64_t fb_ssm_work(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch);

#endif
