/*
 * attention.cu - causal attention over paged K and V.
 *
 * A block of 256 threads takes a tile of queries that share a KV head, and reads each page once for all of
 * them:
 *
 *     scores    a warp takes a page of the key block, a lane one position: sums over the head in order of
 *               dimension
 *     softmax   a warp takes a query; of its 256 scores those that it does not see become 0 after exp
 *     values    a thread takes a dimension of every s-th page, where s is as many as there are threads for;
 *               these sums are added in order
 *
 * The result of a query for a key block depends on its position alone. Parts are merged as in
 * ops/attention.h, in order of the blocks and the sinks first: either by the same threads, which compute the
 * parts one after another (prefill), or each part has its own threads and merge_kernel merges them (few
 * tokens with a long past).
 */
#include "pages.cuh"
#include "device.h"
#include "kernels.h"

enum { THREADS = 256, KEYS = FB_CUDA_KEY_BLOCK, PAGE = FB_PAGE_POSITIONS, N_STATS = 6 };

/* ---- Visible keys of a tile -------------------------------------------------------------------------------------- */

/* As fb_lowest_visible and fb_sees_sinks of ops/attention.h. */
FB_BOTH int32_t lowest_visible(const fb_cuda_sequence &s, int32_t window, int32_t position) {
    int32_t low = window > 0 && position >= window ? position - window + 1 : 0;
    if (s.window > 0 && position - s.window >= s.n_sinks && position - s.window >= low) low = position - s.window + 1;
    return low;
}

FB_BOTH bool sees_sinks(const fb_cuda_sequence &s, int32_t window, int32_t position) {
    const int64_t reach = (int64_t)s.n_sinks + s.window;
    return s.n_sinks > 0 && position >= reach && (window == 0 || window >= reach);
}

struct tile_view {
    int32_t n_rows, first_position, last_position;
    int32_t first_block, n_parts;
    bool sinks; /* some query sees sinks outside its window: they are part 0 */
};

FB_BOTH tile_view view_of(
    const fb_cuda_sequence &s, const fb_cuda_tile &tile, int32_t group, int32_t tile_rows, int32_t window) {
    const int64_t rest = (int64_t)s.n_tokens * group - tile.first_row;
    tile_view v;
    v.n_rows = rest < tile_rows ? (int32_t)rest : tile_rows;
    v.first_position = s.n_past + tile.first_row / group;
    v.last_position = s.n_past + (tile.first_row + v.n_rows - 1) / group;
    v.first_block = lowest_visible(s, window, v.first_position) / KEYS;
    v.sinks = sees_sinks(s, window, v.last_position);
    v.n_parts = v.n_rows > 0 ? v.last_position / KEYS + 1 - v.first_block + (v.sinks ? 1 : 0) : 0;
    return v;
}

/* ---- Pages ------------------------------------------------------------------------------------------------------- */

FB_DEVICE float element(fb_dtype dtype, const char *at, int64_t index) {
    if (dtype == FB_F32) return reinterpret_cast<const float *>(at)[index];
    if (dtype == FB_F16) return fb_float_of_f16(reinterpret_cast<const uint16_t *>(at)[index]);
    if (dtype == FB_BF16) return fb_float_of_bf16(reinterpret_cast<const uint16_t *>(at)[index]);
    return (float)reinterpret_cast<const int8_t *>(at)[index];
}

FB_DEVICE float scale_of(const fb_cuda_part &part, const char *at, int32_t position) {
    return part.dtype == FB_Q8_0 ? reinterpret_cast<const float *>(at + part.elements)[position] : 1.0f;
}

