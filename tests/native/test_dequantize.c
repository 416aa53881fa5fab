/*
 * test_dequantize.c - the 16-bit float converters over all 65,536 halfs, each block format on a block whose
 * elements were computed by hand, and the argument checks of fb_dequantize.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "fabula.h"
#include "quant/blocks.h"
#include "quant/convert.h"

/* ---- 16-bit floats ----------------------------------------------------------------------------------------------- */

/* The value of a finite half by the formula of IEEE 754, in double arithmetic. */
static double half_value(uint16_t half) {
    const int sign = half >> 15, exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double magnitude = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
    return sign ? -magnitude : magnitude;
}

static bool is_half_nan(uint16_t half) {
    return (half & 0x7C00) == 0x7C00 && (half & 0x3FF) != 0;
}

static void test_all_halfs(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        const uint16_t half = (uint16_t)i;
        const float value = fb_f16_to_f32(half);
        const uint16_t back = fb_f32_to_f16(value);
        if (is_half_nan(half)) {
            CHECK_AT(isnan(value), "half 0x%04x", i);
            CHECK_AT(back == (half | 0x0200), "half 0x%04x", i); /* quieted, payload and sign kept */
        } else if ((half & 0x7FFF) == 0x7C00) {
            CHECK_AT(isinf(value) && !!signbit(value) == (half >> 15), "half 0x%04x", i);
            CHECK_AT(back == half, "half 0x%04x", i);
        } else {
            CHECK_AT((double)value == half_value(half), "half 0x%04x", i);
            CHECK_AT(!!signbit(value) == (half >> 15), "half 0x%04x", i);
            CHECK_AT(back == half, "half 0x%04x", i);
        }
    }
}

/* Between each half and the next: below the midpoint rounds down, above it up, the midpoint to even. */
static void test_half_rounding(void) {
    for (uint16_t half = 0; half < 0x7BFF; half++) {
        const uint16_t next = (uint16_t)(half + 1);
        const float middle = (float)((half_value(half) + half_value(next)) / 2);
        const uint16_t even = half % 2 == 0 ? half : next;
        CHECK_AT(fb_f32_to_f16(middle) == even, "half 0x%04x", half);
        CHECK_AT(fb_f32_to_f16(nextafterf(middle, 0.0f)) == half, "half 0x%04x", half);
        CHECK_AT(fb_f32_to_f16(nextafterf(middle, INFINITY)) == next, "half 0x%04x", half);
        CHECK_AT(fb_f32_to_f16(-middle) == (even | 0x8000), "half 0x%04x", half);
    }
    CHECK(fb_f32_to_f16(65519.996f) == 0x7BFF);
    CHECK(fb_f32_to_f16(65520.0f) == 0x7C00); /* halfway to 65536 counts as even: infinity */
    CHECK(fb_f32_to_f16(65536.0f) == 0x7C00);
    CHECK(fb_f32_to_f16(-3.4e38f) == 0xFC00);
    CHECK(fb_f32_to_f16(1e-45f) == 0x0000); /* smallest subnormal f32 */
    CHECK(fb_f32_to_f16(-0.0f) == 0x8000);
    CHECK(is_half_nan(fb_f32_to_f16(fb_f32_from_bits(0x7F800001u)))); /* payload in the truncated bits */
    CHECK(fb_f32_to_f16(fb_f32_from_bits(0xFFC00000u)) == 0xFE00);
}

