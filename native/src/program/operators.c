/* operators.c - the table of operator kinds. See operators.h. */
#include "program/operators.h"

#include "base/status.h"
#include "program/run.h"
#include "program/states.h"

#include <math.h>
#include <string.h>

/* ---- Widths ------------------------------------------------------------------------------------------------------ */

static const struct fb_heads *heads_of(const struct fb_check *c) {
    return &c->program->shape.heads[c->op->heads];
}

static int32_t width_of_input(const struct fb_check *c) {
    return c->in_width;
}

static int32_t width_of_row(const struct fb_check *c) {
    return c->op->weight->n_cols;
}

static int32_t width_of_op(const struct fb_check *c) {
    return c->op->width;
}

static int32_t width_of_routes(const struct fb_check *c) {
    return 2 * c->op->n_chosen;
}

/* Each head is what the matrix has no columns for, then its results. */
static int32_t width_of_products(const struct fb_check *c) {
    const struct fb_weight *weight = c->op->weight;
    return c->in_width + weight->n_experts * (weight->n_rows - weight->n_cols);
}

static int32_t width_of_values(const struct fb_check *c) {
    return c->op->n_heads * c->op->v_dim;
}

static int32_t width_of_attended(const struct fb_check *c) {
    return heads_of(c)->n_heads * heads_of(c)->v_dim;
}

/* ---- Checks ------------------------------------------------------------------------------------------------------ */

static enum fb_status check_embed(const struct fb_check *c) {
    FB_REQUIRE(c->index > 0 || c->op->weight->n_rows >= c->program->shape.vocab_size,
        "op %d (embed): %d rows for a vocabulary of %d", c->index, c->op->weight->n_rows, c->program->shape.vocab_size);
    return FB_OK;
}

/* One weight for each column, or for each column of a group. */
static enum fb_status check_rms_norm(const struct fb_check *c) {
    const int32_t length = c->op->vector_length;
    FB_REQUIRE(length > 0 && c->in_width % length == 0, "op %d (rms_norm): %d weights for a width of %d", c->index,
        length, c->in_width);
    return FB_OK;
}

static enum fb_status check_layer_norm(const struct fb_check *c) {
    FB_REQUIRE(c->op->vector_length == c->in_width && c->op->vector2_length == c->in_width,
        "op %d (layer_norm): %d weights and %d biases for a width of %d", c->index, c->op->vector_length,
        c->op->vector2_length, c->in_width);
    return FB_OK;
}

/* Whether a norm of n heads of `dim` has a length that its flags allow. */
static bool is_norm_of(const struct fb_op *op, int32_t length, int32_t n, int32_t dim) {
    if (op->flags & FB_HEADS_BIASED) {
        if (length % 2) return false;
        length /= 2;
    }
    const bool each = length == n * dim;
    return op->flags & FB_HEADS_WHOLE ? each : each || length == dim;
}

static enum fb_status check_head_norm(const struct fb_check *c) {
    const struct fb_heads *h = heads_of(c);
    if (c->op->flags & FB_HEADS_LATENT) {
        FB_REQUIRE(c->op->flags == FB_HEADS_LATENT && c->has_kv && h->v_in_k && c->op->vector_length == 0 &&
                       c->op->vector2_length == h->v_dim,
            "op %d (head_norm): a norm of latents needs k heads that hold v, %d weights, and no other flags", c->index,
            h->v_dim);
        return FB_OK;
    }
    FB_REQUIRE(!(c->op->flags & FB_HEADS_WHOLE) || !(c->op->flags & FB_HEADS_LAYER_NORM),
        "op %d (head_norm): a norm over all heads together is an RMS norm", c->index);
    FB_REQUIRE(!(c->op->flags & FB_HEADS_BIASED) || c->op->flags & FB_HEADS_LAYER_NORM,
        "op %d (head_norm): an RMS norm has no biases", c->index);
    FB_REQUIRE(is_norm_of(c->op, c->op->vector_length, h->n_heads, h->k_dim),
        "op %d (head_norm): %d weights for %d q heads of %d", c->index, c->op->vector_length, h->n_heads, h->k_dim);
    if (!c->has_kv) return FB_OK;
    FB_REQUIRE(is_norm_of(c->op, c->op->vector2_length, h->n_kv_heads, h->k_dim),
        "op %d (head_norm): %d weights for %d k heads of %d", c->index, c->op->vector2_length, h->n_kv_heads, h->k_dim);
    return FB_OK;
}

