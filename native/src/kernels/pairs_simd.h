/*
 * pairs_simd.h - products of bf16 weights and inputs rounded to bf16; simd.h includes it, and has those with
 * inputs in f32. A line of 64 bytes holds two columns of 16 rows:
 *
 *     panel       | line 0: columns 0, 1 | line 1: columns 2, 3 | ...        PAIR_LINE = 32 elements per line
 *     line        | row 0: 2 columns | row 1: 2 columns | ... | row 15: 2 columns |
 *     slice       256 lines (VDPBF16PS) or 128 lines, widened to 256 columns of f32, of up to MAX_PANELS
 *                 panels in L1
 *     tile        n_tokens x n_panels sums in registers, as in simd.h
 *
 * With FABULA_DOT_PAIR one instruction (AVX-512 BF16) multiplies and adds both columns. Without it few tokens
 * separate the columns in registers, many tokens in slices. The order of a sum is that instruction's: of each
 * pair of columns the second is added first.
 *
 * Tested by test_kernels, bit for bit against reference.c: 1 .. 5 panels, width 1 and 2, 1 .. 600 columns, 1
 * .. 7, 11 .. 13, 25, 49 and 60 tokens, with and without `accumulate` and `next`.
 */

enum { PAIR_LINE = 2 * FB_LANES }; /* elements */

/* sums + the line's two columns times the two inputs at x. */
INLINE v16 pair_fma(v16 sums, v64 line, const uint16_t *x) {
#ifdef FABULA_DOT_PAIR
    return FABULA_DOT_PAIR(sums, line, x);
#else
    return v16_fma(v16_first_of_pairs(line), v16_set1(fb_bf16_to_f32(x[0])),
        v16_fma(v16_second_of_pairs(line), v16_set1(fb_bf16_to_f32(x[1])), sums));
#endif
}

/* One tile over all lines. `apart`: elements from panel to panel; `step`: from line to line. */
INLINE void pair_tile(const size_t n_tokens, const size_t n_panels, const uint16_t *panels, size_t apart, size_t step,
    size_t n_pairs, const uint16_t *x, size_t ldx, float *y, size_t ldy, bool accumulate, const void *next) {
    v16 sums[SUMS];
    load_sums(n_tokens, n_panels, y, ldy, accumulate, sums);
    for (size_t k = 0; k < n_pairs; k++) {
        v64 lines[MAX_PANELS];
        UNROLL
        for (size_t p = 0; p < n_panels; p++)
            lines[p] = v64_load((const uint8_t *)(panels + p * apart + k * step));
        if (n_tokens <= PREFETCH_TOKENS) UNROLL
        for (size_t p = 0; p < n_panels; p++)
            __builtin_prefetch((const uint16_t *)next + p * apart + k * step, 0, 2);
        UNROLL
        for (size_t t = 0; t < n_tokens; t++) {
            UNROLL
            for (size_t p = 0; p < n_panels; p++)
                sums[p * n_tokens + t] = pair_fma(sums[p * n_tokens + t], lines[p], x + t * ldx + 2 * k);
        }
    }
    store_sums(n_tokens, n_panels, sums, y, ldy);
}

INLINE void pair_tiles(const struct fb_panels panels, size_t n_panels, size_t n_pairs, const uint16_t *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    const size_t apart = panels.width == 1 ? panels.stride : PAIR_LINE, step = panels.width * PAIR_LINE;
    size_t tokens;
    for (size_t t = 0; t < n_tokens; t += tokens) {
        const size_t rest = n_tokens - t, n_tiles = (rest + MAX_TOKENS - 1) / MAX_TOKENS;
        tokens = (rest + n_tiles - 1) / n_tiles;
        /* Many tokens read the panels from L1, where two streams do no harm. */
        const size_t most = n_tokens > IN_REGISTERS ? TILE_PANELS(tokens)
                                                    : panels_of_tile(&panels, sizeof(uint16_t), tokens);
        for (size_t p = 0; p < n_panels; p += most) {
            const size_t count = n_panels - p < most ? n_panels - p : most, at = fb_panel_at(&panels, PAIR_LINE, p);
            const uint16_t *from = (const uint16_t *)panels.first + at, *in = x + t * ldx;
            const void *after = next ? (const uint16_t *)next + at : from;
            float *out = y + t * ldy + p * FB_LANES;
            switch (tokens * 8 + count) {
#define TILE_CASE(T, P)                                                                                                \
    case (T) * 8 + (P):                                                                                                \
        pair_tile(T, P, from, apart, step, n_pairs, in, ldx, out, ldy, accumulate, after);                             \
        break;
                TILES(TILE_CASE)
#undef TILE_CASE
            default:
                __builtin_unreachable();
            }
        }
    }
}

