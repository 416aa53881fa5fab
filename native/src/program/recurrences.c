/*
 * recurrences.c - the recurrent operators whose state is a matrix for each head: the gated delta rule and state space
 * models. See states.h.
 *
 * An item is some blocks of 16 columns of one head's matrix. For each tile of tokens it prepares what the head needs of
 * them, q and k or B, and the gates, in memory of its thread; then a kernel goes over the columns. A block of 128 rows
 * is 8 KB and stays in L1 for a tile, those of a head in L2 for all of them.
 */
#include "program/states.h"

#include "base/status.h"

#include <math.h>
#include <string.h>

enum { MOST_HEADS = 65536, MOST_DIM = 1024 };

/* Items for each thread, if there are so many: threads that fall behind leave some to others. */
enum { ITEMS_PER_THREAD = 4 };

/* ---- Heads and items --------------------------------------------------------------------------------------------- */

static size_t blocks_of(const struct fb_op *op) {
    return ((size_t)op->v_dim + FB_LANES - 1) / FB_LANES;
}

static size_t block_floats(const struct fb_op *op) {
    return (size_t)op->k_dim * FB_LANES;
}

int64_t fb_matrix_floats(const struct fb_op *op) {
    return (int64_t)op->n_heads * (int64_t)(blocks_of(op) * block_floats(op));
}

/* Blocks of an item: all of a head, or fewer if there would be too few items. Kernels run four side by side at best, so
 * more than two are a multiple of that. */
static size_t blocks_of_item(const struct fb_run *run, const struct fb_op *op, int n_threads) {
    const int64_t n_heads = (int64_t)run->batch->n_sequences * op->n_heads;
    const int64_t n_parts = (ITEMS_PER_THREAD * (int64_t)n_threads + n_heads - 1) / n_heads;
    const size_t n_blocks = blocks_of(op), n = (n_blocks + (size_t)n_parts - 1) / (size_t)n_parts;
    return n > 2 ? (n + 3) / 4 * 4 : n;
}

static int64_t parts_of_head(const struct fb_run *run, const struct fb_op *op, int n_threads) {
    const size_t n = blocks_of_item(run, op, n_threads);
    return (int64_t)((blocks_of(op) + n - 1) / n);
}

int64_t fb_matrix_items(const struct fb_run *run, const struct fb_op *op, int n_threads) {
    return (int64_t)run->batch->n_sequences * op->n_heads * parts_of_head(run, op, n_threads);
}

/* What an item computes, and where. */
struct part {
    const struct fb_run *run;
    const struct fb_op *op;
    struct fb_tiles tiles;
    size_t head, first_column, n_columns, first_row;
    size_t state_at, n_state; /* its numbers in the layer */
    const float *from;        /* its state before the present tile */
    float *to;                /* and after it */
};

static struct part part_of(
    const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker) {
    const int64_t n_parts = parts_of_head(run, op, worker->n_threads);
    const size_t blocks = blocks_of_item(run, op, worker->n_threads), first = (size_t)(index % n_parts) * blocks;
    const size_t n_blocks = blocks_of(op) - first < blocks ? blocks_of(op) - first : blocks;
    const size_t end = (first + n_blocks) * FB_LANES, v_dim = (size_t)op->v_dim;
    const int32_t s = (int32_t)(index / n_parts / op->n_heads);
    struct part part = {.run = run,
        .op = op,
        .tiles.sequence = &run->batch->sequences[s],
        .head = (size_t)(index / n_parts % op->n_heads),
        .first_column = first * FB_LANES,
        .n_columns = (end < v_dim ? end : v_dim) - first * FB_LANES,
        .first_row = (size_t)run->program->first_row[s],
        .n_state = n_blocks * block_floats(op)};
    part.state_at = (part.head * blocks_of(op) + first) * block_floats(op);
    const float *past = fb_state_of(run, op, part.tiles.sequence->state_in);
    part.to = fb_state_of(run, op, part.tiles.sequence->state_out) + part.state_at;
    part.from = past ? past + part.state_at : part.to;
    if (!past) memset(part.to, 0, part.n_state * sizeof *part.to);
    return part;
}

/* Called behind each tile. */
static void end_tile(struct part *part) {
    float *kept = fb_state_of(part->run, part->op, fb_kept_slot(&part->tiles));
    if (kept) memcpy(kept + part->state_at, part->to, part->n_state * sizeof *kept);
    part->from = part->to;
}

