/* create.c - checks a program and takes its memory. See program.h. */
#include "program/program.h"

#include "base/cpu.h"
#include "base/memory.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPS = 1 << 20, MAX_BUFFERS = 4096, MAX_BATCH = 65536, MAX_THREADS = 1024 };

static enum fb_status check_shape(const struct fb_program_shape *s) {
    FB_REQUIRE(s->struct_size == sizeof *s, "shape.struct_size is %u, must be %zu", s->struct_size, sizeof *s);
    FB_REQUIRE(s->n_layers >= 1 && s->n_layers <= MAX_OPS, "n_layers is %d, must be 1 .. %d", s->n_layers, MAX_OPS);
    FB_REQUIRE(s->n_heads >= 1 && s->n_heads <= 65536, "n_heads is %d, must be 1 .. 65536", s->n_heads);
    FB_REQUIRE(s->n_kv_heads >= 1 && s->n_heads % s->n_kv_heads == 0, "n_kv_heads is %d, must divide n_heads %d",
        s->n_kv_heads, s->n_heads);
    FB_REQUIRE(s->head_dim >= 1 && s->head_dim <= 1024, "head_dim is %d, must be 1 .. 1024", s->head_dim);
    FB_REQUIRE(s->rotary_dim >= 0 && s->rotary_dim <= s->head_dim && s->rotary_dim % 2 == 0,
        "rotary_dim is %d, must be even and 0 .. head_dim %d", s->rotary_dim, s->head_dim);
    FB_REQUIRE(s->vocab_size >= 1 && s->vocab_size <= 1 << 30, "vocab_size is %d, must be 1 .. 2^30", s->vocab_size);
    FB_REQUIRE(s->max_tokens >= 1 && s->max_tokens <= MAX_BATCH, "max_tokens is %d, must be 1 .. %d", s->max_tokens,
        MAX_BATCH);
    FB_REQUIRE(s->n_buffers >= 1 && s->n_buffers <= MAX_BUFFERS, "n_buffers is %d, must be 1 .. %d", s->n_buffers,
        MAX_BUFFERS);
    FB_REQUIRE(isfinite(s->rope_scale), "rope_scale is not finite");
    return FB_OK;
}

/* What an operator takes and leaves, by kind. */
static bool reads_buffer(const struct fb_op *op) {
    return op->kind != FB_OP_EMBED;
}

static bool writes_buffer(const struct fb_op *op) {
    return op->kind == FB_OP_EMBED || op->kind == FB_OP_RMS_NORM || op->kind == FB_OP_LINEAR ||
           op->kind == FB_OP_LINEAR_SWIGLU || op->kind == FB_OP_ATTENTION || op->kind == FB_OP_GATHER_OUTPUTS ||
           op->kind == FB_OP_SUM;
}

static bool has_weight(const struct fb_op *op) {
    return op->kind == FB_OP_EMBED || op->kind == FB_OP_LINEAR || op->kind == FB_OP_LINEAR_SWIGLU ||
           op->kind == FB_OP_LOGITS;
}

/* The width `out` must have, given `in`; 0 where the kind does not say. */
static int32_t result_width(const struct fb_program *p, const struct fb_op *op, int32_t in_width) {
    switch (op->kind) {
    case FB_OP_EMBED:
        return op->weight->n_cols;
    case FB_OP_RMS_NORM:
    case FB_OP_GATHER_OUTPUTS:
    case FB_OP_SUM:
        return in_width;
    case FB_OP_ATTENTION:
        return p->shape.n_heads * p->shape.head_dim;
    default:
        return 0;
    }
}

static enum fb_status check_vectors(const struct fb_program *p, int32_t i, int32_t in_width) {
    const struct fb_op *op = &p->ops[i];
    FB_REQUIRE((op->vector != NULL) == (op->vector_length > 0) && (op->vector2 != NULL) == (op->vector2_length > 0),
        "op %d: a vector and its length must come together", i);
    if (op->kind == FB_OP_RMS_NORM)
        FB_REQUIRE(op->vector_length == in_width, "op %d (rms_norm): %d weights for a width of %d", i,
            op->vector_length, in_width);
    else if (fb_is_product(op))
        FB_REQUIRE(op->vector_length == 0 || op->vector_length == op->weight->n_rows, "op %d: a bias of %d for %d rows",
            i, op->vector_length, op->weight->n_rows);
    else if (op->kind == FB_OP_HEAD_NORM)
        FB_REQUIRE(op->vector_length == p->shape.head_dim && op->vector2_length == p->shape.head_dim,
            "op %d (head_norm): %d and %d weights for head_dim %d", i, op->vector_length, op->vector2_length,
            p->shape.head_dim);
    if (op->kind == FB_OP_RMS_NORM || op->kind == FB_OP_HEAD_NORM)
        FB_REQUIRE(op->eps >= 0.0f && isfinite(op->eps), "op %d: eps must be finite and not negative", i);
    return FB_OK;
}