/* Scores of R queries for a lane's position of K; q [R][stride]. */
template <fb_dtype D, int R>
FB_DEVICE void score(const char *k, int32_t head_dim, const float *q, int32_t stride, int lane, float sum[R]) {
    for (int32_t d = 0; d < head_dim; d += 4) {
        float key[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            key[i] = d + i < head_dim ? element(D, k, fb_k_element(D, head_dim, lane, d + i)) : 0.0f;
#pragma unroll
        for (int r = 0; r < R; r++) {
            float query[4];
            fb_load4(q + r * stride + d, query);
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[r] = fmaf(key[i], query[i], sum[r]);
        }
    }
}

/* sum += weights times dimension d of V's positions from .. end-1; weights [R][KEYS], 0 for positions that a
 * query does not see. */
template <fb_dtype D, int R>
FB_DEVICE void add_values(const char *v, int32_t d, int32_t from, int32_t end, const float *weights, float sum[R]) {
    for (int32_t p = from / 4 * 4; p < end; p += 4) {
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            value[i] = p + i >= from && p + i < end ? element(D, v, fb_v_element(D, p + i, d)) : 0.0f;
#pragma unroll
        for (int r = 0; r < R; r++) {
            float weight[4];
            fb_load4(weights + r * KEYS + p, weight);
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[r] = fmaf(weight[i], value[i], sum[r]);
        }
    }
}

/* ---- Parts ------------------------------------------------------------------------------------------------------- */

/* Factors of both sums in sum = sum merged with part. A part with length 0 changes nothing. */
FB_DEVICE void merge_factors(float *sum_max, float *sum_length, float part_max, float part_length, float factors[2]) {
    if (part_length == 0.0f) {
        factors[0] = 1.0f, factors[1] = 0.0f;
    } else if (*sum_length == 0.0f) {
        factors[0] = 0.0f, factors[1] = 1.0f;
        *sum_max = part_max, *sum_length = part_length;
    } else {
        const float top = *sum_max > part_max ? *sum_max : part_max;
        factors[0] = fb_exp(*sum_max - top), factors[1] = fb_exp(part_max - top);
        *sum_length = fmaf(part_length, factors[1], *sum_length * factors[0]);
        *sum_max = top;
    }
}

FB_DEVICE float *partial_at(const fb_cuda_attention &a, int64_t tile, int32_t kv_head, int32_t part) {
    const int32_t padded = (a.pages.head_dim + 15) / 16 * 16;
    return a.partials + ((tile * a.pages.n_kv_heads + kv_head) * a.n_parts + part) * a.tile_rows * (padded + 2);
}

/* Shared memory in floats: queries, scores, stats, and, if not split, the sums of the tile. */
static int32_t query_stride(int32_t head_dim) {
    return (head_dim + 3) / 4 * 4;
}

static size_t shared_floats(int32_t head_dim, int32_t rows, bool is_split) {
    const size_t values = is_split ? 0 : (size_t)(head_dim + 15) / 16 * 16;
    return (size_t)rows * ((size_t)query_stride(head_dim) + KEYS + N_STATS + values);
}

template <int R, bool IS_SPLIT> static __global__ void __launch_bounds__(THREADS) attend_kernel(fb_cuda_attention a) {
    FB_SHARED_FLOATS(memory);
    const int32_t head_dim = a.pages.head_dim, padded = (head_dim + 15) / 16 * 16, stride = (head_dim + 3) / 4 * 4;
    float *q = memory, *scores = q + R * stride, *stats = scores + R * KEYS, *values = stats + R * N_STATS;
    float *part_max = stats, *part_length = stats + R, *sum_max = stats + 2 * R, *sum_length = stats + 3 * R;
    float *old_factor = stats + 4 * R, *new_factor = stats + 5 * R;

    /* Late positions, which see most, start first. */
    const int32_t number = a.n_tiles - 1 - (int32_t)blockIdx.x, kv_head = (int32_t)blockIdx.y;
    const int32_t group = a.n_heads / a.pages.n_kv_heads, half = a.rotary_dim / 2;
    const fb_cuda_tile tile = a.tiles[number];
    const fb_cuda_sequence sequence = a.batch.sequences[tile.sequence];
    const tile_view view = view_of(sequence, tile, group, R, a.window);
    const int thread = (int)threadIdx.x, warp = thread / FB_WARP, lane = thread % FB_WARP;
    const int slices = padded < THREADS ? THREADS / padded : 1, slice = padded < THREADS ? thread / padded : 0;
    const int64_t slab = ((int64_t)a.layer * a.pages.n_kv_heads + kv_head) * (a.pages.k.bytes + a.pages.v.bytes);
    const int32_t begin = IS_SPLIT ? (int32_t)blockIdx.z : 0, end = IS_SPLIT ? begin + 1 : view.n_parts;
    if (begin >= view.n_parts) return; /* true for the whole block */

    if (!IS_SPLIT) {
        for (int32_t i = thread; i < R * padded; i += THREADS)
            values[i] = 0.0f;
        if (thread < R) sum_max[thread] = -INFINITY, sum_length[thread] = 0.0f;
    }
    for (int32_t part = begin; part < end; part++) {
        const bool is_sinks = view.sinks && part == 0;
        if (part == begin || (view.sinks && part == 1)) { /* load the queries; for the sinks, rotated */
            for (int32_t i = thread; i < R * stride; i += THREADS) {
                const int32_t r = i / stride, d = i % stride, row = tile.first_row + r, token = row / group;
                float x = 0.0f;
                if (r < view.n_rows && d < head_dim) {
                    const float *from = a.q + (int64_t)(sequence.first_row + token) * a.ldq +
                                        ((int64_t)kv_head * group + row % group) * head_dim;
                    x = from[d];
                    if (is_sinks && d < 2 * half && sees_sinks(sequence, a.window, sequence.n_past + token)) {
                        const float *rotation = a.sink_rotations + (int64_t)(sequence.first_row + token) * 2 * half +
                                                d % half;
                        x = d < half ? fmaf(x, rotation[0], -(from[d + half] * rotation[half]))
                                     : fmaf(x, rotation[0], from[d - half] * rotation[half]);
                    }
                }
                q[i] = x;
            }
        }
        __syncthreads();

        /* Positions start + low .. start + high are visible to some query. */
        const int32_t start = is_sinks ? 0 : (view.first_block + part - (view.sinks ? 1 : 0)) * KEYS;
        int32_t low = 0, high = sequence.n_sinks - 1;
        if (!is_sinks) {
            low = lowest_visible(sequence, a.window, view.first_position) - start;
            low = low > 0 ? low : 0;
            high = view.last_position - start < KEYS - 1 ? view.last_position - start : KEYS - 1;
        }
        const int32_t first_page = low / PAGE, last_page = high / PAGE;
        const int32_t *pages = a.batch.pages + sequence.first_page + start / PAGE;

        if (warp >= first_page && warp <= last_page) {
            const char *k = a.pages.memory + pages[warp] * a.pages.page_bytes + slab;
            float sum[R];
#pragma unroll
            for (int r = 0; r < R; r++)
                sum[r] = 0.0f;
            switch (a.pages.k.dtype) {
            case FB_F32:
                score<FB_F32, R>(k, head_dim, q, stride, lane, sum);
                break;
            case FB_F16:
                score<FB_F16, R>(k, head_dim, q, stride, lane, sum);
                break;
            case FB_BF16:
                score<FB_BF16, R>(k, head_dim, q, stride, lane, sum);
                break;
            default:
                score<FB_Q8_0, R>(k, head_dim, q, stride, lane, sum);
            }
            const float scale = scale_of(a.pages.k, k, lane);
#pragma unroll
            for (int r = 0; r < R; r++)
                scores[r * KEYS + warp * PAGE + lane] = sum[r] * scale;
        }
        __syncthreads();

        for (int r = warp; r < R; r += THREADS / FB_WARP) {
            const int32_t position = sequence.n_past + (tile.first_row + r) / group;
            int32_t from = 0, to = 0;
            if (r < view.n_rows && is_sinks) {
                to = sees_sinks(sequence, a.window, position) ? sequence.n_sinks : 0;
            } else if (r < view.n_rows) {
                from = lowest_visible(sequence, a.window, position) - start;
                to = position - start < high ? position - start + 1 : high + 1;
            }
            float x[KEYS / FB_WARP], top = -INFINITY, length = 0.0f;
#pragma unroll
            for (int i = 0; i < KEYS / FB_WARP; i++) {
                const int column = i * FB_WARP + lane;
                x[i] = column >= from && column < to ? scores[r * KEYS + column] : -INFINITY;
                top = x[i] > top ? x[i] : top;
            }
            top = fb_warp_max(top) * a.scale;
#pragma unroll
            for (int i = 0; i < KEYS / FB_WARP; i++) {
                const int column = i * FB_WARP + lane;
                x[i] = column >= from && column < to ? fb_exp(fmaf(x[i], a.scale, -top)) : 0.0f;
                length += x[i];
                if (i >= first_page && i <= last_page)
                    x[i] *= scale_of(
                        a.pages.v, a.pages.memory + pages[i] * a.pages.page_bytes + slab + a.pages.k.bytes, lane);
                scores[r * KEYS + column] = column >= from && column < to ? x[i] : 0.0f;
            }
            length = fb_warp_sum(length);
            if (lane != 0) continue;
            part_max[r] = top;
            part_length[r] = length;
            if (IS_SPLIT) continue;
            float factors[2];
            merge_factors(&sum_max[r], &sum_length[r], top, length, factors);
            old_factor[r] = factors[0];
            new_factor[r] = factors[1];
        }
        __syncthreads();

        float *partial = IS_SPLIT ? partial_at(a, number, kv_head, part) : nullptr;
        if (IS_SPLIT && thread < R) {
            partial[thread] = part_max[thread];
            partial[R + thread] = part_length[thread];
        }
        for (int32_t first = 0; first < padded; first += THREADS) {
            const int32_t d = first + (padded < THREADS ? thread % padded : thread);
            float sum[R];
#pragma unroll
            for (int r = 0; r < R; r++)
                sum[r] = 0.0f;
            for (int32_t i = slice; i <= last_page && d < padded && slice < slices; i += slices) {
                if (i < first_page) continue;
                const char *v = a.pages.memory + pages[i] * a.pages.page_bytes + slab + a.pages.k.bytes;
                const int32_t from = low > i * PAGE ? low - i * PAGE : 0;
                const int32_t to = high - i * PAGE < PAGE ? high - i * PAGE + 1 : PAGE;
                const float *weights = scores + i * PAGE;
                switch (a.pages.v.dtype) {
                case FB_F32:
                    add_values<FB_F32, R>(v, d, from, to, weights, sum);
                    break;
                case FB_F16:
                    add_values<FB_F16, R>(v, d, from, to, weights, sum);
                    break;
                case FB_BF16:
                    add_values<FB_BF16, R>(v, d, from, to, weights, sum);
                    break;
                default:
                    add_values<FB_Q8_0, R>(v, d, from, to, weights, sum);
                }
            }
            if (slices > 1) { /* all dimensions fit one iteration, so the scores' memory is free */
                __syncthreads();
#pragma unroll
                for (int r = 0; r < R; r++)
                    scores[r * KEYS + thread] = sum[r];
                __syncthreads();
#pragma unroll
                for (int r = 0; r < R; r++)
                    for (int s = 1; s < slices && slice == 0; s++)
                        sum[r] += scores[r * KEYS + s * padded + d];
            }
            if (d >= padded || slice != 0) continue;
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (IS_SPLIT)
                    partial[2 * R + r * padded + d] = sum[r];
                else
                    values[r * padded + d] = fmaf(sum[r], new_factor[r], values[r * padded + d] * old_factor[r]);
            }
        }
        __syncthreads();
    }
    if constexpr (!IS_SPLIT) {
        for (int32_t i = thread; i < view.n_rows * head_dim; i += THREADS) {
            const int32_t r = i / head_dim, d = i % head_dim, row = tile.first_row + r;
            float *to = a.out + (int64_t)(sequence.first_row + row / group) * a.ld_out +
                        ((int64_t)kv_head * group + row % group) * head_dim;
            to[d] = values[r * padded + d] * (1.0f / sum_length[r]);
        }
    }
}

