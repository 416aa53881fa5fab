/* powers.cuh - the power of two that scales a row of numbers to fit f16. */
#ifndef FABULA_CUDA_POWERS_CUH
#define FABULA_CUDA_POWERS_CUH

#include "device.h"

enum { FB_ROW_THREADS = 256, FB_ROW_WARPS = FB_ROW_THREADS / FB_WARP }; /* of the block that reads a row */

/* The highest |x| of a row, for every thread of the block. NaN is ignored. */
FB_DEVICE float fb_highest_of(const float *x, int32_t n_cols) {
    FB_SHARED(float, of_warps, FB_ROW_WARPS);
    const int32_t thread = (int32_t)threadIdx.x, n_fours = n_cols / 4;
    float most = 0.0f;
    for (int32_t i = thread; i < n_fours; i += FB_ROW_THREADS) {
        float four[4];
        fb_load4(x + 4 * (int64_t)i, four);
        for (int k = 0; k < 4; k++)
            most = fabsf(four[k]) > most ? fabsf(four[k]) : most;
    }
    for (int32_t i = 4 * n_fours + thread; i < n_cols; i += FB_ROW_THREADS)
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    most = fb_warp_max(most);
    if (thread % FB_WARP == 0) of_warps[thread / FB_WARP] = most;
    __syncthreads();
    most = of_warps[0];
    for (int w = 1; w < FB_ROW_WARPS; w++)
        most = of_warps[w] > most ? of_warps[w] : most;
    return most;
}

/* The power of two that scales `most` to 2^14 .. 2^15, and its inverse: then numbers down to 2^-28 of it are
 * normal in f16. Both are finite for any `most`. */
FB_DEVICE float fb_power_for(float most, float *inverse) {
    int exponent = (int)(fb_bits_of_float(most) >> 23) - 127; /* -127 for 0, 128 for infinity */
    exponent = exponent < -100 ? -100 : exponent;
    if (most == 0.0f) exponent = 14;
    *inverse = fb_float_of_bits((uint32_t)(exponent - 14 + 127) << 23);
    return fb_float_of_bits((uint32_t)(14 - exponent + 127) << 23);
}

#endif
