/*
 * layout.h - how a quantized matrix lies in memory: panels of 16 rows, in blocks of 32 columns.
 *
 *     panel            | 256 columns | 256 columns | ...
 *     256 columns      | supers | block 0 | block 1 | ... | block 7 |     supers only if the format has them
 *     block            | codes | scales |
 *
 * A product reads a panel, and the panels after it, as one contiguous stream, which is how a core reaches its
 * full memory bandwidth. (Measured on a Zen 4 server, one token: codes and scales in separate planes, four
 * panels side by side, 16 GB/s; one panel after another in this order 29 GB/s, the most a core can read.)
 *
 * A code of b bits takes b bits: the codes of a block (16 rows x 32 columns) are b lines of 64 bytes.
 * Unpacked, they are 8 lines of bytes; byte 4 j + i of line q is the code of row j, column 4 q + i. That is
 * the operand of the integer dot products of every CPU: 4 neighboring columns of one row in one 32-bit lane,
 * 16 rows side by side.
 *
 *     8 bits   line q as it is
 *     4 bits   lines 0 .. 3: low nibbles of stored line l are line l, high nibbles line l + 4
 *     5 bits   as 4 bits, then one line whose bit q of each byte is the fifth bit of line q
 *     6 bits   as 4 bits, then two lines: bits 2 i, 2 i + 1 of stored line 4 + r are the upper bits of
 *              line 4 r + i
 *     2 bits   bits 2 i, 2 i + 1 of stored line r are line 4 r + i
 *     3 bits   as 2 bits, then one line whose bit q of each byte is the third bit of line q
 *
 * A weight is   scale * (code - zero) + offset   with scale and offset of its row and group of 16 or 32
 * columns:
 *
 *     scales of a block       d[16] as f16                    q8_0 q4_0 q5_0 iq4_nl  scale d
 *                             e[16] as u8                     mxfp4                  scale 2^(e - 128)
 *                             d[16], m[16] as f16             q4_1 q5_1              scale d, offset m
 *                             s[16], m[16] as u8              q4_k q5_k              scale D s, offset -(M m)
 *                             s[16] of columns 0 .. 15, then s[16] of 16 .. 31:
 *                                 i8                          q6_k q3_k              scale D s
 *                                 s in the low nibble,
 *                                 m in the high nibble        q2_k                   scale D s, offset -(M m)
 *     supers of 256 columns   D[16] as f16                    q6_k q3_k
 *                             D[16], M[16] as f16             q4_k q5_k q2_k
 *
 * No bit of the file's blocks is lost, so a row can be unpacked exactly. The codes of iq4_nl and mxfp4 are indices
 * into tables; unpacked, they are the table's numbers plus the zero point. Products of f16 and 8 bits are exact in f32.
 */
#ifndef FABULA_QUANT_LAYOUT_H
#define FABULA_QUANT_LAYOUT_H

#include "fabula.h"

enum { FB_BLOCK_COLUMNS = 32, FB_SUPER_COLUMNS = 256, FB_LINE = 64, FB_UNPACKED_LINES = 8 };

enum fb_scale_kind { FB_SCALE_D, FB_SCALE_D_M, FB_SCALE_K, FB_SCALE_K16, FB_SCALE_K16_M, FB_SCALE_E };

struct fb_layout {
    uint8_t bits;        /* of a stored code; 0 for the plain formats */
    uint8_t zero_shift;  /* zero point of unpacked codes: 1 << zero_shift, or 0 if zero_shift is 0 */
    uint8_t kind;        /* enum fb_scale_kind */
    bool is_wide;        /* unpacked codes need all 8 bits */
    uint8_t scale_bytes; /* per block */
    uint8_t super_bytes; /* per 256 columns; 0 for none */
};

