/*
 * blocks_few_simd.h - quantized products of few tokens; blocks_simd.h includes it after the functions that
 * unpack blocks. Lines are unpacked in registers, directly from memory, panel after panel in memory order. A
 * tile is T tokens x 1 panel, T of FEW_TILES; with HAS_HALVES, two tiles of T tokens x half a panel.
 */
/* Multiplies one block of a panel with n_tokens tokens; in[t]: the activations of token t. Each line is
 * unpacked right before it is used, so that few registers hold lines. With one or two tokens each dot product
 * runs as DOT_CHAINS chains, which hides the latency of its instruction. */
INLINE void few_block(const enum fb_dtype dtype, const size_t n_tokens, const char *block, const struct supers *supers,
    const struct fb_activation *const in[], size_t b, v16 sums[]) {
    const struct fb_layout layout = fb_layout_of(dtype);
    const int n_groups = (int)fb_groups(dtype), n_lines = FB_UNPACKED_LINES / n_groups;
    const int max_code = max_code_of(dtype);
    const bool has_zero = layout.zero_shift != 0;
    const size_t n_chains = n_tokens <= 2 ? DOT_CHAINS : 1;
    UNROLL
    for (int g = 0; g < 2; g++) {
        if (g >= n_groups) continue;
        const int whole_or_half = n_groups == 1 ? 0 : 1 + g;
        struct dot dots[2 * FEW_TOKENS];
        UNROLL
        for (size_t t = 0; t < n_tokens; t++) {
            dots[t].sum = first_term(max_code, has_zero, layout.zero_shift, &in[t][b].minus_sums[whole_or_half]);
            if (n_chains == 2) dots[n_tokens + t].sum = v16i_start(NULL, 0);
        }
        UNROLL
        for (int q = 0; q < FB_UNPACKED_LINES; q++) {
            if (q / n_lines != g) continue;
            const struct line line = line_of(max_code, unpack_line(dtype, (const uint8_t *)block, q));
            UNROLL
            for (size_t t = 0; t < n_tokens; t++)
                add_line(max_code, n_lines, q % n_lines, line, in[t][b].codes + 4 * q,
                    &dots[(size_t)q % n_chains * n_tokens + t]);
        }
        v16 scale = v16_zero(), offset = v16_zero();
        unpack_scales(dtype, g, block + layout.bits * FB_LINE, supers, &scale, &offset);
        UNROLL
        for (size_t t = 0; t < n_tokens; t++) {
            v16i dot = n_chains == 2 ? v16i_add(dots[t].sum, dots[n_tokens + t].sum) : dots[t].sum;
            dot = with_last_term(max_code, has_zero, layout.zero_shift, &in[t][b].minus_sums[whole_or_half], dot);
            sums[t] = v16_fma(v16_from_v16i(dot), v16_mul(scale, v16_set1(in[t][b].scale)), sums[t]);
            if (fb_has_offset(dtype)) sums[t] = v16_fma(offset, v16_set1(in[t][b].sums[whole_or_half]), sums[t]);
        }
    }
}

/* One tile over a whole panel; only the first n_wanted tokens are stored. `prefetches`: also prefetches the
 * next panel. */
INLINE void few_tile(const enum fb_dtype dtype, const enum rows rows, const size_t n_tokens, const char *panel,
    size_t n_cols, const struct fb_activation *x, size_t ldx, size_t n_wanted, bool prefetches, float *y, size_t ldy) {
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
        if (t < n_wanted) store_rows_of(rows, y + t * ldy, sums[t]);
}

/* The first tile of a panel reads it from memory, the others from the cache. The second one prefetches the next
 * panel, or the first if it is alone: a Sapphire Rapids core reads 1.2 to 1.45 times as fast with it, even for
 * one token. */
INLINE void few_tokens(const enum fb_dtype dtype, const char *panels, size_t n_panels, size_t n_cols,
    const struct fb_activation *x, size_t ldx, size_t n_tokens, float *y, size_t ldy) {
    const size_t panel_bytes = fb_panel_bytes(dtype, n_cols);
    for (size_t p = 0; p < n_panels; p++) {
        const char *panel = panels + p * panel_bytes;
        bool has_prefetched = false;
        size_t taken;
        for (size_t t = 0; t < n_tokens; t += taken) {
            const size_t rest = n_tokens - t;
            const struct fb_activation *from = x + t * ldx;
            float *out = y + t * ldy + p * FB_LANES;
            taken = rest;
#define TILE_CASE(T, least)                                                                                            \
    if ((T) <= LARGEST_FEW_TILE(fb_layout_of(dtype).bits) && rest >= (least)) {                                        \
        taken = rest < (T) ? rest : (T);                                                                               \
        const bool prefetches = !has_prefetched && (HAS_HALVES(T) || t > 0 || taken == n_tokens);                      \
        if (HAS_HALVES(T)) few_tile(dtype, LOW_ROWS, T, panel, n_cols, from, ldx, taken, false, out, ldy);             \
        few_tile(                                                                                                      \
            dtype, HAS_HALVES(T) ? HIGH_ROWS : ALL_ROWS, T, panel, n_cols, from, ldx, taken, prefetches, out, ldy);    \
        has_prefetched = has_prefetched || prefetches;                                                                 \
        continue;                                                                                                      \
    }
            FEW_TILES(TILE_CASE)
#undef TILE_CASE
        }
    }
}
