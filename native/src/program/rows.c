/* rows.c - operators that work row by row. See run.h. */
#include "program/run.h"

#include <math.h>
#include <string.h>

/* The angles of one rope table at a token's position, used by every layer. The product is rounded to f32 as in
 * transformers; cos and sin are computed in double, so they are almost exact. */
static void compute_angles(const struct fb_run *run, const struct fb_angles *a, size_t row) {
    const struct fb_program *p = run->program;
    const float position = (float)p->positions[row];
    float *cosines = a->cos_sin + row * 2 * a->n_pairs, *sines = cosines + a->n_pairs;
    for (size_t i = 0; i < a->n_pairs; i++) {
        const float angle = position * a->inv_freq[i];
        cosines[i] = (float)cos((double)angle) * a->scale;
        sines[i] = (float)sin((double)angle) * a->scale;
    }
    const struct fb_sequence *sequence = &run->batch->sequences[p->owners[row]];
    if (!fb_sees_sinks(sequence, (struct fb_mask){0}, p->positions[row])) return;
    /* From the query's own angle to the one at which sinks see it: the difference of both, each rounded to
     * f32. */
    const float seen_at = (float)(sequence->n_sinks + sequence->window - 1);
    cosines = a->sink_rotations + row * 2 * a->n_pairs, sines = cosines + a->n_pairs;
    for (size_t i = 0; i < a->n_pairs; i++) {
        const float from = position * a->inv_freq[i], to = seen_at * a->inv_freq[i];
        cosines[i] = (float)cos((double)to - (double)from);
        sines[i] = (float)sin((double)to - (double)from);
    }
}

void fb_embed_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    float *out = fb_row_of(p, op->out, row);
    const int32_t token = run->batch->tokens[row];
    fb_weight_gather_row(op->weight, token < op->weight->n_rows ? token : 0, out);
    if (op->scale != 1.0f) p->kernels->scale(out, (size_t)op->weight->n_cols, op->scale);
    for (int32_t i = 0; op == p->ops && i < p->shape.n_ropes; i++)
        compute_angles(run, &p->angles[i], row);
}

void fb_embed_position_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    fb_weight_gather_row(op->weight, p->positions[row], fb_row_of(p, op->out, row));
}

void fb_apply_norm(const struct fb_kernels *kernels, const struct fb_op *op, const float *x, size_t width, float *out) {
    const size_t n = (size_t)op->vector_length;
    if (op->kind == FB_OP_LAYER_NORM)
        kernels->layer_norm(x, op->vector, op->vector2, n, op->eps, out);
    else
        for (size_t first = 0; first < width; first += n)
            kernels->rms_norm(x + first, op->vector, n, op->eps, out + first);
}

void fb_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width;
    float *in = fb_row_of(p, op->in, row), *out = fb_row_of(p, op->out, row);
    if (op->residual < 0) {
        fb_apply_norm(p->kernels, op, in, width, out);
        return;
    }
    fb_apply_norm(p->kernels, op, in, width, in);
    if (op->residual != op->out) memcpy(out, fb_row_of(p, op->residual, row), width * sizeof *out);
    p->kernels->add(out, in, width);
}

/* The row of `out`, with the contents of `in`. */
static float *copied_row(const struct fb_program *p, const struct fb_op *op, size_t row, size_t width) {
    const float *in = fb_row_of(p, op->in, row);
    float *out = fb_row_of(p, op->out, row);
    if (out != in) memcpy(out, in, width * sizeof *out);
    return out;
}

/* The second input of an operator. */
static const float *second_row(const struct fb_program *p, const struct fb_op *op, size_t row) {
    return op->residual < 0 ? op->vector : fb_row_of(p, op->residual, row) + op->column;
}

void fb_scale_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width;
    p->kernels->scale(copied_row(p, op, row, width), width, op->scale);
}

void fb_multiply_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width;
    p->kernels->multiply(copied_row(p, op, row, width), second_row(p, op, row), width);
}

void fb_add_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width;
    float *out = copied_row(p, op, row, width);
    p->kernels->add(out, second_row(p, op, row), width);
    if (op->scale != 1.0f) p->kernels->scale(out, width, op->scale);
}

void fb_mix_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)op->width;
    const size_t n_in = (size_t)p->buffers[op->in].width / width, n_out = (size_t)p->buffers[op->out].width / width;
    const float *factors = op->vector ? op->vector : fb_row_of(p, op->factors, row), *in = fb_row_of(p, op->in, row);
    const float *residual = op->residual < 0 ? NULL : fb_row_of(p, op->residual, row);
    float *out = fb_row_of(p, op->out, row);
    if (!residual)
        memset(out, 0, n_out * width * sizeof *out);
    else if (residual != out)
        memcpy(out, residual, n_out * width * sizeof *out);
    for (size_t i = 0; i < n_out * n_in; i++)
        if (!op->vector || factors[i] != 0.0f) /* constant factors of 0 choose streams */
            p->kernels->merge(out + i / n_in * width, 1.0f, in + i % n_in * width, factors[i], width);
}

