/*
 * kernels.h - the operators of programs as kernels of an NVIDIA GPU: the functions that launch them.
 *
 * All pointers below point to device memory. Weights and pages have the same bytes as on the CPU
 * (quant/layout.h, quant/weight.h, kv/pages.h), so they are copied and never repacked.
 *
 * Results do not depend on the batch: each sum has one order, which depends on the shape alone.
 *
 *   products    columns are divided into chunks of 32, and these into at most 16 segments of whole chunks (8
 *               on tensor cores). A segment starts at 0 and adds its terms one by one in order of k with
 *               fused multiply-adds; on tensor cores tile by tile, and for block formats each block's codes
 *               from 0, then times its scale. The segments are then added in order. So one token and a
 *               thousand get the same bits, though different kernels compute them.
 *   attention   keys are divided into blocks of 256 positions at fixed boundaries, whose parts are merged in
 *               order, whether one block of threads computes them all or each has its own.
 *   sampling    as the CPU's sampler: see candidates.cuh.
 *   norms       256 threads (of a head: 32) add every 256th number, warps fold by halves, warps are added in
 *               order.
 *
 * Results differ from the CPU's by rounding: on tensor cores inputs of products become two parts of f16 or
 * bf16, where the CPU quantizes those of quantized weights to 8 bits and rounds those of bf16 weights to
 * bf16.
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

/* K or V of a slab, and their pool. */
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

/* A sequence of the batch; its page table starts at `first_page` in the batch's list of pages. A sequence
 * without tokens may own the padding rows and tiles of a batch: those write no pages and compute no
 * attention. */
struct fb_cuda_sequence {
    int32_t first_page, n_past, n_tokens, window, n_sinks;
    int32_t first_row; /* row of its first token in the batch */
};