static enum fb_status check_rope(const struct fb_check *c) {
    FB_REQUIRE(heads_of(c)->rope >= 0, "op %d (rope): its heads have no rope table", c->index);
    return FB_OK;
}

/* The operators of a KV layer must agree on what its pages hold. */
static enum fb_status check_kv_layer(const struct fb_check *c) {
    const struct fb_heads *h = heads_of(c);
    const struct fb_kv_layer wanted = {h->n_kv_heads, h->k_dim, h->v_in_k ? 0 : h->v_dim};
    struct fb_kv_layer *known = &c->program->kv_layers[c->op->layer];
    if (known->n_kv_heads == 0) *known = wanted;
    FB_REQUIRE(memcmp(known, &wanted, sizeof wanted) == 0,
        "op %d: layer %d holds %d KV heads of %d and %d, these have %d of %d and %d", c->index, c->op->layer,
        known->n_kv_heads, known->k_dim, known->v_dim, wanted.n_kv_heads, wanted.k_dim, wanted.v_dim);
    return FB_OK;
}

static enum fb_status check_kv_write(const struct fb_check *c) {
    FB_REQUIRE(c->has_kv, "op %d (kv_write): buffer %d holds q heads only", c->index, c->op->in);
    return check_kv_layer(c);
}

static enum fb_status check_attention(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const int32_t n_heads = heads_of(c)->n_heads;
    FB_REQUIRE(op->window >= 0, "op %d: window is %d, must not be negative", c->index, op->window);
    FB_REQUIRE(op->scale > 0.0f, "op %d: scale of attention must be above 0", c->index);
    FB_REQUIRE(
        !(op->flags & FB_ATTEND_CHUNK) || op->window > 0, "op %d: attention in chunks needs their length", c->index);
    FB_REQUIRE(op->vector_length == 0 || op->vector_length == n_heads, "op %d (attention): %d sinks for %d heads",
        c->index, op->vector_length, n_heads);
    FB_REQUIRE(op->vector2_length == (op->flags & FB_ALIBI_BF16 ? n_heads : 0) || op->vector2_length == n_heads,
        "op %d (attention): %d slopes for %d heads", c->index, op->vector2_length, n_heads);
    FB_REQUIRE(isfinite(op->temperature) && (op->temperature == 0.0f || op->temperature_length > 0),
        "op %d (attention): temperature must be finite, and its length above 0", c->index);
    return check_kv_layer(c);
}

/* Whether a product with gates may have the operator's activation. */
static bool is_of_gates(const struct fb_op *op) {
    if (op->activation == FB_ACTIVATION_CLAMPED_SILU) return op->limit > 0.0f;
    return op->activation != FB_ACTIVATION_NONE && op->activation != FB_ACTIVATION_CLAMP &&
           op->activation != FB_ACTIVATION_XIELU;
}

static enum fb_status check_linear(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    FB_REQUIRE(op->activation != FB_ACTIVATION_CLAMPED_SILU, "op %d (linear): activation %d is one of gates", c->index,
        (int)op->activation);
    FB_REQUIRE(op->activation != FB_ACTIVATION_XIELU || op->vector2_length == FB_ACTIVATION_NUMBERS,
        "op %d (linear): xielu takes %d numbers, not %d", c->index, FB_ACTIVATION_NUMBERS, op->vector2_length);
    FB_REQUIRE(
        op->activation != FB_ACTIVATION_CLAMP || op->limit > 0.0f, "op %d (linear): clamp needs a limit", c->index);
    return FB_OK;
}

