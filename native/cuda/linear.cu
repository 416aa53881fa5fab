/*
 * linear.cu - out = x weight^T with bias, residual or SwiGLU, on ordinary cores: for weights in f32, and for
 * bf16 on GPUs whose tensor cores lack it. tensor.cu has all other formats.
 *
 *     few tokens    a block of threads takes a panel (with SwiGLU a pair): 16 lanes x 16 segments of its
 *                   columns. Weights are read once, unpacked in registers, and multiplied with up to 8
 *                   tokens.
 *     many tokens   a block of 128 threads takes 8 panels x 32 tokens. Chunks of 32 columns are unpacked into
 *                   shared memory; a thread holds 4 tokens x 8 rows: 4 lanes of a panel and the same lanes of
 *                   the next, which are gate and up.
 *
 * Both sum in the order of kernels.h and give the same bits.
 */
#include "finish.cuh"
#include "weights.cuh"

enum { TILE_TOKENS = 32, TILE_PANELS = 8, TILE_THREADS = 128, THREAD_TOKENS = 4, THREAD_ROWS = 8 };
enum { X_STRIDE = TILE_TOKENS + 1, W_STRIDE = TILE_PANELS * FB_LANES + 4 }; /* padded against bank conflicts */
enum { X_FLOATS = FB_CHUNK * X_STRIDE, W_FLOATS = FB_CHUNK * W_STRIDE };

FB_DEVICE int32_t chunks_of(int32_t n_cols) {
    return (n_cols + FB_CHUNK - 1) / FB_CHUNK;
}

FB_DEVICE int32_t segment_chunks(int32_t n_chunks) {
    return (n_chunks + FB_MOST_SEGMENTS - 1) / FB_MOST_SEGMENTS;
}

/* ---- Few tokens -------------------------------------------------------------------------------------------------- */