/* Checks op i; `written` tells which buffers hold something, `gathered` whether GATHER_OUTPUTS came before. */
static enum fb_status check_op(struct fb_program *p, int32_t i, bool *gathered) {
    const struct fb_op *op = &p->ops[i];
    const struct fb_program_shape *s = &p->shape;
    FB_REQUIRE(op->kind >= FB_OP_EMBED && op->kind <= FB_OP_SUM, "op %d: kind %d is unknown", i, (int)op->kind);
    if (op->kind == FB_OP_SUM && !p->device)
        return fb_fail(FB_UNSUPPORTED, "op %d: sums over devices are not for the CPU", i);
    p->is_part = p->is_part || op->kind == FB_OP_SUM;
    FB_REQUIRE((op->kind == FB_OP_EMBED) == (i == 0), "op %d: a program has one embed, at its beginning", i);
    FB_REQUIRE((op->kind == FB_OP_LOGITS) == (i == p->n_ops - 1), "op %d: a program has one logits op, at its end", i);
    FB_REQUIRE(!has_weight(op) || op->weight, "op %d: its weight is null", i);
    FB_REQUIRE(!has_weight(op) || op->weight->device == p->device, "op %d: its weight lies elsewhere", i);
    FB_REQUIRE(isfinite(op->scale), "op %d: scale is not finite", i);
    FB_REQUIRE(op->column == 0 || op->kind == FB_OP_LINEAR, "op %d: only linear writes from a column on", i);

    int32_t in_width = 0;
    if (reads_buffer(op)) {
        FB_REQUIRE(op->in >= 0 && op->in < s->n_buffers, "op %d: in is buffer %d of %d", i, op->in, s->n_buffers);
        struct fb_buffer *in = &p->buffers[op->in];
        FB_REQUIRE(in->first_write >= 0 && in->filled == in->width,
            "op %d: reads buffer %d before all of it was written", i, op->in);
        FB_REQUIRE(in->per_output == *gathered || op->kind == FB_OP_GATHER_OUTPUTS, "op %d: buffer %d holds rows of %s",
            i, op->in, in->per_output ? "outputs" : "tokens");
        in->last_use = i;
        in_width = in->width;
    }
    if (fb_is_product(op))
        FB_REQUIRE(op->weight->n_cols == in_width, "op %d: the weight has %d columns, buffer %d is %d wide", i,
            op->weight->n_cols, op->in, in_width);
    if (op->kind == FB_OP_EMBED)
        FB_REQUIRE(op->weight->n_rows >= s->vocab_size, "op %d (embed): %d rows for a vocabulary of %d", i,
            op->weight->n_rows, s->vocab_size);
    if (op->kind == FB_OP_LOGITS) FB_REQUIRE(*gathered, "op %d (logits): needs gather_outputs before", i);
    if (op->kind == FB_OP_HEAD_NORM || op->kind == FB_OP_ROPE || op->kind == FB_OP_KV_WRITE ||
        op->kind == FB_OP_ATTENTION) {
        const int64_t qkv = ((int64_t)s->n_heads + 2 * (int64_t)s->n_kv_heads) * s->head_dim;
        FB_REQUIRE(!*gathered, "op %d: works on tokens, but comes after gather_outputs", i);
        FB_REQUIRE(in_width == qkv, "op %d: q, k and v of %d + 2 x %d heads are %lld wide, buffer %d is %d", i,
            s->n_heads, s->n_kv_heads, (long long)qkv, op->in, in_width);
    }
    if (op->kind == FB_OP_KV_WRITE || op->kind == FB_OP_ATTENTION)
        FB_REQUIRE(op->layer >= 0 && op->layer < s->n_layers, "op %d: layer %d of %d", i, op->layer, s->n_layers);
    if (op->kind == FB_OP_ATTENTION) {
        FB_REQUIRE(op->window >= 0, "op %d: window is %d, must not be negative", i, op->window);
        FB_REQUIRE(op->scale > 0.0f, "op %d: scale of attention must be above 0", i);
    }
    FB_TRY(check_vectors(p, i, in_width));

