/*
 * simd.h - the fast kernels, written once over a vector of 16 floats; avx2.h, avx512.h and neon.h define the
 * vector and include this. The terms, for a product y[t] = W x[t] with weights in panels of 16 rows
 * (kernels.h, struct fb_panels):
 *
 *     panel    16 rows of W, column after column:   | line 0 | line 1 | ... | line n_k - 1 |
 *     line     one column of a panel, a v16:        | row 0 | row 1 | ... | row 15 |
 *              in bf16 a pair of columns, a v64:    | row 0: 2 columns | ... | row 15: 2 columns |
 *     tile     n_tokens x n_panels sums in registers, each a v16 with lane j for row j of its panel. All
 *              lines are multiplied into it; each line is loaded once and each input broadcast once:
 *
 *                                 panel 0     panel 1
 *                    token 0    |  sum 00  |  sum 10  |        sum += line k of the panel * x[token][k]
 *                    token 1    |  sum 01  |  sum 11  |
 *     slice    256 lines of up to MAX_PANELS panels, widened to f32 in L1 once and used by the tiles of all
 *              tokens
 *
 * The including file defines:
 *
 *   v16                      16 floats, lane j for row j of a panel
 *   v16_zero v16_set1 v16_load v16_store v16_add v16_mul v16_div v16_fma
 *   v16_negate_fma           c - a b
 *   v16_round                to even
 *   v16_min v16_max          the second operand if either is NaN
 *   v16_power_of_2           2^n of integers in -126 .. 127
 *   v16_keep_at_least        a where x >= limit or x is NaN, else 0
 *   v16_load_f16 v16_load_bf16 v16_store_f16 v16_store_bf16
 *   v16_first_of_pairs v16_second_of_pairs    f32 of 16 bf16 pairs in a v64
 *   FABULA_DOT_PAIR          optional: multiplies bf16 pairs and adds in one instruction: (sums, line, x)
 *   SUMS                     v16 sums that fit in registers next to the weights and one broadcast
 *   MAX_TOKENS MAX_PANELS    largest tile; tokens x panels <= SUMS
 *   TILE_PANELS(tokens)      panels of a tile with that many tokens, where panels are not interleaved
 *   TILES(X)                 X(tokens, panels) for every tile that panels_of_tile can choose
 *   STATE_BLOCKS             blocks of 16 columns of a state that run side by side: each has two sums in registers
 *   KERNEL_TABLE             name of the table
 *   and what blocks_simd.h requires
 *
 *     values                  avx2              avx512           neon
 *     SUMS                    6                 24               6
 *     MAX_TOKENS MAX_PANELS   6 4               12 4             6 2
 *     STATE_BLOCKS            2                 4                2
 *     TILE_PANELS             1: 1, 2: 3,       1 .. 3: 1,       2: 2,
 *                             3: 2, 4 .. 6: 1   4 .. 12: 2       others: 1
 *
 * Every order of summation is that of kernels.h, so results equal reference.c bit for bit. Tested by
 * test_kernels for every table that the CPU or an emulation has: f32, f16 and bf16, 1 .. 5 panels, width 1 and
 * 2, k of 0 .. 600, 1 .. 7, 11 .. 13 and 25 tokens, with and without `accumulate` and `next`, misaligned and
 * hostile inputs.
 */
#include "kernels/exp.h"
#include "kernels/kernels.h"
#include "quant/convert.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* SLICE: lines of a panel that are widened into L1 at a time. 256 x 16 floats are 16 KiB, half of the
 * smallest L1 in use. IN_REGISTERS: up to so many tokens widen in registers instead. */
enum { SLICE = 256, IN_REGISTERS = 2 * MAX_TOKENS, MEMORY_PAGE = 4096 };

/* Tiles of at most so many tokens prefetch the next panels, line by line while they multiply. Full tiles, as
 * in prefill, would be 3 % slower for it. The prefetch goes into L2, which allows more outstanding lines than
 * L1: on separate pieces of 4 KiB a Zen 4 core reads 16 GB/s with it and 8 without (13 if all lines of a
 * piece are prefetched at once). */
enum { PREFETCH_TOKENS = MAX_TOKENS - 1 };

/* ---- Matrix products --------------------------------------------------------------------------------------------- */

/* Columns of a line. */
INLINE size_t columns_of(const enum fb_dtype dtype) {
    return dtype == FB_BF16 ? 2 : 1;
}

