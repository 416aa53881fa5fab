/*
 * measure.c - the machine's limits, measured the way the engine meets them: a stream of reads, and multiply-adds in
 * registers.
 *
 * Reads sum 64-byte lines in the widest vectors the basic instruction set has; at memory speed that is not the limit.
 * A thread reads one stream: side by side several are slower. The multiply-adds are those of the matrix kernels themselves,
 * in f32 and of bytes, on panels that stay in L1, at their best tile.
 */
#include "base/cpu.h"
#include "base/memory.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_REPEATS = 1000, MAX_MEASURE_THREADS = 1024 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, compare_doubles);
    return values[n / 2];
}

static enum fb_status check(int32_t n_repeats, int32_t n_threads, const double *out) {
    FB_REQUIRE(out, "the result pointer is null");
    FB_REQUIRE(n_repeats >= 3 && n_repeats <= MAX_REPEATS, "n_repeats is %d, must be 3 .. %d", n_repeats, MAX_REPEATS);
    FB_REQUIRE(n_threads >= 1 && n_threads <= MAX_MEASURE_THREADS, "n_threads is %d, must be 1 .. %d", n_threads,
        MAX_MEASURE_THREADS);
    return FB_OK;
}

/* Sum of n words (a multiple of 8). */
static uint64_t sum_words(const uint64_t *words, size_t n) {
    uint64_t sums[8] = {0};
    for (size_t i = 0; i + 8 <= n; i += 8)
        for (size_t j = 0; j < 8; j++)
            sums[j] += words[i + j];
    uint64_t sum = 0;
    for (size_t j = 0; j < 8; j++)
        sum += sums[j];
    return sum;
}

enum fb_status fb_measure_read(size_t n_bytes, int32_t n_repeats, int32_t n_threads, double *bytes_per_s) {
    FB_TRY(check(n_repeats, n_threads, bytes_per_s));
    const size_t unit = 4096 * (size_t)n_threads;
    FB_REQUIRE(n_bytes >= unit && n_bytes <= (size_t)1 << 40, "n_bytes is %zu, must be %zu .. 2^40", n_bytes, unit);
    const size_t per_thread = n_bytes / (size_t)n_threads / 2048 * 2048 / sizeof(uint64_t);
    const size_t words = per_thread * (size_t)n_threads;
    uint64_t *memory = fb_memory_take(words * sizeof *memory);
    if (!memory) return fb_fail(FB_OUT_OF_MEMORY, "no memory to read (%zu bytes)", n_bytes);
    double times[MAX_REPEATS];
    uint64_t total = 0;
    for (int32_t r = -1; r < n_repeats; r++) { /* the first pass touches the memory */
        const double start = now();
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
        {
            const size_t mine = (size_t)omp_get_thread_num() % (size_t)n_threads;
            uint64_t *part = memory + mine * per_thread;
            if (r < 0) memset(part, 1, per_thread * sizeof *part);
            total += sum_words(part, per_thread);
        }
        if (r >= 0) times[r] = now() - start;
    }
    fb_memory_release(memory, words * sizeof *memory);
    /* `total` is used, so that the reads cannot be left out. */
    *bytes_per_s = total ? (double)(words * sizeof *memory) / median(times, n_repeats) : 0.0;
    return FB_OK;
}

enum fb_status fb_measure_fma(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s) {
    FB_TRY(check(n_repeats, n_threads, flops_per_s));
    enum fb_isa chosen;
    FB_TRY(fb_isa_resolve(isa, &chosen));
    const fb_gemm_kernel gemm = fb_kernels_of(chosen)->gemm[FB_F32];
    enum { PANELS = 2, K = 64, TOKENS = 12, CALLS = 2000 }; /* 8 KiB of panels and 3 KiB of x: all in L1 */
    const size_t calls = chosen == FB_ISA_REFERENCE ? 1 : CALLS;
    double times[MAX_REPEATS];
    float total = 0.0f;
    for (int32_t r = -1; r < n_repeats; r++) {
        const double start = now();
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
        {
            float panels[PANELS * K * FB_LANES], x[TOKENS * K], y[TOKENS * PANELS * FB_LANES];
            memset(y, 0, sizeof y);
            for (size_t i = 0; i < sizeof panels / sizeof *panels; i++)
                panels[i] = 0.5f;
            for (size_t i = 0; i < sizeof x / sizeof *x; i++)
                x[i] = 0.25f;
            for (size_t i = 0; i < calls; i++)
                gemm(panels, K * FB_LANES, PANELS, K, x, K, TOKENS, y, PANELS * FB_LANES, false, NULL);
            total += y[0];
        }
        if (r >= 0) times[r] = now() - start;
    }
    const double flops = 2.0 * PANELS * FB_LANES * K * TOKENS * (double)calls * (double)n_threads;
    *flops_per_s = total > 0.0f ? flops / median(times, n_repeats) : 0.0;
    return FB_OK;
}

