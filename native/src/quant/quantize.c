/* quantize.c - the checked, threaded entry point to the quantizers of every format. See quantize.h. */
#include "quant/quantize.h"

#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "base/memory.h"
#include "base/status.h"
#include "base/team.h"

enum {
    MAX_DIMENSION = 1 << 30,
    PIECE = 4096 /* elements per work item: whole blocks of every format, 20 us to 1 ms of work */
};

typedef size_t (*quantizer)(const float *src, size_t n_blocks, void *dst);

/* The plain formats have blocks of one element. */
static size_t copy_f32(const float *src, size_t n, void *dst) {
    memcpy(dst, src, n * sizeof(float));
    return n;
}

static size_t narrow_f16(const float *src, size_t n, void *dst) {
    for (size_t i = 0; i < n; i++) {
        const uint16_t half = fb_f32_to_f16(src[i]);
        if ((half & 0x7C00u) == 0x7C00u) return i;
        memcpy((uint8_t *)dst + 2 * i, &half, sizeof half);
    }
    return n;
}

static size_t narrow_bf16(const float *src, size_t n, void *dst) {
    for (size_t i = 0; i < n; i++) {
        const uint16_t half = fb_f32_to_bf16(src[i]);
        if ((half & 0x7F80u) == 0x7F80u) return i;
        memcpy((uint8_t *)dst + 2 * i, &half, sizeof half);
    }
    return n;
}

static const struct {
    quantizer quantize;
    const char *name;
} formats[] = {
    [FB_F32] = {copy_f32, "F32"},
    [FB_F16] = {narrow_f16, "F16"},
    [FB_BF16] = {narrow_bf16, "BF16"},
    [FB_Q4_0] = {fb_quantize_q4_0, "Q4_0"},
    [FB_Q4_1] = {fb_quantize_q4_1, "Q4_1"},
    [FB_Q5_0] = {fb_quantize_q5_0, "Q5_0"},
    [FB_Q5_1] = {fb_quantize_q5_1, "Q5_1"},
    [FB_Q8_0] = {fb_quantize_q8_0, "Q8_0"},
    [FB_Q4_K] = {fb_quantize_q4_k, "Q4_K"},
    [FB_Q5_K] = {fb_quantize_q5_k, "Q5_K"},
    [FB_Q6_K] = {fb_quantize_q6_k, "Q6_K"},
    [FB_Q2_K] = {fb_quantize_q2_k, "Q2_K"},
    [FB_Q3_K] = {fb_quantize_q3_k, "Q3_K"},
    [FB_IQ4_NL] = {fb_quantize_iq4_nl, "IQ4_NL"},
    [FB_MXFP4] = {fb_quantize_mxfp4, "MXFP4"},
};

size_t fb_quantize_blocks(enum fb_dtype dtype, const float *src, size_t n_blocks, void *dst) {
    return formats[dtype].quantize(src, n_blocks, dst);
}

struct quantizing {
    const float *src;
    char *dst;
    size_t n_elements, block_size, block_bytes;
    quantizer quantize;
    atomic_llong refused; /* index of the first element that cannot be quantized; LLONG_MAX for none */
};

/* Keeps the smallest index of all threads, so the error message does not depend on their order. */
static void refuse(struct quantizing *job, size_t index) {
    long long found = (long long)index, before = atomic_load(&job->refused);
    while (found < before && !atomic_compare_exchange_weak(&job->refused, &before, found))
        ;
}

static void quantize_piece(void *context, int64_t index, int thread) {
    (void)thread;
    struct quantizing *job = context;
    const size_t first = (size_t)index * PIECE;
    const size_t left = job->n_elements - first, length = left < PIECE ? left : PIECE;
    const float *src = job->src + first;
    for (size_t i = 0; i < length; i++) {
        if (!isfinite(src[i])) {
            refuse(job, first + i);
            return;
        }
    }
    const size_t n_blocks = length / job->block_size;
    const size_t n_done = job->quantize(src, n_blocks, job->dst + first / job->block_size * job->block_bytes);
    if (n_done < n_blocks) refuse(job, first + n_done * job->block_size);
}

enum fb_status fb_quantize(enum fb_dtype dtype, const float *src, int32_t n_rows, int32_t n_cols, int32_t n_threads,
    void *dst, size_t dst_bytes) {
    const int32_t block_size = fb_dtype_block_size(dtype);
    FB_REQUIRE(block_size > 0, "dtype is %d, must be one of enum fb_dtype", (int)dtype);
    FB_REQUIRE(src && dst, "src or dst is null");
    FB_REQUIRE(n_rows >= 1 && n_rows <= MAX_DIMENSION, "n_rows is %d, must be 1 .. 2^30", n_rows);
    FB_REQUIRE(n_cols >= 1 && n_cols <= MAX_DIMENSION, "n_cols is %d, must be 1 .. 2^30", n_cols);
    FB_REQUIRE(n_threads >= 1, "n_threads is %d, must be 1 or more", n_threads);
    FB_REQUIRE(n_cols % block_size == 0, "rows of %d elements are not whole blocks of %d, as %s needs", n_cols,
        block_size, formats[dtype].name);
    const size_t block_bytes = fb_dtype_block_bytes(dtype), n_elements = (size_t)n_rows * (size_t)n_cols;
    size_t wanted;
    FB_REQUIRE(fb_size_multiply(n_elements / (size_t)block_size, block_bytes, &wanted) && wanted == dst_bytes,
        "dst_bytes is %zu, must be %d rows of %zu", dst_bytes, n_rows, (size_t)(n_cols / block_size) * block_bytes);
    struct quantizing job = {.src = src,
        .dst = dst,
        .n_elements = n_elements,
        .block_size = (size_t)block_size,
        .block_bytes = block_bytes,
        .quantize = formats[dtype].quantize,
        .refused = LLONG_MAX};
    fb_team_run(quantize_piece, &job, (int64_t)((n_elements + PIECE - 1) / PIECE), n_threads);
    const long long refused = atomic_load(&job.refused);
    if (refused == LLONG_MAX) return FB_OK;
    const int row = (int)(refused / n_cols), column = (int)(refused % n_cols);
    if (!isfinite(src[refused]))
        return fb_fail(
            FB_NON_FINITE, "row %d, column %d holds %s", row, column, isnan(src[refused]) ? "NaN" : "infinity");
    if (block_size == 1)
        return fb_fail(FB_NON_FINITE, "row %d, column %d holds %g, which is infinite in %s", row, column,
            (double)src[refused], formats[dtype].name);
    return fb_fail(FB_NON_FINITE, "row %d, columns %d .. %d hold numbers too large for %s%s", row, column,
        column + block_size - 1, formats[dtype].name, dtype == FB_MXFP4 ? "" : ", whose scales are f16");
}