static void test_bf16(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        const uint16_t half = (uint16_t)i;
        const float value = fb_bf16_to_f32(half);
        CHECK_AT(fb_f32_bits(value) == i << 16, "bf16 0x%04x", i);
        CHECK_AT(fb_f32_to_bf16(value) == (isnan(value) ? (half | 0x0040) : half), "bf16 0x%04x", i);
        if ((half & 0x7F80) == 0x7F80) continue;
        const uint32_t middle = (i << 16) + 0x8000u; /* toward the next larger magnitude */
        const uint16_t even = (uint16_t)(half + half % 2);
        CHECK_AT(fb_f32_to_bf16(fb_f32_from_bits(middle)) == even, "bf16 0x%04x", i);
        CHECK_AT(fb_f32_to_bf16(fb_f32_from_bits(middle - 1)) == half, "bf16 0x%04x", i);
        CHECK_AT(fb_f32_to_bf16(fb_f32_from_bits(middle + 1)) == half + 1, "bf16 0x%04x", i);
    }
    CHECK(fb_f32_to_bf16(fb_f32_from_bits(0x7F800001u)) == 0x7FC0);
    CHECK(fb_f32_to_bf16(fb_f32_from_bits(0x7F7FFFFFu)) == 0x7F80); /* FLT_MAX rounds to infinity */
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

enum { MAX_BLOCK = 256 };

/* Dequantizes one block from an odd address, with a guard number after the output. */
static void decode(enum fb_dtype dtype, const void *block, float *out) {
    const size_t n = (size_t)fb_dtype_block_size(dtype), n_bytes = fb_dtype_block_bytes(dtype);
    uint8_t raw[4 * MAX_BLOCK + 1];
    float decoded[MAX_BLOCK + 1];
    memcpy(raw + 1, block, n_bytes);
    decoded[n] = 12345.0f;
    CHECK(fb_dequantize(dtype, raw + 1, n_bytes, n, decoded) == FB_OK);
    CHECK(decoded[n] == 12345.0f);
    memcpy(out, decoded, n * sizeof(float));
}

/* Halfs used as scales: 0.5, 2, -1.5, 0.25. */
enum { HALF = 0x3800, TWO = 0x4000, MINUS_ONE_AND_HALF = 0xBE00, QUARTER = 0x3400 };

static void test_blocks_of_32(void) {
    float x[MAX_BLOCK];

    struct fb_block_q4_0 q4_0 = {.d = HALF};
    q4_0.qs[0] = 0xF0;  /* element 0: 0 - 8, element 16: 15 - 8 */
    q4_0.qs[15] = 0x98; /* element 15: 8 - 8, element 31: 9 - 8 */
    decode(FB_Q4_0, &q4_0, x);
    CHECK(x[0] == -4.0f && x[16] == 3.5f && x[15] == 0.0f && x[31] == 0.5f && x[1] == -4.0f);

    struct fb_block_q4_1 q4_1 = {.d = TWO, .m = MINUS_ONE_AND_HALF};
    q4_1.qs[0] = 0xF1; /* element 0: 2 * 1 - 1.5, element 16: 2 * 15 - 1.5 */
    q4_1.qs[15] = 0x03;
    decode(FB_Q4_1, &q4_1, x);
    CHECK(x[0] == 0.5f && x[16] == 28.5f && x[15] == 4.5f && x[31] == -1.5f);

    struct fb_block_q5_0 q5_0 = {.d = QUARTER, .qh = 1u << 0 | 1u << 31};
    q5_0.qs[0] = 0x2F;  /* element 0: 31 - 16, element 16: 2 - 16 */
    q5_0.qs[15] = 0x10; /* element 15: 0 - 16, element 31: 17 - 16 */
    decode(FB_Q5_0, &q5_0, x);
    CHECK(x[0] == 3.75f && x[16] == -3.5f && x[15] == -4.0f && x[31] == 0.25f);

    struct fb_block_q5_1 q5_1 = {.d = HALF, .m = TWO, .qh = 1u << 15 | 1u << 16};
    q5_1.qs[0] = 0x43;  /* element 0: 3, element 16: 16 + 4 */
    q5_1.qs[15] = 0x0F; /* element 15: 31, element 31: 0 */
    decode(FB_Q5_1, &q5_1, x);
    CHECK(x[0] == 3.5f && x[16] == 12.0f && x[15] == 17.5f && x[31] == 2.0f);

    struct fb_block_q8_0 q8_0 = {.d = MINUS_ONE_AND_HALF};
    q8_0.qs[0] = -128;
    q8_0.qs[31] = 127;
    decode(FB_Q8_0, &q8_0, x);
    CHECK(x[0] == 192.0f && x[31] == -190.5f && x[1] == 0.0f);

    struct fb_block_iq4_nl iq4_nl = {.d = HALF};
    iq4_nl.qs[0] = 0xF0;  /* element 0: level 0, element 16: level 15 */
    iq4_nl.qs[15] = 0x78; /* element 15: level 8, element 31: level 7 */
    decode(FB_IQ4_NL, &iq4_nl, x);
    CHECK(x[0] == -63.5f && x[16] == 56.5f && x[15] == 0.5f && x[31] == -5.0f);

    struct fb_block_mxfp4 mxfp4 = {.e = 128};
    mxfp4.qs[0] = 0xF1;  /* element 0: level 1, element 16: level 15 */
    mxfp4.qs[15] = 0x78; /* element 15: minus zero, element 31: level 7 */
    decode(FB_MXFP4, &mxfp4, x);
    CHECK(x[0] == 1.0f && x[16] == -12.0f && x[15] == 0.0f && !signbit(x[15]) && x[31] == 12.0f);
    for (int e = 0; e < 256; e++) {
        mxfp4.e = (uint8_t)e;
        decode(FB_MXFP4, &mxfp4, x);
        CHECK(x[0] == ldexpf(1.0f, e - 128) && x[16] == -12.0f * x[0]);
    }
}

