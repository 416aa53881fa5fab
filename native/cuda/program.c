/* program.c - a program's operators as launches on one stream. See program.h. */
#include "program.h"

#include "kernels.h"
#include "pool.h"
#include "program/program.h"
#include "runtime.h"
#include "views.h"

#include <stdlib.h>
#include <string.h>

enum {
    MOST_PARTIAL_FLOATS = 1 << 22, /* of a split attention: 16 MiB */
    ALIGNMENT = 256                /* bytes, of what shares an allocation */
};

/* Memory that grows with the batches; `host` is pinned, where there is one. */
struct growing {
    char *device, *host;
    size_t n_bytes;
};

struct fb_cuda_program {
    const fb_program *program;
    cudaStream_t stream;
    int32_t n_processors;
    struct fb_cuda_weight *weights; /* [n_ops]; operators with one weight share its panels */
    float *vectors, *inv_freq;      /* on the GPU */
    float *arena, *cos_sin, *sink_turns;
    int32_t *non_finite;
    int32_t *non_finite_here; /* pinned */
    struct growing inputs;    /* what describes a batch */
    struct growing outputs;   /* logits, on the GPU only */
    struct growing partials;  /* on the GPU only */
    size_t n_bytes;
};

/* Where the parts of a batch's description lie, in bytes, and pointers to them on the GPU. */
struct description {
    size_t tokens, positions, owners, outputs, sequences, pages, tiles, n_bytes;
    struct fb_cuda_batch batch;
    const struct fb_cuda_tile *device_tiles;
    const int32_t *device_outputs;
    int32_t n_tiles, tile_rows;
    bool is_split;
};

/* ---- Memory ------------------------------------------------------------------------------------------------------ */

