/*
 * run.c - runs a program over a batch in one parallel region, after check_batch.c has checked it. See
 * program.h.
 */
#include "program/run.h"

#include "base/affinity.h"
#include "base/float_mode.h"
#include "base/memory.h"
#include "base/status.h"
#include "program/operators.h"

#include <omp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ---- Stages ------------------------------------------------------------------------------------------------------ */

static void run_rows(
    const struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows) {
    const size_t block = n_rows < 64 ? 1 : 8; /* rows per item */
    const struct fb_op *ops = &run->program->ops[stage->first_op];
    struct fb_items items = fb_worker_items(worker, 0, (int64_t)((n_rows + block - 1) / block));
    for (int64_t i; (i = fb_next_item(&items)) >= 0;)
        for (size_t row = (size_t)i * block; row < n_rows && row < ((size_t)i + 1) * block; row++)
            for (int32_t o = 0; o < stage->n_ops; o++)
                fb_operator_of(ops[o].kind)->run_row(run, &ops[o], row);
}

/* The inputs of a stage's products. */
struct inputs {
    const float *x; /* [rows][ldx] */
    const uint16_t *pairs;
    const struct fb_activation *activations;
    size_t ldx, ld_pairs, ld_activations;
};

static void prepare_row(const struct fb_program *p, const struct fb_stage *stage, size_t row, float *x, uint16_t *pairs,
    struct fb_activation *activations) {
    const size_t width = (size_t)p->buffers[p->ops[stage->first_op].in].width;
    const struct fb_op *norm = stage->norm >= 0 ? &p->ops[stage->norm] : NULL;
    if (norm) fb_apply_norm(p->kernels, norm, fb_row_of(p, norm->in, row), width, x);
    if (stage->is_quantized) p->kernels->quantize(x, width / FB_BLOCK_COLUMNS, activations);
    if (stage->is_paired) p->kernels->narrow_pairs(x, width, pairs);
}

/* Norm and conversion of a stage's inputs: each thread for itself if there are few rows, divided among them
 * otherwise. */
static struct inputs prepare_inputs(
    struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows) {
    const struct fb_program *p = run->program;
    const int32_t number = p->ops[stage->first_op].in;
    const struct fb_buffer *in = &p->buffers[number];
    struct inputs inputs = {.x = in->data,
        .ldx = in->stride,
        .pairs = p->pairs,
        .ld_pairs = p->pair_stride,
        .activations = p->activations,
        .ld_activations = p->activation_blocks};
    if (stage->norm < 0 && !stage->is_quantized && !stage->is_paired) return inputs;
    const bool is_long = n_rows > 1 && n_rows * (size_t)in->width > FB_OWN_NUMBERS;
    if (n_rows > FB_OWN_ROWS || is_long) {
        struct fb_items items = fb_worker_items(worker, 1, (int64_t)n_rows);
        for (int64_t row; (row = fb_next_item(&items)) >= 0;)
            prepare_row(p, stage, (size_t)row, fb_row_of(p, number, (size_t)row),
                p->pairs + (size_t)row * p->pair_stride, p->activations + (size_t)row * p->activation_blocks);
        fb_barrier_wait(&run->barrier, worker->thread, worker->n_threads);
        return inputs;
    }
    struct fb_activation *activations = (struct fb_activation *)(p->own_inputs +
                                                                 (size_t)worker->thread * p->own_input_bytes);
    float *own = (float *)(activations + FB_OWN_ROWS * p->activation_blocks);
    uint16_t *pairs = (uint16_t *)(p->own_inputs + ((size_t)worker->thread + 1) * p->own_input_bytes) -
                      FB_OWN_ROWS * p->pair_stride;
    inputs.activations = activations;
    inputs.pairs = pairs;
    if (stage->norm >= 0) inputs.x = own;
    for (size_t row = 0; row < n_rows; row++)
        prepare_row(p, stage, row, stage->norm >= 0 ? own + row * in->stride : in->data + row * in->stride,
            pairs + row * p->pair_stride, activations + row * p->activation_blocks);
    return inputs;
}

