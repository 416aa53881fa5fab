/* create.c - checks a program and allocates its memory. See program.h. */
#include "program/operators.h"

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

/* Allocates memory that fb_program_free releases; sets *failed if the system refuses. */
static void *allocate(struct fb_program *p, size_t count, size_t size, bool *failed) {
    size_t n_bytes;
    void *memory = fb_size_multiply(count, size, &n_bytes) ? fb_memory_allocate(n_bytes) : NULL;
    if (!memory) {
        *failed = true;
        return NULL;
    }
    p->scratch[p->n_scratch++] = (struct fb_scratch){memory, n_bytes};
    return memory;
}

static void allocate_sample_work(struct fb_program *p, bool *failed) {
    const int32_t n_threads = p->n_threads < FB_SAMPLING_THREADS ? p->n_threads : FB_SAMPLING_THREADS;
    p->sample_work_bytes = (fb_sample_work_bytes(p->shape.vocab_size) + 63) / 64 * 64;
    p->sample_work = allocate(p, (size_t)n_threads, p->sample_work_bytes, failed);
}

enum fb_status fb_allocate_sample_work(struct fb_program *p) {
    bool failed = false;
    allocate_sample_work(p, &failed);
    return failed ? fb_fail(FB_OUT_OF_MEMORY, "no memory to sample tokens") : FB_OK;
}

/* The host only needs memory for sampling; the rest is on the device. */
static enum fb_status create_on_device(struct fb_program *p) {
    FB_TRY(fb_plan_buffers(p->buffers, p->shape.n_buffers, (size_t)p->shape.max_tokens, &p->arena_floats));
    FB_TRY(fb_allocate_sample_work(p));
    return p->device->kind->program_create(p, &p->on_device);
}

static enum fb_status allocate_memory(struct fb_program *p) {
    const struct fb_program_shape *s = &p->shape;
    const size_t rows = (size_t)s->max_tokens, n_threads = (size_t)p->n_threads;
    bool failed = false;
    size_t widest = 0;
    for (int32_t i = 0; i < s->n_buffers; i++)
        widest = p->buffers[i].stride > widest ? p->buffers[i].stride : widest;
    p->own_input_bytes = FB_OWN_ROWS * (widest * sizeof(float) + p->activation_blocks * sizeof *p->activations +
                                           p->pair_stride * sizeof *p->pairs);
    FB_TRY(fb_plan_buffers(p->buffers, s->n_buffers, rows, &p->arena_floats));
    p->attention_scratch_bytes = fb_attention_scratch_bytes(s->n_heads, s->n_kv_heads, s->head_dim);
    p->arena = allocate(p, p->arena_floats, sizeof(float), &failed);
    p->cos_sin = allocate(p, rows * (size_t)s->rotary_dim, sizeof(float), &failed);
    p->sink_rotations = allocate(p, rows * (size_t)s->rotary_dim, sizeof(float), &failed);
    p->positions = allocate(p, rows, sizeof(int32_t), &failed);
    p->owners = allocate(p, rows, sizeof(int32_t), &failed);
    p->first_row = allocate(p, rows, sizeof(int32_t), &failed);
    p->offsets = allocate(p, 2 * (rows + 1) * n_threads, sizeof(int64_t), &failed);
    p->sharing = allocate(p, rows, sizeof *p->sharing, &failed);
    p->parts_done = allocate(p, rows * (size_t)s->n_kv_heads, sizeof *p->parts_done, &failed);
    p->attention_scratch = allocate(p, n_threads, p->attention_scratch_bytes, &failed);
    p->activations = allocate(p, rows * p->activation_blocks, sizeof *p->activations, &failed);
    p->pairs = allocate(p, rows * p->pair_stride, sizeof *p->pairs, &failed);
    p->own_inputs = allocate(p, n_threads, p->own_input_bytes, &failed);
    p->counters = allocate(p, 2 * (size_t)p->n_stages * n_threads, sizeof(struct fb_counter), &failed);
    allocate_sample_work(p, &failed);
    if (failed) return fb_fail(FB_OUT_OF_MEMORY, "no memory for the buffers of %d tokens", s->max_tokens);
    for (int32_t i = 0; i < s->n_buffers; i++)
        if (p->buffers[i].first_write >= 0) p->buffers[i].data = p->arena + p->buffers[i].offset;
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
        FB_TRY(fb_check_op(p, i, &gathered));
        p->n_vector_floats += (size_t)p->ops[i].vector_length + (size_t)p->ops[i].vector2_length;
    }
    p->vectors = calloc(p->n_vector_floats + 1, sizeof *p->vectors);
    if (!p->vectors) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program's vectors");
    copy_vectors(p);
    p->n_results = p->ops[p->n_ops - 1].weight->n_rows;
    fb_cut_stages(p);
    return p->device ? create_on_device(p) : allocate_memory(p);
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
    FB_REQUIRE(!device || device->n_members == 0,
        "a program is created on one device; join the members' programs for a group");
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
    if (!program) return 0;
    size_t n_bytes = program->partials.n_bytes;
    for (int32_t i = 0; i < program->n_scratch; i++)
        n_bytes += program->scratch[i].n_bytes;
    return n_bytes;
}

void fb_program_free(fb_program *p) {
    if (!p) return;
    if (p->on_device) p->device->kind->program_free(p->on_device);
    if (p->parts[0]) fb_device_drop(p->device);
    fb_memory_release(p->partials.memory, p->partials.n_bytes);
    for (int32_t i = 0; i < p->n_scratch; i++)
        fb_memory_release(p->scratch[i].memory, p->scratch[i].n_bytes);
    free(p->ops);
    free(p->buffers);
    free(p->stages);
    free(p->vectors);
    free(p->inv_freq);
    free(p);
}
