/* operators.c - the table of operator kinds. See operators.h. */
#include "program/operators.h"

#include "base/status.h"
#include "program/run.h"

#include <math.h>

/* ---- Widths ------------------------------------------------------------------------------------------------------ */

static int32_t width_of_input(const struct fb_check *c) {
    return c->in_width;
}

static int32_t width_of_row(const struct fb_check *c) {
    return c->op->weight->n_cols;
}

static int32_t width_of_q_heads(const struct fb_check *c) {
    return c->program->shape.n_heads * c->program->shape.head_dim;
}

/* ---- Checks ------------------------------------------------------------------------------------------------------ */

static enum fb_status check_embed(const struct fb_check *c) {
    FB_REQUIRE(c->op->weight->n_rows >= c->program->shape.vocab_size, "op %d (embed): %d rows for a vocabulary of %d",
        c->index, c->op->weight->n_rows, c->program->shape.vocab_size);
    return FB_OK;
}

static enum fb_status check_rms_norm(const struct fb_check *c) {
    FB_REQUIRE(c->op->vector_length == c->in_width, "op %d (rms_norm): %d weights for a width of %d", c->index,
        c->op->vector_length, c->in_width);
    return FB_OK;
}

static enum fb_status check_head_norm(const struct fb_check *c) {
    const int32_t head_dim = c->program->shape.head_dim;
    FB_REQUIRE(c->op->vector_length == head_dim && c->op->vector2_length == head_dim,
        "op %d (head_norm): %d and %d weights for head_dim %d", c->index, c->op->vector_length, c->op->vector2_length,
        head_dim);
    return FB_OK;
}

static enum fb_status check_attention(const struct fb_check *c) {
    FB_REQUIRE(c->op->window >= 0, "op %d: window is %d, must not be negative", c->index, c->op->window);
    FB_REQUIRE(c->op->scale > 0.0f, "op %d: scale of attention must be above 0", c->index);
    return FB_OK;
}

/* Gate and up are interleaved by panels: the last panel of each half may hold padding rows. */
static enum fb_status check_swiglu(const struct fb_check *c) {
    const int32_t n_rows = c->op->weight->n_rows;
    FB_REQUIRE(n_rows % 32 == 0 && c->out_width <= n_rows / 2 && c->out_width > n_rows / 2 - 16,
        "op %d (linear_swiglu): %d interleaved rows fit at most %d columns, buffer %d has %d", c->index, n_rows,
        n_rows / 2, c->op->out, c->out_width);
    return FB_OK;
}

/* ---- Work -------------------------------------------------------------------------------------------------------- */

static int64_t work_of_product(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    const int64_t n_rows = p->buffers[op->in].per_output ? batch->n_outputs : batch->n_tokens;
    return (int64_t)op->weight->n_rows * op->weight->n_cols * n_rows;
}

static int64_t work_of_attention(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    (void)op;
    int64_t work = 0;
    for (int32_t s = 0; s < batch->n_sequences; s++) {
        const struct fb_sequence *sequence = &batch->sequences[s];
        work += 2 * (int64_t)p->shape.n_heads * p->shape.head_dim * sequence->n_tokens *
                (sequence->n_past + sequence->n_tokens);
    }
    return work;
}

/* ---- Fusion into attention --------------------------------------------------------------------------------------- */

static void defer_norm(const struct fb_program *p, const struct fb_op *op, struct fb_raw_heads *raw) {
    (void)p;
    raw->q_norm = op->vector;
    raw->k_norm = op->vector2;
    raw->eps = op->eps;
}

static void defer_rope(const struct fb_program *p, const struct fb_op *op, struct fb_raw_heads *raw) {
    (void)op;
    raw->cos_sin = p->cos_sin;
}

/* Attention always writes K and V of raw heads, so there is nothing to pass on. */
static void defer_write(const struct fb_program *p, const struct fb_op *op, struct fb_raw_heads *raw) {
    (void)p;
    (void)op;
    (void)raw;
}