static size_t aligned(size_t n_bytes) {
    return (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Takes new memory before it gives up the old, so that a refusal changes nothing. */
static enum fb_status grow(fb_cuda_program *p, struct growing *memory, size_t n_bytes, bool has_host) {
    if (n_bytes <= memory->n_bytes) return FB_OK;
    n_bytes = aligned(n_bytes + n_bytes / 4);
    void *device = NULL, *host = NULL;
    FB_TRY(fb_cuda_take(n_bytes, "no memory for a batch", &device));
    if (has_host) {
        const enum fb_status status = fb_cuda_check(cudaMallocHost(&host, n_bytes), "no pinned memory for a batch");
        if (status != FB_OK) {
            cudaFree(device);
            return status;
        }
    }
    p->n_bytes += n_bytes - memory->n_bytes;
    if (memory->device) cudaFree(memory->device);
    if (memory->host) cudaFreeHost(memory->host);
    *memory = (struct growing){device, host, n_bytes};
    return FB_OK;
}

static enum fb_status take(fb_cuda_program *p, size_t n_bytes, void **out) {
    FB_TRY(fb_cuda_take(n_bytes, "no memory for a program", out));
    p->n_bytes += n_bytes;
    return FB_OK;
}

static enum fb_status upload(fb_cuda_program *p, const void *from, size_t n_bytes, void **out) {
    FB_TRY(take(p, n_bytes, out));
    if (n_bytes == 0) return FB_OK;
    return fb_cuda_check(cudaMemcpy(*out, from, n_bytes, cudaMemcpyHostToDevice), "copying to the GPU");
}

static bool owns_weight(const struct fb_program *program, int32_t i) {
    for (int32_t before = 0; before < i; before++)
        if (program->ops[before].weight == program->ops[i].weight) return false;
    return program->ops[i].weight != NULL;
}

static enum fb_status upload_weights(fb_cuda_program *p) {
    const struct fb_program *program = p->program;
    for (int32_t i = 0; i < program->n_ops; i++) {
        const struct fb_weight *weight = program->ops[i].weight;
        if (!weight) continue;
        struct fb_cuda_weight view;
        fb_cuda_weight_view(weight, &view);
        if (owns_weight(program, i)) {
            void *panels = NULL;
            const enum fb_status status = upload(p, view.panels, fb_weight_bytes(weight), &panels);
            view.panels = panels;
            p->weights[i] = view; /* even if the copy failed: then it is freed from here */
            FB_TRY(status);
            continue;
        }
        for (int32_t before = 0; before < i; before++)
            if (program->ops[before].weight == weight) p->weights[i] = p->weights[before];
    }
    return FB_OK;
}

static enum fb_status build(fb_cuda_program *p) {
    const struct fb_program *program = p->program;
    const size_t angles = (size_t)program->shape.max_tokens * (size_t)program->shape.rotary_dim * sizeof(float);
    int device, n_processors;
    FB_TRY(fb_cuda_check(cudaGetDevice(&device), "no GPU"));
    FB_TRY(fb_cuda_check(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device), "no GPU"));
    p->n_processors = n_processors;
    FB_TRY(fb_cuda_check(cudaStreamCreateWithFlags(&p->stream, cudaStreamNonBlocking), "making a stream"));
    p->weights = calloc((size_t)program->n_ops, sizeof *p->weights);
    if (!p->weights) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    FB_TRY(upload(p, program->vectors, program->n_vector_floats * sizeof(float), (void **)&p->vectors));
    FB_TRY(upload(p, program->inv_freq, (size_t)program->shape.rotary_dim / 2 * sizeof(float), (void **)&p->inv_freq));
    FB_TRY(take(p, program->arena_floats * sizeof(float), (void **)&p->arena));
    FB_TRY(take(p, angles, (void **)&p->cos_sin));
    FB_TRY(take(p, angles, (void **)&p->sink_turns));
    FB_TRY(take(p, sizeof(int32_t), (void **)&p->non_finite));
    FB_TRY(fb_cuda_check(cudaMallocHost((void **)&p->non_finite_here, sizeof(int32_t)), "no pinned memory"));
    FB_TRY(upload_weights(p));
    return fb_cuda_check(cudaDeviceSynchronize(), "copying weights to the GPU");
}

enum fb_status fb_cuda_program_create(const fb_program *program, fb_cuda_program **out) {
    FB_REQUIRE(program && out, "program or out is null");
    fb_cuda_program *p = calloc(1, sizeof *p);
    if (!p) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    p->program = program;
    const enum fb_status status = build(p);
    if (status != FB_OK) {
        fb_cuda_program_free(p);
        return status;
    }
    *out = p;
    return FB_OK;
}

static void release(void *memory) {
    if (memory) cudaFree(memory);
}

void fb_cuda_program_free(fb_cuda_program *p) {
    if (!p) return;
    if (p->stream) cudaStreamSynchronize(p->stream);
    for (int32_t i = 0; p->weights && i < p->program->n_ops; i++)
        if (owns_weight(p->program, i)) release((void *)(uintptr_t)p->weights[i].panels);
    release(p->vectors);
    release(p->inv_freq);
    release(p->arena);
    release(p->cos_sin);
    release(p->sink_turns);
    release(p->non_finite);
    release(p->inputs.device);
    release(p->outputs.device);
    release(p->partials.device);
    if (p->inputs.host) cudaFreeHost(p->inputs.host);
    if (p->non_finite_here) cudaFreeHost(p->non_finite_here);
    if (p->stream) cudaStreamDestroy(p->stream);
    free(p->weights);
    free(p);
}

size_t fb_cuda_program_bytes(const fb_cuda_program *program) {
    return program ? program->n_bytes : 0;
}

/* ---- A batch ----------------------------------------------------------------------------------------------------- */

static int32_t pages_of(const struct fb_sequence *sequence) {
    return (sequence->n_past + sequence->n_tokens - 1) / FB_PAGE_POSITIONS + 1;
}

static size_t place(struct description *d, size_t count, size_t size) {
    const size_t at = d->n_bytes;
    d->n_bytes += aligned(count * size);
    return at;
}

/* Floats of partial results that an attention takes, and parts of its longest tile. */
static size_t partials_of(const struct fb_program *program, const struct fb_cuda_sequence *sequences,
    int32_t n_sequences, int32_t window, int32_t tile_rows, struct fb_cuda_attention *out) {
    const struct fb_program_shape *s = &program->shape;
    *out = (struct fb_cuda_attention){.tile_rows = tile_rows, .window = window};
    out->pages.head_dim = s->head_dim;
    out->pages.n_kv_heads = s->n_kv_heads;
    out->n_tiles = fb_cuda_tiles(
        sequences, n_sequences, s->n_heads / s->n_kv_heads, tile_rows, window, NULL, &out->n_parts);
    return fb_cuda_partial_floats(out);
}

/* Key blocks get threads of their own when tiles alone leave most of the GPU idle and some tile has several; if parts fit. The result
 * does not depend on it. */
static enum fb_status choose_tiles(
    fb_cuda_program *p, const struct fb_cuda_sequence *sequences, int32_t n_sequences, struct description *d) {
    const struct fb_program *program = p->program;
    const int32_t rows = fb_cuda_tile_rows(program->shape.head_dim, true);
    struct fb_cuda_attention of;
    size_t most = 0;
    int32_t n_parts = 0, n_tiles = 0;
    for (int32_t i = 0; i < program->n_ops; i++) {
        if (program->ops[i].kind != FB_OP_ATTENTION) continue;
        const size_t floats = partials_of(program, sequences, n_sequences, program->ops[i].window, rows, &of);
        if (floats > most) most = floats;
        if (of.n_parts > n_parts) n_parts = of.n_parts;
        n_tiles = of.n_tiles;
    }
    d->is_split = n_parts > 1 && most <= MOST_PARTIAL_FLOATS &&
                  (int64_t)n_tiles * program->shape.n_kv_heads < 2 * (int64_t)p->n_processors;
    d->tile_rows = fb_cuda_tile_rows(program->shape.head_dim, d->is_split);
    partials_of(program, sequences, n_sequences, 0, d->tile_rows, &of);
    d->n_tiles = of.n_tiles;
    return d->is_split ? grow(p, &p->partials, most * sizeof(float), false) : FB_OK;
}

/* Takes memory for the batch's description and writes it; the copy to the GPU is only begun. */
static enum fb_status describe(fb_cuda_program *p, const struct fb_batch *batch, struct description *d) {
    const struct fb_program *program = p->program;
    const size_t n_tokens = (size_t)batch->n_tokens, n_sequences = (size_t)batch->n_sequences;
    size_t n_pages = 0;
    for (size_t i = 0; i < n_sequences; i++)
        n_pages += (size_t)pages_of(&batch->sequences[i]);
    const size_t group = (size_t)(program->shape.n_heads / program->shape.n_kv_heads);
    FB_REQUIRE(n_pages <= INT32_MAX, "%zu pages are too many for one batch", n_pages);
    FB_REQUIRE(
        n_tokens * group <= INT32_MAX / 2, "%zu tokens of %zu heads are too many for one batch", n_tokens, group);
    *d = (struct description){.n_bytes = 0};
    d->sequences = place(d, n_sequences, sizeof(struct fb_cuda_sequence));
    d->tokens = place(d, n_tokens, sizeof(int32_t));
    d->positions = place(d, n_tokens, sizeof(int32_t));
    d->owners = place(d, n_tokens, sizeof(int32_t));
    d->outputs = place(d, (size_t)batch->n_outputs, sizeof(int32_t));
    d->pages = place(d, n_pages, sizeof(int32_t));
    /* Tiles hold at least one row of a token's group: room for the most there can be. */
    const size_t least_rows = (size_t)fb_cuda_tile_rows(program->shape.head_dim, true);
    d->tiles = place(d, n_tokens * group / least_rows + n_sequences, sizeof(struct fb_cuda_tile));
    FB_TRY(grow(p, &p->inputs, d->n_bytes, true));

    char *host = p->inputs.host, *device = p->inputs.device;
    struct fb_cuda_sequence *sequences = (struct fb_cuda_sequence *)(void *)(host + d->sequences);
    int32_t *positions = (int32_t *)(void *)(host + d->positions), *owners = (int32_t *)(void *)(host + d->owners);
    int32_t *pages = (int32_t *)(void *)(host + d->pages), row = 0, page = 0;
    for (int32_t i = 0; i < batch->n_sequences; i++) {
        const struct fb_sequence *s = &batch->sequences[i];
        sequences[i] = (struct fb_cuda_sequence){.first_page = page,
            .n_past = s->n_past,
            .n_tokens = s->n_tokens,
            .window = s->window,
            .n_sinks = s->n_sinks,
            .first_row = row};
        memcpy(pages + page, s->pages, (size_t)pages_of(s) * sizeof *pages);
        page += pages_of(s);
        for (int32_t t = 0; t < s->n_tokens; t++, row++) {
            positions[row] = s->n_past + t;
            owners[row] = i;
        }
    }
    memcpy(host + d->tokens, batch->tokens, n_tokens * sizeof(int32_t));
    if (batch->n_outputs) memcpy(host + d->outputs, batch->outputs, (size_t)batch->n_outputs * sizeof(int32_t));
    FB_TRY(choose_tiles(p, sequences, batch->n_sequences, d));
    int32_t n_parts;
    fb_cuda_tiles(sequences, batch->n_sequences, (int32_t)group, d->tile_rows, 0,
        (struct fb_cuda_tile *)(void *)(host + d->tiles), &n_parts);

    d->batch = (struct fb_cuda_batch){.n_tokens = batch->n_tokens,
        .n_sequences = batch->n_sequences,
        .tokens = (const int32_t *)(void *)(device + d->tokens),
        .positions = (const int32_t *)(void *)(device + d->positions),
        .owners = (const int32_t *)(void *)(device + d->owners),
        .sequences = (const struct fb_cuda_sequence *)(void *)(device + d->sequences),
        .pages = (const int32_t *)(void *)(device + d->pages)};
    d->device_tiles = (const struct fb_cuda_tile *)(void *)(device + d->tiles);
    d->device_outputs = (const int32_t *)(void *)(device + d->outputs);
    return fb_cuda_check(
        cudaMemcpyAsync(device, host, d->n_bytes, cudaMemcpyHostToDevice, p->stream), "copying a batch to the GPU");
}

/* ---- Operators --------------------------------------------------------------------------------------------------- */

static float *buffer_of(const fb_cuda_program *p, int32_t number) {
    return p->arena + p->program->buffers[number].offset;
}

/* A vector of an operator, where it lies on the GPU. */
static const float *vector_of(const fb_cuda_program *p, const float *vector) {
    return vector ? p->vectors + (vector - p->program->vectors) : NULL;
}

static int run_product(fb_cuda_program *p, const struct fb_op *op, int32_t n_rows, float *logits) {
    const struct fb_buffer *buffers = p->program->buffers;
    struct fb_cuda_linear a = {.weight = p->weights[op - p->program->ops],
        .x = buffer_of(p, op->in),
        .ldx = (int64_t)buffers[op->in].stride,
        .bias = vector_of(p, op->vector),
        .n_tokens = n_rows,
        .width = op->weight->n_rows,
        .swiglu = op->kind == FB_OP_LINEAR_SWIGLU};
    if (op->kind == FB_OP_LOGITS) {
        a.out = logits;
        a.ld_out = a.width;
        a.non_finite = p->non_finite;
    } else {
        a.out = buffer_of(p, op->out) + op->column;
        a.ld_out = (int64_t)buffers[op->out].stride;
        if (a.swiglu) a.width = buffers[op->out].width;
    }
    if (op->residual >= 0) {
        a.residual = buffer_of(p, op->residual);
        a.ld_residual = (int64_t)buffers[op->residual].stride;
    }
    return fb_cuda_multiply(&a, p->stream);
}

static int run_attention(fb_cuda_program *p, const struct fb_op *op, const struct fb_cuda_pages *pages,
    const struct description *d, const struct fb_cuda_sequence *sequences) {
    const struct fb_program_shape *s = &p->program->shape;
    const struct fb_buffer *buffers = p->program->buffers;
    struct fb_cuda_attention a = {.batch = d->batch,
        .pages = *pages,
        .layer = op->layer,
        .window = op->window,
        .n_heads = s->n_heads,
        .scale = op->scale,
        .sink_turns = p->sink_turns,
        .rotary_dim = s->rotary_dim,
        .q = buffer_of(p, op->in),
        .out = buffer_of(p, op->out),
        .ldq = (int64_t)buffers[op->in].stride,
        .ld_out = (int64_t)buffers[op->out].stride,
        .tiles = d->device_tiles,
        .n_tiles = d->n_tiles,
        .tile_rows = d->tile_rows,
        .partials = (float *)(void *)p->partials.device};
    if (d->is_split) {
        struct fb_cuda_attention of;
        partials_of(p->program, sequences, d->batch.n_sequences, op->window, d->tile_rows, &of);
        a.n_parts = of.n_parts;
    }
    return fb_cuda_attend(&a, p->stream);
}

static int run_op(fb_cuda_program *p, const struct fb_op *op, const struct fb_cuda_pages *pages,
    const struct description *d, int32_t n_rows, float *logits) {
    const struct fb_program_shape *s = &p->program->shape;
    const struct fb_buffer *in = op->in >= 0 ? &p->program->buffers[op->in] : NULL;
    const struct fb_buffer *out = op->out >= 0 ? &p->program->buffers[op->out] : NULL;
    float *from = in ? buffer_of(p, op->in) : NULL, *to = out ? buffer_of(p, op->out) : NULL;
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
        return fb_cuda_rms_norm(
            from, ld_in, vector_of(p, op->vector), n_rows, op->vector_length, op->eps, to, ld_out, p->stream);
    case FB_OP_HEAD_NORM:
        return fb_cuda_head_norm(from, ld_in, n_rows, s->n_heads, s->n_kv_heads, s->head_dim, vector_of(p, op->vector),
            vector_of(p, op->vector2), op->eps, p->stream);
    case FB_OP_ROPE:
        return fb_cuda_rope(
            from, ld_in, n_rows, s->n_heads + s->n_kv_heads, s->head_dim, s->rotary_dim, p->cos_sin, p->stream);
    case FB_OP_KV_WRITE:
        return fb_cuda_kv_write(from, ld_in, &d->batch, s->n_heads, pages, op->layer, p->stream);
    case FB_OP_ATTENTION:
        return run_attention(p, op, pages, d, (const struct fb_cuda_sequence *)(void *)(p->inputs.host + d->sequences));
    case FB_OP_GATHER_OUTPUTS:
        return fb_cuda_gather(from, ld_in, d->device_outputs, n_rows, in->width, to, ld_out, p->stream);
    default:
        return run_product(p, op, n_rows, logits);
    }
}

