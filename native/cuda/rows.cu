/* rows.cu - the operators that work row by row. Contracts are in kernels.h. */
#include "norm.cuh"
#include "pages.cuh"
#include "weights.cuh"

enum { ROW_THREADS = FB_ROW_THREADS, HEADS_WARPS = 4 };

/* ---- Embedding --------------------------------------------------------------------------------------------------- */

/* A thread dequantizes 32 columns of its token's row. */
template <fb_dtype D>
static __global__ void embed_kernel(fb_cuda_weight weight, const int32_t *tokens, float scale, float *out, int64_t ld) {
    const int32_t token = tokens[blockIdx.x];
    const char *panel = fb_panel_of<D>(weight, token / 16);
    float *row = out + (int64_t)blockIdx.x * ld;
    for (int32_t chunk = (int32_t)threadIdx.x; chunk * FB_CHUNK < weight.n_cols; chunk += (int32_t)blockDim.x) {
        fb_chunk<D> unpacked;
        unpacked.load(panel, weight.n_cols, chunk, token % 16);
#pragma unroll
        for (int q = 0; q < FB_CHUNK / 4; q++) {
            float w[4];
            unpacked.quad(q, w);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int32_t column = chunk * FB_CHUNK + 4 * q + i;
                if (column < weight.n_cols) row[column] = scale == 1.0f ? w[i] : w[i] * scale;
            }
        }
    }
}

template <fb_dtype D>
static int embed(const fb_cuda_weight &weight, const int32_t *tokens, int32_t n_tokens, float scale, float *out,
    int64_t ld, fb_cuda_stream stream) {
    return fb_launch(
        embed_kernel<D>, dim3((unsigned)n_tokens), ROW_THREADS / 2, 0, stream, weight, tokens, scale, out, ld);
}

int fb_cuda_embed(const struct fb_cuda_weight *weight, const int32_t *tokens, int32_t n_tokens, float scale, float *out,
    int64_t ld_out, fb_cuda_stream stream) {
    return FB_FOR_DTYPE(weight->dtype, embed, *weight, tokens, n_tokens, scale, out, ld_out, stream);
}

/* ---- Norms ------------------------------------------------------------------------------------------------------- */

static __global__ void rms_norm_kernel(
    const float *in, int64_t ld_in, const float *weight, int32_t n, float eps, float *out, int64_t ld_out) {
    fb_norm_row(in + (int64_t)blockIdx.x * ld_in, weight, n, eps, out + (int64_t)blockIdx.x * ld_out);
}

int fb_cuda_rms_norm(const float *in, int64_t ld_in, const float *weight, int32_t n_rows, int32_t n_cols, float eps,
    float *out, int64_t ld_out, fb_cuda_stream stream) {
    return fb_launch(
        rms_norm_kernel, dim3((unsigned)n_rows), ROW_THREADS, 0, stream, in, ld_in, weight, n_cols, eps, out, ld_out);
}

/* A warp takes a head. */
FB_DEVICE void norm_head(float *values, const float *weight, int32_t head_dim, float eps, int lane) {
    float sum = 0.0f;
    for (int32_t i = lane; i < head_dim; i += FB_WARP)
        sum = fmaf(values[i], values[i], sum);
    sum = fb_warp_sum(sum);
    const float factor = 1.0f / sqrtf(sum / (float)head_dim + eps);
    for (int32_t i = lane; i < head_dim; i += FB_WARP)
        values[i] = values[i] * factor * weight[i];
}

/* A block of threads takes the next 8 heads of a row. */
static __global__ void head_norm_kernel(float *x, int64_t ldx, int32_t n_heads, int32_t n_kv_heads, int32_t head_dim,
    const float *q_weight, const float *k_weight, float eps) {
    const int32_t head = (int32_t)(blockIdx.y * (ROW_THREADS / FB_WARP) + threadIdx.x / FB_WARP);
    if (head >= n_heads + n_kv_heads) return; /* true for the whole warp */
    norm_head(x + (int64_t)blockIdx.x * ldx + (int64_t)head * head_dim, head < n_heads ? q_weight : k_weight, head_dim,
        eps, (int)(threadIdx.x % FB_WARP));
}

