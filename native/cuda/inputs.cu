/* inputs.cu - rounds inputs of products to 16 bits, in the order of fragments.cuh. Contracts are in
 * kernels.h. */
#include "fragments.cuh"
#include "norm.cuh"

enum { ROUND_CHUNKS = 64 }; /* per block of threads */

/* n_tokens rounded up to whole tiles of 8, 32 or 64. */
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

/* A block rounds chunks first .. last - 1 of a token, its warps in turn. `row` is NULL for padding, which
 * becomes 0. */
template <fb_dtype D>
FB_DEVICE void round_row(
    const float *row, int32_t token, int32_t n_cols, int32_t first, int32_t last, const fb_cuda_inputs &out) {
    const int32_t lane = (int32_t)threadIdx.x % FB_WARP, warp = (int32_t)threadIdx.x / FB_WARP;
    const int64_t part = (int64_t)out.n_chunks * out.n_rows * FB_CHUNK;
    float inverse = 1.0f, power = 1.0f;
    if constexpr (D == FB_F16)
        if (row) power = fb_power_for(fb_highest_of(row, n_cols), &inverse); /* true for the whole block */
    if (threadIdx.x == 0 && first == 0) out.scales[token] = inverse;
    for (int32_t chunk = first + warp; chunk < last && chunk < out.n_chunks; chunk += FB_ROW_WARPS) {
        const int32_t column = chunk * FB_CHUNK + lane;
        const float number = row && column < n_cols ? row[column] : 0.0f;
        uint16_t *to = out.halfs + ((int64_t)chunk * out.n_rows + token) * FB_CHUNK + fb_input_index(lane);
        if constexpr (D == FB_BF16) {
            const uint16_t high = fb_bf16_of_float(number);
            to[0] = high;
            to[part] = fb_bf16_of_float(number - fb_float_of_bf16(high));
        } else {
            const float value = number * power;
            const uint16_t high = fb_f16_of_float(value), low = fb_f16_of_float(value - fb_float_of_f16(high));
            float sum = fb_float_of_f16(high) + fb_float_of_f16(low);
            for (int step = 8; step >= 1; step /= 2)
                sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
            const float both = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 16);
            to[0] = high;
            to[part] = low;
            float *sums = out.sums + (int64_t)chunk * FB_CUDA_SUMS * out.n_rows + token;
            if (lane % 16 == 0) sums[lane / 16 * out.n_rows] = sum;
            if (lane == 0) sums[2 * out.n_rows] = both;
        }
    }
}

/* A block takes ROUND_CHUNKS chunks of a token. */
template <fb_dtype D>
static __global__ void round_kernel(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, fb_cuda_inputs out) {
    const int32_t token = (int32_t)blockIdx.x, first = (int32_t)blockIdx.y * ROUND_CHUNKS;
    round_row<D>(token < n_tokens ? x + token * ldx : nullptr, token, n_cols, first, first + ROUND_CHUNKS, out);
}

/* A block takes a token. */
template <fb_dtype D>
static __global__ void norm_round_kernel(const float *in, int64_t ld_in, const float *weight, int32_t n_tokens,
    int32_t n_cols, float eps, float *out, int64_t ld_out, fb_cuda_inputs inputs) {
    const int32_t token = (int32_t)blockIdx.x;
    float *const row = token < n_tokens ? out + token * ld_out : nullptr;
    if (row) fb_norm_row(in + token * ld_in, weight, n_cols, eps, row);
    __syncthreads();
    round_row<D>(row, token, n_cols, 0, inputs.n_chunks, inputs);
}

int fb_cuda_round(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_inputs *out,
    fb_cuda_stream stream) {
    const dim3 grid((unsigned)out->n_rows, (unsigned)((out->n_chunks + ROUND_CHUNKS - 1) / ROUND_CHUNKS));
    return fb_launch(out->dtype == FB_BF16 ? round_kernel<FB_BF16> : round_kernel<FB_F16>, grid, FB_ROW_THREADS, 0,
        stream, x, ldx, n_tokens, n_cols, *out);
}

int fb_cuda_norm_round(const float *in, int64_t ld_in, const float *weight, int32_t n_tokens, int32_t n_cols, float eps,
    float *out, int64_t ld_out, const struct fb_cuda_inputs *inputs, fb_cuda_stream stream) {
    return fb_launch(inputs->dtype == FB_BF16 ? norm_round_kernel<FB_BF16> : norm_round_kernel<FB_F16>,
        dim3((unsigned)inputs->n_rows), FB_ROW_THREADS, 0, stream, in, ld_in, weight, n_tokens, n_cols, eps, out,
        ld_out, *inputs);
}
