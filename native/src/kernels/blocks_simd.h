/*
 * blocks_simd.h - products with quantized weights, written once over vectors; simd.h includes it.
 * quant/layout.h draws how a panel is stored. The terms here:
 *
 *     block     32 columns of a panel (16 rows). Stored: `bits` lines and the scales. Unpacked: 8 lines of
 *               byte codes
 *     line      64 bytes, a v64:  | row 0: 4 columns | row 1: 4 columns | ... | row 15: 4 columns |
 *     group     the columns of a block that share a scale: all 32, or 16 (two groups)
 *     slice     8 blocks of up to BLOCK_PANELS panels, unpacked into L1 once, then used by every tile of
 *               tokens:
 *
 *                   panel p      | block b | block b+1 | ... | block b+7 |
 *                   panel p + 1  | block b | block b+1 | ... | block b+7 |
 *     tile      n_tokens x n_panels sums in registers, each a v16 with lane j for row j, over the blocks of a
 *               slice
 *
 * More than FEW_TOKENS * MAX_FEW_TILES tokens use slices; fewer use blocks_few_simd.h, which unpacks lines in
 * registers.
 *
 * In addition to what simd.h requires, the including file defines:
 *
 *   v64                      64 bytes: a line of a block
 *   v64_load v64_store v64_and (with one byte everywhere) v64_or
 *   v64_left v64_right       shifts of 16-bit lanes by a constant; bits that cross bytes are masked here
 *   v64_lookup               bytes 0 .. 15 to table[byte], table of 16
 *   v64_minus                subtracts one byte from all; only with MATRIX_TILES
 *   v16i                     16 int32, lane j for row j of a panel
 *   v16i_dot                 sums + dot product of each lane's 4 codes with 4 activations (the same for all
 *                            lanes)
 *   HAS_PAIR_SUMS            optional, where a CPU multiplies bytes only in pairs, into 16 bits; instead of
 *                            v16i_dot:
 *       v64_pairs            2 sums of 2 products in each lane, of codes up to 127
 *       v64_add_pairs        adds them; v16i_from_pairs adds the two sums of each lane, as int32
 *       v64_signed           wide codes - 128; v64_magnitudes of those
 *       v16i_signed_dot      v16i_dot of magnitudes and signed codes
 *   DOT_KNOWS_ZERO           whether dot products of wide codes subtract their zero point of 128
 *   DOT_CHAINS               chains of dot products with one or two tokens, 1 or 2; 1 with HAS_PAIR_SUMS
 *   v16i_start               -(sum of activations) << shift in all lanes
 *   v16_load_e8m0            16 bytes e to 2^(e - 128), as fb_e8m0_to_f32
 *   v16i_add v16i_load_u8 v16i_load_s8 v16i_and v16i_right v16_from_v16i
 *   v16_to_codes             16 f32 to 16 int8, rounding to even; returns the sum of the codes
 *   v16_top_magnitude        bits of the largest magnitude of 32 f32; as integers NaN > infinity > the rest
 *   FEW_TOKENS               tokens of the largest tile of few tokens
 *   LARGEST_FEW_TILE(bits)   optional: the same for codes of that many bits
 *   MAX_FEW_TILES(bits)      at most so many such tiles per panel of codes of that many bits
 *   FEW_TILES(X)             X(tokens, least) for each such tile, the largest first: it is used for `least`
 *                            tokens or more, and computes the missing ones for nothing
 *   BLOCK_TOKENS BLOCK_PANELS   largest tile of a slice: tokens x panels
 *   BLOCK_TILES(X)           X(tokens, panels) for each tile of a slice; not with MATRIX_TILES
 *   HALF_TILES(X)            optional: X(tokens) for tiles of half a panel of wide codes with
 *                            HAS_PAIR_SUMS, of up to 2 BLOCK_TOKENS tokens
 *   HAS_HALVES(tokens)       optional: whether such a tile of few tokens is two of half a panel
 *   v16_store_low v16_store_high    rows 0 .. 7 and 8 .. 15, for halves
 *   SCALE_REPEATS            how often a slice stores each scale
 *   MATRIX_TILES             optional: the header that computes tiles with matrix instructions for bytes,
 *                            blocks_mmla.h or blocks_amx.h. They take signed codes, minus their zero point
 *
 *     values                        avx2  avx512  avx512_amx  neon  neon_i8mm
 *     FEW_TOKENS                       6      12          12     3          3
 *     MAX_FEW_TILES                 2, 3       2           2     4          2
 *     BLOCK_TOKENS x BLOCK_PANELS  3 x 1   6 x 2      16 x 2  3 x 1     2 x 1
 *     SCALE_REPEATS                    1       1           1     1          2
 *
 * Tested by test_blocks, bit for bit against reference_blocks.c: every table that the CPU or an emulation
 * has, all 12 formats, 1 .. 50 tokens, 1 .. 5 panels, 32 .. 1024 columns.
 */
