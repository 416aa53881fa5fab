/*
 * group.c - programs of several GPUs that compute one batch together. See program.h.
 *
 * One thread launches the work of all GPUs: on each in turn everything up to the next sum, then, as one group
 * of NCCL calls, the exchange of partial results, then the sums. NCCL only copies: every GPU adds the parts
 * itself, in the order of the GPUs, because the order of a sum by NCCL depends on its size and so on the
 * batch. The rows of the last operator are gathered in the same way and concatenated by the first GPU, which
 * then returns results like a single GPU.
 */
#include "base/status.h"
#include "exchange.h"
#include "program.h"
#include "program/operators.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

struct group {
    struct fb_nccl nccl;
    fb_nccl_comm comms[FB_MOST_MEMBERS];
    int devices[FB_MOST_MEMBERS];
    int32_t n;
    bool is_broken; /* links were aborted: the state of their exchanges is unknown */
};

/* Serializes groups on the same GPUs: two threads could launch exchanges in a different order on each GPU,
 * which would then wait for each other forever. Also protects creating and aborting links, which allocate or
 * free memory while another group may be open. */
static pthread_mutex_t serial = PTHREAD_MUTEX_INITIALIZER;

/* A batch in progress on the programs of a group. */
struct group_run {
    struct group *group;
    struct fb_cuda_program *programs[FB_MOST_MEMBERS];
    struct fb_cuda_step steps[FB_MOST_MEMBERS];
};

static enum fb_status check(const struct group *group, int error, const char *what) {
    if (error == FB_NCCL_SUCCESS) return FB_OK;
    cudaGetLastError(); /* NCCL does not clear CUDA errors */
    return fb_fail(FB_DEVICE_FAILED, "%s: NCCL error %d, %s", what, error, group->nccl.get_error_string(error));
}

/* If launches block until they are done, the first GPU's part of an exchange waits for the others' parts,
 * which are never launched. */
static enum fb_status check_launches(void) {
    const char *value = getenv("CUDA_LAUNCH_BLOCKING");
    if (!value || !*value || strcmp(value, "0") == 0) return FB_OK;
    return fb_fail(FB_UNSUPPORTED,
        "several GPUs would wait for each other forever while CUDA_LAUNCH_BLOCKING is %s: "
        "unset it before the process starts",
        value);
}

enum fb_status fb_cuda_group_open(const int32_t *indices, int32_t n, void **out) {
    FB_TRY(check_launches());
    struct group *group = calloc(1, sizeof *group);
    if (!group) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a group of GPUs");
    group->n = n;
    for (int32_t i = 0; i < n; i++)
        group->devices[i] = indices[i];
    enum fb_status status = fb_nccl_load(&group->nccl);
    if (status == FB_OK) {
        pthread_mutex_lock(&serial);
        status = check(group, group->nccl.comm_init_all(group->comms, n, group->devices), "linking GPUs");
        pthread_mutex_unlock(&serial);
    }
    if (status != FB_OK) {
        free(group);
        return status;
    }
    *out = group;
    return FB_OK;
}

static void release_links(struct group *group) {
    for (int32_t i = 0; i < group->n; i++)
        group->nccl.comm_abort(group->comms[i]);
    group->is_broken = true;
}

void fb_cuda_group_close(void *links) {
    struct group *group = links;
    pthread_mutex_lock(&serial);
    for (int32_t i = 0; i < group->n && !group->is_broken; i++)
        group->nccl.comm_destroy(group->comms[i]);
    pthread_mutex_unlock(&serial);
    free(group);
}

/* Where GPU `part`'s share of the gathered results goes, with those of the others around it. */
static float *gathered(const struct fb_cuda_program *p, int32_t part, size_t part_floats) {
    return (float *)(void *)p->gathered.device + (size_t)part * part_floats;
}

/* Floats per row of a SUM's input. */
static size_t row_floats(const struct fb_cuda_program *p, const struct fb_op *sum) {
    return p->program->buffers[sum->in].stride;
}

/* Reserves memory for the largest gather: of all tokens of a SUM, or of all result rows. */
static enum fb_status reserve_gathered(struct group_run *run, const struct fb_batch *batch) {
    for (int32_t i = 0; i < run->group->n; i++) {
        struct fb_cuda_program *p = run->programs[i];
        size_t most = (size_t)batch->n_outputs * (size_t)p->program->n_results;
        for (int32_t o = 0; o < p->program->n_ops; o++) {
            const struct fb_op *op = &p->program->ops[o];
            const size_t n_floats = fb_op_is(op, FB_SPANS_DEVICES) ? (size_t)batch->n_tokens * row_floats(p, op) : 0;
            most = n_floats > most ? n_floats : most;
        }
        FB_TRY(fb_cuda_enter(p->device->index));
        FB_TRY(fb_cuda_grow(p, &p->gathered, (size_t)run->group->n * most * sizeof(float), false));
    }
    return FB_OK;
}

