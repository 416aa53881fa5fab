/*
 * test_blocks.c - panels of quantized blocks: unpacked to the numbers of the file's blocks, and multiplied by
 * every instruction set with the bits of reference_blocks.c.
 *
 * Blocks are random bytes, so every code and scale occurs, in many tests also NaN and infinite scales.
 * `test_blocks 3` runs 3 seeds instead of 40.
 */
#include "check.h"
#include "kernels/kernels.h"
#include "quant/dequantize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include "emulated/tiles.h"
extern const struct fb_kernels fb_kernels_avx_vnni_emulated, fb_kernels_avx512_amx_emulated;
#endif
#ifdef FABULA_EMULATE_AVX512
extern const struct fb_kernels fb_kernels_avx512_emulated;
#endif

static const enum fb_dtype dtypes[] = {
    FB_Q8_0, FB_Q4_0, FB_Q4_1, FB_Q5_0, FB_Q5_1, FB_Q4_K, FB_Q5_K, FB_Q6_K, FB_Q2_K, FB_Q3_K, FB_IQ4_NL, FB_MXFP4};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes, MOST_COLUMNS = 1024, MOST_PANELS = 5, MOST_TOKENS = 50 };

static uint64_t state;

static uint32_t next_random(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static void *take(size_t n_bytes) {
    void *memory = calloc(1, n_bytes + 1);
    if (!memory) abort();
    return memory;
}

static bool same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
    return true;
}

/* Random blocks; tame ones have scales that are finite and not large. */
static void fill_blocks(enum fb_dtype dtype, char *rows, size_t n_blocks, bool tame) {
    const size_t block_bytes = fb_dtype_block_bytes(dtype);
    for (size_t i = 0; i < n_blocks * block_bytes; i++)
        rows[i] = (char)next_random();
    if (!tame) return;
    for (size_t b = 0; b < n_blocks; b++) {
        char *block = rows + b * block_bytes;
        if (dtype == FB_MXFP4) {
            block[0] = (char)(112 + (uint8_t)block[0] % 32);
            continue;
        }
        char *d = dtype == FB_Q6_K || dtype == FB_Q3_K ? block + block_bytes - 2
                  : dtype == FB_Q2_K                   ? block + block_bytes - 4
                                                       : block;
        d[1] = (char)((d[1] & 0x83) | 0x2C); /* exponent 11 of 31: 2^-4 */
        const bool has_m = dtype == FB_Q4_1 || dtype == FB_Q5_1 || dtype == FB_Q4_K || dtype == FB_Q5_K ||
                           dtype == FB_Q2_K;
        if (has_m) d[3] = (char)((d[3] & 0x83) | 0x2C);
    }
}

static void test_layout(enum fb_dtype dtype, uint64_t seed) {
    state = seed * 7919 + dtype;
    const size_t n_cols = (1 + next_random() % 4) * (size_t)fb_dtype_block_size(dtype);
    const size_t row_bytes = n_cols / (size_t)fb_dtype_block_size(dtype) * fb_dtype_block_bytes(dtype);
    char *rows = take(16 * row_bytes), *panel = take(fb_panel_bytes(dtype, n_cols));
    float *wanted = take(n_cols * sizeof(float)), *got = take(n_cols * sizeof(float));
    const bool tame = seed % 2;
    fill_blocks(dtype, rows, 16 * n_cols / (size_t)fb_dtype_block_size(dtype), tame);
    /* In two calls: some rows first, the others later, in the same lines. */
    const uint32_t mask = next_random();
    int64_t damaged = 0;
    for (int call = 0; call < 2; call++) {
        const char *some[16];
        for (size_t j = 0; j < 16; j++)
            some[j] = (int)((mask >> j) & 1) == call ? rows + j * row_bytes : NULL;
        damaged += fb_pack_panel(dtype, some, 0, n_cols / FB_BLOCK_COLUMNS, panel);
    }
    int64_t damaged_numbers = 0;
    for (size_t j = 0; j < 16; j++) {
        fb_dequantize_row(dtype, rows + j * row_bytes, n_cols, wanted);
        fb_unpack_row(dtype, panel, n_cols, j, got);
        CHECK_AT(same(got, wanted, n_cols), "dtype %d, row %zu, seed %llu", (int)dtype, j, (unsigned long long)seed);
        for (size_t k = 0; k < n_cols; k++)
            damaged_numbers += !isfinite(wanted[k]);
    }
    CHECK_AT((damaged == 0) == (damaged_numbers == 0) && (!tame || damaged == 0), "dtype %d, seed %llu: %lld and %lld",
        (int)dtype, (unsigned long long)seed, (long long)damaged, (long long)damaged_numbers);
    free(rows);
    free(panel);
    free(wanted);
    free(got);
}

