/*
 * standalone.c - the operators one at a time, on the caller's arrays: fb_rms_norm, fb_gather, ... of
 * fabula.h.
 *
 * Each checks its arguments, defines a work item, and runs the same kernels as a program in a parallel region
 * of its own.
 */
#include "base/float_mode.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/team.h"
#include "kernels/kernels.h"
#include "kv/pages.h"
#include "ops/attention.h"
#include "ops/linear.h"

#include <math.h>
#include <string.h>

enum { BLOCK = 1 << 12 }; /* numbers per work item, so that the cost of taking an item is negligible */

/* The arguments of the simple operators; each uses some of the fields. */
struct job {
    const struct fb_kernels *kernels;
    const float *x, *y;
    const float *cos_sin;
    const int32_t *ids;
    float *out;
    size_t n_rows, n_cols, n_heads, head_dim, rows_per_item, first_visible;
    float eps;
    bool causal;
};

static enum fb_status begin_job(struct job *job, int32_t n_rows, int32_t n_cols, int32_t n_threads, enum fb_isa isa) {
    FB_REQUIRE(n_rows >= 1, "n_rows is %d, must be 1 or more", n_rows);
    FB_REQUIRE(n_cols >= 1, "n_cols is %d, must be 1 or more", n_cols);
    FB_REQUIRE(n_threads >= 1 && n_threads <= 1024, "n_threads is %d, must be 1 .. 1024", n_threads);
    enum fb_isa chosen;
    FB_TRY(fb_isa_resolve(isa, &chosen));
    job->kernels = fb_kernels_of(chosen);
    job->n_rows = (size_t)n_rows;
    job->n_cols = (size_t)n_cols;
    job->rows_per_item = BLOCK / job->n_cols + 1;
    return FB_OK;
}

static void run_job(fb_item_function item, struct job *job, int32_t n_threads) {
    fb_team_run(item, job, (int64_t)((job->n_rows + job->rows_per_item - 1) / job->rows_per_item), n_threads);
}

static size_t last_row(const struct job *job, int64_t index) {
    size_t end = ((size_t)index + 1) * job->rows_per_item;
    return end < job->n_rows ? end : job->n_rows;
}

static void rms_norm_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct job *job = context;
    for (size_t r = (size_t)index * job->rows_per_item; r < last_row(job, index); r++)
        job->kernels->rms_norm(job->x + r * job->n_cols, job->y, job->n_cols, job->eps, job->out + r * job->n_cols);
}

enum fb_status fb_rms_norm(const float *x, const float *weight, int32_t n_rows, int32_t n_cols, float eps,
    int32_t n_threads, enum fb_isa isa, float *out) {
    FB_REQUIRE(x && weight && out, "x, weight or out is null");
    FB_REQUIRE(eps >= 0.0f && isfinite(eps), "eps must be finite and not negative");
    struct job job = {.x = x, .y = weight, .eps = eps, .out = out};
    FB_TRY(begin_job(&job, n_rows, n_cols, n_threads, isa));
    run_job(rms_norm_item, &job, n_threads);
    return FB_OK;
}

static void gather_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct job *job = context;
    for (size_t r = (size_t)index * job->rows_per_item; r < last_row(job, index); r++)
        memcpy(job->out + r * job->n_cols, job->x + (size_t)job->ids[r] * job->n_cols, job->n_cols * sizeof(float));
}

enum fb_status fb_gather(const float *table, int32_t n_rows, int32_t n_cols, const int32_t *ids, int32_t n_ids,
    int32_t n_threads, enum fb_isa isa, float *out) {
    FB_REQUIRE(table && ids && out, "table, ids or out is null");
    struct job job = {.x = table, .ids = ids, .out = out};
    FB_TRY(begin_job(&job, n_ids, n_cols, n_threads, isa));
    for (int32_t i = 0; i < n_ids; i++)
        FB_REQUIRE(ids[i] >= 0 && ids[i] < n_rows, "ids[%d] is %d, the table has %d rows", i, ids[i], n_rows);
    run_job(gather_item, &job, n_threads);
    return FB_OK;
}

