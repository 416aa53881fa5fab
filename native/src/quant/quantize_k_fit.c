/*
 * quantize_k_fit.c - fits a block of 256 for the K formats. See quantize_k.h and quantize_fit.h.
 *
 * Three steps. Each sub-block finds its own best scale and min. The largest of each gives the units of the
 * whole block (d, dmin), rounded to f16. Then scales, mins and levels are chosen together: rounding a scale
 * to 4 or 6 bits can cost more than rounding the weights did, so every sub-block tries the neighbors of its
 * rounded scale and min; after that d and dmin are fitted again to the whole block by least squares, as long
 * as the error falls.
 *
 * Weights say which errors count: large numbers contribute to large products. ggml weighs by x^2 in q3_k and
 * q6_k, by |x| in q2_k and by sqrt(mean x^2) + |x| in q4_k and q5_k (ggml-quants.c, without an importance
 * matrix). Alone, x^2 and |x| leave small numbers unconstrained. With a share of their mean added, the plain
 * and the |x|-weighted error are below those of ggml on normal, heavy-tailed and real rows
 * (tests/test_quantize.py checks the plain one), and the x^2-weighted one is below or, for q2_k on heavy
 * tails, equal.
 *
 * Everything is computed on x / 2^e with the largest magnitude in [1, 2), so no square over- or underflows.
 */
#include "quant/quantize_k.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "quant/convert.h"
#include "quant/quantize.h"
#include "quant/quantize_fit.h"

enum { ROUNDS = 2 /* of refitting d and dmin; a third lowers the error by less than 0.1 % */ };

/* Parameters of a format, constants that the fits are specialized by. */
struct affine_format {
    int n_sub, n; /* sub-blocks, elements per sub-block */
    float hi;     /* largest level */
    float most;   /* largest scale and min */
    float first, step;
    int n_steps;
    float mean_weight; /* w = mean_weight * sqrt(mean x^2) + |x| */
};

struct symmetric_format {
    int n_sub, n;
    float lo, hi;
    float scale_lo, scale_hi;
    float first, step;
    int n_steps;
};

struct block {
    float x[256], w[256]; /* x / 2^exponent */
    int exponent;
    float d, dmin; /* as they will be dequantized, divided by 2^exponent */
    float scale[16], min[16], levels[256];
    float error;
};

/* Brings x into range. Returns 0 for a block that is zero at every f16 scale, 1 for a block to fit, -1 for
 * one too large. An f16 ranges from 2^-24 to 2^16, a scale times a level up to 2^12. */
static int normalize(const float *x, struct block *block) {
    float largest = 0.0f;
    for (int j = 0; j < 256; j++)
        largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
    if (largest < 0x1p-40f) return 0;
    if (largest > 0x1p40f) return -1;
    block->exponent = ilogbf(largest);
    const float factor = ldexpf(1.0f, -block->exponent);
    for (int j = 0; j < 256; j++)
        block->x[j] = x[j] * factor;
    return 1;
}

/* Rounds d * 2^exponent to f16; *read is the value that will be dequantized, divided by 2^exponent. A scale
 * below the smallest f16 is raised to it, because sub-blocks can choose larger scales. */
static uint16_t to_half(float d, int exponent, float *read) {
    uint16_t half = fb_f32_to_f16(ldexpf(d, exponent));
    if ((half & 0x7FFF) == 0 && d != 0.0f) half |= 1;
    *read = ldexpf(fb_f16_to_f32(half), -exponent);
    return half;
}

FB_INLINE float clamp(float value, float lo, float hi) {
    return value < lo ? lo : value > hi ? hi : value;
}

static bool store(const struct block *block, bool affine, struct fb_k_block *out) {
    float read;
    out->d = to_half(block->d, block->exponent, &read);
    out->dmin = affine ? to_half(block->dmin, block->exponent, &read) : 0;
    if (((out->d & 0x7C00) == 0x7C00) || ((out->dmin & 0x7C00) == 0x7C00)) return false;
    for (int s = 0; s < 16; s++) {
        out->scale[s] = (int8_t)block->scale[s];
        out->min[s] = (int8_t)block->min[s];
    }
    for (int j = 0; j < 256; j++)
        out->q[j] = (int8_t)block->levels[j];
    return true;
}

/* ---- Affine ------------------------------------------------------------------------------------------------------ */

/* Chooses scale, min and levels of each sub-block for block->d and dmin: the best of the nine combinations
 * around scale[s] and min[s]. Sets block->error. */