/* The tokens of a batch. */
struct fb_cuda_batch {
    int32_t n_tokens, n_sequences;
    const int32_t *tokens, *positions, *owners; /* [n_tokens]; owners: index of the sequence */
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

/* In place on the heads of each row: the first n_heads by q_weight, the next n_kv_heads by k_weight. */
int fb_cuda_head_norm(float *x, int64_t ldx, int32_t n_rows, int32_t n_heads, int32_t n_kv_heads, int32_t head_dim,
    const float *q_weight, const float *k_weight, float eps, fb_cuda_stream stream);

/* cos_sin and sink_rotations [n_tokens][rotary_dim]: cosines of each pair, then sines, of a token's position,
 * and of the rotation of its query to the position at which sinks see it. In sink_rotations rows of tokens
 * that see no sinks are not written. */
int fb_cuda_angles(const struct fb_cuda_batch *batch, const float *inv_freq, int32_t rotary_dim, float rope_scale,
    float *cos_sin, float *sink_rotations, fb_cuda_stream stream);

/* In place on the first n_heads heads of each row. */
int fb_cuda_rope(float *x, int64_t ldx, int32_t n_rows, int32_t n_heads, int32_t head_dim, int32_t rotary_dim,
    const float *cos_sin, fb_cuda_stream stream);

/* Writes K and V of each row (after n_heads heads of q) to the pages. */
int fb_cuda_kv_write(const float *x, int64_t ldx, const struct fb_cuda_batch *batch, int32_t n_heads,
    const struct fb_cuda_pages *pages, int32_t layer, fb_cuda_stream stream);

/* The operations on heads before attention. */
struct fb_cuda_heads {
    const float *q_weight, *k_weight; /* norm weights of heads, as above; NULL for none */
    const float *cos_sin;             /* [n_tokens][rotary_dim]; NULL for no rope */
    float eps;
    int32_t n_heads, rotary_dim, layer;
};

/* fb_cuda_head_norm, fb_cuda_rope and fb_cuda_kv_write in one launch, with the same bits. */
int fb_cuda_fused_heads(float *x, int64_t ldx, const struct fb_cuda_heads *heads, const struct fb_cuda_batch *batch,
    const struct fb_cuda_pages *pages, fb_cuda_stream stream);

/* Whether this build has code for the thread's current GPU: 0, or the CUDA error. */
int fb_cuda_find_code(void);

/* out[i] = in[rows[i]] */
int fb_cuda_gather(const float *in, int64_t ld_in, const int32_t *rows, int32_t n_rows, int32_t n_cols, float *out,
    int64_t ld_out, fb_cuda_stream stream);

/* ---- Products (linear.cu) ---------------------------------------------------------------------------------------- */

/* As struct fb_linear of ops/linear.h. x is aligned to 4 floats, and ldx is a multiple of 4. */
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

/* For weights in f32 or bf16. */
int fb_cuda_multiply(const struct fb_cuda_linear *linear, fb_cuda_stream stream);

/* ---- Products on tensor cores (inputs.cu, tensor.cu) ------------------------------------------------------------- */

/* Inputs in two parts of 16 bits: the rounded number, and the rounded remainder. In f16 each token is first
 * scaled by a power of two; bf16 needs no scale. */
struct fb_cuda_inputs {
    enum fb_dtype dtype;      /* FB_F16 or FB_BF16 */
    int32_t n_rows, n_chunks; /* n_rows: tokens, rounded up to whole tiles; n_chunks: columns / 32, rounded up */
    uint16_t *halfs;          /* [FB_CUDA_PARTS][n_chunks][n_rows][32], columns in the order of fragments.cuh */
    float *scales;            /* [n_rows]: factor on a token's results */
    float *sums; /* [n_chunks][FB_CUDA_SUMS][n_rows], f16 only: sums of columns 0 .. 15, 16 .. 31, and both */
};

/* The format to which inputs of a weight are rounded on a GPU of compute capability `compute_major`; FB_F32
 * if fb_cuda_multiply multiplies it. */
enum fb_dtype fb_cuda_inputs_dtype(enum fb_dtype weight, int32_t compute_major);

/* Divides `memory` (aligned to 16 bytes) into the arrays of `out` and returns the bytes needed; with NULL it
 * only counts. */
size_t fb_cuda_inputs_view(
    enum fb_dtype dtype, int32_t n_tokens, int32_t n_cols, void *memory, struct fb_cuda_inputs *out);

/* Rounds x, which is as for a product. */
int fb_cuda_round(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_inputs *out,
    fb_cuda_stream stream);

/* fb_cuda_rms_norm to `out` and fb_cuda_round of its results in one launch, with the same bits. */
int fb_cuda_norm_round(const float *in, int64_t ld_in, const float *weight, int32_t n_tokens, int32_t n_cols, float eps,
    float *out, int64_t ld_out, const struct fb_cuda_inputs *inputs, fb_cuda_stream stream);

/* The product of inputs rounded from linear->x, which itself is not read. */
int fb_cuda_multiply_inputs(
    const struct fb_cuda_linear *linear, const struct fb_cuda_inputs *inputs, fb_cuda_stream stream);

/* ---- Products with cuBLASLt (dequantized.cu) --------------------------------------------------------------------- */

/* Plain rows in 16 bits: f16, each row scaled by a power of two, or bf16. */
struct fb_cuda_rows {
    enum fb_dtype dtype; /* FB_F16 or FB_BF16 */
    int32_t width;       /* columns, padded with zeros to a multiple of 8, at most to the next multiple of 32 */
    uint16_t *halfs;     /* [rows][width] */
    float *scales;       /* [rows]: factor on the row's results */
};

/* Dequantizes the rows of some panels: bf16 weights to bf16, all others to f16. */
int fb_cuda_dequantize_rows(const struct fb_cuda_weight *weight, int32_t first_panel, int32_t n_panels,
    const struct fb_cuda_rows *out, fb_cuda_stream stream);

/* Rounds the inputs of a product. */
int fb_cuda_round_rows(const float *x, int64_t ldx, int32_t n_tokens, int32_t n_cols, const struct fb_cuda_rows *out,
    fb_cuda_stream stream);

/* Applies scales, bias, SwiGLU and residual to the sums [n_tokens][n_rows] of a weight's rows from
 * first_panel on; with SwiGLU n_rows is a multiple of 32. */
int fb_cuda_finish(const struct fb_cuda_linear *linear, const struct fb_cuda_rows *weights,
    const struct fb_cuda_rows *inputs, int32_t first_panel, int32_t n_rows, const float *sums, fb_cuda_stream stream);

/* ---- Attention (attention.cu) ------------------------------------------------------------------------------------ */

/* The queries of one block of threads: rows from first_row on of a sequence, where row = token x (heads in a
 * group) + head. */
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
    const struct fb_cuda_tile *tiles; /* [n_tiles], from fb_cuda_tiles */
    int32_t n_tiles, tile_rows;
    /* Split: at least those of the tile with the most parts. 0: one block of threads computes all parts of a tile. */
    int32_t n_parts;
    float *partials; /* fb_cuda_partial_floats floats, if split */
};