/* One column of the line that begins at element `index`. */
INLINE v16 load_weights(const enum fb_dtype dtype, const void *panels, size_t index, const size_t column) {
    if (dtype == FB_F32) return v16_load((const float *)panels + index);
    if (dtype == FB_F16) return v16_load_f16((const uint16_t *)panels + index);
    if (dtype == FB_BF16) {
        const v64 pairs = v64_load((const uint8_t *)((const uint16_t *)panels + index));
        return column == 0 ? v16_first_of_pairs(pairs) : v16_second_of_pairs(pairs);
    }
    return v16_from_v16i(v16i_load_s8((const uint8_t *)panels + index));
}

/* Initial sums of a tile: sums[p * n_tokens + t] for token t and panel p. */
INLINE void load_sums(
    const size_t n_tokens, const size_t n_panels, const float *y, size_t ldy, bool accumulate, v16 *sums) {
    UNROLL
    for (size_t p = 0; p < n_panels; p++) {
        UNROLL
        for (size_t t = 0; t < n_tokens; t++)
            sums[p * n_tokens + t] = accumulate ? v16_load(y + t * ldy + p * FB_LANES) : v16_zero();
    }
}

INLINE void store_sums(const size_t n_tokens, const size_t n_panels, const v16 *sums, float *y, size_t ldy) {
    UNROLL
    for (size_t p = 0; p < n_panels; p++) {
        UNROLL
        for (size_t t = 0; t < n_tokens; t++)
            v16_store(y + t * ldy + p * FB_LANES, sums[p * n_tokens + t]);
    }
}

/* Panels per tile for `tokens` tokens. Two interleaved panels are one stream. Others within one memory page,
 * like those of K and V, are read one after another: hardware prefetchers track one stream per page. */
INLINE size_t panels_of_tile(const struct fb_panels *panels, size_t element_bytes, size_t tokens) {
    if (panels->width == 2) return 2 * tokens <= SUMS ? 2 : 1;
    return panels->stride * element_bytes < MEMORY_PAGE ? 1 : TILE_PANELS(tokens);
}

/* Adds one column of a line, that of the inputs at x. `apart`: elements from panel to panel. */
INLINE void tile_column(const enum fb_dtype dtype, const size_t n_tokens, const size_t n_panels, const void *panels,
    size_t apart, size_t index, const size_t column, const float *x, size_t ldx, v16 *sums) {
    v16 weights[MAX_PANELS];
    UNROLL
    for (size_t p = 0; p < n_panels; p++)
        weights[p] = load_weights(dtype, panels, p * apart + index, column);
    UNROLL
    for (size_t t = 0; t < n_tokens; t++) {
        v16 input = v16_set1(x[t * ldx]);
        UNROLL
        for (size_t p = 0; p < n_panels; p++)
            sums[p * n_tokens + t] = v16_fma(weights[p], input, sums[p * n_tokens + t]);
    }
}

/* One tile over all n_k columns. `apart`: elements from panel to panel; `step`: from line to line. The first
 * three arguments are constants at every call, so each tile compiles to straight-line code. */
INLINE void tile(const enum fb_dtype dtype, const size_t n_tokens, const size_t n_panels, const void *panels,
    size_t apart, size_t step, size_t n_k, const float *x, size_t ldx, float *y, size_t ldy, bool accumulate,
    const void *next) {
    v16 sums[SUMS];
    load_sums(n_tokens, n_panels, y, ldy, accumulate, sums);
    size_t k = 0, index = 0;
    for (; k + columns_of(dtype) <= n_k; k += columns_of(dtype), index += step) {
        if (n_tokens <= PREFETCH_TOKENS) UNROLL
        for (size_t p = 0; p < n_panels; p++)
            __builtin_prefetch((const char *)next + (p * apart + index) * fb_element_bytes(dtype), 0, 2);
        tile_column(dtype, n_tokens, n_panels, panels, apart, index, 0, x + k, ldx, sums);
        if (columns_of(dtype) == 2)
            tile_column(dtype, n_tokens, n_panels, panels, apart, index, 1, x + k + 1, ldx, sums);
    }
    if (columns_of(dtype) == 2 && k < n_k)
        tile_column(dtype, n_tokens, n_panels, panels, apart, index, 0, x + k, ldx, sums);
    store_sums(n_tokens, n_panels, sums, y, ldy);
}

