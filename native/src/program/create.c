/* create.c - checks a program and allocates its memory. See program.h. */
#include "program/operators.h"

#include "base/memory.h"
#include "base/status.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPS = 1 << 20, MAX_BUFFERS = 4096, MAX_BATCH = 65536, MAX_THREADS = 1024 };
enum { MAX_HEAD_DIM = 1024, MAX_GEOMETRIES = 4096 };

static enum fb_status check_heads(const struct fb_program_shape *s, int32_t i) {
    const struct fb_heads *h = &s->heads[i];
    FB_REQUIRE(h->n_heads >= 1 && h->n_heads <= 65536, "heads %d: n_heads is %d, must be 1 .. 65536", i, h->n_heads);
    FB_REQUIRE(h->n_kv_heads >= 1 && h->n_heads % h->n_kv_heads == 0,
        "heads %d: n_kv_heads is %d, must divide n_heads %d", i, h->n_kv_heads, h->n_heads);
    FB_REQUIRE(h->k_dim >= 1 && h->k_dim <= MAX_HEAD_DIM && h->v_dim >= 1 && h->v_dim <= MAX_HEAD_DIM,
        "heads %d: k_dim is %d and v_dim %d, must be 1 .. %d", i, h->k_dim, h->v_dim, MAX_HEAD_DIM);
    FB_REQUIRE(h->v_in_k == 0 || (h->v_in_k == 1 && h->v_dim <= h->k_dim),
        "heads %d: v_in_k is %d with heads of %d and %d; it must be 0, or 1 with a v_dim of at most k_dim", i,
        h->v_in_k, h->k_dim, h->v_dim);
    FB_REQUIRE(h->rope >= -1 && h->rope < s->n_ropes, "heads %d: rope table %d of %d", i, h->rope, s->n_ropes);
    FB_REQUIRE(h->rope < 0 || 2 * s->ropes[h->rope].n_pairs <= h->k_dim,
        "heads %d: rope table %d rotates %d pairs of heads of %d", i, h->rope, s->ropes[h->rope].n_pairs, h->k_dim);
    return FB_OK;
}

static enum fb_status check_rope(const struct fb_rope_table *rope, int32_t i) {
    FB_REQUIRE(rope->n_pairs >= 1 && rope->n_pairs <= MAX_HEAD_DIM / 2 && rope->inv_freq,
        "rope table %d: n_pairs is %d, must be 1 .. %d, and inv_freq not null", i, rope->n_pairs, MAX_HEAD_DIM / 2);
    FB_REQUIRE(isfinite(rope->scale), "rope table %d: scale is not finite", i);
    for (int32_t pair = 0; pair < rope->n_pairs; pair++)
        FB_REQUIRE(isfinite(rope->inv_freq[pair]), "rope table %d: inv_freq[%d] is not finite", i, pair);
    return FB_OK;
}

static enum fb_status check_shape(const struct fb_program_shape *s) {
    FB_REQUIRE(s->struct_size == sizeof *s, "shape.struct_size is %u, must be %zu", s->struct_size, sizeof *s);
    FB_REQUIRE(s->n_layers >= 1 && s->n_layers <= MAX_OPS, "n_layers is %d, must be 1 .. %d", s->n_layers, MAX_OPS);
    FB_REQUIRE(s->vocab_size >= 1 && s->vocab_size <= 1 << 30, "vocab_size is %d, must be 1 .. 2^30", s->vocab_size);
    FB_REQUIRE(s->max_tokens >= 1 && s->max_tokens <= MAX_BATCH, "max_tokens is %d, must be 1 .. %d", s->max_tokens,
        MAX_BATCH);
    FB_REQUIRE(s->n_buffers >= 1 && s->n_buffers <= MAX_BUFFERS, "n_buffers is %d, must be 1 .. %d", s->n_buffers,
        MAX_BUFFERS);
    FB_REQUIRE(s->n_geometries >= 1 && s->n_geometries <= MAX_GEOMETRIES && s->heads,
        "n_geometries is %d, must be 1 .. %d, and heads not null", s->n_geometries, MAX_GEOMETRIES);
    FB_REQUIRE(s->n_state_layers >= 0 && s->n_state_layers <= MAX_OPS, "n_state_layers is %d, must be 0 .. %d",
        s->n_state_layers, MAX_OPS);
    FB_REQUIRE(s->n_ropes >= 0 && s->n_ropes <= FB_MOST_ROPES && (s->ropes || !s->n_ropes),
        "n_ropes is %d, must be 0 .. %d, and ropes not null", s->n_ropes, FB_MOST_ROPES);
    for (int32_t i = 0; i < s->n_ropes; i++)
        FB_TRY(check_rope(&s->ropes[i], i));
    for (int32_t i = 0; i < s->n_geometries; i++)
        FB_TRY(check_heads(s, i));
    return FB_OK;
}