template <fb_dtype D, int N> static __global__ void few_kernel(fb_cuda_linear a) {
    constexpr int n_sums = 2 * FB_MOST_SEGMENTS * N * FB_LANES;
    FB_SHARED(float, sums, n_sums);
    const int lane = (int)threadIdx.x % FB_LANES, segment = (int)threadIdx.x / FB_LANES % FB_MOST_SEGMENTS;
    const int half = (int)threadIdx.x / (FB_LANES * FB_MOST_SEGMENTS); /* 1: the second of two panels */
    const int32_t n_halves = a.swiglu ? 2 : 1, panel = (int32_t)blockIdx.x * n_halves + half;
    const int32_t n_cols = a.weight.n_cols, n_chunks = chunks_of(n_cols), length = segment_chunks(n_chunks);
    const char *at = fb_panel_of<D>(a.weight, panel);

    float sum[N];
    const float *from[N]; /* padding repeats the last token; its sums are not used */
#pragma unroll
    for (int t = 0; t < N; t++) {
        sum[t] = 0.0f;
        from[t] = a.x + (t < a.n_tokens ? t : a.n_tokens - 1) * a.ldx;
    }
    for (int32_t chunk = segment * length; chunk < (segment + 1) * length && chunk < n_chunks; chunk++) {
        fb_chunk<D> unpacked;
        unpacked.load(at, n_cols, chunk, lane);
#pragma unroll
        for (int q = 0; q < FB_CHUNK / 4; q++) {
            const int32_t column = chunk * FB_CHUNK + 4 * q;
            float w[4];
            unpacked.quad(q, w);
#pragma unroll
            for (int t = 0; t < N; t++) {
                const float *x = from[t] + column;
                float in[4];
                for (int i = 0; i < 4; i++) /* n_cols may be any number */
                    in[i] = column + i < n_cols ? x[i] : 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sum[t] = fmaf(w[i], in[i], sum[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < N; t++)
        sums[((half * FB_MOST_SEGMENTS + segment) * N + t) * FB_LANES + lane] = sum[t];
    __syncthreads();

    const int token = (int)threadIdx.x / FB_LANES;
    if (token >= a.n_tokens) return;
    float total[2] = {0.0f, 0.0f};
    for (int h = 0; h < n_halves; h++)
        for (int s = 0; s < FB_MOST_SEGMENTS && s * length < n_chunks; s++) {
            const float part = sums[((h * FB_MOST_SEGMENTS + s) * N + token) * FB_LANES + lane];
            total[h] = s == 0 ? part : total[h] + part;
        }
    fb_finish(a, token, (int32_t)blockIdx.x * n_halves, lane, total[0], total[1]);
}

/* ---- Many tokens ------------------------------------------------------------------------------------------------- */

template <fb_dtype D> static __global__ void __launch_bounds__(TILE_THREADS, 4) many_kernel(fb_cuda_linear a) {
    FB_SHARED(float, xs, X_FLOATS); /* [column][token] */
    FB_SHARED(float, ws, W_FLOATS); /* [column][panel][lane] */
    const int thread = (int)threadIdx.x;
    const int32_t n_cols = a.weight.n_cols, n_chunks = chunks_of(n_cols), length = segment_chunks(n_chunks);
    const int32_t n_panels = (a.weight.n_rows + FB_LANES - 1) / FB_LANES,
                  first_panel = (int32_t)blockIdx.x * TILE_PANELS;
    const int64_t first_token = (int64_t)blockIdx.y * TILE_TOKENS;
    const int32_t unpacked_panel = first_panel + thread / FB_LANES; /* this thread unpacks a row of it */
    const char *panel = fb_panel_of<D>(a.weight, unpacked_panel < n_panels ? unpacked_panel : 0);
    const int lanes = thread % 4 * 4, pair = thread / 4 % 4,
              tokens = thread / 16 * THREAD_TOKENS; /* its share of the sums */

    float total[THREAD_TOKENS][THREAD_ROWS], sum[THREAD_TOKENS][THREAD_ROWS];
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; t++)
#pragma unroll
        for (int r = 0; r < THREAD_ROWS; r++)
            total[t][r] = sum[t][r] = 0.0f;
    for (int32_t chunk = 0; chunk < n_chunks; chunk++) {
        {
            fb_chunk<D> unpacked;
            unpacked.load(panel, n_cols, chunk, thread % FB_LANES);
#pragma unroll
            for (int q = 0; q < FB_CHUNK / 4; q++) {
                float w[4];
                unpacked.quad(q, w);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    ws[(4 * q + i) * W_STRIDE + thread] = w[i];
            }
        }
        const int32_t column = chunk * FB_CHUNK + thread % FB_CHUNK;
#pragma unroll 4
        for (int token = thread / FB_CHUNK; token < TILE_TOKENS; token += TILE_THREADS / FB_CHUNK) {
            const bool is_there = first_token + token < a.n_tokens && column < n_cols;
            const float x = is_there ? a.x[(first_token + token) * a.ldx + column] : 0.0f;
            xs[thread % FB_CHUNK * X_STRIDE + token] = x;
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < FB_CHUNK; k++) {
            float w[THREAD_ROWS];
            fb_load4(ws + k * W_STRIDE + pair * 2 * FB_LANES + lanes, w);
            fb_load4(ws + k * W_STRIDE + (pair * 2 + 1) * FB_LANES + lanes, w + 4);
#pragma unroll
            for (int t = 0; t < THREAD_TOKENS; t++) {
                const float x = xs[k * X_STRIDE + tokens + t];
#pragma unroll
                for (int r = 0; r < THREAD_ROWS; r++)
                    sum[t][r] = fmaf(w[r], x, sum[t][r]);
            }
        }
        __syncthreads();
        if ((chunk + 1) % length != 0 && chunk + 1 != n_chunks) continue;
#pragma unroll
        for (int t = 0; t < THREAD_TOKENS; t++)
#pragma unroll
            for (int r = 0; r < THREAD_ROWS; r++) {
                total[t][r] = chunk < length ? sum[t][r] : total[t][r] + sum[t][r];
                sum[t][r] = 0.0f;
            }
    }

    const int32_t gate = first_panel + 2 * pair;
#pragma unroll
    for (int t = 0; t < THREAD_TOKENS; t++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int64_t token = first_token + tokens + t;
            if (token >= a.n_tokens) continue;
            fb_finish(a, token, gate, lanes + r, total[t][r], total[t][r + 4]);
            if (!a.swiglu) fb_finish(a, token, gate + 1, lanes + r, total[t][r + 4], 0.0f);
        }
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

template <fb_dtype D> static int multiply(const fb_cuda_linear &a, fb_cuda_stream stream) {
    const unsigned n_panels = (unsigned)(a.weight.n_rows + FB_LANES - 1) / FB_LANES, n_tokens = (unsigned)a.n_tokens;
    if (a.n_tokens <= FB_CUDA_FEW_TOKENS) {
        const unsigned n_halves = a.swiglu ? 2 : 1, threads = n_halves * FB_LANES * FB_MOST_SEGMENTS;
        const dim3 grid(n_panels / n_halves);
        if (n_tokens == 1) return fb_launch(few_kernel<D, 1>, grid, threads, 0, stream, a);
        if (n_tokens <= 4) return fb_launch(few_kernel<D, 4>, grid, threads, 0, stream, a);
        return fb_launch(few_kernel<D, 8>, grid, threads, 0, stream, a);
    }
    const dim3 grid((n_panels + TILE_PANELS - 1) / TILE_PANELS, (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS);
    return fb_launch(many_kernel<D>, grid, TILE_THREADS, 0, stream, a);
}

int fb_cuda_multiply(const struct fb_cuda_linear *linear, fb_cuda_stream stream) {
    switch (linear->weight.dtype) {
    case FB_F32:
        return multiply<FB_F32>(*linear, stream);
    case FB_BF16:
        return multiply<FB_BF16>(*linear, stream);
    default:
        return -1; /* fb_cuda_multiply_inputs takes these */
    }
}
