/*
 * blocks_amx.h - quantized products of many tokens in the AMX tile registers; blocks_simd.h includes it and
 * draws block, line, group and slice.
 *
 *     a      up to 16 tokens x the codes of a group, 32 or 16 bytes, read from the activations in place
 *     b      8 or 4 lines of an unpacked block of a panel: 4 columns of 16 rows each, which is AMX's layout
 *     sums   tokens x 16 rows, int32
 *
 * One product covers one group. Its sums are stored, then scaled and accumulated in vector registers, in the
 * order of kernels.h. That is 3 instructions per token and group of a panel where VNNI takes 11 (8 of them
 * VPDPBUSD). The products run in parallel with them, one step ahead.
 *
 * AMX-BF16 cannot serve gemm_pairs: it adds pairs in another order.
 *
 *     defines          unpack_block, store_scales, begin_tiles, end_tiles, block_tiles
 *     template over    struct tile_kind (1 or 2 groups, offset or not), n_panels 1 or 2
 *     tested           test_blocks: every format and 1 .. 50 tokens, on AMX where the CPU has it and emulated
 */
#include "kernels/amx.h"

/* A step is 4 groups: the sums of two panels and two steps are 16 KiB, next to the slice in L1. */
enum { TILE_TOKENS = 16, STEP = 4 };

/* Dot products of a step. */
struct products {
    _Alignas(64) int32_t of[BLOCK_PANELS][STEP][TILE_TOKENS][FB_LANES];
};

INLINE void unpack_block(const enum fb_dtype dtype, const uint8_t *codes, uint8_t *unpacked) {
    const int zero_shift = fb_layout_of(dtype).zero_shift;
    UNROLL
    for (int q = 0; q < FB_UNPACKED_LINES; q++) {
        const v64 line = unpack_line(dtype, codes, q);
        v64_store(unpacked + q * FB_LINE, zero_shift ? v64_minus(line, 1 << zero_shift) : line);
    }
}

INLINE void store_scales(float *out, v16 scales) {
    v16_store(out, scales);
}

/* Tokens per tile: as few tiles as possible, of nearly equal size. */
INLINE size_t tile_tokens(size_t n_tokens) {
    const size_t n_tiles = (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    return (n_tokens + n_tiles - 1) / n_tiles;
}

/* Tiles 0 .. 3: sums of two groups and two panels; 4, 5: activations of two groups; 6, 7: lines of two
 * panels. */
INLINE void begin_tiles(const int n_groups, size_t n_tokens) {
    struct fb_tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        const bool is_lines = i >= 6, is_inputs = i == 4 || i == 5;
        shapes.n_rows[i] = (uint8_t)(is_lines ? (size_t)(FB_UNPACKED_LINES / n_groups) : tile_tokens(n_tokens));
        shapes.row_bytes[i] = (uint16_t)(is_inputs ? FB_BLOCK_COLUMNS / n_groups : FB_LINE);
    }
    fb_tile_configure(&shapes);
}

INLINE void end_tiles(void) {
    fb_tile_release();
}

/* Multiplies groups first .. first + n_products - 1 of a slice (at most STEP).
 *
 * PRODUCT(i, inputs, sums_0, sums_1): group first + i, with activations in tile `inputs` and sums of panels 0
 * and 1 in tiles `sums_0` and `sums_1`, all literals. Consecutive products use different tiles, so they can
 * overlap. */
INLINE void multiply_step(const struct tile_kind kind, const size_t n_panels, const struct slice *slice, size_t first,
    size_t n_products, const struct fb_activation *x, size_t ldx, struct products *out) {
    const size_t in_block = (size_t)kind.n_groups, row = sizeof out->of[0][0][0];
#define PRODUCT(i, inputs, sums_0, sums_1)                                                                             \
    if ((i) < n_products) {                                                                                            \
        const size_t b = (first + (i)) / in_block, g = (first + (i)) % in_block;                                       \
        const size_t line = g * FB_UNPACKED_LINES / in_block * FB_LINE;                                                \
        fb_tile_load(inputs, x[b].codes + g * FB_BLOCK_COLUMNS / in_block, ldx * sizeof *x);                           \
        fb_tile_zero(sums_0);                                                                                          \
        fb_tile_load(6, slice->unpacked[0][b] + line, FB_LINE);                                                        \
        fb_tile_dot(sums_0, inputs, 6);                                                                                \
        fb_tile_store(sums_0, out->of[0][i], row);                                                                     \
        if (n_panels == 2) {                                                                                           \
            fb_tile_zero(sums_1);                                                                                      \
            fb_tile_load(7, slice->unpacked[1][b] + line, FB_LINE);                                                    \
            fb_tile_dot(sums_1, inputs, 7);                                                                            \
            fb_tile_store(sums_1, out->of[1][i], row);                                                                 \
        }                                                                                                              \
    }
    PRODUCT(0, 4, 0, 1)
    PRODUCT(1, 5, 2, 3)
    PRODUCT(2, 4, 0, 1)
    PRODUCT(3, 5, 2, 3)
#undef PRODUCT
}

