/*
 * tensor.cu - products on tensor cores: weights of 16 bits and of the block formats times inputs of
 * inputs.cu.
 *
 *     few tokens    8 warps take two panels x 8 or 32 tokens, each a segment of their columns. The speed of
 *                   loading weights is the limit, so a lane loads some chunks ahead.
 *     many tokens   4 warps take two panels each x the same 64 tokens, all columns one after another; inputs
 *                   are copied to shared memory while the previous chunk is multiplied.
 *
 * Panels are loaded directly into registers and unpacked there (fragments.cuh). With SwiGLU the two panels of
 * a warp are gate and up. Sums have the order of kernels.h, so both kernels give the same bits.
 */
#include "finish.cuh"
#include "fragments.cuh"

enum { TENSOR_SEGMENTS = 8, SPLIT_THREADS = TENSOR_SEGMENTS * FB_WARP };
enum { TILED_WARPS = 4, TILED_THREADS = TILED_WARPS * FB_WARP, TILED_COLUMNS = FB_CUDA_TILE_TOKENS / 8 };

/* Chunks per segment. */
FB_DEVICE int32_t tensor_length(int32_t n_chunks) {
    return (n_chunks + TENSOR_SEGMENTS - 1) / TENSOR_SEGMENTS;
}

/* A lane's inputs of 8 tokens and a chunk, and their sums if weights have offsets. */
template <fb_dtype D> struct lane_inputs {
    typedef fb_fragments<D> weights;
    fb_words4 part[FB_CUDA_PARTS];
    fb_floats2 sums[weights::n_groups];

    /* Loads from memory; `token` is the first of the 8. */
    __device__ void load(const fb_cuda_inputs &in, int32_t chunk, int64_t token, int lane) {
#pragma unroll
        for (int p = 0; p < FB_CUDA_PARTS; p++) {
            const int64_t row = ((int64_t)p * in.n_chunks + chunk) * in.n_rows + token + lane / 4;
            part[p] = reinterpret_cast<const fb_words4 *>(in.halfs)[row * 4 + lane % 4];
        }
        load_sums(in, chunk, token, lane);
    }

    __device__ void load_sums(const fb_cuda_inputs &in, int32_t chunk, int64_t token, int lane) {
        if constexpr (weights::has_offset) {
#pragma unroll
            for (int i = 0; i < weights::n_groups; i++) {
                const int32_t which = weights::n_groups == 2 ? i : 2;
                const int64_t at = ((int64_t)chunk * FB_CUDA_SUMS + which) * in.n_rows + token + lane % 4 * 2;
                sums[i] = *reinterpret_cast<const fb_floats2 *>(in.sums + at);
            }
        }
    }
};

/* An unpacked chunk of a panel. */
template <fb_dtype D> struct unpacked_chunk {
    typedef fb_fragments<D> weights;
    uint32_t a[2][4];
    float scale[weights::n_groups][2], offset[weights::n_groups][2]; /* of both rows */

    __device__ void unpack(const weights &w, int lane) {
        w.unpack(0, lane, a[0]);
        w.unpack(1, lane, a[1]);
        if constexpr (weights::is_scaled) {
#pragma unroll
            for (int i = 0; i < 2 * weights::n_groups; i++) {
                scale[i / 2][i % 2] = w.scale(i / 2, i % 2);
                if constexpr (weights::has_offset) offset[i / 2][i % 2] = w.offset(i / 2, i % 2);
            }
        }
    }

    /* sum += columns of step s, times both parts of 8 tokens. */
    __device__ void step(float sum[4], int s, const lane_inputs<D> &x) const {
#pragma unroll
        for (int p = 0; p < FB_CUDA_PARTS; p++) {
            if constexpr (D == FB_BF16)
                fb_mma_bf16(sum, a[s], x.part[p].word + 2 * s);
            else
                fb_mma_f16(sum, a[s], x.part[p].word + 2 * s);
        }
    }

    /* sum += this chunk times 8 tokens. */
    __device__ void multiply(float sum[4], const lane_inputs<D> &x) const {
        if constexpr (!weights::is_scaled) {
            step(sum, 0, x);
            step(sum, 1, x);
        } else {
#pragma unroll
            for (int i = 0; i < weights::n_groups; i++) {
                float codes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (weights::n_groups == 1 || i == 0) step(codes, 0, x);
                if (weights::n_groups == 1 || i == 1) step(codes, 1, x);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    sum[c] = fmaf(scale[i][c / 2], codes[c], sum[c]);
                    if constexpr (weights::has_offset) sum[c] = fmaf(offset[i][c / 2], x.sums[i].number[c % 2], sum[c]);
                }
            }
        }
    }
};