FB_INLINE void choose_affine(const struct affine_format *f, struct block *block) {
    block->error = 0.0f;
    for (int s = 0; s < f->n_sub; s++) {
        const float *x = block->x + s * f->n, *w = block->w + s * f->n;
        const float scale0 = block->scale[s], min0 = block->min[s];
        float best = FLT_MAX;
        for (int i = 0; i < 9; i++) {
            const float scale = scale0 + (float)(i / 3 - 1), min = min0 + (float)(i % 3 - 1);
            if (scale < 0.0f || scale > f->most || min < 0.0f || min > f->most) continue;
            const float d = block->d * scale, m = -(block->dmin * min);
            float levels[FB_FIT_MAX];
            fb_levels(f->n, x, m, d > 0.0f ? 1.0f / d : 0.0f, 0.0f, f->hi, levels);
            const float error = fb_fit_error(f->n, x, w, levels, d, m);
            if (error < best) {
                best = error;
                block->scale[s] = scale;
                block->min[s] = min;
                memcpy(block->levels + s * f->n, levels, (size_t)f->n * sizeof(float));
            }
        }
        block->error += best;
    }
}

/* d and dmin of least squares for the current scales, mins and levels:
 *     minimize  sum w (x - d a + dmin b)^2,   a = scale q,  b = min */
FB_INLINE void refit_affine(const struct affine_format *f, const struct block *block, float *d, float *dmin) {
    float aa = 0.0f, ab = 0.0f, bb = 0.0f, ax = 0.0f, bx = 0.0f;
    for (int s = 0; s < f->n_sub; s++) {
        const float *x = block->x + s * f->n, *w = block->w + s * f->n, *levels = block->levels + s * f->n;
        const float scale = block->scale[s], min = block->min[s];
        aa += scale * scale * fb_dot3(f->n, w, levels, levels);
        ab += scale * min * fb_dot(f->n, w, levels);
        bb += min * min * fb_sum(f->n, w);
        ax += scale * fb_dot3(f->n, w, x, levels);
        bx += min * fb_dot(f->n, w, x);
    }
    const float determinant = aa * bb - ab * ab;
    *d = block->d;
    *dmin = block->dmin;
    if (determinant > 0.0f && bb > 0.0f) {
        *d = (ax * bb - ab * bx) / determinant;
        *dmin = (ab * ax - aa * bx) / determinant;
    } else if (aa > 0.0f) {
        *d = ax / aa;
    }
}

FB_INLINE bool fit_affine(const struct affine_format *f, const float *source, struct fb_k_block *out) {
    struct block block = {0};
    const int kind = normalize(source, &block);
    if (kind < 0) return false;
    if (kind == 0) return store(&block, true, out);
    float scale[16], min[16], most_scale = 0.0f, most_min = 0.0f;
    for (int s = 0; s < f->n_sub; s++) {
        float *x = block.x + s * f->n, *w = block.w + s * f->n;
        const float mean = f->mean_weight * sqrtf(fb_dot(f->n, x, x) / (float)f->n);
        for (int j = 0; j < f->n; j++)
            w[j] = mean + fabsf(x[j]);
        float offset;
        scale[s] = fb_fit_affine(f->n, x, w, f->hi, f->first, f->step, f->n_steps, &offset);
        min[s] = -offset;
        most_scale = scale[s] > most_scale ? scale[s] : most_scale;
        most_min = min[s] > most_min ? min[s] : most_min;
    }
    to_half(most_scale / f->most, block.exponent, &block.d);
    to_half(most_min / f->most, block.exponent, &block.dmin);
    for (int s = 0; s < f->n_sub; s++) {
        block.scale[s] = block.d > 0.0f ? fb_nearest(clamp(scale[s] / block.d, 0.0f, f->most)) : 0.0f;
        block.min[s] = block.dmin > 0.0f ? fb_nearest(clamp(min[s] / block.dmin, 0.0f, f->most)) : 0.0f;
    }
    choose_affine(f, &block);
    for (int round = 0; round < ROUNDS; round++) {
        struct block next = block;
        float d, dmin;
        refit_affine(f, &block, &d, &dmin);
        if (!(d > 0.0f) || !(dmin >= 0.0f)) break;
        to_half(d, block.exponent, &next.d);
        to_half(dmin, block.exponent, &next.dmin);
        choose_affine(f, &next);
        if (!(next.error < block.error)) break;
        block = next;
    }
    return store(&block, true, out);
}

