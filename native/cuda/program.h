/*
 * program.h - a program of the library on an NVIDIA GPU, whose checks and plan of buffers it takes over.
 *
 *     devices.c   GPUs and their memory: the table of functions that the library knows this folder by
 *     program.c   what a program needs on the GPU
 *     batch.c     what describes a batch there, and which way its attention goes
 *     product.c   products, by kernels of this library or by cuBLASLt
 *     run.c       other operators as launches on one stream, and the results' way back
 */
#ifndef FABULA_CUDA_PROGRAM_H
#define FABULA_CUDA_PROGRAM_H

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
    float *vectors, *inv_freq, *arena, *cos_sin, *sink_turns;
    void *rounded;                  /* inputs of the product that comes next, in 16 bits; see fb_cuda_round */
    int32_t rounded_from;           /* the buffer whose numbers these are; -1 for none */
    struct fb_cuda_inputs inputs16; /* and how they lie */
    int32_t *non_finite;
    int32_t *non_finite_here;        /* pinned */
    struct fb_cuda_growing inputs;   /* what describes a batch */
    struct fb_cuda_growing outputs;  /* logits, on the GPU only */
    struct fb_cuda_growing partials; /* of attention, on the GPU only */
    struct fb_cuda_growing drawn;    /* tokens, log-probabilities and damage of rows */
    struct fb_cuda_library *library; /* NULL unless products of many tokens go there */
    struct fb_cuda_growing opened;   /* what such products take, on the GPU only */
};

/* Where the parts of a batch's description lie, in bytes, and pointers to them on the GPU. */
struct fb_cuda_description {
    size_t tokens, positions, owners, outputs, sequences, pages, tiles, n_bytes;
    struct fb_cuda_batch batch;
    const struct fb_cuda_tile *device_tiles;
    const int32_t *device_outputs;
    int32_t n_tiles, tile_rows;
    bool is_split;
};

static inline float *fb_cuda_buffer(const struct fb_cuda_program *p, int32_t number) {
    return p->arena + p->program->buffers[number].offset;
}

/* A vector of an operator, where it lies on the GPU. */
static inline const float *fb_cuda_vector(const struct fb_cuda_program *p, const float *vector) {
    return vector ? p->vectors + (vector - p->program->vectors) : NULL;
}

/* As the table of base/device.h has them. */
enum fb_status fb_cuda_program_create(const fb_program *program, void **out);
void fb_cuda_program_free(void *program);
enum fb_status fb_cuda_program_run(
    void *program, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results);

/* At least so many bytes; takes new memory before it gives up the old, so that a refusal changes nothing. */
enum fb_status fb_cuda_grow(struct fb_cuda_program *p, struct fb_cuda_growing *memory, size_t n_bytes, bool has_host);

/* Bytes of inputs in 16 bits, for the product that takes most. */
size_t fb_cuda_rounded_bytes(const struct fb_cuda_program *p);

/* Takes memory for the products of a batch. */
enum fb_status fb_cuda_prepare_products(struct fb_cuda_program *p, int32_t n_tokens, int32_t n_outputs);

/* A product of n_rows tokens or outputs; logits go to `logits`. */
enum fb_status fb_cuda_run_product(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows, float *logits);

/* Bytes rounded up to where the next part of an allocation begins. */
size_t fb_cuda_aligned(size_t n_bytes);

/* Takes memory for the batch's description and writes it; the copy to the GPU is only begun. */
enum fb_status fb_cuda_describe(struct fb_cuda_program *p, const struct fb_batch *batch, struct fb_cuda_description *d);

/* Floats of partial results that an attention takes, and parts of its longest tile (`out->n_parts`). */
size_t fb_cuda_partials_of(const struct fb_program *program, const struct fb_cuda_sequence *sequences,
    int32_t n_sequences, int32_t window, int32_t tile_rows, struct fb_cuda_attention *out);

#endif