static struct fb_linear linear_of(
    struct fb_run *run, const struct fb_op *op, const struct inputs *inputs, size_t n_rows) {
    const struct fb_program *p = run->program;
    struct fb_linear linear = {.kernels = p->kernels,
        .weight = op->weight,
        .x = inputs->x,
        .ldx = inputs->ldx,
        .pairs = inputs->pairs,
        .ld_pairs = inputs->ld_pairs,
        .activations = inputs->activations,
        .ld_activations = inputs->ld_activations,
        .bias = op->vector,
        .n_tokens = n_rows,
        .is_gated = fb_op_is(op, FB_GATED),
        .activation = op->activation,
        .numbers = {op->limit},
        .scale = op->scale,
        .soft_cap = fb_op_is(op, FB_LAST) ? op->limit : 0.0f};
    if (op->activation == FB_ACTIVATION_XIELU) memcpy(linear.numbers, op->vector2, sizeof linear.numbers);
    if (fb_op_is(op, FB_LAST)) {
        linear.out = run->logits;
        linear.width = linear.ld_out = (size_t)op->weight->n_rows;
        linear.non_finite = &run->non_finite;
    } else {
        const struct fb_buffer *out = &p->buffers[op->out];
        linear.out = out->data + op->column;
        linear.width = fb_op_is(op, FB_COLUMNS) ? (size_t)op->weight->n_rows : (size_t)out->width;
        linear.ld_out = out->stride;
    }
    if (op->residual >= 0) {
        linear.residual = p->buffers[op->residual].data;
        linear.ld_residual = p->buffers[op->residual].stride;
    }
    return linear;
}

/* Work items are numbered product after product. */
static void run_products(
    struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker, size_t n_rows) {
    const struct inputs inputs = prepare_inputs(run, stage, worker, n_rows);
    struct fb_linear products[FB_MOST_PRODUCTS];
    int64_t ends[FB_MOST_PRODUCTS], n_items = 0;
    for (int32_t o = 0; o < stage->n_ops; o++) {
        products[o] = linear_of(run, &run->program->ops[stage->first_op + o], &inputs, n_rows);
        ends[o] = n_items += fb_linear_items(&products[o], worker->n_threads);
    }
    struct fb_items items = fb_worker_items(worker, 0, n_items);
    for (int64_t i; (i = fb_next_item(&items)) >= 0;) {
        int32_t o = 0;
        while (i >= ends[o])
            o++;
        fb_linear_item(&products[o], o ? i - ends[o - 1] : i);
    }
}

/* The operators of a stage of heads that attention does instead. */
static struct fb_raw_heads raw_heads(const struct fb_program *p, const struct fb_stage *stage) {
    struct fb_raw_heads raw = {0};
    for (int32_t o = 0; o < stage->n_ops; o++) {
        const struct fb_op *op = &p->ops[stage->first_op + o];
        fb_operator_of(op->kind)->defer_head(p, op, &raw);
    }
    return raw;
}

static struct fb_mask mask_of(const struct fb_op *op) {
    return (struct fb_mask){op->window, op->flags & FB_ATTEND_CHUNK, op->flags & FB_ATTEND_ALL};
}

/* Attention of a batch, for one thread; `raw` is not set. */
static struct fb_attention attention_of(const struct fb_run *run, const struct fb_op *op, int thread) {
    struct fb_program *p = run->program;
    const struct fb_buffer *in = &p->buffers[op->in], *out = &p->buffers[op->out];
    const struct fb_heads *heads = &p->shape.heads[op->heads];
    int64_t *offsets = p->offsets + (size_t)thread * 2 * ((size_t)p->shape.max_tokens + 1);
    return (struct fb_attention){.kernels = p->kernels,
        .pool = run->pool,
        .sequences = run->batch->sequences,
        .n_sequences = run->batch->n_sequences,
        .first_row = p->first_row,
        .heads = heads,
        .layer = op->layer,
        .mask = mask_of(op),
        .scale = op->scale,
        .soft_cap = op->limit,
        .sink_logits = op->vector,
        .slopes = op->vector2,
        .rounds_biases = op->flags & FB_ALIBI_BF16,
        .op = op,
        .angles = heads->rope < 0 ? NULL : &p->angles[heads->rope],
        .q = in->data,
        .ldq = in->stride,
        .out = out->data,
        .ld_out = out->stride,
        .scratch = p->attention_scratch,
        .scratch_bytes = p->attention_scratch_bytes,
        .partials = p->partials.memory,
        .n_partials = p->partials.n_bytes / sizeof(float),
        .parts_done = p->parts_done,
        .sharing = p->shares ? p->sharing : NULL,
        .offsets = offsets,
        .partial_offsets = offsets + p->shape.max_tokens + 1};
}

/* Every thread computes the list of work items (tiles or key blocks) for itself: for a few sequences that is
 * cheaper than a barrier. */
static void run_attention(struct fb_run *run, const struct fb_stage *stage, const struct fb_worker *worker) {
    const struct fb_program *p = run->program;
    const bool is_raw = p->is_single && stage[-1].is_of_heads; /* it exists: a program starts with FB_FIRST */
    const struct fb_raw_heads raw = is_raw ? raw_heads(p, stage - 1) : (struct fb_raw_heads){0};
    struct fb_attention attention = attention_of(run, &p->ops[stage->first_op], worker->thread);
    attention.raw = is_raw ? &raw : NULL;
    struct fb_items items = fb_worker_items(worker, 0, fb_attention_items(&attention, worker->n_threads));
    for (int64_t i; (i = fb_next_item(&items)) >= 0;)
        fb_attention_item(&attention, i, worker->thread);
}

