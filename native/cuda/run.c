/* run.c - a program's operators as launches on one stream, and the results' way back. See program.h. */
#include "program.h"

#include "views.h"

static int run_attention(struct fb_cuda_program *p, const struct fb_op *op, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d, const struct fb_cuda_sequence *sequences) {
    const struct fb_program_shape *s = &p->program->shape;
    const struct fb_buffer *buffers = p->program->buffers;
    struct fb_cuda_attention a = {.batch = d->batch,
        .pages = *pages,
        .layer = op->layer,
        .window = op->window,
        .n_heads = s->n_heads,
        .scale = op->scale,
        .sink_turns = p->sink_turns,
        .rotary_dim = s->rotary_dim,
        .q = fb_cuda_buffer(p, op->in),
        .out = fb_cuda_buffer(p, op->out),
        .ldq = (int64_t)buffers[op->in].stride,
        .ld_out = (int64_t)buffers[op->out].stride,
        .tiles = d->device_tiles,
        .n_tiles = d->n_tiles,
        .tile_rows = d->tile_rows,
        .partials = (float *)(void *)p->partials.device};
    if (d->is_split) {
        struct fb_cuda_attention of;
        fb_cuda_partials_of(p->program, sequences, d->batch.n_sequences, op->window, d->tile_rows, &of);
        a.n_parts = of.n_parts;
    }
    return fb_cuda_attend(&a, p->stream);
}

static int run_op(struct fb_cuda_program *p, const struct fb_op *op, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d, int32_t n_rows) {
    const struct fb_program_shape *s = &p->program->shape;
    const struct fb_buffer *in = op->in >= 0 ? &p->program->buffers[op->in] : NULL;
    const struct fb_buffer *out = op->out >= 0 ? &p->program->buffers[op->out] : NULL;
    float *from = in ? fb_cuda_buffer(p, op->in) : NULL, *to = out ? fb_cuda_buffer(p, op->out) : NULL;
    const int64_t ld_in = in ? (int64_t)in->stride : 0, ld_out = out ? (int64_t)out->stride : 0;
    int error;
    switch (op->kind) {
    case FB_OP_EMBED:
        error = fb_cuda_embed(
            &p->weights[op - p->program->ops], d->batch.tokens, n_rows, op->scale, to, ld_out, p->stream);
        return error ? error
                     : fb_cuda_angles(
                           &d->batch, p->inv_freq, s->rotary_dim, s->rope_scale, p->cos_sin, p->sink_turns, p->stream);
    case FB_OP_RMS_NORM:
        return fb_cuda_rms_norm(
            from, ld_in, fb_cuda_vector(p, op->vector), n_rows, op->vector_length, op->eps, to, ld_out, p->stream);
    case FB_OP_HEAD_NORM:
        return fb_cuda_head_norm(from, ld_in, n_rows, s->n_heads, s->n_kv_heads, s->head_dim,
            fb_cuda_vector(p, op->vector), fb_cuda_vector(p, op->vector2), op->eps, p->stream);
    case FB_OP_ROPE:
        return fb_cuda_rope(
            from, ld_in, n_rows, s->n_heads + s->n_kv_heads, s->head_dim, s->rotary_dim, p->cos_sin, p->stream);
    case FB_OP_KV_WRITE:
        return fb_cuda_kv_write(from, ld_in, &d->batch, s->n_heads, pages, op->layer, p->stream);
    case FB_OP_ATTENTION:
        return run_attention(p, op, pages, d, (const struct fb_cuda_sequence *)(void *)(p->inputs.host + d->sequences));
    case FB_OP_GATHER_OUTPUTS:
        return fb_cuda_gather(from, ld_in, d->device_outputs, n_rows, in->width, to, ld_out, p->stream);
    default:
        return cudaErrorUnknown; /* products go another way */
    }
}

static enum fb_status run_ops(struct fb_cuda_program *p, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d, int32_t n_outputs, float *logits) {
    static const char *const names[] = {[FB_OP_EMBED] = "embed",
        [FB_OP_RMS_NORM] = "rms_norm",
        [FB_OP_HEAD_NORM] = "head_norm",
        [FB_OP_ROPE] = "rope",
        [FB_OP_KV_WRITE] = "kv_write",
        [FB_OP_ATTENTION] = "attention",
        [FB_OP_GATHER_OUTPUTS] = "gather_outputs"};
    int32_t n_rows = d->batch.n_tokens;
    p->rounded_from = -1;
    for (int32_t i = 0; i < p->program->n_ops; i++) {
        const struct fb_op *op = &p->program->ops[i];
        if (op->kind == FB_OP_GATHER_OUTPUTS) n_rows = n_outputs;
        if (n_rows == 0) break; /* nobody wants logits */
        if (fb_is_product(op)) {
            FB_TRY(fb_cuda_run_product(p, op, n_rows, logits));
            continue;
        }
        FB_TRY(fb_cuda_check(run_op(p, op, pages, d, n_rows), names[op->kind]));
        p->rounded_from = -1;
    }
    return FB_OK;
}