int fb_cuda_head_norm(float *x, int64_t ldx, int32_t n_rows, int32_t n_heads, int32_t n_kv_heads, int32_t head_dim,
    const float *q_weight, const float *k_weight, float eps, fb_cuda_stream stream) {
    const int32_t per_block = ROW_THREADS / FB_WARP;
    const dim3 grid((unsigned)n_rows, (unsigned)((n_heads + n_kv_heads + per_block - 1) / per_block));
    return fb_launch(
        head_norm_kernel, grid, ROW_THREADS, 0, stream, x, ldx, n_heads, n_kv_heads, head_dim, q_weight, k_weight, eps);
}

/* ---- Rope -------------------------------------------------------------------------------------------------------- */

/* As fb_embed_row of program/rows.c: angles are rounded to f32, cos and sin are those of double. */
static __global__ void angles_kernel(
    fb_cuda_batch batch, const float *inv_freq, int32_t half, float rope_scale, float *cos_sin, float *sink_rotations) {
    const int32_t row = (int32_t)blockIdx.x, position = batch.positions[row];
    const fb_cuda_sequence sequence = batch.sequences[batch.owners[row]];
    const bool sees_sinks = sequence.n_sinks > 0 && position >= (int64_t)sequence.n_sinks + sequence.window;
    const float seen_at = (float)(sequence.n_sinks + sequence.window - 1);
    float *cosines = cos_sin + (int64_t)row * 2 * half, *rotations = sink_rotations + (int64_t)row * 2 * half;
    for (int32_t i = (int32_t)threadIdx.x; i < half; i += (int32_t)blockDim.x) {
        const float angle = (float)position * inv_freq[i];
        cosines[i] = (float)cos((double)angle) * rope_scale;
        cosines[half + i] = (float)sin((double)angle) * rope_scale;
        if (!sees_sinks) continue;
        const float to = seen_at * inv_freq[i];
        rotations[i] = (float)cos((double)to - (double)angle);
        rotations[half + i] = (float)sin((double)to - (double)angle);
    }
}

int fb_cuda_angles(const struct fb_cuda_batch *batch, const float *inv_freq, int32_t rotary_dim, float rope_scale,
    float *cos_sin, float *sink_rotations, fb_cuda_stream stream) {
    if (rotary_dim == 0) return 0;
    return fb_launch(angles_kernel, dim3((unsigned)batch->n_tokens), 64, 0, stream, *batch, inv_freq, rotary_dim / 2,
        rope_scale, cos_sin, sink_rotations);
}

/* Rotates a pair of a head, whose second number is `half` after the first. */
FB_DEVICE void rotate(float *at, int32_t half, float cosine, float sine) {
    const float first = at[0], second = at[half];
    at[0] = fmaf(first, cosine, -(second * sine));
    at[half] = fmaf(second, cosine, first * sine);
}

static __global__ void rope_kernel(
    float *x, int64_t ldx, int32_t n_heads, int32_t head_dim, int32_t half, const float *cos_sin) {
    float *row = x + (int64_t)blockIdx.x * ldx;
    const float *cosines = cos_sin + (int64_t)blockIdx.x * 2 * half;
    for (int32_t i = (int32_t)threadIdx.x; i < n_heads * half; i += (int32_t)blockDim.x) {
        const int32_t pair = i % half;
        rotate(row + (int64_t)(i / half) * head_dim + pair, half, cosines[pair], cosines[half + pair]);
    }
}

int fb_cuda_rope(float *x, int64_t ldx, int32_t n_rows, int32_t n_heads, int32_t head_dim, int32_t rotary_dim,
    const float *cos_sin, fb_cuda_stream stream) {
    if (rotary_dim == 0) return 0;
    return fb_launch(rope_kernel, dim3((unsigned)n_rows), ROW_THREADS, 0, stream, x, ldx, n_heads, head_dim,
        rotary_dim / 2, cos_sin);
}