/* Gate and up are interleaved by panels: the last panel of each half may hold padding rows. */
static enum fb_status check_gated(const struct fb_check *c) {
    const int32_t n_rows = c->op->weight->n_rows;
    FB_REQUIRE(is_of_gates(c->op), "op %d (linear_gated): activation %d is not one of a gate", c->index,
        (int)c->op->activation);
    FB_REQUIRE(n_rows % 32 == 0 && c->out_width <= n_rows / 2 && c->out_width > n_rows / 2 - 16,
        "op %d (linear_gated): %d interleaved rows fit at most %d columns, buffer %d has %d", c->index, n_rows,
        n_rows / 2, c->op->out, c->out_width);
    return FB_OK;
}

static enum fb_status check_mix(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const int32_t n_factors = op->vector ? op->vector_length : c->program->buffers[op->factors].width;
    FB_REQUIRE(op->width > 0 && c->in_width % op->width == 0 && c->out_width % op->width == 0,
        "op %d (mix): streams of %d do not fill buffers of %d and %d", c->index, op->width, c->in_width, c->out_width);
    const int64_t n_in = c->in_width / op->width, n_out = c->out_width / op->width;
    FB_REQUIRE(n_in * n_out == n_factors, "op %d (mix): %d factors for %d streams made of %d", c->index, n_factors,
        (int)n_out, (int)n_in);
    return FB_OK;
}

static enum fb_status check_sparsify(const struct fb_check *c) {
    FB_REQUIRE(!fb_has_numbers(c->op->activation), "op %d (sparsify): activation %d is not one of a gate", c->index,
        (int)c->op->activation);
    return FB_OK;
}

static enum fb_status check_head_linear(const struct fb_check *c) {
    const struct fb_weight *weight = c->op->weight;
    const int32_t n = weight->n_experts;
    FB_REQUIRE(c->in_width % n == 0 && c->in_width / n >= weight->n_cols,
        "op %d (head_linear): %d matrices of %d columns for a buffer of %d", c->index, n, weight->n_cols, c->in_width);
    FB_REQUIRE((int64_t)n * weight->n_rows <= 1 << 24, "op %d (head_linear): %d matrices of %d rows are too many",
        c->index, n, weight->n_rows);
    FB_REQUIRE(c->op->column == 0 && c->op->vector_length == 0 && c->op->activation == FB_ACTIVATION_NONE,
        "op %d (head_linear): has no column, bias or activation", c->index);
    return FB_OK;
}

static enum fb_status check_match_rms(const struct fb_check *c) {
    FB_REQUIRE(c->op->eps >= 0.0f && isfinite(c->op->eps), "op %d: eps must be finite and not negative", c->index);
    return FB_OK;
}

static enum fb_status check_router(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const int32_t i = c->index, n = c->in_width;
    FB_REQUIRE(n <= FB_MOST_EXPERTS, "op %d (router): %d experts, at most %d are possible", i, n, FB_MOST_EXPERTS);
    FB_REQUIRE(op->n_chosen >= 1 && op->n_chosen <= n && op->n_chosen <= FB_MOST_CHOSEN,
        "op %d (router): %d experts of %d are chosen, must be 1 .. %d", i, op->n_chosen, n, FB_MOST_CHOSEN);
    FB_REQUIRE(op->vector_length == 0 || op->vector_length == n, "op %d (router): %d corrections for %d experts", i,
        op->vector_length, n);
    FB_REQUIRE(op->eps >= 0.0f && isfinite(op->eps), "op %d (router): eps must be finite and not negative", i);
    FB_REQUIRE(!(op->flags & FB_ROUTE_SIGMOID) || !(op->flags & FB_ROUTE_CHOSEN),
        "op %d (router): scores are sigmoids or logits, not both", i);
    FB_REQUIRE(op->vector2_length == 0 || op->vector2_length == n, "op %d (router): %d factors for %d experts", i,
        op->vector2_length, n);
    const uint32_t others = FB_ROUTE_SIGMOID | FB_ROUTE_CHOSEN | FB_ROUTE_NORM | FB_ROUTE_TOP;
    FB_REQUIRE(!(op->flags & FB_ROUTE_MIXER) ||
                   (!(op->flags & others) && !op->vector_length && !op->vector2_length && op->n_groups == 0),
        "op %d (router): a mixer has no other scores, corrections, factors or groups", i);
    if (op->n_groups == 0) return FB_OK;
    FB_REQUIRE(op->n_groups >= 1 && n % op->n_groups == 0 && op->n_top_groups >= 1 &&
                   op->n_top_groups <= op->n_groups && (int64_t)op->n_top_groups * (n / op->n_groups) >= op->n_chosen,
        "op %d (router): %d experts of the best %d of %d groups do not give %d", i, n, op->n_top_groups, op->n_groups,
        op->n_chosen);
    return FB_OK;
}