enum { SLICE_BLOCKS = 8 }; /* unpacked at a time: 4 KiB of codes per panel */

/* Lines of a block in a slice: codes, and with HAS_PAIR_SUMS the magnitudes of wide codes. */
#ifdef HAS_PAIR_SUMS
enum { SLICE_LINES = 2 * FB_UNPACKED_LINES };
#else
enum { SLICE_LINES = FB_UNPACKED_LINES };
#endif

/* Unpacked blocks of some panels, the input of tiles. */
struct slice {
    _Alignas(64) uint8_t unpacked[BLOCK_PANELS][SLICE_BLOCKS][SLICE_LINES * FB_LINE];
    float scales[BLOCK_PANELS][SLICE_BLOCKS][2][SCALE_REPEATS * FB_LANES];
    float offsets[BLOCK_PANELS][SLICE_BLOCKS][2][SCALE_REPEATS * FB_LANES];
    size_t n_panels, n_blocks;
    int zero_shift;
    /* Codes of panel p, block b are at p * panel_stride + b * block_stride: in `unpacked`, or in the weight
     * itself. */
    const uint8_t *codes;
    size_t panel_stride, block_stride;
    /* What is read next; tiles prefetch it while they multiply. */
    const char *next;
    size_t next_stride, next_bytes; /* from panel to panel; bytes of a block */
};

/* Unrolled loops count to a constant and skip iterations with `continue`, so that a compiler without
 * optimization can unroll them too. */

/* ---- Unpacking --------------------------------------------------------------------------------------------------- */

INLINE v64 take_bits(v64 line, const int from, const int to, const int mask) {
    return v64_and(from > to ? v64_right(line, from - to) : from < to ? v64_left(line, to - from) : line, mask);
}

/* Line q of a block whose stored codes are at `codes`. */
INLINE v64 unpack_line(const enum fb_dtype dtype, const uint8_t *codes, const int q) {
    const int bits = fb_layout_of(dtype).bits;
    const uint8_t *high = codes + (bits >= 4 ? 4 : 2) * FB_LINE;
    v64 line;
    if (bits == 8)
        line = v64_load(codes + q * FB_LINE);
    else if (bits >= 4)
        line = take_bits(v64_load(codes + q % 4 * FB_LINE), q / 4 * 4, 0, 15);
    else
        line = take_bits(v64_load(codes + q / 4 * FB_LINE), q % 4 * 2, 0, 3);
    if (bits == 6) line = v64_or(line, take_bits(v64_load(high + q / 4 * FB_LINE), q % 4 * 2, 4, 48));
    if (bits == 5 || bits == 3) line = v64_or(line, take_bits(v64_load(high), q, bits - 1, 1 << (bits - 1)));
    return fb_code_table(dtype) ? v64_lookup(fb_code_table(dtype), line) : line;
}

INLINE v16 minus(v16 x) {
    return v16_mul(x, v16_set1(-1.0f));
}

/* D and -M of 256 columns (quant/layout.h), as f32. */
struct supers {
    v16 scale, minus_offset;
};

INLINE struct supers unpack_supers(const enum fb_dtype dtype, const char *at) {
    const uint16_t *halfs = (const uint16_t *)at;
    struct supers supers = {v16_zero(), v16_zero()};
    if (fb_layout_of(dtype).super_bytes >= 32) supers.scale = v16_load_f16(halfs);
    if (fb_layout_of(dtype).super_bytes >= 64) supers.minus_offset = minus(v16_load_f16(halfs + 16));
    return supers;
}

