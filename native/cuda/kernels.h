/*
 * kernels.h - the operators of programs as kernels of an NVIDIA GPU: what is launched with what.
 *
 * Every pointer below is one into device memory. Weights and pages lie there byte for byte as the CPU holds them (quant/layout.h,
 * quant/weight.h, kv/pages.h), so they are copied and never repacked.
 *
 * Results do not depend on the batch: each sum has one order, which the shape alone decides.
 *
 *     products    columns come in chunks of 32 and at most 16 segments of whole chunks, on tensor cores 8. A segment starts at 0 and
 *                 takes its terms one by one in order of k with fused multiply-adds; on tensor cores tile by tile, of block formats
 *                 each block's codes from 0, then times its scale. The segments are then added in order. So one token and a thousand
 *                 get the same bits, though other kernels compute them.
 *     attention   keys come in blocks of 256 positions at fixed places, whose parts are merged in order, whether one block of
 *                 threads walks them or many take one each.
 *     sampling    as the CPU's sampler: see candidates.cuh.
 *     norms       256 (of a head: 32) threads take every 256th number, warps fold by halves, warps are added in order.
 *
 * Against the CPU they differ by rounding: on tensor cores inputs of products become two parts of f16 or bf16, where the CPU rounds
 * those of quantized weights to 8 bits and those of bf16 weights to bf16.
 *
 * A launch returns 0 or a cudaError_t. It waits for nothing.
 */
#ifndef FABULA_CUDA_KERNELS_H
#define FABULA_CUDA_KERNELS_H

#include "fabula.h"
#include "ops/sample_plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef void *fb_cuda_stream; /* a cudaStream_t */

enum { FB_CUDA_KEY_BLOCK = 256, FB_CUDA_FEW_TOKENS = 8, FB_CUDA_TILE_TOKENS = 64, FB_CUDA_SUMS = 3, FB_CUDA_PARTS = 2 };

struct fb_cuda_weight {
    enum fb_dtype dtype;
    int32_t n_rows, n_cols;
    size_t panel_bytes;
    const char *panels;
};

/* K or V of a slab, and the pool they lie in. */
struct fb_cuda_part {
    enum fb_dtype dtype;
    int64_t elements, bytes;
};

struct fb_cuda_pages {
    struct fb_cuda_part k, v;
    int32_t n_kv_heads, head_dim;
    int64_t page_bytes;
    char *memory;
};

/* A sequence of the batch; its pages stand from `first_page` on in the batch's list of pages. One of no tokens may own rows and
 * tiles that only fill up a batch: they write no pages and get no attention. */
struct fb_cuda_sequence {
    int32_t first_page, n_past, n_tokens, window, n_sinks;
    int32_t first_row; /* of its first token in the batch */
};

/* What the tokens of a batch are. */
struct fb_cuda_batch {
    int32_t n_tokens, n_sequences;
    const int32_t *tokens, *positions, *owners; /* [n_tokens]; owner: its sequence */
    const struct fb_cuda_sequence *sequences;   /* [n_sequences] */
    const int32_t *pages;
};

/* ---- Row by row (rows.cu) ---------------------------------------------------------------------------------------- */

/* out[t] = scale * row tokens[t];  out [n_tokens][ld_out] */
int fb_cuda_embed(const struct fb_cuda_weight *weight, const int32_t *tokens, int32_t n_tokens, float scale, float *out,
    int64_t ld_out, fb_cuda_stream stream);

/* out = in / sqrt(mean(in^2) + eps) * weight of each row; out may be in */
int fb_cuda_rms_norm(const float *in, int64_t ld_in, const float *weight, int32_t n_rows, int32_t n_cols, float eps,
    float *out, int64_t ld_out, fb_cuda_stream stream);

/* In place on heads side by side in each row: the first n_heads by q_weight, n_kv_heads behind them by k_weight. */
int fb_cuda_head_norm(float *x, int64_t ldx, int32_t n_rows, int32_t n_heads, int32_t n_kv_heads, int32_t head_dim,
    const float *q_weight, const float *k_weight, float eps, fb_cuda_stream stream);

/* cos_sin and sink_rotations [n_tokens][rotary_dim]: cosines of each pair, then sines, of a token's position, and of what turns its
 * query to where sinks see it. Rows of tokens that see no sinks are left as they are in sink_rotations. */
int fb_cuda_angles(const struct fb_cuda_batch *batch, const float *inv_freq, int32_t rotary_dim, float rope_scale,
    float *cos_sin, float *sink_rotations, fb_cuda_stream stream);

/* In place on the first n_heads heads of each row. */
int fb_cuda_rope(float *x, int64_t ldx, int32_t n_rows, int32_t n_heads, int32_t head_dim, int32_t rotary_dim,
    const float *cos_sin, fb_cuda_stream stream);

