/* run.c - a program's operators as launches on one stream, and the results' way back. See program.h. */
#include "program.h"

#include "views.h"

#include <string.h>

static float *buffer_of(const struct fb_cuda_program *p, int32_t number) {
    return p->arena + p->program->buffers[number].offset;
}

/* A vector of an operator, where it lies on the GPU. */
static const float *vector_of(const struct fb_cuda_program *p, const float *vector) {
    return vector ? p->vectors + (vector - p->program->vectors) : NULL;
}

static int run_product(struct fb_cuda_program *p, const struct fb_op *op, int32_t n_rows, float *logits) {
    const struct fb_buffer *buffers = p->program->buffers;
    struct fb_cuda_linear a = {.weight = p->weights[op - p->program->ops],
        .x = buffer_of(p, op->in),
        .ldx = (int64_t)buffers[op->in].stride,
        .bias = vector_of(p, op->vector),
        .n_tokens = n_rows,
        .width = op->weight->n_rows,
        .swiglu = op->kind == FB_OP_LINEAR_SWIGLU};
    if (op->kind == FB_OP_LOGITS) {
        a.out = logits;
        a.ld_out = a.width;
        a.non_finite = p->non_finite;
    } else {
        a.out = buffer_of(p, op->out) + op->column;
        a.ld_out = (int64_t)buffers[op->out].stride;
        if (a.swiglu) a.width = buffers[op->out].width;
    }
    if (op->residual >= 0) {
        a.residual = buffer_of(p, op->residual);
        a.ld_residual = (int64_t)buffers[op->residual].stride;
    }
    return fb_cuda_multiply(&a, p->stream);
}

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
        .q = buffer_of(p, op->in),
        .out = buffer_of(p, op->out),
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
    const struct fb_cuda_description *d, int32_t n_rows, float *logits) {
    const struct fb_program_shape *s = &p->program->shape;
    const struct fb_buffer *in = op->in >= 0 ? &p->program->buffers[op->in] : NULL;
    const struct fb_buffer *out = op->out >= 0 ? &p->program->buffers[op->out] : NULL;
    float *from = in ? buffer_of(p, op->in) : NULL, *to = out ? buffer_of(p, op->out) : NULL;
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
            from, ld_in, vector_of(p, op->vector), n_rows, op->vector_length, op->eps, to, ld_out, p->stream);
    case FB_OP_HEAD_NORM:
        return fb_cuda_head_norm(from, ld_in, n_rows, s->n_heads, s->n_kv_heads, s->head_dim, vector_of(p, op->vector),
            vector_of(p, op->vector2), op->eps, p->stream);
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
        return run_product(p, op, n_rows, logits);
    }
}

static enum fb_status run_ops(struct fb_cuda_program *p, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d, int32_t n_outputs, float *logits) {
    static const char *const names[] = {"", "embed", "rms_norm", "linear", "linear_swiglu", "head_norm", "rope",
        "kv_write", "attention", "gather_outputs", "logits"};
    int32_t n_rows = d->batch.n_tokens;
    for (int32_t i = 0; i < p->program->n_ops; i++) {
        const struct fb_op *op = &p->program->ops[i];
        if (op->kind == FB_OP_GATHER_OUTPUTS) n_rows = n_outputs;
        if (n_rows == 0) break; /* nobody wants logits */
        FB_TRY(fb_cuda_check(run_op(p, op, pages, d, n_rows, logits), names[op->kind]));
    }
    return FB_OK;
}

/* ---- Results ----------------------------------------------------------------------------------------------------- */

/* Where plans and what is drawn by them lie, in bytes: in p->plans, in p->drawn. */
struct drawing {
    size_t changes, n_bytes;        /* plans come first */
    size_t logprobs, n_drawn_bytes; /* tokens come first */
    int32_t n_at_once;
};

enum {
    MOST_DRAW_BYTES = 64 << 20,
    MOST_DRAW_ROWS = 1024
}; /* at once: of scratch, unless one row needs more; of a launch */