/* Scale and offset of group g of the block whose scales are at `scales`. */
INLINE void unpack_scales(
    const enum fb_dtype dtype, const int g, const char *scales, const struct supers *supers, v16 *scale, v16 *offset) {
    const uint16_t *halfs = (const uint16_t *)scales;
    const uint8_t *bytes = (const uint8_t *)scales + 16 * g;
    switch (fb_layout_of(dtype).kind) {
    case FB_SCALE_D:
        *scale = v16_load_f16(halfs);
        break;
    case FB_SCALE_E:
        *scale = v16_load_e8m0(bytes);
        break;
    case FB_SCALE_D_M:
        *scale = v16_load_f16(halfs);
        *offset = v16_load_f16(halfs + 16);
        break;
    case FB_SCALE_K:
        *scale = v16_mul(supers->scale, v16_from_v16i(v16i_load_u8(bytes)));
        *offset = v16_mul(supers->minus_offset, v16_from_v16i(v16i_load_u8(bytes + 16)));
        break;
    case FB_SCALE_K16:
        *scale = v16_mul(supers->scale, v16_from_v16i(v16i_load_s8(bytes)));
        break;
    default:
        *scale = v16_mul(supers->scale, v16_from_v16i(v16i_and(v16i_load_u8(bytes), 15)));
        *offset = v16_mul(supers->minus_offset, v16_from_v16i(v16i_right(v16i_load_u8(bytes), 4)));
    }
}

/* ---- Dot products ------------------------------------------------------------------------------------------------ */

/* Where `max_code` is an argument, it is a constant: the largest unpacked code of a format, WIDE for is_wide. The
 * table of mxfp4 ends at 28, which 5 bits hold. */
enum { WIDE = 255 };

INLINE int max_code_of(const enum fb_dtype dtype) {
    if (dtype == FB_MXFP4) return 31;
    return fb_layout_of(dtype).is_wide ? WIDE : (1 << fb_layout_of(dtype).bits) - 1;
}

/* The rows of a panel that a tile computes. Vectors of a half hold all 16 rows, but only 8 are stored, so the
 * compiler drops what is computed for the others. */
enum rows { ALL_ROWS, LOW_ROWS, HIGH_ROWS };

INLINE void store_rows_of(const enum rows rows, float *y, v16 sums) {
#ifdef HALF_TILES
    if (rows == LOW_ROWS) {
        v16_store_low(y, sums);
        return;
    }
    if (rows == HIGH_ROWS) {
        v16_store_high(y, sums);
        return;
    }
#endif
    (void)rows;
    v16_store(y, sums);
}

/* A line of codes. With HAS_PAIR_SUMS wide codes are minus their zero point, beside their magnitudes. */
struct line {
    v64 codes;
#ifdef HAS_PAIR_SUMS
    v64 magnitudes;
#endif
};

INLINE struct line line_of(const int max_code, v64 codes) {
    struct line line;
    line.codes = codes;
#ifdef HAS_PAIR_SUMS
    if (max_code == WIDE) line.codes = v64_signed(codes);
    line.magnitudes = max_code == WIDE ? v64_magnitudes(line.codes) : codes;
#endif
    (void)max_code;
    return line;
}

/* A dot product of a group of columns while its lines are added. */
struct dot {
    v16i sum;
#ifdef HAS_PAIR_SUMS
    v64 pairs; /* not yet in `sum` */
#endif
};

/* How many lines add up exactly in 16 bits, if each adds two products of a code and a number up to 127. 0:
 * only one, or the table adds in 32 bits at once. */
INLINE int lines_of_pairs(const int max_code) {
#ifdef HAS_PAIR_SUMS
    const int most = INT16_MAX / (2 * 127 * max_code);
    return most > 1 ? most : 0;
#else
    (void)max_code;
    return 0;
#endif
}

/* Adds line i of n_lines. */
INLINE void add_line(
    const int max_code, const int n_lines, const int i, struct line line, const int8_t *x, struct dot *dot) {
#ifdef HAS_PAIR_SUMS
    const int most = lines_of_pairs(max_code);
    if (most) {
        const v64 pairs = v64_pairs(line.codes, x);
        dot->pairs = i % most == 0 ? pairs : v64_add_pairs(dot->pairs, pairs);
        if (i % most == most - 1 || i == n_lines - 1) dot->sum = v16i_add(dot->sum, v16i_from_pairs(dot->pairs));
    } else
        dot->sum = v16i_signed_dot(dot->sum, line.magnitudes, line.codes, x);
#else
    (void)n_lines, (void)i;
    dot->sum = v16i_dot(dot->sum, line.codes, x, max_code == WIDE);
#endif
}

/* What the zero point of codes contributes to a dot product: its first term, or where sums of pairs take the
 * registers meanwhile, its last. */
INLINE v16i first_term(const int max_code, const bool has_zero, int zero_shift, const int32_t *minus_sum) {
    const bool has_none = !has_zero || lines_of_pairs(max_code) || (max_code == WIDE && DOT_KNOWS_ZERO);
    return has_none ? v16i_start(NULL, 0) : v16i_start(minus_sum, zero_shift);
}

