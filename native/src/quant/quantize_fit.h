/*
 * quantize_fit.h - finds the scale (and offset) with which n small integers approximate n real numbers best.
 *
 * Wanted are d and levels l, lo <= l <= hi, that minimize  E = sum w (x - d l)^2,  or with an offset m  sum w
 * (x - d l - m)^2. Given d, the best levels are the nearest ones; given the levels, the best d is that of
 * weighted least squares,  d = sum w x l / sum w l^2.  Neither alone finds the optimum, and E has many local
 * minima. So a fit tries several scales around the one that maps the extreme to the last level, computes the
 * best d for each one's levels, and starting from the best of all alternates both steps until E no longer
 * falls.
 *
 * All functions are inlined with a constant n (16 or 32), and their loops vectorize without branches. Sums
 * run in four lanes on every machine, so every compiler gives the same bits.
 */
#ifndef FABULA_QUANT_QUANTIZE_FIT_H
#define FABULA_QUANT_QUANTIZE_FIT_H

#include <math.h>

#define FB_INLINE static inline __attribute__((always_inline))

enum { FB_FIT_MAX = 32 };

/* Four floats at any address. Sums run in such lanes, element j in lane j % 4. */
typedef float fb_four __attribute__((vector_size(16), aligned(4), may_alias));

FB_INLINE fb_four fb_at(const float *x) {
    return *(const fb_four *)x;
}

