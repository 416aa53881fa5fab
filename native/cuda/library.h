/*
 * library.h - products with cuBLASLt, which is loaded on request and is not part of this library.
 *
 * Its order of sums depends on the number of tokens, so results no longer have the same bits in every batch.
 */
#ifndef FABULA_CUDA_LIBRARY_H
#define FABULA_CUDA_LIBRARY_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Tokens from which dequantizing a weight for the library pays off. */
enum { FB_CUDA_LIBRARY_TOKENS = 128 };

struct fb_cuda_functions; /* of the loaded library */
struct fb_cuda_library;   /* a handle of it, for one stream at a time */

/* Loads the library from `path`, or from the system's search path if that is NULL. FB_UNSUPPORTED if it is
 * missing or this build lacks its header. It stays loaded; free() releases the table. */
enum fb_status fb_cuda_functions_load(const char *path, struct fb_cuda_functions **out);

enum fb_status fb_cuda_library_create(const struct fb_cuda_functions *functions, struct fb_cuda_library **out);
void fb_cuda_library_free(struct fb_cuda_library *library);

/* Workspace that a product may use. */
enum { FB_CUDA_WORKSPACE_BYTES = 32 << 20 };

/* out[t][r] = sum of weights[r][k] * inputs[t][k]; weights [n_rows][n_cols], inputs [n_tokens][n_cols], out
 * [n_tokens][n_rows] in f32. n_cols is a multiple of 8, and all arrays are aligned to 256 bytes. */
struct fb_cuda_matrices {
    enum fb_dtype dtype; /* FB_F16 or FB_BF16 */
    int32_t n_rows, n_tokens, n_cols;
    const uint16_t *weights, *inputs;
    float *out;
    void *workspace;
};
enum fb_status fb_cuda_library_multiply(
    struct fb_cuda_library *library, const struct fb_cuda_matrices *matrices, fb_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
