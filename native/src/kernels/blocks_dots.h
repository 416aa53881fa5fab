/*
 * blocks_dots.h - quantized products of many tokens by dot products of four bytes (v16i_dot); blocks_simd.h
 * includes it where the CPU has no matrix instructions, and draws tile and slice. Codes are unsigned; a dot
 * product starts with the contribution of their zero point.
 *
 *     defines          unpack_block, store_scales, begin_tiles, end_tiles, block_tiles
 *     template over    struct tile_kind (all of blocks_simd.h), tokens x panels of BLOCK_TILES; where
 *                      HALF_TILES are defined, wide codes take those, low and high rows
 *     tested           test_blocks: every format, 1 .. 50 tokens and 1 .. 5 panels
 */
/* Sums of the largest tile: twice as many tokens for half a panel. */
enum { MAX_BLOCK_SUMS = 2 * BLOCK_TOKENS * BLOCK_PANELS };

INLINE void unpack_block(const enum fb_dtype dtype, const uint8_t *codes, uint8_t *unpacked) {
    UNROLL
    for (int q = 0; q < FB_UNPACKED_LINES; q++) {
        const struct line line = line_of(max_code_of(dtype), unpack_line(dtype, codes, q));
        v64_store(unpacked + q * FB_LINE, line.codes);
#ifdef HAS_PAIR_SUMS
        if (fb_layout_of(dtype).is_wide) v64_store(unpacked + (FB_UNPACKED_LINES + q) * FB_LINE, line.magnitudes);
#endif
    }
}

/* The line at `at` in a slice. */
INLINE struct line load_line(const uint8_t *at, const bool is_wide) {
    struct line line;
    line.codes = v64_load(at);
#ifdef HAS_PAIR_SUMS
    line.magnitudes = is_wide ? v64_load(at + FB_UNPACKED_LINES * FB_LINE) : line.codes;
#endif
    (void)is_wide;
    return line;
}

INLINE void store_scales(float *out, v16 scales) {
    v16_store(out, scales);
}

INLINE void begin_tiles(const int n_groups, size_t n_tokens) {
    (void)n_groups, (void)n_tokens;
}

INLINE void end_tiles(void) {}

/* One tile over the blocks of a slice; the first tile of a slice prefetches what comes next. */
INLINE void block_tile(const struct tile_kind kind, const enum rows rows, const size_t n_tokens, const size_t n_panels,
    const struct slice *slice, bool prefetches, const struct fb_activation *x, size_t ldx, float *y, size_t ldy,
    bool accumulate) {
    const int n_lines = FB_UNPACKED_LINES / kind.n_groups;
    const bool has_zero = !kind.has_offset;
    v16 sums[MAX_BLOCK_SUMS];
    load_sums(n_tokens, n_panels, y, ldy, accumulate, sums);
    for (size_t b = 0; b < slice->n_blocks; b++) {
        if (prefetches) prefetch_next(slice, b, n_panels);
        UNROLL
        for (int g = 0; g < 2; g++) {
            if (g >= kind.n_groups) continue;
            const int whole_or_half = kind.n_groups == 1 ? 0 : 1 + g;
            struct dot dots[MAX_BLOCK_SUMS];
            UNROLL
            for (size_t t = 0; t < n_tokens; t++) {
                v16i start = first_term(
                    kind.max_code, has_zero, slice->zero_shift, &x[t * ldx + b].minus_sums[whole_or_half]);
                UNROLL
                for (size_t p = 0; p < n_panels; p++)
                    dots[p * n_tokens + t].sum = start;
            }
            UNROLL
            for (int q = 0; q < FB_UNPACKED_LINES; q++) {
                if (q / n_lines != g) continue;
                struct line lines[BLOCK_PANELS];
                UNROLL
                for (size_t p = 0; p < n_panels; p++)
                    lines[p] = load_line(
                        slice->codes + p * slice->panel_stride + b * slice->block_stride + (size_t)q * FB_LINE,
                        kind.max_code == WIDE);
                UNROLL
                for (size_t t = 0; t < n_tokens; t++) {
                    UNROLL
                    for (size_t p = 0; p < n_panels; p++)
                        add_line(kind.max_code, n_lines, q % n_lines, lines[p], x[t * ldx + b].codes + 4 * q,
                            &dots[p * n_tokens + t]);
                }
            }
            UNROLL
            for (size_t p = 0; p < n_panels; p++) {
                v16 scale = v16_load(slice->scales[p][b][g]);
                UNROLL
                for (size_t t = 0; t < n_tokens; t++) {
                    const struct fb_activation *in = &x[t * ldx + b];
                    v16 *sum = &sums[p * n_tokens + t];
                    const v16 dot = v16_from_v16i(with_last_term(kind.max_code, has_zero, slice->zero_shift,
                        &in->minus_sums[whole_or_half], dots[p * n_tokens + t].sum));
                    *sum = v16_fma(dot, v16_mul(scale, v16_set1(in->scale)), *sum);
                    if (kind.has_offset)
                        *sum = v16_fma(v16_load(slice->offsets[p][b][g]), v16_set1(in->sums[whole_or_half]), *sum);
                }
            }
        }
    }
    UNROLL
    for (size_t p = 0; p < n_panels; p++) {
        UNROLL
        for (size_t t = 0; t < n_tokens; t++)
            store_rows_of(rows, y + t * ldy + p * FB_LANES, sums[p * n_tokens + t]);
    }
}

INLINE void block_tiles(const struct tile_kind kind, const struct slice *slice, const struct fb_activation *x,
    size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate) {
#ifdef HALF_TILES
    const bool has_halves = kind.max_code == WIDE && DOT_KNOWS_ZERO;
#else
    const bool has_halves = false;
#endif
    const size_t most = has_halves ? 2 * BLOCK_TOKENS : BLOCK_TOKENS;
    size_t tokens;
    for (size_t t = 0; t < n_tokens; t += tokens) {
        const size_t rest = n_tokens - t, n_tiles = (rest + most - 1) / most;
        tokens = (rest + n_tiles - 1) / n_tiles;
        const struct fb_activation *in = x + t * ldx;
        float *out = y + t * ldy;
#ifdef HALF_TILES
        if (has_halves) switch (tokens) {
#define TILE_CASE(T)                                                                                                   \
    case T:                                                                                                            \
        block_tile(kind, LOW_ROWS, T, 1, slice, t == 0, in, ldx, out, ldy, accumulate);                                \
        block_tile(kind, HIGH_ROWS, T, 1, slice, false, in, ldx, out, ldy, accumulate);                                \
        continue;
                HALF_TILES(TILE_CASE)
#undef TILE_CASE
            default:
                __builtin_unreachable();
            }
#endif
        switch (tokens * 4 + slice->n_panels) {
#define TILE_CASE(T, P)                                                                                                \
    case (T) * 4 + (P):                                                                                                \
        block_tile(kind, ALL_ROWS, T, P, slice, t == 0, in, ldx, out, ldy, accumulate);                                \
        break;
            BLOCK_TILES(TILE_CASE)
#undef TILE_CASE
        default:
            __builtin_unreachable();
        }
    }
}
