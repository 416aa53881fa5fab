/*
 * dequantize.c - one plain loop per number format, from raw bytes to f32.
 *
 * Products and sums are rounded in the order of ggml's reference decoder (scale of a sub-block first, then
 * times q, then plus or minus the minimum), so results equal it bit by bit. The build forbids contraction to
 * fma, which keeps that true. Loops have fixed counts and no branches, so the compiler vectorizes them for
 * the baseline instruction set.
 */
#include "quant/dequantize.h"

#include <stdint.h>
#include <string.h>

#include "base/float_mode.h"
#include "base/status.h"
#include "quant/blocks.h"
#include "quant/convert.h"

/* Elements and bytes of one block, indexed by enum fb_dtype. */
static const struct {
    int32_t size;
    int32_t bytes;
} block_shapes[] = {
    [FB_F32] = {1, 4},
    [FB_F16] = {1, 2},
    [FB_BF16] = {1, 2},
    [FB_Q4_0] = {32, sizeof(struct fb_block_q4_0)},
    [FB_Q4_1] = {32, sizeof(struct fb_block_q4_1)},
    [FB_Q5_0] = {32, sizeof(struct fb_block_q5_0)},
    [FB_Q5_1] = {32, sizeof(struct fb_block_q5_1)},
    [FB_Q8_0] = {32, sizeof(struct fb_block_q8_0)},
    [FB_Q4_K] = {256, sizeof(struct fb_block_q4_k)},
    [FB_Q5_K] = {256, sizeof(struct fb_block_q5_k)},
    [FB_Q6_K] = {256, sizeof(struct fb_block_q6_k)},
    [FB_Q2_K] = {256, sizeof(struct fb_block_q2_k)},
    [FB_Q3_K] = {256, sizeof(struct fb_block_q3_k)},
    [FB_IQ4_NL] = {32, sizeof(struct fb_block_iq4_nl)},
    [FB_MXFP4] = {32, sizeof(struct fb_block_mxfp4)},
};

static bool is_known(enum fb_dtype dtype) {
    return (size_t)dtype < sizeof block_shapes / sizeof block_shapes[0];
}

int32_t fb_dtype_block_size(enum fb_dtype dtype) {
    return is_known(dtype) ? block_shapes[dtype].size : 0;
}

size_t fb_dtype_block_bytes(enum fb_dtype dtype) {
    return is_known(dtype) ? (size_t)block_shapes[dtype].bytes : 0;
}

/* ---- Plain formats ----------------------------------------------------------------------------------------------- */

static uint16_t load_u16(const uint8_t *bytes) {
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static void dequantize_f16(const uint8_t *src, size_t n, float *restrict dst) {
    for (size_t i = 0; i < n; i++) {
        dst[i] = fb_f16_to_f32(load_u16(src + 2 * i));
    }
}

static void dequantize_bf16(const uint8_t *src, size_t n, float *restrict dst) {
    for (size_t i = 0; i < n; i++) {
        dst[i] = fb_bf16_to_f32(load_u16(src + 2 * i));
    }
}

/* ---- Blocks of 32 ------------------------------------------------------------------------------------------------ */

static void dequantize_q4_0(const struct fb_block_q4_0 *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_f16_to_f32(block->d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)((block->qs[j] & 0xF) - 8);
            dst[j + 16] = d * (float)((block->qs[j] >> 4) - 8);
        }
    }
}

static void dequantize_q4_1(const struct fb_block_q4_1 *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_f16_to_f32(block->d);
        const float m = fb_f16_to_f32(block->m);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)(block->qs[j] & 0xF) + m;
            dst[j + 16] = d * (float)(block->qs[j] >> 4) + m;
        }
    }
}

/* Elements j and j + 16 of a block of 5-bit numbers. */
static int32_t q5_low(const uint8_t *qs, uint32_t qh, int j) {
    return (int32_t)((qs[j] & 0xFu) | ((qh >> j) & 1u) << 4);
}

static int32_t q5_high(const uint8_t *qs, uint32_t qh, int j) {
    return (int32_t)((uint32_t)(qs[j] >> 4) | ((qh >> (j + 16)) & 1u) << 4);
}

static void dequantize_q5_0(const struct fb_block_q5_0 *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_f16_to_f32(block->d);
        const uint32_t qh = block->qh;
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)(q5_low(block->qs, qh, j) - 16);
            dst[j + 16] = d * (float)(q5_high(block->qs, qh, j) - 16);
        }
    }
}

