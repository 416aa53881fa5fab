/*
 * exp.h - the constants of exp(x), shared by every instruction set and every device so that all give the same
 * bits. In f32:
 *
 *     n = round(x / ln 2),  r = x - n ln 2 (in two steps, |r| <= ln 2 / 2),  exp(x) = 2^n (1 + r + r^2 p(r))
 *
 * p is Cephes' degree-5 polynomial for expf (Moshier, netlib cephes/single); relative error below 2e-7 on the
 * whole range. Below FB_EXP_LOW the result is 0, above FB_EXP_HIGH x is replaced by FB_EXP_HIGH, so 2^n never
 * leaves the normal range. Comparisons are written so that NaN passes both limits and the result is NaN.
 *
 * In f64, for x <= 0 and the sampler only, Cephes' rational form (Moshier, netlib cephes/double/exp.c),
 * relative error about 2e-16:
 *
 *     p = r (P0 r^4 + P1 r^2 + 1),  q = Q0 r^6 + Q1 r^4 + Q2 r^2 + 2,  exp(x) = 2^n (1 + 2 p / (q - p))
 *
 * 0 below FB_EXP64_LOW: e^-700 is 1e-304, close to where doubles become subnormal.
 */
#ifndef FABULA_KERNELS_EXP_H
#define FABULA_KERNELS_EXP_H

#define FB_EXP_LOW    -87.0f
#define FB_EXP_HIGH   88.0f
#define FB_EXP_LOG2E  1.44269504088896341f
#define FB_EXP_LN2_HI 0.693359375f    /* few bits, so n * LN2_HI is exact */
#define FB_EXP_LN2_LO -2.12194440e-4f /* ln 2 - LN2_HI */
#define FB_EXP_P0     1.9875691500e-4f
#define FB_EXP_P1     1.3981999507e-3f
#define FB_EXP_P2     8.3334519073e-3f
#define FB_EXP_P3     4.1665795894e-2f
#define FB_EXP_P4     1.6666665459e-1f
#define FB_EXP_P5     5.0000001201e-1f

/* Adding and subtracting these rounds to an integer, which the low bits of the sum hold. */
#define FB_EXP_ROUND   12582912.0f        /* 1.5 x 2^23 */
#define FB_EXP64_ROUND 6755399441055744.0 /* 1.5 x 2^52 */

#define FB_EXP64_LOW    (-700.0)
#define FB_EXP64_LOG2E  1.4426950408889634073599
#define FB_EXP64_LN2_HI 6.93145751953125e-1
#define FB_EXP64_LN2_LO 1.42860682030941723212e-6
#define FB_EXP64_P0     1.26177193074810590878e-4
#define FB_EXP64_P1     3.02994407707441961300e-2
#define FB_EXP64_Q0     3.00198505138664455042e-6
#define FB_EXP64_Q1     2.52448340349684104192e-3
#define FB_EXP64_Q2     2.27265548208155028766e-1

#endif