/* Scales and mins of q4_k and q5_k: scale 0 = 1, scale 1 = 63, scale 5 = 0x2A, min 0 = 2, min 5 = 0x15. */
static void fill_scales(uint8_t *scales) {
    memset(scales, 0, 12);
    scales[0] = 1;
    scales[1] = 63 | 0x2 << 6; /* upper two bits belong to scale 5 = 10 1010 */
    scales[4] = 2;
    scales[5] = 0x1 << 6; /* and to min 5 = 01 0101 */
    scales[9] = 0x5 << 4 | 0xA;
}

static void test_blocks_of_256(void) {
    float x[MAX_BLOCK];

    struct fb_block_q4_k q4_k = {.d = HALF, .dmin = QUARTER};
    fill_scales(q4_k.scales);
    q4_k.qs[0] = 0xF3;      /* sub-block 0 element 0: 3, sub-block 1 element 0: 15 */
    q4_k.qs[32 * 2] = 0x70; /* sub-block 4 element 0: 0, sub-block 5 element 0: 7 */
    q4_k.qs[127] = 0xFF;    /* sub-blocks 6 and 7, element 31: scale and min are 0 */
    decode(FB_Q4_K, &q4_k, x);
    CHECK(x[0] == 0.5f * 1 * 3 - 0.25f * 2);
    CHECK(x[1] == -0.5f);
    CHECK(x[32] == 0.5f * 63 * 15);
    CHECK(x[128] == 0.0f);
    CHECK(x[160] == 0.5f * 0x2A * 7 - 0.25f * 0x15);
    CHECK(x[223] == 0.0f && x[255] == 0.0f);

    struct fb_block_q5_k q5_k = {.d = HALF, .dmin = QUARTER};
    fill_scales(q5_k.scales);
    q5_k.qs[0] = 0xF3;
    q5_k.qs[32 * 2] = 0x70;
    q5_k.qh[0] = 1 << 0 | 1 << 5; /* fifth bits of sub-blocks 0 and 5, element 0 */
    q5_k.qh[31] = 1 << 1;
    decode(FB_Q5_K, &q5_k, x);
    CHECK(x[0] == 0.5f * 1 * 19 - 0.25f * 2);
    CHECK(x[32] == 0.5f * 63 * 15);
    CHECK(x[63] == 0.5f * 63 * 16);
    CHECK(x[160] == 0.5f * 0x2A * 23 - 0.25f * 0x15);

    struct fb_block_q6_k q6_k = {.d = HALF};
    for (int s = 0; s < 16; s++) {
        q6_k.scales[s] = (int8_t)(s == 15 ? -128 : s + 1);
    }
    q6_k.ql[0] = 0x5A;       /* run 0 element 0: low 0xA, run 2 element 0: low 0x5 */
    q6_k.qh[0] = 0xE7;       /* upper bits: run 0 3, run 1 1, run 2 2, run 3 3 */
    q6_k.ql[32 + 31] = 0x9C; /* runs 1 and 3, element 31 */
    q6_k.ql[64 + 32 + 31] = 0xF0;
    q6_k.qh[32 + 31] = 0xC0; /* second half, run 3 element 31: q = 63 */
    decode(FB_Q6_K, &q6_k, x);
    CHECK(x[0] == 0.5f * 1 * (0x3A - 32));
    CHECK(x[32] == 0.5f * 3 * (0x10 - 32));
    CHECK(x[63] == 0.5f * 4 * (0x0C - 32));
    CHECK(x[64] == 0.5f * 5 * (0x25 - 32));
    CHECK(x[96] == 0.5f * 7 * (0x30 - 32));
    CHECK(x[127] == 0.5f * 8 * (0x09 - 32));
    CHECK(x[16] == 0.5f * 2 * -32);
    CHECK(x[128] == 0.5f * 9 * -32);
    CHECK(x[255] == 0.5f * -128 * 31);
}

