/*
 * program.h - programs and page pools on an NVIDIA GPU.
 *
 * A device program is made from a program of the library, whose checks and plan of buffers it takes over; it runs the operators one
 * after the other on one stream. Weights are copied to the GPU once, byte for byte. Nothing here is public yet.
 */
#ifndef FABULA_CUDA_PROGRAM_H
#define FABULA_CUDA_PROGRAM_H

#include "fabula.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fb_cuda_pool fb_cuda_pool;
typedef struct fb_cuda_program fb_cuda_program;

/* As fb_page_pool_create and the functions behind it, in memory of the GPU. A page's bytes are those of a pool of the CPU. Calls
 * return when they are done. */
enum fb_status fb_cuda_pool_create(enum fb_dtype k_dtype, enum fb_dtype v_dtype, int32_t n_pages, int32_t n_layers,
    int32_t n_kv_heads, int32_t head_dim, fb_cuda_pool **out);
void fb_cuda_pool_free(fb_cuda_pool *pool);
size_t fb_cuda_page_bytes(const fb_cuda_pool *pool);
enum fb_status fb_cuda_page_copy(fb_cuda_pool *pool, int32_t dst, int32_t src);
enum fb_status fb_cuda_page_zero(fb_cuda_pool *pool, int32_t page);
enum fb_status fb_cuda_page_read(const fb_cuda_pool *pool, int32_t page, void *dst, size_t n_bytes);
enum fb_status fb_cuda_page_write(fb_cuda_pool *pool, int32_t page, const void *src, size_t n_bytes);

/* `program` must outlive the result; its weights need not, once this has returned. */
enum fb_status fb_cuda_program_create(const fb_program *program, fb_cuda_program **out);
void fb_cuda_program_free(fb_cuda_program *program);
size_t fb_cuda_program_bytes(const fb_cuda_program *program); /* of the GPU's memory, weights included */

/* As fb_program_run. If memory for a larger batch is refused, program and pool are as they were; after any other failure of the GPU
 * the batch's positions hold nothing of use. */
enum fb_status fb_cuda_program_run(
    fb_cuda_program *program, fb_cuda_pool *pool, const struct fb_batch *batch, float *logits, size_t n_logits);

#ifdef __cplusplus
}
#endif
#endif