/* Merges the parts of a split tile in order. */
static __global__ void merge_kernel(fb_cuda_attention a) {
    const int32_t number = (int32_t)blockIdx.x, kv_head = (int32_t)blockIdx.y, rows = a.tile_rows;
    const int32_t head_dim = a.pages.head_dim, padded = (head_dim + 15) / 16 * 16;
    const int32_t group = a.n_heads / a.pages.n_kv_heads;
    const fb_cuda_tile tile = a.tiles[number];
    const fb_cuda_sequence sequence = a.batch.sequences[tile.sequence];
    const tile_view view = view_of(sequence, tile, group, rows, a.window);
    for (int32_t i = (int32_t)threadIdx.x; i < view.n_rows * head_dim; i += (int32_t)blockDim.x) {
        const int32_t r = i / head_dim, d = i % head_dim, row = tile.first_row + r;
        float value = 0.0f, top = -INFINITY, length = 0.0f;
        for (int32_t part = 0; part < view.n_parts; part++) {
            const float *from = partial_at(a, number, kv_head, part);
            float factors[2];
            merge_factors(&top, &length, from[r], from[rows + r], factors);
            value = fmaf(from[2 * rows + r * padded + d], factors[1], value * factors[0]);
        }
        float *to = a.out + (int64_t)(sequence.first_row + row / group) * a.ld_out +
                    ((int64_t)kv_head * group + row % group) * head_dim;
        to[d] = value * (1.0f / length);
    }
}

