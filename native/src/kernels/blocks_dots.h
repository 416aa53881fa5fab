/*
 * blocks_dots.h - quantized products of many tokens by dot products of four bytes (v16i_dot); blocks_simd.h
 * includes it where the CPU has no matrix instructions, and draws tile and slice. Codes are unsigned; a dot
 * product starts with the contribution of their zero point.
 *
 *     defines          store_unpacked, store_scales, begin_tiles, end_tiles, block_tiles
 *     template over    struct tile_kind (all five of blocks_simd.h), tokens x panels of BLOCK_TILES
 *     tested           test_blocks: every format, 1 .. 50 tokens and 1 .. 5 panels
 */
INLINE void store_unpacked(uint8_t *unpacked, const v64 lines[FB_UNPACKED_LINES], const int zero_shift) {
    (void)zero_shift;
    UNROLL
    for (int q = 0; q < FB_UNPACKED_LINES; q++)
        v64_store(unpacked + q * FB_LINE, lines[q]);
}

INLINE void store_scales(float *out, v16 scales) {
    v16_store(out, scales);
}

INLINE void begin_tiles(const int n_groups, size_t n_tokens) {
    (void)n_groups, (void)n_tokens;
}

INLINE void end_tiles(void) {}

/* One tile over the blocks of a slice; the first tile of a slice prefetches what comes next. */
INLINE void block_tile(const struct tile_kind kind, const size_t n_tokens, const size_t n_panels,
    const struct slice *slice, bool prefetches, const struct fb_activation *x, size_t ldx, float *y, size_t ldy,
    bool accumulate) {
    v16 sums[BLOCK_TOKENS * BLOCK_PANELS];
    load_sums(n_tokens, n_panels, y, ldy, accumulate, sums);
    for (size_t b = 0; b < slice->n_blocks; b++) {
        if (prefetches) prefetch_next(slice, b, n_panels);
        UNROLL
        for (int g = 0; g < 2; g++) {
            if (g >= kind.n_groups) continue;
            const int whole_or_half = kind.n_groups == 1 ? 0 : 1 + g;
            v16i dots[BLOCK_TOKENS * BLOCK_PANELS];
            UNROLL
            for (size_t t = 0; t < n_tokens; t++) {
                v16i start = kind.has_offset || (kind.is_wide && DOT_KNOWS_ZERO)
                                 ? v16i_start(NULL, 0)
                                 : v16i_start(&x[t * ldx + b].minus_sums[whole_or_half], slice->zero_shift);
                UNROLL
                for (size_t p = 0; p < n_panels; p++)
                    dots[p * n_tokens + t] = start;
            }
            UNROLL
            for (int q = 0; q < FB_UNPACKED_LINES; q++) {
                if (q / (FB_UNPACKED_LINES / kind.n_groups) != g) continue;
                v64 lines[BLOCK_PANELS];
                UNROLL
                for (size_t p = 0; p < n_panels; p++)
                    lines[p] = v64_load(
                        slice->codes + p * slice->panel_stride + b * slice->block_stride + (size_t)q * FB_LINE);
                UNROLL
                for (size_t t = 0; t < n_tokens; t++) {
                    UNROLL
                    for (size_t p = 0; p < n_panels; p++)
                        dots[p * n_tokens + t] = v16i_dot(
                            dots[p * n_tokens + t], lines[p], x[t * ldx + b].codes + 4 * q, kind.is_wide);
                }
            }
            UNROLL
            for (size_t p = 0; p < n_panels; p++) {
                v16 scale = v16_load(slice->scales[p][b][g]);
                UNROLL
                for (size_t t = 0; t < n_tokens; t++) {
                    const struct fb_activation *in = &x[t * ldx + b];
                    v16 *sum = &sums[p * n_tokens + t];
                    const v16 dot = v16_from_v16i(dots[p * n_tokens + t]);
                    *sum = v16_fma(dot, v16_mul(scale, v16_set1(in->scale)), *sum);
                    if (kind.has_offset)
                        *sum = v16_fma(v16_load(slice->offsets[p][b][g]), v16_set1(in->sums[whole_or_half]), *sum);
                }
            }
        }
    }
    store_sums(n_tokens, n_panels, sums, y, ldy);
}

INLINE void block_tiles(const struct tile_kind kind, const struct slice *slice, const struct fb_activation *x,
    size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate) {
    size_t tokens;
    for (size_t t = 0; t < n_tokens; t += tokens) {
        const size_t rest = n_tokens - t, n_tiles = (rest + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        tokens = (rest + n_tiles - 1) / n_tiles;
        const struct fb_activation *in = x + t * ldx;
        float *out = y + t * ldy;
        switch (tokens * 4 + slice->n_panels) {
#define TILE_CASE(T, P)                                                                                                \
    case (T) * 4 + (P):                                                                                                \
        block_tile(kind, T, P, slice, t == 0, in, ldx, out, ldy, accumulate);                                          \
        break;
            BLOCK_TILES(TILE_CASE)
#undef TILE_CASE
        default:
            __builtin_unreachable();
        }
    }
}