static int32_t larger(int32_t a, int32_t b) {
    return a > b ? a : b;
}

/* Copies the geometries and rope tables that the caller's arrays hold. */
static enum fb_status copy_shape(struct fb_program *p, const struct fb_program_shape *from) {
    struct fb_heads *heads = calloc((size_t)from->n_geometries, sizeof *heads);
    struct fb_rope_table *ropes = calloc((size_t)from->n_ropes + 1, sizeof *ropes);
    p->shape = *from;
    p->shape.heads = heads;
    p->shape.ropes = ropes;
    p->angles = calloc((size_t)from->n_ropes + 1, sizeof *p->angles);
    p->kv_layers = calloc((size_t)from->n_layers, sizeof *p->kv_layers);
    p->state_floats = calloc((size_t)from->n_state_layers + 1, sizeof *p->state_floats);
    if (!heads || !ropes || !p->angles || !p->kv_layers || !p->state_floats)
        return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    p->most_members = MAX_BATCH;
    for (int32_t i = 0; i < from->n_geometries; i++) {
        const struct fb_heads *h = &from->heads[i];
        heads[i] = *h;
        p->most.n_heads = larger(p->most.n_heads, h->n_heads);
        p->most.n_kv_heads = larger(p->most.n_kv_heads, h->n_kv_heads);
        p->most.k_dim = larger(p->most.k_dim, h->k_dim);
        p->most.v_dim = larger(p->most.v_dim, h->v_dim);
        const int32_t members = fb_attention_most_members(h);
        if (members < p->most_members) p->most_members = members;
    }
    for (int32_t i = 0; i < from->n_ropes; i++) {
        ropes[i] = from->ropes[i];
        p->n_vector_floats += (size_t)ropes[i].n_pairs;
    }
    return FB_OK;
}

static const float *copy_floats(const float *from, int32_t n, float **next) {
    float *to = *next;
    memcpy(to, from, (size_t)n * sizeof *to);
    *next += n;
    return to;
}

