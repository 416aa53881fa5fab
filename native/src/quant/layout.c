/* layout.c - packs blocks into panels and unpacks them. See layout.h. */
#include "quant/layout.h"

#include "quant/blocks.h"
#include "quant/convert.h"

#include <math.h>
#include <string.h>

/* The next 32 columns of one row, in the same form for every format. */
struct row_block {
    uint8_t codes[32];
    uint16_t d, m;         /* f16: scale and offset of the block or of its 256 columns */
    uint8_t s[2], mins[2]; /* sub-block scales and mins of K-quants */
};

/* ---- Reading the file's blocks ----------------------------------------------------------------------------------- */

static inline void nibbles(const uint8_t *qs, uint8_t *codes) {
    for (int j = 0; j < 16; j++) {
        codes[j] = qs[j] & 0xF;
        codes[j + 16] = qs[j] >> 4;
    }
}

static inline void fifth_bits(uint32_t qh, uint8_t *codes) {
    for (int j = 0; j < 32; j++)
        codes[j] = (uint8_t)(codes[j] | ((qh >> j) & 1) << 4);
}

/* 6-bit scale and min of sub-block s of q4_k and q5_k; the packing is drawn in blocks.h. */
static inline void k_scale(const uint8_t *scales, size_t s, struct row_block *out) {
    if (s < 4) {
        out->s[0] = scales[s] & 63;
        out->mins[0] = scales[s + 4] & 63;
    } else {
        out->s[0] = (uint8_t)((scales[s + 4] & 0xF) | (scales[s - 4] >> 6) << 4);
        out->mins[0] = (uint8_t)(scales[s + 4] >> 4 | (scales[s] >> 6) << 4);
    }
}

/* Reads block `b` (32 columns) of the row at `row`. */
static inline __attribute__((always_inline)) void read_block(
    enum fb_dtype dtype, const char *row, size_t b, struct row_block *out) {
    const size_t super = b / 8, sub = b % 8; /* for formats with blocks of 256 */
    switch (dtype) {
    case FB_Q8_0: {
        const struct fb_block_q8_0 *block = (const struct fb_block_q8_0 *)row + b;
        out->d = block->d;
        for (int j = 0; j < 32; j++)
            out->codes[j] = (uint8_t)(block->qs[j] + 128);
        break;
    }
    case FB_Q4_0: {
        const struct fb_block_q4_0 *block = (const struct fb_block_q4_0 *)row + b;
        out->d = block->d;
        nibbles(block->qs, out->codes);
        break;
    }
    case FB_IQ4_NL: {
        const struct fb_block_iq4_nl *block = (const struct fb_block_iq4_nl *)row + b;
        out->d = block->d;
        nibbles(block->qs, out->codes);
        break;
    }
    case FB_MXFP4: {
        const struct fb_block_mxfp4 *block = (const struct fb_block_mxfp4 *)row + b;
        out->s[0] = block->e;
        nibbles(block->qs, out->codes);
        break;
    }
    case FB_Q4_1: {
        const struct fb_block_q4_1 *block = (const struct fb_block_q4_1 *)row + b;
        out->d = block->d;
        out->m = block->m;
        nibbles(block->qs, out->codes);
        break;
    }
    case FB_Q5_0: {
        const struct fb_block_q5_0 *block = (const struct fb_block_q5_0 *)row + b;
        out->d = block->d;
        nibbles(block->qs, out->codes);
        fifth_bits(block->qh, out->codes);
        break;
    }
    case FB_Q5_1: {
        const struct fb_block_q5_1 *block = (const struct fb_block_q5_1 *)row + b;
        out->d = block->d;
        out->m = block->m;
        nibbles(block->qs, out->codes);
        fifth_bits(block->qh, out->codes);
        break;
    }
    case FB_Q4_K: {
        const struct fb_block_q4_k *block = (const struct fb_block_q4_k *)row + super;
        out->d = block->d;
        out->m = block->dmin;
        k_scale(block->scales, sub, out);
        for (int j = 0; j < 32; j++)
            out->codes[j] = (block->qs[32 * (sub / 2) + j] >> (4 * (sub % 2))) & 0xF;
        break;
    }
    case FB_Q5_K: {
        const struct fb_block_q5_k *block = (const struct fb_block_q5_k *)row + super;
        out->d = block->d;
        out->m = block->dmin;
        k_scale(block->scales, sub, out);
        for (int j = 0; j < 32; j++) {
            const int low = (block->qs[32 * (sub / 2) + j] >> (4 * (sub % 2))) & 0xF;
            out->codes[j] = (uint8_t)(low | ((block->qh[j] >> sub) & 1) << 4);
        }
        break;
    }
    case FB_Q6_K: {
        const struct fb_block_q6_k *block = (const struct fb_block_q6_k *)row + super;
        const size_t half = sub / 4, run = sub % 4;
        const uint8_t *ql = block->ql + 64 * half + 32 * (run % 2), *qh = block->qh + 32 * half;
        out->d = block->d;
        for (int j = 0; j < 32; j++) {
            const int low = (ql[j] >> (4 * (run / 2))) & 0xF;
            out->codes[j] = (uint8_t)(low | ((qh[j] >> (2 * run)) & 3) << 4);
        }
        for (int g = 0; g < 2; g++)
            out->s[g] = (uint8_t)block->scales[2 * sub + g];
        break;
    }
    case FB_Q3_K: {
        const struct fb_block_q3_k *block = (const struct fb_block_q3_k *)row + super;
        const size_t half = sub / 4, run = sub % 4;
        out->d = block->d;
        for (int j = 0; j < 32; j++) {
            const int low = (block->qs[32 * half + j] >> (2 * run)) & 3;
            out->codes[j] = (uint8_t)(low | ((block->hmask[j] >> (4 * half + run)) & 1) << 2);
        }
        for (size_t g = 0; g < 2; g++) {
            const size_t s = 2 * sub + g;
            const int low = (block->scales[s % 8] >> (4 * (s / 8))) & 0xF;
            out->s[g] = (uint8_t)((low | ((block->scales[8 + s % 4] >> (2 * (s / 4))) & 3) << 4) - 32);
        }
        break;
    }
    case FB_Q2_K: {
        const struct fb_block_q2_k *block = (const struct fb_block_q2_k *)row + super;
        out->d = block->d;
        out->m = block->dmin;
        for (int j = 0; j < 32; j++)
            out->codes[j] = (block->qs[32 * (sub / 4) + j] >> (2 * (sub % 4))) & 3;
        for (int g = 0; g < 2; g++)
            out->s[g] = block->scales[2 * sub + g];
        break;
    }
    default:
        break;
    }
}

