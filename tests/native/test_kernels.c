/*
 * test_kernels.c - every kernel of every instruction set against reference.c, bit for bit.
 *
 * Inputs are random and hostile: odd sizes and remainders, misaligned pointers, zeros of both signs,
 * subnormals, the largest finite numbers, infinities and NaN. Results must have the same bits; if one is NaN
 * the other must be NaN (its payload is free). A failure prints kernel, size and seed. `test_kernels 3` runs
 * 3 seeds instead of 20.
 */
#include "check.h"
#include "kernels/kernels.h"
#include "quant/convert.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
extern const struct fb_kernels fb_kernels_avx_vnni_emulated;
#endif
#ifdef FABULA_EMULATE_AVX512
extern const struct fb_kernels fb_kernels_avx512_emulated;
#endif

enum { MOST = 40000 };
static const char *const dtype_names[] = {"f32", "f16", "bf16"};

static uint64_t state;

static uint32_t next_random(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

/* Includes limits of exp, halves of ln 2 that it must round to even, and NaN whose payload rounding or
 * truncation would lose. */
static float random_float(bool hostile) {
    static const float special[] = {0.0f, -0.0f, 1e-40f, -1e-40f, 3.4e38f, -3.4e38f, INFINITY, -INFINITY, NAN, 1.0f,
        -87.0f, -87.5f, 88.0f, 89.0f, 1e-10f, -1e10f, 5.89175081f, -28.0724602f, -__builtin_nanf("0x3fffff"),
        __builtin_nansf("1")};
    if (hostile && next_random() % 4 == 0) return special[next_random() % (sizeof special / sizeof *special)];
    return ((float)(int32_t)next_random() / 2147483648.0f) * (float)(1 << next_random() % 4);
}

static float *random_floats(size_t n, bool hostile) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; x && i < n; i++)
        x[i] = random_float(hostile);
    if (!x) abort();
    return x;
}

static bool same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
    return true;
}

/* NaN payloads of 16-bit formats are free too, so their f32 values are compared. */
static bool same_halfs(int dtype, const void *a, const void *b, size_t n) {
    float *wide_a = random_floats(n, false), *wide_b = random_floats(n, false);
    fb_kernels_reference.widen[dtype](a, n, wide_a);
    fb_kernels_reference.widen[dtype](b, n, wide_b);
    bool result = same(wide_a, wide_b, n);
    free(wide_a);
    free(wide_b);
    return result;
}

/* A table under test; kernels are NULL where this CPU cannot run them. */
struct table {
    const char *name;
    const struct fb_kernels *kernels;
};

/* The reference, which is slow, computes each product once for all tables. */
static void test_gemm(const struct table *tables, size_t n_tables, uint64_t seed) {
    static const size_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25}, depths[] = {0, 1, 5, 64, 255, 256, 257, 600};
    for (int dtype = 0; dtype < FB_KERNEL_DTYPES; dtype++)
        for (size_t n_panels = 1; n_panels <= 5; n_panels++)
            for (size_t ti = 0; ti < sizeof tokens / sizeof *tokens; ti++) {
                state = seed + n_panels * 131 + ti;
                const size_t n_tokens = tokens[ti], n_k = depths[next_random() % 8], gap = next_random() % 3 * 16;
                const size_t width = 1 + next_random() % 2, held = (n_panels + 1) / 2 * 2;
                const size_t held_k = dtype == FB_BF16 ? (n_k + 1) / 2 * 2 : n_k; /* columns in pairs */
                const size_t stride = held_k * 16 + gap, ldx = n_k + next_random() % 5,
                             ldy = n_panels * 16 + next_random() % 5;
                const bool hostile = next_random() % 4 == 0, accumulate = next_random() % 2;
                float *wide = random_floats(held * stride + 16, hostile);
                char *panels = malloc((held * stride + 16) * 4 + 2);
                char *odd = panels + 2 * (dtype != 0); /* misaligned for vectors, not for elements */
                fb_kernels_reference.narrow[dtype](wide, held * stride, odd);
                const struct fb_panels all = {odd, width, stride};
                float *x = random_floats(n_tokens * ldx + 1, hostile), *before = random_floats(n_tokens * ldy, false);
                float *wanted = malloc(n_tokens * ldy * sizeof *wanted), *y = malloc(n_tokens * ldy * sizeof *y);
                if (!panels || !wanted || !y) abort();
                memcpy(wanted, before, n_tokens * ldy * sizeof *y);
                fb_kernels_reference.gemm[dtype](
                    all, n_panels, n_k, x + 1, ldx, n_tokens, wanted, ldy, accumulate, NULL);
                for (size_t i = 0; i < n_tables; i++) {
                    if (!tables[i].kernels || tables[i].kernels == &fb_kernels_reference) continue;
                    memcpy(y, before, n_tokens * ldy * sizeof *y);
                    tables[i].kernels->gemm[dtype](
                        all, n_panels, n_k, x + 1, ldx, n_tokens, y, ldy, accumulate, hostile ? odd : NULL);
                    CHECK_AT(same(y, wanted, n_tokens * ldy),
                        "%s gemm_%s: %zu panels, width %zu, k %zu, %zu tokens, seed %llu", tables[i].name,
                        dtype_names[dtype], n_panels, width, n_k, n_tokens, (unsigned long long)seed);
                }
                free(wide);
                free(panels);
                free(x);
                free(before);
                free(y);
                free(wanted);
            }
}

