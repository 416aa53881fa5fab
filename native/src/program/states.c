/* states.c - the stages of recurrent operators, and the short convolution. See states.h. */
#include "program/states.h"

#include "base/status.h"

#include <string.h>

/* Columns of an item of SHORT_CONV: a few lines of each row, or more of them where a sequence has one row. */
enum { CONV_COLUMNS = 128, CONV_SINGLE_COLUMNS = 512 };

enum { FB_MOST_TAPS = 64 };

bool fb_next_tile(struct fb_tiles *tiles) {
    const struct fb_sequence *s = tiles->sequence;
    tiles->begin += tiles->n_tokens;
    int32_t end = s->n_tokens - tiles->begin < FB_TILE_TOKENS ? s->n_tokens : tiles->begin + FB_TILE_TOKENS;
    if (tiles->keep < s->n_keeps && s->keeps[tiles->keep].n_tokens < end) end = s->keeps[tiles->keep].n_tokens;
    tiles->n_tokens = end - tiles->begin;
    return tiles->n_tokens > 0;
}

int32_t fb_kept_slot(struct fb_tiles *tiles) {
    const struct fb_sequence *s = tiles->sequence;
    const bool keeps = tiles->keep < s->n_keeps && s->keeps[tiles->keep].n_tokens == tiles->begin + tiles->n_tokens;
    return keeps ? s->keeps[tiles->keep++].slot : -1;
}

enum fb_status fb_check_state_layer(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const struct fb_operator *kind = fb_operator_of(op->kind);
    const int32_t n = c->program->shape.n_state_layers;
    FB_REQUIRE(op->layer >= 0 && op->layer < n, "op %d (%s): layer %d of %d of the state pool", c->index, kind->name,
        op->layer, n);
    FB_REQUIRE(c->program->state_floats[op->layer] == 0, "op %d (%s): layer %d of the state pool is another operator's",
        c->index, kind->name, op->layer);
    c->program->state_floats[op->layer] = kind->state_floats(op);
    return FB_OK;
}

void fb_run_states(const struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker) {
    const struct fb_op *op = &run->program->ops[stage->first_op];
    const struct fb_operator *kind = fb_operator_of(op->kind);
    struct fb_items items = fb_worker_items(worker, 0, kind->n_items(run, op, worker->n_threads));
    for (int64_t i; (i = fb_next_item(&items)) >= 0;)
        kind->run_item(run, op, i, worker);
}

/* ---- Short convolution ------------------------------------------------------------------------------------------- */

static size_t taps_of(const struct fb_op *op) {
    return (size_t)(op->vector_length / op->width);
}

enum fb_status fb_check_conv(const struct fb_check *c) {
    const struct fb_op *op = c->op;
    const int32_t i = c->index, width = op->width;
    FB_REQUIRE(width >= 1 && op->vector_length % width == 0 && op->vector_length / width >= 2 &&
                   op->vector_length / width <= FB_MOST_TAPS,
        "op %d (short_conv): %d weights for %d columns, must be those of 2 .. %d taps", i, op->vector_length, width,
        FB_MOST_TAPS);
    FB_REQUIRE(op->vector2_length == 0 || op->vector2_length == width, "op %d (short_conv): %d biases for %d columns",
        i, op->vector2_length, width);
    const int64_t n_read = (op->flags & FB_CONV_GATED ? 3 : 1) * (int64_t)width;
    FB_REQUIRE(op->column >= 0 && op->column + n_read <= c->in_width,
        "op %d (short_conv): %lld columns from %d on, buffer %d has %d", i, (long long)n_read, op->column, op->in,
        c->in_width);
    FB_REQUIRE(!fb_has_numbers(op->activation), "op %d (short_conv): activation %d is not one of a gate", i,
        (int)op->activation);
    return fb_check_state_layer(c);
}

int64_t fb_conv_work(const struct fb_program *p, const struct fb_op *op, const struct fb_batch *batch) {
    (void)p;
    return (int64_t)op->vector_length * batch->n_tokens;
}