/* Takes the memory that drawing needs. */
static enum fb_status prepare_drawing(
    struct fb_cuda_program *p, const struct fb_results *results, struct drawing *out) {
    const size_t n_plans = (size_t)results->n_plans;
    const size_t row_bytes = fb_cuda_draw_bytes(p->program->shape.vocab_size);
    size_t n_at_once = row_bytes < MOST_DRAW_BYTES ? MOST_DRAW_BYTES / row_bytes : 1;
    n_at_once = n_at_once < MOST_DRAW_ROWS ? n_at_once : MOST_DRAW_ROWS;
    n_at_once = n_at_once < n_plans ? n_at_once : n_plans;
    *out = (struct drawing){.n_at_once = (int32_t)n_at_once};
    out->changes = fb_cuda_aligned(n_plans * sizeof *results->plans);
    out->n_bytes = out->changes + (size_t)results->n_changes * sizeof *results->changes;
    out->logprobs = fb_cuda_aligned(n_plans * sizeof(int32_t));
    out->n_drawn_bytes = out->logprobs + n_plans * sizeof(float);
    FB_TRY(fb_cuda_grow(p, &p->plans, out->n_bytes, true));
    FB_TRY(fb_cuda_grow(p, &p->drawn, out->n_drawn_bytes, true));
    return fb_cuda_grow(p, &p->scratch, n_at_once * row_bytes, false);
}

/* Draws by all plans, on the GPU, and begins to copy what was drawn. */
static enum fb_status draw(
    struct fb_cuda_program *p, const float *logits, const struct fb_results *results, const struct drawing *drawing) {
    memcpy(p->plans.host, results->plans, (size_t)results->n_plans * sizeof *results->plans);
    if (results->n_changes > 0)
        memcpy(
            p->plans.host + drawing->changes, results->changes, (size_t)results->n_changes * sizeof *results->changes);
    FB_TRY(fb_cuda_check(
        cudaMemcpyAsync(p->plans.device, p->plans.host, drawing->n_bytes, cudaMemcpyHostToDevice, p->stream),
        "copying draws to the GPU"));
    const int32_t vocab_size = p->program->shape.vocab_size;
    const struct fb_cuda_draws draws = {.logits = logits,
        .ld_logits = vocab_size,
        .plans = (const struct fb_sample_plan *)(const void *)p->plans.device,
        .changes = (const struct fb_sample_change *)(const void *)(p->plans.device + drawing->changes),
        .n_plans = results->n_plans,
        .vocab_size = vocab_size,
        .tokens = (int32_t *)(void *)p->drawn.device,
        .logprobs = (float *)(void *)(p->drawn.device + drawing->logprobs),
        .scratch = p->scratch.device,
        .n_at_once = drawing->n_at_once};
    FB_TRY(fb_cuda_check(fb_cuda_draw(&draws, p->stream), "drawing"));
    return fb_cuda_check(
        cudaMemcpyAsync(p->drawn.host, p->drawn.device, drawing->n_drawn_bytes, cudaMemcpyDeviceToHost, p->stream),
        "copying tokens");
}

/* Logits of the rows that want them, in as few copies as they lie in one piece. */
static enum fb_status copy_logits(
    struct fb_cuda_program *p, const float *from, int32_t n_rows, const struct fb_results *results) {
    const size_t width = (size_t)p->program->ops[p->program->n_ops - 1].weight->n_rows;
    const bool *skipped = results->is_drawn;
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
    const struct fb_results *results, const struct drawing *drawing) {
    struct fb_cuda_description d;
    struct fb_cuda_pages pages;
    float *logits = (float *)(void *)p->outputs.device;
    fb_cuda_pages_view(pool, &pages);
    FB_TRY(fb_cuda_describe(p, batch, &d));
    FB_TRY(fb_cuda_check(cudaMemsetAsync(p->non_finite, 0, sizeof(int32_t), p->stream), "clearing a flag"));
    FB_TRY(run_ops(p, &pages, &d, batch->n_outputs, logits));
    if (results->n_plans > 0) FB_TRY(draw(p, logits, results, drawing));
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
    struct drawing drawing = {.n_at_once = 0};
    FB_TRY(fb_cuda_enter(p->device->index));
    FB_TRY(fb_cuda_grow(p, &p->outputs, n_rows * width * sizeof(float), false));
    if (results->n_plans > 0) FB_TRY(prepare_drawing(p, results, &drawing));
    const enum fb_status status = run_batch(p, pool, batch, results, &drawing);
    /* Also behind a failure: the next batch writes to where this one's copies may still be read from. */
    const int error = cudaStreamSynchronize(p->stream);
    FB_TRY(status);
    FB_TRY(fb_cuda_check(error, "running a batch"));
    if (*p->non_finite_here)
        return fb_fail(FB_NON_FINITE, "logits hold NaN or infinity: the weights or the input are damaged");
    for (int32_t i = 0; i < results->n_plans; i++) {
        const int32_t row = results->plans[i].row;
        results->tokens[row] = ((const int32_t *)(const void *)p->drawn.host)[i];
        results->logprobs[row] = ((const float *)(const void *)(p->drawn.host + drawing.logprobs))[i];
    }
    return FB_OK;
}