static enum fb_status check_experts(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const struct fb_weight *weight = op->weight;
    const int32_t i = c->index, n = op->n_chosen, n_rows = weight->n_rows;
    const bool is_gated = op->flags & FB_EXPERTS_GATED, sums = op->flags & FB_EXPERTS_SUM;
    FB_REQUIRE(n >= 1 && n <= FB_MOST_CHOSEN && n <= weight->n_experts,
        "op %d (experts): %d experts of %d are chosen, must be 1 .. %d", i, n, weight->n_experts, FB_MOST_CHOSEN);
    FB_REQUIRE(c->in_width == weight->n_cols || c->in_width == (int64_t)n * weight->n_cols,
        "op %d (experts): matrices of %d columns for %d experts of a row, buffer %d is %d wide", i, weight->n_cols, n,
        op->in, c->in_width);
    FB_REQUIRE(c->program->buffers[op->factors].width == 2 * n, "op %d (experts): buffer %d holds no %d experts", i,
        op->factors, n);
    FB_REQUIRE(op->vector_length == 0 || op->vector_length == (int64_t)weight->n_experts * n_rows,
        "op %d (experts): %d biases for %d x %d rows", i, op->vector_length, weight->n_experts, n_rows);
    FB_REQUIRE(!sums || !is_gated, "op %d (experts): gated results are not summed", i);
    FB_REQUIRE(sums || op->residual == -1, "op %d (experts): only sums take a residual", i);
    FB_REQUIRE(c->out_width % (sums ? 1 : n) == 0, "op %d (experts): buffer %d of %d does not hold %d results", i,
        op->out, c->out_width, n);
    const int32_t width = c->out_width / (sums ? 1 : n);
    if (!is_gated) {
        FB_REQUIRE(op->activation == FB_ACTIVATION_NONE, "op %d (experts): only gates have an activation", i);
        FB_REQUIRE(width == n_rows, "op %d (experts): results of %d rows, the weight has %d", i, width, n_rows);
        return FB_OK;
    }
    FB_REQUIRE(is_of_gates(op), "op %d (experts): activation %d is not one of a gate", i, (int)op->activation);
    FB_REQUIRE(n_rows % 32 == 0 && width <= n_rows / 2 && width > n_rows / 2 - 16,
        "op %d (experts): %d interleaved rows fit at most %d columns, not %d", i, n_rows, n_rows / 2, width);
    return FB_OK;
}

static enum fb_status check_gated_norm(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const int32_t n = op->n_groups;
    FB_REQUIRE(n >= 1 && c->in_width % n == 0, "op %d (gated_norm): %d groups of %d columns", c->index, n, c->in_width);
    FB_REQUIRE(op->residual >= 0 && op->residual != op->out,
        "op %d (gated_norm): its gate is buffer %d, must be one that it does not write", c->index, op->residual);
    FB_REQUIRE(!op->vector || op->vector_length == c->in_width || op->vector_length == c->in_width / n,
        "op %d (gated_norm): %d weights for %d groups of %d", c->index, op->vector_length, n, c->in_width / n);
    FB_REQUIRE(op->eps >= 0.0f && isfinite(op->eps), "op %d: eps must be finite and not negative", c->index);
    FB_REQUIRE(op->activation != FB_ACTIVATION_NONE && !fb_has_numbers(op->activation),
        "op %d (gated_norm): activation %d is not one of a gate", c->index, (int)op->activation);
    return FB_OK;
}

/* ---- Work -------------------------------------------------------------------------------------------------------- */

static int64_t work_of_product(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    const int64_t n_rows = p->buffers[op->in].per_output ? batch->n_outputs : batch->n_tokens;
    return (int64_t)op->weight->n_rows * op->weight->n_cols * n_rows;
}