/* ---- K and V ----------------------------------------------------------------------------------------------------- */

/* A warp writes one position of K or V, as fb_slab_write does: in bf16 the missing half of a pair becomes
 * zero. */
FB_DEVICE void write_part(const fb_cuda_part &part, char *to, bool is_k, int32_t head_dim, int32_t position,
    bool is_last, const float *from, int lane) {
    float inverse = 0.0f;
    if (part.dtype == FB_Q8_0) {
        float top = 0.0f;
        bool is_finite = true;
        for (int32_t d = lane; d < head_dim; d += FB_WARP) {
            const float magnitude = fabsf(from[d]);
            is_finite = is_finite && fb_is_finite(magnitude);
            top = magnitude > top ? magnitude : top;
        }
        top = fb_warp_max(top);
        is_finite = fb_warp_max(is_finite ? 0.0f : 1.0f) == 0.0f;
        const bool is_zero = !is_finite || top < 1e-30f;
        if (!is_zero) inverse = 127.0f / top;
        if (lane == 0)
            reinterpret_cast<float *>(to + part.elements)[position] = !is_finite ? fb_float_of_bits(0x7FC00000u)
                                                                      : is_zero  ? 0.0f
                                                                                 : top / 127.0f;
    }
    for (int32_t d = lane; d < head_dim; d += FB_WARP) {
        const int64_t at = is_k ? fb_k_element(part.dtype, head_dim, position, d)
                                : fb_v_element(part.dtype, position, d);
        if (part.dtype == FB_F32)
            reinterpret_cast<float *>(to)[at] = from[d];
        else if (part.dtype == FB_F16)
            reinterpret_cast<uint16_t *>(to)[at] = fb_f16_of_float(from[d]);
        else if (part.dtype == FB_BF16) {
            reinterpret_cast<uint16_t *>(to)[at] = fb_bf16_of_float(from[d]);
            if (is_k ? d % 2 == 0 && d == head_dim - 1 : position % 2 == 0 && is_last)
                reinterpret_cast<uint16_t *>(to)[at + 1] = 0;
        } else
            reinterpret_cast<int8_t *>(to)[at] = inverse == 0.0f ? (int8_t)0 : (int8_t)rintf(from[d] * inverse);
    }
}

/* A warp writes K or V of one head of a token; `heads` starts with n_heads heads of q. */
FB_DEVICE void write_head(const float *heads, int32_t row, const fb_cuda_batch &batch, int32_t n_heads,
    const fb_cuda_pages &pages, int32_t layer, int32_t head, bool is_k, int lane) {
    const int32_t position = batch.positions[row];
    const fb_cuda_sequence sequence = batch.sequences[batch.owners[row]];
    if (sequence.n_tokens == 0) return; /* a padding row */
    const int32_t page = batch.pages[sequence.first_page + position / FB_PAGE_POSITIONS];
    char *slab = pages.memory + page * pages.page_bytes +
                 ((int64_t)layer * pages.n_kv_heads + head) * (pages.k.bytes + pages.v.bytes);
    const int32_t from = n_heads + head + (is_k ? 0 : pages.n_kv_heads);
    write_part(is_k ? pages.k : pages.v, is_k ? slab : slab + pages.k.bytes, is_k, pages.head_dim,
        position % FB_PAGE_POSITIONS, position == sequence.n_past + sequence.n_tokens - 1,
        heads + (int64_t)from * pages.head_dim, lane);
}

/* A block takes one head of one token, one warp K and one V. */
static __global__ void kv_write_kernel(
    const float *x, int64_t ldx, fb_cuda_batch batch, int32_t n_heads, fb_cuda_pages pages, int32_t layer) {
    const int32_t row = (int32_t)blockIdx.x;
    write_head(x + row * ldx, row, batch, n_heads, pages, layer, (int32_t)blockIdx.y, threadIdx.x < FB_WARP,
        (int)(threadIdx.x % FB_WARP));
}