static void masked_softmax_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct job *job = context;
    for (size_t r = (size_t)index * job->rows_per_item; r < last_row(job, index); r++) {
        const float *x = job->x + r * job->n_cols;
        float *out = job->out + r * job->n_cols;
        size_t visible = job->causal ? job->first_visible + r : job->n_cols;
        if (visible > job->n_cols) visible = job->n_cols;
        float sum = job->kernels->exp_sum(x, visible, 1.0f, job->kernels->max(x, visible), out);
        job->kernels->scale(out, visible, 1.0f / sum);
        memset(out + visible, 0, (job->n_cols - visible) * sizeof *out);
    }
}

enum fb_status fb_masked_softmax(const float *x, int32_t n_rows, int32_t n_cols, bool causal, int32_t first_visible,
    int32_t n_threads, enum fb_isa isa, float *out) {
    FB_REQUIRE(x && out, "x or out is null");
    FB_REQUIRE(first_visible >= 1, "first_visible is %d, must be 1 or more", first_visible);
    struct job job = {.x = x, .out = out, .causal = causal, .first_visible = (size_t)first_visible};
    FB_TRY(begin_job(&job, n_rows, n_cols, n_threads, isa));
    run_job(masked_softmax_item, &job, n_threads);
    return FB_OK;
}

static void swiglu_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct job *job = context;
    size_t start = (size_t)index * BLOCK, n = job->n_cols - start < BLOCK ? job->n_cols - start : BLOCK;
    job->kernels->swiglu(job->x + start, job->y + start, n, job->out + start);
}

enum fb_status fb_swiglu(const float *gate, const float *up, size_t n, int32_t n_threads, enum fb_isa isa, float *out) {
    FB_REQUIRE(gate && up && out, "gate, up or out is null");
    struct job job = {.x = gate, .y = up, .out = out};
    FB_TRY(begin_job(&job, 1, 1, n_threads, isa));
    job.n_cols = n;
    fb_team_run(swiglu_item, &job, (int64_t)((n + BLOCK - 1) / BLOCK), n_threads);
    return FB_OK;
}

static void linear_item(void *context, int64_t index, int thread) {
    (void)thread;
    fb_linear_item(context, index);
}

static void narrow_pairs_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct fb_linear *linear = context;
    linear->kernels->narrow_pairs(linear->x + (size_t)index * linear->ldx, linear->ldx,
        (uint16_t *)linear->pairs + (size_t)index * linear->ld_pairs);
}

static void quantize_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct fb_linear *linear = context;
    struct fb_activation *out = (struct fb_activation *)linear->activations + (size_t)index * linear->ld_activations;
    linear->kernels->quantize(linear->x + (size_t)index * linear->ldx, linear->ld_activations, out);
}

enum fb_status fb_linear(const fb_weight *weight, const float *x, int32_t n_rows, const float *bias,
    const float *residual, int32_t n_threads, enum fb_isa isa, float *out) {
    FB_REQUIRE(weight && x && out, "weight, x or out is null");
    FB_REQUIRE(!weight->device, "the weight is on a device");
    struct job job = {.x = x};
    FB_TRY(begin_job(&job, n_rows, weight->n_cols, n_threads, isa));
    struct fb_linear linear = {.kernels = job.kernels,
        .weight = weight,
        .x = x,
        .bias = bias,
        .residual = residual,
        .out = out,
        .ldx = (size_t)weight->n_cols,
        .ld_residual = (size_t)weight->n_rows,
        .ld_out = (size_t)weight->n_rows,
        .n_tokens = (size_t)n_rows,
        .width = (size_t)weight->n_rows,
        .scale = 1.0f};
    void *converted = NULL;
    size_t n_bytes = 0;
    if (fb_is_quantized(weight->dtype)) {
        linear.ld_activations = (size_t)weight->n_cols / FB_BLOCK_COLUMNS;
        n_bytes = (size_t)n_rows * linear.ld_activations * sizeof(struct fb_activation);
        converted = fb_memory_allocate(n_bytes);
        if (!converted) return fb_fail(FB_OUT_OF_MEMORY, "no memory for %d rows quantized to 8 bits", n_rows);
        linear.activations = converted;
        fb_team_run(quantize_item, &linear, n_rows, n_threads);
    } else if (fb_takes_pairs(weight)) {
        linear.ld_pairs = ((size_t)weight->n_cols + 1) / 2 * 2;
        n_bytes = (size_t)n_rows * linear.ld_pairs * sizeof(uint16_t);
        converted = fb_memory_allocate(n_bytes);
        if (!converted) return fb_fail(FB_OUT_OF_MEMORY, "no memory for %d rows converted to bf16", n_rows);
        linear.pairs = converted;
        fb_team_run(narrow_pairs_item, &linear, n_rows, n_threads);
    }
    fb_team_run(linear_item, &linear, fb_linear_items(&linear, n_threads), n_threads);
    if (converted) fb_memory_release(converted, n_bytes);
    return FB_OK;
}