static int64_t work_of_heads(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    return op->weight->n_experts * work_of_product(p, op, batch);
}

static int64_t work_of_experts(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    return op->n_chosen * work_of_product(p, op, batch);
}

static int64_t work_of_attention(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    const struct fb_heads *h = &p->shape.heads[op->heads];
    int64_t work = 0;
    for (int32_t s = 0; s < batch->n_sequences; s++) {
        const struct fb_sequence *sequence = &batch->sequences[s];
        work += (int64_t)h->n_heads * (h->k_dim + h->v_dim) * sequence->n_tokens *
                (sequence->n_past + sequence->n_tokens);
    }
    return work;
}

/* ---- Fusion into attention --------------------------------------------------------------------------------------- */

static void defer_norm(const struct fb_program *p, const struct fb_op *op, struct fb_raw_heads *raw) {
    (void)p;
    raw->norm = op;
}

static void defer_rope(const struct fb_program *p, const struct fb_op *op, struct fb_raw_heads *raw) {
    raw->angles = &p->angles[p->shape.heads[op->heads].rope];
}

static void defer_write(const struct fb_program *p, const struct fb_op *op, struct fb_raw_heads *raw) {
    (void)p;
    (void)op;
    raw->writes = true;
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
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_NORM | FB_RESIDUAL,
        .stage = FB_STAGE_ROWS,
        .check = check_rms_norm,
        .width = width_of_input,
        .run_row = fb_norm_row},
    [FB_OP_LAYER_NORM] = {.name = "layer_norm",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_NORM | FB_RESIDUAL,
        .stage = FB_STAGE_ROWS,
        .check = check_layer_norm,
        .width = width_of_input,
        .run_row = fb_norm_row},
    [FB_OP_LINEAR] = {.name = "linear",
        .flags = FB_READS | FB_WRITES | FB_WEIGHT | FB_RESIDUAL | FB_COLUMNS | FB_SCALED,
        .stage = FB_STAGE_LINEAR,
        .check = check_linear,
        .work = work_of_product},
    [FB_OP_LINEAR_GATED] = {.name = "linear_gated",
        .flags = FB_READS | FB_WRITES | FB_WEIGHT | FB_GATED | FB_SCALED,
        .stage = FB_STAGE_LINEAR,
        .check = check_gated,
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
        .check = check_rope,
        .run_row = fb_rope_row,
        .head_step = 2,
        .defer_head = defer_rope},
    [FB_OP_KV_WRITE] = {.name = "kv_write",
        .flags = FB_READS | FB_HEADS | FB_OF_TOKENS | FB_LAYER,
        .stage = FB_STAGE_ROWS,
        .check = check_kv_write,
        .run_row = fb_kv_write_row,
        .head_step = FB_HEAD_IS_WRITTEN,
        .defer_head = defer_write},
    [FB_OP_ATTENTION] = {.name = "attention",
        .flags = FB_READS | FB_WRITES | FB_HEADS | FB_OF_TOKENS | FB_LAYER,
        .stage = FB_STAGE_ATTENTION,
        .check = check_attention,
        .width = width_of_attended,
        .work = work_of_attention},
    [FB_OP_GATHER_OUTPUTS] = {.name = "gather_outputs",
        .flags = FB_READS | FB_WRITES | FB_GATHERS,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input,
        .run_row = fb_gather_row},
    [FB_OP_LOGITS] = {.name = "logits",
        .flags = FB_LAST | FB_READS | FB_WEIGHT | FB_OF_OUTPUTS | FB_SCALED,
        .stage = FB_STAGE_LINEAR,
        .work = work_of_product},
    [FB_OP_SUM] = {.name = "sum",
        .flags = FB_READS | FB_WRITES | FB_RESIDUAL | FB_SPANS_DEVICES,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input},
    [FB_OP_EMBED_POSITION] = {.name = "embed_position",
        .flags = FB_WRITES | FB_WEIGHT | FB_OF_TOKENS | FB_POSITIONS,
        .stage = FB_STAGE_ROWS,
        .width = width_of_row,
        .run_row = fb_embed_position_row},
    [FB_OP_SCALE] = {.name = "scale",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_SCALED,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input,
        .run_row = fb_scale_row},
    [FB_OP_MULTIPLY] = {.name = "multiply",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_RESIDUAL | FB_SECOND,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input,
        .run_row = fb_multiply_row},
    [FB_OP_ADD] = {.name = "add",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_RESIDUAL | FB_SECOND | FB_SCALED,
        .stage = FB_STAGE_ROWS,
        .width = width_of_input,
        .run_row = fb_add_row},
    [FB_OP_MIX] = {.name = "mix",
        .flags = FB_READS | FB_WRITES | FB_RESIDUAL | FB_FACTORS,
        .stage = FB_STAGE_ROWS,
        .check = check_mix,
        .run_row = fb_mix_row},
    [FB_OP_MATCH_RMS] = {.name = "match_rms",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_RESIDUAL | FB_SECOND,
        .stage = FB_STAGE_ROWS,
        .check = check_match_rms,
        .width = width_of_input,
        .run_row = fb_match_rms_row},
    [FB_OP_SPARSIFY] = {.name = "sparsify",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE,
        .stage = FB_STAGE_ROWS,
        .check = check_sparsify,
        .width = width_of_input,
        .run_row = fb_sparsify_row},
    [FB_OP_ROUTER] = {.name = "router",
        .flags = FB_READS | FB_WRITES | FB_SCALED | FB_ROUTES,
        .stage = FB_STAGE_ROWS,
        .check = check_router,
        .width = width_of_routes,
        .run_row = fb_router_row},
    [FB_OP_EXPERTS] = {.name = "experts",
        .flags = FB_READS | FB_WRITES | FB_WEIGHT | FB_RESIDUAL | FB_SCALED | FB_ROUTED,
        .stage = FB_STAGE_EXPERTS,
        .check = check_experts,
        .work = work_of_experts},
    [FB_OP_HEAD_LINEAR] = {.name = "head_linear",
        .flags = FB_READS | FB_WRITES | FB_WEIGHT | FB_COLUMNS | FB_OF_EACH_HEAD,
        .stage = FB_STAGE_HEADS,
        .check = check_head_linear,
        .width = width_of_products,
        .work = work_of_heads},
    [FB_OP_SHORT_CONV] = {.name = "short_conv",
        .flags = FB_READS | FB_WRITES | FB_OF_TOKENS | FB_STATE | FB_COLUMN_IN,
        .stage = FB_STAGE_STATES,
        .check = fb_check_conv,
        .width = width_of_op,
        .state_floats = fb_conv_floats,
        .scratch_floats = fb_conv_scratch,
        .n_items = fb_conv_items,
        .run_item = fb_conv_item,
        .work = fb_conv_work},
    [FB_OP_DELTA_RULE] = {.name = "delta_rule",
        .flags = FB_READS | FB_WRITES | FB_OF_TOKENS | FB_STATE | FB_GATES | FB_SCALED,
        .stage = FB_STAGE_STATES,
        .check = fb_check_delta_rule,
        .width = width_of_values,
        .state_floats = fb_matrix_floats,
        .scratch_floats = fb_delta_rule_scratch,
        .n_items = fb_matrix_items,
        .run_item = fb_delta_rule_item,
        .work = fb_delta_rule_work},
    [FB_OP_SSM] = {.name = "ssm",
        .flags = FB_READS | FB_WRITES | FB_OF_TOKENS | FB_STATE | FB_GATES,
        .stage = FB_STAGE_STATES,
        .check = fb_check_ssm,
        .width = width_of_values,
        .state_floats = fb_matrix_floats,
        .scratch_floats = fb_ssm_scratch,
        .n_items = fb_matrix_items,
        .run_item = fb_ssm_item,
        .work = fb_ssm_work},
    [FB_OP_GATED_NORM] = {.name = "gated_norm",
        .flags = FB_READS | FB_WRITES | FB_IN_PLACE | FB_RESIDUAL | FB_SECOND,
        .stage = FB_STAGE_ROWS,
        .check = check_gated_norm,
        .width = width_of_input,
        .run_row = fb_gated_norm_row},
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
    FB_REQUIRE(i > 0 || flags & FB_FIRST, "op 0: a program begins with embed");
    FB_REQUIRE(((flags & FB_LAST) != 0) == (i == p->n_ops - 1), "op %d: a program has one logits op, at its end", i);
    FB_REQUIRE(!(flags & FB_WEIGHT) || op->weight, "op %d: its weight is null", i);
    FB_REQUIRE(!(flags & FB_WEIGHT) || op->weight->device == p->device, "op %d: its weight is on another device", i);
    FB_REQUIRE(!(flags & FB_WEIGHT) || op->weight->n_experts == 1 || flags & (FB_ROUTED | FB_OF_EACH_HEAD),
        "op %d: a weight of %d experts", i, op->weight->n_experts);
    FB_REQUIRE(isfinite(op->scale) && (op->scale != 0.0f || !(flags & FB_SCALED)),
        "op %d: scale is %g, must be finite and not 0", i, (double)op->scale);
    FB_REQUIRE(
        op->column == 0 || flags & (FB_COLUMNS | FB_SECOND | FB_COLUMN_IN | FB_GATES), "op %d: takes no column", i);
    FB_REQUIRE(op->limit >= 0.0f && isfinite(op->limit), "op %d: limit must be finite and not negative", i);
    FB_REQUIRE((int)op->activation >= 0 && (int)op->activation < FB_ACTIVATION_KINDS, "op %d: activation %d is unknown",
        i, (int)op->activation);
    FB_REQUIRE(!(flags & FB_HEADS) || (op->heads >= 0 && op->heads < s->n_geometries),
        "op %d: its heads are geometry %d of %d", i, op->heads, s->n_geometries);
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
        const struct fb_heads *h = &s->heads[op->heads];
        const int64_t q = (int64_t)h->n_heads * h->k_dim;
        const int64_t kv = (int64_t)h->n_kv_heads * (h->k_dim + (h->v_in_k ? 0 : h->v_dim));
        c->has_kv = c->in_width == q + kv;
        FB_REQUIRE(c->has_kv || c->in_width == q,
            "op %d: %d q heads of %d are %lld wide, their k and v %lld more; buffer %d is %d", i, h->n_heads, h->k_dim,
            (long long)q, (long long)kv, op->in, c->in_width);
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
    FB_REQUIRE(op->residual != -1 || !(flags & FB_SECOND) || op->vector_length == c->out_width,
        "op %d: has no second input", i);
    if (op->residual == -1) return FB_OK;
    FB_REQUIRE(flags & FB_RESIDUAL, "op %d: takes no residual", i);
    FB_REQUIRE(op->residual >= 0 && op->residual < p->shape.n_buffers, "op %d: residual is buffer %d of %d", i,
        op->residual, p->shape.n_buffers);
    struct fb_buffer *residual = &p->buffers[op->residual];
    const bool fits = flags & FB_SECOND ? op->column >= 0 && (int64_t)op->column + c->out_width <= residual->width
                                        : residual->width == c->out_width && op->column == 0;
    FB_REQUIRE(
        residual->first_write >= 0 && residual->filled == residual->width && fits && residual->per_output == gathered,
        "op %d: buffer %d cannot be its residual (unwritten, or another width or kind of rows)", i, op->residual);
    FB_REQUIRE(!(flags & FB_NORM) || (op->residual != op->in && op->out != op->in),
        "op %d: a norm with a residual destroys buffer %d, so it can be neither residual nor result", i, op->in);
    FB_REQUIRE(!(flags & FB_SECOND) || op->residual != op->out || op->out == op->in,
        "op %d: buffer %d cannot be second input and result", i, op->out);
    residual->last_use = i;
    return FB_OK;
}

