/*
 * measure.c - the machine's limits as the engine meets them: memory reads, and multiply-adds in registers.
 *
 * Reads sum 64-byte lines in the widest vectors of the baseline instruction set, which is not the limit at
 * memory speed, and prefetch, as the kernels do. Each thread reads one stream, because several per thread are
 * slower. The multiply-adds are
 * those of the matrix kernels themselves (f32, bf16 pairs and 8-bit integers), on panels that stay in L1, at
 * their best tile size.
 */
#include "fabula_bench.h"

#include "base/device.h"
#include "base/memory.h"
#include "base/status.h"
#include "kernels/kernels.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

uint32_t fb_bench_abi_version(void) {
    return FB_ABI_VERSION;
}

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

enum fb_status fb_measure_copy(fb_device *device, size_t n_bytes, int32_t n_repeats, double *bytes_per_s) {
    FB_TRY(check(n_repeats, 1, bytes_per_s));
    FB_REQUIRE(device, "device is null");
    FB_REQUIRE(n_bytes >= 1 && n_bytes <= (size_t)1 << 40, "n_bytes is %zu, must be 1 .. 2^40", n_bytes);
    const struct fb_device_kind *kind = device->kind;
    void *from, *to;
    FB_TRY(fb_device_allocate(device, "a measurement", n_bytes, &from));
    enum fb_status status = fb_device_allocate(device, "a measurement", n_bytes, &to);
    if (status == FB_OK) {
        status = kind->clear(device->index, from, n_bytes);
        double best = 0.0;
        for (int32_t r = -1; r < n_repeats && status == FB_OK; r++) {
            const double start = now();
            status = kind->copy(device->index, FB_ON_DEVICE, to, from, n_bytes);
            const double speed = 2.0 * (double)n_bytes / (now() - start);
            if (r >= 0 && speed > best) best = speed;
        }
        if (status == FB_OK) *bytes_per_s = best;
        fb_device_release(device, to, n_bytes);
    }
    fb_device_release(device, from, n_bytes);
    return status;
}

/* Lines that a read prefetches ahead of itself. */
enum { READ_AHEAD_LINES = 64 };

/*
 * Sum of n words; n is a multiple of 8. The prefetches are there because one core's demand loads, with the
 * hardware's prefetcher alone, reach a third of what memory gives on some virtual machines. A prefetch
 * behind the end is no fault.
 */