/* Column `column` of the gates of the present tile's tokens, plus `bias`. */
static void load_gates(const struct part *part, size_t column, float bias, float *out) {
    const size_t row = part->first_row + (size_t)part->tiles.begin;
    for (size_t t = 0; t < (size_t)part->tiles.n_tokens; t++)
        out[t] = fb_row_of(part->run->program, part->op->factors, row + t)[(size_t)part->op->column + column] + bias;
}

static enum fb_status check_matrix(const struct fb_check *c, int64_t in_width, int32_t n_gates) {
    const struct fb_op *op = c->op;
    const char *name = fb_operator_of(op->kind)->name;
    const int32_t i = c->index;
    FB_REQUIRE(c->in_width == in_width, "op %d (%s): %d heads of %d and %d, %d groups, are %lld wide, buffer %d is %d",
        i, name, op->n_heads, op->k_dim, op->v_dim, op->n_groups, (long long)in_width, op->in, c->in_width);
    const int32_t n_columns = c->program->buffers[op->factors].width;
    FB_REQUIRE(op->column >= 0 && (int64_t)op->column + n_gates <= n_columns,
        "op %d (%s): %d gates from column %d on, buffer %d has %d", i, name, n_gates, op->column, op->factors,
        n_columns);
    return fb_check_state_layer(c);
}

static enum fb_status check_heads(const struct fb_check *c, int32_t n_vector) {
    const struct fb_op *op = c->op;
    const char *name = fb_operator_of(op->kind)->name;
    const int32_t i = c->index;
    FB_REQUIRE(op->n_heads >= 1 && op->n_heads <= MOST_HEADS && op->n_groups >= 1 && op->n_heads % op->n_groups == 0,
        "op %d (%s): n_heads is %d, must be 1 .. %d, and n_groups %d divide it", i, name, op->n_heads, MOST_HEADS,
        op->n_groups);
    FB_REQUIRE(op->k_dim >= 1 && op->k_dim <= MOST_DIM && op->v_dim >= 1 && op->v_dim <= MOST_DIM,
        "op %d (%s): k_dim is %d and v_dim %d, must be 1 .. %d", i, name, op->k_dim, op->v_dim, MOST_DIM);
    FB_REQUIRE(op->vector_length == n_vector * op->n_heads && op->vector2_length == op->n_heads,
        "op %d (%s): %d and %d numbers for %d heads, must be %d and %d", i, name, op->vector_length, op->vector2_length,
        op->n_heads, n_vector * op->n_heads, op->n_heads);
    FB_REQUIRE(op->eps >= 0.0f && isfinite(op->eps), "op %d (%s): eps must be finite and not negative", i, name);
    return FB_OK;
}

/* ---- Gated delta rule -------------------------------------------------------------------------------------------- */

enum fb_status fb_check_delta_rule(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    FB_TRY(check_heads(c, 1));
    FB_REQUIRE(op->eps > 0.0f, "op %d (delta_rule): eps must be above 0", c->index);
    return check_matrix(c, 2 * (int64_t)op->n_groups * op->k_dim + (int64_t)op->n_heads * op->v_dim, 2 * op->n_heads);
}

int64_t fb_delta_rule_work(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    (void)p;
    return 4 * (int64_t)op->n_heads * op->k_dim * op->v_dim * batch->n_tokens;
}

size_t fb_delta_rule_scratch(const struct fb_op *op) {
    return 2 * FB_TILE_TOKENS * (size_t)op->k_dim;
}

/* out = factor x / sqrt(sum(x^2) + eps) */
static void norm_to_one(
    const struct fb_kernels *kernels, const float *x, size_t n, float eps, float factor, float *out) {
    const float sum = kernels->mean_square(x, n) * (float)n;
    memcpy(out, x, n * sizeof *out);
    kernels->scale(out, n, factor / sqrtf(sum + eps));
}