/* ---- Results ----------------------------------------------------------------------------------------------------- */

/* The likeliest tokens of all rows, on the GPU: tokens, then log-probabilities, then whether a row is damaged. */
static enum fb_status draw(struct fb_cuda_program *p, const float *logits, int32_t n_rows) {
    const int32_t vocab_size = p->program->shape.vocab_size;
    int32_t *tokens = (int32_t *)(void *)p->drawn.device;
    const int error = fb_cuda_greedy(
        logits, vocab_size, n_rows, vocab_size, tokens, (float *)tokens + n_rows, tokens + 2 * n_rows, p->stream);
    FB_TRY(fb_cuda_check(error, "greedy"));
    return fb_cuda_check(cudaMemcpyAsync(p->drawn.host, p->drawn.device, 2 * (size_t)n_rows * sizeof *tokens,
                             cudaMemcpyDeviceToHost, p->stream),
        "copying tokens");
}

/* Logits of the rows that want them, in as few copies as they lie in one piece. */
static enum fb_status copy_logits(
    struct fb_cuda_program *p, const float *from, int32_t n_rows, const struct fb_results *results) {
    const size_t width = (size_t)p->program->ops[p->program->n_ops - 1].weight->n_rows;
    const bool *skipped = results->is_greedy;
    for (int32_t row = 0, end; row < n_rows; row = end) {
        for (end = row + 1; end < n_rows && (!skipped || skipped[end] == skipped[row]); end++)
            continue;
        if (skipped && skipped[row]) continue;
        FB_TRY(fb_cuda_check(cudaMemcpyAsync(results->logits + (size_t)row * width, from + (size_t)row * width,
                                 (size_t)(end - row) * width * sizeof *from, cudaMemcpyDeviceToHost, p->stream),
            "copying logits"));
    }
    return FB_OK;
}

static enum fb_status run_batch(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    const struct fb_results *results, bool draws) {
    struct fb_cuda_description d;
    struct fb_cuda_pages pages;
    float *logits = (float *)(void *)p->outputs.device;
    fb_cuda_pages_view(pool, &pages);
    FB_TRY(fb_cuda_describe(p, batch, &d));
    FB_TRY(fb_cuda_prepare_products(p, batch->n_tokens, batch->n_outputs));
    FB_TRY(fb_cuda_check(cudaMemsetAsync(p->non_finite, 0, sizeof(int32_t), p->stream), "clearing a flag"));
    FB_TRY(run_ops(p, &pages, &d, batch->n_outputs, logits));
    if (draws) FB_TRY(draw(p, logits, batch->n_outputs));
    FB_TRY(copy_logits(p, logits, batch->n_outputs, results));
    return fb_cuda_check(
        cudaMemcpyAsync(p->non_finite_here, p->non_finite, sizeof(int32_t), cudaMemcpyDeviceToHost, p->stream),
        "copying a flag");
}

enum fb_status fb_cuda_program_run(
    void *on_device, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results) {
    struct fb_cuda_program *p = on_device;
    const size_t n_rows = (size_t)batch->n_outputs;
    const size_t width = (size_t)p->program->ops[p->program->n_ops - 1].weight->n_rows;
    bool draws = false;
    for (size_t i = 0; results->is_greedy && i < n_rows; i++)
        draws = draws || results->is_greedy[i];
    FB_TRY(fb_cuda_enter(p->device->index));
    FB_TRY(fb_cuda_grow(p, &p->outputs, n_rows * width * sizeof(float), false));
    if (draws) FB_TRY(fb_cuda_grow(p, &p->drawn, 3 * n_rows * sizeof(int32_t), true));
    const enum fb_status status = run_batch(p, pool, batch, results, draws);
    /* Also behind a failure: the next batch writes to where this one's copies may still be read from. */
    const int error = cudaStreamSynchronize(p->stream);
    FB_TRY(status);
    FB_TRY(fb_cuda_check(error, "running a batch"));
    if (*p->non_finite_here)
        return fb_fail(FB_NON_FINITE, "logits hold NaN or infinity: the weights or the input are damaged");
    const int32_t *tokens = (const int32_t *)(const void *)p->drawn.host;
    for (size_t i = 0; draws && i < n_rows; i++)
        if (results->is_greedy[i]) {
            results->tokens[i] = tokens[i];
            results->logprobs[i] = ((const float *)tokens)[n_rows + i];
        }
    return FB_OK;
}
