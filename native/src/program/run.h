/* run.h - one step: what the threads of a parallel region share. See program.h. */
#ifndef FABULA_PROGRAM_RUN_H
#define FABULA_PROGRAM_RUN_H

#include "program/program.h"

struct fb_run {
    struct fb_program *program;
    const struct fb_batch *batch;
    fb_page_pool *pool;
    float *logits;
    atomic_int non_finite;
    int64_t left_ns; /* when thread 0 finished; it then waits for the end of the region */
    struct fb_barrier barrier;
};

static inline float *fb_row_of(const struct fb_program *p, int32_t buffer, size_t row) {
    return p->buffers[buffer].data + row * p->buffers[buffer].stride;
}

/* A thread in the stage that it runs. */
struct fb_worker {
    struct fb_counter *counters; /* [2][n_threads] of the stage */
    int thread, n_threads;
};

static inline struct fb_items fb_worker_items(const struct fb_worker *worker, int which, int64_t n_items) {
    return fb_items_of(worker->counters + which * worker->n_threads, n_items, worker->thread, worker->n_threads);
}

/* A stage of FB_STAGE_EXPERTS. In experts.c. */
void fb_run_experts(struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows);

/* A stage of FB_STAGE_HEADS. In heads.c. */
void fb_run_heads(struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows);
/* A stage of FB_STAGE_STATES. In states.c. */
void fb_run_states(const struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker);

/* Operators of FB_STAGE_ROWS, each on one row. In rows.c. */
void fb_embed_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_embed_position_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_scale_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_multiply_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_add_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_mix_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_match_rms_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_sparsify_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_head_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_rope_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_kv_write_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_gather_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_gated_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row);
void fb_router_row(const struct fb_run *run, const struct fb_op *op, size_t row);

/* The norm of one row x [width], without residual. */
void fb_apply_norm(const struct fb_kernels *kernels, const struct fb_op *op, const float *x, size_t width, float *out);

#endif