    if (!writes_buffer(op)) {
        FB_REQUIRE(op->out == -1, "op %d: works in place, out must be -1", i);
        return FB_OK;
    }
    FB_REQUIRE(op->out >= 0 && op->out < s->n_buffers, "op %d: out is buffer %d of %d", i, op->out, s->n_buffers);
    FB_REQUIRE(op->out != op->in || op->kind == FB_OP_RMS_NORM, "op %d: cannot write the buffer it reads", i);
    struct fb_buffer *out = &p->buffers[op->out];
    int32_t width = result_width(p, op, in_width);
    if (op->kind == FB_OP_LINEAR_SWIGLU) {
        /* Woven by panels: the last panel of each half may hold padding rows. */
        FB_REQUIRE(op->weight->n_rows % 32 == 0 && out->width <= op->weight->n_rows / 2 &&
                       out->width > op->weight->n_rows / 2 - 16,
            "op %d (linear_swiglu): %d woven rows give a width just up to %d, buffer %d is %d", i, op->weight->n_rows,
            op->weight->n_rows / 2, op->out, out->width);
    } else if (op->kind == FB_OP_LINEAR) {
        FB_REQUIRE(op->column >= 0 && (int64_t)op->column + op->weight->n_rows <= out->width,
            "op %d: %d rows from column %d on do not fit buffer %d of %d", i, op->weight->n_rows, op->column, op->out,
            out->width);
        FB_REQUIRE(op->column == 0 || (out->first_write >= 0 && op->column == out->filled),
            "op %d: column %d of buffer %d does not follow what was written, %d columns", i, op->column, op->out,
            out->filled);
    } else {
        FB_REQUIRE(out->width == width, "op %d: the result is %d wide, buffer %d is %d", i, width, op->out, out->width);
    }
    if (op->kind == FB_OP_GATHER_OUTPUTS) {
        FB_REQUIRE(!*gathered && !p->buffers[op->in].per_output, "op %d: outputs are gathered once", i);
        *gathered = true;
    }
    if ((op->kind == FB_OP_LINEAR || op->kind == FB_OP_SUM) && op->residual != -1) {
        FB_REQUIRE(op->residual >= 0 && op->residual < s->n_buffers, "op %d: residual is buffer %d of %d", i,
            op->residual, s->n_buffers);
        struct fb_buffer *residual = &p->buffers[op->residual];
        FB_REQUIRE(residual->first_write >= 0 && residual->filled == out->width && residual->width == out->width &&
                       op->column == 0 && residual->per_output == *gathered,
            "op %d: buffer %d cannot be its residual", i, op->residual);
        residual->last_use = i;
    } else {
        FB_REQUIRE(op->residual == -1, "op %d: only linear and sum take a residual", i);
    }
    if (out->first_write < 0) {
        out->first_write = i;
        out->per_output = *gathered;
    }
    FB_REQUIRE(out->per_output == *gathered, "op %d: buffer %d holds rows of %s", i, op->out,
        out->per_output ? "outputs" : "tokens");
    if (out->last_use < i) out->last_use = i;
    out->filled = op->kind == FB_OP_LINEAR ? op->column + op->weight->n_rows : out->width;
    return FB_OK;
}

static void copy_vectors(struct fb_program *p) {
    float *next = p->vectors;
    for (int32_t i = 0; i < p->n_ops; i++) {
        struct fb_op *op = &p->ops[i];
        if (op->vector) {
            memcpy(next, op->vector, (size_t)op->vector_length * sizeof *next);
            op->vector = next;
            next += op->vector_length;
        }
        if (op->vector2) {
            memcpy(next, op->vector2, (size_t)op->vector2_length * sizeof *next);
            op->vector2 = next;
            next += op->vector2_length;
        }
    }
}

/* Takes memory and adds it to the account; on refusal `*failed` is set. */
static void *take(struct fb_program *p, size_t count, size_t size, bool *failed) {
    size_t n_bytes;
    void *memory = fb_size_multiply(count, size, &n_bytes) ? fb_memory_take(n_bytes) : NULL;
    if (!memory) {
        *failed = true;
        return NULL;
    }
    p->scratch_bytes += n_bytes;
    return memory;
}

static size_t drawing_threads(const struct fb_program *p) {
    return (size_t)(p->n_threads < FB_DRAWING_THREADS ? p->n_threads : FB_DRAWING_THREADS);
}

static void take_draw_work(struct fb_program *p, bool *failed) {
    p->draw_work_bytes = (fb_sample_work_bytes(p->shape.vocab_size) + 63) / 64 * 64;
    p->draw_work = take(p, drawing_threads(p), p->draw_work_bytes, failed);
}

