/*
 * layout.h - how a quantised matrix lies in memory: panels of 16 rows, in blocks of 32 columns.
 *
 *     panel            | 256 columns | 256 columns | ...
 *     256 columns      | supers | block 0 | block 1 | ... | block 7 |     supers only in the formats that have them
 *     block            | codes | scales |
 *
 * so that a product reads a panel, and the panels behind it, as one unbroken stream: that is how a core gets the most out
 * of its memory. (Measured on a Zen 4 server, one token: codes and scales in planes apart, four panels side by side,
 * 16 GB/s; one panel after the other in this order 29 GB/s, what a core can read at all.)
 *
 * A code of b bits takes b bits: the codes of a block (16 rows x 32 columns) are b lines of 64 bytes. Opened, they are 8
 * lines of bytes; byte 4 j + i of line q is the code of row j, column 4 q + i. That is what the integer dot products of
 * every CPU take: 4 neighbouring columns of one row in one 32-bit lane, 16 rows side by side.
 *
 *     8 bits   line q as it is
 *     4 bits   lines 0 .. 3: low nibbles of stored line l are line l, high nibbles line l + 4
 *     5 bits   as 4 bits, then one line whose bit q of each byte is the fifth bit of line q
 *     6 bits   as 4 bits, then two lines: bits 2 i, 2 i + 1 of stored line 4 + r are the upper bits of line 4 r + i
 *     2 bits   bits 2 i, 2 i + 1 of stored line r are line 4 r + i
 *     3 bits   as 2 bits, then one line whose bit q of each byte is the third bit of line q
 *
 * A weight is   scale * (code - zero) + offset   with scale and offset of its row and group of 16 or 32 columns:
 *
 *     scales of a block       d[16] as f16                         q8_0 q4_0 q5_0 iq4_nl      scale d
 *                             d[16], m[16] as f16                  q4_1 q5_1                  scale d, offset m
 *                             s[16], m[16] as u8                   q4_k q5_k                  scale D s, offset -(M m)
 *                             s[16] of columns 0 .. 15, then s[16] of 16 .. 31:
 *                                    i8                            q6_k q3_k                  scale D s
 *                                    s in the low, m in the high nibble   q2_k                scale D s, offset -(M m)
 *     supers of 256 columns   D[16] as f16                         q6_k q3_k
 *                             D[16], M[16] as f16                  q4_k q5_k q2_k
 *
 * No bit of the file's blocks is lost, so a row can be read back exactly. The codes of iq4_nl are the places in its table;
 * opened, they are the table's numbers + 128. Products of f16 and 8 bits are exact in f32.
 */
#ifndef FABULA_QUANT_LAYOUT_H
#define FABULA_QUANT_LAYOUT_H

#include "fabula.h"

enum { FB_BLOCK_COLUMNS = 32, FB_SUPER_COLUMNS = 256, FB_LINE = 64, FB_OPEN_LINES = 8 };

enum fb_scale_kind { FB_SCALE_D, FB_SCALE_D_M, FB_SCALE_K, FB_SCALE_K16, FB_SCALE_K16_M };

struct fb_layout {
    uint8_t bits;        /* of a stored code; 0 for the plain formats */
    uint8_t zero_shift;  /* the zero point is 1 << zero_shift once opened; 0 for formats with an offset: zero point 0 */
    uint8_t kind;        /* enum fb_scale_kind */
    bool is_wide;        /* opened codes need all 8 bits */
    uint8_t scale_bytes; /* of a block */
    uint8_t super_bytes; /* of 256 columns; 0 for none */
};

/* As a function of constants the whole layout is known to the compiler. */
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
    default:
        return (struct fb_layout){0, 0, FB_SCALE_D, false, 0, 0};
    }
}

static inline bool fb_is_quantised(enum fb_dtype dtype) {
    return fb_layout_of(dtype).bits != 0;
}

static inline bool fb_has_offset(enum fb_dtype dtype) {
    const uint8_t kind = fb_layout_of(dtype).kind;
    return kind == FB_SCALE_D_M || kind == FB_SCALE_K || kind == FB_SCALE_K16_M;
}

/* Groups of columns with a scale of their own in a block: 1 or 2. */
static inline size_t fb_groups(enum fb_dtype dtype) {
    const uint8_t kind = fb_layout_of(dtype).kind;
    return kind == FB_SCALE_K16 || kind == FB_SCALE_K16_M ? 2 : 1;
}

static inline size_t fb_block_bytes(enum fb_dtype dtype) {
    return (size_t)fb_layout_of(dtype).bits * FB_LINE + fb_layout_of(dtype).scale_bytes;
}

/* Where the supers of a block's 256 columns begin, in bytes from the panel; and its codes. */
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

/* One block of panels for the code that has no hurry: 16 rows x 32 columns. */
struct fb_open_block {
    uint8_t codes[FB_OPEN_LINES * FB_LINE]; /* byte 64 q + 4 j + i: row j, column 4 q + i */
    float scale[2][16], offset[2][16];      /* of each group and row; the second group only where there are two */
};

/* Opens block `block` of a panel. */
void fb_open_block(enum fb_dtype dtype, const char *panel, size_t block, struct fb_open_block *out);

/* Row `j` of a panel as f32 [n_cols]: the numbers that the file's blocks stand for. */
void fb_open_row(enum fb_dtype dtype, const char *panel, size_t n_cols, size_t j, float *dst);

/* Packs blocks first_block .. first_block + n_blocks - 1 of 16 rows into a panel. rows[j]: the file's bytes of row j from
 * first_block on, NULL for a row that keeps what `panel` holds. Formats of 256 columns: both numbers are multiples of 8.
 * Returns how many elements have a scale or an offset that is not finite. */
int64_t fb_pack_panel(
    enum fb_dtype dtype, const char *const rows[16], size_t first_block, size_t n_blocks, char *panel);

#endif
