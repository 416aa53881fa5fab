/*
 * dequantized.cu - everything around a product of cuBLASLt: weights and inputs as plain rows of 16 bits, and
 * the operations fused to the end of a product. Contracts are in kernels.h.
 */
#include "finish.cuh"
#include "mma.cuh"
#include "powers.cuh"
#include "weights.cuh"

enum { DEQUANTIZE_THREADS = 256, CHUNK_STRIDE = DEQUANTIZE_THREADS / FB_LANES };

/* A block of threads dequantizes a panel, a thread every 16th chunk of a row. */
template <fb_dtype D>
static __global__ void dequantize_kernel(fb_cuda_weight weight, int32_t first_panel, fb_cuda_rows out) {
    FB_SHARED(float, most, DEQUANTIZE_THREADS);
    const int lane = (int)threadIdx.x % FB_LANES, line = (int)threadIdx.x / FB_LANES;
    const int32_t n_chunks = (weight.n_cols + FB_CHUNK - 1) / FB_CHUNK, row = (int32_t)blockIdx.x * FB_LANES + lane;
    const char *panel = fb_panel_of<D>(weight, first_panel + (int32_t)blockIdx.x);
    float power = 1.0f, inverse = 1.0f, w[4];
    fb_chunk<D> unpacked;
    if constexpr (D != FB_BF16) {
        float highest = 0.0f;
        for (int32_t chunk = line; chunk < n_chunks; chunk += CHUNK_STRIDE) {
            unpacked.load(panel, weight.n_cols, chunk, lane);
#pragma unroll
            for (int q = 0; q < FB_CHUNK / 4; q++) {
                unpacked.quad(q, w);
                for (int i = 0; i < 4; i++)
                    highest = fabsf(w[i]) > highest ? fabsf(w[i]) : highest;
            }
        }
        most[threadIdx.x] = highest;
        __syncthreads();
        highest = 0.0f;
        for (int i = 0; i < CHUNK_STRIDE; i++)
            highest = most[i * FB_LANES + lane] > highest ? most[i * FB_LANES + lane] : highest;
        power = fb_power_for(highest, &inverse);
    }
    if (line == 0) out.scales[row] = inverse;
    for (int32_t chunk = line; chunk < n_chunks; chunk += CHUNK_STRIDE) {
        unpacked.load(panel, weight.n_cols, chunk, lane);
#pragma unroll
        for (int o = 0; o < FB_CHUNK / 8; o++) { /* one store for eight: threads write rows that are far apart */
            const int32_t column = chunk * FB_CHUNK + 8 * o;
            fb_words4 eight = {};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i % 4 == 0) unpacked.quad(2 * o + i / 4, w);
                const uint32_t half = D == FB_BF16 ? fb_bf16_of_float(w[i % 4]) : fb_f16_of_float(w[i % 4] * power);
                eight.word[i / 2] |= half << (16 * (i % 2));
            }
            if (column < out.width) *(fb_words4 *)(out.halfs + (int64_t)row * out.width + column) = eight;
        }
    }
}

/* A block takes a token. */
static __global__ void rows_kernel(const float *x, int64_t ldx, int32_t n_cols, fb_cuda_rows out) {
    const int64_t token = (int64_t)blockIdx.x;
    const float *row = x + token * ldx;
    float inverse = 1.0f, power = 1.0f;
    if (out.dtype != FB_BF16) power = fb_power_for(fb_highest_of(row, n_cols), &inverse);
    if (threadIdx.x == 0) out.scales[token] = inverse;
    for (int32_t column = (int32_t)threadIdx.x; column < out.width; column += FB_ROW_THREADS) {
        const float value = column < n_cols ? row[column] * power : 0.0f;
        out.halfs[token * out.width + column] = out.dtype == FB_BF16 ? fb_bf16_of_float(value) : fb_f16_of_float(value);
    }
}

/* A thread takes a row (with SwiGLU those of gate and up), a block the rows of one token. */
static __global__ void finish_kernel(fb_cuda_linear a, fb_cuda_rows weights, fb_cuda_rows inputs, int32_t first_panel,
    int32_t n_rows, const float *sums) {
    const int64_t token = (int64_t)blockIdx.x;
    const int32_t item = (int32_t)(blockIdx.y * FB_ROW_THREADS + threadIdx.x), lane = item % FB_LANES;
    const int32_t panel = a.swiglu ? item / FB_LANES * 2 : item / FB_LANES, row = panel * FB_LANES + lane;
    if (row >= n_rows) return;
    const float *of = sums + token * n_rows + row;
    const float scale = inputs.scales[token];
    const float sum = *of * weights.scales[row] * scale;
    const float up = a.swiglu ? of[FB_LANES] * weights.scales[row + FB_LANES] * scale : 0.0f;
    fb_finish(a, token, first_panel + panel, lane, sum, up);
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

template <fb_dtype D>
static int dequantize(const fb_cuda_weight &weight, int32_t first_panel, int32_t n_panels, const fb_cuda_rows &out,
    fb_cuda_stream stream) {
    return fb_launch(
        dequantize_kernel<D>, dim3((unsigned)n_panels), DEQUANTIZE_THREADS, 0, stream, weight, first_panel, out);
}

int fb_cuda_dequantize_rows(const struct fb_cuda_weight *weight, int32_t first_panel, int32_t n_panels,
    const struct fb_cuda_rows *out, fb_cuda_stream stream) {
    return FB_FOR_DTYPE_BUT_F32(weight->dtype, dequantize, *weight, first_panel, n_panels, *out, stream);
}

int fb_cuda_round_rows(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_rows *out,
    fb_cuda_stream stream) {
    return fb_launch(rows_kernel, dim3((unsigned)n_tokens), FB_ROW_THREADS, 0, stream, x, ldx, n_cols, *out);
}

int fb_cuda_finish(const struct fb_cuda_linear *linear, const struct fb_cuda_rows *weights,
    const struct fb_cuda_rows *inputs, int32_t first_panel, int32_t n_rows, const float *sums, fb_cuda_stream stream) {
    const unsigned n_items = (unsigned)(linear->swiglu ? n_rows / 2 : n_rows);
    const dim3 grid((unsigned)linear->n_tokens, (n_items + FB_ROW_THREADS - 1) / FB_ROW_THREADS);
    return fb_launch(
        finish_kernel, grid, FB_ROW_THREADS, 0, stream, *linear, *weights, *inputs, first_panel, n_rows, sums);
}