/* Numbers below the smallest normal f32 may count as zero, so neither inputs nor products are that small. */
static void test_pairs(const struct table *tables, size_t n_tables, uint64_t seed) {
    static const size_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25, 49, 60},
                        columns[] = {1, 2, 3, 64, 255, 256, 257, 600};
    for (size_t n_panels = 1; n_panels <= 5; n_panels++)
        for (size_t ti = 0; ti < sizeof tokens / sizeof *tokens; ti++) {
            state = seed + n_panels * 257 + ti;
            const size_t n_tokens = tokens[ti], n_cols = columns[next_random() % 8], held = (n_cols + 1) / 2 * 2;
            const size_t ldx = held + next_random() % 3, ldy = n_panels * 16 + next_random() % 5;
            const size_t stride = held * 16 + next_random() % 3 * 32;
            const size_t width = 1 + next_random() % 2, n_held = (n_panels + 1) / 2 * 2;
            const bool hostile = next_random() % 4 == 0, accumulate = next_random() % 2;
            uint16_t *panels = malloc((n_held * stride + 1) * sizeof *panels), *odd = panels + 1;
            uint16_t *x = malloc((n_tokens * ldx + 1) * sizeof *x),
                     *wanted_x = malloc((n_tokens * ldx + 1) * sizeof *x);
            float *before = random_floats(n_tokens * ldy, false), *rows = malloc(n_tokens * n_cols * sizeof *rows);
            float *wanted = malloc(n_tokens * ldy * sizeof *wanted), *y = malloc(n_tokens * ldy * sizeof *y);
            if (!panels || !x || !wanted_x || !rows || !wanted || !y) abort();
            for (size_t i = 0; i < n_held * stride; i++) {
                const float number = random_float(hostile);
                odd[i] = fb_f32_to_bf16(fabsf(number) < 1e-9f ? 0.0f : number);
            }
            for (size_t i = 0; i < n_tokens * n_cols; i++) {
                rows[i] = random_float(hostile);
                if (fabsf(rows[i]) < 1e-9f) rows[i] = 0.0f;
            }
            for (size_t t = 0; t < n_tokens; t++)
                fb_kernels_reference.narrow_pairs(rows + t * n_cols, n_cols, wanted_x + t * ldx);
            memcpy(wanted, before, n_tokens * ldy * sizeof *y);
            const struct fb_panels all = {odd, width, stride};
            fb_kernels_reference.gemm_pairs(
                all, n_panels, n_cols, wanted_x, ldx, n_tokens, wanted, ldy, accumulate, NULL);
            for (size_t i = 0; i < n_tables; i++) {
                const struct fb_kernels *k = tables[i].kernels;
                if (!k || k == &fb_kernels_reference) continue;
                for (size_t t = 0; t < n_tokens; t++) {
                    /* A copy of its own, so that reads past its end are detected. */
                    float *row = malloc(n_cols * sizeof *row);
                    if (!row) abort();
                    memcpy(row, rows + t * n_cols, n_cols * sizeof *row);
                    k->narrow_pairs(row, n_cols, x + t * ldx);
                    CHECK_AT(same_halfs(FB_BF16, x + t * ldx, wanted_x + t * ldx, held),
                        "%s narrow_pairs: n %zu, seed %llu", tables[i].name, n_cols, (unsigned long long)seed);
                    free(row);
                }
                memcpy(y, before, n_tokens * ldy * sizeof *y);
                k->gemm_pairs(all, n_panels, n_cols, x, ldx, n_tokens, y, ldy, accumulate, hostile ? odd : NULL);
                CHECK_AT(same(y, wanted, n_tokens * ldy),
                    "%s gemm_pairs: %zu panels, width %zu, %zu columns, %zu tokens, seed %llu", tables[i].name,
                    n_panels, width, n_cols, n_tokens, (unsigned long long)seed);
            }
            free(panels);
            free(x);
            free(wanted_x);
            free(before);
            free(rows);
            free(wanted);
            free(y);
        }
}