INLINE void gemm_tiles(const enum fb_dtype dtype, const struct fb_panels panels, size_t n_panels, size_t n_k,
    const float *x, size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    const size_t element_bytes = fb_element_bytes(dtype), line = columns_of(dtype) * FB_LANES;
    const size_t apart = panels.width == 1 ? panels.stride : line, step = panels.width * line;
    size_t tokens;
    for (size_t t = 0; t < n_tokens; t += tokens) {
        /* Tiles of nearly equal size: one of 12 and one of 4 would take longer than two of 8. */
        const size_t rest = n_tokens - t, n_tiles = (rest + MAX_TOKENS - 1) / MAX_TOKENS;
        tokens = (rest + n_tiles - 1) / n_tiles;
        const size_t most = panels_of_tile(&panels, element_bytes, tokens);
        for (size_t p = 0; p < n_panels; p += most) {
            const size_t count = n_panels - p < most ? n_panels - p : most;
            const size_t at = fb_panel_at(&panels, line, p) * element_bytes;
            const char *from = (const char *)panels.first + at;
            /* Only a single tile prefetches: with several, the first ones wait for memory themselves. */
            const char *after = next && n_tiles == 1 ? (const char *)next + at : from;
            const float *in = x + t * ldx;
            float *out = y + t * ldy + p * FB_LANES;
            switch (tokens * 8 + count) {
#define TILE_CASE(T, P)                                                                                                \
    case (T) * 8 + (P):                                                                                                \
        tile(dtype, T, P, from, apart, step, n_k, in, ldx, out, ldy, accumulate, after);                               \
        break;
                TILES(TILE_CASE)
#undef TILE_CASE
            default:
                __builtin_unreachable();
            }
        }
    }
}

/* Few tokens widen weights in registers. Many tokens widen each slice into L1 once and share it, so that the
 * conversion costs almost nothing. */
INLINE void gemm(const enum fb_dtype dtype, const struct fb_panels panels, size_t n_panels, size_t n_k, const float *x,
    size_t ldx, size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    if (n_tokens <= IN_REGISTERS) {
        gemm_tiles(dtype, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate, next);
        return;
    }
    const size_t slice_panels = TILE_PANELS(MAX_TOKENS), columns = columns_of(dtype), line = columns * FB_LANES;
    /* One of two interleaved panels is copied too: its lines would occupy half of L1's sets. */
    const bool copies = dtype != FB_F32 || slice_panels < panels.width;
    _Alignas(64) float slice[MAX_PANELS * SLICE * FB_LANES];
    for (size_t p = 0; p < n_panels; p += slice_panels) {
        const size_t count = n_panels - p < slice_panels ? n_panels - p : slice_panels;
        for (size_t k = 0; k < n_k || k == 0; k += SLICE) {
            const size_t length = n_k - k < SLICE ? n_k - k : SLICE;
            struct fb_panels part = {slice, 1, SLICE * FB_LANES};
            for (size_t q = 0; copies && q < count; q++) {
                size_t at = fb_panel_at(&panels, line, p + q) + k / columns * panels.width * line;
                for (size_t i = 0; i < length; i += columns, at += panels.width * line) {
                    float *out = slice + (q * SLICE + i) * FB_LANES;
                    v16_store(out, load_weights(dtype, panels.first, at, 0));
                    if (columns == 2 && i + 1 < length)
                        v16_store(out + FB_LANES, load_weights(dtype, panels.first, at, 1));
                }
            }
            if (!copies) {
                part = panels;
                part.first = (const float *)panels.first + fb_panel_at(&panels, line, p) + k * panels.width * line;
            }
            gemm_tiles(
                FB_F32, part, count, length, x + k, ldx, n_tokens, y + p * FB_LANES, ldy, accumulate || k > 0, NULL);
        }
    }
}

static void gemm_f32(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate, const void *next) {
    gemm(FB_F32, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate, next);
}

static void gemm_f16(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate, const void *next) {
    gemm(FB_F16, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate, next);
}

static void gemm_bf16(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx, size_t n_tokens,
    float *y, size_t ldy, bool accumulate, const void *next) {
    gemm(FB_BF16, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate, next);
}

static void gemm_bytes(struct fb_panels panels, size_t n_panels, size_t n_k, const float *x, size_t ldx,
    size_t n_tokens, float *y, size_t ldy, bool accumulate, const void *next) {
    gemm(FB_Q8_0, panels, n_panels, n_k, x, ldx, n_tokens, y, ldy, accumulate, next);
}

#include "kernels/blocks_simd.h"

/* ---- Elementwise and sums ---------------------------------------------------------------------------------------- */