static void fill_inputs(float *x, size_t n, bool tame) {
    static const float special[] = {
        0.0f, -0.0f, 1e-40f, -1e-40f, 3.4e38f, INFINITY, -INFINITY, NAN, 1e-30f, 2.5f, 0.5f};
    for (size_t i = 0; i < n; i++) {
        x[i] = ((float)(int32_t)next_random() / 2147483648.0f) * (float)(1 << next_random() % 8);
        if (!tame && next_random() % 64 == 0) x[i] = special[next_random() % (sizeof special / sizeof *special)];
    }
    /* Blocks of zeros, of subnormals, and of halves that round to even. The callers shift some by
     * one number. */
    for (size_t i = 0; i + 32 <= n; i += 32)
        if (next_random() % 8 == 0)
            for (size_t j = 0; j < 32; j++)
                x[i + j] = i % 3 == 0 ? 0.0f : i % 3 == 1 ? j == 1 ? 127.0f : (float)j + 0.5f : 1e-39f;
}

/* A table under test; kernels are NULL where this CPU cannot run them. */
struct table {
    const char *name;
    const struct fb_kernels *kernels;
};

static bool is_tested(const struct table *table) {
    return table->kernels && table->kernels != &fb_kernels_reference;
}

static void test_quantize(const struct table *tables, size_t n_tables, uint64_t seed) {
    state = seed;
    const size_t n_blocks = next_random() % 20;
    float *x = take((n_blocks * 32 + 1) * sizeof *x);
    fill_inputs(x, n_blocks * 32 + 1, seed % 2);
    struct fb_activation *wanted = take(n_blocks * sizeof *wanted), *got = take(n_blocks * sizeof *got);
    fb_kernels_reference.quantize(x + 1, n_blocks, wanted);
    for (size_t i = 0; i < n_tables; i++) {
        if (!is_tested(&tables[i])) continue;
        memset(got, 0, n_blocks * sizeof *got);
        tables[i].kernels->quantize(x + 1, n_blocks, got);
        for (size_t b = 0; b < n_blocks; b++)
            CHECK_AT(memcmp(got[b].codes, wanted[b].codes, 32) == 0 && same(&got[b].scale, &wanted[b].scale, 1) &&
                         same(got[b].sums, wanted[b].sums, 3) &&
                         memcmp(got[b].minus_sums, wanted[b].minus_sums, sizeof got[b].minus_sums) == 0,
                "%s quantize: block %zu, seed %llu", tables[i].name, b, (unsigned long long)seed);
    }
    free(x);
    free(wanted);
    free(got);
}

/* The reference, which is slow, computes each product once for all tables. */
static void test_gemm(const struct table *tables, size_t n_tables, enum fb_dtype dtype, uint64_t seed) {
    state = seed * 104729 + dtype;
    const bool tame = seed % 2;
    const size_t n_cols = (1 + next_random() % (MOST_COLUMNS / 256)) * 256 -
                          (fb_dtype_block_size(dtype) == 32 ? next_random() % 8 * 32 : 0);
    const size_t n_panels = 1 + next_random() % MOST_PANELS;
    const size_t n_tokens = next_random() % 4 ? 1 + next_random() % MOST_TOKENS : 1;
    const size_t ldx = n_cols / 32 + next_random() % 3, ldy = n_panels * 16 + next_random() % 5;
    const size_t panel_bytes = fb_panel_bytes(dtype, n_cols);
    const size_t row_bytes = n_cols / (size_t)fb_dtype_block_size(dtype) * fb_dtype_block_bytes(dtype);
    char *rows = take(16 * row_bytes), *panels = take(n_panels * panel_bytes);
    float *x = take(n_tokens * ldx * 32 * sizeof *x);
    struct fb_activation *activations = take(n_tokens * ldx * sizeof *activations);
    float *wanted = take(n_tokens * ldy * sizeof *wanted), *got = take(n_tokens * ldy * sizeof *got);
    for (size_t p = 0; p < n_panels; p++) {
        fill_blocks(dtype, rows, 16 * n_cols / (size_t)fb_dtype_block_size(dtype), tame);
        const char *all[16];
        for (size_t j = 0; j < 16; j++)
            all[j] = rows + j * row_bytes;
        fb_pack_panel(dtype, all, 0, n_cols / FB_BLOCK_COLUMNS, panels + p * panel_bytes);
    }
    fill_inputs(x, n_tokens * ldx * 32, tame);
    fb_kernels_reference.quantize(x, n_tokens * ldx, activations);
    fb_kernels_reference.gemm_blocks(dtype, panels, n_panels, n_cols, activations, ldx, n_tokens, wanted, ldy);
    for (size_t i = 0; i < n_tables; i++) {
        if (!is_tested(&tables[i])) continue;
        memset(got, 0, n_tokens * ldy * sizeof *got);
        tables[i].kernels->gemm_blocks(dtype, panels, n_panels, n_cols, activations, ldx, n_tokens, got, ldy);
#if defined(__x86_64__)
        CHECK_AT(!emulated_tiles_held(), "%s gemm_blocks: tiles not released, dtype %d", tables[i].name, (int)dtype);
#endif
        CHECK_AT(same(got, wanted, n_tokens * ldy),
            "%s gemm_blocks: dtype %d, %zu panels, k %zu, %zu tokens, seed %llu", tables[i].name, (int)dtype, n_panels,
            n_cols, n_tokens, (unsigned long long)seed);
    }

    /* Against the dequantized numbers: the error is no larger than the rounding of the activations allows. */
    double worst = 0.0;
    float *row = take(n_cols * sizeof *row);
    for (size_t t = 0; tame && t < n_tokens; t++)
        for (size_t j = 0; j < 16; j++) {
            fb_unpack_row(dtype, panels, n_cols, j, row);
            double exact = 0.0, allowed = 1e-6;
            for (size_t i = 0; i < n_cols; i++) {
                const double input = (double)x[t * ldx * 32 + i], weight = (double)row[i];
                exact += weight * input;
                allowed += fabs(weight) * ((double)activations[t * ldx + i / 32].scale * 0.5 + 1e-5 * fabs(input));
            }
            const double error = fabs((double)wanted[t * ldy + j] - exact) / allowed;
            if (error > worst) worst = error;
        }
    CHECK_AT(worst <= 1.0, "dtype %d: %g of the error that rounding allows, seed %llu", (int)dtype, worst,
        (unsigned long long)seed);
    free(row);
    free(rows);
    free(panels);
    free(x);
    free(activations);
    free(wanted);
    free(got);
}