static void dequantize_q5_1(const struct fb_block_q5_1 *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_f16_to_f32(block->d);
        const float m = fb_f16_to_f32(block->m);
        const uint32_t qh = block->qh;
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)q5_low(block->qs, qh, j) + m;
            dst[j + 16] = d * (float)q5_high(block->qs, qh, j) + m;
        }
    }
}

static void dequantize_q8_0(const struct fb_block_q8_0 *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_f16_to_f32(block->d);
        for (int j = 0; j < 32; j++) {
            dst[j] = d * (float)block->qs[j];
        }
    }
}

static void dequantize_iq4_nl(const struct fb_block_iq4_nl *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_f16_to_f32(block->d);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)fb_iq4_nl_values[block->qs[j] & 0xF];
            dst[j + 16] = d * (float)fb_iq4_nl_values[block->qs[j] >> 4];
        }
    }
}

static void dequantize_mxfp4(const struct fb_block_mxfp4 *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++, dst += 32) {
        const float d = fb_e8m0_to_f32(block->e);
        for (int j = 0; j < 16; j++) {
            dst[j] = d * (float)fb_mxfp4_values[block->qs[j] & 0xF];
            dst[j + 16] = d * (float)fb_mxfp4_values[block->qs[j] >> 4];
        }
    }
}

/* ---- Blocks of 256 ----------------------------------------------------------------------------------------------- */

/* The 6-bit scale and min of sub-block `s` (0 .. 7); the packing is drawn in blocks.h. */
static void unpack_scale_min(const uint8_t *scales, int s, float *scale, float *min) {
    const uint8_t *low = scales, *middle = scales + 4, *high = scales + 8;
    if (s < 4) {
        *scale = (float)(low[s] & 63);
        *min = (float)(middle[s] & 63);
    } else {
        const int i = s - 4;
        *scale = (float)((high[i] & 0xF) | (low[i] >> 6) << 4);
        *min = (float)((high[i] >> 4) | (middle[i] >> 6) << 4);
    }
}

static void dequantize_q4_k(const struct fb_block_q4_k *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++) {
        const float d = fb_f16_to_f32(block->d);
        const float dmin = fb_f16_to_f32(block->dmin);
        for (int s = 0; s < 8; s++, dst += 32) {
            float scale, min;
            unpack_scale_min(block->scales, s, &scale, &min);
            const float factor = d * scale, offset = dmin * min;
            const uint8_t *qs = block->qs + 32 * (s / 2);
            const int shift = 4 * (s % 2);
            for (int j = 0; j < 32; j++) {
                dst[j] = factor * (float)((qs[j] >> shift) & 0xF) - offset;
            }
        }
    }
}

static void dequantize_q5_k(const struct fb_block_q5_k *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++) {
        const float d = fb_f16_to_f32(block->d);
        const float dmin = fb_f16_to_f32(block->dmin);
        for (int s = 0; s < 8; s++, dst += 32) {
            float scale, min;
            unpack_scale_min(block->scales, s, &scale, &min);
            const float factor = d * scale, offset = dmin * min;
            const uint8_t *qs = block->qs + 32 * (s / 2);
            const int shift = 4 * (s % 2);
            for (int j = 0; j < 32; j++) {
                const int q = ((qs[j] >> shift) & 0xF) | ((block->qh[j] >> s) & 1) << 4;
                dst[j] = factor * (float)q - offset;
            }
        }
    }
}

static void dequantize_q6_k(const struct fb_block_q6_k *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++) {
        const float d = fb_f16_to_f32(block->d);
        for (int s = 0; s < 16; s++, dst += 16) {
            /* Sub-block s is half of run (s / 2) % 4 in half s / 8 of the block. */
            const int run = (s / 2) % 4, first = 16 * (s % 2);
            const uint8_t *ql = block->ql + 64 * (s / 8) + 32 * (run % 2) + first;
            const uint8_t *qh = block->qh + 32 * (s / 8) + first;
            const int low_shift = 4 * (run / 2), high_shift = 2 * run;
            const float factor = d * (float)block->scales[s];
            for (int j = 0; j < 16; j++) {
                const int q = ((ql[j] >> low_shift) & 0xF) | ((qh[j] >> high_shift) & 3) << 4;
                dst[j] = factor * (float)(q - 32);
            }
        }
    }
}

static void dequantize_q2_k(const struct fb_block_q2_k *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++) {
        const float d = fb_f16_to_f32(block->d);
        const float dmin = fb_f16_to_f32(block->dmin);
        for (int s = 0; s < 16; s++, dst += 16) {
            const float factor = d * (float)(block->scales[s] & 0xF), offset = dmin * (float)(block->scales[s] >> 4);
            const uint8_t *qs = block->qs + 32 * (s / 8) + 16 * (s % 2);
            const int shift = s % 8 / 2 * 2;
            for (int j = 0; j < 16; j++) {
                dst[j] = factor * (float)((qs[j] >> shift) & 3) - offset;
            }
        }
    }
}

