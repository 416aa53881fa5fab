/*
 * product.c - products of a program: on tensor cores, on ordinary cores, or (many tokens, if the caller asked
 * for it) with cuBLASLt. See program.h.
 */
#include "program.h"
#include "program/operators.h"

enum { PIECE_BYTES = 32 << 20, MOST_PIECE_ROWS = 4096, PAIR_ROWS = 32, LANES = 16 };

/* ---- With cuBLASLt ----------------------------------------------------------------------------------------------- */

/* Layout of p->dequantized: rows of the weight in 16 bits (a piece of it at a time), all inputs, and the sums
 * of that piece's rows. */
struct dequantized_product {
    int32_t n_piece_rows; /* a multiple of PAIR_ROWS */
    struct fb_cuda_rows weights, inputs;
    float *sums;
    void *workspace;
};

static char *part(char *memory, size_t *at, size_t n_bytes) {
    char *const here = memory ? memory + *at : NULL;
    *at += fb_cuda_aligned(n_bytes);
    return here;
}

/* Divides `memory` for a product and returns the bytes needed; with NULL it only counts. */
static size_t lay_out(const struct fb_cuda_weight *weight, enum fb_dtype dtype, int32_t n_tokens, char *memory,
    struct dequantized_product *out) {
    const int32_t width = (weight->n_cols + 7) / 8 * 8; /* rows start at multiples of 16 bytes */
    const int32_t whole = (weight->n_rows + PAIR_ROWS - 1) / PAIR_ROWS * PAIR_ROWS;
    int32_t n_rows = PIECE_BYTES / (int32_t)sizeof(uint16_t) / width / PAIR_ROWS * PAIR_ROWS;
    n_rows = n_rows < PAIR_ROWS ? PAIR_ROWS : n_rows > MOST_PIECE_ROWS ? MOST_PIECE_ROWS : n_rows;
    n_rows = n_rows < whole ? n_rows : whole;
    const size_t row_bytes = (size_t)width * sizeof(uint16_t);
    size_t at = 0;
    *out = (struct dequantized_product){.n_piece_rows = n_rows};
    out->weights = (struct fb_cuda_rows){.dtype = dtype, .width = width};
    out->inputs = out->weights;
    out->workspace = part(memory, &at, FB_CUDA_WORKSPACE_BYTES);
    out->weights.halfs = (uint16_t *)(void *)part(memory, &at, (size_t)n_rows * row_bytes);
    out->weights.scales = (float *)(void *)part(memory, &at, (size_t)n_rows * sizeof(float));
    out->inputs.halfs = (uint16_t *)(void *)part(memory, &at, (size_t)n_tokens * row_bytes);
    out->inputs.scales = (float *)(void *)part(memory, &at, (size_t)n_tokens * sizeof(float));
    out->sums = (float *)(void *)part(memory, &at, (size_t)n_tokens * (size_t)n_rows * sizeof(float));
    return at;
}

/* Products that run on ordinary cores stay there, and few tokens are faster without dequantizing weights
 * first. */
static bool goes_to_library(const struct fb_cuda_program *p, enum fb_dtype weight, int32_t n_tokens) {
    return p->library && n_tokens >= FB_CUDA_LIBRARY_TOKENS && fb_cuda_inputs_dtype(weight, p->compute_major) != FB_F32;
}

static enum fb_dtype dtype_of_rows(enum fb_dtype weight) {
    return weight == FB_BF16 ? FB_BF16 : FB_F16;
}

enum fb_status fb_cuda_reserve_products(struct fb_cuda_program *p, int32_t n_tokens, int32_t n_outputs) {
    size_t most = 0;
    for (int32_t i = 0; i < p->program->n_ops; i++) {
        const struct fb_op *op = &p->program->ops[i];
        if (!fb_is_product(op)) continue;
        const int32_t n = p->program->buffers[op->in].per_output ? n_outputs : n_tokens;
        if (!goes_to_library(p, op->weight->dtype, n)) continue;
        struct dequantized_product product;
        const size_t bytes = lay_out(&p->weights[i], dtype_of_rows(op->weight->dtype), n, NULL, &product);
        most = bytes > most ? bytes : most;
    }
    return most ? fb_cuda_grow(p, &p->dequantized, most, false) : FB_OK;
}

/* Dequantizes, multiplies and finishes one piece of rows after another. */
static enum fb_status run_in_library(struct fb_cuda_program *p, const struct fb_cuda_linear *a) {
    struct dequantized_product o;
    lay_out(&a->weight, dtype_of_rows(a->weight.dtype), a->n_tokens, p->dequantized.device, &o);
    FB_TRY(fb_cuda_check(
        fb_cuda_round_rows(a->x, a->ldx, a->n_tokens, a->weight.n_cols, &o.inputs, p->stream), "rounding inputs"));
    const int32_t n_panels = (a->weight.n_rows + LANES - 1) / LANES, n_piece_panels = o.n_piece_rows / LANES;
    for (int32_t panel = 0; panel < n_panels; panel += n_piece_panels) {
        const int32_t n = n_panels - panel < n_piece_panels ? n_panels - panel : n_piece_panels;
        const struct fb_cuda_matrices m = {.dtype = o.weights.dtype,
            .n_rows = n * LANES,
            .n_tokens = a->n_tokens,
            .n_cols = o.weights.width,
            .weights = o.weights.halfs,
            .inputs = o.inputs.halfs,
            .out = o.sums,
            .workspace = o.workspace};
        FB_TRY(fb_cuda_check(
            fb_cuda_dequantize_rows(&a->weight, panel, n, &o.weights, p->stream), "dequantizing a weight"));
        FB_TRY(fb_cuda_library_multiply(p->library, &m, p->stream));
        FB_TRY(fb_cuda_check(
            fb_cuda_finish(a, &o.weights, &o.inputs, panel, m.n_rows, o.sums, p->stream), "finishing a product"));
    }
    return FB_OK;
}