/* ---- Host side --------------------------------------------------------------------------------------------------- */

int32_t fb_cuda_tile_rows(int32_t head_dim, bool is_split) {
    if (head_dim > 512) return 4;
    return head_dim > 128 || is_split ? 8 : 16;
}

int32_t fb_cuda_tiles(const struct fb_cuda_sequence *sequences, int32_t n_sequences, int32_t group, int32_t tile_rows,
    int32_t window, struct fb_cuda_tile *tiles, int32_t *n_parts) {
    int32_t n_tiles = 0;
    *n_parts = 0;
    for (int32_t s = 0; s < n_sequences; s++)
        for (int32_t row = 0; row < sequences[s].n_tokens * group; row += tile_rows) {
            const fb_cuda_tile tile = {s, row};
            const int32_t parts = view_of(sequences[s], tile, group, tile_rows, window).n_parts;
            if (parts > *n_parts) *n_parts = parts;
            if (tiles) tiles[n_tiles] = tile;
            n_tiles++;
        }
    return n_tiles;
}

size_t fb_cuda_partial_floats(const struct fb_cuda_attention *a) {
    const size_t padded = (size_t)(a->pages.head_dim + 15) / 16 * 16;
    return (size_t)a->n_tiles * (size_t)a->pages.n_kv_heads * (size_t)a->n_parts * (size_t)a->tile_rows * (padded + 2);
}

