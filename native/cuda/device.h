/*
 * device.h - what kernels are written with. The same source is compiled by nvcc for GPUs and by a C++
 * compiler for the tests, where tests/native/cuda/emulate.h runs each thread of a block as a fiber.
 *
 * Kernels use __global__, __device__, threadIdx and the like, __syncthreads, shuffles, atomicAdd of integers
 * and the functions below. nvcc is given -fmad=false, the C++ compiler -ffp-contract=off: a multiply and an
 * add fuse only where the source says fmaf, so both compute the same bits except where they call cos, sin or
 * log.
 *
 *   FB_DEVICE, FB_BOTH            a function for the GPU; for the GPU and the host
 *   FB_SHARED(type, name, n)      shared memory of a block, a fixed number of elements
 *   FB_SHARED_FLOATS(name)        shared memory of as many floats as the launch says
 */
#ifndef FABULA_CUDA_DEVICE_H
#define FABULA_CUDA_DEVICE_H

#include "kernels/exp.h"

#include <math.h>
#include <stdint.h>

#define FB_DEVICE static inline __device__
#define FB_BOTH   static inline __host__ __device__

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* Both are aligned to 16 bytes. */
#define FB_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define FB_SHARED_FLOATS(name)       extern __shared__ __align__(16) float name[]

template <class T> struct fb_same {
    typedef T type;
};

template <class... P>
static int fb_launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes, void *stream,
    typename fb_same<P>::type... arguments) {
    kernel<<<grid, threads, shared_bytes, (cudaStream_t)stream>>>(arguments...);
    return (int)cudaGetLastError();
}

/* Whether the current GPU has code for a kernel: 0, or the CUDA error. */
template <class... P> static int fb_find_code(void (*kernel)(P...)) {
    cudaFuncAttributes attributes;
    return (int)cudaFuncGetAttributes(&attributes, kernel);
}

FB_DEVICE float fb_float_of_f16(uint16_t half) {
    return __half2float(__ushort_as_half(half));
}

FB_DEVICE uint16_t fb_f16_of_float(float value) {
    return __half_as_ushort(__float2half_rn(value));
}

FB_DEVICE float fb_float_of_bits(uint32_t bits) {
    return __uint_as_float(bits);
}

FB_DEVICE uint32_t fb_bits_of_float(float value) {
    return __float_as_uint(value);
}

FB_DEVICE double fb_double_of_bits(uint64_t bits) {
    return __longlong_as_double((long long)bits);
}

FB_DEVICE uint64_t fb_bits_of_double(double value) {
    return (uint64_t)__double_as_longlong(value);
}

/* Loads 4 floats at a multiple of 16 bytes. */
FB_DEVICE void fb_load4(const float *from, float to[4]) {
    const float4 four = *reinterpret_cast<const float4 *>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

#else
#include "emulate.h"
#endif

FB_DEVICE float fb_float_of_bf16(uint32_t half) {
    return fb_float_of_bits(half << 16);
}

FB_DEVICE uint16_t fb_bf16_of_float(float value) {
    const uint32_t bits = fb_bits_of_float(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x0040u); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

FB_DEVICE bool fb_is_finite(float x) {
    return (fb_bits_of_float(x) & 0x7F800000u) != 0x7F800000u;
}

FB_DEVICE bool fb_is_nan(float x) {
    return (fb_bits_of_float(x) & 0x7FFFFFFFu) > 0x7F800000u;
}

/* exp as in kernels/exp.h, with the same bits as on the CPU. */
FB_DEVICE float fb_exp(float x) {
    const bool vanishes = x < FB_EXP_LOW;
    x = x > FB_EXP_HIGH ? FB_EXP_HIGH : x;
    x = vanishes ? FB_EXP_LOW : x;
    if (fb_is_nan(x)) return x;
    const float n = rintf(x * FB_EXP_LOG2E);
    float r = fmaf(n, -FB_EXP_LN2_HI, x);
    r = fmaf(n, -FB_EXP_LN2_LO, r);
    float p = FB_EXP_P0;
    p = fmaf(p, r, FB_EXP_P1);
    p = fmaf(p, r, FB_EXP_P2);
    p = fmaf(p, r, FB_EXP_P3);
    p = fmaf(p, r, FB_EXP_P4);
    p = fmaf(p, r, FB_EXP_P5);
    p = fmaf(p, r * r, r) + 1.0f;
    return vanishes ? 0.0f : p * fb_float_of_bits((uint32_t)((int32_t)n + 127) << 23);
}

enum { FB_WARP = 32 };

/* Folds a warp's 32 numbers by halves; every lane gets the result. */
FB_DEVICE float fb_warp_sum(float x) {
    for (int step = 16; step >= 1; step /= 2)
        x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

FB_DEVICE float fb_warp_max(float x) {
    for (int step = 16; step >= 1; step /= 2) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, x, step);
        x = other > x ? other : x;
    }
    return x;
}

#endif
