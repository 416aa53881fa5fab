/*
 * quantize_k.h - a fitted block of 256: sub-blocks whose scales (and mins) are themselves small integers. The
 * form that the K formats share before their bits are packed.
 *
 *     affine     x ~ d scale[s] q - dmin min[s]      q2_k, q4_k, q5_k
 *     symmetric  x ~ d scale[s] q                    q3_k, q6_k
 */
#ifndef FABULA_QUANT_QUANTIZE_K_H
#define FABULA_QUANT_QUANTIZE_K_H

#include <stdbool.h>
#include <stdint.h>

struct fb_k_block {
    uint16_t d, dmin; /* f16 */
    int8_t scale[16];
    int8_t min[16];
    int8_t q[256]; /* levels: from 0 (affine) or around 0 (symmetric) */
};

/* Each fits one block, x [256] finite. False if the numbers are too large for f16 scales. */
bool fb_fit_q2_k(const float *x, struct fb_k_block *out);
bool fb_fit_q3_k(const float *x, struct fb_k_block *out);
bool fb_fit_q4_k(const float *x, struct fb_k_block *out);
bool fb_fit_q5_k(const float *x, struct fb_k_block *out);
bool fb_fit_q6_k(const float *x, struct fb_k_block *out);

#endif