/* Rows per tile for heads of this size: 4, 8 or 16. Few if key blocks are split, as in decode. */
int32_t fb_cuda_tile_rows(int32_t head_dim, bool is_split);

/* Fills `tiles` (host memory; NULL only counts) and returns their number. *n_parts: parts of the longest. */
int32_t fb_cuda_tiles(const struct fb_cuda_sequence *sequences, int32_t n_sequences, int32_t group, int32_t tile_rows,
    int32_t window, struct fb_cuda_tile *tiles, int32_t *n_parts);

/* Floats of partial results of a split attention. */
size_t fb_cuda_partial_floats(const struct fb_cuda_attention *attention);

int fb_cuda_attend(const struct fb_cuda_attention *attention, fb_cuda_stream stream);

/* ---- Several GPUs (sums.cu) -------------------------------------------------------------------------------------- */

/* Results of every GPU, gathered on one: part i starts at parts + i * part_floats. */
struct fb_cuda_parts {
    const float *parts;
    int64_t part_floats, ld; /* ld: floats per row of a part */
    int32_t n_parts;
};

/* out = ((part 0 + part 1) + part 2) ... + residual (or NULL), which may be out */
int fb_cuda_sum(const struct fb_cuda_parts *parts, int32_t n_rows, int32_t n_cols, const float *residual,
    int64_t ld_residual, float *out, int64_t ld_out, fb_cuda_stream stream);

/* out [n_rows][n_cols] from parts of `ld` columns; the last part ends with column n_cols, so it may overlap
 * the one before. Sets *non_finite to 1 if a number is NaN or infinite. */
int fb_cuda_concatenate(const struct fb_cuda_parts *parts, int32_t n_rows, int32_t n_cols, float *out,
    int32_t *non_finite, fb_cuda_stream stream);

/* ---- Sampling (sample.cu) ---------------------------------------------------------------------------------------- */

/* Samples a token for each plan, the same that fb_sample would from the same logits; its log-probability may
 * differ in the last bit of a logarithm. A token is -1 if all were banned or the row's logits are damaged. */
struct fb_cuda_sampling {
    const float *logits; /* [rows][ld_logits] */
    int64_t ld_logits;
    const struct fb_sample_plan *plans; /* [n_plans] */
    const struct fb_sample_change *changes;
    int32_t n_plans, vocab_size;
    int32_t *tokens; /* [n_plans] */
    float *logprobs;
    char *scratch;     /* aligned to 8 bytes: fb_cuda_sample_bytes for each of n_at_once plans, */
    int32_t n_at_once; /* which are sampled in parallel, at most 65535 */
};

size_t fb_cuda_sample_bytes(int32_t vocab_size);
int fb_cuda_sample(const struct fb_cuda_sampling *sampling, fb_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
