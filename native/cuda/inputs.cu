/* inputs.cu - inputs of products rounded to 16 bits, in the order of fragments.cuh. Contracts stand in kernels.h. */
#include "fragments.cuh"
#include "powers.cuh"

enum { ROUND_CHUNKS = 64 }; /* of a block of threads */

/* Tokens that kernels take together: 8, 32 or 64. */
static int32_t whole_tiles(int32_t n_tokens) {
    const int32_t tile = n_tokens <= FB_CUDA_FEW_TOKENS    ? FB_CUDA_FEW_TOKENS
                         : n_tokens <= FB_CUDA_TILE_TOKENS ? FB_CUDA_TILE_TOKENS / 2
                                                           : FB_CUDA_TILE_TOKENS;
    return (n_tokens + tile - 1) / tile * tile;
}

size_t fb_cuda_inputs_view(
    enum fb_dtype dtype, int32_t n_tokens, int32_t n_cols, void *memory, struct fb_cuda_inputs *out) {
    const size_t n_rows = (size_t)whole_tiles(n_tokens), n_chunks = ((size_t)n_cols + FB_CHUNK - 1) / FB_CHUNK;
    const size_t scales = FB_CUDA_PARTS * n_chunks * n_rows * FB_CHUNK * sizeof(uint16_t);
    const size_t sums = scales + n_rows * sizeof(float);
    *out = fb_cuda_inputs{};
    out->dtype = dtype;
    out->n_rows = (int32_t)n_rows;
    out->n_chunks = (int32_t)n_chunks;
    if (memory) {
        out->halfs = static_cast<uint16_t *>(memory);
        out->scales = reinterpret_cast<float *>(static_cast<char *>(memory) + scales);
        out->sums = reinterpret_cast<float *>(static_cast<char *>(memory) + sums);
    }
    return sums + (dtype == FB_BF16 ? 0 : n_chunks * FB_CUDA_SUMS * n_rows * sizeof(float));
}

/* A block takes ROUND_CHUNKS chunks of a token, a warp one after the other. Tokens behind the last become 0. */
static __global__ void round_f16_kernel(
    const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, fb_cuda_inputs out) {
    const int32_t token = (int32_t)blockIdx.x, lane = (int32_t)threadIdx.x % FB_WARP;
    const int32_t first = (int32_t)blockIdx.y * ROUND_CHUNKS, warp = (int32_t)threadIdx.x / FB_WARP;
    const int64_t part = (int64_t)out.n_chunks * out.n_rows * FB_CHUNK;
    const bool is_token = token < n_tokens;
    const float *row = x + (is_token ? token : 0) * ldx;
    float inverse = 1.0f;
    const float power = is_token ? fb_power_for(fb_highest_of(row, n_cols), &inverse) : 0.0f; /* the whole block */
    if (threadIdx.x == 0 && blockIdx.y == 0) out.scales[token] = inverse;
    for (int32_t chunk = first + warp; chunk < first + ROUND_CHUNKS && chunk < out.n_chunks; chunk += FB_ROW_WARPS) {
        const int32_t column = chunk * FB_CHUNK + lane;
        const float value = is_token && column < n_cols ? row[column] * power : 0.0f;
        const uint16_t high = fb_f16_of_float(value), low = fb_f16_of_float(value - fb_float_of_f16(high));
        float sum = fb_float_of_f16(high) + fb_float_of_f16(low);
        for (int step = 8; step >= 1; step /= 2)
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        const float both = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 16);
        uint16_t *to = out.halfs + ((int64_t)chunk * out.n_rows + token) * FB_CHUNK + fb_input_place(lane);
        to[0] = high;
        to[part] = low;
        float *sums = out.sums + (int64_t)chunk * FB_CUDA_SUMS * out.n_rows + token;
        if (lane % 16 == 0) sums[lane / 16 * out.n_rows] = sum;
        if (lane == 0) sums[2 * out.n_rows] = both;
    }
}

static __global__ void round_bf16_kernel(
    const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, fb_cuda_inputs out) {
    const int32_t token = (int32_t)blockIdx.x, lane = (int32_t)threadIdx.x % FB_WARP;
    const int32_t first = (int32_t)blockIdx.y * ROUND_CHUNKS, warp = (int32_t)threadIdx.x / FB_WARP;
    const int64_t part = (int64_t)out.n_chunks * out.n_rows * FB_CHUNK;
    if (threadIdx.x == 0 && blockIdx.y == 0) out.scales[token] = 1.0f;
    for (int32_t chunk = first + warp; chunk < first + ROUND_CHUNKS && chunk < out.n_chunks; chunk += FB_ROW_WARPS) {
        const int32_t column = chunk * FB_CHUNK + lane;
        const float value = token < n_tokens && column < n_cols ? x[token * ldx + column] : 0.0f;
        const uint16_t high = fb_bf16_of_float(value);
        uint16_t *to = out.halfs + ((int64_t)chunk * out.n_rows + token) * FB_CHUNK + fb_input_place(lane);
        to[0] = high;
        to[part] = fb_bf16_of_float(value - fb_float_of_bf16(high));
    }
}

int fb_cuda_round(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_inputs *out,
    fb_cuda_stream stream) {
    const dim3 grid((unsigned)out->n_rows, (unsigned)((out->n_chunks + ROUND_CHUNKS - 1) / ROUND_CHUNKS));
    return fb_launch(out->dtype == FB_BF16 ? round_bf16_kernel : round_f16_kernel, grid, FB_ROW_THREADS, 0, stream, x,
        ldx, n_tokens, n_cols, *out);
}
