/* stages.c - cuts a program into stages. See program.h. */
#include "program/operators.h"

/* Whether a product can run in parallel with the one before it: both read the same buffer, and it adds nothing to
 * what the other writes. Two that write one buffer fill it column by column. */
static bool are_independent(const struct fb_op *first, const struct fb_op *second) {
    if (first->in != second->in || second->out < 0 || second->residual != -1) return false;
    return first->out == second->out ? second->column > first->column : second->out != first->in;
}

static int32_t last_op(const struct fb_stage *stage) {
    return stage->first_op + stage->n_ops - 1;
}

/* Consecutive row operators become one stage, as do products that can run in parallel. FB_GATHERS changes
 * what a row is, so it starts a stage. */
static void cut(struct fb_program *p) {
    bool gathered = false;
    for (int32_t i = 0; i < p->n_ops; i++) {
        const struct fb_op *op = &p->ops[i];
        const enum fb_stage_kind kind = fb_operator_of(op->kind)->stage;
        struct fb_stage *before = p->n_stages ? &p->stages[p->n_stages - 1] : NULL;
        const bool gathers = fb_op_is(op, FB_GATHERS);
        gathered = gathered || gathers;
        const bool joins = before && before->kind == kind && !gathers &&
                           (kind == FB_STAGE_ROWS || (kind == FB_STAGE_LINEAR && before->n_ops < FB_MOST_PRODUCTS &&
                                                         are_independent(op - 1, op)));
        if (joins)
            before->n_ops++;
        else
            p->stages[p->n_stages++] = (struct fb_stage){
                .kind = kind, .first_op = i, .n_ops = 1, .norm = -1, .router = -1, .per_output = gathered};
    }
}

/* Whether an operator after `i` reads the present contents of `buffer`. */
static bool is_read_later(const struct fb_program *p, int32_t buffer, int32_t i) {
    for (i++; i < p->n_ops; i++) {
        const struct fb_op *op = &p->ops[i];
        if (fb_op_reads(op, buffer)) return true;
        if (op->out == buffer) return false;
    }
    return false;
}

/* Moves a norm into the stage of products that are the only readers of its result, and records which stages
 * quantize or narrow their inputs. A moved norm reads its input while the products write, so their memory
 * must not overlap. */
static void prepare_products(struct fb_program *p) {
    int32_t n_kept = 0;
    for (int32_t s = 0; s < p->n_stages; s++) {
        struct fb_stage stage = p->stages[s];
        if (stage.kind == FB_STAGE_LINEAR) {
            for (int32_t i = stage.first_op; i <= last_op(&stage); i++) {
                const struct fb_weight *weight = p->ops[i].weight;
                const size_t n_blocks = (size_t)weight->n_cols / FB_BLOCK_COLUMNS;
                const size_t width = ((size_t)weight->n_cols + 31) / 32 * 32;
                if (fb_takes_pairs(weight)) {
                    stage.is_paired = true;
                    if (width > p->pair_stride) p->pair_stride = width;
                }
                if (!fb_is_quantized(weight->dtype)) continue;
                stage.is_quantized = true;
                if (n_blocks > p->activation_blocks) p->activation_blocks = n_blocks;
            }
            struct fb_stage *before = &p->stages[n_kept - 1]; /* exists: EMBED comes first */
            const struct fb_op *norm = &p->ops[last_op(before)];
            bool writes_its_input = false;
            for (int32_t i = stage.first_op; i <= last_op(&stage); i++)
                writes_its_input = writes_its_input || (p->ops[i].out >= 0 && p->ops[i].out == norm->in);
            if (before->kind == FB_STAGE_ROWS && fb_op_is(norm, FB_NORM) && norm->out >= 0 && norm->out != norm->in &&
                norm->residual < 0 && norm->out == p->ops[stage.first_op].in && !writes_its_input &&
                !is_read_later(p, norm->out, last_op(&stage))) {
                stage.norm = last_op(before);
                struct fb_buffer *in = &p->buffers[norm->in];
                if (in->last_use < last_op(&stage)) in->last_use = last_op(&stage);
                if (--before->n_ops == 0) n_kept--;
            }
        }
        p->stages[n_kept++] = stage;
    }
    p->n_stages = n_kept;
}

int32_t fb_ops_of_heads(const struct fb_op *ops, int32_t n_ops) {
    int32_t n = 0;
    for (int32_t step = 0; n < n_ops && ops[n].in == ops->in && ops[n].heads == ops->heads; n++) {
        const int32_t next = fb_operator_of(ops[n].kind)->head_step;
        if (next <= step) break;
        step = next;
    }
    return n;
}

