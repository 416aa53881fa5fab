/*
 * dequantize.h - dequantization for callers inside the library that have checked their sizes. The checked
 * entry point is fb_dequantize in fabula.h.
 */
#ifndef FABULA_QUANT_DEQUANTIZE_H
#define FABULA_QUANT_DEQUANTIZE_H

#include "fabula.h"

/* Dequantizes `n_elements` numbers at `src` (any alignment) to f32 at `dst`. Unchecked: `dtype` is valid,
 * `n_elements` is a multiple of its block size, `src` and `dst` hold that many and do not overlap.
 * Thread-safe. */
void fb_dequantize_row(enum fb_dtype dtype, const void *src, size_t n_elements, float *dst);

#endif