enum fb_status fb_measure_pairs(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s) {
    FB_TRY(check(n_repeats, n_threads, flops_per_s));
    enum fb_isa chosen;
    FB_TRY(fb_isa_resolve(isa, &chosen));
    const fb_gemm_pairs_kernel gemm = fb_kernels_of(chosen)->gemm_pairs;
    enum { PANELS = 2, K = 128, TOKENS = 12, CALLS = 2000 }; /* 8 KiB of panels and 3 KiB of x */
    const size_t calls = chosen == FB_ISA_REFERENCE ? 1 : CALLS;
    double times[MAX_REPEATS];
    float total = 0.0f;
    for (int32_t r = -1; r < n_repeats; r++) {
        const double start = now();
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
        {
            uint16_t panels[PANELS * K * FB_LANES], x[TOKENS * K];
            float y[TOKENS * PANELS * FB_LANES] = {0};
            memset(panels, 0x3c, sizeof panels);
            memset(x, 0x3c, sizeof x);
            for (size_t i = 0; i < calls; i++)
                gemm(panels, K * FB_LANES, PANELS, K, x, K, TOKENS, y, PANELS * FB_LANES, false, NULL);
            total += y[0];
        }
        if (r >= 0) times[r] = now() - start;
    }
    const double flops = 2.0 * PANELS * FB_LANES * K * TOKENS * (double)calls * (double)n_threads;
    *flops_per_s = total > 0.0f ? flops / median(times, n_repeats) : 0.0;
    return FB_OK;
}

enum fb_status fb_measure_dot(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *ops_per_s) {
    FB_TRY(check(n_repeats, n_threads, ops_per_s));
    enum fb_isa chosen;
    FB_TRY(fb_isa_resolve(isa, &chosen));
    const fb_gemm_blocks_kernel gemm = fb_kernels_of(chosen)->gemm_blocks;
    enum { PANELS = 2, K = 256, TOKENS = 12, CALLS = 500, BLOCKS = K / FB_BLOCK_COLUMNS };
    const size_t calls = chosen == FB_ISA_REFERENCE ? 1 : CALLS;
    double times[MAX_REPEATS];
    float total = 0.0f;
    for (int32_t r = -1; r < n_repeats; r++) {
        const double start = now();
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
        {
            /* 9 KiB of panels with codes and scales above 0, and 6 KiB of activations. */
            char panels[PANELS * BLOCKS * (8 * FB_LINE + 32)];
            struct fb_activation x[TOKENS * BLOCKS];
            float y[TOKENS * PANELS * FB_LANES] = {0};
            memset(panels, 0x2c, sizeof panels);
            memset(x, 0, sizeof x);
            for (size_t i = 0; i < TOKENS * BLOCKS; i++) {
                x[i].scale = 1.0f;
                x[i].minus_sums[0] = -(int32_t)FB_BLOCK_COLUMNS;
                memset(x[i].codes, 1, sizeof x[i].codes);
            }
            for (size_t i = 0; i < calls; i++)
                gemm(FB_Q8_0, panels, PANELS, K, x, BLOCKS, TOKENS, y, PANELS * FB_LANES);
            total += y[0] != 0.0f;
        }
        if (r >= 0) times[r] = now() - start;
    }
    const double ops = 2.0 * PANELS * FB_LANES * K * TOKENS * (double)calls * (double)n_threads;
    *ops_per_s = total > 0.0f ? ops / median(times, n_repeats) : 0.0;
    return FB_OK;
}
