/* sample.cu - greedy drawing. */
#include "device.h"
#include "kernels.h"

enum { SAMPLE_THREADS = 512, SAMPLE_WARPS = SAMPLE_THREADS / 32 };

/* The higher of two candidates, of equal ones the first. */
struct candidate {
    float logit;
    int32_t token;
};

FB_DEVICE candidate better(candidate a, candidate b) {
    return b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

enum { SUM_TERMS = 16, SUM_LANES = 16 };

/* exp(x) for x <= 0, in the operations of the CPU's sampler (kernels/vocabulary.h). */
FB_DEVICE float exp_of(float x) {
    const float round = 12582912.0f; /* 1.5 x 2^23: added and taken off again it rounds to an integer */
    const float shifted = x * FB_EXP_LOG2E + round, n = shifted - round;
    const float r = (x - n * FB_EXP_LN2_HI) - n * FB_EXP_LN2_LO, rr = r * r;
    const float p = ((FB_EXP_P0 * r + FB_EXP_P1) * rr + (FB_EXP_P2 * r + FB_EXP_P3)) * rr + (FB_EXP_P4 * r + FB_EXP_P5);
    const float e = p * rr + (r + 1.0f);
    return x >= FB_EXP_LOW ? e * fb_float_of_bits((fb_bits_of_float(shifted) + 127u) << 23) : 0.0f;
}

/* A block of threads takes a row. A thread adds up 16 terms of the sum in f32, every 16th of 256, as the CPU's sampler does; such
 * sums are added in double: by each thread, by halves of a warp, warp after warp. There the CPU has another order, which an f32
 * result shows about once in ten million rows. */
static __global__ void greedy_kernel(
    const float *logits, int64_t ld, int32_t n, int32_t *tokens, float *logprobs, int32_t *non_finite) {
    FB_SHARED(candidate, best, SAMPLE_WARPS);
    FB_SHARED(double, sums, SAMPLE_WARPS);
    FB_SHARED(int32_t, damaged, SAMPLE_WARPS);
    const float *row = logits + (int64_t)blockIdx.x * ld;
    const int32_t thread = (int32_t)threadIdx.x, warp = thread / 32;
    candidate mine = {-INFINITY, INT32_MAX};
    float is_damaged = 0.0f;
    for (int32_t i = thread; i < n; i += SAMPLE_THREADS) {
        const float logit = row[i];
        if (fb_is_nan(logit) || logit == INFINITY) is_damaged = 1.0f;
        mine = better(mine, candidate{logit, i});
    }
    for (int step = 16; step >= 1; step /= 2)
        mine = better(mine,
            candidate{__shfl_xor_sync(0xFFFFFFFFu, mine.logit, step), __shfl_xor_sync(0xFFFFFFFFu, mine.token, step)});
    is_damaged = fb_warp_max(is_damaged);
    if (thread % 32 == 0) {
        best[warp] = mine;
        damaged[warp] = is_damaged != 0.0f;
    }
    __syncthreads();
    int32_t any_damaged = damaged[0];
    mine = best[0];
    for (int w = 1; w < SAMPLE_WARPS; w++) {
        mine = better(mine, best[w]);
        any_damaged |= damaged[w];
    }
    double sum = 0.0;
    const int32_t n_parts = (n + SUM_TERMS * SUM_LANES - 1) / (SUM_TERMS * SUM_LANES) * SUM_LANES;
    for (int32_t i = thread; i < n_parts; i += SAMPLE_THREADS) {
        float part = 0.0f;
        int32_t k = i / SUM_LANES * SUM_LANES * SUM_TERMS + i % SUM_LANES;
        for (int32_t term = 0; term < SUM_TERMS && k < n; term++, k += SUM_LANES)
            part += exp_of(row[k] - mine.logit);
        sum += (double)part;
    }
    for (int step = 16; step >= 1; step /= 2)
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    if (thread % 32 == 0) sums[warp] = sum;
    __syncthreads();
    if (thread != 0) return;
    sum = sums[0];
    for (int w = 1; w < SAMPLE_WARPS; w++)
        sum += sums[w];
    tokens[blockIdx.x] = mine.token;
    logprobs[blockIdx.x] = (float)-log(sum);
    non_finite[blockIdx.x] = any_damaged || !fb_is_finite(mine.logit);
}

int fb_cuda_greedy(const float *logits, int64_t ld_logits, int32_t n_rows, int32_t vocab_size, int32_t *tokens,
    float *logprobs, int32_t *non_finite, fb_cuda_stream stream) {
    return fb_launch(greedy_kernel, dim3((unsigned)n_rows), SAMPLE_THREADS, 0, stream, logits, ld_logits, vocab_size,
        tokens, logprobs, non_finite);
}