static void test_two_and_three_bits(void) {
    float x[MAX_BLOCK];

    struct fb_block_q2_k q2_k = {.d = HALF, .dmin = QUARTER};
    q2_k.scales[0] = 0x21; /* elements 0 .. 15: scale 1, min 2 */
    q2_k.scales[3] = 0xF3; /* elements 48 .. 63 */
    q2_k.scales[15] = 0x0F;
    q2_k.qs[0] = 0x03;       /* run 0 element 0: 3 */
    q2_k.qs[31] = 0x08;      /* run 1 element 31: 2 */
    q2_k.qs[32 + 31] = 0x40; /* second half, run 3 element 31: 1 */
    decode(FB_Q2_K, &q2_k, x);
    CHECK(x[0] == 0.5f * 1 * 3 - 0.25f * 2);
    CHECK(x[1] == -0.5f);
    CHECK(x[63] == 0.5f * 3 * 2 - 0.25f * 15);
    CHECK(x[255] == 0.5f * 15 * 1);
    CHECK(x[100] == 0.0f);

    struct fb_block_q3_k q3_k = {.d = HALF};
    q3_k.scales[0] = 0x5A;         /* lower halves: scale 0 = 0xA, scale 8 = 0x5 */
    q3_k.scales[8] = 3 | 2 << 4;   /* upper: scale 0 = 11 1010 = 58, scale 8 = 10 0101 = 37 */
    q3_k.scales[7] = 0x10;         /* lower: scale 15 = 0x1 */
    q3_k.scales[11] = 1 << 6;      /* upper: scale 15 = 01 0001 = 17 */
    q3_k.qs[0] = 0x02;             /* first half, run 0 element 0: 2 */
    q3_k.hmask[0] = 1 << 0;        /* + 4 */
    q3_k.qs[32] = 0x03;            /* second half, run 0 element 0: 3, without its third bit */
    q3_k.qs[32 + 31] = 0x40;       /* second half, run 3 element 31: 1 */
    q3_k.hmask[31] = 1 << (4 + 3); /* + 4 */
    decode(FB_Q3_K, &q3_k, x);
    CHECK(x[0] == 0.5f * (58 - 32) * (6 - 4));
    CHECK(x[1] == 0.5f * (58 - 32) * -4);
    CHECK(x[128] == 0.5f * (37 - 32) * (3 - 4));
    CHECK(x[255] == 0.5f * (17 - 32) * (5 - 4));
    CHECK(x[16] == 0.5f * -32 * -4);
}