/* Every GPU receives `part_floats` numbers from each: its own are read from `from`, or are already in place
 * if that is NULL. */
static enum fb_status gather(struct group_run *run, const float *const *from, size_t part_floats) {
    struct group *group = run->group;
    /* No memory may be allocated or freed while only some GPUs have their part: see runtime.h. */
    fb_cuda_lock_memory();
    int error = group->nccl.group_start();
    for (int32_t i = 0; i < group->n && error == FB_NCCL_SUCCESS; i++) {
        struct fb_cuda_program *p = run->programs[i];
        const float *own = from ? from[i] : gathered(p, i, part_floats);
        error = group->nccl.all_gather(
            own, gathered(p, 0, part_floats), part_floats, FB_NCCL_FLOAT32, group->comms[i], p->stream);
    }
    /* Also after a failure, or the next call would belong to this group. */
    const int at_end = group->nccl.group_end();
    fb_cuda_unlock_memory();
    if (error == FB_NCCL_SUCCESS) error = at_end;
    const enum fb_status status = check(group, error, "exchanging results between GPUs");
    if (status != FB_OK) release_links(group);
    return status;
}

static enum fb_status run_sum(struct group_run *run) {
    const float *from[FB_MOST_MEMBERS];
    const struct fb_cuda_step *first = &run->steps[0];
    const int32_t number = first->next_op, n_rows = first->n_rows;
    const size_t ld = row_floats(run->programs[0], &run->programs[0]->program->ops[number]);
    const struct fb_cuda_parts shape = {
        .part_floats = (int64_t)(ld * (size_t)n_rows), .ld = (int64_t)ld, .n_parts = run->group->n};
    for (int32_t i = 0; i < run->group->n; i++) {
        const struct fb_program *program = run->programs[i]->program;
        from[i] = run->programs[i]->arena + program->buffers[program->ops[number].in].offset;
    }
    FB_TRY(gather(run, from, (size_t)shape.part_floats));
    for (int32_t i = 0; i < run->group->n; i++) {
        struct fb_cuda_program *p = run->programs[i];
        const struct fb_buffer *buffers = p->program->buffers;
        const struct fb_op *op = &p->program->ops[number];
        const struct fb_buffer *out = &buffers[op->out], *residual = op->residual >= 0 ? &buffers[op->residual] : NULL;
        struct fb_cuda_parts parts = shape;
        parts.parts = gathered(p, 0, 0);
        FB_TRY(fb_cuda_enter(p->device->index));
        FB_TRY(fb_cuda_check(
            fb_cuda_sum(&parts, n_rows, buffers[op->in].width, residual ? p->arena + residual->offset : NULL,
                residual ? (int64_t)residual->stride : 0, p->arena + out->offset, (int64_t)out->stride, p->stream),
            "sum"));
        run->steps[i].next_op++;
    }
    return FB_OK;
}

/* Gathers the rows of the last operator on the first GPU, as one matrix in its outputs. */
static enum fb_status concatenate(struct group_run *run, int32_t n_rows, int32_t n_results) {
    struct fb_cuda_program *p = run->programs[0];
    if (n_rows == 0) return FB_OK;
    const int64_t share = p->program->n_results;
    const struct fb_cuda_parts parts = {
        .parts = gathered(p, 0, 0), .part_floats = n_rows * share, .ld = share, .n_parts = run->group->n};
    FB_TRY(gather(run, NULL, (size_t)parts.part_floats));
    FB_TRY(fb_cuda_enter(p->device->index));
    return fb_cuda_check(
        fb_cuda_concatenate(&parts, n_rows, n_results, (float *)(void *)p->outputs.device, p->non_finite, p->stream),
        "concatenating results");
}