INLINE v16i with_last_term(
    const int max_code, const bool has_zero, int zero_shift, const int32_t *minus_sum, v16i sum) {
    return has_zero && lines_of_pairs(max_code) ? v16i_add(sum, v16i_start(minus_sum, zero_shift)) : sum;
}

#ifndef HAS_HALVES
#define HAS_HALVES(tokens) false
#endif
#ifndef LARGEST_FEW_TILE
#define LARGEST_FEW_TILE(bits) FEW_TOKENS
#endif
#include "kernels/blocks_few_simd.h"

/* ---- Many tokens ------------------------------------------------------------------------------------------------- */

/* The constants that specialize tiles for a format. */
struct tile_kind {
    int n_groups;
    bool has_offset;
    int max_code;
};

/* Prefetches block b of the panels that come next. */
INLINE void prefetch_next(const struct slice *slice, size_t b, const size_t n_panels) {
    for (size_t p = 0; p < n_panels; p++)
        for (size_t i = 0; i < slice->next_bytes; i += FB_LINE)
            __builtin_prefetch(slice->next + p * slice->next_stride + b * slice->next_bytes + i, 0, 2);
}

#ifdef MATRIX_TILES
enum { UNPACKS_SIGNED = 1 };
#include MATRIX_TILES
#else
enum { UNPACKS_SIGNED = 0 };
#include "kernels/blocks_dots.h"
#endif

/* Whether slices hold codes of 8 bits too, as tiles need them signed; else tiles read them from the weight. */
#ifdef HAS_PAIR_SUMS
enum { UNPACKS_BYTES = 1 };
#else
enum { UNPACKS_BYTES = UNPACKS_SIGNED };
#endif

/* Unpacks n_blocks blocks of a panel into row p of the slice; `block` starts 256 columns. */
INLINE void unpack_slice(
    const enum fb_dtype dtype, const char *panel, size_t block, size_t n_blocks, size_t p, struct slice *slice) {
    const struct fb_layout layout = fb_layout_of(dtype);
    const struct supers supers = unpack_supers(dtype, panel + fb_supers_at(dtype, block));
    const char *from = panel + fb_block_at(dtype, block);
    for (size_t i = 0; i < n_blocks; i++, from += fb_block_bytes(dtype)) {
        if (UNPACKS_BYTES || layout.bits != 8) unpack_block(dtype, (const uint8_t *)from, slice->unpacked[p][i]);
        for (int g = 0; g < (int)fb_groups(dtype); g++) {
            v16 scale = v16_zero(), offset = v16_zero();
            unpack_scales(dtype, g, from + layout.bits * FB_LINE, &supers, &scale, &offset);
            store_scales(slice->scales[p][i][g], scale);
            if (fb_has_offset(dtype)) store_scales(slice->offsets[p][i][g], offset);
        }
    }
}

/* One function per kind of tile, shared by the formats. TILE_KIND(name, ...) defines it from the fields of
 * struct tile_kind. */
typedef void (*tiles_function)(const struct slice *slice, const struct fb_activation *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate);
#define TILE_KIND(name, n_groups, has_offset, max_code)                                                                \
    static __attribute__((noinline)) void name(const struct slice *slice, const struct fb_activation *x, size_t ldx,   \
        size_t n_tokens, float *y, size_t ldy, bool accumulate) {                                                      \
        const struct tile_kind kind = {n_groups, has_offset, max_code};                                                \
        block_tiles(kind, slice, x, ldx, n_tokens, y, ldy, accumulate);                                                \
    }
TILE_KIND(tiles_wide, 1, false, WIDE)
TILE_KIND(tiles_32, 1, false, 15)
TILE_KIND(tiles_32_offset, 1, true, 15)
TILE_KIND(tiles_16, 2, false, 7)
TILE_KIND(tiles_16_offset, 2, true, 3)
#ifdef HAS_PAIR_SUMS /* tiles that depend on how many lines are added in 16 bits */
TILE_KIND(tiles_32_of_5_bits, 1, false, 31)
TILE_KIND(tiles_32_of_5_bits_offset, 1, true, 31)
TILE_KIND(tiles_16_of_6_bits, 2, false, 63)
#endif
#undef TILE_KIND

INLINE tiles_function tiles_of(const enum fb_dtype dtype) {
    if (fb_layout_of(dtype).is_wide && !UNPACKS_SIGNED) return tiles_wide;
#ifdef HAS_PAIR_SUMS
    if (max_code_of(dtype) == 31) return fb_has_offset(dtype) ? tiles_32_of_5_bits_offset : tiles_32_of_5_bits;
    if (fb_layout_of(dtype).bits == 6) return tiles_16_of_6_bits;
#endif
    if (fb_groups(dtype) == 1) return fb_has_offset(dtype) ? tiles_32_offset : tiles_32;
    return fb_has_offset(dtype) ? tiles_16_offset : tiles_16;
}