/* ---- Few tokens -------------------------------------------------------------------------------------------------- */

/* Data loaded ahead of use. Inputs only if N is 1: those of more tokens would need too many registers. */
template <fb_dtype D, int N> struct prefetched_chunk {
    fb_fragments<D> w[2];
    lane_inputs<D> x;

    __device__ void load(
        const fb_cuda_weight &weight, const char *const panels[2], const fb_cuda_inputs &in, int32_t chunk, int lane) {
        w[0].load(panels[0], weight.n_cols, chunk, lane);
        w[1].load(panels[1], weight.n_cols, chunk, lane);
        if constexpr (N == 1) x.load(in, chunk, 0, lane);
    }

    __device__ void multiply(float sum[2][N][4], const fb_cuda_inputs &in, int32_t chunk, int64_t token, int lane) {
        unpacked_chunk<D> unpacked[2];
        unpacked[0].unpack(w[0], lane);
        unpacked[1].unpack(w[1], lane);
#pragma unroll
        for (int n = 0; n < N; n++) {
            if constexpr (N > 1) x.load(in, chunk, token + 8 * n, lane);
            unpacked[0].multiply(sum[0][n], x);
            unpacked[1].multiply(sum[1][n], x);
        }
    }
};

/* Adds segments in order and finishes N x 8 tokens of two panels. */
template <int N>
FB_DEVICE void finish_segments(
    const fb_cuda_linear &a, const fb_cuda_inputs &in, const float *sums, int32_t panel, int64_t first_token) {
    const int32_t length = tensor_length(in.n_chunks);
    for (int item = (int)threadIdx.x; item < N * 4 * FB_WARP; item += SPLIT_THREADS) {
        const int lane = item % FB_WARP, c = item / FB_WARP % 4, row = lane / 4 * 2 + c / 2;
        const int64_t token = first_token + item / (4 * FB_WARP) * 8 + lane % 4 * 2 + c % 2;
        if (token >= a.n_tokens) continue;
        float total[2];
        for (int p = 0; p < 2; p++)
            for (int s = 0; s < TENSOR_SEGMENTS && s * length < in.n_chunks; s++) {
                const float part = sums[(s * 2 + p) * N * 4 * FB_WARP + item];
                total[p] = s == 0 ? part : total[p] + part;
            }
        const float scale = in.scales[token];
        fb_finish(a, token, panel, row, total[0] * scale, total[1] * scale);
        if (!a.swiglu) fb_finish(a, token, panel + 1, row, total[1] * scale, 0.0f);
    }
}

template <fb_dtype D, int N>
static __global__ void __launch_bounds__(SPLIT_THREADS, 2) split_kernel(fb_cuda_linear a, fb_cuda_inputs in) {
    constexpr int n_sums = TENSOR_SEGMENTS * 2 * N * 4 * FB_WARP;
    constexpr int n_ahead = N == 1 && fb_fragments<D>::is_scaled && D != FB_Q8_0 ? 4 : 2;
    FB_SHARED(float, sums, n_sums);
    const int lane = (int)threadIdx.x % FB_WARP, segment = (int)threadIdx.x / FB_WARP;
    const int32_t n_panels = (a.weight.n_rows + FB_LANES - 1) / FB_LANES, panel = (int32_t)blockIdx.x * 2;
    const int64_t first_token = (int64_t)blockIdx.y * 8 * N;
    /* A single last panel is repeated; its sums are not used. */
    const char *first = fb_panel_of<D>(a.weight, panel);
    const char *const panels[2] = {first, panel + 1 < n_panels ? fb_panel_of<D>(a.weight, panel + 1) : first};
    const int32_t length = tensor_length(in.n_chunks), begin = segment * length;
    const int32_t end = begin + length < in.n_chunks ? begin + length : in.n_chunks;

    float sum[2][N][4];
#pragma unroll
    for (int i = 0; i < 2 * N * 4; i++)
        sum[i / (N * 4)][i / 4 % N][i % 4] = 0.0f;
    prefetched_chunk<D, N> ahead[n_ahead];
#pragma unroll
    for (int i = 0; i < n_ahead; i++)
        if (begin + i < end) ahead[i].load(a.weight, panels, in, begin + i, lane);
    for (int32_t at = begin; at < end; at += n_ahead) {
#pragma unroll
        for (int i = 0; i < n_ahead; i++) {
            const int32_t chunk = at + i;
            if (chunk >= end) continue;
            ahead[i].multiply(sum, in, chunk, first_token, lane);
            if (chunk + n_ahead < end) ahead[i].load(a.weight, panels, in, chunk + n_ahead, lane);
        }
    }
#pragma unroll
    for (int i = 0; i < 2 * N * 4; i++)
        sums[(segment * 2 * N * 4 + i) * FB_WARP + lane] = sum[i / (N * 4)][i / 4 % N][i % 4];
    __syncthreads();
    finish_segments<N>(a, in, sums, panel, first_token);
}