static void test_plain_formats(void) {
    const uint16_t halfs[3] = {0x3C00, 0x0001, 0xC000};
    const uint16_t brains[3] = {0x3F80, 0x0001, 0xC000};
    const float floats[3] = {1.0f, 0x1p-149f, -2.0f};
    uint8_t raw[13];
    float x[3];
    memcpy(raw + 1, halfs, sizeof halfs);
    CHECK(fb_dequantize(FB_F16, raw + 1, 6, 3, x) == FB_OK);
    CHECK(x[0] == 1.0f && x[1] == 0x1p-24f && x[2] == -2.0f);
    memcpy(raw + 1, brains, sizeof brains);
    CHECK(fb_dequantize(FB_BF16, raw + 1, 6, 3, x) == FB_OK);
    CHECK(x[0] == 1.0f && x[1] == 0x1p-133f && x[2] == -2.0f);
    memcpy(raw + 1, floats, sizeof floats);
    CHECK(fb_dequantize(FB_F32, raw + 1, 12, 3, x) == FB_OK);
    CHECK(memcmp(x, floats, sizeof floats) == 0);
}

/* ---- Arguments --------------------------------------------------------------------------------------------------- */

static void test_arguments(void) {
    static const size_t bytes[] = {4, 2, 2, 18, 20, 22, 24, 34, 144, 176, 210, 84, 110, 18};
    static const int32_t sizes[] = {1, 1, 1, 32, 32, 32, 32, 32, 256, 256, 256, 256, 256, 32};
    const uint8_t raw[400] = {0};
    float x[512];
    x[0] = 7.0f;
    for (int i = 0; i < 14; i++) {
        const enum fb_dtype dtype = (enum fb_dtype)i;
        const size_t size = (size_t)sizes[i];
        CHECK_AT(fb_dtype_block_size(dtype) == sizes[i], "dtype %d", i);
        CHECK_AT(fb_dtype_block_bytes(dtype) == bytes[i], "dtype %d", i);
        CHECK_AT(fb_dequantize(dtype, NULL, 0, 0, NULL) == FB_OK, "dtype %d", i);
        CHECK_AT(fb_dequantize(dtype, raw, bytes[i] - 1, size, x) == FB_INVALID_ARGUMENT, "dtype %d", i);
        CHECK_AT(fb_dequantize(dtype, raw, bytes[i] + 1, size, x) == FB_INVALID_ARGUMENT, "dtype %d", i);
        CHECK_AT(fb_dequantize(dtype, raw, 2 * bytes[i], size, x) == FB_INVALID_ARGUMENT, "dtype %d", i);
        CHECK_AT(fb_dequantize(dtype, NULL, bytes[i], size, x) == FB_INVALID_ARGUMENT, "dtype %d", i);
        CHECK_AT(fb_dequantize(dtype, raw, bytes[i], size, NULL) == FB_INVALID_ARGUMENT, "dtype %d", i);
        if (size > 1) {
            CHECK_AT(fb_dequantize(dtype, raw, bytes[i], size - 1, x) == FB_INVALID_ARGUMENT, "dtype %d", i);
        }
    }
    /* 2^62 elements of f32 take 2^64 bytes, which wraps to 0. */
    CHECK(fb_dequantize(FB_F32, raw, 0, (size_t)1 << 62, x) == FB_INVALID_ARGUMENT);
    CHECK(strstr(fb_last_error(), "src_bytes") != NULL);
    CHECK(fb_dequantize((enum fb_dtype)14, raw, 4, 1, x) == FB_INVALID_ARGUMENT);
    CHECK(fb_dequantize((enum fb_dtype) - 1, raw, 4, 1, x) == FB_INVALID_ARGUMENT);
    CHECK(strstr(fb_last_error(), "dtype is -1") != NULL);
    CHECK(fb_dtype_block_size((enum fb_dtype)99) == 0 && fb_dtype_block_bytes((enum fb_dtype) - 1) == 0);
    CHECK(x[0] == 7.0f);
}

int main(void) {
    test_all_halfs();
    test_half_rounding();
    test_bf16();
    test_blocks_of_32();
    test_blocks_of_256();
    test_two_and_three_bits();
    test_plain_formats();
    test_arguments();
    return check_result();
}
