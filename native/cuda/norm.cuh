/* norm.cuh - RMS norm of a row by a block of threads. */
#ifndef FABULA_CUDA_NORM_CUH
#define FABULA_CUDA_NORM_CUH

#include "powers.cuh"

/* y = x / sqrt(mean(x^2) + eps) * weight; y may be x. */
FB_DEVICE void fb_norm_row(const float *x, const float *weight, int32_t n, float eps, float *y) {
    FB_SHARED(float, sums, FB_ROW_WARPS);
    const int32_t thread = (int32_t)threadIdx.x;
    float sum = 0.0f;
    for (int32_t i = thread; i < n; i += FB_ROW_THREADS)
        sum = fmaf(x[i], x[i], sum);
    sum = fb_warp_sum(sum);
    if (thread % FB_WARP == 0) sums[thread / FB_WARP] = sum;
    __syncthreads();
    sum = sums[0];
    for (int w = 1; w < FB_ROW_WARPS; w++)
        sum += sums[w];
    const float factor = 1.0f / sqrtf(sum / (float)n + eps);
    for (int32_t i = thread; i < n; i += FB_ROW_THREADS)
        y[i] = x[i] * factor * weight[i];
}

#endif