/* Finds attention that can take raw heads: the stage before it consists of head norms, rope and the writing
 * of K and V at most, in this order and on its buffer, which nobody reads later. Without k and v heads there is
 * nothing to write. */
static void prepare_attention(struct fb_program *p) {
    for (int32_t s = 1; s < p->n_stages; s++) {
        struct fb_stage *before = &p->stages[s - 1];
        const struct fb_op *attention = &p->ops[p->stages[s].first_op];
        if (p->stages[s].kind != FB_STAGE_ATTENTION || before->kind != FB_STAGE_ROWS) continue;
        if (is_read_later(p, attention->in, p->stages[s].first_op)) continue;
        const struct fb_op *last = &p->ops[last_op(before)];
        const bool writes = fb_operator_of(last->kind)->head_step == FB_HEAD_IS_WRITTEN;
        const bool has_kv = p->buffers[attention->in].width != fb_q_width(&p->shape.heads[attention->heads]);
        before->is_of_heads = fb_ops_of_heads(&p->ops[before->first_op], before->n_ops) == before->n_ops &&
                              last->in == attention->in && last->heads == attention->heads && writes == has_kv &&
                              (!writes || last->layer == attention->layer);
    }
}

/* The last operator that reads a router's result; -1 if one reads it that is not routed by it, or if the router's input
 * is overwritten before. */
static int32_t last_routed(const struct fb_program *p, int32_t router) {
    const struct fb_op *from = &p->ops[router];
    int32_t last = -1, overwritten = p->n_ops;
    for (int32_t i = router + 1; i < p->n_ops; i++) {
        const struct fb_op *op = &p->ops[i];
        if (op->out == from->in && overwritten == p->n_ops) overwritten = i;
        if (fb_op_reads(op, from->out)) {
            if (!fb_op_is(op, FB_ROUTED) || op->factors != from->out || op->in == from->out) return -1;
            last = i;
        }
        if (op->out == from->out) break;
    }
    return last < overwritten ? last : -1;
}

/* Finds routers that are stages of their own, and the grouped products that can run them for few rows. */
static void prepare_experts(struct fb_program *p) {
    struct fb_stage *router = NULL; /* the last that can be left to its readers */
    int32_t last = -1;
    for (int32_t s = 0; s < p->n_stages; s++) {
        struct fb_stage *stage = &p->stages[s];
        const struct fb_op *op = &p->ops[stage->first_op];
        if (stage->kind == FB_STAGE_ROWS && stage->n_ops == 1 && fb_op_is(op, FB_ROUTES)) {
            last = last_routed(p, stage->first_op);
            router = last < 0 ? NULL : stage;
            if (!router) continue;
            router->is_router = true;
            struct fb_buffer *logits = &p->buffers[op->in];
            if (logits->last_use < last) logits->last_use = last;
        }
        if (stage->kind != FB_STAGE_EXPERTS || !router || stage->first_op > last) continue;
        if (op->factors == p->ops[router->first_op].out) stage->router = router->first_op;
    }
}

/* The stage that runs an operator, norms included that were moved into it. */
static const struct fb_stage *stage_of(const struct fb_program *p, int32_t op) {
    int32_t low = 0, high = p->n_stages - 1;
    while (low < high) {
        const int32_t middle = (low + high + 1) / 2;
        const struct fb_stage *stage = &p->stages[middle];
        if ((stage->norm >= 0 ? stage->norm : stage->first_op) <= op)
            low = middle;
        else
            high = middle - 1;
    }
    return &p->stages[low];
}

/* Within a stage one row may be done when another begins, so a buffer is alive from the first to the last operator of
 * the stages that use it: else a row of one buffer could lie where a row of another is still needed. */
static void extend_lives(struct fb_program *p) {
    for (int32_t i = 0; i < p->shape.n_buffers; i++) {
        struct fb_buffer *buffer = &p->buffers[i];
        if (buffer->first_write < 0) continue;
        const struct fb_stage *first = stage_of(p, buffer->first_write), *last = stage_of(p, buffer->last_use);
        buffer->first_write = first->norm >= 0 ? first->norm : first->first_op;
        if (buffer->last_use < last_op(last)) buffer->last_use = last_op(last);
    }
}

void fb_cut_stages(struct fb_program *p) {
    cut(p);
    prepare_products(p);
    prepare_attention(p);
    prepare_experts(p);
    extend_lives(p);
}
