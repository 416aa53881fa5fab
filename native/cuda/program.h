/*
 * program.h - a program on an NVIDIA GPU. The library checks it and plans its buffers.
 *
 *     devices.c   GPUs and their memory: the table of functions for base/device.h
 *     program.c   creates the GPU part of a program
 *     batch.c     the description of a batch, and how its attention is divided
 *     product.c   products, with this library's kernels or with cuBLASLt
 *     run.c       launches the operators on one stream
 *     results.c   samples, and copies results to the host
 *     graph.c     records and replays those launches as CUDA graphs
 *     group.c     programs of several GPUs that compute one batch together
 *     exchange.c  loads NCCL, which moves data between them
 */
#ifndef FABULA_CUDA_PROGRAM_H
#define FABULA_CUDA_PROGRAM_H

#include "graph.h"
#include "kernels.h"
#include "library.h"
#include "program/program.h"
#include "runtime.h"

/* Memory that grows with the batches; `host` is pinned, if there is one. */
struct fb_cuda_growing {
    char *device, *host;
    size_t n_bytes;
};

struct fb_cuda_program {
    const fb_program *program;
    fb_device *device;
    cudaStream_t stream;
    int32_t n_processors, compute_major;
    struct fb_cuda_weight *weights; /* [n_ops] */
    char *fixed;                    /* allocation of all of the following, on the GPU */
    size_t n_fixed_bytes;
    float *vectors, *inv_freq, *arena, *cos_sin, *sink_rotations;
    void *rounded;                  /* inputs of the next product, in 16 bits; see fb_cuda_round */
    int32_t rounded_from;           /* the buffer they were rounded from; -1 for none */
    struct fb_cuda_inputs inputs16; /* their layout */
    int32_t *non_finite;
    int32_t *host_non_finite;        /* pinned host copy */
    struct fb_cuda_growing inputs;   /* description of a batch */
    struct fb_cuda_growing outputs;  /* logits, on the GPU only */
    struct fb_cuda_growing partials; /* of attention, on the GPU only */
    struct fb_cuda_growing plans;    /* of sampling, and the logit changes */
    struct fb_cuda_growing sampled;  /* sampled tokens and log-probabilities */
    struct fb_cuda_growing scratch;  /* of sampling, on the GPU only */
    struct fb_cuda_graphs graphs;
    struct fb_cuda_growing gathered;    /* partial results of a group's GPUs, on the GPU only */
    struct fb_cuda_library *library;    /* NULL unless products of many tokens use it */
    struct fb_cuda_growing dequantized; /* memory of such products, on the GPU only */
};

/* Byte offsets of the parts of a batch's description, and pointers to them on the GPU. */
struct fb_cuda_description {
    size_t tokens, positions, owners, outputs, sequences, pages, tiles, n_bytes;
    struct fb_cuda_extent rows;
    struct fb_cuda_batch batch;
    const struct fb_cuda_tile *device_tiles;
    const int32_t *device_outputs;
    int32_t n_tiles, tile_rows;
    int32_t n_parts; /* parts of the longest tile if attention is split, otherwise 0 */
};

/* A batch in progress. */
struct fb_cuda_step {
    struct fb_cuda_description d;
    struct fb_cuda_pages pages;
    float *logits;  /* where the last operator writes */
    int32_t n_rows; /* rows that operators compute now */
    int32_t next_op;
};

static inline float *fb_cuda_buffer(const struct fb_cuda_program *p, int32_t number) {
    return p->arena + p->program->buffers[number].offset;
}

/* All layers have the same heads, and their positions are encoded by one rope table (fb_cuda_lacks). */
static inline const struct fb_heads *fb_cuda_heads_of(const fb_program *program) {
    return &program->shape.heads[0];
}

static inline int32_t fb_cuda_rotary_dim(const fb_program *program) {
    return 2 * program->shape.ropes[0].n_pairs;
}

/* Address of an operator's vector on the GPU. */
static inline const float *fb_cuda_vector(const struct fb_cuda_program *p, const float *vector) {
    return vector ? p->vectors + (vector - p->program->vectors) : NULL;
}

/* The functions of that name in fb_device_kind (base/device.h). */
const char *fb_cuda_lacks(const fb_program *program, const struct fb_op *op);
enum fb_status fb_cuda_program_create(const fb_program *program, void **out);
void fb_cuda_program_free(void *program);
enum fb_status fb_cuda_program_run(
    void *program, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results);

enum fb_status fb_cuda_group_open(const int32_t *indices, int32_t n, void **out);
void fb_cuda_group_close(void *group);
enum fb_status fb_cuda_group_run(void *group, fb_program *const *parts, fb_page_pool *const *pools, int32_t n_results,
    const struct fb_batch *batch, const struct fb_results *results);

/* The phases of a run, in this order. Results are rows of `width` numbers in p->outputs. fb_cuda_launch stops
 * at a sum over GPUs or at the end; it allocates nothing, because the stream may be recording. Sampled tokens
 * are copied to pinned memory, logits to the caller's: such a copy may wait for all work before it; no other
 * phase waits for the GPU. fb_cuda_take_results is called when all is done. */
enum fb_status fb_cuda_reserve_results(
    struct fb_cuda_program *p, int32_t width, int32_t n_rows, const struct fb_results *results);
enum fb_status fb_cuda_begin(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    struct fb_cuda_extent rows, struct fb_cuda_step *step);
enum fb_status fb_cuda_launch(struct fb_cuda_program *p, struct fb_cuda_step *step);
enum fb_status fb_cuda_send_sampled(struct fb_cuda_program *p, const struct fb_results *results);
enum fb_status fb_cuda_send_logits(
    struct fb_cuda_program *p, int32_t width, int32_t n_rows, const struct fb_results *results);
enum fb_status fb_cuda_take_results(const struct fb_cuda_program *p, const struct fb_results *results);

/* Grows memory to at least n_bytes; allocates before it releases, so that a failure changes nothing. */
enum fb_status fb_cuda_grow(struct fb_cuda_program *p, struct fb_cuda_growing *memory, size_t n_bytes, bool has_host);

/* Bytes of inputs in 16 bits, for the product that needs most. */
size_t fb_cuda_rounded_bytes(const struct fb_cuda_program *p);

/* Allocates memory for the products of a batch. */
enum fb_status fb_cuda_reserve_products(struct fb_cuda_program *p, int32_t n_tokens, int32_t n_outputs);

/* A norm of rows; if the next product takes its result in 16 bits, rounds that too. Returns a
 * launch error. */
int fb_cuda_run_norm(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows);

/* A product of n_rows tokens or outputs; the last operator writes to `logits`. */
enum fb_status fb_cuda_run_product(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows, float *logits);

/* Rounds bytes up to the alignment of parts of an allocation. */
size_t fb_cuda_aligned(size_t n_bytes);

/* Allocates and writes a batch's description with so many rows; the copy to the GPU is only started. */
enum fb_status fb_cuda_describe(
    struct fb_cuda_program *p, const struct fb_batch *batch, struct fb_cuda_extent rows, struct fb_cuda_description *d);

/* The most parts that a tile of a split attention can have in a layer with this window. */
int32_t fb_cuda_parts_within(const struct fb_cuda_description *d, int32_t window);

#endif