int64_t fb_conv_floats(const struct fb_op *op) {
    return (int64_t)(taps_of(op) - 1) * op->width;
}

size_t fb_conv_scratch(const struct fb_op *op) {
    const size_t n_past = taps_of(op) - 1;
    const size_t of_tiles = (n_past + FB_TILE_TOKENS) * CONV_COLUMNS, single = (n_past + 1) * CONV_SINGLE_COLUMNS;
    return of_tiles > single ? of_tiles : single;
}

static size_t conv_columns(const struct fb_run *run) {
    return run->program->is_single ? CONV_SINGLE_COLUMNS : CONV_COLUMNS;
}

static int64_t conv_blocks(const struct fb_run *run, const struct fb_op *op) {
    return (int64_t)(((size_t)op->width + conv_columns(run) - 1) / conv_columns(run));
}

int64_t fb_conv_items(const struct fb_run *run, const struct fb_op *op, int n_threads) {
    (void)n_threads;
    return run->batch->n_sequences * conv_blocks(run, op);
}

/* Copies rows of n floats. */
static void copy_rows(const float *from, size_t ld_from, float *to, size_t ld_to, size_t n_rows, size_t n) {
    for (size_t i = 0; i < n_rows; i++)
        memcpy(to + i * ld_to, from + i * ld_from, n * sizeof *to);
}

void fb_conv_item(const struct fb_run *run, const struct fb_op *op, int64_t index, const struct fb_worker *worker) {
    const struct fb_program *p = run->program;
    const int64_t n_blocks = conv_blocks(run, op);
    const size_t first = (size_t)(index % n_blocks) * conv_columns(run), width = (size_t)op->width;
    const size_t n = width - first < conv_columns(run) ? width - first : conv_columns(run);
    const size_t n_taps = taps_of(op), n_past = n_taps - 1;
    const bool is_gated = op->flags & FB_CONV_GATED;
    const float *weights = op->vector + first, *bias = op->vector2 ? op->vector2 + first : NULL;
    void (*const activate)(float *, size_t, const float *) = p->kernels->activate[op->activation];
    struct fb_tiles tiles = {.sequence = &run->batch->sequences[index / n_blocks]};
    float *window = fb_state_scratch(p, worker->thread); /* [n_past + tile][n] */
    const float *past = fb_state_of(run, op, tiles.sequence->state_in);
    if (past)
        copy_rows(past + first, width, window, n, n_past, n);
    else
        memset(window, 0, n_past * n * sizeof *window);
    const size_t first_row = (size_t)p->first_row[index / n_blocks];
    while (fb_next_tile(&tiles)) {
        const size_t n_rows = (size_t)tiles.n_tokens, row = first_row + (size_t)tiles.begin;
        for (size_t t = 0; t < n_rows; t++) {
            const float *x = fb_row_of(p, op->in, row + t) + (size_t)op->column + first;
            float *to = window + (n_past + t) * n;
            memcpy(to, x, n * sizeof *to);
            if (is_gated) p->kernels->multiply(to, x + 2 * width, n);
        }
        for (size_t t = 0; t < n_rows; t++) {
            float *out = fb_row_of(p, op->out, row + t) + first;
            p->kernels->short_conv(window + t * n, n, weights, width, bias, n_taps, n, out);
            if (activate) activate(out, n, NULL);
            if (is_gated)
                p->kernels->multiply(out, fb_row_of(p, op->in, row + t) + (size_t)op->column + width + first, n);
        }
        memmove(window, window + n_rows * n, n_past * n * sizeof *window);
        float *kept = fb_state_of(run, op, fb_kept_slot(&tiles));
        if (kept) copy_rows(window, n, kept + first, width, n_past, n);
    }
    copy_rows(window, n, fb_state_of(run, op, tiles.sequence->state_out) + first, width, n_past, n);
}