/* The 6-bit scale of sub-block `s` (0 .. 15) of q3_k, without its offset of 32. */
static int q3_k_scale(const uint8_t *scales, int s) {
    const int low = (scales[s % 8] >> (4 * (s / 8))) & 0xF;
    return (low | ((scales[8 + s % 4] >> (2 * (s / 4))) & 3) << 4) - 32;
}

static void dequantize_q3_k(const struct fb_block_q3_k *block, size_t n_blocks, float *restrict dst) {
    for (; n_blocks > 0; n_blocks--, block++) {
        const float d = fb_f16_to_f32(block->d);
        for (int s = 0; s < 16; s++, dst += 16) {
            const float factor = d * (float)q3_k_scale(block->scales, s);
            const int run = s % 8 / 2, half = s / 8, first = 16 * (s % 2);
            const uint8_t *qs = block->qs + 32 * half + first, *hmask = block->hmask + first;
            for (int j = 0; j < 16; j++) {
                const int q = ((qs[j] >> (2 * run)) & 3) | ((hmask[j] >> (4 * half + run)) & 1) << 2;
                dst[j] = factor * (float)(q - 4);
            }
        }
    }
}

/* ---- Entry points ------------------------------------------------------------------------------------------------ */

void fb_dequantize_row(enum fb_dtype dtype, const void *src, size_t n_elements, float *dst) {
    switch (dtype) {
    case FB_F32:
        if (n_elements > 0) memcpy(dst, src, n_elements * sizeof(float));
        break;
    case FB_F16:
        dequantize_f16(src, n_elements, dst);
        break;
    case FB_BF16:
        dequantize_bf16(src, n_elements, dst);
        break;
    case FB_Q4_0:
        dequantize_q4_0(src, n_elements / 32, dst);
        break;
    case FB_Q4_1:
        dequantize_q4_1(src, n_elements / 32, dst);
        break;
    case FB_Q5_0:
        dequantize_q5_0(src, n_elements / 32, dst);
        break;
    case FB_Q5_1:
        dequantize_q5_1(src, n_elements / 32, dst);
        break;
    case FB_Q8_0:
        dequantize_q8_0(src, n_elements / 32, dst);
        break;
    case FB_Q4_K:
        dequantize_q4_k(src, n_elements / 256, dst);
        break;
    case FB_Q5_K:
        dequantize_q5_k(src, n_elements / 256, dst);
        break;
    case FB_Q6_K:
        dequantize_q6_k(src, n_elements / 256, dst);
        break;
    case FB_Q2_K:
        dequantize_q2_k(src, n_elements / 256, dst);
        break;
    case FB_Q3_K:
        dequantize_q3_k(src, n_elements / 256, dst);
        break;
    case FB_IQ4_NL:
        dequantize_iq4_nl(src, n_elements / 32, dst);
        break;
    case FB_MXFP4:
        dequantize_mxfp4(src, n_elements / 32, dst);
        break;
    }
}

enum fb_status fb_dequantize(enum fb_dtype dtype, const void *src, size_t src_bytes, size_t n_elements, float *dst) {
    FB_REQUIRE(is_known(dtype), "dtype is %d, must be one of enum fb_dtype", (int)dtype);
    const size_t block_size = (size_t)fb_dtype_block_size(dtype);
    const size_t block_bytes = fb_dtype_block_bytes(dtype);
    FB_REQUIRE(n_elements % block_size == 0, "n_elements is %zu, must be a multiple of the block size %zu", n_elements,
        block_size);
    const size_t n_blocks = n_elements / block_size;
    /* Division cannot overflow, as the product of an untrusted count could. */
    FB_REQUIRE(src_bytes % block_bytes == 0 && src_bytes / block_bytes == n_blocks,
        "src_bytes is %zu, must be %zu blocks of %zu bytes for %zu elements", src_bytes, n_blocks, block_bytes,
        n_elements);
    if (n_elements == 0) return FB_OK;
    FB_REQUIRE(src != NULL, "src is NULL");
    FB_REQUIRE(dst != NULL, "dst is NULL");
    const fb_float_mode mode = fb_float_mode_enter();
    fb_dequantize_row(dtype, src, n_elements, dst);
    fb_float_mode_leave(mode);
    return FB_OK;
}
