/* run.c - a program's operators as launches on one stream. See program.h. */
#include "program.h"

#include "views.h"

static int run_attention(struct fb_cuda_program *p, const struct fb_op *op, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d) {
    const struct fb_program_shape *s = &p->program->shape;
    const struct fb_buffer *buffers = p->program->buffers;
    const struct fb_cuda_attention a = {.batch = d->batch,
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
        .n_parts = fb_cuda_parts_within(d, op->window),
        .partials = (float *)(void *)p->partials.device};
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
        return fb_cuda_run_norm(p, op, n_rows);
    case FB_OP_HEAD_NORM:
        return fb_cuda_head_norm(from, ld_in, n_rows, s->n_heads, s->n_kv_heads, s->head_dim,
            fb_cuda_vector(p, op->vector), fb_cuda_vector(p, op->vector2), op->eps, p->stream);
    case FB_OP_ROPE:
        return fb_cuda_rope(
            from, ld_in, n_rows, s->n_heads + s->n_kv_heads, s->head_dim, s->rotary_dim, p->cos_sin, p->stream);
    case FB_OP_KV_WRITE:
        return fb_cuda_kv_write(from, ld_in, &d->batch, s->n_heads, pages, op->layer, p->stream);
    case FB_OP_ATTENTION:
        return run_attention(p, op, pages, d);
    case FB_OP_GATHER_OUTPUTS:
        return fb_cuda_gather(from, ld_in, d->device_outputs, n_rows, in->width, to, ld_out, p->stream);
    default:
        return cudaErrorUnknown; /* products go another way */
    }
}

static int run_heads(struct fb_cuda_program *p, const struct fb_op *ops, int32_t n, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d) {
    const struct fb_program_shape *s = &p->program->shape;
    struct fb_cuda_heads heads = {.n_heads = s->n_heads, .rotary_dim = s->rotary_dim, .layer = ops[n - 1].layer};
    for (int32_t i = 0; i < n; i++) {
        if (ops[i].kind == FB_OP_ROPE) heads.cos_sin = p->cos_sin;
        if (ops[i].kind != FB_OP_HEAD_NORM) continue;
        heads.q_weight = fb_cuda_vector(p, ops[i].vector);
        heads.k_weight = fb_cuda_vector(p, ops[i].vector2);
        heads.eps = ops[i].eps;
    }
    return fb_cuda_place_heads(
        fb_cuda_buffer(p, ops->in), (int64_t)p->program->buffers[ops->in].stride, &heads, &d->batch, pages, p->stream);
}

enum fb_status fb_cuda_begin(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    struct fb_cuda_extent rows, struct fb_cuda_step *step) {
    *step = (struct fb_cuda_step){.n_rows = rows.n_tokens};
    fb_cuda_pages_view(pool, &step->pages);
    FB_TRY(fb_cuda_enter(p->device->index));
    FB_TRY(fb_cuda_describe(p, batch, rows, &step->d));
    return fb_cuda_prepare_products(p, rows.n_tokens, rows.n_outputs);
}

enum fb_status fb_cuda_launch(struct fb_cuda_program *p, struct fb_cuda_step *step) {
    static const char *const names[] = {[FB_OP_EMBED] = "embed",
        [FB_OP_RMS_NORM] = "rms_norm",
        [FB_OP_HEAD_NORM] = "head_norm",
        [FB_OP_ROPE] = "rope",
        [FB_OP_KV_WRITE] = "kv_write",
        [FB_OP_ATTENTION] = "attention",
        [FB_OP_GATHER_OUTPUTS] = "gather_outputs"};
    FB_TRY(fb_cuda_enter(p->device->index));
    if (step->next_op == 0)
        FB_TRY(fb_cuda_check(cudaMemsetAsync(p->non_finite, 0, sizeof(int32_t), p->stream), "clearing a flag"));
    p->rounded_from = -1;
    for (; step->next_op < p->program->n_ops; step->next_op++) {
        const struct fb_op *op = &p->program->ops[step->next_op];
        if (op->kind == FB_OP_SUM) break;
        if (op->kind == FB_OP_GATHER_OUTPUTS) step->n_rows = step->d.rows.n_outputs;
        if (step->n_rows == 0) break; /* nobody wants logits */
        if (fb_is_product(op)) {
            FB_TRY(fb_cuda_run_product(p, op, step->n_rows, step->logits));
            continue;
        }
        p->rounded_from = -1;
        const int32_t n = fb_ops_of_heads(op, p->program->n_ops - step->next_op);
        if (n > 1) { /* in one launch */
            FB_TRY(fb_cuda_check(run_heads(p, op, n, &step->pages, &step->d), "heads"));
            step->next_op += n - 1;
            continue;
        }
        FB_TRY(fb_cuda_check(run_op(p, op, &step->pages, &step->d, step->n_rows), names[op->kind]));
    }
    return FB_OK;
}

static enum fb_status run_batch(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    struct fb_cuda_extent rows, const struct fb_results *results) {
    struct fb_cuda_step step;
    FB_TRY(fb_cuda_begin(p, pool, batch, rows, &step));
    step.logits = (float *)(void *)p->outputs.device;
    FB_TRY(fb_cuda_run_step(p, &step));
    FB_TRY(fb_cuda_send_drawn(p, results));
    return fb_cuda_send_logits(p, p->program->n_results, batch->n_outputs, results);
}

enum fb_status fb_cuda_program_run(
    void *on_device, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results) {
    struct fb_cuda_program *p = on_device;
    const struct fb_cuda_extent rows = fb_cuda_extent_of(p, batch);
    FB_TRY(fb_cuda_make_room(p, p->program->n_results, rows.n_outputs, results));
    const enum fb_status status = run_batch(p, pool, batch, rows, results);
    /* Also behind a failure: the next batch writes to where this one's copies may still be read from. */
    const int error = cudaStreamSynchronize(p->stream);
    FB_TRY(status);
    FB_TRY(fb_cuda_check(error, "running a batch"));
    return fb_cuda_take_results(p, results);
}
