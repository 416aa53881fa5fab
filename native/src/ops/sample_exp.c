/*
 * sample_exp.c - exponentials over a vocabulary, two or four at a time. See sample.h.
 *
 * Written with the vector types of GCC and Clang, since neither turns the plain loops into SSE2:
 * 49,152 weights take 0.14 ms here and 0.5 ms by libm. Lanes are independent and nothing is fused,
 * so results do not depend on the machine. Weights are double, because they decide which token is
 * drawn; the sum behind `logprob` is of f32 terms and errs by about 1e-7, which is what an f32
 * result can tell.
 */
#include "ops/sample.h"
#include "kernels/exp.h"

#include <math.h>
#include <string.h>

typedef double v2 __attribute__((vector_size(16)));
typedef uint64_t u2 __attribute__((vector_size(16)));
typedef float v4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));

enum { SUM_F32 = 64 }; /* f32 terms added up, 16 in a lane, before their sum goes on in double */

/* Added and taken off again these round to an integer, which then stands in the low bits. */
#define ROUND_F64 0x1.8p52
#define ROUND_F32 0x1.8p23f

/* exp(x) for x <= 0 by Cephes' rational form (Moshier, netlib cephes/double/exp.c), relative error
 * about 2e-16. 0 below -700: e^-700 is 1e-304, close to where doubles lose digits. */
#define EXP_LOW    (-700.0)
#define EXP_LOG2E  1.4426950408889634073599
#define EXP_LN2_HI 6.93145751953125e-1
#define EXP_LN2_LO 1.42860682030941723212e-6

/* Below the limit or at -infinity the arithmetic yields garbage, which the mask turns into 0. */
static inline v2 exp_f64(v2 x) {
    const v2 shifted = x * EXP_LOG2E + ROUND_F64, n = shifted - ROUND_F64;
    const v2 r = (x - n * EXP_LN2_HI) - n * EXP_LN2_LO, rr = r * r;
    const v2 p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 1.0);
    const v2 q = ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr +
                 2.0;
    const v2 e = 1.0 + 2.0 * (p / (q - p));
    const v2 power = (v2)(((u2)shifted + 1023) << 52); /* 2^n: the shift drops all but the integer */
    return (v2)((u2)(e * power) & (u2)(x >= EXP_LOW));
}

void fb_exp_weights(const double *logit, int32_t n, double top, double *weight) {
    int32_t i = 0;
    for (; i + 2 <= n; i += 2) {
        v2 x;
        memcpy(&x, logit + i, sizeof x); /* a plain unaligned load; the size must be a constant for that */
        x = exp_f64(x - top);
        memcpy(weight + i, &x, sizeof x);
    }
    if (i < n) weight[i] = exp_f64((v2){logit[i] - top, 0.0})[0];
}

/* exp(x) for x <= 0 as told in kernels/exp.h. */
/* Terms of the polynomial are paired (Estrin), which shortens the chain of operations that the loop
 * waits for. */
static inline v4 exp_f32(v4 x) {
    const v4 shifted = x * FB_EXP_LOG2E + ROUND_F32, n = shifted - ROUND_F32;
    const v4 r = (x - n * FB_EXP_LN2_HI) - n * FB_EXP_LN2_LO, rr = r * r;
    const v4 p = ((FB_EXP_P0 * r + FB_EXP_P1) * rr + (FB_EXP_P2 * r + FB_EXP_P3)) * rr + (FB_EXP_P4 * r + FB_EXP_P5);
    const v4 e = p * rr + (r + 1.0f);
    const v4 power = (v4)(((u4)shifted + 127) << 23);
    return (v4)((u4)(e * power) & (u4)(x >= FB_EXP_LOW));
}

double fb_log_sum_exp(const float *logits, int32_t n, float top) {
    double sum = 0.0;
    int32_t i = 0;
    while (i + 4 <= n) {
        v4 part = {0.0f, 0.0f, 0.0f, 0.0f};
        for (const int32_t end = n - i < SUM_F32 ? n : i + SUM_F32; i + 4 <= end; i += 4) {
            v4 x;
            memcpy(&x, logits + i, sizeof x);
            part += exp_f32(x - top);
        }
        sum += ((double)part[0] + (double)part[1]) + ((double)part[2] + (double)part[3]);
    }
    for (; i < n; i++)
        sum += (double)exp_f32((v4){logits[i] - top})[0];
    return log(sum);
}
