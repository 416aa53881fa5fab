/*
 * quantize_32.c - the formats with blocks of 32 whose scale follows directly from the block's extremes: q8_0,
 * q4_0, q4_1, q5_0, q5_1.
 *
 * Each uses the scale that maps the extreme to the last level and rounds the rest. The order of products and
 * the rounding of ties are those of ggml's reference quantizers, so files are equal byte by byte. Like there,
 * levels are computed with the scale before it is rounded to f16. Source: quantize_row_q*_ref of
 * ggml-quants.c.
 */
#include "quant/quantize.h"

#include <math.h>

#include "quant/blocks.h"

/* The element of the largest magnitude, with its sign; the first if there are several. */
static float extreme(const float *x) {
    float best = x[0];
    for (int j = 1; j < 32; j++)
        if (fabsf(x[j]) > fabsf(best)) best = x[j];
    return best;
}

static void range(const float *x, float *min, float *max) {
    *min = *max = x[0];
    for (int j = 1; j < 32; j++) {
        *min = x[j] < *min ? x[j] : *min;
        *max = x[j] > *max ? x[j] : *max;
    }
}

/* 1 / d; 0 for a block of zeros and for a d so small that its inverse is infinite (it is 0 in f16). */
static float inverse(float d) {
    return fabsf(d) < 0x1p-126f ? 0.0f : 1.0f / d;
}

/* The level of a number >= 0 that has 0.5 added: halves round up, and levels end at `most`. */
static uint8_t level(float value, int most) {
    const int q = (int)value;
    return (uint8_t)(q > most ? most : q);
}

size_t fb_quantize_q8_0(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q8_0 *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        const float d = fabsf(extreme(src)) / 127.0f, id = inverse(d);
        if (!fb_fits_f16(d)) return i;
        block->d = fb_f32_to_f16(d);
        for (int j = 0; j < 32; j++)
            block->qs[j] = (int8_t)roundf(src[j] * id);
    }
    return n_blocks;
}

size_t fb_quantize_q4_0(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q4_0 *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        const float d = extreme(src) / -8.0f, id = inverse(d);
        if (!fb_fits_f16(d)) return i;
        block->d = fb_f32_to_f16(d);
        for (int j = 0; j < 16; j++) {
            const uint8_t low = level(src[j] * id + 8.5f, 15), high = level(src[j + 16] * id + 8.5f, 15);
            block->qs[j] = (uint8_t)(low | high << 4);
        }
    }
    return n_blocks;
}

size_t fb_quantize_q4_1(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q4_1 *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        float min, max;
        range(src, &min, &max);
        const float d = (max - min) / 15.0f, id = inverse(d);
        if (!fb_fits_f16(d) || !fb_fits_f16(min)) return i;
        block->d = fb_f32_to_f16(d);
        block->m = fb_f32_to_f16(min);
        for (int j = 0; j < 16; j++) {
            const uint8_t low = level((src[j] - min) * id + 0.5f, 15),
                          high = level((src[j + 16] - min) * id + 0.5f, 15);
            block->qs[j] = (uint8_t)(low | high << 4);
        }
    }
    return n_blocks;
}

/* Stores 5-bit levels: the lower four bits in nibbles, the fifth in qh. */
static uint32_t store_5_bits(const uint8_t *q, uint8_t *qs) {
    uint32_t qh = 0;
    for (int j = 0; j < 16; j++)
        qs[j] = (uint8_t)((q[j] & 0xF) | (q[j + 16] & 0xF) << 4);
    for (int j = 0; j < 32; j++)
        qh |= (uint32_t)(q[j] >> 4) << j;
    return qh;
}

size_t fb_quantize_q5_0(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q5_0 *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        const float d = extreme(src) / -16.0f, id = inverse(d);
        if (!fb_fits_f16(d)) return i;
        block->d = fb_f32_to_f16(d);
        uint8_t q[32];
        for (int j = 0; j < 32; j++)
            q[j] = level(src[j] * id + 16.5f, 31);
        block->qh = store_5_bits(q, block->qs);
    }
    return n_blocks;
}

size_t fb_quantize_q5_1(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q5_1 *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 32) {
        float min, max;
        range(src, &min, &max);
        const float d = (max - min) / 31.0f, id = inverse(d);
        if (!fb_fits_f16(d) || !fb_fits_f16(min)) return i;
        block->d = fb_f32_to_f16(d);
        block->m = fb_f32_to_f16(min);
        uint8_t q[32];
        for (int j = 0; j < 32; j++)
            q[j] = level((src[j] - min) * id + 0.5f, 31);
        block->qh = store_5_bits(q, block->qs);
    }
    return n_blocks;
}
