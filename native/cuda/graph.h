/*
 * graph.h - decode steps (one token per sequence) as CUDA graphs: recorded once per size, then one launch
 * each.
 *
 * Sizes are rounded up, so that a few graphs serve all batches. The padding rows belong to a sequence without
 * tokens: they are computed like any row, write no K and V, and their results are not read. Everything that
 * changes between steps is in device memory (fb_cuda_description), at addresses that depend on the size
 * alone; everything else that a graph contains is part of its key.
 *
 * The first step of a size is launched operator by operator, which also loads its kernels: that may have to
 * wait for the GPU, and nothing may while a stream records. The second one is recorded. A failure costs the
 * graph, never the step. If another thread breaks a recording, with a call that waits for the whole GPU (by
 * cuBLASLt, or by another library of the process), the next step of that size records again.
 */
#ifndef FABULA_CUDA_GRAPH_H
#define FABULA_CUDA_GRAPH_H

#include "kernels.h"
#include "runtime.h"

enum {
    FB_CUDA_GRAPH_TOKENS = 256, /* per step; larger steps hide the cost of launches */
    FB_CUDA_MOST_GRAPHS = 32,   /* per program: two for every doubling of batch, outputs or longest past */
    FB_CUDA_MOST_BROKEN = 3     /* broken recordings of a step before it is refused */
};

/* Rows that a batch's launches compute. */
struct fb_cuda_extent {
    int32_t n_tokens, n_outputs;
    bool is_padded; /* rounded up: the step may be a graph */
};

/* Everything in the launches of a padded step that is not in device memory. */
struct fb_cuda_graph_key {
    int32_t n_tokens, n_outputs, n_parts;
    struct fb_cuda_pages pages;
    const void *inputs, *outputs, *partials, *dequantized;
};

struct fb_cuda_graph {
    struct fb_cuda_graph_key key;
    cudaGraphExec_t launchable; /* NULL: not recorded */
    bool is_refused;            /* will not be recorded either */
    int32_t n_broken;           /* broken recordings so far */
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

/* n rounded up to one of {0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...}: at most half more. */
int32_t fb_cuda_round_up(int32_t n);

struct fb_cuda_extent fb_cuda_extent_of(const struct fb_cuda_program *p, const struct fb_batch *batch);

/* Launches a step's operators on the stream, as a graph or one by one. */
enum fb_status fb_cuda_run_step(struct fb_cuda_program *p, struct fb_cuda_step *step);

void fb_cuda_drop_graphs(struct fb_cuda_graphs *graphs);

/* The functions of that name in fb_device_kind (base/device.h). */
void fb_cuda_set_graphs(void *program, bool is_on);
void fb_cuda_graph_info(const void *program, struct fb_graph_info *out);

#endif