/* K and V of each row (behind n_heads heads of q) into the pages. */
int fb_cuda_kv_write(const float *x, int64_t ldx, const struct fb_cuda_batch *batch, int32_t n_heads,
    const struct fb_cuda_pages *pages, int32_t layer, fb_cuda_stream stream);

/* What is done to heads before attention. */
struct fb_cuda_heads {
    const float *q_weight, *k_weight; /* norms of heads, as above; NULL for none */
    const float *cos_sin;             /* [n_tokens][rotary_dim]; NULL for no rope */
    float eps;
    int32_t n_heads, rotary_dim, layer;
};

/* fb_cuda_head_norm, fb_cuda_rope and fb_cuda_kv_write in one launch: the same bits. */
int fb_cuda_place_heads(float *x, int64_t ldx, const struct fb_cuda_heads *heads, const struct fb_cuda_batch *batch,
    const struct fb_cuda_pages *pages, fb_cuda_stream stream);

/* Whether this build has code for the GPU that the thread has entered: 0, or why not. */
int fb_cuda_find_code(void);

/* out[i] = in[rows[i]] */
int fb_cuda_gather(const float *in, int64_t ld_in, const int32_t *rows, int32_t n_rows, int32_t n_cols, float *out,
    int64_t ld_out, fb_cuda_stream stream);

/* ---- Products (linear.cu) ---------------------------------------------------------------------------------------- */

/* As struct fb_linear of ops/linear.h. x and ldx are multiples of 4 floats. */
struct fb_cuda_linear {
    struct fb_cuda_weight weight;
    const float *x;
    const float *bias;     /* [weight rows] or NULL */
    const float *residual; /* [n_tokens][ld_residual] or NULL; may be out */
    float *out;            /* [n_tokens][ld_out], its first `width` columns written */
    int64_t ldx, ld_residual, ld_out;
    int32_t n_tokens, width;
    bool swiglu;
    int32_t *non_finite; /* NULL, or set to 1 when a result is NaN or infinite */
};

/* Weights in f32 or bf16. */
int fb_cuda_multiply(const struct fb_cuda_linear *linear, fb_cuda_stream stream);

/* ---- Products on tensor cores (inputs.cu, tensor.cu) ------------------------------------------------------------- */

/* Inputs in two parts of 16 bits: rounded, and what that left over rounded again. In f16 after a power of two for each token, or in bf16. */
struct fb_cuda_inputs {
    enum fb_dtype dtype;      /* FB_F16 or FB_BF16 */
    int32_t n_rows, n_chunks; /* tokens in whole tiles; columns / 32, rounded up */
    uint16_t *halfs;          /* [FB_CUDA_PARTS][n_chunks][n_rows][32], columns in the order of fragments.cuh */
    float *scales;            /* [n_rows]: what a token's results are multiplied with */
    float *sums;              /* [n_chunks][FB_CUDA_SUMS][n_rows], f16 only: of columns 0 .. 15, 16 .. 31, and both */
};

/* What inputs of a weight's format are rounded to by a GPU of compute capability `compute_major`; FB_F32 if it is fb_cuda_multiply
 * that multiplies it. */
enum fb_dtype fb_cuda_inputs_dtype(enum fb_dtype weight, int32_t compute_major);

/* How inputs lie in `memory`, which begins at a multiple of 16; returns how many bytes that are. NULL only counts. */
size_t fb_cuda_inputs_view(
    enum fb_dtype dtype, int32_t n_tokens, int32_t n_cols, void *memory, struct fb_cuda_inputs *out);

/* x as for a product. */
int fb_cuda_round(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_inputs *out,
    fb_cuda_stream stream);

/* fb_cuda_rms_norm, whose results are `out`, and fb_cuda_round of these in one launch: the same bits. */
int fb_cuda_norm_round(const float *in, int64_t ld_in, const float *weight, int32_t n_tokens, int32_t n_cols, float eps,
    float *out, int64_t ld_out, const struct fb_cuda_inputs *inputs, fb_cuda_stream stream);

/* The product of inputs that were rounded from linear->x, which itself is not read. */
int fb_cuda_multiply_inputs(
    const struct fb_cuda_linear *linear, const struct fb_cuda_inputs *inputs, fb_cuda_stream stream);

/* ---- Around products of cuBLASLt (dequantized.cu) --------------------------------------------------------------------- */

/* Rows side by side in 16 bits: f16 after a power of two for each row, or bf16. */
struct fb_cuda_rows {
    enum fb_dtype dtype; /* FB_F16 or FB_BF16 */
    int32_t width;       /* columns, with zeros behind the last: a multiple of 8, at most the next one of 32 */
    uint16_t *halfs;     /* [rows][width] */
    float *scales;       /* [rows]: what the row is multiplied with */
};

