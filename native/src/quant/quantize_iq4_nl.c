/*
 * quantize_iq4_nl.c - iq4_nl: blocks of 32 with sixteen unevenly spaced levels.
 *
 * The search is that of quantize_fit.h: candidate scales, the nearest levels for each, and the scale of
 * weighted least squares for those. Weights are w = x^2 + mean x^2: see quantize_k_fit.c.
 */
#include "quant/quantize.h"

#include <float.h>
#include <math.h>

#include "quant/blocks.h"
#include "quant/quantize_fit.h"

enum { N_STEPS = 25 };

/* Index and value of the level nearest to each x * inverse. Halfway between two, the lower wins. */
FB_INLINE void nearest_levels(const float *x, float inverse, float *index, float *levels) {
    for (int j = 0; j < 32; j++) {
        const float value = x[j] * inverse;
        index[j] = 0.0f;
        levels[j] = (float)fb_iq4_nl_values[0];
#pragma GCC unroll 15
        for (int k = 1; k < 16; k++) {
            const float middle = 0.5f * (float)(fb_iq4_nl_values[k - 1] + fb_iq4_nl_values[k]);
            index[j] = value > middle ? (float)k : index[j];
            levels[j] = value > middle ? (float)fb_iq4_nl_values[k] : levels[j];
        }
    }
}

static bool try_scale(const float *x, const float *w, float inverse, float *gain, float *scale) {
    float index[32], levels[32];
    nearest_levels(x, inverse, index, levels);
    const float xl = fb_dot3(32, w, x, levels), ll = fb_dot3(32, w, levels, levels);
    if (!(ll > 0.0f) || !(xl * xl > *gain * ll)) return false;
    *gain = xl * xl / ll;
    *scale = xl / ll;
    return true;
}

size_t fb_quantize_iq4_nl(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_iq4_nl *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        float extreme = 0.0f;
        for (int j = 0; j < 32; j++)
            extreme = fabsf(src[j]) > fabsf(extreme) ? src[j] : extreme;
        if (fabsf(extreme) > 0x1p30f) return i;
        /* x is divided by 2^exponent, so that no square over- or underflows. Numbers too small for any f16
         * become zero. */
        const int exponent = fabsf(extreme) < 0x1p-40f ? 40 : ilogbf(extreme);
        const float factor = ldexpf(1.0f, -exponent);
        float x[32], w[32], gain = 0.0f, scale = 0.0f;
        for (int j = 0; j < 32; j++)
            x[j] = src[j] * factor;
        const float mean = fb_dot(32, x, x) / 32.0f;
        for (int j = 0; j < 32; j++)
            w[j] = mean + x[j] * x[j];
        extreme *= factor;
        for (int step = 0; step < N_STEPS && fabsf(extreme) >= 1.0f; step++) {
            const float t = (float)(step - N_STEPS / 2);
            try_scale(x, w, ((float)fb_iq4_nl_values[0] + t) / extreme, &gain, &scale);
            try_scale(x, w, ((float)fb_iq4_nl_values[15] + t) / extreme, &gain, &scale);
        }
        for (int round = 0; round < 4 && scale != 0.0f; round++)
            if (!try_scale(x, w, 1.0f / scale, &gain, &scale)) break;
        const float d = ldexpf(scale, exponent);
        if (!fb_fits_f16(d)) return i;
        block->d = fb_f32_to_f16(d);
        /* No level is 0, so a scale below the smallest f16, 2^-24, is raised to that only where that is
         * nearer than 0. */
        if ((block->d & 0x7FFF) == 0 && fabsf(ldexpf(extreme, exponent)) > 0x1p-21f) block->d |= 1;
        const float read = ldexpf(fb_f16_to_f32(block->d), -exponent);
        float index[32], levels[32];
        nearest_levels(x, read != 0.0f ? 1.0f / read : 0.0f, index, levels);
        for (int j = 0; j < 16; j++)
            block->qs[j] = (uint8_t)((int)index[j] | (int)index[j + 16] << 4);
    }
    return n_blocks;
}