template <int R> static int attend(const fb_cuda_attention &a, fb_cuda_stream stream) {
    const size_t bytes = shared_floats(a.pages.head_dim, R, false) * sizeof(float);
    const dim3 grid((unsigned)a.n_tiles, (unsigned)a.pages.n_kv_heads);
    return fb_launch(attend_kernel<R, false>, grid, THREADS, bytes, stream, a);
}

template <int R> static int attend_split(const fb_cuda_attention &a, fb_cuda_stream stream) {
    const size_t bytes = shared_floats(a.pages.head_dim, R, true) * sizeof(float);
    const dim3 grid((unsigned)a.n_tiles, (unsigned)a.pages.n_kv_heads, (unsigned)a.n_parts);
    const int status = fb_launch(attend_kernel<R, true>, grid, THREADS, bytes, stream, a);
    return status ? status : fb_launch(merge_kernel, dim3(grid.x, grid.y), THREADS, 0, stream, a);
}

/* The sizes that fb_cuda_tile_rows returns. */
int fb_cuda_attend(const struct fb_cuda_attention *a, fb_cuda_stream stream) {
    if (a->n_parts > 0) return a->tile_rows == 4 ? attend_split<4>(*a, stream) : attend_split<8>(*a, stream);
    return a->tile_rows == 4   ? attend<4>(*a, stream)
           : a->tile_rows == 8 ? attend<8>(*a, stream)
                               : attend<16>(*a, stream);
}
