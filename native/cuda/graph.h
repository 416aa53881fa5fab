/*
 * graph.h - steps of one token a sequence as CUDA graphs: recorded once for each size, then one launch each.
 *
 * Sizes are rounded up, so that a few graphs serve all batches. Rows beyond the real ones belong to a sequence of no tokens: they are
 * computed like any row, write no K and V, and nobody reads their results. All that changes between steps lies in device memory
 * (fb_cuda_description), at places that the size alone decides; what a graph holds besides is part of its key.
 *
 * A size that comes for the first time is launched operator by operator, which also loads its kernels: that may have to wait for the
 * GPU, and nothing may while a stream records. The second time records. Whatever fails on the way costs the graph, never the step.
 * A recording that another thread breaks, with a call that waits for the whole GPU (of cuBLASLt, or of another library of the process), is
 * begun again the next time the size comes.
 */
#ifndef FABULA_CUDA_GRAPH_H
#define FABULA_CUDA_GRAPH_H

#include "kernels.h"
#include "runtime.h"

enum {
    FB_CUDA_GRAPH_TOKENS = 256, /* of a step; for more, launches hide behind the work */
    FB_CUDA_MOST_GRAPHS = 32,   /* of a program: two for every doubling of a batch, its outputs or the longest past */
    FB_CUDA_MOST_BROKEN = 3     /* recordings of a step that may be broken; then it is refused */
};

/* Rows that a batch's launches work on. */
struct fb_cuda_extent {
    int32_t n_tokens, n_outputs;
    bool is_rounded; /* the step may be a graph */
};

/* Everything in the launches of a rounded step that is no content of device memory. */
struct fb_cuda_graph_key {
    int32_t n_tokens, n_outputs, n_parts;
    struct fb_cuda_pages pages;
    const void *inputs, *outputs, *partials, *dequantized;
};

struct fb_cuda_graph {
    struct fb_cuda_graph_key key;
    cudaGraphExec_t launchable; /* NULL: not recorded */
    bool is_refused;            /* nor will it be */
    int32_t n_broken;           /* recordings that were broken */
    int64_t last_used;
};

struct fb_cuda_graphs {
    struct fb_cuda_graph all[FB_CUDA_MOST_GRAPHS];
    int32_t n;
    int64_t n_steps; /* the clock of last_used */
    struct fb_graph_info info;
};

struct fb_cuda_program;
struct fb_cuda_step;

/* n of {1, 2, 3, 4, 6, 8, 12, 16, 24, ...}, or 0: at most half more than asked for. */
int32_t fb_cuda_round_up(int32_t n);

struct fb_cuda_extent fb_cuda_extent_of(const struct fb_cuda_program *p, const struct fb_batch *batch);

/* Puts a step's operators on the stream, as a graph or one by one. */
enum fb_status fb_cuda_run_step(struct fb_cuda_program *p, struct fb_cuda_step *step);

void fb_cuda_drop_graphs(struct fb_cuda_graphs *graphs);

/* As the table of base/device.h has them. */
void fb_cuda_set_graphs(void *program, bool is_on);
void fb_cuda_graph_info(const void *program, struct fb_graph_info *out);

#endif
