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

/* A block of threads takes a row. Terms of the sum are f32, added in double: by each thread, by halves of a warp, warp after warp. */
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
    for (int32_t i = thread; i < n; i += SAMPLE_THREADS)
        sum += (double)fb_exp(row[i] - mine.logit);
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