enum fb_status fb_program_pin(fb_program *program, const int32_t *cpus, int32_t n_cpus) {
    FB_REQUIRE(program && cpus, "program or cpus is null");
    if (program->device) return fb_fail(FB_UNSUPPORTED, "a program on a device has no threads to bind");
    FB_REQUIRE(n_cpus == program->n_threads, "n_cpus is %d, the program has %d threads", n_cpus, program->n_threads);
    for (int32_t i = 0; i < n_cpus; i++)
        FB_REQUIRE(
            cpus[i] >= 0 && cpus[i] < FB_MOST_CPUS, "cpus[%d] is %d, must be 0 .. %d", i, cpus[i], FB_MOST_CPUS - 1);
    const size_t n = (size_t)n_cpus;
    int32_t *copy = calloc(n, sizeof *copy);
    uintptr_t *pinned = calloc(n, sizeof *pinned);
    if (!copy || !pinned) {
        free(copy);
        free(pinned);
        return fb_fail(FB_OUT_OF_MEMORY, "no memory to bind %d threads", n_cpus);
    }
    memcpy(copy, cpus, n * sizeof *copy);
    free(program->cpus);
    free(program->pinned);
    program->cpus = copy;
    program->pinned = pinned;
    return FB_OK;
}

/* Binds this thread unless it was already: a system call takes longer than a comparison. */
static void pin(struct fb_program *p, int thread) {
    const uintptr_t self = (uintptr_t)pthread_self();
    if (p->pinned[thread] == self) return;
    fb_thread_pin(p->cpus[thread]);
    p->pinned[thread] = self;
}

static void run_stages(struct fb_run *run, int thread, int n_threads) {
    const struct fb_program *p = run->program;
    for (int32_t s = 0; s < p->n_stages; s++) {
        const struct fb_stage *stage = &p->stages[s];
        const size_t n_rows = (size_t)(stage->per_output ? run->batch->n_outputs : run->batch->n_tokens);
        const struct fb_worker worker = {&p->counters[2 * s * n_threads], thread, n_threads};
        if (n_rows == 0) break; /* no logits are wanted: the rest of the program computes only outputs */
        if (p->is_single && stage->is_of_heads) continue;
        if (stage->is_router && n_rows <= FB_OWN_ROWS) continue;
        if (stage->kind == FB_STAGE_ROWS)
            run_rows(run, stage, &worker, n_rows);
        else if (stage->kind == FB_STAGE_LINEAR)
            run_products(run, stage, &worker, n_rows);
        else if (stage->kind == FB_STAGE_EXPERTS)
            fb_run_experts(run, stage, &worker, n_rows);
        else if (stage->kind == FB_STAGE_HEADS)
            fb_run_heads(run, stage, &worker, n_rows);
        else if (stage->kind == FB_STAGE_STATES)
            fb_run_states(run, stage, &worker);
        else
            run_attention(run, stage, &worker);
        if (s + 1 < p->n_stages) fb_barrier_wait(&run->barrier, thread, n_threads);
    }
}

/* Multiply-adds below which one thread is as fast as many: about 5 us of work, as long as a step's barriers
 * take. It also keeps a tiny model from waiting for a second thread that a busy machine does not schedule. */
enum { ALONE_BELOW = 250000 };

/* Up to so many tokens per step, stages are so short that one preempted thread costs more than it
 * contributes. */
enum { SHORT_STAGES = 32 };

/* Number of threads for a batch; results do not depend on it. */
static int threads_for(const struct fb_program *p, const struct fb_batch *batch, int64_t now_ns) {
    int64_t work = 0;
    for (int32_t i = 0; i < p->n_ops && work < ALONE_BELOW; i++) {
        const struct fb_op *op = &p->ops[i];
        const struct fb_operator *kind = fb_operator_of(op->kind);
        if (kind->work) work += kind->work(p, op, batch);
    }
    if (work < ALONE_BELOW) return 1;
    return batch->n_tokens <= SHORT_STAGES ? fb_team_size(&p->team, p->n_threads, now_ns) : p->n_threads;
}

/* Allocates memory for the partial results of attention, if the step is worth splitting. If memory is
 * refused, attention is not split, which is slower and gives the same bits. */