enum fb_status fb_take_draw_work(struct fb_program *p) {
    bool failed = false;
    take_draw_work(p, &failed);
    return failed ? fb_fail(FB_OUT_OF_MEMORY, "no memory to draw tokens") : FB_OK;
}

/* Of this process only what drawing takes; the rest is the device's. */
static enum fb_status take_on_device(struct fb_program *p) {
    p->arena_floats = fb_plan_buffers(p->buffers, p->shape.n_buffers, (size_t)p->shape.max_tokens);
    FB_TRY(fb_take_draw_work(p));
    return p->device->kind->program_create(p, &p->on_device);
}

static enum fb_status take_memory(struct fb_program *p) {
    const struct fb_program_shape *s = &p->shape;
    const size_t rows = (size_t)s->max_tokens;
    bool failed = false;
    size_t widest = 0;
    for (int32_t i = 0; i < s->n_buffers; i++)
        widest = p->buffers[i].stride > widest ? p->buffers[i].stride : widest;
    p->own_input_bytes = FB_OWN_ROWS * (widest * sizeof(float) + p->activation_blocks * sizeof *p->activations +
                                           p->pair_stride * sizeof *p->pairs);
    p->arena_floats = fb_plan_buffers(p->buffers, s->n_buffers, rows);
    p->attention_scratch_bytes = fb_attention_scratch_bytes(s->n_heads, s->n_kv_heads, s->head_dim);
    p->arena = take(p, p->arena_floats, sizeof(float), &failed);
    p->cos_sin = take(p, rows * (size_t)s->rotary_dim, sizeof(float), &failed);
    p->sink_turns = take(p, rows * (size_t)s->rotary_dim, sizeof(float), &failed);
    p->positions = take(p, rows, sizeof(int32_t), &failed);
    p->owners = take(p, rows, sizeof(int32_t), &failed);
    p->first_row = take(p, rows, sizeof(int32_t), &failed);
    p->offsets = take(p, 2 * (rows + 1) * (size_t)p->n_threads, sizeof(int64_t), &failed);
    p->sharing = take(p, rows, sizeof *p->sharing, &failed);
    p->parts_left = take(p, rows * (size_t)s->n_kv_heads, sizeof *p->parts_left, &failed);
    p->partials = take(p, FB_PARTIAL_FLOATS, sizeof(float), &failed);
    p->attention_scratch = take(p, (size_t)p->n_threads, p->attention_scratch_bytes, &failed);
    p->activations = take(p, rows * p->activation_blocks, sizeof *p->activations, &failed);
    p->pairs = take(p, rows * p->pair_stride, sizeof *p->pairs, &failed);
    p->own_inputs = take(p, (size_t)p->n_threads, p->own_input_bytes, &failed);
    p->counters = take(p, 2 * (size_t)p->n_stages * (size_t)p->n_threads, sizeof(struct fb_counter), &failed);
    take_draw_work(p, &failed);
    if (failed) return fb_fail(FB_OUT_OF_MEMORY, "no memory for the buffers of %d tokens", s->max_tokens);
    for (int32_t i = 0; i < s->n_buffers; i++)
        if (p->buffers[i].data) p->buffers[i].data = p->arena + p->buffers[i].offset;
    return FB_OK;
}

static enum fb_status build(struct fb_program *p, const int32_t *buffer_widths, const float *inv_freq) {
    const struct fb_program_shape *s = &p->shape;
    p->buffers = calloc((size_t)s->n_buffers, sizeof *p->buffers);
    p->stages = calloc((size_t)p->n_ops, sizeof *p->stages);
    p->inv_freq = calloc((size_t)s->rotary_dim / 2 + 1, sizeof *p->inv_freq);
    if (!p->buffers || !p->stages || !p->inv_freq) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    for (int32_t i = 0; i < s->rotary_dim / 2; i++) {
        FB_REQUIRE(isfinite(inv_freq[i]), "inv_freq[%d] is not finite", i);
        p->inv_freq[i] = inv_freq[i];
    }
    for (int32_t i = 0; i < s->n_buffers; i++) {
        FB_REQUIRE(buffer_widths[i] >= 1 && buffer_widths[i] <= 1 << 24, "buffer %d is %d wide, must be 1 .. 2^24", i,
            buffer_widths[i]);
        p->buffers[i] = (struct fb_buffer){.width = buffer_widths[i],
            .stride = ((size_t)buffer_widths[i] + 15) / 16 * 16,
            .first_write = -1,
            .last_use = -1};
    }
    bool gathered = false;
    for (int32_t i = 0; i < p->n_ops; i++) {
        FB_TRY(check_op(p, i, &gathered));
        p->n_vector_floats += (size_t)p->ops[i].vector_length + (size_t)p->ops[i].vector2_length;
    }
    p->vectors = calloc(p->n_vector_floats + 1, sizeof *p->vectors);
    if (!p->vectors) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program's vectors");
    copy_vectors(p);
    p->n_results = p->ops[p->n_ops - 1].weight->n_rows;
    fb_cut_stages(p);
    return p->device ? take_on_device(p) : take_memory(p);
}