/* Scales the products of a step and adds them to y, for tokens skipped .. n_tokens - 1. */
INLINE void add_step(const struct tile_kind kind, const size_t n_panels, const struct slice *slice, size_t first,
    size_t n_products, const struct products *products, const struct fb_activation *x, size_t ldx, size_t skipped,
    size_t n_tokens, float *y, size_t ldy, bool accumulate) {
    const size_t in_block = (size_t)kind.n_groups;
    for (size_t p = 0; p < n_panels; p++) {
        v16 scales[STEP], offsets[STEP];
        UNROLL
        for (size_t i = 0; i < STEP; i++) {
            scales[i] = offsets[i] = v16_zero();
            if (i >= n_products) continue;
            scales[i] = v16_load(slice->scales[p][(first + i) / in_block][(first + i) % in_block]);
            if (kind.has_offset)
                offsets[i] = v16_load(slice->offsets[p][(first + i) / in_block][(first + i) % in_block]);
        }
        for (size_t t = skipped; t < n_tokens; t++) {
            float *out = y + t * ldy + p * FB_LANES;
            v16 sum = accumulate ? v16_load(out) : v16_zero();
            UNROLL
            for (size_t i = 0; i < STEP; i++) {
                if (i >= n_products) continue;
                const struct fb_activation *in = &x[t * ldx + (first + i) / in_block];
                const v16 dot = v16_from_v16i(v64_load((const uint8_t *)products->of[p][i][t]));
                sum = v16_fma(dot, v16_mul(scales[i], v16_set1(in->scale)), sum);
                if (kind.has_offset) {
                    const size_t whole_or_half = in_block == 1 ? 0 : 1 + (first + i) % in_block;
                    sum = v16_fma(offsets[i], v16_set1(in->sums[whole_or_half]), sum);
                }
            }
            v16_store(out, sum);
        }
    }
}

INLINE size_t at_most(size_t n, size_t most) {
    return n < most ? n : most;
}

/* A tile of tokens over the blocks of a slice. */
INLINE void block_tile(const struct tile_kind kind, const size_t n_panels, const struct slice *slice,
    const struct fb_activation *x, size_t ldx, size_t skipped, size_t n_tokens, float *y, size_t ldy, bool accumulate) {
    const size_t n_products = slice->n_blocks * (size_t)kind.n_groups;
    struct products products[2];
    multiply_step(kind, n_panels, slice, 0, at_most(n_products, STEP), x, ldx, &products[0]);
    for (size_t i = 0; i < n_products; i += STEP) {
        const size_t next = i + STEP;
        if (next < n_products)
            multiply_step(
                kind, n_panels, slice, next, at_most(n_products - next, STEP), x, ldx, &products[next / STEP % 2]);
        add_step(kind, n_panels, slice, i, at_most(n_products - i, STEP), &products[i / STEP % 2], x, ldx, skipped,
            n_tokens, y, ldy, accumulate || i > 0);
    }
}

/* All tiles have one shape, because configuring takes time: the last one starts early enough to be full, and
 * the tokens it shares with the one before are not added again. */
INLINE void block_tiles(const struct tile_kind kind, const struct slice *slice, const struct fb_activation *x,
    size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate) {
    const size_t tokens = tile_tokens(n_tokens);
    for (size_t b = 0; b < slice->n_blocks; b++)
        prefetch_next(slice, b, slice->n_panels);
    for (size_t t = 0; t < n_tokens; t += tokens) {
        const size_t from = at_most(t, n_tokens - tokens);
        if (slice->n_panels == 2)
            block_tile(kind, 2, slice, x + from * ldx, ldx, t - from, tokens, y + from * ldy, ldy, accumulate);
        else
            block_tile(kind, 1, slice, x + from * ldx, ldx, t - from, tokens, y + from * ldy, ldy, accumulate);
    }
}
