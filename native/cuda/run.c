/* run.c - launches a program's operators on one stream. See program.h. */
#include "program.h"

#include "program/operators.h"
#include "views.h"

/* The context of a launch, except for products. */
struct launch {
    struct fb_cuda_program *p;
    const struct fb_cuda_pages *pages;
    const struct fb_cuda_description *d;
    int32_t n_rows;
};

static const struct fb_heads *heads_of(const struct launch *l) {
    return fb_cuda_heads_of(l->p->program);
}

static int64_t stride_of(const struct launch *l, int32_t buffer) {
    return (int64_t)l->p->program->buffers[buffer].stride;
}

static int launch_embed(const struct launch *l, const struct fb_op *op) {
    struct fb_cuda_program *p = l->p;
    const int error = fb_cuda_embed(&p->weights[op - p->program->ops], l->d->batch.tokens, l->n_rows, op->scale,
        fb_cuda_buffer(p, op->out), stride_of(l, op->out), p->stream);
    return error ? error
                 : fb_cuda_angles(&l->d->batch, p->inv_freq, fb_cuda_rotary_dim(p->program),
                       p->program->shape.ropes[0].scale, p->cos_sin, p->sink_rotations, p->stream);
}

static int launch_norm(const struct launch *l, const struct fb_op *op) {
    return fb_cuda_run_norm(l->p, op, l->n_rows);
}

static int launch_head_norm(const struct launch *l, const struct fb_op *op) {
    const struct fb_heads *h = heads_of(l);
    return fb_cuda_head_norm(fb_cuda_buffer(l->p, op->in), stride_of(l, op->in), l->n_rows, h->n_heads, h->n_kv_heads,
        h->k_dim, fb_cuda_vector(l->p, op->vector), fb_cuda_vector(l->p, op->vector2), op->eps, l->p->stream);
}

static int launch_rope(const struct launch *l, const struct fb_op *op) {
    const struct fb_heads *h = heads_of(l);
    return fb_cuda_rope(fb_cuda_buffer(l->p, op->in), stride_of(l, op->in), l->n_rows, h->n_heads + h->n_kv_heads,
        h->k_dim, fb_cuda_rotary_dim(l->p->program), l->p->cos_sin, l->p->stream);
}

static int launch_kv_write(const struct launch *l, const struct fb_op *op) {
    return fb_cuda_kv_write(fb_cuda_buffer(l->p, op->in), stride_of(l, op->in), &l->d->batch, heads_of(l)->n_heads,
        l->pages, op->layer, l->p->stream);
}

static int launch_attention(const struct launch *l, const struct fb_op *op) {
    struct fb_cuda_program *p = l->p;
    const struct fb_cuda_description *d = l->d;
    const struct fb_cuda_attention a = {.batch = d->batch,
        .pages = *l->pages,
        .layer = op->layer,
        .window = op->window,
        .n_heads = heads_of(l)->n_heads,
        .scale = op->scale,
        .sink_rotations = p->sink_rotations,
        .rotary_dim = fb_cuda_rotary_dim(p->program),
        .q = fb_cuda_buffer(p, op->in),
        .out = fb_cuda_buffer(p, op->out),
        .ldq = stride_of(l, op->in),
        .ld_out = stride_of(l, op->out),
        .tiles = d->device_tiles,
        .n_tiles = d->n_tiles,
        .tile_rows = d->tile_rows,
        .n_parts = fb_cuda_parts_within(d, op->window),
        .partials = (float *)(void *)p->partials.device};
    return fb_cuda_attend(&a, p->stream);
}

static int launch_gather(const struct launch *l, const struct fb_op *op) {
    return fb_cuda_gather(fb_cuda_buffer(l->p, op->in), stride_of(l, op->in), l->d->device_outputs, l->n_rows,
        l->p->program->buffers[op->in].width, fb_cuda_buffer(l->p, op->out), stride_of(l, op->out), l->p->stream);
}

/* The launch function of each operator kind. A kind without a row is refused by name when a program is
 * created. */
static const struct {
    /* NULL: products and sums are launched elsewhere. */
    int (*launch)(const struct launch *l, const struct fb_op *op);
    bool runs;
} launches[] = {
    [FB_OP_EMBED] = {launch_embed, true},
    [FB_OP_RMS_NORM] = {launch_norm, true},
    [FB_OP_LINEAR] = {NULL, true},
    [FB_OP_LINEAR_GATED] = {NULL, true},
    [FB_OP_HEAD_NORM] = {launch_head_norm, true},
    [FB_OP_ROPE] = {launch_rope, true},
    [FB_OP_KV_WRITE] = {launch_kv_write, true},
    [FB_OP_ATTENTION] = {launch_attention, true},
    [FB_OP_GATHER_OUTPUTS] = {launch_gather, true},
    [FB_OP_LOGITS] = {NULL, true},
    [FB_OP_SUM] = {NULL, true},
};

/* What an operator of a kind that runs would need beyond it; NULL for nothing. */
static const char *lacks_option(const fb_program *program, const struct fb_op *op) {
    const enum fb_activation_kind activation = op->kind == FB_OP_LINEAR_GATED ? FB_ACTIVATION_SILU : FB_ACTIVATION_NONE;
    if (op->activation != activation) return "with that activation";
    if (op->limit != 0.0f) return "with a soft cap";
    if (fb_is_product(op) && op->scale != 1.0f) return "with a scale";
    if (op->kind == FB_OP_EMBED && op->weight && op->weight->n_rows < program->shape.vocab_size)
        return "of a smaller table";
    if (op->flags) return "with flags";
    if (op->temperature != 0.0f) return "with a temperature";
    if (op->kind == FB_OP_ATTENTION && op->vector) return "with sink logits";
    if (op->kind == FB_OP_ATTENTION && op->vector2) return "with ALiBi";
    if (op->kind != FB_OP_RMS_NORM) return NULL;
    if (op->residual >= 0) return "with a residual";
    return op->vector_length != program->buffers[op->in].width ? "of groups" : NULL;
}

