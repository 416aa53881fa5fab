/*
 * vocabulary.h - loops over a vocabulary, for the sampler. reference.c and simd.h include it, so one source
 * is compiled for every instruction set. It uses the vector types of GCC and Clang, which are lowered to what
 * the machine has. Lanes are independent and nothing is fused, so results are the same everywhere.
 *
 * Weights are double, because they decide which token is sampled. The sum behind `logprob` adds f32 terms and
 * errs by about 1e-7, the resolution of an f32 result.
 *
 * Defines top_logit, to_double, highest, exp_weights, weight_sum and log_sum_exp (contracts in kernels.h),
 * and VOCABULARY_KERNELS, their entries in the table. Tested by test_kernels for every table, n of 1 .. 1000.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef double d8 __attribute__((vector_size(64)));
typedef uint64_t u8x8 __attribute__((vector_size(64)));
typedef float f16x __attribute__((vector_size(64)));
typedef uint32_t u16x __attribute__((vector_size(64)));

enum { SUM_F32 = 256 }; /* f32 terms summed in 16 lanes before the sum continues in double */

/* out = exp(x - top) for 8 numbers, by exp.h. Below the limit or at -infinity the arithmetic yields garbage,
 * which the mask replaces by 0. */
static inline void exp_of_8(const double *x, double top, double *out) {
    d8 in;
    memcpy(&in, x, sizeof in);
    in -= top;
    const d8 shifted = in * FB_EXP64_LOG2E + FB_EXP64_ROUND, n = shifted - FB_EXP64_ROUND;
    const d8 r = (in - n * FB_EXP64_LN2_HI) - n * FB_EXP64_LN2_LO, rr = r * r;
    const d8 p = r * ((FB_EXP64_P0 * rr + FB_EXP64_P1) * rr + 1.0);
    const d8 q = ((FB_EXP64_Q0 * rr + FB_EXP64_Q1) * rr + FB_EXP64_Q2) * rr + 2.0;
    const d8 e = 1.0 + 2.0 * (p / (q - p));
    const d8 power = (d8)(((u8x8)shifted + 1023) << 52); /* 2^n: the shift drops all bits but the integer */
    const d8 result = (d8)((u8x8)(e * power) & (u8x8)(in >= FB_EXP64_LOW));
    memcpy(out, &result, sizeof result);
}

static void exp_weights(const double *logit, size_t n, double top, double *weight) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        exp_of_8(logit + i, top, weight + i);
    if (i < n) {
        double in[8], out[8];
        for (size_t lane = 0; lane < 8; lane++)
            in[lane] = lane < n - i ? logit[i + lane] : top;
        exp_of_8(in, top, out);
        memcpy(weight + i, out, (n - i) * sizeof *out);
    }
}

/* part += exp(x - top) for 16 numbers <= top, by exp.h. Terms of the polynomial are paired (Estrin), which
 * shortens the dependency chain. */
static inline void add_exp_of_16(const float *x, float top, f16x *part) {
    f16x in;
    memcpy(&in, x, sizeof in);
    in -= top;
    const f16x shifted = in * FB_EXP_LOG2E + FB_EXP_ROUND, n = shifted - FB_EXP_ROUND;
    const f16x r = (in - n * FB_EXP_LN2_HI) - n * FB_EXP_LN2_LO, rr = r * r;
    const f16x p = ((FB_EXP_P0 * r + FB_EXP_P1) * rr + (FB_EXP_P2 * r + FB_EXP_P3)) * rr + (FB_EXP_P4 * r + FB_EXP_P5);
    const f16x e = p * rr + (r + 1.0f);
    const f16x power = (f16x)(((u16x)shifted + 127) << 23);
    *part += (f16x)((u16x)(e * power) & (u16x)(in >= FB_EXP_LOW));
}

static double log_sum_exp(const float *logits, size_t n, float top) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i += SUM_F32) {
        const size_t end = n - i < SUM_F32 ? n : i + SUM_F32;
        f16x part = {0.0f};
        size_t k = i;
        for (; k + 16 <= end; k += 16)
            add_exp_of_16(logits + k, top, &part);
        if (k < end) {
            float padded[16];
            for (size_t lane = 0; lane < 16; lane++)
                padded[lane] = lane < end - k ? logits[k + lane] : -FLT_MAX;
            add_exp_of_16(padded, top, &part);
        }
        double fold[8]; /* folded by halves; GPUs use the same order */
        for (int lane = 0; lane < 8; lane++)
            fold[lane] = (double)part[lane] + (double)part[lane + 8];
        sum += ((fold[0] + fold[1]) + (fold[2] + fold[3])) + ((fold[4] + fold[5]) + (fold[6] + fold[7]));
    }
    return log(sum);
}

static double weight_sum(const double *weight, size_t n) {
    d8 sum = {0.0};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        d8 x;
        memcpy(&x, weight + i, sizeof x);
        sum += x;
    }
    for (size_t lane = 0; i < n; i++, lane++)
        sum[lane] += weight[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

static double highest(const double *x, size_t n) {
    d8 top;
    for (int lane = 0; lane < 8; lane++)
        top[lane] = -INFINITY;
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        d8 in;
        memcpy(&in, x + i, sizeof in);
        const u8x8 is_more = (u8x8)(in > top);
        top = (d8)(((u8x8)in & is_more) | ((u8x8)top & ~is_more));
    }
    for (; i < n; i++)
        top[0] = x[i] > top[0] ? x[i] : top[0];
    for (int lane = 1; lane < 8; lane++)
        top[0] = top[lane] > top[0] ? top[lane] : top[0];
    return top[0];
}

static bool top_logit(const float *logits, size_t n, float *top) {
    f16x best;
    u16x bad = {0};
    for (int lane = 0; lane < 16; lane++)
        best[lane] = -INFINITY;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        f16x in;
        memcpy(&in, logits + i, sizeof in);
        bad |= ~(u16x)(in <= FLT_MAX); /* also true for NaN */
        const u16x is_more = (u16x)(in > best);
        best = (f16x)(((u16x)in & is_more) | ((u16x)best & ~is_more));
    }
    for (; i < n; i++) {
        bad[0] |= !(logits[i] <= FLT_MAX);
        best[0] = logits[i] > best[0] ? logits[i] : best[0];
    }
    uint32_t any = bad[0];
    for (int lane = 1; lane < 16; lane++) {
        any |= bad[lane];
        best[0] = best[lane] > best[0] ? best[lane] : best[0];
    }
    *top = best[0];
    return any == 0;
}

static void to_double(const float *x, size_t n, double *out) {
    for (size_t i = 0; i < n; i++)
        out[i] = (double)x[i];
}

#define VOCABULARY_KERNELS                                                                                             \
    .top_logit = top_logit, .to_double = to_double, .highest = highest, .exp_weights = exp_weights,                    \
    .weight_sum = weight_sum, .log_sum_exp = log_sum_exp