/* A function of a constant folds at compile time. */
static inline struct fb_layout fb_layout_of(enum fb_dtype dtype) {
    switch (dtype) {
    case FB_Q8_0:
        return (struct fb_layout){8, 7, FB_SCALE_D, true, 32, 0};
    case FB_IQ4_NL:
        return (struct fb_layout){4, 7, FB_SCALE_D, true, 32, 0};
    case FB_Q4_0:
        return (struct fb_layout){4, 3, FB_SCALE_D, false, 32, 0};
    case FB_Q5_0:
        return (struct fb_layout){5, 4, FB_SCALE_D, false, 32, 0};
    case FB_Q4_1:
        return (struct fb_layout){4, 0, FB_SCALE_D_M, false, 64, 0};
    case FB_Q5_1:
        return (struct fb_layout){5, 0, FB_SCALE_D_M, false, 64, 0};
    case FB_Q4_K:
        return (struct fb_layout){4, 0, FB_SCALE_K, false, 32, 64};
    case FB_Q5_K:
        return (struct fb_layout){5, 0, FB_SCALE_K, false, 32, 64};
    case FB_Q6_K:
        return (struct fb_layout){6, 5, FB_SCALE_K16, false, 32, 32};
    case FB_Q3_K:
        return (struct fb_layout){3, 2, FB_SCALE_K16, false, 32, 32};
    case FB_Q2_K:
        return (struct fb_layout){2, 0, FB_SCALE_K16_M, false, 32, 64};
    case FB_MXFP4:
        return (struct fb_layout){4, 4, FB_SCALE_E, false, 16, 0};
    default:
        return (struct fb_layout){0, 0, FB_SCALE_D, false, 0, 0};
    }
}

/* Where stored codes are indices into a table: their unpacked codes, [16]. NULL for the other formats. */
static inline const uint8_t *fb_code_table(enum fb_dtype dtype) {
    static const uint8_t iq4_nl[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
    static const uint8_t mxfp4[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};
    return dtype == FB_IQ4_NL ? iq4_nl : dtype == FB_MXFP4 ? mxfp4 : NULL;
}

static inline bool fb_is_quantized(enum fb_dtype dtype) {
    return fb_layout_of(dtype).bits != 0;
}

static inline bool fb_has_offset(enum fb_dtype dtype) {
    const uint8_t kind = fb_layout_of(dtype).kind;
    return kind == FB_SCALE_D_M || kind == FB_SCALE_K || kind == FB_SCALE_K16_M;
}

/* Groups of columns per block that have their own scale: 1 or 2. */
static inline size_t fb_groups(enum fb_dtype dtype) {
    const uint8_t kind = fb_layout_of(dtype).kind;
    return kind == FB_SCALE_K16 || kind == FB_SCALE_K16_M ? 2 : 1;
}

static inline size_t fb_block_bytes(enum fb_dtype dtype) {
    return (size_t)fb_layout_of(dtype).bits * FB_LINE + fb_layout_of(dtype).scale_bytes;
}

/* Byte offsets from the panel: of the supers of a block's 256 columns, and of the block. */
static inline size_t fb_supers_at(enum fb_dtype dtype, size_t block) {
    return block / 8 * (fb_layout_of(dtype).super_bytes + 8 * fb_block_bytes(dtype));
}

static inline size_t fb_block_at(enum fb_dtype dtype, size_t block) {
    return fb_supers_at(dtype, block) + fb_layout_of(dtype).super_bytes + block % 8 * fb_block_bytes(dtype);
}

static inline size_t fb_panel_bytes(enum fb_dtype dtype, size_t n_cols) {
    return n_cols / FB_SUPER_COLUMNS * fb_layout_of(dtype).super_bytes +
           n_cols / FB_BLOCK_COLUMNS * fb_block_bytes(dtype);
}

/* One unpacked block of a panel (16 rows x 32 columns), for code that is not performance-critical. */
struct fb_unpacked_block {
    uint8_t codes[FB_UNPACKED_LINES * FB_LINE]; /* byte 64 q + 4 j + i: row j, column 4 q + i */
    float scale[2][16], offset[2][16];          /* [group][row]; group 1 only if the format has two */
};

/* Unpacks block `block` of a panel. */
void fb_unpack_block(enum fb_dtype dtype, const char *panel, size_t block, struct fb_unpacked_block *out);

/* Dequantizes row `j` of a panel to f32 [n_cols], with the values of the file's blocks. */
void fb_unpack_row(enum fb_dtype dtype, const char *panel, size_t n_cols, size_t j, float *dst);

/* Packs blocks first_block .. first_block + n_blocks - 1 of 16 rows into a panel. rows[j]: the file's bytes
 * of row j from first_block on; NULL leaves the row in `panel` unchanged. For formats with blocks of 256
 * columns both numbers are multiples of 8. Returns the number of elements whose scale or offset is not
 * finite. */
int64_t fb_pack_panel(
    enum fb_dtype dtype, const char *const rows[16], size_t first_block, size_t n_blocks, char *panel);

#endif