INLINE void many_tokens(const enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy) {
    const struct fb_layout layout = fb_layout_of(dtype);
    const size_t panel_bytes = fb_panel_bytes(dtype, n_cols), total = n_cols / FB_BLOCK_COLUMNS;
    struct slice slice;
    slice.zero_shift = layout.zero_shift;
    slice.next_stride = panel_bytes;
    slice.next_bytes = fb_block_bytes(dtype);
    begin_tiles((int)fb_groups(dtype), n_tokens);
    for (size_t p = 0; p < n_panels; p += BLOCK_PANELS) {
        const char *from = panels + p * panel_bytes;
        slice.n_panels = n_panels - p < BLOCK_PANELS ? n_panels - p : BLOCK_PANELS;
        for (size_t b = 0; b < total; b += SLICE_BLOCKS) {
            slice.n_blocks = total - b < SLICE_BLOCKS ? total - b : SLICE_BLOCKS;
            for (size_t i = 0; i < slice.n_panels; i++)
                unpack_slice(dtype, from + i * panel_bytes, b, slice.n_blocks, i, &slice);
            if (!UNPACKS_BYTES && layout.bits == 8) {
                slice.codes = (const uint8_t *)from + fb_block_at(dtype, b);
                slice.panel_stride = panel_bytes;
                slice.block_stride = fb_block_bytes(dtype);
            } else {
                slice.codes = slice.unpacked[0][0];
                slice.panel_stride = sizeof slice.unpacked[0];
                slice.block_stride = sizeof slice.unpacked[0][0];
            }
            slice.next = b + SLICE_BLOCKS < total ? from + fb_supers_at(dtype, b + SLICE_BLOCKS)
                                                  : from + BLOCK_PANELS * panel_bytes;
            tiles_of(dtype)(&slice, x + b, ldx, n_tokens, y + p * FB_LANES, ldy, b > 0);
        }
    }
    end_tiles();
}

static void gemm_blocks(enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy) {
#define FORMAT_CASE(name)                                                                                              \
    case name:                                                                                                         \
        if (n_tokens <= FEW_TOKENS * MAX_FEW_TILES(fb_layout_of(name).bits))                                           \
            few_tokens(name, panels, n_panels, n_cols, x, ldx, n_tokens, y, ldy);                                      \
        else                                                                                                           \
            many_tokens(name, panels, n_panels, n_cols, x, ldx, n_tokens, y, ldy);                                     \
        break;
    switch (dtype) {
        FORMAT_CASE(FB_Q8_0)
        FORMAT_CASE(FB_Q4_0)
        FORMAT_CASE(FB_Q4_1)
        FORMAT_CASE(FB_Q5_0)
        FORMAT_CASE(FB_Q5_1)
        FORMAT_CASE(FB_Q4_K)
        FORMAT_CASE(FB_Q5_K)
        FORMAT_CASE(FB_Q6_K)
        FORMAT_CASE(FB_Q2_K)
        FORMAT_CASE(FB_Q3_K)
        FORMAT_CASE(FB_IQ4_NL)
        FORMAT_CASE(FB_MXFP4)
    default:
        break;
    }
#undef FORMAT_CASE
}

/* ---- Activations ------------------------------------------------------------------------------------------------- */

static void quantize(const float *x, size_t n_blocks, struct fb_activation *out) {
    for (; n_blocks > 0; n_blocks--, x += FB_BLOCK_COLUMNS, out++) {
        const v16 low = v16_load(x), high = v16_load(x + FB_LANES);
        const uint32_t bits = v16_top_magnitude(low, high);
        float top;
        memcpy(&top, &bits, sizeof top);
        memset(out, 0, sizeof *out);
        if (!(top < INFINITY)) {
            out->scale = out->sums[0] = out->sums[1] = out->sums[2] = NAN;
            continue;
        }
        if (top < 1e-30f) continue;
        const v16 inverse = v16_set1(127.0f / top);
        const int32_t first = v16_to_codes(v16_mul(low, inverse), out->codes);
        const int32_t second = v16_to_codes(v16_mul(high, inverse), out->codes + FB_LANES);
        const int32_t sums[3] = {first + second, first, second};
        out->scale = top / 127.0f;
        for (int s = 0; s < 3; s++) {
            out->sums[s] = out->scale * (float)sums[s];
            out->minus_sums[s] = -sums[s];
        }
    }
}