bool fb_fit_q2_k(const float *x, struct fb_k_block *out) {
    static const struct affine_format format = {16, 16, 3.0f, 15.0f, -0.5f, 0.1f, 16, 0.2f};
    return fit_affine(&format, x, out);
}

bool fb_fit_q4_k(const float *x, struct fb_k_block *out) {
    static const struct affine_format format = {8, 32, 15.0f, 63.0f, -1.0f, 0.1f, 21, 1.0f};
    return fit_affine(&format, x, out);
}

bool fb_fit_q5_k(const float *x, struct fb_k_block *out) {
    static const struct affine_format format = {8, 32, 31.0f, 63.0f, -1.0f, 0.1f, 21, 1.0f};
    return fit_affine(&format, x, out);
}

/* ---- Symmetric --------------------------------------------------------------------------------------------------- */

/* As choose_affine, with the three scales around scale[s]. */
FB_INLINE void choose_symmetric(const struct symmetric_format *f, struct block *block) {
    block->error = 0.0f;
    for (int s = 0; s < f->n_sub; s++) {
        const float *x = block->x + s * f->n, *w = block->w + s * f->n;
        const float scale0 = block->scale[s];
        float best = FLT_MAX;
        for (int i = -1; i <= 1; i++) {
            const float scale = scale0 + (float)i, d = block->d * scale;
            if (scale < f->scale_lo || scale > f->scale_hi) continue;
            float levels[FB_FIT_MAX];
            fb_levels(f->n, x, 0.0f, d != 0.0f ? 1.0f / d : 0.0f, f->lo, f->hi, levels);
            const float error = fb_fit_error(f->n, x, w, levels, d, 0.0f);
            if (error < best) {
                best = error;
                block->scale[s] = scale;
                memcpy(block->levels + s * f->n, levels, (size_t)f->n * sizeof(float));
            }
        }
        block->error += best;
    }
}

FB_INLINE float refit_symmetric(const struct symmetric_format *f, const struct block *block) {
    float aa = 0.0f, ax = 0.0f;
    for (int s = 0; s < f->n_sub; s++) {
        const float *x = block->x + s * f->n, *w = block->w + s * f->n, *levels = block->levels + s * f->n;
        aa += block->scale[s] * block->scale[s] * fb_dot3(f->n, w, levels, levels);
        ax += block->scale[s] * fb_dot3(f->n, w, x, levels);
    }
    return aa > 0.0f ? ax / aa : block->d;
}

FB_INLINE bool fit_symmetric(const struct symmetric_format *f, const float *source, struct fb_k_block *out) {
    struct block block = {0};
    const int kind = normalize(source, &block);
    if (kind < 0) return false;
    if (kind == 0) return store(&block, false, out);
    float scale[16], extreme = 0.0f;
    for (int s = 0; s < f->n_sub; s++) {
        float *x = block.x + s * f->n, *w = block.w + s * f->n;
        const float mean = fb_dot(f->n, x, x) / (float)f->n;
        for (int j = 0; j < f->n; j++)
            w[j] = mean + x[j] * x[j];
        scale[s] = fb_fit_scale(f->n, x, w, f->lo, f->hi, f->first, f->step, f->n_steps);
        extreme = fabsf(scale[s]) > fabsf(extreme) ? scale[s] : extreme;
    }
    to_half(extreme / f->scale_lo, block.exponent, &block.d);
    for (int s = 0; s < f->n_sub && block.d != 0.0f; s++)
        block.scale[s] = fb_nearest(clamp(scale[s] / block.d, f->scale_lo, f->scale_hi));
    choose_symmetric(f, &block);
    for (int round = 0; round < ROUNDS; round++) {
        struct block next = block;
        to_half(refit_symmetric(f, &block), block.exponent, &next.d);
        choose_symmetric(f, &next);
        if (!(next.error < block.error)) break;
        block = next;
    }
    return store(&block, false, out);
}

bool fb_fit_q3_k(const float *x, struct fb_k_block *out) {
    static const struct symmetric_format format = {16, 16, -4.0f, 3.0f, -32.0f, 31.0f, -1.0f, 0.2f, 11};
    return fit_symmetric(&format, x, out);
}

bool fb_fit_q6_k(const float *x, struct fb_k_block *out) {
    static const struct symmetric_format format = {16, 16, -32.0f, 31.0f, -128.0f, 127.0f, -1.0f, 0.2f, 11};
    return fit_symmetric(&format, x, out);
}
