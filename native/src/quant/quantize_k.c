/* quantize_k.c - packs fitted blocks of 256 into the bit layouts of blocks.h. */
#include <string.h>

#include "quant/blocks.h"
#include "quant/quantize.h"
#include "quant/quantize_k.h"

/* Packs the lower two bits of 256 levels (q2_k, q3_k). */
static void pack_2_bits(const int8_t *q, uint8_t *qs) {
    for (int half = 0; half < 2; half++, q += 128, qs += 32)
        for (int j = 0; j < 32; j++)
            qs[j] = (uint8_t)((q[j] & 3) | (q[j + 32] & 3) << 2 | (q[j + 64] & 3) << 4 | (q[j + 96] & 3) << 6);
}

/* Packs eight 6-bit scales and mins into 12 bytes (q4_k, q5_k). */
static void pack_scales_mins(const int8_t *scale, const int8_t *min, uint8_t *scales) {
    for (int i = 0; i < 4; i++) {
        scales[i] = (uint8_t)(scale[i] | (scale[i + 4] >> 4) << 6);
        scales[i + 4] = (uint8_t)(min[i] | (min[i + 4] >> 4) << 6);
        scales[i + 8] = (uint8_t)((scale[i + 4] & 0xF) | (min[i + 4] & 0xF) << 4);
    }
}

/* Packs lower nibbles: sub-blocks 2 g and 2 g + 1 share 32 bytes. */
static void pack_nibbles(const int8_t *q, uint8_t *qs) {
    for (int g = 0; g < 4; g++, q += 64, qs += 32)
        for (int j = 0; j < 32; j++)
            qs[j] = (uint8_t)((q[j] & 0xF) | (q[j + 32] & 0xF) << 4);
}

size_t fb_quantize_q2_k(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q2_k *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 256) {
        struct fb_k_block fit;
        if (!fb_fit_q2_k(src, &fit)) return i;
        block->d = fit.d;
        block->dmin = fit.dmin;
        for (int s = 0; s < 16; s++)
            block->scales[s] = (uint8_t)(fit.scale[s] | fit.min[s] << 4);
        pack_2_bits(fit.q, block->qs);
    }
    return n_blocks;
}

size_t fb_quantize_q3_k(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q3_k *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 256) {
        struct fb_k_block fit;
        if (!fb_fit_q3_k(src, &fit)) return i;
        block->d = fit.d;
        memset(block->scales, 0, sizeof block->scales);
        for (int s = 0; s < 16; s++) {
            const int scale = fit.scale[s] + 32;
            block->scales[s % 8] = (uint8_t)(block->scales[s % 8] | (scale & 0xF) << (4 * (s / 8)));
            block->scales[8 + s % 4] = (uint8_t)(block->scales[8 + s % 4] | (scale >> 4) << (2 * (s / 4)));
        }
        memset(block->hmask, 0, sizeof block->hmask);
        for (int j = 0; j < 256; j++) {
            fit.q[j] = (int8_t)(fit.q[j] + 4);
            block->hmask[j % 32] = (uint8_t)(block->hmask[j % 32] | (fit.q[j] >> 2) << (j / 32));
        }
        pack_2_bits(fit.q, block->qs);
    }
    return n_blocks;
}

size_t fb_quantize_q4_k(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q4_k *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 256) {
        struct fb_k_block fit;
        if (!fb_fit_q4_k(src, &fit)) return i;
        block->d = fit.d;
        block->dmin = fit.dmin;
        pack_scales_mins(fit.scale, fit.min, block->scales);
        pack_nibbles(fit.q, block->qs);
    }
    return n_blocks;
}

size_t fb_quantize_q5_k(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q5_k *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 256) {
        struct fb_k_block fit;
        if (!fb_fit_q5_k(src, &fit)) return i;
        block->d = fit.d;
        block->dmin = fit.dmin;
        pack_scales_mins(fit.scale, fit.min, block->scales);
        pack_nibbles(fit.q, block->qs);
        memset(block->qh, 0, sizeof block->qh);
        for (int j = 0; j < 256; j++)
            block->qh[j % 32] = (uint8_t)(block->qh[j % 32] | (fit.q[j] >> 4) << (j / 32));
    }
    return n_blocks;
}

size_t fb_quantize_q6_k(const float *src, size_t n_blocks, void *dst) {
    struct fb_block_q6_k *block = dst;
    for (size_t i = 0; i < n_blocks; i++, block++, src += 256) {
        struct fb_k_block fit;
        if (!fb_fit_q6_k(src, &fit)) return i;
        block->d = fit.d;
        memcpy(block->scales, fit.scale, sizeof block->scales);
        for (int half = 0; half < 2; half++) {
            const int8_t *q = fit.q + 128 * half;
            uint8_t *ql = block->ql + 64 * half, *qh = block->qh + 32 * half;
            for (int j = 0; j < 32; j++) {
                const int a = q[j] + 32, b = q[j + 32] + 32, c = q[j + 64] + 32, e = q[j + 96] + 32;
                ql[j] = (uint8_t)((a & 0xF) | (c & 0xF) << 4);
                ql[j + 32] = (uint8_t)((b & 0xF) | (e & 0xF) << 4);
                qh[j] = (uint8_t)(a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6);
            }
        }
    }
    return n_blocks;
}