void fb_match_rms_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width;
    float *out = copied_row(p, op, row, width);
    const float wanted = sqrtf(p->kernels->mean_square(second_row(p, op, row), width));
    const float square = p->kernels->mean_square(out, width);
    p->kernels->scale(out, width, wanted / sqrtf(square > op->eps ? square : op->eps));
}

/* y = y * activation(gate), piece by piece: the gate may belong to a buffer that is read again. */
static void multiply_by_gate(
    const struct fb_program *p, const struct fb_op *op, const float *gate, size_t n, float *y) {
    float piece[256];
    for (size_t i = 0; i < n; i += sizeof piece / sizeof *piece) {
        const size_t rest = n - i < sizeof piece / sizeof *piece ? n - i : sizeof piece / sizeof *piece;
        memcpy(piece, gate + i, rest * sizeof *piece);
        p->kernels->activate[op->activation](piece, rest, NULL);
        p->kernels->multiply(y + i, piece, rest);
    }
}

void fb_gated_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width, n = width / (size_t)op->n_groups;
    const float *gate = second_row(p, op, row);
    float *out = copied_row(p, op, row, width);
    const bool is_first = op->flags & FB_GATE_FIRST, has_own_weights = (size_t)op->vector_length == width;
    if (is_first) multiply_by_gate(p, op, gate, width, out);
    for (size_t first = 0; op->vector && first < width; first += n)
        p->kernels->rms_norm(out + first, op->vector + (has_own_weights ? first : 0), n, op->eps, out + first);
    if (!is_first) multiply_by_gate(p, op, gate, width, out);
}

void fb_sparsify_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t width = (size_t)p->buffers[op->in].width;
    float *out = fb_row_of(p, op->out, row);
    p->kernels->sparsify(fb_row_of(p, op->in, row), width, op->scale, out);
    void (*const activate)(float *, size_t, const float *) = p->kernels->activate[op->activation];
    if (activate) activate(out, width, NULL);
}

static bool has_kv(const struct fb_program *p, const struct fb_op *op) {
    return p->buffers[op->in].width != fb_q_width(&p->shape.heads[op->heads]);
}

void fb_head_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const struct fb_heads *h = &p->shape.heads[op->heads];
    float *q = fb_row_of(p, op->in, row), *k = q + fb_q_width(h);
    if (op->flags & FB_HEADS_LATENT) {
        for (int32_t i = 0; i < h->n_kv_heads; i++)
            fb_norm_latent(p->kernels, op, k + (size_t)i * (size_t)h->k_dim, h);
        return;
    }
    fb_norm_heads(p->kernels, op, op->vector, op->vector_length, q, h->n_heads, h->k_dim);
    if (!has_kv(p, op)) return;
    fb_norm_heads(p->kernels, op, op->vector2, op->vector2_length, k, h->n_kv_heads, h->k_dim);
    float *v = k + (size_t)h->n_kv_heads * (size_t)h->k_dim;
    if (op->flags & FB_HEADS_VALUES)
        for (int32_t i = 0; i < h->n_kv_heads; i++, v += h->v_dim)
            fb_norm_value(p->kernels, op, v, h->v_dim);
}

void fb_rope_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const struct fb_heads *h = &p->shape.heads[op->heads];
    const struct fb_angles *a = &p->angles[h->rope];
    float *head = fb_row_of(p, op->in, row);
    const int32_t n_heads = h->n_heads + (has_kv(p, op) ? h->n_kv_heads : 0);
    for (int32_t i = 0; i < n_heads; i++, head += h->k_dim)
        fb_rotate_head(p->kernels, head, a->cos_sin, row, a->n_pairs);
}

void fb_kv_write_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const struct fb_sequence *sequence = &run->batch->sequences[p->owners[row]];
    const int32_t position = p->positions[row], page = sequence->pages[position / FB_PAGE_POSITIONS];
    const struct fb_heads *h = &p->shape.heads[op->heads];
    const float *k = fb_row_of(p, op->in, row) + fb_q_width(h);
    const float *v = k + (size_t)h->n_kv_heads * (size_t)h->k_dim;
    for (int32_t i = 0; i < h->n_kv_heads; i++, k += h->k_dim, v += h->v_dim)
        fb_slab_write(&run->pool->layers[op->layer], p->kernels, fb_slab(run->pool, page, op->layer, i),
            position % FB_PAGE_POSITIONS, position == sequence->n_past + sequence->n_tokens - 1, k, v);
}

void fb_router_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    fb_route_row(
        p->kernels, op, fb_row_of(p, op->in, row), (size_t)p->buffers[op->in].width, fb_row_of(p, op->out, row));
}

void fb_gather_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    memcpy(fb_row_of(p, op->out, row), fb_row_of(p, op->in, (size_t)run->batch->outputs[row]),
        (size_t)p->buffers[op->in].width * sizeof(float));
}