/* ---- Many tokens ------------------------------------------------------------------------------------------------- */

/* Inputs of a chunk and 64 tokens in shared memory, 16 bytes each: [part][token][4]. Two of these and the
 * totals are 48 KiB, which every GPU has. */
enum { TILE_ROW = 4, TILE_PART = FB_CUDA_TILE_TOKENS * TILE_ROW, TILE_SIZE = FB_CUDA_PARTS * TILE_PART, STAGES = 2 };

FB_DEVICE void copy_tile(fb_words4 *tile, const fb_cuda_inputs &in, int32_t chunk, int64_t first_token) {
#pragma unroll
    for (int i = 0; i < TILE_SIZE / TILED_THREADS; i++) {
        const int at = i * TILED_THREADS + (int)threadIdx.x;
        const int64_t row = ((int64_t)(at / TILE_PART) * in.n_chunks + chunk) * in.n_rows + first_token;
        fb_copy_async(tile + at, reinterpret_cast<const fb_words4 *>(in.halfs) + row * TILE_ROW + at % TILE_PART);
    }
}

template <fb_dtype D>
static __global__ void __launch_bounds__(TILED_THREADS, 3) tiled_kernel(fb_cuda_linear a, fb_cuda_inputs in) {
    constexpr int n_sums = 2 * TILED_COLUMNS * 4; /* per lane */
    FB_SHARED(fb_words4, tiles, STAGES * TILE_SIZE);
    /* Each thread its own; in registers they would halve the number of warps. */
    constexpr int n_totals = n_sums * TILED_THREADS;
    FB_SHARED(float, totals, n_totals);
    const int thread = (int)threadIdx.x, lane = thread % FB_WARP;
    const int32_t n_panels = (a.weight.n_rows + FB_LANES - 1) / FB_LANES, length = tensor_length(in.n_chunks);
    const int32_t panel = (int32_t)blockIdx.y * TILED_WARPS * 2 + thread / FB_WARP * 2;
    const int64_t first_token = (int64_t)blockIdx.x * FB_CUDA_TILE_TOKENS;
    /* True for the whole warp, which only takes part in barriers and copies. */
    const bool is_idle = panel >= n_panels;
    const char *panels[2]; /* padding repeats the first panel; its sums are not used */
    for (int p = 0; p < 2; p++)
        panels[p] = fb_panel_of<D>(a.weight, panel + p < n_panels ? panel + p : 0);

    float sum[2][TILED_COLUMNS][4];
#pragma unroll
    for (int i = 0; i < n_sums; i++)
        sum[i / (n_sums / 2)][i / 4 % TILED_COLUMNS][i % 4] = 0.0f;
    copy_tile(tiles, in, 0, first_token);
    fb_copy_commit();
    fb_fragments<D> next[2];
    for (int p = 0; p < 2 && !is_idle; p++)
        next[p].load(panels[p], a.weight.n_cols, 0, lane);
    for (int32_t chunk = 0; chunk < in.n_chunks; chunk++) {
        fb_copy_wait<0>();
        __syncthreads(); /* the chunk's tile is visible to all threads, and the previous one is no longer read */
        const int32_t coming = chunk + 1;
        if (coming < in.n_chunks) copy_tile(tiles + coming % STAGES * TILE_SIZE, in, coming, first_token);
        fb_copy_commit();
        if (is_idle) continue;

        unpacked_chunk<D> unpacked[2];
#pragma unroll
        for (int p = 0; p < 2; p++) {
            unpacked[p].unpack(next[p], lane);
            if (chunk + 1 < in.n_chunks) next[p].load(panels[p], a.weight.n_cols, chunk + 1, lane);
        }
        const fb_words4 *here = tiles + chunk % STAGES * TILE_SIZE + lane / 4 * TILE_ROW + lane % 4;
#pragma unroll
        for (int n = 0; n < TILED_COLUMNS; n++) {
            lane_inputs<D> x;
            for (int p = 0; p < FB_CUDA_PARTS; p++)
                x.part[p] = here[p * TILE_PART + n * 8 * TILE_ROW];
            x.load_sums(in, chunk, first_token + 8 * n, lane);
            unpacked[0].multiply(sum[0][n], x);
            unpacked[1].multiply(sum[1][n], x);
        }
        if ((chunk + 1) % length != 0 || chunk + 1 == in.n_chunks) continue;
#pragma unroll
        for (int i = 0; i < n_sums; i++) {
            float &of = sum[i / (n_sums / 2)][i / 4 % TILED_COLUMNS][i % 4];
            float &total = totals[i * TILED_THREADS + thread];
            total = chunk < length ? of : total + of;
            of = 0.0f;
        }
    }
    if (is_idle) return;

#pragma unroll
    for (int i = 0; i < n_sums / 2; i++) {
        const int64_t token = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int row = lane / 4 * 2 + i / 2 % 2;
        if (token >= a.n_tokens) continue;
        float total[2];
        for (int p = 0; p < 2; p++) {
            total[p] = sum[p][i / 4][i % 4];
            if (in.n_chunks > length) total[p] = totals[(p * n_sums / 2 + i) * TILED_THREADS + thread] + total[p];
            total[p] *= in.scales[token];
        }
        fb_finish(a, token, panel, row, total[0], total[1]);
        if (!a.swiglu) fb_finish(a, token, panel + 1, row, total[1], 0.0f);
    }
}