/* ---- Codes ------------------------------------------------------------------------------------------------------- */

/* Packs 8 lines of byte codes into `bits` lines. */
static inline void store_codes(uint8_t bits, const uint8_t *unpacked, uint8_t *lines) {
    if (bits == 8) {
        memcpy(lines, unpacked, FB_UNPACKED_LINES * FB_LINE);
        return;
    }
    const bool by_nibble = bits >= 4;
    const size_t n_low = by_nibble ? 4 : 2; /* lines that hold the lower bits */
    for (size_t l = 0; l < n_low; l++)
        for (size_t i = 0; i < FB_LINE; i++)
            lines[l * FB_LINE + i] = by_nibble ? (uint8_t)((unpacked[l * FB_LINE + i] & 0xF) |
                                                           (unpacked[(l + 4) * FB_LINE + i] & 0xF) << 4)
                                               : (uint8_t)((unpacked[4 * l * FB_LINE + i] & 3) |
                                                           (unpacked[(4 * l + 1) * FB_LINE + i] & 3) << 2 |
                                                           (unpacked[(4 * l + 2) * FB_LINE + i] & 3) << 4 |
                                                           (unpacked[(4 * l + 3) * FB_LINE + i] & 3) << 6);
    uint8_t *high = lines + n_low * FB_LINE;
    if (bits == 6) {
        for (size_t r = 0; r < 2; r++)
            for (size_t i = 0; i < FB_LINE; i++) {
                const uint8_t *from = unpacked + 4 * r * FB_LINE + i;
                high[r * FB_LINE + i] = (uint8_t)(from[0] >> 4 | (from[FB_LINE] >> 4) << 2 |
                                                  (from[2 * FB_LINE] >> 4) << 4 | (from[3 * FB_LINE] >> 4) << 6);
            }
    } else if (bits % 2 == 1) {
        memset(high, 0, FB_LINE);
        for (size_t q = 0; q < FB_UNPACKED_LINES; q++)
            for (size_t i = 0; i < FB_LINE; i++)
                high[i] = (uint8_t)(high[i] | ((unpacked[q * FB_LINE + i] >> (bits - 1)) & 1) << q);
    }
}