int main(int n_arguments, char **arguments) {
    const uint64_t n_seeds = n_arguments > 1 ? strtoull(arguments[1], NULL, 10) : 40;
    const struct table tables[] = {
#if defined(__x86_64__)
        {"avx2", fb_isa_available(FB_ISA_AVX2) ? &fb_kernels_avx2 : NULL},
        {"avx512", fb_isa_available(FB_ISA_AVX512) ? &fb_kernels_avx512 : NULL},
        {"avx_vnni", fb_isa_available(FB_ISA_AVX_VNNI) ? &fb_kernels_avx_vnni : NULL},
        {"avx_vnni (emulated)", fb_isa_available(FB_ISA_AVX512_VNNI) ? &fb_kernels_avx_vnni_emulated : NULL},
        {"avx512_vnni", fb_isa_available(FB_ISA_AVX512_VNNI) ? &fb_kernels_avx512_vnni : NULL},
        {"avx512_bf16", fb_isa_available(FB_ISA_AVX512_BF16) ? &fb_kernels_avx512_bf16 : NULL},
#ifdef FABULA_AMX
        {"avx512_amx", fb_isa_available(FB_ISA_AVX512_AMX) ? &fb_kernels_avx512_amx : NULL},
#endif
        {"avx512_amx (emulated)", fb_isa_available(FB_ISA_AVX512_BF16) ? &fb_kernels_avx512_amx_emulated : NULL},
#elif defined(__aarch64__)
        {"neon", fb_isa_available(FB_ISA_NEON) ? &fb_kernels_neon : NULL},
        {"neon_dotprod", fb_isa_available(FB_ISA_NEON_DOTPROD) ? &fb_kernels_neon_dotprod : NULL},
        {"neon_i8mm", fb_isa_available(FB_ISA_NEON_I8MM) ? &fb_kernels_neon_i8mm : NULL},
#endif
#ifdef FABULA_EMULATE_AVX512
        {"avx512 (emulated)", fb_isa_available(FB_ISA_AVX2) ? &fb_kernels_avx512_emulated : NULL},
#endif
        {"reference", &fb_kernels_reference},
    };
    for (uint64_t seed = 1; seed <= n_seeds; seed++)
        for (int d = 0; d < N_DTYPES; d++)
            test_layout(dtypes[d], seed);
    enum { TABLES = sizeof tables / sizeof *tables };
    for (uint64_t seed = 1; seed <= n_seeds; seed++) {
        test_quantize(tables, TABLES, seed);
        for (int d = 0; d < N_DTYPES; d++)
            test_gemm(tables, TABLES, dtypes[d], seed);
    }
    for (size_t i = 0; i < TABLES; i++)
        printf(tables[i].kernels ? "tested: %s\n" : "skipped: this CPU lacks %s\n", tables[i].name);
#if defined(__x86_64__)
    CHECK(!fb_isa_available(FB_ISA_AVX512_BF16) || emulated_tile_dots() > 0);
#endif
    return check_result();
}