/* ---- The table --------------------------------------------------------------------------------------------------- */

static const struct fb_operator operators[] = {
    [FB_OP_EMBED] = {.name = "embed",
        .flags = FB_FIRST | FB_WRITES | FB_WEIGHT | FB_OF_TOKENS,
        .stage = FB_STAGE_ROWS,
        .check = check_embed,
        .width = width_of_row,
        .run_row = fb_embed_row},
    [FB_OP_RMS_NORM] = {.name = "rms_norm",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_NORM,
        .stage = FB_STAGE_ROWS,
        .check = check_rms_norm,
        .width = width_of_input,
        .run_row = fb_rms_norm_row},
    [FB_OP_LINEAR] = {.name = "linear",
        .flags = FB_READS | FB_WRITES | FB_WEIGHT | FB_RESIDUAL | FB_COLUMNS,
        .stage = FB_STAGE_LINEAR,
        .work = work_of_product},
    [FB_OP_LINEAR_SWIGLU] = {.name = "linear_swiglu",
        .flags = FB_READS | FB_WRITES | FB_WEIGHT | FB_GATED,
        .stage = FB_STAGE_LINEAR,
        .check = check_swiglu,
        .work = work_of_product},
    [FB_OP_HEAD_NORM] = {.name = "head_norm",
        .flags = FB_READS | FB_HEADS | FB_OF_TOKENS | FB_NORM,
        .stage = FB_STAGE_ROWS,
        .check = check_head_norm,
        .run_row = fb_head_norm_row,
        .head_step = 1,
        .defer_head = defer_norm},
    [FB_OP_ROPE] = {.name = "rope",
        .flags = FB_READS | FB_HEADS | FB_OF_TOKENS,
        .stage = FB_STAGE_ROWS,
        .run_row = fb_rope_row,
        .head_step = 2,
        .defer_head = defer_rope},
    [FB_OP_KV_WRITE] = {.name = "kv_write",
        .flags = FB_READS | FB_HEADS | FB_OF_TOKENS | FB_LAYER,
        .stage = FB_STAGE_ROWS,
        .run_row = fb_kv_write_row,
        .head_step = FB_HEAD_IS_WRITTEN,
        .defer_head = defer_write},
    [FB_OP_ATTENTION] = {.name = "attention",
        .flags = FB_READS | FB_WRITES | FB_HEADS | FB_OF_TOKENS | FB_LAYER,
        .stage = FB_STAGE_ATTENTION,
        .check = check_attention,
        .width = width_of_q_heads,
        .work = work_of_attention},
    [FB_OP_GATHER_OUTPUTS] = {.name = "gather_outputs",
        .flags = FB_READS | FB_WRITES | FB_GATHERS,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input,
        .run_row = fb_gather_row},
    [FB_OP_LOGITS] = {.name = "logits",
        .flags = FB_LAST | FB_READS | FB_WEIGHT | FB_OF_OUTPUTS,
        .stage = FB_STAGE_LINEAR,
        .work = work_of_product},
    [FB_OP_SUM] = {.name = "sum",
        .flags = FB_READS | FB_WRITES | FB_RESIDUAL | FB_SPANS_DEVICES,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input},
};

const struct fb_operator *fb_operator_of(enum fb_op_kind kind) {
    const size_t n = sizeof operators / sizeof *operators;
    return (int)kind > 0 && (size_t)kind < n && operators[kind].name ? &operators[kind] : NULL;
}

bool fb_is_product(const struct fb_op *op) {
    return fb_operator_of(op->kind)->stage == FB_STAGE_LINEAR;
}

static bool runs_on_cpu(const struct fb_operator *kind) {
    return kind->stage != FB_STAGE_ROWS || kind->run_row;
}

/* ---- Checks for every kind --------------------------------------------------------------------------------------- */

