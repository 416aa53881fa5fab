/* sums.cu - combines the results of several GPUs. Contracts are in kernels.h. */
#include "device.h"
#include "kernels.h"

enum { SUM_THREADS = 256 };

/* A thread takes a number. Parts are added in the order of the GPUs, the same for every number and batch. */
static __global__ void sum_kernel(
    fb_cuda_parts parts, int32_t n_cols, const float *residual, int64_t ld_residual, float *out, int64_t ld_out) {
    const int64_t row = (int64_t)blockIdx.x;
    const int32_t column = (int32_t)(blockIdx.y * SUM_THREADS + threadIdx.x);
    if (column >= n_cols) return;
    const float *from = parts.parts + row * parts.ld + column;
    float sum = from[0];
    for (int32_t i = 1; i < parts.n_parts; i++)
        sum += from[i * parts.part_floats];
    if (residual) sum += residual[row * ld_residual + column];
    out[row * ld_out + column] = sum;
}

static dim3 grid_of(int32_t n_rows, int32_t n_cols) {
    return dim3((unsigned)n_rows, (unsigned)((n_cols + SUM_THREADS - 1) / SUM_THREADS));
}

int fb_cuda_sum(const struct fb_cuda_parts *parts, int32_t n_rows, int32_t n_cols, const float *residual,
    int64_t ld_residual, float *out, int64_t ld_out, fb_cuda_stream stream) {
    return fb_launch(sum_kernel, grid_of(n_rows, n_cols), SUM_THREADS, 0, stream, *parts, n_cols, residual, ld_residual,
        out, ld_out);
}

static __global__ void concatenate_kernel(fb_cuda_parts parts, int32_t n_cols, float *out, int32_t *non_finite) {
    const int64_t row = (int64_t)blockIdx.x;
    const int64_t column = (int64_t)blockIdx.y * SUM_THREADS + threadIdx.x;
    if (column >= n_cols) return;
    const int64_t part = column / parts.ld, first = part * parts.ld, last = n_cols - parts.ld;
    const float value = parts.parts[part * parts.part_floats + row * parts.ld + column - (first < last ? first : last)];
    if (!fb_is_finite(value)) *non_finite = 1;
    out[row * n_cols + column] = value;
}

int fb_cuda_concatenate(const struct fb_cuda_parts *parts, int32_t n_rows, int32_t n_cols, float *out,
    int32_t *non_finite, fb_cuda_stream stream) {
    return fb_launch(
        concatenate_kernel, grid_of(n_rows, n_cols), SUM_THREADS, 0, stream, *parts, n_cols, out, non_finite);
}