/* ---- With this library's kernels --------------------------------------------------------------------------------- */

size_t fb_cuda_rounded_bytes(const struct fb_cuda_program *p) {
    const struct fb_program *program = p->program;
    struct fb_cuda_inputs inputs;
    size_t most = 0;
    for (int32_t i = 0; i < program->n_ops; i++) {
        if (!fb_is_product(&program->ops[i])) continue;
        const fb_weight *weight = program->ops[i].weight;
        const enum fb_dtype dtype = fb_cuda_inputs_dtype(weight->dtype, p->compute_major);
        if (dtype == FB_F32) continue;
        const size_t n = fb_cuda_inputs_view(dtype, program->shape.max_tokens, weight->n_cols, NULL, &inputs);
        most = n > most ? n : most;
    }
    return most;
}

/* Describes the inputs that are rounded next: the first n_cols of a buffer's rows. */
static void begin_rounding(
    struct fb_cuda_program *p, int32_t buffer, enum fb_dtype dtype, int32_t n_tokens, int32_t n_cols) {
    fb_cuda_inputs_view(dtype, n_tokens, n_cols, p->rounded, &p->inputs16);
    p->rounded_from = buffer;
}

/* Rounds the inputs of a product to 16 bits, unless the previous product had the same. */
static int round_inputs(
    struct fb_cuda_program *p, int32_t buffer, enum fb_dtype dtype, const struct fb_cuda_linear *product) {
    if (p->rounded_from == buffer && p->inputs16.dtype == dtype) return 0;
    begin_rounding(p, buffer, dtype, product->n_tokens, product->weight.n_cols);
    return fb_cuda_round(product->x, product->ldx, product->n_tokens, product->weight.n_cols, &p->inputs16, p->stream);
}

/* Whether the next operator multiplies a norm's result in 16 bits. */
static bool is_rounded_next(const struct fb_cuda_program *p, const struct fb_op *norm, int32_t n_rows) {
    const struct fb_op *const next = norm + 1;
    if (next == p->program->ops + p->program->n_ops || !fb_is_product(next) || next->in != norm->out) return false;
    return next->weight->n_cols == norm->vector_length && !goes_to_library(p, next->weight->dtype, n_rows) &&
           fb_cuda_inputs_dtype(next->weight->dtype, p->compute_major) != FB_F32;
}

int fb_cuda_run_norm(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows) {
    const struct fb_buffer *buffers = p->program->buffers;
    const float *const in = fb_cuda_buffer(p, op->in), *const weight = fb_cuda_vector(p, op->vector);
    float *const out = fb_cuda_buffer(p, op->out);
    const int64_t ld_in = (int64_t)buffers[op->in].stride, ld_out = (int64_t)buffers[op->out].stride;
    if (!is_rounded_next(p, op, n_rows))
        return fb_cuda_rms_norm(in, ld_in, weight, n_rows, op->vector_length, op->eps, out, ld_out, p->stream);
    begin_rounding(p, op->out, fb_cuda_inputs_dtype(op[1].weight->dtype, p->compute_major), n_rows, op->vector_length);
    return fb_cuda_norm_round(
        in, ld_in, weight, n_rows, op->vector_length, op->eps, out, ld_out, &p->inputs16, p->stream);
}

static int run_here(struct fb_cuda_program *p, int32_t buffer, const struct fb_cuda_linear *a) {
    const enum fb_dtype dtype = fb_cuda_inputs_dtype(a->weight.dtype, p->compute_major);
    if (dtype == FB_F32) return fb_cuda_multiply(a, p->stream);
    const int error = round_inputs(p, buffer, dtype, a);
    return error ? error : fb_cuda_multiply_inputs(a, &p->inputs16, p->stream);
}

enum fb_status fb_cuda_run_product(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows, float *logits) {
    const struct fb_buffer *buffers = p->program->buffers;
    struct fb_cuda_linear a = {.weight = p->weights[op - p->program->ops],
        .x = fb_cuda_buffer(p, op->in),
        .ldx = (int64_t)buffers[op->in].stride,
        .bias = fb_cuda_vector(p, op->vector),
        .n_tokens = n_rows,
        .width = op->weight->n_rows,
        .swiglu = fb_op_is(op, FB_GATED)};
    if (fb_op_is(op, FB_LAST)) {
        a.out = logits;
        a.ld_out = a.width;
        a.non_finite = p->non_finite;
    } else {
        a.out = fb_cuda_buffer(p, op->out) + op->column;
        a.ld_out = (int64_t)buffers[op->out].stride;
        if (a.swiglu) a.width = buffers[op->out].width;
    }
    if (op->residual >= 0) {
        a.residual = fb_cuda_buffer(p, op->residual);
        a.ld_residual = (int64_t)buffers[op->residual].stride;
    }
    const enum fb_status status = goes_to_library(p, a.weight.dtype, n_rows)
                                      ? run_in_library(p, &a)
                                      : fb_cuda_check(run_here(p, op->in, &a), "a product");
    if (op->out == p->rounded_from) p->rounded_from = -1;
    return status;
}