static void grow_partials(struct fb_run *run, int n_threads) {
    struct fb_program *p = run->program;
    size_t most = 0;
    const struct fb_op *before = NULL; /* most layers have the same shape as the one before them */
    for (int32_t s = 0; s < p->n_stages; s++) {
        const struct fb_op *op = &p->ops[p->stages[s].first_op];
        if (p->stages[s].kind != FB_STAGE_ATTENTION) continue;
        if (before && before->window == op->window && before->flags == op->flags && before->heads == op->heads)
            continue;
        before = op;
        const struct fb_attention attention = attention_of(run, op, 0);
        const size_t n = fb_attention_partials(&attention, n_threads);
        most = n > most ? n : most;
    }
    const size_t n_bytes = (most + most / 4) * sizeof(float);
    if (most * sizeof(float) <= p->partials.n_bytes) return;
    void *memory = fb_memory_allocate(n_bytes);
    if (!memory) return;
    fb_memory_release(p->partials.memory, p->partials.n_bytes);
    p->partials = (struct fb_scratch){memory, n_bytes};
}

/* Fills the per-token tables that every stage reads. */
static void lay_out(struct fb_run *run, int n_threads) {
    struct fb_program *p = run->program;
    const struct fb_batch *batch = run->batch;
    int32_t row = 0;
    p->is_single = true;
    for (int32_t s = 0; s < batch->n_sequences; s++) {
        p->first_row[s] = row;
        p->is_single = p->is_single && batch->sequences[s].n_tokens == 1;
        for (int32_t i = 0; i < batch->sequences[s].n_tokens; i++, row++) {
            p->positions[row] = batch->sequences[s].n_past + i;
            p->owners[row] = s;
        }
    }
    p->shares = fb_find_sharing(batch->sequences, batch->n_sequences, p->most_members, p->sharing);
    grow_partials(run, n_threads);
    memset(p->counters, 0, 2 * (size_t)p->n_stages * (size_t)n_threads * sizeof *p->counters);
}

enum fb_status fb_program_run(
    fb_program *program, fb_page_pool *pool, const struct fb_batch *batch, float *logits, size_t n_logits) {
    FB_REQUIRE(program && pool && batch && (logits || n_logits == 0), "program, pool, batch or logits is null");
    if (program->device)
        return fb_program_run_on_device(program, pool, batch, &(struct fb_results){.logits = logits}, n_logits);
    FB_TRY(fb_check_pool(program, pool));
    FB_TRY(fb_check_batch(program, pool, batch, n_logits));
    struct fb_run run = {
        .program = program, .batch = batch, .pool = pool, .logits = logits, .barrier.groups = program->barrier_groups};
    const int64_t start = fb_now_ns();
    const int n_threads = threads_for(program, batch, start);
    lay_out(&run, n_threads);
#pragma omp parallel num_threads(n_threads) if (n_threads > 1)
    {
        const fb_float_mode mode = fb_float_mode_enter();
        if (program->cpus) pin(program, omp_get_thread_num());
        run_stages(&run, omp_get_thread_num(), omp_get_num_threads());
        fb_float_mode_leave(mode);
        if (omp_get_thread_num() == 0) run.left_ns = fb_now_ns();
    }
    if (batch->n_tokens <= SHORT_STAGES && n_threads > 1) {
        const int64_t end = fb_now_ns(), waited = atomic_load(&run.barrier.lost_ns) / (n_threads - 1);
        fb_team_learn(&program->team, program->n_threads, n_threads, end, end - start, waited + end - run.left_ns);
    }
    if (atomic_load(&run.non_finite))
        return fb_fail(FB_NON_FINITE, "logits hold NaN or infinity: the weights or the input are damaged");
    return FB_OK;
}

enum fb_status fb_program_run_on_device(struct fb_program *p, const fb_page_pool *pool, const struct fb_batch *batch,
    const struct fb_results *results, size_t n_logits) {
    FB_TRY(fb_check_pool(p, pool));
    FB_TRY(fb_check_batch(p, pool, batch, n_logits));
    if (p->parts[0])
        return p->device->kind->group_run(p->device->links, p->parts, pool->parts, p->n_results, batch, results);
    FB_REQUIRE(!p->is_part, "the program is a part of another: only the joined program runs");
    return p->device->kind->program_run(p->on_device, pool, batch, results);
}

enum fb_status fb_program_set_graphs(fb_program *program, bool is_on) {
    FB_REQUIRE(program, "program is null");
    if (!program->on_device) return fb_fail(FB_UNSUPPORTED, "programs on the CPU and on several GPUs have no graphs");
    program->device->kind->program_set_graphs(program->on_device, is_on);
    return FB_OK;
}

enum fb_status fb_program_graph_info(const fb_program *program, struct fb_graph_info *out) {
    FB_REQUIRE(program && out, "program or out is null");
    if (!program->on_device) return fb_fail(FB_UNSUPPORTED, "programs on the CPU and on several GPUs have no graphs");
    program->device->kind->program_graph_info(program->on_device, out);
    out->struct_size = sizeof *out;
    return FB_OK;
}
