/*
 * blocks_few_simd.h - quantized products of few tokens; blocks_simd.h includes it after the functions that
 * unpack blocks. Lines are unpacked in registers, directly from memory, panel after panel in memory order. A
 * tile is T tokens x 1 panel, T of FEW_TILES.
 */
INLINE v16i start_of(const int zero_shift, const bool is_wide, const int32_t *minus_sum) {
    if (zero_shift == 0 || (is_wide && DOT_KNOWS_ZERO)) return v16i_start(NULL, 0);
    return v16i_start(minus_sum, zero_shift);
}

/* Multiplies one block of a panel with n_tokens tokens; in[t]: the activations of token t. With one or two
 * tokens each dot product runs as two chains, which halves its latency. */
INLINE void few_block(const enum fb_dtype dtype, const size_t n_tokens, const char *block, const struct supers *supers,
    const struct fb_activation *const in[], size_t b, v16 sums[]) {
    const struct fb_layout layout = fb_layout_of(dtype);
    const int n_groups = (int)fb_groups(dtype), n_lines = FB_UNPACKED_LINES / n_groups;
    const size_t n_chains = n_tokens <= 2 ? 2 : 1;
    v64 lines[FB_UNPACKED_LINES];
    unpack_lines(dtype, (const uint8_t *)block, lines);
    v16 scale = v16_zero(), offset = v16_zero();
    UNROLL
    for (int g = 0; g < 2; g++) {
        if (g >= n_groups) continue;
        const int whole_or_half = n_groups == 1 ? 0 : 1 + g;
        v16i dots[2 * FEW_TOKENS];
        UNROLL
        for (size_t t = 0; t < n_tokens; t++) {
            dots[t] = start_of(layout.zero_shift, layout.is_wide, &in[t][b].minus_sums[whole_or_half]);
            if (n_chains == 2) dots[n_tokens + t] = v16i_start(NULL, 0);
        }
        UNROLL
        for (int q = 0; q < FB_UNPACKED_LINES; q++) {
            if (q / n_lines != g) continue;
            UNROLL
            for (size_t t = 0; t < n_tokens; t++) {
                v16i *dot = &dots[(size_t)q % n_chains * n_tokens + t];
                *dot = v16i_dot(*dot, lines[q], in[t][b].codes + 4 * q, layout.is_wide);
            }
        }
        unpack_scales(dtype, g, block + layout.bits * FB_LINE, supers, &scale, &offset);
        UNROLL
        for (size_t t = 0; t < n_tokens; t++) {
            const v16i dot = n_chains == 2 ? v16i_add(dots[t], dots[n_tokens + t]) : dots[t];
            sums[t] = v16_fma(v16_from_v16i(dot), v16_mul(scale, v16_set1(in[t][b].scale)), sums[t]);
            if (fb_has_offset(dtype)) sums[t] = v16_fma(offset, v16_set1(in[t][b].sums[whole_or_half]), sums[t]);
        }
    }
}

/* One tile over a whole panel; only the first n_wanted tokens are stored. `prefetches`: also prefetches the
 * next panel. */
INLINE void few_tile(const enum fb_dtype dtype, const size_t n_tokens, const char *panel, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_wanted, bool prefetches, float *y, size_t ldy) {
    const size_t block_bytes = fb_block_bytes(dtype), super_bytes = fb_layout_of(dtype).super_bytes;
    const size_t n_blocks = n_cols / FB_BLOCK_COLUMNS, panel_bytes = fb_panel_bytes(dtype, n_cols);
    const struct fb_activation *in[FEW_TOKENS];
    v16 sums[FEW_TOKENS];
    UNROLL
    for (size_t t = 0; t < n_tokens; t++) {
        in[t] = x + (t < n_wanted ? t : n_wanted - 1) * ldx;
        sums[t] = v16_zero();
    }
    struct supers supers = {v16_zero(), v16_zero()};
    for (size_t b = 0; b < n_blocks; b++, panel += block_bytes) {
        if (super_bytes && b % 8 == 0) {
            supers = unpack_supers(dtype, panel);
            panel += super_bytes;
        }
        if (prefetches)
            for (size_t i = 0; i < block_bytes; i += FB_LINE)
                __builtin_prefetch(panel + panel_bytes + i, 0, 2);
        few_block(dtype, n_tokens, panel, &supers, in, b, sums);
    }
    UNROLL
    for (size_t t = 0; t < n_tokens; t++)
        if (t < n_wanted) v16_store(y + t * ldy, sums[t]);
}

/* The first tile of a panel reads it from memory, those for further tokens from the cache. */
INLINE void few_tokens(const enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy) {
    const size_t panel_bytes = fb_panel_bytes(dtype, n_cols);
    for (size_t p = 0; p < n_panels; p++) {
        const char *panel = panels + p * panel_bytes;
        size_t taken;
        for (size_t t = 0; t < n_tokens; t += taken) {
            const size_t rest = n_tokens - t;
            const bool prefetches = t > 0 && t <= FEW_TOKENS;
            taken = rest;
#define TILE_CASE(T, least)                                                                                            \
    if (rest >= (least)) {                                                                                             \
        taken = rest < (T) ? rest : (T);                                                                               \
        few_tile(dtype, T, panel, n_cols, x + t * ldx, ldx, taken, prefetches, y + t * ldy + p * FB_LANES, ldy);       \
        continue;                                                                                                      \
    }
            FEW_TILES(TILE_CASE)
#undef TILE_CASE
        }
    }
}