/* Code at byte `i` of unpacked line q; for iq4_nl and mxfp4 the index into the table. */
static inline uint8_t code_at(uint8_t bits, const uint8_t *lines, size_t q, size_t i) {
    const uint8_t *high = lines + (bits >= 4 ? 4 : 2) * FB_LINE;
    int code;
    if (bits == 8)
        code = lines[q * FB_LINE + i];
    else if (bits >= 4)
        code = (lines[q % 4 * FB_LINE + i] >> (4 * (q / 4))) & 0xF;
    else
        code = (lines[q / 4 * FB_LINE + i] >> (2 * (q % 4))) & 3;
    if (bits == 6) code |= ((high[q / 4 * FB_LINE + i] >> (2 * (q % 4))) & 3) << 4;
    if (bits == 5 || bits == 3) code |= ((high[i] >> q) & 1) << (bits - 1);
    return (uint8_t)code;
}

static void unpack_codes(uint8_t bits, const uint8_t *lines, uint8_t *unpacked) {
    for (size_t q = 0; q < FB_UNPACKED_LINES; q++)
        for (size_t i = 0; i < FB_LINE; i++)
            unpacked[q * FB_LINE + i] = code_at(bits, lines, q, i);
}

/* ---- Blocks ------------------------------------------------------------------------------------------------------ */

/* Scale and offset of row j, group g. `scales` belong to the block, `supers` to its 256 columns. */
static void scale_at(
    enum fb_dtype dtype, const char *scales, const char *supers, int j, int g, float *scale, float *offset) {
    const uint16_t *halfs = (const uint16_t *)scales, *wide = (const uint16_t *)supers;
    const uint8_t *bytes = (const uint8_t *)scales;
    *offset = 0.0f;
    switch (fb_layout_of(dtype).kind) {
    case FB_SCALE_D:
        *scale = fb_f16_to_f32(halfs[j]);
        break;
    case FB_SCALE_E:
        *scale = fb_e8m0_to_f32(bytes[j]);
        break;
    case FB_SCALE_D_M:
        *scale = fb_f16_to_f32(halfs[j]);
        *offset = fb_f16_to_f32(halfs[16 + j]);
        break;
    case FB_SCALE_K:
        *scale = fb_f16_to_f32(wide[j]) * (float)bytes[j];
        *offset = -(fb_f16_to_f32(wide[16 + j]) * (float)bytes[16 + j]);
        break;
    case FB_SCALE_K16:
        *scale = fb_f16_to_f32(wide[j]) * (float)(int8_t)bytes[16 * g + j];
        break;
    default:
        *scale = fb_f16_to_f32(wide[j]) * (float)(bytes[16 * g + j] & 0xF);
        *offset = -(fb_f16_to_f32(wide[16 + j]) * (float)(bytes[16 * g + j] >> 4));
    }
}

void fb_unpack_block(enum fb_dtype dtype, const char *panel, size_t block, struct fb_unpacked_block *out) {
    const struct fb_layout layout = fb_layout_of(dtype);
    const char *lines = panel + fb_block_at(dtype, block);
    unpack_codes(layout.bits, (const uint8_t *)lines, out->codes);
    const uint8_t *table = fb_code_table(dtype);
    for (size_t i = 0; table && i < sizeof out->codes; i++)
        out->codes[i] = table[out->codes[i]];
    const char *scales = lines + FB_LINE * layout.bits, *supers = panel + fb_supers_at(dtype, block);
    for (int g = 0; g < (int)fb_groups(dtype); g++)
        for (int j = 0; j < 16; j++)
            scale_at(dtype, scales, supers, j, g, &out->scale[g][j], &out->offset[g][j]);
}

void fb_unpack_row(enum fb_dtype dtype, const char *panel, size_t n_cols, size_t j, float *dst) {
    const struct fb_layout layout = fb_layout_of(dtype);
    const int zero = layout.zero_shift ? 1 << layout.zero_shift : 0, n_groups = (int)fb_groups(dtype);
    const uint8_t *table = fb_code_table(dtype);
    for (size_t b = 0; b < n_cols / FB_BLOCK_COLUMNS; b++, dst += FB_BLOCK_COLUMNS) {
        const uint8_t *lines = (const uint8_t *)panel + fb_block_at(dtype, b);
        const char *scales = (const char *)lines + FB_LINE * layout.bits, *supers = panel + fb_supers_at(dtype, b);
        float scale[2], offset[2];
        for (int g = 0; g < n_groups; g++)
            scale_at(dtype, scales, supers, (int)j, g, &scale[g], &offset[g]);
        for (size_t q = 0; q < FB_UNPACKED_LINES; q++)
            for (size_t i = 0; i < 4; i++) {
                const int g = n_groups == 2 ? (int)(q / 4) : 0;
                int code = code_at(layout.bits, lines, q, 4 * j + i);
                if (table) code = table[code];
                const float product = scale[g] * (float)(code - zero); /* may be -0, and -0 + 0 is +0 */
                dst[4 * q + i] = fb_has_offset(dtype) ? product + offset[g] : product;
            }
    }
}