static enum fb_status run_ops(fb_cuda_program *p, const struct fb_cuda_pages *pages, const struct description *d,
    int32_t n_outputs, float *logits) {
    static const char *const names[] = {"", "embed", "rms_norm", "linear", "linear_swiglu", "head_norm", "rope",
        "kv_write", "attention", "gather_outputs", "logits"};
    int32_t n_rows = d->batch.n_tokens;
    for (int32_t i = 0; i < p->program->n_ops; i++) {
        const struct fb_op *op = &p->program->ops[i];
        if (op->kind == FB_OP_GATHER_OUTPUTS) n_rows = n_outputs;
        if (n_rows == 0) break; /* nobody wants logits */
        FB_TRY(fb_cuda_check(run_op(p, op, pages, d, n_rows, logits), names[op->kind]));
    }
    return FB_OK;
}

enum fb_status fb_cuda_program_run(
    fb_cuda_program *p, fb_cuda_pool *pool, const struct fb_batch *batch, float *logits, size_t n_logits) {
    FB_REQUIRE(p && pool && batch && (logits || n_logits == 0), "program, pool, batch or logits is null");
    FB_TRY(fb_check_pool(p->program, &pool->shape));
    FB_TRY(fb_check_batch(p->program, &pool->shape, batch, n_logits));
    struct description d;
    struct fb_cuda_pages pages;
    fb_cuda_pages_view(&pool->shape, &pages);
    FB_TRY(grow(p, &p->outputs, n_logits * sizeof(float), false));
    float *results = (float *)(void *)p->outputs.device;
    enum fb_status status = describe(p, batch, &d);
    if (status == FB_OK)
        status = fb_cuda_check(cudaMemsetAsync(p->non_finite, 0, sizeof(int32_t), p->stream), "clearing a flag");
    if (status == FB_OK) status = run_ops(p, &pages, &d, batch->n_outputs, results);
    if (status == FB_OK && n_logits > 0)
        status = fb_cuda_check(
            cudaMemcpyAsync(logits, results, n_logits * sizeof(float), cudaMemcpyDeviceToHost, p->stream),
            "copying logits");
    if (status == FB_OK)
        status = fb_cuda_check(
            cudaMemcpyAsync(p->non_finite_here, p->non_finite, sizeof(int32_t), cudaMemcpyDeviceToHost, p->stream),
            "copying a flag");
    /* Also behind a failure: the next batch writes to where this one's copies may still be read from. */
    const int error = cudaStreamSynchronize(p->stream);
    FB_TRY(status);
    FB_TRY(fb_cuda_check(error, "running a batch"));
    if (*p->non_finite_here)
        return fb_fail(FB_NON_FINITE, "logits hold NaN or infinity: the weights or the input are damaged");
    return FB_OK;
}