static enum fb_status check_factors(struct fb_program *p, const struct fb_check *c, bool gathered) {
    const struct fb_op *op = c->op;
    const int32_t i = c->index;
    if (op->vector && fb_op_is(op, FB_FACTORS)) return FB_OK;
    FB_REQUIRE(op->factors >= 0 && op->factors < p->shape.n_buffers, "op %d: factors are buffer %d of %d", i,
        op->factors, p->shape.n_buffers);
    struct fb_buffer *factors = &p->buffers[op->factors];
    FB_REQUIRE(factors->first_write >= 0 && factors->filled == factors->width && factors->per_output == gathered &&
                   op->factors != op->out,
        "op %d: buffer %d cannot be its factors (unwritten, its result, or another kind of rows)", i, op->factors);
    factors->last_use = i;
    return FB_OK;
}

/* Records n columns that an operator writes. They follow those written before, or end where the written end of the
 * buffer begins; a write to column 0 restarts unless only that end was written. */
static enum fb_status fill_columns(const struct fb_check *c, struct fb_buffer *out, int32_t n) {
    const struct fb_op *op = c->op;
    const int64_t end = (int64_t)op->column + n;
    FB_REQUIRE(op->column >= 0 && end <= out->width, "op %d: %d rows from column %d on do not fit buffer %d of %d",
        c->index, n, op->column, op->out, out->width);
    const bool is_empty = out->first_write < 0 || out->filled == out->width;
    if (op->column == 0) {
        if (is_empty || out->filled > 0) out->tail = out->width;
        FB_REQUIRE(end <= out->tail, "op %d: %d rows overlap the end of buffer %d, written from column %d on", c->index,
            n, op->out, out->tail);
        out->filled = n;
    } else if (!is_empty && op->column == out->filled && end <= out->tail) {
        out->filled = (int32_t)end;
    } else {
        if (is_empty) {
            out->filled = 0;
            out->tail = out->width;
        }
        FB_REQUIRE(end == out->tail && op->column >= out->filled,
            "op %d: column %d of buffer %d does not follow what was written, %d columns", c->index, op->column, op->out,
            out->filled);
        out->tail = op->column;
    }
    if (out->filled == out->tail) out->filled = out->tail = out->width;
    return FB_OK;
}