static void test_rest(const struct fb_kernels *k, const char *name, uint64_t seed, size_t n, bool hostile) {
    const struct fb_kernels *ref = &fb_kernels_reference;
    if (n > MOST) abort(); /* also tells the compiler that no product below overflows */
    state = seed * 977 + n;
    float *a = random_floats(n, hostile), *b = random_floats(n, hostile);
    float *c = random_floats(n, false), *d = random_floats(n, false);
    float *got = malloc((2 * n + 1) * sizeof *got), *wanted = malloc((2 * n + 1) * sizeof *wanted);
    if (!got || !wanted) abort();
#define EXPECT(kernel, count)                                                                                          \
    CHECK_AT(same(got, wanted, count), "%s " kernel ": n %zu, %s, seed %llu", name, n, hostile ? "hostile" : "plain",  \
        (unsigned long long)seed)

    ref->rms_norm(a, b, n, 1e-5f, wanted);
    k->rms_norm(a, b, n, 1e-5f, got);
    EXPECT("rms_norm", n);

    if (n) {
        float top = ref->max(a, n), other = k->max(a, n);
        CHECK_AT(top == other, "%s max: n %zu, seed %llu", name, n, (unsigned long long)seed);
    }

    wanted[n] = ref->exp_sum(a, n, 0.7f, 0.3f, wanted);
    got[n] = k->exp_sum(a, n, 0.7f, 0.3f, got);
    EXPECT("exp_sum", n + 1);

    wanted[n] = ref->exp_sum(a, n, 1.0f, 0.0f, wanted); /* the special numbers themselves */
    got[n] = k->exp_sum(a, n, 1.0f, 0.0f, got);
    EXPECT("exp_sum", n + 1);

    memcpy(got, a, n * sizeof *a);
    memcpy(wanted, a, n * sizeof *a);
    ref->scale(wanted, n, 1.7f);
    k->scale(got, n, 1.7f);
    EXPECT("scale", n);

    ref->merge(wanted, 0.4f, b, 0.6f, n);
    k->merge(got, 0.4f, b, 0.6f, n);
    EXPECT("merge", n);

    ref->add(wanted, c, n);
    k->add(got, c, n);
    EXPECT("add", n);

    ref->multiply(wanted, c, n);
    k->multiply(got, c, n);
    EXPECT("multiply", n);

    ref->swiglu(a, b, n, wanted);
    k->swiglu(a, b, n, got);
    EXPECT("swiglu", n);

    memcpy(got, a, n * sizeof *a);
    memcpy(got + n, b, n * sizeof *b);
    memcpy(wanted, got, 2 * n * sizeof *got);
    ref->rotate(wanted, wanted + n, c, d, n);
    k->rotate(got, got + n, c, d, n);
    EXPECT("rotate", 2 * n);

    for (int dtype = 0; dtype < FB_KERNEL_DTYPES; dtype++) {
        ref->narrow[dtype](a, n, wanted);
        k->narrow[dtype](a, n, got);
        CHECK_AT(same_halfs(dtype, got, wanted, n), "%s narrow_%s: n %zu, seed %llu", name, dtype_names[dtype], n,
            (unsigned long long)seed);
        ref->narrow[dtype](a, n, c);
        ref->widen[dtype](c, n, wanted);
        k->widen[dtype](c, n, got);
        EXPECT("widen", n);
    }
#undef EXPECT
    free(a);
    free(b);
    free(c);
    free(d);
    free(got);
    free(wanted);
}