void fb_delta_rule_item(
    const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker) {
    const struct fb_program *p = run->program;
    const struct fb_kernels *kernels = p->kernels;
    struct part part = part_of(run, op, index, worker);
    const size_t k_dim = (size_t)op->k_dim, n_groups = (size_t)op->n_groups, n_heads = (size_t)op->n_heads;
    const size_t group = op->flags & FB_HEADS_TILED ? part.head % n_groups : part.head / (n_heads / n_groups);
    float *q = fb_state_scratch(p, worker->thread), *k = q + FB_TILE_TOKENS * k_dim;
    float decay[FB_TILE_TOKENS], beta[FB_TILE_TOKENS];
    while (fb_next_tile(&part.tiles)) {
        const size_t n = (size_t)part.tiles.n_tokens, row = part.first_row + (size_t)part.tiles.begin;
        for (size_t t = 0; t < n; t++) {
            const float *head = fb_row_of(p, op->in, row + t) + group * k_dim;
            norm_to_one(kernels, head, k_dim, op->eps, op->scale, q + t * k_dim);
            norm_to_one(kernels, head + n_groups * k_dim, k_dim, op->eps, 1.0f, k + t * k_dim);
        }
        load_gates(&part, part.head, 0.0f, beta);
        kernels->activate[FB_ACTIVATION_SIGMOID](beta, n, NULL);
        if (op->flags & FB_DELTA_NEGATIVE) kernels->scale(beta, n, 2.0f);
        load_gates(&part, n_heads + part.head, op->vector2[part.head], decay);
        kernels->softplus(decay, n);
        kernels->exp_sum(decay, n, op->vector[part.head], 0.0f, decay);
        const size_t column = part.head * (size_t)op->v_dim + part.first_column;
        const struct fb_delta_rule rule = {.q = q,
            .k = k,
            .decay = decay,
            .beta = beta,
            .v = fb_row_of(p, op->in, row) + 2 * n_groups * k_dim + column,
            .out = fb_row_of(p, op->out, row) + column,
            .from = part.from,
            .to = part.to,
            .ldv = p->buffers[op->in].stride,
            .ld_out = p->buffers[op->out].stride,
            .n_tokens = n,
            .k_dim = k_dim,
            .n_cols = part.n_columns};
        kernels->delta_rule(&rule);
        end_tile(&part);
    }
}

/* ---- State space models ------------------------------------------------------------------------------------------ */

enum fb_status fb_check_ssm(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    FB_TRY(check_heads(c, 2));
    FB_REQUIRE(op->limit == 0.0f || op->limit >= op->eps, "op %d (ssm): dt is limited to %g .. %g", c->index,
        (double)op->eps, (double)op->limit);
    return check_matrix(c, (int64_t)op->n_heads * op->v_dim + 2 * (int64_t)op->n_groups * op->k_dim, op->n_heads);
}

int64_t fb_ssm_work(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    (void)p;
    return 3 * (int64_t)op->n_heads * op->k_dim * op->v_dim * batch->n_tokens;
}

size_t fb_ssm_scratch(const struct fb_op *op) {
    return FB_TILE_TOKENS * (size_t)op->k_dim;
}

void fb_ssm_item(const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker) {
    const struct fb_program *p = run->program;
    const struct fb_kernels *kernels = p->kernels;
    struct part part = part_of(run, op, index, worker);
    const size_t k_dim = (size_t)op->k_dim, n_groups = (size_t)op->n_groups, n_heads = (size_t)op->n_heads;
    const size_t rows_at = n_heads * (size_t)op->v_dim + part.head / (n_heads / n_groups) * k_dim;
    const size_t column = part.head * (size_t)op->v_dim + part.first_column;
    float *b = fb_state_scratch(p, worker->thread), dt[FB_TILE_TOKENS], decay[FB_TILE_TOKENS];
    while (fb_next_tile(&part.tiles)) {
        const size_t n = (size_t)part.tiles.n_tokens, row = part.first_row + (size_t)part.tiles.begin;
        load_gates(&part, part.head, op->vector2[part.head], dt);
        kernels->softplus(dt, n);
        for (size_t t = 0; t < n; t++) {
            if (dt[t] < op->eps) dt[t] = op->eps;
            if (op->limit > 0.0f && dt[t] > op->limit) dt[t] = op->limit;
            memcpy(b + t * k_dim, fb_row_of(p, op->in, row + t) + rows_at, k_dim * sizeof *b);
            kernels->scale(b + t * k_dim, k_dim, dt[t]);
        }
        kernels->exp_sum(dt, n, op->vector[part.head], 0.0f, decay);
        const float *in = fb_row_of(p, op->in, row);
        const struct fb_ssm ssm = {.b = b,
            .c = in + rows_at + n_groups * k_dim,
            .decay = decay,
            .x = in + column,
            .out = fb_row_of(p, op->out, row) + column,
            .from = part.from,
            .to = part.to,
            .skip = op->vector[n_heads + part.head],
            .ldc = p->buffers[op->in].stride,
            .ldx = p->buffers[op->in].stride,
            .ld_out = p->buffers[op->out].stride,
            .n_tokens = n,
            .k_dim = k_dim,
            .n_cols = part.n_columns};
        kernels->ssm(&ssm);
        end_tile(&part);
    }
}