#ifdef FABULA_DOT_PAIR

/* A slice keeps its panels in L1 for all tokens. */
static void gemm_pairs(struct fb_panels panels, size_t n_panels, size_t n_cols, const uint16_t *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    const size_t n_pairs = (n_cols + 1) / 2;
    if (n_tokens <= MAX_TOKENS || n_pairs == 0) {
        pair_tiles(panels, n_panels, n_pairs, x, ldx, n_tokens, y, ldy, accumulate, next);
        return;
    }
    const size_t slice_panels = TILE_PANELS(MAX_TOKENS);
    for (size_t p = 0; p < n_panels; p += slice_panels) {
        const size_t count = n_panels - p < slice_panels ? n_panels - p : slice_panels;
        for (size_t k = 0; k < n_pairs; k += SLICE) {
            struct fb_panels part = panels;
            part.first = (const uint16_t *)panels.first + fb_panel_at(&panels, PAIR_LINE, p) +
                         k * panels.width * PAIR_LINE;
            pair_tiles(part, count, n_pairs - k < SLICE ? n_pairs - k : SLICE, x + 2 * k, ldx, n_tokens,
                y + p * FB_LANES, ldy, accumulate || k > 0, NULL);
        }
    }
}

#else

/* Tokens whose inputs are widened at a time, next to the panels' slices. */
enum { PAIR_TOKENS = 4 * MAX_TOKENS };

/* Many tokens: panels and inputs are widened to f32 with the columns of each pair swapped, so that a plain
 * product adds them in the right order. */
static void gemm_pairs(struct fb_panels panels, size_t n_panels, size_t n_cols, const uint16_t *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    const size_t n_pairs = (n_cols + 1) / 2;
    if (n_tokens <= MAX_TOKENS || n_pairs == 0) {
        pair_tiles(panels, n_panels, n_pairs, x, ldx, n_tokens, y, ldy, accumulate, next);
        return;
    }
    const size_t slice_panels = TILE_PANELS(MAX_TOKENS);
    _Alignas(64) float slice[MAX_PANELS * SLICE * FB_LANES], inputs[PAIR_TOKENS * SLICE];
    for (size_t p = 0; p < n_panels; p += slice_panels) {
        const size_t count = n_panels - p < slice_panels ? n_panels - p : slice_panels;
        for (size_t k = 0; k < n_pairs; k += SLICE / 2) {
            const size_t length = n_pairs - k < SLICE / 2 ? n_pairs - k : SLICE / 2;
            for (size_t q = 0; q < count; q++)
                for (size_t i = 0; i < length; i++) {
                    const size_t at = fb_panel_at(&panels, PAIR_LINE, p + q) + (k + i) * panels.width * PAIR_LINE;
                    const v64 line = v64_load((const uint8_t *)((const uint16_t *)panels.first + at));
                    float *out = slice + (q * SLICE + 2 * i) * FB_LANES;
                    v16_store(out, v16_second_of_pairs(line));
                    v16_store(out + FB_LANES, v16_first_of_pairs(line));
                }
            for (size_t t = 0; t < n_tokens; t += PAIR_TOKENS) {
                const size_t tokens = n_tokens - t < PAIR_TOKENS ? n_tokens - t : PAIR_TOKENS;
                for (size_t i = 0; i < tokens; i++)
                    for (size_t j = 0; j < 2 * length; j++)
                        inputs[i * SLICE + j] = fb_bf16_to_f32(x[(t + i) * ldx + 2 * k + (j ^ 1)]);
                gemm_tiles(FB_F32, (struct fb_panels){slice, 1, SLICE * FB_LANES}, count, 2 * length, inputs, SLICE,
                    tokens, y + t * ldy + p * FB_LANES, ldy, accumulate || k > 0, NULL);
            }
        }
    }
}

#endif

static void narrow_pairs(const float *x, size_t n, uint16_t *out) {
    narrow_bf16(x, n, out);
    if (n % 2) out[n] = 0;
}
