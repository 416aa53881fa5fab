/*
 * blocks.h - the GGUF block formats, byte by byte.
 *
 * A quantized row is a run of blocks. A block holds 32 or 256 neighboring elements of one row as small
 * integers q, and the f16 numbers that dequantize them: x = d * q or x = d * q + m. All numbers are
 * little-endian, as is every host this library runs on. The structs may be read in place at any address: they
 * are packed (alignment 1) and may alias raw bytes.
 *
 * Source: the layouts of ggml-common.h in ggml, quantization version 2.
 */
#ifndef FABULA_QUANT_BLOCKS_H
#define FABULA_QUANT_BLOCKS_H

#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blocks are read in place: little-endian hosts only");

#define FB_BLOCK __attribute__((packed, may_alias))

/* ---- Blocks of 32 ------------------------------------------------------------------------------------------------ */

/* In the 4-bit and 5-bit formats byte j of qs holds element j in its low nibble and element j + 16 in its
 * high nibble. */

/*  byte  0   2                18
 *        | d | qs: 16 bytes   |        x = d * (q - 8),  q = 0 .. 15 */
struct FB_BLOCK fb_block_q4_0 {
    uint16_t d;
    uint8_t qs[16];
};
_Static_assert(sizeof(struct fb_block_q4_0) == 18, "q4_0: 18 bytes for 32 elements");

/*  byte  0   2   4                20
 *        | d | m | qs: 16 bytes   |    x = d * q + m,  q = 0 .. 15 */
struct FB_BLOCK fb_block_q4_1 {
    uint16_t d;
    uint16_t m;
    uint8_t qs[16];
};
_Static_assert(sizeof(struct fb_block_q4_1) == 20, "q4_1: 20 bytes for 32 elements");

/*  byte  0   2    6                22
 *        | d | qh | qs: 16 bytes   |   x = d * (q - 16),  q = 0 .. 31
 *
 *  Bit j of qh is the fifth bit of element j. */
struct FB_BLOCK fb_block_q5_0 {
    uint16_t d;
    uint32_t qh;
    uint8_t qs[16];
};
_Static_assert(sizeof(struct fb_block_q5_0) == 22, "q5_0: 22 bytes for 32 elements");

/*  byte  0   2   4    8                24
 *        | d | m | qh | qs: 16 bytes   |   x = d * q + m,  q = 0 .. 31; qh as in q5_0 */
struct FB_BLOCK fb_block_q5_1 {
    uint16_t d;
    uint16_t m;
    uint32_t qh;
    uint8_t qs[16];
};
_Static_assert(sizeof(struct fb_block_q5_1) == 24, "q5_1: 24 bytes for 32 elements");

/*  byte  0   2                34
 *        | d | qs: 32 bytes   |        x = d * q,  q = -128 .. 127 */
struct FB_BLOCK fb_block_q8_0 {
    uint16_t d;
    int8_t qs[32];
};
_Static_assert(sizeof(struct fb_block_q8_0) == 34, "q8_0: 34 bytes for 32 elements");

/*  byte  0   2                18
 *        | d | qs: 16 bytes   |        x = d * fb_iq4_nl_values[q],  q = 0 .. 15 */
struct FB_BLOCK fb_block_iq4_nl {
    uint16_t d;
    uint8_t qs[16];
};
_Static_assert(sizeof(struct fb_block_iq4_nl) == 18, "iq4_nl: 18 bytes for 32 elements");

/* The levels of iq4_nl: dense around zero, where weights are. Source: kvalues_iq4nl of ggml-common.h; the
 * table is part of the format. */
static const int8_t fb_iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/*  byte  0   1                17
 *        | e | qs: 16 bytes   |        x = 2^(e - 128) * fb_mxfp4_values[q],  q = 0 .. 15
 *
 *  Source: OCP Microscaling Formats 1.0: E2M1 numbers with a shared E8M0 scale, in ggml's order of nibbles. Of OCP's
 *  scale 2^(e - 127) the table takes a factor of 2, so that its numbers are whole. e = 255 is NaN for OCP and
 *  2^127 for ggml; it dequantizes as in ggml, and a weight that holds it is damaged. */
struct FB_BLOCK fb_block_mxfp4 {
    uint8_t e;
    uint8_t qs[16];
};
_Static_assert(sizeof(struct fb_block_mxfp4) == 17, "mxfp4: 17 bytes for 32 elements");

/* Twice the numbers of E2M1, by sign, exponent and mantissa bit. Minus zero is read as zero. */
static const int8_t fb_mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