static enum fb_status check_order(const struct fb_program *p, const struct fb_check *c, uint32_t flags, bool gathered) {
    const struct fb_op *op = c->op;
    const struct fb_program_shape *s = &p->shape;
    const int32_t i = c->index;
    FB_REQUIRE(((flags & FB_FIRST) != 0) == (i == 0), "op %d: a program has one embed, at its beginning", i);
    FB_REQUIRE(((flags & FB_LAST) != 0) == (i == p->n_ops - 1), "op %d: a program has one logits op, at its end", i);
    FB_REQUIRE(!(flags & FB_WEIGHT) || op->weight, "op %d: its weight is null", i);
    FB_REQUIRE(!(flags & FB_WEIGHT) || op->weight->device == p->device, "op %d: its weight is on another device", i);
    FB_REQUIRE(isfinite(op->scale), "op %d: scale is not finite", i);
    FB_REQUIRE(op->column == 0 || flags & FB_COLUMNS, "op %d: only linear takes a column", i);
    FB_REQUIRE(
        !gathered || !(flags & FB_OF_TOKENS), "op %d: works on tokens, so it must come before gather_outputs", i);
    FB_REQUIRE(!gathered || !(flags & FB_GATHERS), "op %d: a program has only one gather_outputs", i);
    FB_REQUIRE(gathered || !(flags & FB_OF_OUTPUTS), "op %d (logits): needs gather_outputs before it", i);
    FB_REQUIRE(!(flags & FB_LAYER) || (op->layer >= 0 && op->layer < s->n_layers), "op %d: layer %d of %d", i,
        op->layer, s->n_layers);
    FB_REQUIRE((op->vector != NULL) == (op->vector_length > 0) && (op->vector2 != NULL) == (op->vector2_length > 0),
        "op %d: a vector and its length must come together", i);
    FB_REQUIRE(
        !(flags & FB_NORM) || (op->eps >= 0.0f && isfinite(op->eps)), "op %d: eps must be finite and not negative", i);
    return FB_OK;
}

static enum fb_status check_input(
    struct fb_program *p, struct fb_check *c, const struct fb_operator *kind, bool gathered) {
    const struct fb_op *op = c->op;
    const struct fb_program_shape *s = &p->shape;
    const int32_t i = c->index;
    if (!(kind->flags & FB_READS)) return FB_OK;
    FB_REQUIRE(op->in >= 0 && op->in < s->n_buffers, "op %d: in is buffer %d of %d", i, op->in, s->n_buffers);
    struct fb_buffer *in = &p->buffers[op->in];
    FB_REQUIRE(in->first_write >= 0 && in->filled == in->width, "op %d: reads buffer %d before all of it was written",
        i, op->in);
    FB_REQUIRE(in->per_output == gathered, "op %d: buffer %d holds rows of %s", i, op->in,
        in->per_output ? "outputs" : "tokens");
    in->last_use = i;
    c->in_width = in->width;
    if (kind->flags & FB_HEADS) {
        const int64_t qkv = ((int64_t)s->n_heads + 2 * (int64_t)s->n_kv_heads) * s->head_dim;
        FB_REQUIRE(c->in_width == qkv, "op %d: q, k and v of %d + 2 x %d heads are %lld wide, buffer %d is %d", i,
            s->n_heads, s->n_kv_heads, (long long)qkv, op->in, c->in_width);
    }
    if (kind->stage != FB_STAGE_LINEAR) return FB_OK;
    FB_REQUIRE(op->weight->n_cols == c->in_width, "op %d: the weight has %d columns, buffer %d is %d wide", i,
        op->weight->n_cols, op->in, c->in_width);
    FB_REQUIRE(op->vector_length == 0 || op->vector_length == op->weight->n_rows, "op %d: a bias of %d for %d rows", i,
        op->vector_length, op->weight->n_rows);
    return FB_OK;
}