/* The rows of some panels; in bf16 a weight in bf16, any other in f16. */
int fb_cuda_dequantize_rows(const struct fb_cuda_weight *weight, int32_t first_panel, int32_t n_panels,
    const struct fb_cuda_rows *out, fb_cuda_stream stream);

/* Inputs of a product. */
int fb_cuda_round_rows(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_rows *out,
    fb_cuda_stream stream);

/* What stands behind the sums [n_tokens][n_rows] of a weight's rows from a panel on, a multiple of 32 with SwiGLU. */
int fb_cuda_finish(const struct fb_cuda_linear *linear, const struct fb_cuda_rows *weights,
    const struct fb_cuda_rows *inputs, int32_t first_panel, int32_t n_rows, const float *sums, fb_cuda_stream stream);

/* ---- Attention (attention.cu) ------------------------------------------------------------------------------------ */

/* Queries that a block of threads takes: rows first_row .. of a sequence, where row = token x (heads in a group) + head. */
struct fb_cuda_tile {
    int32_t sequence, first_row;
};

struct fb_cuda_attention {
    struct fb_cuda_batch batch;
    struct fb_cuda_pages pages;
    int32_t layer, window, n_heads;
    float scale;
    const float *sink_rotations; /* [n_tokens][rotary_dim] */
    int32_t rotary_dim;
    const float *q; /* [n_tokens][ldq] */
    float *out;     /* [n_tokens][ld_out] */
    int64_t ldq, ld_out;
    const struct fb_cuda_tile *tiles; /* [n_tiles], of fb_cuda_tiles */
    int32_t n_tiles, tile_rows;
    int32_t
        n_parts; /* at least those of the tile that has most, when split; 0: a block of threads walks all parts of its tile */
    float *partials; /* fb_cuda_partial_floats, when split */
};

/* Rows of a tile for heads of this size: 4, 8 or 16. Few where key blocks are split, as in decoding. */
int32_t fb_cuda_tile_rows(int32_t head_dim, bool is_split);

/* Fills `tiles` (host memory; NULL only counts) and returns how many there are. *n_parts: parts of the longest. */
int32_t fb_cuda_tiles(const struct fb_cuda_sequence *sequences, int32_t n_sequences, int32_t group, int32_t tile_rows,
    int32_t window, struct fb_cuda_tile *tiles, int32_t *n_parts);

/* Floats of partial results of a split attention. */
size_t fb_cuda_partial_floats(const struct fb_cuda_attention *attention);

int fb_cuda_attend(const struct fb_cuda_attention *attention, fb_cuda_stream stream);

/* ---- Several GPUs (sums.cu) --------------------------------------------------------------------------------------- */

/* Results of every GPU, side by side in the memory of one: part i begins i * part_floats behind `parts`. */
struct fb_cuda_parts {
    const float *parts;
    int64_t part_floats, ld; /* of a part's rows */
    int32_t n_parts;
};

/* out = ((part 0 + part 1) + part 2) ... + residual (or NULL), which may be out */
int fb_cuda_sum(const struct fb_cuda_parts *parts, int32_t n_rows, int32_t n_cols, const float *residual,
    int64_t ld_residual, float *out, int64_t ld_out, fb_cuda_stream stream);

/* out [n_rows][n_cols] from parts of `ld` columns, of which the last begins where it ends with column n_cols. *non_finite becomes 1
 * when a number is NaN or infinite. */
int fb_cuda_line_up(const struct fb_cuda_parts *parts, int32_t n_rows, int32_t n_cols, float *out, int32_t *non_finite,
    fb_cuda_stream stream);

/* ---- Sampling (sample.cu) ---------------------------------------------------------------------------------------- */

/* Draws a token by each plan, as fb_sample does from the same logits: the same token, and its log-probability but for the last bit
 * of a logarithm. A token is -1 if all were banned, or if the row's logits are damaged. */
struct fb_cuda_draws {
    const float *logits; /* [rows][ld_logits] */
    int64_t ld_logits;
    const struct fb_sample_plan *plans; /* [n_plans] */
    const struct fb_sample_change *changes;
    int32_t n_plans, vocab_size;
    int32_t *tokens; /* [n_plans] */
    float *logprobs;
    char *scratch;     /* at a multiple of 8 bytes: of fb_cuda_draw_bytes for each of n_at_once plans, */
    int32_t n_at_once; /* which are gone through together, up to 65535 */
};

size_t fb_cuda_draw_bytes(int32_t vocab_size);
int fb_cuda_draw(const struct fb_cuda_draws *draws, fb_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
