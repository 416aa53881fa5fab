/*
 * quantize_mxfp4.c - mxfp4: blocks of 32 numbers of E2M1 with a common power of two as scale.
 *
 * The largest magnitude of a block, between 2^k and 2^(k + 1), becomes a level between 4 and 8, or between 8 and 16,
 * where the last level, 12, is the nearest for all above 10. Which of the two scales is better depends on the other
 * numbers, so both are tried and the one with the smaller squared error is taken, the first if they are equal.
 */
#include "quant/quantize.h"

#include <float.h>
#include <math.h>

#include "quant/blocks.h"

/* The largest number of the format, 12 x 2^(252 - 128): a scale above would make it infinite. */
static const float largest = 0x1.8p127f;

/* Codes of the levels nearest to x * inverse, and the squared error in units of the scale. Halfway between two levels
 * the smaller one wins. */
static float nearest_codes(const float *x, float inverse, uint8_t *codes) {
    float error = 0.0f;
    for (int j = 0; j < 32; j++) {
        const float value = fabsf(x[j] * inverse);
        int code = 0;
        float level = 0.0f;
#pragma GCC unroll 7
        for (int k = 1; k < 8; k++) {
            const float middle = 0.5f * (float)(fb_mxfp4_values[k - 1] + fb_mxfp4_values[k]);
            code = value > middle ? k : code;
            level = value > middle ? (float)fb_mxfp4_values[k] : level;
        }
        codes[j] = (uint8_t)(code && x[j] < 0.0f ? code + 8 : code);
        error += (value - level) * (value - level);
    }
    return error;
}

size_t fb_quantize_mxfp4(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_mxfp4 *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        float top = 0.0f, x[32];
        for (int j = 0; j < 32; j++)
            top = fabsf(src[j]) > top ? fabsf(src[j]) : top;
        if (top > largest) return i;
        /* x is divided by 2^exponent, so that no square over- or underflows. Below 2^-125 the smallest scale is that of
         * numbers of 2^-125. */
        const int exponent = top < 0x1p-125f ? -125 : ilogbf(top);
        const float half = ldexpf(1.0f, -(exponent / 2)), rest = ldexpf(1.0f, -(exponent - exponent / 2));
        for (int j = 0; j < 32; j++)
            x[j] = src[j] * half * rest;
        uint8_t fine[32], coarse[32];
        const float fine_error = nearest_codes(x, 8.0f, fine) / 4.0f; /* both in units of the coarse scale */
        const bool is_fine = fine_error <= nearest_codes(x, 4.0f, coarse);
        const uint8_t *codes = is_fine ? fine : coarse;
        block->e = (uint8_t)(exponent + 128 - (is_fine ? 3 : 2));
        for (int j = 0; j < 16; j++)
            block->qs[j] = (uint8_t)(codes[j] | codes[j + 16] << 4);
    }
    return n_blocks;
}