static enum fb_status check_residual(struct fb_program *p, const struct fb_check *c, uint32_t flags, bool gathered) {
    const struct fb_op *op = c->op;
    const int32_t i = c->index;
    if (op->residual == -1) return FB_OK;
    FB_REQUIRE(flags & FB_RESIDUAL, "op %d: only linear and sum take a residual", i);
    FB_REQUIRE(op->residual >= 0 && op->residual < p->shape.n_buffers, "op %d: residual is buffer %d of %d", i,
        op->residual, p->shape.n_buffers);
    struct fb_buffer *residual = &p->buffers[op->residual];
    FB_REQUIRE(residual->first_write >= 0 && residual->filled == c->out_width && residual->width == c->out_width &&
                   op->column == 0 && residual->per_output == gathered,
        "op %d: buffer %d cannot be its residual (unwritten, or another width or kind of rows)", i, op->residual);
    residual->last_use = i;
    return FB_OK;
}

static enum fb_status check_output(
    struct fb_program *p, struct fb_check *c, const struct fb_operator *kind, bool gathered) {
    const struct fb_op *op = c->op;
    const uint32_t flags = kind->flags;
    const int32_t i = c->index;
    if (!(flags & FB_WRITES)) {
        FB_REQUIRE(op->out == -1, "op %d: works in place, out must be -1", i);
        FB_REQUIRE(op->residual == -1, "op %d: only linear and sum take a residual", i);
        return kind->check ? kind->check(c) : FB_OK;
    }
    FB_REQUIRE(
        op->out >= 0 && op->out < p->shape.n_buffers, "op %d: out is buffer %d of %d", i, op->out, p->shape.n_buffers);
    FB_REQUIRE(op->out != op->in || flags & FB_IN_PLACE, "op %d: cannot write the buffer it reads", i);
    struct fb_buffer *out = &p->buffers[op->out];
    c->out_width = out->width;
    if (kind->check) FB_TRY(kind->check(c));
    if (flags & FB_COLUMNS) {
        FB_REQUIRE(op->column >= 0 && (int64_t)op->column + op->weight->n_rows <= out->width,
            "op %d: %d rows from column %d on do not fit buffer %d of %d", i, op->weight->n_rows, op->column, op->out,
            out->width);
        FB_REQUIRE(op->column == 0 || (out->first_write >= 0 && op->column == out->filled),
            "op %d: column %d of buffer %d does not follow what was written, %d columns", i, op->column, op->out,
            out->filled);
    } else if (kind->width) {
        const int32_t width = kind->width(c);
        FB_REQUIRE(out->width == width, "op %d: the result is %d wide, buffer %d is %d", i, width, op->out, out->width);
    }
    FB_TRY(check_residual(p, c, flags, gathered));
    if (out->first_write < 0) {
        out->first_write = i;
        out->per_output = gathered;
    }
    FB_REQUIRE(out->per_output == gathered, "op %d: buffer %d holds rows of %s", i, op->out,
        out->per_output ? "outputs" : "tokens");
    if (out->last_use < i) out->last_use = i;
    out->filled = flags & FB_COLUMNS ? op->column + op->weight->n_rows : out->width;
    return FB_OK;
}

enum fb_status fb_check_op(struct fb_program *p, int32_t index, bool *gathered) {
    const struct fb_op *op = &p->ops[index];
    const struct fb_operator *kind = fb_operator_of(op->kind);
    FB_REQUIRE(kind, "op %d: kind %d is unknown", index, (int)op->kind);
    if (p->device ? !p->device->kind->runs(op->kind) : !runs_on_cpu(kind))
        return fb_fail(
            FB_UNSUPPORTED, "op %d: the %s has no operator %s", index, p->device ? "GPU" : "CPU", kind->name);
    struct fb_check check = {.program = p, .op = op, .index = index};
    FB_TRY(check_order(p, &check, kind->flags, *gathered));
    FB_TRY(check_input(p, &check, kind, *gathered));
    if (kind->flags & FB_GATHERS) *gathered = true;
    if (kind->flags & FB_SPANS_DEVICES) p->is_part = true;
    return check_output(p, &check, kind, *gathered);
}