int fb_cuda_kv_write(const float *x, int64_t ldx, const struct fb_cuda_batch *batch, int32_t n_heads,
    const struct fb_cuda_pages *pages, int32_t layer, fb_cuda_stream stream) {
    const dim3 grid((unsigned)batch->n_tokens, (unsigned)pages->n_kv_heads);
    return fb_launch(kv_write_kernel, grid, 2 * FB_WARP, 0, stream, x, ldx, *batch, n_heads, *pages, layer);
}

/* ---- Heads, fused ------------------------------------------------------------------------------------------------ */

/* A block takes a KV head of a token and the q heads of its group: the q heads first, then K. */
static __global__ void heads_kernel(float *x, int64_t ldx, fb_cuda_heads h, fb_cuda_batch batch, fb_cuda_pages pages) {
    const int32_t row = (int32_t)blockIdx.x, kv_head = (int32_t)blockIdx.y, head_dim = pages.head_dim;
    const int32_t group = h.n_heads / pages.n_kv_heads, half = h.cos_sin ? h.rotary_dim / 2 : 0;
    const int warp = (int)(threadIdx.x / FB_WARP), lane = (int)(threadIdx.x % FB_WARP);
    float *const heads = x + row * ldx, *const first = heads + (int64_t)kv_head * group * head_dim;
    float *const k = heads + (int64_t)(h.n_heads + kv_head) * head_dim;
    for (int32_t i = warp; h.q_weight && i <= group; i += HEADS_WARPS)
        norm_head(
            i < group ? first + (int64_t)i * head_dim : k, i < group ? h.q_weight : h.k_weight, head_dim, h.eps, lane);
    __syncthreads();
    const float *cosines = h.cos_sin + (int64_t)row * 2 * half;
    for (int32_t i = (int32_t)threadIdx.x; i < (group + 1) * half; i += HEADS_WARPS * FB_WARP) {
        const int32_t head = i / half, pair = i % half;
        float *const at = head < group ? first + (int64_t)head * head_dim : k;
        rotate(at + pair, half, cosines[pair], cosines[half + pair]);
    }
    __syncthreads();
    if (warp < 2) write_head(heads, row, batch, h.n_heads, pages, h.layer, kv_head, warp == 0, lane);
}

int fb_cuda_fused_heads(float *x, int64_t ldx, const struct fb_cuda_heads *heads, const struct fb_cuda_batch *batch,
    const struct fb_cuda_pages *pages, fb_cuda_stream stream) {
    const dim3 grid((unsigned)batch->n_tokens, (unsigned)pages->n_kv_heads);
    return fb_launch(heads_kernel, grid, HEADS_WARPS * FB_WARP, 0, stream, x, ldx, *heads, *batch, *pages);
}

/* ---- Outputs ----------------------------------------------------------------------------------------------------- */

static __global__ void gather_kernel(
    const float *in, int64_t ld_in, const int32_t *rows, int32_t n_cols, float *out, int64_t ld_out) {
    const float *from = in + rows[blockIdx.x] * ld_in;
    for (int32_t i = (int32_t)threadIdx.x; i < n_cols; i += (int32_t)blockDim.x)
        out[(int64_t)blockIdx.x * ld_out + i] = from[i];
}

int fb_cuda_gather(const float *in, int64_t ld_in, const int32_t *rows, int32_t n_rows, int32_t n_cols, float *out,
    int64_t ld_out, fb_cuda_stream stream) {
    return fb_launch(
        gather_kernel, dim3((unsigned)n_rows), ROW_THREADS, 0, stream, in, ld_in, rows, n_cols, out, ld_out);
}

int fb_cuda_find_code(void) {
    return fb_find_code(gather_kernel);
}