static enum fb_status run_batch(struct group_run *run, fb_page_pool *const *pools, int32_t n_results,
    const struct fb_batch *batch, const struct fb_results *results) {
    const int32_t n = run->group->n;
    const struct fb_cuda_extent rows = {.n_tokens = batch->n_tokens, .n_outputs = batch->n_outputs};
    FB_TRY(fb_cuda_reserve_results(run->programs[0], n_results, batch->n_outputs, results));
    FB_TRY(reserve_gathered(run, batch));
    for (int32_t i = 0; i < n; i++) {
        struct fb_cuda_program *p = run->programs[i];
        FB_TRY(fb_cuda_begin(p, pools[i], batch, rows, &run->steps[i]));
        run->steps[i].logits = gathered(p, i, (size_t)batch->n_outputs * (size_t)p->program->n_results);
    }
    for (;;) {
        for (int32_t i = 0; i < n; i++)
            FB_TRY(fb_cuda_launch(run->programs[i], &run->steps[i]));
        const struct fb_cuda_step *first = &run->steps[0];
        if (first->n_rows == 0 || first->next_op == run->programs[0]->program->n_ops) break;
        FB_TRY(run_sum(run));
    }
    FB_TRY(concatenate(run, batch->n_outputs, n_results));
    FB_TRY(fb_cuda_enter(run->programs[0]->device->index));
    return fb_cuda_send_sampled(run->programs[0], results);
}

/* Whether a GPU is still busy (*works); returns its error or that of its link. */
static enum fb_status poll(const struct group_run *run, int32_t i, bool *works) {
    const struct group *group = run->group;
    int in_link = FB_NCCL_SUCCESS;
    FB_TRY(fb_cuda_enter(run->programs[i]->device->index));
    const int error = cudaStreamQuery(run->programs[i]->stream);
    if (error == cudaErrorNotReady) {
        cudaGetLastError(); /* not an error, but stored as one */
        *works = true;
    } else {
        FB_TRY(fb_cuda_check(error, "running a batch"));
    }
    FB_TRY(check(group, group->nccl.comm_get_async_error(group->comms[i], &in_link), "checking a link"));
    return in_link == FB_NCCL_IN_PROGRESS ? FB_OK : check(group, in_link, "a link between GPUs");
}

/* Waits until every GPU is done. If one fails, the others would wait for it forever: then links are aborted,
 * which ends their waiting. */
static enum fb_status wait_for_all(struct group_run *run) {
    enum fb_status status = FB_OK;
    for (bool works = true; works && status == FB_OK && !run->group->is_broken; sched_yield()) {
        works = false;
        for (int32_t i = 0; i < run->group->n && status == FB_OK; i++)
            status = poll(run, i, &works);
    }
    if (status != FB_OK) release_links(run->group);
    for (int32_t i = 0; i < run->group->n && run->group->is_broken; i++) {
        cudaSetDevice(run->programs[i]->device->index);
        cudaStreamSynchronize(run->programs[i]->stream);
        cudaGetLastError();
    }
    return status;
}

/* Copies logits after all GPUs are done: earlier, the copy could wait in the driver for work that never ends,
 * and nobody would poll the other GPUs and the links. */
static enum fb_status copy_logits(
    struct group_run *run, int32_t n_results, const struct fb_batch *batch, const struct fb_results *results) {
    struct fb_cuda_program *p = run->programs[0];
    FB_TRY(fb_cuda_enter(p->device->index));
    const enum fb_status status = fb_cuda_send_logits(p, n_results, batch->n_outputs, results);
    const int error = cudaStreamSynchronize(p->stream); /* also after a failure: copies may be in progress */
    FB_TRY(status);
    return fb_cuda_check(error, "copying logits");
}

enum fb_status fb_cuda_group_run(void *links, fb_program *const *parts, fb_page_pool *const *pools, int32_t n_results,
    const struct fb_batch *batch, const struct fb_results *results) {
    struct group_run run = {.group = links};
    if (run.group->is_broken)
        return fb_fail(
            FB_DEVICE_FAILED, "the links between this model's GPUs failed in an earlier batch: load the model again");
    for (int32_t i = 0; i < run.group->n; i++)
        run.programs[i] = parts[i]->on_device;
    pthread_mutex_lock(&serial);
    enum fb_status status = run_batch(&run, pools, n_results, batch, results);
    /* Also after a failure: the next batch overwrites host memory that this one's copies may still read. */
    const enum fb_status at_end = wait_for_all(&run);
    if (status == FB_OK && at_end == FB_OK) status = copy_logits(&run, n_results, batch, results);
    pthread_mutex_unlock(&serial);
    FB_TRY(at_end); /* first, because the message of the other is gone if both failed */
    FB_TRY(status);
    return fb_cuda_take_results(run.programs[0], results);
}
