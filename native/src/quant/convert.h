/*
 * convert.h - f32 from and to the two 16-bit floats, and from powers of two, one number at a time, in plain C that runs on every CPU.
 *
 *     f16   s eeeee mmmmmmmmmm       IEEE 754 binary16, exponent bias 15
 *     bf16  s eeeeeeee mmmmmmm       the upper half of an f32
 *
 * Narrowing rounds to nearest, ties to even; NaN stays NaN and becomes quiet, as with the F16C instructions,
 * so scalar and vector code agree bit by bit. No function relies on subnormal f32 arithmetic: flush-to-zero
 * modes change nothing.
 */
#ifndef FABULA_QUANT_CONVERT_H
#define FABULA_QUANT_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline uint32_t fb_f32_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float fb_f32_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float fb_f16_to_f32(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t mantissa = half & 0x3FFu;
    const uint32_t magnitude = half & 0x7FFFu;
    /* Masks instead of branches, so that loops over halves vectorize. */
    const uint32_t is_subnormal = -(uint32_t)(magnitude < 0x0400u);
    const uint32_t is_special = -(uint32_t)(magnitude >= 0x7C00u);
    const uint32_t is_nan = -(uint32_t)(magnitude > 0x7C00u);
    /* Exponent 0: mantissa * 2^-24, exact. Other exponents are rebiased from 15 to 127; infinity and NaN get
     * the same shift again, from 31 + 112 to 255. */
    const uint32_t subnormal = fb_f32_bits((float)(int32_t)mantissa * 0x1p-24f);
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t again = is_special & (112u << 23);
    const uint32_t quiet = is_nan & 0x00400000u;
    const uint32_t finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    return fb_f32_from_bits(sign | (finite + again) | quiet);
}

static inline uint16_t fb_f32_to_f16(float value) {
    const uint32_t bits = fb_f32_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) { /* NaN */
        return (uint16_t)(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
    }
    if (magnitude >= 0x47800000u) { /* 65536 and above, infinity */
        return (uint16_t)(sign | 0x7C00u);
    }
    if (magnitude >= 0x38800000u) { /* 2^-14 and above: normal; from 65520 on it carries into infinity */
        const uint32_t rebased = magnitude - (112u << 23);
        return (uint16_t)(sign | ((rebased + 0xFFFu + ((rebased >> 13) & 1u)) >> 13));
    }
    /* An f32 in [0.5, 1) has steps of 2^-24, like subnormal halves, so the addition rounds. */
    const uint32_t steps = fb_f32_bits(fb_f32_from_bits(magnitude) + 0.5f) - 0x3F000000u;
    return (uint16_t)(sign | steps);
}

static inline float fb_bf16_to_f32(uint16_t half) {
    return fb_f32_from_bits((uint32_t)half << 16);
}

static inline uint16_t fb_f32_to_bf16(float value) {
    const uint32_t bits = fb_f32_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) { /* NaN: its payload may lie in the truncated half */
        return (uint16_t)((bits >> 16) | 0x0040u);
    }
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/* 2^(e - 128), for every e: below 2 a subnormal number, whose bits are (e + 1) << 21. */
static inline float fb_e8m0_to_f32(uint8_t e) {
    const uint32_t normal = ((uint32_t)e - 1u) << 23, subnormal = ((uint32_t)e + 1u) << 21;
    return fb_f32_from_bits(e < 2 ? subnormal : normal);
}

#endif