/* The last n < 16 numbers, padded with zeros to a whole vector. */
INLINE v16 load_tail(const float *x, size_t n) {
    float padded[FB_LANES] = {0};
    memcpy(padded, x, n * sizeof *x);
    return v16_load(padded);
}

INLINE void store_tail(float *out, v16 value, size_t n) {
    float padded[FB_LANES];
    v16_store(padded, value);
    memcpy(out, padded, n * sizeof *out);
}

/* MAP(n, out, expression): out[i] = expression over n numbers, 16 at a time. Inside it X(pointer) loads the
 * vector at the current index, padded with zeros at the end. */
#define MAP(n, out, expression)                                                                                        \
    do {                                                                                                               \
        size_t map_i = 0;                                                                                              \
        for (; map_i + FB_LANES <= (n); map_i += FB_LANES) {                                                           \
            const size_t rest = FB_LANES;                                                                              \
            (void)rest;                                                                                                \
            v16_store((out) + map_i, expression);                                                                      \
        }                                                                                                              \
        if (map_i < (n)) {                                                                                             \
            const size_t rest = (n) - map_i;                                                                           \
            store_tail((out) + map_i, expression, rest);                                                               \
        }                                                                                                              \
    } while (0)
#define X(pointer) (rest == FB_LANES ? v16_load((pointer) + map_i) : load_tail((pointer) + map_i, rest))

INLINE v16 exp_v16(v16 x) {
    v16 clamped = v16_max(v16_set1(FB_EXP_LOW), v16_min(v16_set1(FB_EXP_HIGH), x));
    v16 n = v16_round(v16_mul(clamped, v16_set1(FB_EXP_LOG2E)));
    v16 r = v16_negate_fma(n, v16_set1(FB_EXP_LN2_HI), clamped);
    r = v16_negate_fma(n, v16_set1(FB_EXP_LN2_LO), r);
    v16 p = v16_set1(FB_EXP_P0);
    p = v16_fma(p, r, v16_set1(FB_EXP_P1));
    p = v16_fma(p, r, v16_set1(FB_EXP_P2));
    p = v16_fma(p, r, v16_set1(FB_EXP_P3));
    p = v16_fma(p, r, v16_set1(FB_EXP_P4));
    p = v16_fma(p, r, v16_set1(FB_EXP_P5));
    p = v16_add(v16_fma(p, v16_mul(r, r), r), v16_set1(1.0f));
    return v16_keep_at_least(v16_mul(p, v16_power_of_2(n)), x, v16_set1(FB_EXP_LOW));
}

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out) {
    v16 squares = v16_zero();
    size_t i = 0;
    for (; i + FB_LANES <= n; i += FB_LANES) {
        v16 value = v16_load(x + i);
        squares = v16_fma(value, value, squares);
    }
    if (i < n) {
        v16 value = load_tail(x + i, n - i);
        squares = v16_fma(value, value, squares);
    }
    float lanes[FB_LANES];
    v16_store(lanes, squares);
    v16 factor = v16_set1(1.0f / sqrtf(fb_fold(lanes) / (float)n + eps));
    MAP(n, out, v16_mul(v16_mul(X(x), factor), X(weight)));
}

static float max(const float *x, size_t n) {
    v16 best = v16_set1(-INFINITY);
    size_t i = 0;
    for (; i + FB_LANES <= n; i += FB_LANES)
        best = v16_max(v16_load(x + i), best);
    float lanes[FB_LANES];
    v16_store(lanes, best);
    for (; i < n; i++)
        lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    for (int j = 1; j < FB_LANES; j++)
        lanes[0] = lanes[j] > lanes[0] ? lanes[j] : lanes[0];
    return lanes[0];
}

static float exp_sum(const float *x, size_t n, float factor, float shift, float *out) {
    v16 sum = v16_zero(), factors = v16_set1(factor), minus_shift = v16_set1(-shift);
    size_t i = 0;
    for (; i + FB_LANES <= n; i += FB_LANES) {
        v16 value = exp_v16(v16_fma(v16_load(x + i), factors, minus_shift));
        v16_store(out + i, value);
        sum = v16_add(sum, value);
    }
    if (i < n) {
        store_tail(out + i, exp_v16(v16_fma(load_tail(x + i, n - i), factors, minus_shift)), n - i);
        sum = v16_add(sum, load_tail(out + i, n - i));
    }
    float lanes[FB_LANES];
    v16_store(lanes, sum);
    return fb_fold(lanes);
}

