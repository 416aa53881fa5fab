/* rows.c - operators that work row by row. See run.h. */
#include "program/run.h"

#include <math.h>
#include <string.h>

void fb_embed_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    float *out = fb_row_of(p, op->out, row);
    fb_weight_gather_row(op->weight, run->batch->tokens[row], out);
    if (op->scale != 1.0f) p->kernels->scale(out, (size_t)op->weight->n_cols, op->scale);
    /* The rope angles of this token's position, used by every layer. The product is rounded to f32 as in
     * transformers; cos and sin are computed in double, so they are almost exact. */
    const size_t half = (size_t)p->shape.rotary_dim / 2;
    float *cosines = p->cos_sin + row * 2 * half, *sines = cosines + half;
    for (size_t i = 0; i < half; i++) {
        const float angle = (float)p->positions[row] * p->inv_freq[i];
        cosines[i] = (float)cos((double)angle) * p->shape.rope_scale;
        sines[i] = (float)sin((double)angle) * p->shape.rope_scale;
    }
    const struct fb_sequence *sequence = &run->batch->sequences[p->owners[row]];
    if (!fb_sees_sinks(sequence, 0, p->positions[row])) return;
    /* From the query's own angle to the one at which sinks see it: the difference of both, each rounded to
     * f32. */
    const float seen_at = (float)(sequence->n_sinks + sequence->window - 1);
    cosines = p->sink_rotations + row * 2 * half, sines = cosines + half;
    for (size_t i = 0; i < half; i++) {
        const float from = (float)p->positions[row] * p->inv_freq[i], to = seen_at * p->inv_freq[i];
        cosines[i] = (float)cos((double)to - (double)from);
        sines[i] = (float)sin((double)to - (double)from);
    }
}

void fb_rms_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    p->kernels->rms_norm(
        fb_row_of(p, op->in, row), op->vector, (size_t)op->vector_length, op->eps, fb_row_of(p, op->out, row));
}

void fb_head_norm_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t dim = (size_t)p->shape.head_dim;
    float *head = fb_row_of(p, op->in, row);
    for (int32_t h = 0; h < p->shape.n_heads + p->shape.n_kv_heads; h++, head += dim)
        p->kernels->rms_norm(head, h < p->shape.n_heads ? op->vector : op->vector2, dim, op->eps, head);
}

void fb_rope_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const size_t half = (size_t)p->shape.rotary_dim / 2;
    const float *cosines = p->cos_sin + row * 2 * half;
    float *head = fb_row_of(p, op->in, row);
    for (int32_t h = 0; h < p->shape.n_heads + p->shape.n_kv_heads; h++, head += p->shape.head_dim)
        p->kernels->rotate(head, head + half, cosines, cosines + half, half);
}

void fb_kv_write_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    const struct fb_sequence *sequence = &run->batch->sequences[p->owners[row]];
    const int32_t position = p->positions[row], page = sequence->pages[position / FB_PAGE_POSITIONS];
    const int32_t dim = p->shape.head_dim, n_kv_heads = p->shape.n_kv_heads;
    const float *k = fb_row_of(p, op->in, row) + (size_t)p->shape.n_heads * (size_t)dim;
    const float *v = k + (size_t)n_kv_heads * (size_t)dim;
    for (int32_t h = 0; h < n_kv_heads; h++, k += dim, v += dim)
        fb_slab_write(run->pool, p->kernels, fb_slab(run->pool, page, op->layer, h), position % FB_PAGE_POSITIONS,
            position == sequence->n_past + sequence->n_tokens - 1, k, v);
}

void fb_gather_row(const struct fb_run *run, const struct fb_op *op, size_t row) {
    const struct fb_program *p = run->program;
    memcpy(fb_row_of(p, op->out, row), fb_row_of(p, op->in, (size_t)run->batch->outputs[row]),
        (size_t)p->buffers[op->in].width * sizeof(float));
}
