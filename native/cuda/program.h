/*
 * program.h - a program of the library on an NVIDIA GPU, whose checks and plan of buffers it takes over.
 *
 *     devices.c   GPUs and their memory: the table of functions that the library knows this folder by
 *     program.c   what a program needs on the GPU
 *     batch.c     what describes a batch there, and which way its attention goes
 *     product.c   products, by kernels of this library or by cuBLASLt
 *     run.c       other operators as launches on one stream
 *     results.c   drawing, and the results' way back
 *     graph.c     those launches recorded and replayed as one
 *     group.c     programs of several GPUs, which compute one batch together
 *     exchange.c  NCCL, the library that moves what they exchange
 */
#ifndef FABULA_CUDA_PROGRAM_H
#define FABULA_CUDA_PROGRAM_H

#include "graph.h"
#include "kernels.h"
#include "library.h"
#include "program/program.h"
#include "runtime.h"

/* Memory that grows with the batches; `host` is pinned, where there is one. */
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
    char *fixed;                    /* all of the following, which lie on the GPU */
    size_t n_fixed_bytes;
    float *vectors, *inv_freq, *arena, *cos_sin, *sink_rotations;
    void *rounded;                  /* inputs of the product that comes next, in 16 bits; see fb_cuda_round */
    int32_t rounded_from;           /* the buffer whose numbers these are; -1 for none */
    struct fb_cuda_inputs inputs16; /* and how they lie */
    int32_t *non_finite;
    int32_t *non_finite_here;        /* pinned */
    struct fb_cuda_growing inputs;   /* what describes a batch */
    struct fb_cuda_growing outputs;  /* logits, on the GPU only */
    struct fb_cuda_growing partials; /* of attention, on the GPU only */
    struct fb_cuda_growing plans;    /* of draws, and the logits that they change */
    struct fb_cuda_growing drawn;    /* tokens and log-probabilities */
    struct fb_cuda_growing scratch;  /* of draws, on the GPU only */
    struct fb_cuda_graphs graphs;
    struct fb_cuda_growing gathered; /* what the GPUs of a group have computed, on the GPU only */
    struct fb_cuda_library *library; /* NULL unless products of many tokens go there */
    struct fb_cuda_growing dequantized;   /* what such products take, on the GPU only */
};

/* Where the parts of a batch's description lie, in bytes, and pointers to them on the GPU. */
struct fb_cuda_description {
    size_t tokens, positions, owners, outputs, sequences, pages, tiles, n_bytes;
    struct fb_cuda_extent rows;
    struct fb_cuda_batch batch;
    const struct fb_cuda_tile *device_tiles;
    const int32_t *device_outputs;
    int32_t n_tiles, tile_rows;
    int32_t n_parts; /* of the longest tile when attention is split, 0 when it is not */
};

/* A batch on its way through a program's operators. */
struct fb_cuda_step {
    struct fb_cuda_description d;
    struct fb_cuda_pages pages;
    float *logits;  /* where the last operator writes */
    int32_t n_rows; /* that operators work on now */
    int32_t next_op;
};

static inline float *fb_cuda_buffer(const struct fb_cuda_program *p, int32_t number) {
    return p->arena + p->program->buffers[number].offset;
}

/* A vector of an operator, where it lies on the GPU. */
static inline const float *fb_cuda_vector(const struct fb_cuda_program *p, const float *vector) {
    return vector ? p->vectors + (vector - p->program->vectors) : NULL;
}

/* As the table of base/device.h has them. */
bool fb_cuda_runs(enum fb_op_kind kind);
enum fb_status fb_cuda_program_create(const fb_program *program, void **out);
void fb_cuda_program_free(void *program);
enum fb_status fb_cuda_program_run(
    void *program, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results);

enum fb_status fb_cuda_group_open(const int32_t *indices, int32_t n, void **out);
void fb_cuda_group_close(void *group);
enum fb_status fb_cuda_group_run(void *group, fb_program *const *parts, fb_page_pool *const *pools, int32_t n_results,
    const struct fb_batch *batch, const struct fb_results *results);

/* The steps of a run, in this order. Results are rows of `width` numbers in p->outputs. fb_cuda_launch goes up to a sum over GPUs or the end;
 * it takes no memory, for a stream may be recording. What is drawn goes to pinned memory, logits to the caller's: a copy there may
 * wait for all that comes before it, and no other step waits for the GPU. Results are taken when all is done. */
enum fb_status fb_cuda_make_room(
    struct fb_cuda_program *p, int32_t width, int32_t n_rows, const struct fb_results *results);
enum fb_status fb_cuda_begin(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    struct fb_cuda_extent rows, struct fb_cuda_step *step);
enum fb_status fb_cuda_launch(struct fb_cuda_program *p, struct fb_cuda_step *step);
enum fb_status fb_cuda_send_drawn(struct fb_cuda_program *p, const struct fb_results *results);
enum fb_status fb_cuda_send_logits(
    struct fb_cuda_program *p, int32_t width, int32_t n_rows, const struct fb_results *results);
enum fb_status fb_cuda_take_results(const struct fb_cuda_program *p, const struct fb_results *results);

/* At least so many bytes; takes new memory before it gives up the old, so that a refusal changes nothing. */
enum fb_status fb_cuda_grow(struct fb_cuda_program *p, struct fb_cuda_growing *memory, size_t n_bytes, bool has_host);

/* Bytes of inputs in 16 bits, for the product that takes most. */
size_t fb_cuda_rounded_bytes(const struct fb_cuda_program *p);

/* Takes memory for the products of a batch. */
enum fb_status fb_cuda_prepare_products(struct fb_cuda_program *p, int32_t n_tokens, int32_t n_outputs);

/* A product of n_rows tokens or outputs; logits go to `logits`. */
/* A norm of rows; what the product behind it takes of the result is then there, too. Returns an error of the launch. */
int fb_cuda_run_norm(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows);
enum fb_status fb_cuda_run_product(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows, float *logits);

/* Bytes rounded up to where the next part of an allocation begins. */
size_t fb_cuda_aligned(size_t n_bytes);

/* Takes memory for the batch's description, of so many rows, and writes it; the copy to the GPU is only begun. */
enum fb_status fb_cuda_describe(
    struct fb_cuda_program *p, const struct fb_batch *batch, struct fb_cuda_extent rows, struct fb_cuda_description *d);

/* Parts that tiles of a split attention have at most, in a layer with this window. */
int32_t fb_cuda_parts_within(const struct fb_cuda_description *d, int32_t window);

#endif