static void scale(float *x, size_t n, float factor) {
    MAP(n, x, v16_mul(X(x), v16_set1(factor)));
}

static void merge(float *a, float a_factor, const float *b, float b_factor, size_t n) {
    MAP(n, a, v16_fma(X(b), v16_set1(b_factor), v16_mul(X(a), v16_set1(a_factor))));
}

static void add(float *y, const float *x, size_t n) {
    MAP(n, y, v16_add(X(y), X(x)));
}

static void multiply(float *y, const float *x, size_t n) {
    MAP(n, y, v16_mul(X(y), X(x)));
}

INLINE v16 swiglu_v16(v16 gate, v16 up) {
    v16 minus_gate = v16_mul(gate, v16_set1(-1.0f));
    return v16_mul(v16_div(gate, v16_add(v16_set1(1.0f), exp_v16(minus_gate))), up);
}

static void swiglu(const float *gate, const float *up, size_t n, float *out) {
    MAP(n, out, swiglu_v16(X(gate), X(up)));
}

static void rotate(float *a, float *b, const float *cos, const float *sin, size_t n) {
    for (size_t i = 0; i < n; i += FB_LANES) {
        const size_t map_i = i, rest = n - i < FB_LANES ? n - i : FB_LANES;
        v16 first = X(a), second = X(b), cosine = X(cos), sine = X(sin);
        v16 minus = v16_mul(v16_mul(second, sine), v16_set1(-1.0f));
        store_tail(a + i, v16_fma(first, cosine, minus), rest);
        store_tail(b + i, v16_fma(second, cosine, v16_mul(first, sine)), rest);
    }
}

/* ---- Number formats ---------------------------------------------------------------------------------------------- */

static void narrow_f32(const float *x, size_t n, void *out) {
    memcpy(out, x, n * sizeof *x);
}

static void widen_f32(const void *x, size_t n, float *out) {
    memcpy(out, x, n * sizeof *out);
}

#define FORMAT(name)                                                                                                   \
    static void narrow_##name(const float *x, size_t n, void *out) {                                                   \
        size_t i = 0;                                                                                                  \
        for (; i + FB_LANES <= n; i += FB_LANES)                                                                       \
            v16_store_##name((uint16_t *)out + i, v16_load(x + i));                                                    \
        if (i < n) {                                                                                                   \
            uint16_t padded[FB_LANES];                                                                                 \
            v16_store_##name(padded, load_tail(x + i, n - i));                                                         \
            memcpy((uint16_t *)out + i, padded, (n - i) * sizeof *padded);                                             \
        }                                                                                                              \
    }                                                                                                                  \
    static void widen_##name(const void *x, size_t n, float *out) {                                                    \
        size_t i = 0;                                                                                                  \
        for (; i + FB_LANES <= n; i += FB_LANES)                                                                       \
            v16_store(out + i, v16_load_##name((const uint16_t *)x + i));                                              \
        if (i < n) {                                                                                                   \
            uint16_t padded[FB_LANES] = {0};                                                                           \
            memcpy(padded, (const uint16_t *)x + i, (n - i) * sizeof *padded);                                         \
            store_tail(out + i, v16_load_##name(padded), n - i);                                                       \
        }                                                                                                              \
    }
FORMAT(f16)
FORMAT(bf16)
#undef FORMAT
#undef X
#undef MAP

#include "kernels/pairs_simd.h"

#include "kernels/recurrent_simd.h"

#include "kernels/vocabulary.h"

#include "kernels/elementwise.h"

const struct fb_kernels KERNEL_TABLE = {
    .gemm = {gemm_f32, gemm_f16, gemm_bf16},
    .gemm_bytes = gemm_bytes,
    .gemm_blocks = gemm_blocks,
    .quantize = quantize,
    .gemm_pairs = gemm_pairs,
    .narrow_pairs = narrow_pairs,
    .rms_norm = rms_norm,
    .max = max,
    .exp_sum = exp_sum,
    .scale = scale,
    .merge = merge,
    .add = add,
    .multiply = multiply,
    .swiglu = swiglu,
    .rotate = rotate,
    .short_conv = short_conv,
    .delta_rule = delta_rule,
    .ssm = ssm,
    .narrow = {narrow_f32, narrow_f16, narrow_bf16},
    .widen = {widen_f32, widen_f16, widen_bf16},
    VOCABULARY_KERNELS,
    ELEMENTWISE_KERNELS,
};
