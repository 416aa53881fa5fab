/*
 * exp.h - the constants of exp(x) in f32, shared by every instruction set so that all give the same bits.
 *
 *     n = round(x / ln 2),  r = x - n ln 2 (in two steps, |r| <= ln 2 / 2),  exp(x) = 2^n (1 + r + r^2 p(r))
 *
 * p is Cephes' degree-5 polynomial for expf (Moshier, netlib cephes/single); relative error below 2e-7 on the whole
 * range. Below FB_EXP_LOW the result is 0, above FB_EXP_HIGH x is taken as FB_EXP_HIGH: 2^n then never leaves the
 * normal range. NaN: comparisons are written so that NaN passes through both limits and comes out as NaN.
 */
#ifndef FABULA_KERNELS_EXP_H
#define FABULA_KERNELS_EXP_H

#define FB_EXP_LOW    -87.0f
#define FB_EXP_HIGH   88.0f
#define FB_EXP_LOG2E  1.44269504088896341f
#define FB_EXP_LN2_HI 0.693359375f    /* exact in few bits, so n * LN2_HI is exact */
#define FB_EXP_LN2_LO -2.12194440e-4f /* ln 2 - LN2_HI */
#define FB_EXP_P0     1.9875691500e-4f
#define FB_EXP_P1     1.3981999507e-3f
#define FB_EXP_P2     8.3334519073e-3f
#define FB_EXP_P3     4.1665795894e-2f
#define FB_EXP_P4     1.6666665459e-1f
#define FB_EXP_P5     5.0000001201e-1f

#endif