/* ---- Launch ------------------------------------------------------------------------------------------------------ */

template <fb_dtype D>
static int multiply_tiles(const fb_cuda_linear &a, const fb_cuda_inputs &in, fb_cuda_stream stream) {
    const unsigned n_pairs = (unsigned)(a.weight.n_rows + 2 * FB_LANES - 1) / (2 * FB_LANES);
    const unsigned n_rows = (unsigned)in.n_rows;
    if (a.n_tokens <= FB_CUDA_FEW_TOKENS)
        return fb_launch(split_kernel<D, 1>, dim3(n_pairs), SPLIT_THREADS, 0, stream, a, in);
    if (a.n_tokens <= FB_CUDA_TILE_TOKENS)
        return fb_launch(split_kernel<D, 4>, dim3(n_pairs, n_rows / 32), SPLIT_THREADS, 0, stream, a, in);
    /* Neighboring blocks share weights: all tokens fit the L2 cache, all weights may not. */
    const dim3 grid(n_rows / FB_CUDA_TILE_TOKENS, (n_pairs + TILED_WARPS - 1) / TILED_WARPS);
    return fb_launch(tiled_kernel<D>, grid, TILED_THREADS, 0, stream, a, in);
}

enum fb_dtype fb_cuda_inputs_dtype(enum fb_dtype weight, int32_t compute_major) {
    if (weight == FB_F32 || (weight == FB_BF16 && compute_major < 8)) return FB_F32;
    return weight == FB_BF16 ? FB_BF16 : FB_F16;
}

int fb_cuda_multiply_inputs(
    const struct fb_cuda_linear *linear, const struct fb_cuda_inputs *inputs, fb_cuda_stream stream) {
    return FB_FOR_DTYPE_BUT_F32(linear->weight.dtype, multiply_tiles, *linear, *inputs, stream);
}