static void rope_item(void *context, int64_t index, int thread) {
    (void)thread;
    const struct job *job = context;
    for (size_t r = (size_t)index * job->rows_per_item; r < last_row(job, index); r++) {
        const float *cosines = job->cos_sin + r * 2 * job->n_cols;
        float *head = job->out + r * job->n_heads * job->head_dim;
        for (size_t h = 0; h < job->n_heads; h++, head += job->head_dim)
            job->kernels->rotate(head, head + job->n_cols, cosines, cosines + job->n_cols, job->n_cols);
    }
}

enum fb_status fb_rope(float *x, const int32_t *positions, int32_t n_rows, int32_t n_heads, int32_t head_dim,
    int32_t rotary_dim, const float *inv_freq, float rope_scale, int32_t n_threads, enum fb_isa isa) {
    FB_REQUIRE(x && positions && inv_freq, "x, positions or inv_freq is null");
    FB_REQUIRE(n_heads >= 1 && head_dim >= 1, "n_heads %d and head_dim %d must be 1 or more", n_heads, head_dim);
    FB_REQUIRE(rotary_dim >= 2 && rotary_dim <= head_dim && rotary_dim % 2 == 0,
        "rotary_dim is %d, must be even and 2 .. head_dim %d", rotary_dim, head_dim);
    struct job job = {.out = x, .n_heads = (size_t)n_heads, .head_dim = (size_t)head_dim};
    FB_TRY(begin_job(&job, n_rows, rotary_dim / 2, n_threads, isa));
    const size_t half = job.n_cols, n_bytes = job.n_rows * 2 * half * sizeof(float);
    float *cos_sin = fb_memory_allocate(n_bytes);
    if (!cos_sin) return fb_fail(FB_OUT_OF_MEMORY, "no memory for the angles of %d rows", n_rows);
    const fb_float_mode mode = fb_float_mode_enter();
    for (size_t r = 0; r < job.n_rows; r++)
        for (size_t i = 0; i < half; i++) {
            const float angle = (float)positions[r] * inv_freq[i];
            cos_sin[r * 2 * half + i] = (float)cos((double)angle) * rope_scale;
            cos_sin[r * 2 * half + half + i] = (float)sin((double)angle) * rope_scale;
        }
    fb_float_mode_leave(mode);
    job.cos_sin = cos_sin;
    job.rows_per_item = BLOCK / (job.n_heads * job.head_dim) + 1;
    run_job(rope_item, &job, n_threads);
    fb_memory_release(cos_sin, n_bytes);
    return FB_OK;
}

static void attention_item(void *context, int64_t index, int thread) {
    fb_attention_item(context, index, thread);
}

/* Writes K and V of one page and head, position by position. */
struct filling {
    const struct fb_kernels *kernels;
    const struct fb_page_pool *pool;
    const struct fb_kv_layout *layer;
    const float *k, *v; /* [n_tokens, n_kv_heads, head_dim] */
    int32_t n_tokens;
};

