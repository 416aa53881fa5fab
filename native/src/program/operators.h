/*
 * operators.h - every operator kind is one row of one table.
 *
 * Checking a program, cutting it into stages, choosing threads and running it use this table; none of them
 * knows a kind by name. To add an operator: its number in fabula.h, its row in operators.c, its kernel
 * (reference and SIMD), a method of models/builder.py and a test. A device that runs it has a row of its own
 * (native/cuda/run.c); one that does not refuses the program with the operator's name.
 */
#ifndef FABULA_PROGRAM_OPERATORS_H
#define FABULA_PROGRAM_OPERATORS_H

#include "program/program.h"

struct fb_run;
struct fb_worker;

/* Where in a program the kind is allowed, and what it does to its buffers. */
enum {
    FB_READS = 1 << 0,          /* reads buffer `in` */
    FB_WRITES = 1 << 1,         /* writes buffer `out`; without this flag `out` must be -1 */
    FB_IN_PLACE = 1 << 2,       /* `out` may be `in` */
    FB_WEIGHT = 1 << 3,         /* needs `weight` */
    FB_RESIDUAL = 1 << 4,       /* may read buffer `residual` */
    FB_COLUMNS = 1 << 5,        /* fills as many columns as its weight has rows, from `column` on; others all */
    FB_FIRST = 1 << 6,          /* a program begins with it */
    FB_LAST = 1 << 7,           /* the last operator, and only that */
    FB_GATHERS = 1 << 8,        /* from here on a row is a wanted output, not a token */
    FB_OF_TOKENS = 1 << 9,      /* only before outputs are gathered */
    FB_OF_OUTPUTS = 1 << 10,    /* only after outputs are gathered */
    FB_HEADS = 1 << 11,         /* `in` holds heads of geometry `heads` */
    FB_LAYER = 1 << 12,         /* has a `layer` */
    FB_NORM = 1 << 13,          /* has an `eps`; without residual, the next products may take it into their stage */
    FB_GATED = 1 << 14,         /* a product whose weight interleaves gate and up by panels */
    FB_SPANS_DEVICES = 1 << 15, /* combines the results of several devices: only in parts of a joined program */
    FB_SECOND = 1 << 16,        /* second input: columns of `residual` from `column` on, or `vector` */
    FB_POSITIONS = 1 << 17,     /* its weight has a row for each position that a token may have */
    FB_SCALED = 1 << 18,        /* multiplies by `scale`, which must not be 0 */
    FB_FACTORS = 1 << 19,       /* reads buffer `factors`, or `vector` in its place */
    FB_ROUTES = 1 << 20,        /* chooses experts: steps of few rows may leave it to its readers */
    FB_ROUTED = 1 << 21,        /* `factors` are a router's result; takes a weight of several experts */
    FB_STATE = 1 << 22,         /* recurrent: has a `layer` of the state pool for itself */
    FB_COLUMN_IN = 1 << 23,     /* reads columns of `in`, from `column` on */
    FB_GATES = 1 << 24,         /* reads columns of `factors`, from `column` on */
    FB_OF_EACH_HEAD = 1 << 25   /* takes a weight of a matrix for each head */
};

/* An operator that is being checked. */
struct fb_check {
    const struct fb_program *program;
    const struct fb_op *op;
    int32_t index;    /* of the operator */
    int32_t in_width; /* of buffer `in`; 0 if it reads none */
    int32_t out_width;
    bool has_kv; /* FB_HEADS: `in` holds k and v heads behind those of q */
};

struct fb_operator {
    const char *name;
    uint32_t flags;
    enum fb_stage_kind stage; /* how it is divided into work items */

    /* Checks the fields that only this kind uses; NULL for none. */
    enum fb_status (*check)(const struct fb_check *check);

    /* The width that `out` must have; NULL if `check` or `column` decides. */
    int32_t (*width)(const struct fb_check *check);

    /* FB_STAGE_ROWS: computes one row on the CPU; NULL if only devices run it. The other stages have one function for
     * all kinds. */
    void (*run_row)(const struct fb_run *run, const struct fb_op *op, size_t row);

    /* FB_STATE, all of FB_STAGE_STATES: numbers of the operator's layer of the state pool, and of a thread's scratch
     * memory; work items, and one of them. */
    int64_t (*state_floats)(const struct fb_op *op);
    size_t (*scratch_floats)(const struct fb_op *op);
    int64_t (*n_items)(const struct fb_run *run, const struct fb_op *op, int n_threads);
    void (*run_item)(const struct fb_run *run, const struct fb_op *op, int64_t item, const struct fb_worker *worker);

    /* Multiply-adds of a batch; NULL if negligible. */
    int64_t (*work)(const struct fb_program *program, const struct fb_op *op, const struct fb_batch *batch);

    /* Fusion into attention (struct fb_raw_heads). head_step: the kind's position, from 1, in the order in which
     * attention finishes a head; 0 if it cannot be fused. defer_head: records what attention must do. */
    int32_t head_step;
    void (*defer_head)(const struct fb_program *program, const struct fb_op *op, struct fb_raw_heads *raw);
};

/* The last head_step: afterwards a head is finished, and its K and V are in their pages. */
enum { FB_HEAD_IS_WRITTEN = 3 };

/* The row of a kind, NULL for an unknown number. */
const struct fb_operator *fb_operator_of(enum fb_op_kind kind);

static inline bool fb_op_is(const struct fb_op *op, uint32_t flag) {
    return (fb_operator_of(op->kind)->flags & flag) != 0;
}

/* Whether an activation needs more than its input. */
static inline bool fb_has_numbers(enum fb_activation_kind activation) {
    return activation == FB_ACTIVATION_CLAMP || activation == FB_ACTIVATION_XIELU ||
           activation == FB_ACTIVATION_CLAMPED_SILU;
}

/* Whether an operator reads a buffer. */
static inline bool fb_op_reads(const struct fb_op *op, int32_t buffer) {
    return op->in == buffer || op->residual == buffer ||
           (fb_op_is(op, FB_FACTORS | FB_ROUTED | FB_GATES) && op->factors == buffer);
}

/* Checks operator `index` of p->ops and records in p->buffers what it reads and writes; `gathered`: whether outputs
 * were gathered before it. */
enum fb_status fb_check_op(struct fb_program *p, int32_t index, bool *gathered);

#endif
