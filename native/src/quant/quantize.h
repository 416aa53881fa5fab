/*
 * quantize.h - quantization for callers inside the library that have checked their sizes. The checked entry
 * point is fb_quantize in fabula.h.
 *
 * The quantizer of a format converts `n_blocks` whole blocks from `src` to `dst` and returns how many blocks
 * from the start are finite: n_blocks, or the index of the first whose numbers are too large for the format's
 * scale. Source numbers are finite. Blocks are independent, so any split over threads gives the same
 * bits.
 */
#ifndef FABULA_QUANT_QUANTIZE_H
#define FABULA_QUANT_QUANTIZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "fabula.h"
#include "quant/convert.h"

size_t fb_quantize_q4_0(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q4_1(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q5_0(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q5_1(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q8_0(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_iq4_nl(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_mxfp4(const float *src, size_t n_blocks, void *dst);

size_t fb_quantize_q2_k(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q3_k(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q4_k(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q5_k(const float *src, size_t n_blocks, void *dst);
size_t fb_quantize_q6_k(const float *src, size_t n_blocks, void *dst);

/* Dispatches on the format; the plain ones have blocks of one element. */
size_t fb_quantize_blocks(enum fb_dtype dtype, const float *src, size_t n_blocks, void *dst);

/* Whether a number rounds to a finite f16. */
static inline bool fb_fits_f16(float value) {
    return (fb_f32_to_f16(value) & 0x7C00u) != 0x7C00u;
}

#endif