/* The sampler's loops: the same bits everywhere, and as accurate as the C library's in double. */
static void test_vocabulary(const struct fb_kernels *k, const char *name, uint64_t seed, size_t n) {
    enum { FEW = 1000 };
    const struct fb_kernels *ref = &fb_kernels_reference;
    static double x[FEW], other[FEW], got[FEW], wanted[FEW];
    if (n == 0 || n > FEW) return;
    state = seed * 613 + n;
    float *logits = random_floats(n, false), top = 0, same_top = 0;
    if (n > 3) logits[n / 2] = -INFINITY; /* banned */
    CHECK_AT(ref->top_logit(logits, n, &top) && k->top_logit(logits, n, &same_top) && top == same_top,
        "%s top_logit: n %zu", name, n);
    ref->to_double(logits, n, x);
    k->to_double(logits, n, other);
    CHECK_AT(memcmp(x, other, n * sizeof *x) == 0, "%s to_double: n %zu", name, n);
    CHECK_AT(k->highest(x, n) == (double)top, "%s highest: n %zu", name, n);
    ref->exp_weights(x, n, (double)top, wanted);
    k->exp_weights(x, n, (double)top, got);
    CHECK_AT(memcmp(got, wanted, n * sizeof *got) == 0, "%s exp_weights: n %zu", name, n);
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        const double exact = exp(x[i] - (double)top);
        sum += exact;
        CHECK_AT(fabs(got[i] - exact) <= 1e-14 * exact, "%s exp_weights: %g of %g", name, got[i], exact);
    }
    CHECK_AT(k->weight_sum(got, n) == ref->weight_sum(got, n) && fabs(k->weight_sum(got, n) - sum) < 1e-12 * sum,
        "%s weight_sum: n %zu", name, n);
    const double log_sum = k->log_sum_exp(logits, n, top);
    CHECK_AT(log_sum == ref->log_sum_exp(logits, n, top) && fabs(log_sum - log(sum)) < 1e-6, "%s log_sum_exp: n %zu",
        name, n);
    logits[n - 1] = seed % 2 ? NAN : INFINITY;
    CHECK_AT(!k->top_logit(logits, n, &top), "%s top_logit of a damaged one: n %zu", name, n);
    free(logits);
}

/* exp against the C library in double: the polynomial has the accuracy that exp.h states. */
static void test_exp_accuracy(void) {
    double worst = 0.0;
    for (float x = -86.9f; x < 88.0f; x += 0.00137f) {
        float out;
        fb_kernels_reference.exp_sum(&x, 1, 1.0f, 0.0f, &out);
        double error = fabs((double)out / exp((double)x) - 1.0);
        if (error > worst) worst = error;
    }
    CHECK_AT(worst < 2e-7, "exp is off by %g", worst);
}