static void fill_page(void *context, int64_t index, int thread) {
    (void)thread;
    const struct filling *f = context;
    const int32_t n_kv_heads = f->layer->n_kv_heads, page = (int32_t)(index / n_kv_heads);
    const int32_t head = (int32_t)(index % n_kv_heads);
    char *slab = fb_slab(f->pool, page, 0, head);
    for (int32_t i = 0; i < FB_PAGE_POSITIONS && page * FB_PAGE_POSITIONS + i < f->n_tokens; i++) {
        size_t row = (size_t)(page * FB_PAGE_POSITIONS + i) * (size_t)n_kv_heads + (size_t)head;
        size_t at = row * (size_t)f->layer->k_dim;
        fb_slab_write(
            f->layer, f->kernels, slab, i, page * FB_PAGE_POSITIONS + i == f->n_tokens - 1, f->k + at, f->v + at);
    }
}

enum fb_status fb_self_attention(const float *q, const float *k, const float *v, int32_t n_tokens, int32_t n_heads,
    int32_t n_kv_heads, int32_t head_dim, int32_t window, float scale, enum fb_dtype k_dtype, enum fb_dtype v_dtype,
    int32_t n_threads, enum fb_isa isa, float *out) {
    FB_REQUIRE(q && k && v && out, "q, k, v or out is null");
    FB_REQUIRE(n_kv_heads >= 1 && n_heads >= 1 && n_heads % n_kv_heads == 0, "n_kv_heads %d must divide n_heads %d",
        n_kv_heads, n_heads);
    FB_REQUIRE(window >= 0, "window is %d, must not be negative", window);
    FB_REQUIRE(scale > 0.0f && isfinite(scale), "scale must be finite and above 0");
    struct job job = {.x = q};
    FB_TRY(begin_job(&job, n_tokens, head_dim, n_threads, isa));
    const int32_t n_pages = (n_tokens - 1) / FB_PAGE_POSITIONS + 1;
    fb_page_pool *pool;
    const struct fb_heads heads = {n_heads, n_kv_heads, head_dim, head_dim, -1, 0};
    const struct fb_kv_layer layer = {n_kv_heads, head_dim, head_dim};
    FB_TRY(fb_page_pool_create(k_dtype, v_dtype, n_pages, &layer, 1, &pool));

    const size_t page_bytes = (size_t)n_pages * sizeof(int32_t);
    const size_t scratch_bytes = fb_attention_scratch_bytes(&heads);
    int32_t *pages = fb_memory_allocate(page_bytes);
    char *scratch = fb_memory_allocate(scratch_bytes * (size_t)n_threads);
    atomic_int *parts_done = fb_memory_allocate((size_t)n_kv_heads * sizeof *parts_done);
    enum fb_status status = FB_OK;
    if (!pages || !scratch || !parts_done) {
        status = fb_fail(FB_OUT_OF_MEMORY, "no memory for attention over %d tokens", n_tokens);
    } else {
        for (int32_t i = 0; i < n_pages; i++)
            pages[i] = i;
        struct filling filling = {
            .kernels = job.kernels, .pool = pool, .layer = &pool->layers[0], .k = k, .v = v, .n_tokens = n_tokens};
        fb_team_run(fill_page, &filling, (int64_t)n_pages * n_kv_heads, n_threads);
        const struct fb_sequence sequence = {.pages = pages, .n_pages = n_pages, .n_tokens = n_tokens};
        const int32_t first_row = 0;
        int64_t offsets[2], partial_offsets[2];
        struct fb_attention attention = {.kernels = job.kernels,
            .pool = pool,
            .sequences = &sequence,
            .n_sequences = 1,
            .first_row = &first_row,
            .heads = &heads,
            .mask = {.window = window},
            .scale = scale,
            .q = q,
            .out = out,
            .ldq = (size_t)n_heads * (size_t)head_dim,
            .ld_out = (size_t)n_heads * (size_t)head_dim,
            .scratch = scratch,
            .scratch_bytes = scratch_bytes,
            .parts_done = parts_done,
            .offsets = offsets,
            .partial_offsets = partial_offsets};
        fb_team_run(attention_item, &attention, fb_attention_items(&attention, n_threads), n_threads);
    }
    fb_memory_release(pages, page_bytes);
    fb_memory_release(scratch, scratch_bytes * (size_t)n_threads);
    fb_memory_release(parts_done, (size_t)n_kv_heads * sizeof *parts_done);
    fb_page_pool_free(pool);
    return status;
}