static uint64_t sum_words(const uint64_t *words, size_t n) {
    uint64_t sums[8] = {0};
    for (size_t i = 0; i + 8 <= n; i += 8) {
        __builtin_prefetch((const char *)(words + i) + READ_AHEAD_LINES * FB_LINE, 0, 2);
        for (size_t j = 0; j < 8; j++)
            sums[j] += words[i + j];
    }
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
    uint64_t *memory = fb_memory_allocate(words * sizeof *memory);
    if (!memory) return fb_fail(FB_OUT_OF_MEMORY, "no memory to read (%zu bytes)", n_bytes);
    double times[MAX_REPEATS];
    uint64_t total = 0;
    for (int32_t r = -1; r < n_repeats; r++) { /* run -1 touches the memory and is not timed */
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
    /* `total` is used, so that the compiler cannot drop the reads. */
    *bytes_per_s = total ? (double)(words * sizeof *memory) / median(times, n_repeats) : 0.0;
    return FB_OK;
}

/* Calls a kernel `n_calls` times on data of its own and returns a number that depends on the results. */
typedef float (*measured_calls)(const struct fb_kernels *kernels, size_t n_calls);

/* 12 tokens fill whole tiles for every table except AMX, which needs 32. */
enum { PANELS = 2, TOKENS = 12, TILE_TOKENS = 32 };

/* Operations per second: a multiply and an add for each of the k terms of an output. */
static enum fb_status measure_product(measured_calls calls, size_t n_calls, size_t n_tokens, size_t k,
    int32_t n_repeats, int32_t n_threads, enum fb_isa chosen, double *ops_per_s) {
    const struct fb_kernels *kernels = fb_kernels_of(chosen);
    if (chosen == FB_ISA_REFERENCE) n_calls = 1;
    double times[MAX_REPEATS];
    float total = 0.0f;
    for (int32_t r = -1; r < n_repeats; r++) {
        const double start = now();
#pragma omp parallel num_threads(n_threads) reduction(+ : total)
        total += calls(kernels, n_calls);
        if (r >= 0) times[r] = now() - start;
    }
    const double ops = 2.0 * PANELS * FB_LANES * (double)(k * n_tokens * n_calls) * (double)n_threads;
    *ops_per_s = total > 0.0f ? ops / median(times, n_repeats) : 0.0;
    return FB_OK;
}

enum { FMA_K = 64, PAIRS_K = 128, DOT_K = 256, DOT_BLOCKS = DOT_K / FB_BLOCK_COLUMNS };

/* 8 KiB of panels and 3 KiB of x. */
static float call_fma(const struct fb_kernels *kernels, size_t n_calls) {
    _Alignas(FB_LINE) float panels[PANELS * FMA_K * FB_LANES], x[TOKENS * FMA_K], y[TOKENS * PANELS * FB_LANES] = {0};
    for (size_t i = 0; i < sizeof panels / sizeof *panels; i++)
        panels[i] = 0.5f;
    for (size_t i = 0; i < sizeof x / sizeof *x; i++)
        x[i] = 0.25f;
    for (size_t i = 0; i < n_calls; i++)
        kernels->gemm[FB_F32]((struct fb_panels){panels, PANELS, FMA_K * FB_LANES}, PANELS, FMA_K, x, FMA_K, TOKENS, y,
            PANELS * FB_LANES, false, NULL);
    return y[0];
}

/* 8 KiB of panels and 3 KiB of x. */
static float call_pairs(const struct fb_kernels *kernels, size_t n_calls) {
    _Alignas(FB_LINE) uint16_t panels[PANELS * PAIRS_K * FB_LANES], x[TOKENS * PAIRS_K];
    float y[TOKENS * PANELS * FB_LANES] = {0};
    memset(panels, 0x3c, sizeof panels);
    memset(x, 0x3c, sizeof x);
    for (size_t i = 0; i < n_calls; i++)
        kernels->gemm_pairs((struct fb_panels){panels, PANELS, PAIRS_K * FB_LANES}, PANELS, PAIRS_K, x, PAIRS_K, TOKENS,
            y, PANELS * FB_LANES, false, NULL);
    return y[0];
}

/* 9 KiB of panels with codes and scales above 0, and 6 KiB (12 tokens) or 16 KiB (32 tokens) of activations. */
static float call_dot(const struct fb_kernels *kernels, size_t n_calls, size_t n_tokens) {
    _Alignas(FB_LINE) char panels[PANELS * DOT_BLOCKS * (8 * FB_LINE + 32)];
    _Alignas(FB_LINE) struct fb_activation x[TILE_TOKENS * DOT_BLOCKS];
    float y[TILE_TOKENS * PANELS * FB_LANES] = {0};
    memset(panels, 0x2c, sizeof panels);
    memset(x, 0, sizeof x);
    for (size_t i = 0; i < n_tokens * DOT_BLOCKS; i++) {
        x[i].scale = 1.0f;
        x[i].minus_sums[0] = -(int32_t)FB_BLOCK_COLUMNS;
        memset(x[i].codes, 1, sizeof x[i].codes);
    }
    for (size_t i = 0; i < n_calls; i++)
        kernels->gemm_blocks(FB_Q8_0, panels, PANELS, DOT_K, x, DOT_BLOCKS, n_tokens, y, PANELS * FB_LANES);
    return y[0] != 0.0f;
}

static float call_dot_few(const struct fb_kernels *kernels, size_t n_calls) {
    return call_dot(kernels, n_calls, TOKENS);
}

static float call_dot_tiles(const struct fb_kernels *kernels, size_t n_calls) {
    return call_dot(kernels, n_calls, TILE_TOKENS);
}

enum fb_status fb_measure_fma(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s) {
    FB_TRY(check(n_repeats, n_threads, flops_per_s));
    FB_TRY(fb_isa_resolve(isa, &isa));
    return measure_product(call_fma, 2000, TOKENS, FMA_K, n_repeats, n_threads, isa, flops_per_s);
}

enum fb_status fb_measure_pairs(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *flops_per_s) {
    FB_TRY(check(n_repeats, n_threads, flops_per_s));
    FB_TRY(fb_isa_resolve(isa, &isa));
    return measure_product(call_pairs, 2000, TOKENS, PAIRS_K, n_repeats, n_threads, isa, flops_per_s);
}

enum fb_status fb_measure_dot(int32_t n_repeats, int32_t n_threads, enum fb_isa isa, double *ops_per_s) {
    FB_TRY(check(n_repeats, n_threads, ops_per_s));
    FB_TRY(fb_isa_resolve(isa, &isa));
    if (isa == FB_ISA_AVX512_AMX)
        return measure_product(call_dot_tiles, 500, TILE_TOKENS, DOT_K, n_repeats, n_threads, isa, ops_per_s);
    return measure_product(call_dot_few, 500, TOKENS, DOT_K, n_repeats, n_threads, isa, ops_per_s);
}