enum { FB_E8M0_NAN = 255 };

/* ---- Blocks of 256 ----------------------------------------------------------------------------------------------- */

/*  byte  0   2      4                   16                 144
 *        | d | dmin | scales: 12 bytes  | qs: 128 bytes    |
 *
 *  8 sub-blocks of 32 elements, each with a scale and a min of 6 bits:
 *     x = d * scale * q - dmin * min,  q = 0 .. 15
 *  Bytes 32 g .. 32 g + 31 of qs hold sub-block 2 g in their low nibbles, 2 g + 1 in their high.
 *
 *  The sixteen 6-bit numbers in `scales`, bit 7 on the left:
 *     bytes 0 .. 3    [ scale i+4, upper 2 | scale i            ]      i = 0 .. 3
 *     bytes 4 .. 7    [ min   i+4, upper 2 | min   i            ]
 *     bytes 8 .. 11   [ min   i+4, lower 4 | scale i+4, lower 4 ] */
struct FB_BLOCK fb_block_q4_k {
    uint16_t d;
    uint16_t dmin;
    uint8_t scales[12];
    uint8_t qs[128];
};
_Static_assert(sizeof(struct fb_block_q4_k) == 144, "q4_k: 144 bytes for 256 elements");

/*  byte  0   2      4                   16             48                 176
 *        | d | dmin | scales: 12 bytes  | qh: 32 bytes | qs: 128 bytes    |
 *
 *  As q4_k, but q = 0 .. 31: bit s of qh[j] is the fifth bit of element j of sub-block s. */
struct FB_BLOCK fb_block_q5_k {
    uint16_t d;
    uint16_t dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};
_Static_assert(sizeof(struct fb_block_q5_k) == 176, "q5_k: 176 bytes for 256 elements");

/*  byte  0                 128             192                208 210
 *        | ql: 128 bytes   | qh: 64 bytes  | scales: 16 int8  | d |
 *
 *  16 sub-blocks of 16 elements:  x = d * scale * (q - 32),  q = 0 .. 63.
 *
 *  Each half of 128 elements owns 64 bytes of ql and 32 of qh. Its four runs of 32 elements take,
 *  for element j of the run:
 *     run 0   low nibble of ql[j]         bits 0-1 of qh[j]
 *     run 1   low nibble of ql[32 + j]    bits 2-3 of qh[j]
 *     run 2   high nibble of ql[j]        bits 4-5 of qh[j]
 *     run 3   high nibble of ql[32 + j]   bits 6-7 of qh[j] */
struct FB_BLOCK fb_block_q6_k {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
};
_Static_assert(sizeof(struct fb_block_q6_k) == 210, "q6_k: 210 bytes for 256 elements");

/*  byte  0                  16             80  82     84
 *        | scales: 16 bytes | qs: 64 bytes | d | dmin |
 *
 *  16 sub-blocks of 16 elements, each with a scale (low nibble) and a min (high nibble):
 *     x = d * scale * q - dmin * min,  q = 0 .. 3
 *
 *  Each half of 128 elements owns 32 bytes of qs: bits 2 r, 2 r + 1 of byte j are element j of its run
 *  r = 0 .. 3 of 32 elements. */
struct FB_BLOCK fb_block_q2_k {
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d;
    uint16_t dmin;
};
_Static_assert(sizeof(struct fb_block_q2_k) == 84, "q2_k: 84 bytes for 256 elements");

/*  byte  0                 32             96                 108 110
 *        | hmask: 32 bytes | qs: 64 bytes | scales: 12 bytes | d |
 *
 *  16 sub-blocks of 16 elements:  x = d * (scale - 32) * (q - 4),  scale = 0 .. 63,  q = 0 .. 7.
 *
 *  The lower two bits of q lie in qs as in q2_k; its third bit, for element j of run r of half h, is bit
 *  4 h + r of hmask[j].
 *
 *  The sixteen 6-bit scales, bit 7 on the left:
 *     bytes 0 .. 7    [ scale i+8, lower 4 | scale i, lower 4 ]                               i = 0 .. 7
 *     bytes 8 .. 11   [ scale i+12, upper 2 | scale i+8, upper 2 | scale i+4, upper 2 |
 *                       scale i, upper 2 ]                                                i = 0 .. 3 */
struct FB_BLOCK fb_block_q3_k {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;
};
_Static_assert(sizeof(struct fb_block_q3_k) == 110, "q3_k: 110 bytes for 256 elements");

#endif