static enum fb_status check_output(
    struct fb_program *p, struct fb_check *c, const struct fb_operator *kind, bool gathered) {
    const struct fb_op *op = c->op;
    const uint32_t flags = kind->flags;
    const int32_t i = c->index;
    if (!(flags & FB_WRITES)) {
        FB_REQUIRE(op->out == -1, "op %d: works in place, out must be -1", i);
        FB_REQUIRE(op->residual == -1, "op %d: takes no residual", i);
        return kind->check ? kind->check(c) : FB_OK;
    }
    FB_REQUIRE(
        op->out >= 0 && op->out < p->shape.n_buffers, "op %d: out is buffer %d of %d", i, op->out, p->shape.n_buffers);
    FB_REQUIRE(op->out != op->in || flags & FB_IN_PLACE, "op %d: cannot write the buffer it reads", i);
    struct fb_buffer *out = &p->buffers[op->out];
    c->out_width = out->width;
    if (flags & (FB_FACTORS | FB_ROUTED | FB_GATES)) FB_TRY(check_factors(p, c, gathered));
    if (kind->check) FB_TRY(kind->check(c));
    if (flags & FB_COLUMNS) {
        FB_TRY(fill_columns(c, out, kind->width ? kind->width(c) : op->weight->n_rows));
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
    if (!(flags & FB_COLUMNS)) out->filled = out->tail = out->width;
    return FB_OK;
}

enum fb_status fb_check_op(struct fb_program *p, int32_t index, bool *gathered) {
    const struct fb_op *op = &p->ops[index];
    const struct fb_operator *kind = fb_operator_of(op->kind);
    FB_REQUIRE(kind, "op %d: kind %d is unknown", index, (int)op->kind);
    const char *missing = p->device ? p->device->kind->lacks(p, op) : runs_on_cpu(kind) ? NULL : "";
    if (missing)
        return fb_fail(FB_UNSUPPORTED, "op %d: the %s has no operator %s%s%s", index, p->device ? "GPU" : "CPU",
            kind->name, *missing ? " " : "", missing);
    struct fb_check check = {.program = p, .op = op, .index = index};
    FB_TRY(check_order(p, &check, kind->flags, *gathered));
    FB_TRY(check_input(p, &check, kind, *gathered));
    if (kind->flags & FB_GATHERS) *gathered = true;
    if (kind->flags & FB_SPANS_DEVICES) p->is_part = true;
    return check_output(p, &check, kind, *gathered);
}