const char *fb_cuda_lacks(const fb_program *program, const struct fb_op *op) {
    const struct fb_program_shape *s = &program->shape;
    if ((size_t)op->kind >= sizeof launches / sizeof *launches || !launches[op->kind].runs) return "";
    if (op != program->ops) return lacks_option(program, op);
    if (s->n_geometries != 1 || s->heads[0].k_dim != s->heads[0].v_dim || s->heads[0].v_in_k)
        return "for layers whose heads differ";
    return s->n_ropes == 1 && s->heads[0].rope == 0 ? NULL : "for layers whose rope differs";
}

static int run_heads(struct fb_cuda_program *p, const struct fb_op *ops, int32_t n, const struct fb_cuda_pages *pages,
    const struct fb_cuda_description *d) {
    struct fb_cuda_heads heads = {.n_heads = fb_cuda_heads_of(p->program)->n_heads,
        .rotary_dim = fb_cuda_rotary_dim(p->program),
        .layer = ops[n - 1].layer};
    for (int32_t i = 0; i < n; i++) {
        if (ops[i].kind == FB_OP_ROPE) heads.cos_sin = p->cos_sin;
        if (ops[i].kind != FB_OP_HEAD_NORM) continue;
        heads.q_weight = fb_cuda_vector(p, ops[i].vector);
        heads.k_weight = fb_cuda_vector(p, ops[i].vector2);
        heads.eps = ops[i].eps;
    }
    return fb_cuda_fused_heads(
        fb_cuda_buffer(p, ops->in), (int64_t)p->program->buffers[ops->in].stride, &heads, &d->batch, pages, p->stream);
}

enum fb_status fb_cuda_begin(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    struct fb_cuda_extent rows, struct fb_cuda_step *step) {
    *step = (struct fb_cuda_step){.n_rows = rows.n_tokens};
    fb_cuda_pages_view(pool, &step->pages);
    FB_TRY(fb_cuda_enter(p->device->index));
    FB_TRY(fb_cuda_describe(p, batch, rows, &step->d));
    return fb_cuda_reserve_products(p, rows.n_tokens, rows.n_outputs);
}

enum fb_status fb_cuda_launch(struct fb_cuda_program *p, struct fb_cuda_step *step) {
    FB_TRY(fb_cuda_enter(p->device->index));
    if (step->next_op == 0)
        FB_TRY(fb_cuda_check(cudaMemsetAsync(p->non_finite, 0, sizeof(int32_t), p->stream), "clearing a flag"));
    p->rounded_from = -1;
    for (; step->next_op < p->program->n_ops; step->next_op++) {
        const struct fb_op *op = &p->program->ops[step->next_op];
        if (fb_op_is(op, FB_SPANS_DEVICES)) break;
        if (fb_op_is(op, FB_GATHERS)) step->n_rows = step->d.rows.n_outputs;
        if (step->n_rows == 0) break; /* no logits are wanted */
        if (fb_is_product(op)) {
            FB_TRY(fb_cuda_run_product(p, op, step->n_rows, step->logits));
            continue;
        }
        p->rounded_from = -1;
        const int32_t n = fb_ops_of_heads(op, p->program->n_ops - step->next_op);
        if (n > 1 && op[n - 1].kind == FB_OP_KV_WRITE) { /* all in one launch */
            FB_TRY(fb_cuda_check(run_heads(p, op, n, &step->pages, &step->d), "heads"));
            step->next_op += n - 1;
            continue;
        }
        const struct launch over = {p, &step->pages, &step->d, step->n_rows};
        FB_TRY(fb_cuda_check(launches[op->kind].launch(&over, op), fb_operator_of(op->kind)->name));
    }
    return FB_OK;
}

static enum fb_status run_batch(struct fb_cuda_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    struct fb_cuda_extent rows, const struct fb_results *results) {
    struct fb_cuda_step step;
    FB_TRY(fb_cuda_begin(p, pool, batch, rows, &step));
    step.logits = (float *)(void *)p->outputs.device;
    FB_TRY(fb_cuda_run_step(p, &step));
    FB_TRY(fb_cuda_send_sampled(p, results));
    return fb_cuda_send_logits(p, p->program->n_results, batch->n_outputs, results);
}

enum fb_status fb_cuda_program_run(
    void *on_device, const fb_page_pool *pool, const struct fb_batch *batch, const struct fb_results *results) {
    struct fb_cuda_program *p = on_device;
    const struct fb_cuda_extent rows = fb_cuda_extent_of(p, batch);
    FB_TRY(fb_cuda_reserve_results(p, p->program->n_results, rows.n_outputs, results));
    const enum fb_status status = run_batch(p, pool, batch, rows, results);
    /* Also after a failure: the next batch overwrites host memory that this one's copies may still read. */
    const int error = cudaStreamSynchronize(p->stream);
    FB_TRY(status);
    FB_TRY(fb_cuda_check(error, "running a batch"));
    return fb_cuda_take_results(p, results);
}