enum fb_status fb_program_create(const struct fb_program_shape *shape, const int32_t *buffer_widths,
    const float *inv_freq, const struct fb_op *ops, int32_t n_ops, int32_t n_threads, enum fb_isa isa,
    fb_program **out) {
    return fb_program_create_on(NULL, shape, buffer_widths, inv_freq, ops, n_ops, n_threads, isa, out);
}

enum fb_status fb_program_create_on(fb_device *device, const struct fb_program_shape *shape,
    const int32_t *buffer_widths, const float *inv_freq, const struct fb_op *ops, int32_t n_ops, int32_t n_threads,
    enum fb_isa isa, fb_program **out) {
    FB_REQUIRE(shape && buffer_widths && inv_freq && ops && out, "shape, buffer_widths, inv_freq, ops or out is null");
    FB_REQUIRE(!device || device->n_members == 0, "a program lies on one device: those of a group are joined");
    FB_TRY(check_shape(shape));
    FB_REQUIRE(n_ops >= 1 && n_ops <= MAX_OPS, "n_ops is %d, must be 1 .. %d", n_ops, MAX_OPS);
    FB_REQUIRE(n_threads >= 1 && n_threads <= MAX_THREADS, "n_threads is %d, must be 1 .. %d", n_threads, MAX_THREADS);
    enum fb_isa chosen;
    FB_TRY(fb_isa_resolve(isa, &chosen));
    struct fb_program *p = calloc(1, sizeof *p);
    struct fb_op *copied = calloc((size_t)n_ops, sizeof *copied);
    if (!p || !copied) {
        free(p);
        free(copied);
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program of %d operators", n_ops);
    }
    memcpy(copied, ops, (size_t)n_ops * sizeof *copied);
    p->shape = *shape;
    p->kernels = fb_kernels_of(chosen);
    p->n_threads = n_threads;
    p->ops = copied;
    p->n_ops = n_ops;
    p->device = device;
    enum fb_status status = build(p, buffer_widths, inv_freq);
    if (status != FB_OK) {
        fb_program_free(p);
        return status;
    }
    *out = p;
    return FB_OK;
}

size_t fb_program_scratch_bytes(const fb_program *program) {
    return program ? program->scratch_bytes : 0;
}

void fb_program_free(fb_program *p) {
    if (!p) return;
    if (p->on_device) p->device->kind->program_free(p->on_device);
    if (p->parts[0]) fb_device_let_go(p->device);
    const size_t rows = (size_t)p->shape.max_tokens;
    fb_memory_release(p->arena, p->arena_floats * sizeof(float));
    fb_memory_release(p->cos_sin, rows * (size_t)p->shape.rotary_dim * sizeof(float));
    fb_memory_release(p->sink_turns, rows * (size_t)p->shape.rotary_dim * sizeof(float));
    fb_memory_release(p->positions, rows * sizeof(int32_t));
    fb_memory_release(p->owners, rows * sizeof(int32_t));
    fb_memory_release(p->first_row, rows * sizeof(int32_t));
    fb_memory_release(p->sharing, rows * sizeof *p->sharing);
    fb_memory_release(p->parts_left, rows * (size_t)p->shape.n_kv_heads * sizeof *p->parts_left);
    fb_memory_release(p->offsets, 2 * (rows + 1) * (size_t)p->n_threads * sizeof(int64_t));
    fb_memory_release(p->partials, FB_PARTIAL_FLOATS * sizeof(float));
    fb_memory_release(p->attention_scratch, (size_t)p->n_threads * p->attention_scratch_bytes);
    fb_memory_release(p->activations, rows * p->activation_blocks * sizeof *p->activations);
    fb_memory_release(p->pairs, rows * p->pair_stride * sizeof *p->pairs);
    fb_memory_release(p->own_inputs, (size_t)p->n_threads * p->own_input_bytes);
    fb_memory_release(p->draw_work, drawing_threads(p) * p->draw_work_bytes);
    fb_memory_release(p->counters, 2 * (size_t)p->n_stages * (size_t)p->n_threads * sizeof(struct fb_counter));
    free(p->ops);
    free(p->buffers);
    free(p->stages);
    free(p->vectors);
    free(p->inv_freq);
    free(p);
}