/* Writes row j's scales of a block and of its 256 columns. */
static inline void store_scales(
    enum fb_dtype dtype, const struct row_block *row, size_t j, char *scales, char *supers) {
    uint16_t *halfs = (uint16_t *)scales, *wide = (uint16_t *)supers;
    uint8_t *bytes = (uint8_t *)scales;
    switch (fb_layout_of(dtype).kind) {
    case FB_SCALE_D:
        halfs[j] = row->d;
        return;
    case FB_SCALE_E:
        bytes[j] = row->s[0];
        return;
    case FB_SCALE_D_M:
        halfs[j] = row->d;
        halfs[16 + j] = row->m;
        return;
    case FB_SCALE_K:
        bytes[j] = row->s[0];
        bytes[16 + j] = row->mins[0];
        wide[16 + j] = row->m;
        break;
    case FB_SCALE_K16_M:
        wide[16 + j] = row->m;
        bytes[j] = row->s[0];
        bytes[16 + j] = row->s[1];
        break;
    default:
        bytes[j] = row->s[0];
        bytes[16 + j] = row->s[1];
    }
    wide[j] = row->d;
}

static bool is_finite_f16(uint16_t half) {
    return (half & 0x7C00u) != 0x7C00u;
}

/* Elements of an mxfp4 block that are not finite: all if its scale is OCP's NaN, else those that overflow. */
static int64_t damaged_by_exponent(const struct row_block *row) {
    enum { LARGEST = 252 }; /* 12 x 2^(252 - 128) is finite */
    if (row->s[0] == FB_E8M0_NAN) return FB_BLOCK_COLUMNS;
    int64_t n = 0;
    for (int j = 0; j < 32 && row->s[0] > LARGEST; j++)
        n += !isfinite(fb_e8m0_to_f32(row->s[0]) * (float)fb_mxfp4_values[row->codes[j]]);
    return n;
}

/* `dtype` is a constant in each inlined copy, so the loops have no branches on it. */
static inline __attribute__((always_inline)) int64_t pack_panel(
    const enum fb_dtype dtype, const char *const rows[16], size_t first_block, size_t n_blocks, char *panel) {
    const struct fb_layout layout = fb_layout_of(dtype);
    int64_t damaged = 0;
    bool is_whole = true;
    for (size_t j = 0; j < 16; j++)
        is_whole = is_whole && rows[j];
    for (size_t b = 0; b < n_blocks; b++) {
        const size_t block = first_block + b;
        uint8_t *lines = (uint8_t *)panel + fb_block_at(dtype, block);
        char *scales = (char *)lines + FB_LINE * layout.bits, *supers = panel + fb_supers_at(dtype, block);
        uint8_t unpacked[FB_UNPACKED_LINES * FB_LINE];
        if (!is_whole) unpack_codes(layout.bits, lines, unpacked);
        for (size_t j = 0; j < 16; j++) {
            if (!rows[j]) continue;
            struct row_block row = {.d = 0};
            read_block(dtype, rows[j], b, &row);
            for (size_t q = 0; q < FB_UNPACKED_LINES; q++)
                memcpy(unpacked + q * FB_LINE + 4 * j, row.codes + 4 * q, 4);
            store_scales(dtype, &row, j, scales, supers);
            if (layout.kind == FB_SCALE_E)
                damaged += damaged_by_exponent(&row);
            else if (!is_finite_f16(row.d) || !is_finite_f16(row.m))
                damaged += FB_BLOCK_COLUMNS;
        }
        store_codes(layout.bits, unpacked, lines);
    }
    return damaged;
}

int64_t fb_pack_panel(
    enum fb_dtype dtype, const char *const rows[16], size_t first_block, size_t n_blocks, char *panel) {
#define CASE(name)                                                                                                     \
    case name:                                                                                                         \
        return pack_panel(name, rows, first_block, n_blocks, panel);
    switch (dtype) {
        CASE(FB_Q8_0)
        CASE(FB_Q4_0)
        CASE(FB_Q4_1)
        CASE(FB_Q5_0)
        CASE(FB_Q5_1)
        CASE(FB_Q4_K)
        CASE(FB_Q5_K)
        CASE(FB_Q6_K)
        CASE(FB_Q2_K)
        CASE(FB_Q3_K)
        CASE(FB_IQ4_NL)
        CASE(FB_MXFP4)
    default:
        return 0;
    }
#undef CASE
}