static void copy_vectors(struct fb_program *p) {
    float *next = p->vectors;
    for (int32_t i = 0; i < p->n_ops; i++) {
        struct fb_op *op = &p->ops[i];
        if (op->vector) op->vector = copy_floats(op->vector, op->vector_length, &next);
        if (op->vector2) op->vector2 = copy_floats(op->vector2, op->vector2_length, &next);
    }
    for (int32_t i = 0; i < p->shape.n_ropes; i++) {
        const struct fb_rope_table *rope = &p->shape.ropes[i];
        p->angles[i] = (struct fb_angles){.inv_freq = copy_floats(rope->inv_freq, rope->n_pairs, &next),
            .n_pairs = (size_t)rope->n_pairs,
            .scale = rope->scale};
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
    for (int32_t i = 0; i < s->n_geometries; i++) {
        const size_t n_bytes = fb_attention_scratch_bytes(&s->heads[i]);
        if (n_bytes > p->attention_scratch_bytes) p->attention_scratch_bytes = n_bytes;
    }
    p->arena = allocate(p, p->arena_floats, sizeof(float), &failed);
    for (int32_t i = 0; i < s->n_ropes; i++) {
        p->angles[i].cos_sin = allocate(p, 4 * rows * p->angles[i].n_pairs, sizeof(float), &failed);
        if (p->angles[i].cos_sin) p->angles[i].sink_rotations = p->angles[i].cos_sin + 2 * rows * p->angles[i].n_pairs;
    }
    p->positions = allocate(p, rows, sizeof(int32_t), &failed);
    p->owners = allocate(p, rows, sizeof(int32_t), &failed);
    p->first_row = allocate(p, rows, sizeof(int32_t), &failed);
    p->offsets = allocate(p, 2 * (rows + 1) * n_threads, sizeof(int64_t), &failed);
    p->sharing = allocate(p, rows, sizeof *p->sharing, &failed);
    p->parts_done = allocate(p, rows * (size_t)p->most.n_kv_heads, sizeof *p->parts_done, &failed);
    p->attention_scratch = allocate(p, n_threads, p->attention_scratch_bytes, &failed);
    p->state_scratch = allocate(p, n_threads, p->state_scratch_floats * sizeof(float), &failed);
    p->activations = allocate(p, rows * p->activation_blocks, sizeof *p->activations, &failed);
    p->pairs = allocate(p, rows * p->pair_stride, sizeof *p->pairs, &failed);
    p->own_inputs = allocate(p, n_threads, p->own_input_bytes, &failed);
    struct fb_expert_layout layout;
    if (fb_lay_out_experts(p, &layout)) {
        p->expert_layout = allocate(p, 1, sizeof layout, &failed);
        p->expert_inputs = allocate(p, 1, layout.n_input_bytes, &failed);
        p->expert_memory = allocate(p, n_threads, layout.n_bytes, &failed);
        if (p->expert_layout) *p->expert_layout = layout;
    }
    for (int32_t i = 0; i < p->n_ops; i++) {
        const size_t n_bytes = fb_op_is(&p->ops[i], FB_OF_EACH_HEAD) ? fb_head_linear_bytes(p->ops[i].weight) : 0;
        if (n_bytes > p->head_input_bytes) p->head_input_bytes = n_bytes;
    }
    p->head_inputs = allocate(p, n_threads, p->head_input_bytes, &failed);
    p->counters = allocate(p, 2 * (size_t)p->n_stages * n_threads, sizeof(struct fb_counter), &failed);
    const int n_groups = fb_barrier_groups(p->n_threads);
    if (n_groups) p->barrier_groups = allocate(p, (size_t)n_groups, sizeof *p->barrier_groups, &failed);
    allocate_sample_work(p, &failed);
    if (failed) return fb_fail(FB_OUT_OF_MEMORY, "no memory for the buffers of %d tokens", s->max_tokens);
    for (int32_t i = 0; i < s->n_buffers; i++)
        if (p->buffers[i].first_write >= 0) p->buffers[i].data = p->arena + p->buffers[i].offset;
    return FB_OK;
}

static enum fb_status build(struct fb_program *p, const struct fb_program_shape *shape, const int32_t *buffer_widths) {
    FB_TRY(copy_shape(p, shape));
    const struct fb_program_shape *s = &p->shape;
    p->buffers = calloc((size_t)s->n_buffers, sizeof *p->buffers);
    p->stages = calloc((size_t)p->n_ops, sizeof *p->stages);
    if (!p->buffers || !p->stages) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program");
    for (int32_t i = 0; i < s->n_buffers; i++) {
        FB_REQUIRE(buffer_widths[i] >= 1 && buffer_widths[i] <= 1 << 24, "buffer %d is %d wide, must be 1 .. 2^24", i,
            buffer_widths[i]);
        p->buffers[i] = (struct fb_buffer){.width = buffer_widths[i],
            .stride = ((size_t)buffer_widths[i] + 15) / 16 * 16,
            .tail = buffer_widths[i],
            .first_write = -1,
            .last_use = -1};
    }
    bool gathered = false;
    for (int32_t i = 0; i < p->n_ops; i++) {
        FB_TRY(fb_check_op(p, i, &gathered));
        const struct fb_op *op = &p->ops[i];
        p->n_vector_floats += (size_t)op->vector_length + (size_t)op->vector2_length;
        if (fb_op_is(op, FB_STATE)) {
            const size_t n_floats = (fb_operator_of(op->kind)->scratch_floats(op) + 15) / 16 * 16;
            if (n_floats > p->state_scratch_floats) p->state_scratch_floats = n_floats;
        }
        p->attends_all = p->attends_all || op->flags & FB_ATTEND_ALL;
        if (fb_op_is(op, FB_POSITIONS) && (p->n_positions == 0 || op->weight->n_rows < p->n_positions))
            p->n_positions = op->weight->n_rows;
    }
    p->vectors = calloc(p->n_vector_floats + 1, sizeof *p->vectors);
    if (!p->vectors) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a program's vectors");
    copy_vectors(p);
    p->n_results = p->ops[p->n_ops - 1].weight->n_rows;
    fb_cut_stages(p);
    return p->device ? create_on_device(p) : allocate_memory(p);
}

enum fb_status fb_program_create(const struct fb_program_shape *shape, const int32_t *buffer_widths,
    const struct fb_op *ops, int32_t n_ops, int32_t n_threads, enum fb_isa isa, fb_program **out) {
    return fb_program_create_on(NULL, shape, buffer_widths, ops, n_ops, n_threads, isa, out);
}

enum fb_status fb_program_create_on(fb_device *device, const struct fb_program_shape *shape,
    const int32_t *buffer_widths, const struct fb_op *ops, int32_t n_ops, int32_t n_threads, enum fb_isa isa,
    fb_program **out) {
    FB_REQUIRE(shape && buffer_widths && ops && out, "shape, buffer_widths, ops or out is null");
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
    p->kernels = fb_kernels_of(chosen);
    p->n_threads = n_threads;
    p->ops = copied;
    p->n_ops = n_ops;
    p->device = device;
    enum fb_status status = build(p, shape, buffer_widths);
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
    free(p->angles);
    free(p->kv_layers);
    free(p->state_floats);
    free(p->cpus);
    free(p->pinned);
    if (!p->parts[0]) { /* a joined program borrows its parts' */
        free((void *)p->shape.heads);
        free((void *)p->shape.ropes);
    }
    free(p);
}
