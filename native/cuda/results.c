/* results.c - samples on the GPU, and copies tokens and logits to the host. See program.h. */
#include "ops/sample_plan.h"
#include "program.h"

#include <string.h>

enum {
    MOST_SAMPLE_BYTES = 64 << 20, /* of scratch for the rows sampled in parallel, unless one row needs more */
    MOST_SAMPLE_ROWS = 1024       /* per launch */
};

/* Layout, in bytes, of p->plans and p->sampled. */
struct sample_layout {
    size_t changes, n_bytes;          /* plans come first */
    size_t logprobs, n_sampled_bytes; /* tokens come first */
    size_t row_bytes, n_at_once;      /* bytes of scratch per row; rows sampled in parallel */
};

static struct sample_layout sample_layout_of(const struct fb_cuda_program *p, const struct fb_results *results) {
    const size_t n_plans = (size_t)results->n_plans;
    struct sample_layout d = {.row_bytes = fb_cuda_sample_bytes(p->program->shape.vocab_size)};
    d.n_at_once = d.row_bytes < MOST_SAMPLE_BYTES ? MOST_SAMPLE_BYTES / d.row_bytes : 1;
    d.n_at_once = d.n_at_once < MOST_SAMPLE_ROWS ? d.n_at_once : MOST_SAMPLE_ROWS;
    d.n_at_once = d.n_at_once < n_plans ? d.n_at_once : n_plans;
    d.changes = fb_cuda_aligned(n_plans * sizeof *results->plans);
    d.n_bytes = d.changes + (size_t)results->n_changes * sizeof *results->changes;
    d.logprobs = fb_cuda_aligned(n_plans * sizeof(int32_t));
    d.n_sampled_bytes = d.logprobs + n_plans * sizeof(float);
    return d;
}

enum fb_status fb_cuda_reserve_results(
    struct fb_cuda_program *p, int32_t width, int32_t n_rows, const struct fb_results *results) {
    FB_TRY(fb_cuda_enter(p->device->index));
    FB_TRY(fb_cuda_grow(p, &p->outputs, (size_t)n_rows * (size_t)width * sizeof(float), false));
    if (results->n_plans == 0) return FB_OK;
    const struct sample_layout d = sample_layout_of(p, results);
    FB_TRY(fb_cuda_grow(p, &p->plans, d.n_bytes, true));
    FB_TRY(fb_cuda_grow(p, &p->sampled, d.n_sampled_bytes, true));
    return fb_cuda_grow(p, &p->scratch, d.n_at_once * d.row_bytes, false);
}

/* Samples a token for each plan on the GPU and starts copying them to the host. */
static enum fb_status sample(struct fb_cuda_program *p, const float *logits, const struct fb_results *results) {
    const struct sample_layout d = sample_layout_of(p, results);
    memcpy(p->plans.host, results->plans, (size_t)results->n_plans * sizeof *results->plans);
    if (results->n_changes > 0)
        memcpy(p->plans.host + d.changes, results->changes, (size_t)results->n_changes * sizeof *results->changes);
    FB_TRY(fb_cuda_check(cudaMemcpyAsync(p->plans.device, p->plans.host, d.n_bytes, cudaMemcpyHostToDevice, p->stream),
        "copying sampling plans to the GPU"));
    const int32_t vocab_size = p->program->shape.vocab_size;
    const struct fb_cuda_sampling sampling = {.logits = logits,
        .ld_logits = vocab_size,
        .plans = (const struct fb_sample_plan *)(const void *)p->plans.device,
        .changes = (const struct fb_sample_change *)(const void *)(p->plans.device + d.changes),
        .n_plans = results->n_plans,
        .vocab_size = vocab_size,
        .tokens = (int32_t *)(void *)p->sampled.device,
        .logprobs = (float *)(void *)(p->sampled.device + d.logprobs),
        .scratch = p->scratch.device,
        .n_at_once = (int32_t)d.n_at_once};
    FB_TRY(fb_cuda_check(fb_cuda_sample(&sampling, p->stream), "sampling"));
    return fb_cuda_check(
        cudaMemcpyAsync(p->sampled.host, p->sampled.device, d.n_sampled_bytes, cudaMemcpyDeviceToHost, p->stream),
        "copying tokens");
}

/* Copies the logits of rows that are not sampled, each contiguous range in one copy. */
enum fb_status fb_cuda_send_logits(
    struct fb_cuda_program *p, int32_t n_results, int32_t n_rows, const struct fb_results *results) {
    const float *from = (const float *)(const void *)p->outputs.device;
    const size_t width = (size_t)n_results;
    const bool *skipped = results->is_sampled;
    for (int32_t row = 0, end; row < n_rows; row = end) {
        for (end = row + 1; end < n_rows && (!skipped || skipped[end] == skipped[row]); end++)
            continue;
        if (skipped && skipped[row]) continue;
        FB_TRY(fb_cuda_check(cudaMemcpyAsync(results->logits + (size_t)row * width, from + (size_t)row * width,
                                 (size_t)(end - row) * width * sizeof *from, cudaMemcpyDeviceToHost, p->stream),
            "copying logits"));
    }
    return FB_OK;
}

enum fb_status fb_cuda_send_sampled(struct fb_cuda_program *p, const struct fb_results *results) {
    if (results->n_plans > 0) FB_TRY(sample(p, (const float *)(const void *)p->outputs.device, results));
    return fb_cuda_check(
        cudaMemcpyAsync(p->host_non_finite, p->non_finite, sizeof(int32_t), cudaMemcpyDeviceToHost, p->stream),
        "copying a flag");
}

enum fb_status fb_cuda_take_results(const struct fb_cuda_program *p, const struct fb_results *results) {
    if (*p->host_non_finite)
        return fb_fail(FB_NON_FINITE, "logits hold NaN or infinity: the weights or the input are damaged");
    const struct sample_layout d = sample_layout_of(p, results);
    for (int32_t i = 0; i < results->n_plans; i++) {
        const int32_t row = results->plans[i].row;
        results->tokens[row] = ((const int32_t *)(const void *)p->sampled.host)[i];
        results->logprobs[row] = ((const float *)(const void *)(p->sampled.host + d.logprobs))[i];
    }
    return FB_OK;
}