FB_INLINE float fb_fold(fb_four sum) {
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* The nearest integer, ties to even, for |value| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction. */
FB_INLINE float fb_nearest(float value) {
    return (value + 0x1.8p23f) - 0x1.8p23f;
}

/* The levels, lo .. hi, nearest to (x - m) * inverse; integers stored as float. */
FB_INLINE void fb_levels(int n, const float *x, float m, float inverse, float lo, float hi, float *levels) {
    for (int j = 0; j < n; j++) {
        float value = (x[j] - m) * inverse;
        value = value < lo ? lo : value;
        value = value > hi ? hi : value;
        levels[j] = fb_nearest(value);
    }
}

/* sum a, sum a b, sum a b c */
FB_INLINE float fb_sum(int n, const float *a) {
    fb_four sum = {0};
    for (int j = 0; j < n; j += 4)
        sum += fb_at(a + j);
    return fb_fold(sum);
}

FB_INLINE float fb_dot(int n, const float *a, const float *b) {
    fb_four sum = {0};
    for (int j = 0; j < n; j += 4)
        sum += fb_at(a + j) * fb_at(b + j);
    return fb_fold(sum);
}

FB_INLINE float fb_dot3(int n, const float *a, const float *b, const float *c) {
    fb_four sum = {0};
    for (int j = 0; j < n; j += 4)
        sum += fb_at(a + j) * fb_at(b + j) * fb_at(c + j);
    return fb_fold(sum);
}

/* E of the levels with scale d and offset m. */
FB_INLINE float fb_fit_error(int n, const float *x, const float *w, const float *levels, float d, float m) {
    fb_four sum = {0};
    for (int j = 0; j < n; j += 4) {
        const fb_four miss = d * fb_at(levels + j) + m - fb_at(x + j);
        sum += fb_at(w + j) * miss * miss;
    }
    return fb_fold(sum);
}

/* ---- Without an offset ------------------------------------------------------------------------------------------- */

/* Computes the levels nearest under `inverse` and the scale that fits them best. Accepts the scale, and
 * returns 1, if its gain (sum w x l)^2 / sum w l^2, which is how far E falls below that of d = 0, exceeds
 * *gain. */
FB_INLINE int fb_try_scale(
    int n, const float *x, const float *w, float inverse, float lo, float hi, float *gain, float *scale) {
    float levels[FB_FIT_MAX];
    fb_levels(n, x, 0.0f, inverse, lo, hi, levels);
    const float xl = fb_dot3(n, w, x, levels), ll = fb_dot3(n, w, levels, levels);
    if (!(ll > 0.0f) || !(xl * xl > *gain * ll)) return 0;
    *gain = xl * xl / ll;
    *scale = xl / ll;
    return 1;
}

/* Returns the best d for levels lo .. hi, lo < 0 < hi; 0 if x or w are all zero. Candidates map the extreme
 * to lo - t and to hi + t for the n_steps values t = first, first + step, ... */
FB_INLINE float fb_fit_scale(
    int n, const float *x, const float *w, float lo, float hi, float first, float step, int n_steps) {
    float extreme = x[0];
    for (int j = 1; j < n; j++)
        extreme = fabsf(x[j]) > fabsf(extreme) ? x[j] : extreme;
    float gain = 0.0f, scale = 0.0f;
    if (fabsf(extreme) < 0x1p-100f) return 0.0f;
    for (int i = 0; i < n_steps; i++) {
        const float t = first + step * (float)i;
        fb_try_scale(n, x, w, (lo - t) / extreme, lo, hi, &gain, &scale);
        fb_try_scale(n, x, w, (hi + t) / extreme, lo, hi, &gain, &scale);
    }
    for (int i = 0; i < 4 && scale != 0.0f; i++)
        if (!fb_try_scale(n, x, w, 1.0f / scale, lo, hi, &gain, &scale)) break;
    return scale;
}

/* ---- With an offset ---------------------------------------------------------------------------------------------- */

/* As fb_try_scale, for x ~ d l + m with m <= 0 and l = 0 .. hi; accepts d and m if E falls below *error. */
FB_INLINE int fb_try_affine(int n, const float *x, const float *w, float inverse, float from, float hi, float sum_w,
    float sum_x, float *error, float *scale, float *offset) {
    float levels[FB_FIT_MAX];
    fb_levels(n, x, from, inverse, 0.0f, hi, levels);
    const float l = fb_dot(n, w, levels), ll = fb_dot3(n, w, levels, levels), xl = fb_dot3(n, w, x, levels);
    const float determinant = sum_w * ll - l * l;
    if (!(ll > 0.0f)) return 0;
    float d = xl / ll, m = 0.0f;
    if (determinant > 0.0f) { /* otherwise all levels are equal */
        const float free = (ll * sum_x - l * xl) / determinant;
        if (free < 0.0f) { /* the format subtracts its minimum, so m is at most 0, and 0 is best otherwise */
            m = free;
            d = (sum_w * xl - sum_x * l) / determinant;
        }
    }
    const float e = fb_fit_error(n, x, w, levels, d, m);
    if (!(e < *error) || !(d > 0.0f)) return 0;
    *error = e;
    *scale = d;
    *offset = m;
    return 1;
}

/* Returns the best d >= 0, and m <= 0 in *offset. Candidates spread the range of x over hi + t levels, t as
 * in fb_fit_scale. */
FB_INLINE float fb_fit_affine(
    int n, const float *x, const float *w, float hi, float first, float step, int n_steps, float *offset) {
    float min = 0.0f, max = x[0];
    for (int j = 0; j < n; j++) {
        min = x[j] < min ? x[j] : min;
        max = x[j] > max ? x[j] : max;
    }
    float scale = 0.0f;
    *offset = min;
    if (max - min < 0x1p-100f) return 0.0f;
    const float levels[FB_FIT_MAX] = {0};
    const float sum_w = fb_sum(n, w), sum_x = fb_dot(n, w, x);
    float error = fb_fit_error(n, x, w, levels, 0.0f, min);
    for (int i = 0; i < n_steps; i++) {
        const float t = first + step * (float)i;
        fb_try_affine(n, x, w, (hi + t) / (max - min), min, hi, sum_w, sum_x, &error, &scale, offset);
    }
    for (int i = 0; i < 4 && scale > 0.0f; i++)
        if (!fb_try_affine(n, x, w, 1.0f / scale, *offset, hi, sum_w, sum_x, &error, &scale, offset)) break;
    return scale;
}

#endif
