/* product.c - products of a program: on tensor cores or ordinary ones. See program.h. */
#include "program.h"

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

/* The inputs of a product in 16 bits, unless the product before it had the same. */
static int round_inputs(
    struct fb_cuda_program *p, int32_t buffer, enum fb_dtype dtype, const struct fb_cuda_linear *product) {
    if (p->rounded_from == buffer && p->inputs16.dtype == dtype) return 0;
    fb_cuda_inputs_view(dtype, product->n_tokens, product->weight.n_cols, p->rounded, &p->inputs16);
    p->rounded_from = buffer;
    return fb_cuda_round(product->x, product->ldx, product->n_tokens, product->weight.n_cols, &p->inputs16, p->stream);
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
        .swiglu = op->kind == FB_OP_LINEAR_SWIGLU};
    if (op->kind == FB_OP_LOGITS) {
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
    FB_TRY(fb_cuda_check(run_here(p, op->in, &a), "a product"));
    if (op->out == p->rounded_from) p->rounded_from = -1;
    return FB_OK;
}