/* The state before and behind of some tokens, for columns that are no whole blocks, and the results. */
static void test_recurrent(const struct fb_kernels *kernels, const char *name, uint64_t seed, bool hostile) {
    enum { TOKENS = 3, MOST_ROWS = 33, MOST_COLUMNS = 144, LD = 150 };
    static const size_t rows[] = {1, 2, 16, MOST_ROWS}, columns[] = {1, 15, 16, 17, 33, 64, 80, 130};
    const struct fb_kernels *reference = &fb_kernels_reference;
    state = seed * 7919 + 13;
    float *q = random_floats(TOKENS * MOST_ROWS, hostile), *k = random_floats(TOKENS * MOST_ROWS, hostile);
    float *v = random_floats(TOKENS * LD, hostile), *from = random_floats(MOST_ROWS * MOST_COLUMNS, hostile);
    float *gates = random_floats(2 * TOKENS, hostile);
    static float out[2][TOKENS * LD], to[2][MOST_ROWS * MOST_COLUMNS];
    for (size_t r = 0; r < 4; r++)
        for (size_t c = 0; c < 8; c++)
            for (int is_ssm = 0; is_ssm < 2; is_ssm++) {
                const size_t n = columns[c], n_state = (n + 15) / 16 * 16 * rows[r];
                for (int i = 0; i < 2; i++) {
                    memset(out[i], 0, sizeof out[i]);
                    if (i == 1) memcpy(to[i], from, n_state * sizeof **to); /* the reference works in place */
                    const struct fb_delta_rule rule = {
                        q, k, gates, gates + TOKENS, v, out[i], i ? to[i] : from, to[i], LD, LD, TOKENS, rows[r], n};
                    const struct fb_ssm ssm = {k, q, gates, v, out[i], i ? to[i] : from, to[i], gates[TOKENS], rows[r],
                        LD, LD, TOKENS, rows[r], n};
                    const struct fb_kernels *table = i ? reference : kernels;
                    if (is_ssm)
                        table->ssm(&ssm);
                    else
                        table->delta_rule(&rule);
                }
                bool agrees = same(out[0], out[1], TOKENS * LD);
                for (size_t i = 0; i < n_state; i++)
                    if (i / 16 / rows[r] * 16 + i % 16 < n) agrees = agrees && same(&to[0][i], &to[1][i], 1);
                CHECK_AT(agrees, "%s, %s, %zu x %zu, seed %llu", name, is_ssm ? "ssm" : "delta_rule", rows[r], n,
                    (unsigned long long)seed);
            }
    for (size_t n_taps = 1; n_taps <= 5; n_taps++)
        for (size_t n = 0; n <= 67; n++)
            for (int biased = 0; biased < 2; biased++) {
                for (int i = 0; i < 2; i++)
                    (i ? reference : kernels)
                        ->short_conv(v + 1, 68, from + 3, 70, biased ? from : NULL, n_taps, n, out[i]);
                CHECK_AT(same(out[0], out[1], n), "%s, short_conv of %zu taps and %zu columns, seed %llu", name, n_taps,
                    n, (unsigned long long)seed);
            }
    free(q);
    free(k);
    free(v);
    free(from);
    free(gates);
}

int main(int n_arguments, char **arguments) {
    const uint64_t n_seeds = n_arguments > 1 ? strtoull(arguments[1], NULL, 10) : 20;
    static const size_t sizes[] = {0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 255, 1000};
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
    enum { TABLES = sizeof tables / sizeof *tables };
    test_exp_accuracy();
    for (uint64_t seed = 1; seed <= n_seeds; seed++) {
        test_gemm(tables, TABLES, seed);
        test_pairs(tables, TABLES, seed);
        for (size_t i = 0; i < TABLES; i++)
            for (int hostile = 0; tables[i].kernels && hostile < 2; hostile++)
                test_recurrent(tables[i].kernels, tables[i].name, seed, hostile);
        for (size_t i = 0; i < TABLES; i++)
            for (size_t s = 0; tables[i].kernels && s < sizeof sizes / sizeof *sizes; s++) {
                for (int hostile = 0; hostile < 2; hostile++)
                    test_rest(tables[i].kernels, tables[i].name, seed, sizes[s], hostile);
                test_vocabulary(tables[i].kernels, tables[i].name, seed, sizes[s]);
            }
    }
    for (size_t i = 0; i < TABLES; i++)
        printf(tables[i].kernels ? "tested: %s\n" : "skipped: this CPU lacks %s\n", tables[i].name);
    return check_result();
}
